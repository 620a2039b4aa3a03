# kill -9 and restart at random instants under fio with verification: no command fails, nothing that was acknowledged
# is lost, the image is clean. ROUNDS (default 25) kills for each of FORMATS (default: raw, qcow2).
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/k
RANDOM=${SEED:-$$}
for case in ${FORMATS:-raw:loopback qcow2:loopback qcow2:iscsi}; do
    format=${case%:*} transport=${case#*:}
    step "$format over $transport"
    rm -f /scratch/k/disk
    qemu-img create -q -f "$format" /scratch/k/disk 256M
    create_backstore kill /scratch/k/disk "@format=$format"
    lun_up "$transport" kill
    rm -f /scratch/k/stop
    (
        # Each pass writes a new pattern over the whole area and verifies it after the last kill it met.
        pass=0
        while [ ! -e /scratch/k/stop ]; do
            pass=$((pass + 1))
            fio --name=pass --filename="$DISK" --size=96m --rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=16 \
                --direct=1 --fsync=200 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_pattern=0 --randseed=$pass \
                --output="/bed/out/fio.log" || { cp /bed/out/fio.log /bed/out/fio.failed; exit 1; }
            echo $pass >/scratch/k/passes
        done
    ) &
    load=$!
    echo 0 >/scratch/k/passes
    for round in $(seq "${ROUNDS:-25}"); do
        sleep "$((RANDOM % 3)).$((RANDOM % 10))"
        stop_daemon KILL 2>/dev/null
        sleep "0.$((RANDOM % 10))"
        start_daemon
        kill -0 $load 2>/dev/null || fail "fio failed in round $round: $(cat /bed/out/fio.failed)"
    done
    touch /scratch/k/stop
    wait $load || fail "fio failed: $(cat /bed/out/fio.failed)"
    step "${ROUNDS:-25} kills, $(cat /scratch/k/passes) passes of fio verified"
    [ "$(cat /scratch/k/passes)" -gt 0 ] || fail "no pass of fio ended"
    if dmesg | grep -E "I/O error|Buffer I/O|timing out|rejecting I/O"; then fail "the kernel reports failed commands"; fi
    dd if="$DISK" of=/scratch/k/after bs=1M status=none
    lun_down "$transport" kill
    delete_backstore kill
    qemu-img convert -f "$format" -O raw /scratch/k/disk /scratch/k/image
    want_same /scratch/k/after /scratch/k/image
    [ "$format" = raw ] || qemu-img check /scratch/k/disk || fail "qemu-img check"
    rm -f /scratch/k/*
done
stop_daemon

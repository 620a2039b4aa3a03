# Many LUNs (LUNS, default 60) made and removed by several processes at once; the daemon's threads do not grow with them.
. /bed/guest/lib.sh
LUNS=${LUNS:-60}
start_daemon
mkdir -p /scratch/m
threads() { ls "/proc/$DAEMON_PID/task" | wc -l; }
make_one() { # NUMBER: by configfs, since sixty targetcli calls take minutes
    local device=$CONFIGFS/core/user_$1/many$1 target=$CONFIGFS/loopback/naa.50014050000000$(printf %02x "$1")/tpgt_1
    mkdir -p "$device"
    echo -n "dev_config=img/@id=m$1@file=/scratch/m/$1.qcow2,max_data_area_mb=8" >"$device/control"
    echo -n dev_size=8388608 >"$device/control"
    echo 1 >"$device/enable"
    mkdir -p "$target/lun/lun_0"
    echo "naa.50014051000000$(printf %02x "$1")" >"$target/nexus"
    ln -s "$device" "$target/lun/lun_0/disk"
}
drop_one() {
    local device=$CONFIGFS/core/user_$1/many$1 target=$CONFIGFS/loopback/naa.50014050000000$(printf %02x "$1")/tpgt_1
    rm "$target/lun/lun_0/disk"
    rmdir "$target/lun/lun_0" "$target" "${target%/*}" "$device" "${device%/*}"
}
for n in $(seq "$LUNS"); do
    qemu-img create -q -f qcow2 "/scratch/m/$n.qcow2" 8M
    qemu-io -f qcow2 -c "write -q -P $n 0 64k" "/scratch/m/$n.qcow2"
done
step "one LUN"
make_one 1
one=$(threads)
step "$LUNS LUNs, four makers"
for worker in 0 1 2 3; do
    (for n in $(seq 2 "$LUNS"); do [ $((n % 4)) != $worker ] || make_one "$n"; done) &
    makers+=($!)
done
for maker in "${makers[@]}"; do wait "$maker" || fail "a maker failed"; done
many=$(threads)
step "threads: $one with one LUN, $many with $LUNS; RSS $(sed -n 's/^VmRSS:\s*//p' "/proc/$DAEMON_PID/status")"
[ "$many" -le $((one + 2)) ] || fail "$one threads with one LUN, $many with $LUNS"
for n in $(seq "$LUNS"); do
    loopback_disk "naa.50014050000000$(printf %02x "$n")"
    want_equal "the first byte of LUN $n" "$(head -c 1 "$DISK" | od -An -tu1 | tr -d ' ')" "$((n & 255))"
    echo "lun.$n" | dd of="$DISK" bs=4k seek=100 conv=sync oflag=direct status=none
done
step "removed by four"
makers=()
for worker in 0 1 2 3; do
    (for n in $(seq "$LUNS"); do [ $((n % 4)) != $worker ] || drop_one "$n"; done) &
    makers+=($!)
done
for maker in "${makers[@]}"; do wait "$maker" || fail "a remover failed"; done
no_leftovers
for n in $(seq "$LUNS"); do
    want_match "what was written to LUN $n" "$(qemu-io -r -f qcow2 -c "read -v 400k 512" "/scratch/m/$n.qcow2" | head -1)" "lun.$n"
done
daemon_alive || fail "the daemon is gone"
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

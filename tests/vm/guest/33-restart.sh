# The daemon ends (SIGTERM, then kill -9) and comes back under a mounted file system that is being written: the disk
# resumes, no write that was acknowledged is lost, the image is clean at the end.
. /bed/guest/lib.sh
start_daemon

mkdir -p /scratch/r
writer() { # writes and syncs numbered files until told to stop; logs what sync has acknowledged
    local n=0
    while [ ! -e /scratch/stop ]; do
        n=$((n + 1))
        head -c $((4096 * (1 + n % 37))) /dev/urandom >"/mnt/d/$n" && sync "/mnt/d/$n" || { echo "write $n failed"; return 1; }
        echo "$(sha256sum <"/mnt/d/$n" | cut -d' ' -f1) $n" >>/scratch/acknowledged
        # The file system is small: keep the last forty.
        [ "$n" -le 40 ] || rm -f "/mnt/d/$((n - 40))"
    done
}
acknowledged() { wc -l </scratch/acknowledged; }
check_files() {
    local sum n
    while read -r sum n; do
        want_equal "file $n after $1" "$(sha256sum <"$2/$n" | cut -d' ' -f1)" "$sum"
    done < <(tail -n 35 /scratch/acknowledged)
}

scenario() { # NAME FILE TRANSPORT
    step "$1 over $3"
    create_backstore "$1" "$2"
    lun_up "$3" "$1"
    mkfs.ext4 -q "$DISK"
    mount -o errors=remount-ro "$DISK" /mnt
    mkdir /mnt/d
    rm -f /scratch/stop
    : >/scratch/acknowledged
    writer >/scratch/writer.log 2>&1 &
    local writer_pid=$! count
    for signal in TERM KILL KILL TERM KILL; do
        count=$(($(acknowledged) + 15))
        wait_for "$PATIENCE" eval "[ \$(acknowledged) -ge $count ]" || fail "no progress before SIG$signal: $(cat /scratch/writer.log)"
        stop_daemon "$signal"
        sleep 0.3
        start_daemon
        count=$(($(acknowledged) + 5))
        wait_for "$PATIENCE" eval "[ \$(acknowledged) -ge $count ]" || fail "no progress after SIG$signal: $(cat /scratch/writer.log)"
        kill -0 "$writer_pid" || fail "the writer failed after SIG$signal: $(cat /scratch/writer.log)"
        step "resumed after SIG$signal, $(acknowledged) files acknowledged"
    done
    touch /scratch/stop
    wait "$writer_pid" || fail "the writer failed: $(cat /scratch/writer.log)"
    check_files "the restarts" /mnt/d
    umount /mnt
    want_fsck "$DISK"
    if dmesg | grep -E "I/O error|Buffer I/O|EXT4-fs error"; then fail "the kernel reports I/O errors"; fi
    lun_down "$3" "$1"
    delete_backstore "$1"
    case $2 in *.qcow2) want_clean "$2" ;; esac
    qemu-img convert -O raw "$2" /scratch/r/image
    mount -o ro,loop /scratch/r/image /media
    check_files "qemu-img convert" /media/d
    umount /media
    rm /scratch/r/image
}
image_of() { # NAME: makes it, prints its path
    case $1 in
        small-clusters) qemu-img create -q -f qcow2 -o cluster_size=4k /scratch/r/$1.qcow2 96M && echo /scratch/r/$1.qcow2 ;;
        plain) qemu-img create -q -f raw /scratch/r/$1.raw 96M && echo /scratch/r/$1.raw ;;
        clusters) qemu-img create -q -f qcow2 -o cluster_size=64k /scratch/r/$1.qcow2 96M && echo /scratch/r/$1.qcow2 ;;
    esac
}
# Under emulation, the two that differ most.
cases="small-clusters:loopback plain:iscsi clusters:iscsi"
[ "$kind" = uml ] || cases="small-clusters:loopback clusters:iscsi"
for case in ${RESTARTS:-$cases}; do
    scenario "${case%:*}" "$(image_of "${case%:*}")" "${case#*:}"
done
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

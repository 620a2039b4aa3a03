# ext4, xfs and btrfs on a LUN, with fio writing and verifying on them, and their own checkers afterwards.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/f
try() { # FILE-SYSTEM TRANSPORT FORMAT OPTIONS
    step "$1 over $2 on $3 ($4)"
    local file=/scratch/f/disk
    rm -f "$file"
    qemu-img create -q -f "$3" ${4:+-o "$4"} "$file" 400M
    create_backstore "fs$1" "$file" "@format=$3"
    lun_up "$2" "fs$1"
    case $1 in
        ext4) mkfs.ext4 -q "$DISK" ;;
        xfs) mkfs.xfs -q "$DISK" ;;
        btrfs) mkfs.btrfs -q "$DISK" ;;
    esac
    mount "$DISK" /mnt
    fio --name=verify --directory=/mnt --size=24m --numjobs=2 --rw=randwrite --bsrange=4k-128k --ioengine=libaio --iodepth=16 \
        --direct=1 --fsync=64 --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=7 --output=/bed/out/fio.log ||
        fail "fio: $(cat /bed/out/fio.log)"
    umount /mnt
    case $1 in
        ext4) want_fsck "$DISK" ;;
        xfs) xfs_repair -n "$DISK" >/bed/out/fsck.log 2>&1 || fail "xfs_repair -n: $(cat /bed/out/fsck.log)" ;;
        btrfs) btrfs check "$DISK" >/bed/out/fsck.log 2>&1 || fail "btrfs check: $(cat /bed/out/fsck.log)" ;;
    esac
    dd if="$DISK" of=/scratch/f/after bs=1M status=none
    lun_down "$2" "fs$1"
    delete_backstore "fs$1"
    qemu-img convert -f "$3" -O raw "$file" /scratch/f/image
    want_same /scratch/f/after /scratch/f/image
    [ "$3" = raw ] || want_clean "$file"
    rm -f /scratch/f/*
}
try ext4 loopback qcow2 cluster_size=64k
try xfs iscsi qcow2 cluster_size=16k,refcount_bits=8
try btrfs loopback qcow2 cluster_size=128k
try ext4 iscsi raw ""
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

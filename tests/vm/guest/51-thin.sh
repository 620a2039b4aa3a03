# Thin provisioning: the LUN says what it can, discards reach the image, its file shrinks, and what was discarded reads
# as zeros.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/t

allocated() { # FILE: KiB on disk
    sync "$1"
    du -k "$1" | cut -f1
}
try() { # NAME FORMAT FILE-SYSTEM TRANSPORT
    step "$1: $2, $3, $4"
    local file=/scratch/t/$1
    qemu-img create -q -f "$2" "$file" 400M
    create_backstore "$1" "$file" "@format=$2"
    lun_up "$4" "$1"
    local limits
    limits=$(lsblk -D -n -b -o DISC-GRAN,DISC-MAX "$DISK" | head -1)
    [ "$(awk '{ print ($1 > 0 && $2 > 0) }' <<<"$limits")" = 1 ] || fail "lsblk -D shows no discard: $limits"
    want_match "VPD B2" "$(sg_vpd -p lbpv "$DISK")" "LBPU\)?[:=] *1"
    case $3 in
        ext4) mkfs.ext4 -q -E nodiscard "$DISK" ;;
        xfs) mkfs.xfs -q -K "$DISK" ;;
        btrfs) mkfs.btrfs -q -K "$DISK" ;;
    esac
    mount "$DISK" /mnt
    echo kept >/mnt/kept
    sync
    local before full after
    before=$(allocated "$file")
    dd if=/dev/urandom of=/mnt/big bs=1M count=100 status=none
    sync
    full=$(allocated "$file")
    [ "$full" -gt $((before + 90000)) ] || fail "100 MiB written, and the file grew from $before to $full KiB"
    rm /mnt/big
    sync
    fstrim -v /mnt || fail "fstrim"
    # What was given back may be used, or leave the file, once the change is durable: at the next flush.
    sg_sync "$DISK" || fail "sg_sync"
    after=$(allocated "$file")
    [ "$after" -lt $((full - 80000)) ] || fail "fstrim left $after of $full KiB (before: $before)"
    want_equal "the kept file" "$(cat /mnt/kept)" kept
    umount /mnt
    step "blkdiscard, blkdiscard -z, sg_unmap, sg_write_same"
    dd if=/dev/urandom of="$DISK" bs=1M count=16 oflag=direct status=none
    blkdiscard -o 1M -l 4M "$DISK" || fail "blkdiscard"
    blkdiscard -z -o 6M -l 1M "$DISK" || fail "blkdiscard -z"
    sg_unmap --lba=$((8 * 2048)) --num=2048 --force "$DISK" || fail "sg_unmap"
    sg_write_same --unmap --lba=$((10 * 2048)) --num=2048 --in=/dev/zero --xferlen=512 "$DISK" >/dev/null || fail "sg_write_same --unmap"
    blockdev --flushbufs "$DISK"
    local at
    for at in 1 2 3 4 6 8 10; do
        want_equal "the MiB at $at" "$(dd if="$DISK" bs=1M skip=$at count=1 iflag=direct status=none | tr -d '\0' | wc -c)" 0
    done
    for at in 0 5 7 9 11; do
        [ "$(dd if="$DISK" bs=1M skip=$at count=1 iflag=direct status=none | tr -d '\0' | wc -c)" -gt 1000000 ] ||
            fail "the MiB at $at, which was not discarded, is gone"
    done
    blkdiscard -f "$DISK" || fail "blkdiscard of the whole disk"
    after=$(allocated "$file")
    [ "$after" -lt 20000 ] || fail "blkdiscard of the whole disk left $after KiB"
    dd if="$DISK" of=/scratch/t/read bs=1M status=none
    lun_down "$4" "$1"
    delete_backstore "$1"
    qemu-img convert -f "$2" -O raw "$file" /scratch/t/image
    want_same /scratch/t/read /scratch/t/image
    [ "$2" = raw ] || want_clean "$file"
    rm -f /scratch/t/*
}
try a raw ext4 loopback
try b qcow2 ext4 iscsi
try c qcow2 xfs loopback
try d raw xfs iscsi

step "discard=ignore"
qemu-img create -q -f qcow2 /scratch/t/n 64M
create_backstore n /scratch/t/n @discard=ignore
loopback_up n
want_equal "the discard granularity" "$(lsblk -D -n -b -o DISC-MAX "$DISK" | head -1 | tr -d ' ')" 0
loopback_down n
delete_backstore n
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

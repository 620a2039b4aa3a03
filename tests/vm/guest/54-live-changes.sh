# Changes of a LUN while it is in use: growing (raw, qcow2, vhdx), another image behind it (a live snapshot by a new overlay),
# the write cache; a mounted file system and verified writes go on throughout.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/l
cd /scratch/l

grown() { # NAME BYTES: the initiator has seen it
    wait_for "$PATIENCE" size_is "$2" || fail "$1 has $(blockdev --getsize64 "$DISK") bytes, wanted $2"
}
size_is() {
    # Linux asks again when it is told to, and after the unit attention.
    echo 1 >"/sys/block/${DISK##*/}/device/rescan"
    [ "$(blockdev --getsize64 "$DISK")" = "$1" ]
}
for format in raw qcow2 vhdx; do
    for way in loopback iscsi; do
        name=g$format$way
        step "$format over $way grows from 64 to 128 MiB with a file system on it"
        qemu-img create -q -f "$format" "$name" 64M
        create_backstore "$name" "/scratch/l/$name" "@format=$format" 64M
        lun_up "$way" "$name"
        mke2fs -q -F -t ext4 "$DISK"
        mkdir -p /mnt/live
        mount "$DISK" /mnt/live
        head -c 8M /dev/urandom >/mnt/live/before
        echo 134217728 >"$(core_of "$name")/attrib/dev_size"
        # Not through the page cache: the attention goes to whoever asks next.
        grown "$name" 134217728
        want_match "the kernel's messages" "$(dmesg | tail -n 30)" "capacity|detected capacity change|Mode parameters changed|Capacity data has changed"
        resize2fs "$DISK" >/dev/null 2>&1 || fail "resize2fs"
        head -c 40M /dev/urandom >/mnt/live/after
        before=$(sha256sum </mnt/live/before) after=$(sha256sum </mnt/live/after)
        umount /mnt/live
        blockdev --flushbufs "$DISK"
        mount "$DISK" /mnt/live
        want_equal "what was written before" "$(sha256sum </mnt/live/before)" "$before"
        want_equal "what was written after" "$(sha256sum </mnt/live/after)" "$after"
        umount /mnt/live
        want_fsck "$DISK"
        lun_down "$way" "$name"
        delete_backstore "$name"
        want_equal "the image's size" "$(size_of "$name" "$format")" 134217728
        [ "$format" != qcow2 ] || want_clean "$name"
        rm "$name"
    done
done

step "a size that cannot be is refused, and the old one is kept"
qemu-img create -q -f qcow2 base.qcow2 64M
create_backstore live /scratch/l/base.qcow2
lun_up loopback live
core=$(core_of live)
must_fail sh -c "echo 1000 >$core/attrib/dev_size"
want_equal "dev_size" "$(cat "$core/attrib/dev_size")" 67108864

step "a live snapshot: a new overlay under a LUN that is being written to"
fio --name=live --filename="$DISK" --rw=randwrite --bs=4k --size=32m --iodepth=16 --ioengine=libaio --direct=1 --loops=3 \
    --verify=crc32c --verify_backlog=512 --verify_fatal=1 >/bed/out/fio.log 2>&1 &
writer=$!
for n in 1 2 3; do
    sleep 1
    below=base.qcow2
    [ "$n" = 1 ] || below=over$((n - 1)).qcow2
    # The image is in use: QEMU may look at it without locks for the name and size alone.
    qemu-img create -q -f qcow2 -u -b "$below" -F qcow2 "over$n.qcow2" 64M
    echo -n "img/@id=test@file=/scratch/l/over$n.qcow2" >"$core/attrib/dev_config" || fail "the change to overlay $n was refused"
done
wait "$writer" || fail "fio: $(tail -n 20 /bed/out/fio.log)"
want_match "what is served" "$(cat "$core/attrib/dev_config")" "over3"
must_fail sh -c "echo -n img/@file=/scratch/l/absent.qcow2 >$core/attrib/dev_config"
want_match "what is served still" "$(cat "$core/attrib/dev_config")" "over3"
sum=$(sha256sum <"$DISK")

step "the write cache off and on"
echo 0 >"$core/attrib/emulate_write_cache"
caching() { sg_modes -p 8 -6 "$DISK" 2>&1 | grep '^ 00 '; }
want_match "the caching page" "$(caching)" "00     08 12 00"
echo 1 >"$core/attrib/emulate_write_cache"
want_match "the caching page" "$(caching)" "00     08 12 04"
blockdev --flushbufs "$DISK"
want_equal "the disk's digest" "$(sha256sum <"$DISK")" "$sum"
lun_down loopback live
delete_backstore live
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
for image in base.qcow2 over1.qcow2 over2.qcow2 over3.qcow2; do want_clean "$image"; done
want_equal "the image's digest" "$(qemu-img convert -O raw over3.qcow2 out.raw && sha256sum <out.raw)" "$sum"

# What lies on something else: differencing images, also inside streams, and overlays over streams, kept and thrown away. Mounted, written to,
# and mounted again.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/x
cd /scratch/x

up() { # NAME FILE SIZE [@key=value...] [MOUNT-OPTION]
    create_backstore "$1" "/scratch/x/$2" "${4:-}" "$3"
    loopback_up "$1"
    mount ${5:+-o "$5"} "$(partition 1)" /mnt
}
down() {
    umount /mnt
    want_fsck "${DISK}1"
    loopback_down "$1"
    delete_backstore "$1"
}

for kind in vhd vhdx; do
    step "a differencing $kind inside a stream, its parent too"
    cp "$SAMPLES/parent.$kind.xz" "$SAMPLES/child.$kind.xz" .
    up d "child.$kind.xz" 294912 "" ro
    want_equal "the file that the child has" "$(cat /mnt/ADDED.txt)" "Written in the child, not in its parent."
    grep -q 'lives on' /mnt/HELLO.txt || fail "the parent's files are not seen"
    want_equal "the read-only flag of $DISK" "$(blockdev --getro "$DISK")" 1
    down d

    step "a differencing $kind, read-write"
    for file in parent child; do
        # The child names its parent as it is: unpacked, they keep their names.
        xz -dc "$file.$kind.xz" >unpacked
        mv unpacked "$file.$kind.xz"
    done
    before=$(sha256sum <"parent.$kind.xz")
    up d "child.$kind.xz" 294912
    echo again >>/mnt/ADDED.txt
    rm /mnt/note-1.txt
    down d
    up d "child.$kind.xz" 294912 "" ro
    want_equal "what was added" "$(tail -n 1 /mnt/ADDED.txt)" again
    [ ! -e /mnt/note-1.txt ] || fail "a removed file is back"
    down d
    want_equal "the parent's digest" "$(sha256sum <"parent.$kind.xz")" "$before"
    img-tcmu check "child.$kind.xz" >/dev/null || fail "img-tcmu check child.$kind.xz"
    rm ./*."$kind".xz
done

qemu-img convert -f qcow2 -O qcow2 "$SAMPLES/base.qcow2" base.qcow2
qemu-img convert -f qcow2 -O raw base.qcow2 plain.raw
size=$(stat -c %s plain.raw)
xz -T2 --block-size=256KiB -c base.qcow2 >base.qcow2.xz
gzip -c plain.raw >plain.raw.gz
rm base.qcow2
for file in base.qcow2.xz plain.raw.gz; do
    step "an overlay over $file"
    before=$(sha256sum <"$file")
    up o "$file" "$size" "@overlay=/scratch/x/over.qcow2"
    (cd /mnt && sha256sum --quiet -c SHA256SUMS) || fail "the files of $file are not what SHA256SUMS says"
    dd if=/dev/urandom of=/mnt/random bs=1k count=3000 status=none
    rm /mnt/data/noise.bin
    sum=$(sha256sum </mnt/random)
    # What was acknowledged outlives the daemon.
    dd if=/dev/urandom of=/mnt/acknowledged bs=4k count=50 oflag=direct status=none
    direct=$(dd if=/mnt/acknowledged bs=4k iflag=direct status=none | sha256sum)
    stop_daemon KILL
    start_daemon
    want_equal "the digest of what was acknowledged" "$(dd if=/mnt/acknowledged bs=4k iflag=direct status=none | sha256sum)" "$direct"
    down o
    up o "$file" "$size" "@overlay=/scratch/x/over.qcow2" ro
    want_equal "the digest of what was written" "$(sha256sum </mnt/random)" "$sum"
    [ ! -e /mnt/data/noise.bin ] || fail "a removed file is back"
    down o
    img-tcmu check over.qcow2 >/dev/null || fail "img-tcmu check over.qcow2"
    want_equal "the stream's digest" "$(sha256sum <"$file")" "$before"

    step "the overlay's partition as a disk of its own, then $file for a while"
    create_backstore p "/scratch/x/$file" "@overlay=/scratch/x/over.qcow2@partition=1" $((30720 * 1024))
    loopback_up p
    mount -o ro "$DISK" /mnt
    want_equal "the digest of what was written" "$(sha256sum </mnt/random)" "$sum"
    umount /mnt
    loopback_down p
    delete_backstore p
    rm over.qcow2
    up s "$file" "$size" "@snapshot=on"
    touch /mnt/for-a-while
    down s
    up s "$file" "$size" "@snapshot=on" ro
    [ ! -e /mnt/for-a-while ] || fail "a thrown-away file is back"
    down s
    want_equal "the stream's digest" "$(sha256sum <"$file")" "$before"
done

step "an overlay that QEMU reads, and one that is of another image"
up o plain.raw "$size" "@format=raw@overlay=/scratch/x/over.qcow2"
echo seen >/mnt/by-qemu
umount /mnt
dd if="$DISK" of=after bs=1M status=none
loopback_down o
delete_backstore o
want_clean over.qcow2
qemu-img convert -f qcow2 -O raw over.qcow2 image
want_same after image
must_fail targetcli_once "/backstores/user:$SUBTYPE" create name=o "size=$size" "cfgstring=@file=/scratch/x/plain.raw.gz@overlay=/scratch/x/over.qcow2"
want_match "the refusal" "$OUTPUT" 'not an overlay of'
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

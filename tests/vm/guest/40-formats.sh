# The same disk in every format: served, mounted, compared; written where the format can be written, and read back by
# qemu-img.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/x
cd /scratch/x
qemu-img convert -f qcow2 -O raw "$SAMPLES/base.qcow2" plain.raw
digest=$(digest_of base.qcow2)
size=$(stat -c %s plain.raw)

up() { # NAME FILE [@key=value...]
    create_backstore "$1" "/scratch/x/$2" "${3:-}" "$size"
    loopback_up "$1"
    want_equal "the digest of $2 at $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$digest"
    mount ${4:+-o "$4"} "$(partition 1)" /mnt
    (cd /mnt && sha256sum --quiet -c SHA256SUMS) || fail "the files of $2 are not what SHA256SUMS says"
}
down() { loopback_down "$1"; delete_backstore "$1"; }

writable() { # QEMU-FORMAT FILE OPTIONS
    step "$2, read-write"
    qemu-img convert -f raw -O "$1" ${3:+-o "$3"} plain.raw "$2"
    up w "$2"
    dd if=/dev/urandom of=/mnt/random bs=1k count=3000 status=none
    rm /mnt/data/noise.bin
    umount /mnt
    want_fsck "${DISK}1"
    dd if="$DISK" of=after bs=1M status=none
    down w
    qemu-img check -q -f "$1" "$2" || [ $? = 63 ] || fail "qemu-img check $2"
    qemu-img convert -f "$1" -O raw "$2" image
    want_same after image
    rm -f after image "$2"
}
read_only() { # FILE COMMAND...: the command writes the file to its standard output
    local file=$1
    shift
    step "$file, read-only"
    "$@" >"$file"
    up r "$file" "" ro
    umount /mnt
    want_equal "the read-only flag of $DISK" "$(blockdev --getro "$DISK")" 1
    down r
    rm "$file"
}

for case in ${FORMATS:-vhdx:dynamic.vhdx:subformat=dynamic vhdx:small.vhdx:subformat=dynamic,block_size=1M \
    vhdx:fixed.vhdx:subformat=fixed vpc:dynamic.vhd:subformat=dynamic,force_size=on vpc:fixed.vhd:subformat=fixed,force_size=on \
    vmdk:sparse.vmdk:subformat=monolithicSparse vdi:disk.vdi: qed:disk.qed: parallels:disk.hdd: qcow:disk.qcow:}; do
    IFS=: read -r format file options <<<"$case"
    writable "$format" "$file" "$options"
done
qemu-img convert -f raw -O qcow2 plain.raw plain.qcow2
qemu-img convert -f raw -O vhdx plain.raw plain.vhdx
dmg() { "$SAMPLES/udif" zlib plain.raw made.dmg && cat made.dmg && rm made.dmg; }
read_only plain.dmg dmg
read_only plain.raw.xz xz -T2 --block-size=1MiB -c plain.raw
read_only single.raw.xz xz -c plain.raw
read_only plain.qcow2.xz xz -T2 --block-size=256KiB -c plain.qcow2
read_only plain.raw.gz gzip -c plain.raw
read_only plain.raw.zst zstd -q -c plain.raw
read_only plain.vhdx.gz gzip -c plain.vhdx
qemu-img convert -f raw -O vmdk -o subformat=streamOptimized plain.raw disk.vmdk
echo '<Envelope/>' >machine.ovf
read_only stream.vmdk cat disk.vmdk
read_only machine.ova tar --format=ustar -cf - machine.ovf disk.vmdk
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

# What 20-loopback and 21-iscsi do with every image, over the transport in $1. Sourced.
transport=$1

# Reads the whole disk in several ways and compares it with qemu-img's view of the image before it was served.
verify_reads() { # FILE RAW
    local sum
    sum=$(sha256sum <"$2" | cut -d' ' -f1)
    want_equal "the digest of $DISK" "$(dd if="$DISK" bs=1M status=none | sha256sum | cut -d' ' -f1)" "$sum"
    want_equal "the digest of the first 6 MiB, read directly by 4 KiB" \
        "$(dd if="$DISK" bs=4k count=1536 iflag=direct status=none | sha256sum)" "$(head -c 6M "$2" | sha256sum)"
}
flush_disk() { sync; blockdev --flushbufs "$DISK"; }

# An image that holds a partition table and a file system with SHA256SUMS in it.
existing_file_system() { # NAME FILE [@key=value...]
    step "$1: ${2##*/} over $transport"
    qemu-img convert -O raw ${4:+-f "$4"} "$2" "/scratch/$1.before"
    create_backstore "$1" "$2" "${3:-}" "$(stat -c %s "/scratch/$1.before")"
    lun_up "$transport" "$1"
    want_equal "the size of $DISK" "$DISK_SIZE" "$(stat -c %s "/scratch/$1.before")"
    verify_reads "$2" "/scratch/$1.before"
    rm "/scratch/$1.before"
    mount "$(partition 1)" /mnt
    (cd /mnt && sha256sum --quiet -c SHA256SUMS) || fail "the files are not what SHA256SUMS says"
    echo "written over $transport" >/mnt/WRITTEN.txt
    dd if=/dev/urandom of=/mnt/data/random.bin bs=1k count=700 status=none
    rm /mnt/data/noise.bin
    local sum
    sum=$(sha256sum </mnt/data/random.bin)
    umount /mnt
    flush_disk
    want_fsck "${DISK}1"
    dd if="$DISK" of="/scratch/$1.after" bs=1M status=none
    lun_down "$transport" "$1"
    delete_backstore "$1"

    qemu-img convert -O raw ${4:+-f "$4"} "$2" "/scratch/$1.image"
    want_same "/scratch/$1.after" "/scratch/$1.image"
    mount -o ro,loop,offset="$5" "/scratch/$1.image" /mnt
    want_equal "the written file, by way of qemu-img" "$(sha256sum </mnt/data/random.bin)" "$sum"
    want_equal "the text file, by way of qemu-img" "$(cat /mnt/WRITTEN.txt)" "written over $transport"
    umount /mnt
    [ "${4:-}" = raw ] || want_clean "$2"
    rm -f "/scratch/$1".*
}

# An empty image: partition it, make a file system, fill it, check it.
new_file_system() { # NAME FILE [@key=value...]
    step "$1: a new partition table and file system on ${2##*/} over $transport"
    create_backstore "$1" "$2" "${3:-}"
    lun_up "$transport" "$1"
    printf 'label: gpt\nstart=2048, size=80M\n,,\n' | sfdisk -q "$DISK" || fail "sfdisk on $DISK"
    blockdev --rereadpt "$DISK"
    mkfs.ext4 -q "$(partition 1)"
    mount "${DISK}1" /mnt
    dd if=/dev/urandom of=/mnt/random bs=64k count=300 status=none
    cp -R /usr/share/dbus-1 /mnt/
    sync
    local sum
    sum=$(cd /mnt && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    umount /mnt
    flush_disk
    want_fsck "${DISK}1"
    mount "${DISK}1" /mnt
    want_equal "the files after another mount" "$(cd /mnt && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)" "$sum"
    umount /mnt
    flush_disk
    dd if="$DISK" of="/scratch/$1.after" bs=1M status=none
    lun_down "$transport" "$1"
    delete_backstore "$1"
    qemu-img convert -O raw "$2" "/scratch/$1.image"
    want_same "/scratch/$1.after" "/scratch/$1.image"
    want_clean "$2"
    rm -f "/scratch/$1".*
}

mount_point_free() { ! mountpoint -q /mnt; }
start_daemon

image=$(take_sample base.qcow2 base)
existing_file_system base "$image" "" "" $((1024 * 1024))

image=$(take_sample overlay.qcow2 overlay)
backing=$(sha256sum <"${image%/*}/base.qcow2")
existing_file_system overlay "$image" "" "" $((1024 * 1024))
want_equal "the backing file's digest" "$(sha256sum <"${image%/*}/base.qcow2")" "$backing"

if [ "$SUBTYPE" = img ]; then
    for name in cloud cloud-zstd; do
        image=$(take_sample "$name.qcow2" "$name")
        existing_file_system "$name" "$image" "" "" $((4096 * 1024))
    done

    mkdir -p /scratch/raw
    qemu-img convert -f qcow2 -O raw "$SAMPLES/cloud.qcow2" /scratch/raw/plain.raw
    existing_file_system raw /scratch/raw/plain.raw "" raw $((4096 * 1024))
    qemu-img convert -f qcow2 -O raw "$SAMPLES/base.qcow2" /scratch/raw/plain.raw
    existing_file_system raw-format /scratch/raw/plain.raw "@format=raw" raw $((1024 * 1024))

    step "a raw backing file shorter than its overlay"
    image=$(take_sample over-raw.qcow2 over-raw)
    create_backstore over-raw "$image"
    lun_up "$transport" over-raw
    want_equal "the digest of $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$(digest_of over-raw.qcow2)"
    mount -o ro "$(partition 1)" /mnt
    want_match "the file in it" "$(cat /mnt/HELLO.txt)" "in a partition, on a disk, in an image file"
    umount /mnt
    lun_down "$transport" over-raw
    delete_backstore over-raw
fi

for options in cluster_size=64k cluster_size=4k,refcount_bits=1 cluster_size=2M,lazy_refcounts=on; do
    [ "$SUBTYPE" = img ] || [ "$options" = cluster_size=64k ] || continue
    rm -f /scratch/new.qcow2
    qemu-img create -q -f qcow2 -o "$options" /scratch/new.qcow2 200M
    new_file_system new /scratch/new.qcow2
done
no_leftovers
stop_daemon
want_equal "the daemon's exit status after SIGTERM" "$DAEMON_STATUS" 0

# From an image to its files: 'img-tcmu mount' over the SCSI target when a daemon runs, else over FUSE and a loop device.
. /bed/guest/lib.sh

directory=/tmp/files
mkdir -p "$directory"
modprobe -a loop fuse 2>/dev/null || true

step "a disk with a table and one filesystem"
truncate -s 48M /tmp/disk.raw
printf 'label: gpt\nstart=2048, size=81920\n' | sfdisk -q /tmp/disk.raw
mkdir -p /tmp/content
printf 'hello %.0s' $(seq 1000) >/tmp/content/hello
mkfs.ext4 -q -d /tmp/content -E offset=1048576 /tmp/disk.raw 40M
qemu-img convert -O qcow2 /tmp/disk.raw /tmp/disk.qcow2
digest=$(sha256sum </tmp/disk.qcow2)

gone() { ! grep -q "$1" /proc/mounts && [ -z "$(losetup -l -n)" ] && [ -z "$(ls /run/img-tcmu/mounts 2>/dev/null)" ]; }
try_way() { # WANTED-DEVICE [OPTION OF mount]...
    local device=$1
    shift
    img-tcmu mount "$@" /tmp/disk.qcow2 "$directory" || fail "mount $*"
    want_match "the device" "$(findmnt -n -o SOURCE "$directory")" "^$device"
    want_match "the options" "$(findmnt -n -o OPTIONS "$directory")" '^ro,.*nosuid.*nodev'
    want_same /tmp/content/hello "$directory/hello"
    img-tcmu umount "$directory" || fail "umount $*"
    wait_for 20 gone "$directory" || fail "something is left: $(cat /proc/mounts) $(losetup -l) $(ls /run/img-tcmu/mounts)"
    want_equal "the image" "$(sha256sum </tmp/disk.qcow2)" "$digest"
}

step "without a daemon: FUSE and a loop device"
try_way /dev/loop

step "with one: a disk of the SCSI target"
start_daemon
try_way /dev/sd
no_leftovers
try_way /dev/sd --via tcmu --partition 1
try_way /dev/loop --via fuse

step "written over both ways, read over the other"
for way in tcmu fuse; do
    img-tcmu mount -w --via $way /tmp/disk.qcow2 "$directory"
    head -c 3000000 /dev/urandom >"/tmp/content/$way"
    cp "/tmp/content/$way" "$directory/$way"
    img-tcmu umount "$directory"
done
for way in fuse tcmu; do
    img-tcmu mount --via $way /tmp/disk.qcow2 "$directory"
    for file in tcmu fuse; do want_same "/tmp/content/$file" "$directory/$file"; done
    img-tcmu umount "$directory"
done
want_clean /tmp/disk.qcow2

step "in use, it stays; with umount(8) alone, umount finishes"
img-tcmu mount /tmp/disk.qcow2 "$directory"
exec 5<"$directory/hello"
must_fail img-tcmu umount "$directory"
want_match "the message" "$OUTPUT" 'busy'
exec 5<&-
umount "$directory"
img-tcmu umount "$directory"
no_leftovers

step "interrupted at many instants, nothing is left"
for hundredths in 02 05 10 15 20 30 40 60 80; do
    img-tcmu mount /tmp/disk.qcow2 "$directory" 2>/tmp/said &
    sleep "0.$hundredths"
    kill -INT $! 2>/dev/null || true
    if wait $!; then img-tcmu umount "$directory"; fi
    want_equal "the mount table" "$(grep -c "$directory" /proc/mounts || true)" 0
    no_leftovers
done
want_equal "the states" "$(ls /run/img-tcmu/mounts)" ""
stop_daemon

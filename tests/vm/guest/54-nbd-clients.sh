# The kernel as a client of our NBD server: nbd-client over TCP and Unix sockets, and qemu-nbd as one that passes it on.
. /bed/guest/lib.sh

modprobe nbd nbds_max=4 || skip "this kernel has no nbd"
qemu-img create -q -f qcow2 /tmp/disk.qcow2 64M
serving=
serve() { # ARGUMENTS OF nbd
    img-tcmu nbd "$@" /tmp/disk.qcow2 2>/tmp/nbd.log &
    serving=$!
    wait_for 30 grep -q 'serving' /tmp/nbd.log || fail "it does not listen: $(cat /tmp/nbd.log)"
}
end_serving() {
    kill "$serving"
    wait "$serving" || fail "the server ended badly: $(cat /tmp/nbd.log)"
    want_clean /tmp/disk.qcow2
}
size_is() { [ "$(blockdev --getsize64 "$1")" = "$2" ]; }
ip link set lo up

step "nbd-client over TCP: a filesystem on the kernel's own device"
serve --listen 127.0.0.1:10809 --name disk
nbd-client 127.0.0.1 10809 /dev/nbd0 -N disk || fail "nbd-client over TCP"
wait_for 30 size_is /dev/nbd0 67108864 || fail "the size is $(blockdev --getsize64 /dev/nbd0)"
mkfs.ext4 -q /dev/nbd0
mkdir -p /tmp/mnt
mount -o discard /dev/nbd0 /tmp/mnt
head -c 9000000 /dev/urandom >/tmp/bytes
cp /tmp/bytes /tmp/mnt/bytes
cp /tmp/bytes /tmp/mnt/gone
sync
rm /tmp/mnt/gone
fstrim /tmp/mnt
umount /tmp/mnt
want_fsck /dev/nbd0
nbd-client -d /dev/nbd0 || fail "nbd-client -d"
end_serving

step "nbd-client over a Unix socket, several connections, fio with checksums"
serve --socket /tmp/nbd.sock
nbd-client -unix /tmp/nbd.sock /dev/nbd1 -C 2 || fail "nbd-client over a Unix socket"
wait_for 30 size_is /dev/nbd1 67108864
mount -o ro /dev/nbd1 /tmp/mnt
want_same /tmp/bytes /tmp/mnt/bytes
umount /tmp/mnt
fio --name=verify --filename=/dev/nbd1 --ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite --bsrange=4k-64k --size=24M --verify=crc32c \
    --verify_fatal=1 --do_verify=1 --verify_state_save=0 --end_fsync=1 >/tmp/fio.log 2>&1 || fail "fio: $(cat /tmp/fio.log)"
blockdev --flushbufs /dev/nbd1
nbd-client -d /dev/nbd1
end_serving

step "qemu-nbd puts our export on the kernel's device"
if command -v qemu-nbd >/dev/null; then
    serve --socket /tmp/nbd2.sock
    qemu-nbd -f raw -c /dev/nbd2 'nbd+unix:///?socket=/tmp/nbd2.sock' || fail "qemu-nbd -c"
    wait_for 30 size_is /dev/nbd2 67108864
    head -c 1000000 /tmp/bytes | dd of=/dev/nbd2 bs=64k oflag=direct conv=notrunc iflag=fullblock status=none count=15
    dd if=/dev/nbd2 bs=64k iflag=direct count=15 status=none | cmp -n 983040 - /tmp/bytes || fail "other bytes came back"
    qemu-nbd -d /dev/nbd2 >/dev/null
    # It lets go of our connection a moment later.
    sleep 1
    end_serving
else
    fail "qemu-nbd is missing in the guest (package qemu-utils)"
fi

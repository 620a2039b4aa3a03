# The file system that holds the image is full: writes fail with a reason, reads go on, nothing is damaged, and when
# there is room again writes succeed, without a restart.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/small
truncate -s 64M /scratch/small.ext4
mkfs.ext4 -q -m 0 /scratch/small.ext4
mount -o loop /scratch/small.ext4 /scratch/small
qemu-img create -q -f qcow2 /scratch/small/disk.qcow2 200M
create_backstore full /scratch/small/disk.qcow2
loopback_up full
dd if=/dev/zero bs=1M count=16 status=none | tr '\0' 'A' | dd of="$DISK" bs=1M oflag=direct iflag=fullblock status=none
head -c 20M /dev/urandom >/scratch/small/filler
sync
step "until it is full"
must_fail dd if=/dev/urandom of="$DISK" bs=1M seek=16 count=100 oflag=direct status=none
want_match "what dd says" "$OUTPUT" "no space|input/output|critical space"
dmesg | tail -n 40 >/bed/out/dmesg
want_match "the sense, in the kernel's log" "$(cat /bed/out/dmesg)" "data protect|space allocation failed|critical space"
want_match "the daemon's log" "$(tail -n 50 "$LOG")" "space"
step "a warning"
warned() { grep -q "MiB are left on the file system" "$LOG"; }
wait_for "$PATIENCE" warned || fail "the log does not warn"
dd if="$DISK" of=/dev/null bs=4k count=1 iflag=direct status=none
want_match "the kernel's log" "$(dmesg | tail -n 20)" "thin provisioning soft threshold"
want_equal "what was written before" "$(dd if="$DISK" bs=1M count=16 iflag=direct status=none | tr -d 'A' | wc -c)" 0
step "room again"
rm /scratch/small/filler
sync
dd if=/dev/zero bs=1M count=8 status=none | tr '\0' 'B' | dd of="$DISK" bs=1M seek=120 oflag=direct iflag=fullblock status=none ||
    fail "writes still fail with $(df -h /scratch/small | tail -1)"
want_equal "what was written after" "$(dd if="$DISK" bs=1M skip=120 count=8 iflag=direct status=none | tr -d 'B' | wc -c)" 0
sync
dd if="$DISK" of=/scratch/after bs=1M status=none
loopback_down full
delete_backstore full
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
qemu-img check /scratch/small/disk.qcow2 >/bed/out/check 2>&1 || [ $? = 3 ] || fail "qemu-img check: $(cat /bed/out/check)"
qemu-img convert -O raw /scratch/small/disk.qcow2 /scratch/image
want_same /scratch/after /scratch/image

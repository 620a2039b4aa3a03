# Things that go wrong under load: a backstore deleted, an image truncated underneath, the daemon down during create and
# delete. Each ends in a stated state, leaves no process in D state and no configfs object, and does not touch the
# device beside it.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/u
good=$(take_sample base.qcow2 good)
create_backstore good "$good"
loopback_up good
good_disk=$DISK
good_works() {
    blockdev --flushbufs "$good_disk"
    want_equal "the digest of the device beside it" "$(timeout "$PATIENCE" sha256sum <"$good_disk" | cut -d' ' -f1)" "$(digest_of base.qcow2)"
}
no_stuck_processes() {
    local stuck
    sleep 1
    stuck=$(ps -eo pid,stat,args | awk '$2 ~ /^D/ && $3 !~ /^\[/')
    [ -z "$stuck" ] || fail "processes in D state: $stuck"
}

step "a backstore is deleted under load"
qemu-img create -q -f qcow2 /scratch/u/del.qcow2 64M
create_backstore del /scratch/u/del.qcow2
loopback_up del
fio --name=load --filename="$DISK" --rw=randwrite --bs=16k --iodepth=16 --ioengine=libaio --direct=1 --time_based --runtime=20 \
    --output=/bed/out/fio.log >/dev/null 2>&1 &
load=$!
sleep 3
loopback_down del
delete_backstore del
wait $load && fail "fio did not notice that its disk is gone"
no_stuck_processes
no_leftovers "good "
qemu-img check /scratch/u/del.qcow2 >/bed/out/check 2>&1 || [ $? = 3 ] || fail "qemu-img check: $(cat /bed/out/check)"
good_works

step "an image truncated underneath"
head -c 32M /dev/urandom >/scratch/u/cut.raw
create_backstore cut /scratch/u/cut.raw @format=raw
loopback_up cut
truncate -s 8M /scratch/u/cut.raw
STATUS=0
timeout "$PATIENCE" dd if="$DISK" of=/dev/null bs=64k skip=256 count=64 iflag=direct status=none 2>/bed/out/dd || STATUS=$?
[ "$STATUS" != 124 ] || fail "a read beyond the cut hangs"
daemon_alive || fail "the daemon is gone"
timeout "$PATIENCE" dd if="$DISK" of=/dev/null bs=64k count=64 iflag=direct status=none || fail "a read before the cut fails"
loopback_down cut
delete_backstore cut
good_works

step "the daemon is down while backstores are created and deleted"
stop_daemon KILL 2>/dev/null
qemu-img create -q -f qcow2 /scratch/u/down.qcow2 16M
device=$CONFIGFS/core/user_9/down
mkdir -p "$device"
echo -n "dev_config=img/@id=down@file=/scratch/u/down.qcow2" >"$device/control"
echo -n dev_size=16777216 >"$device/control"
(echo 1 >"$device/enable") &
enabler=$!
sleep 2
start_daemon
wait_for "$PATIENCE" eval "! kill -0 $enabler 2>/dev/null" || fail "enable hangs after the daemon has come back"
wait $enabler || step "enable failed while the daemon was down"
no_stuck_processes
good_works
rmdir "$device" "${device%/*}"
no_leftovers "good "

loopback_down good
delete_backstore good
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean "$good"

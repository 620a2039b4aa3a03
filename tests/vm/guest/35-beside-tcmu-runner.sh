# Beside tcmu-runner, which owns the bus name: user:img is registered through it, both serve their own devices, and
# user:img survives its end and its return, and the end of the bus itself.
. /bed/guest/lib.sh

shown() { grep -q "user:$1" <<<"$(targetcli_once ls /backstores 2>/dev/null)"; }
tcmu-runner >/bed/out/runner.log 2>&1 </dev/null &
runner=$!
wait_for "$PATIENCE" name_owned || fail "tcmu-runner does not own the name"
DAEMON_PID=
img-tcmu serve >>"$LOG" 2>&1 </dev/null &
DAEMON_PID=$!
step "both handlers are there"
wait_for "$PATIENCE" shown img || fail "user:img is not there beside tcmu-runner"
shown qcow || fail "user:qcow is gone"
image=$(take_sample base.qcow2 ours)
# Without this the kernel would take tcmu-runner's answer about our device, if it is the faster one.
create_backstore ours "$image" "" "" nl_reply_supported=-1
loopback_up ours
disk=$DISK
SUBTYPE=qcow DAEMON=tcmu-runner
peer=$(take_sample base.qcow2 theirs)
create_backstore theirs "$peer"
loopback_up theirs
want_equal "the digest of tcmu-runner's disk" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$(digest_of base.qcow2)"
loopback_down theirs
delete_backstore theirs
SUBTYPE=img DAEMON=img-tcmu
ours_reads() {
    blockdev --flushbufs "$disk"
    want_equal "the digest of $disk $1" "$(sha256sum <"$disk" | cut -d' ' -f1)" "$(digest_of base.qcow2)"
}
ours_reads "beside tcmu-runner"
must_fail targetcli_once /backstores/user:img create bad 16M @id=bad@fiel=x
want_match "the answer, by way of tcmu-runner" "$OUTPUT" "fiel"

step "tcmu-runner ends"
kill -9 $runner
wait $runner 2>/dev/null || true
ours_reads "without tcmu-runner"
wait_for "$PATIENCE" shown img || fail "user:img is gone with tcmu-runner"
step "the bus ends and comes back"
kill "$(cat /run/dbus/pid 2>/dev/null || pgrep -o dbus-daemon)"
sleep 1
rm -f /run/dbus/pid
dbus-daemon --system --fork --nopidfile
ours_reads "without the bus"
wait_for "$PATIENCE" shown img || fail "user:img did not come back on the bus"
loopback_down ours
delete_backstore ours
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean "$image"

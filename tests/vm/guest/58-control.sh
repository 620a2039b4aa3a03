# What the operator sees and does while disks are in use: status, metrics, resize, reload, upgrade; and how long initiators
# wait in a planned restart, an upgrade and after kill -9. fio writes and verifies all the time.
. /bed/guest/lib.sh
mkdir -p /scratch/o /etc/img-tcmu
cat >/etc/img-tcmu/config.toml <<'T'
metrics = "127.0.0.1:9750"
[exports.web]
file = "/scratch/o/web.qcow2"
T
start_daemon
qemu-img create -q -f raw /scratch/o/base.raw 64M
qemu-img create -q -f qcow2 -b /scratch/o/base.raw -F raw /scratch/o/web.qcow2
DISK=$(img-tcmu attach --name web /scratch/o/web.qcow2) || fail "attach"
touch /scratch/o/go
(
    while [ -e /scratch/o/go ]; do
        fio --name=verify --filename="$DISK" --offset=1m --size=24m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=8 --direct=1 --fsync=100 \
            --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/bed/out/fio.log || exit 1
        echo >>/scratch/o/passes
    done
) &
load=$!
still_well() { kill -0 $load 2>/dev/null || fail "fio failed: $(cat /bed/out/fio.log)"; }

step "status"
sleep 2
status=$(img-tcmu status)
echo "$status"
want_match "status" "$status" "user_[0-9]+/web +served +64 MiB .*qcow2 /scratch/o/web.qcow2"
want_match "the chain" "$status" "on raw /scratch/o/base.raw"
img-tcmu status --json >/bed/out/status.json
python3 - <<'P' || fail "status --json: $(cat /bed/out/status.json)"
import json
status = json.load(open("/bed/out/status.json"))
[device] = status["devices"]
writes = device["counters"]["writes"]
assert device["state"] == "served" and device["size"] == 64 << 20, device
assert writes["count"] > 50 and writes["errors"] == 0 and writes["bytes"] >= writes["count"] * 4096 and writes["latency"], writes
assert sum(count for _, count in writes["latency"]) == writes["count"]
P
watched=$(timeout 5 img-tcmu status --watch || true)
want_match "rates" "$watched" "WRITES/s"
metrics=$(python3 -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:9750/metrics").read().decode())') || fail "no metrics"
want_match "metrics" "$metrics" 'img_tcmu_bytes_total\{device="user_[0-9]+/web",kind="write"\} [1-9]'
must_fail setpriv --reuid=65534 --regid=65534 --clear-groups img-tcmu status
want_match "a stranger's question" "$OUTPUT" "no daemon answers|Permission denied"
timeout 30 python3 - >/bed/out/top.txt <<'P' || fail "top"
import fcntl, os, pty, struct, sys, termios, time
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("img-tcmu", ["img-tcmu", "top"])
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
time.sleep(3)
os.write(terminal, b"q")
screen = b""
try:
    while part := os.read(terminal, 65536):
        screen += part
except OSError:
    pass  # the end of a terminal
_, status = os.waitpid(pid, 0)
sys.stdout.write(screen.decode())
assert status == 0 and screen.endswith(b"\x1b[?25h\x1b[?1049l"), (status, screen[-20:])
P
want_match "top" "$(cat /bed/out/top.txt)" "user_[0-9]+/web"

step "reload"
echo '[exports.more' >>/etc/img-tcmu/config.toml
must_fail img-tcmu reload
want_match "a bad configuration" "$OUTPUT" "the configuration stays as it was: /etc/img-tcmu/config.toml"
must_fail img-tcmu upgrade
want_match "an upgrade into it" "$OUTPUT" "does not take over: it would not start"
sed -i '$d' /etc/img-tcmu/config.toml
want_match "reload" "$(img-tcmu reload)" "1 exports"

step "resize"
want_match "resize" "$(img-tcmu resize web 96M)" "was 64 MiB and is 96 MiB"
must_fail img-tcmu resize web 32M
must_fail img-tcmu resize nosuch 1G
want_match "resize" "$OUTPUT" "there is no backstore 'nosuch'"
echo 1 >"/sys/block/${DISK##*/}/device/rescan"
want_equal "the disk's size" "$(blockdev --getsize64 "$DISK")" $((96 << 20))
still_well

pause_of() { # WHAT COMMAND...: how long a read took at most while it ran
    local what=$1
    shift
    mkfifo /scratch/o/end
    python3 /bed/guest/pause.py "$DISK" </scratch/o/end >/scratch/o/pause &
    local probe=$!
    exec 7>/scratch/o/end
    sleep 1
    "$@" || fail "$what"
    sleep 1
    echo >&7
    exec 7>&-
    wait $probe || fail "a read failed in $what"
    rm /scratch/o/end
    echo "PAUSE $what, ${disks:-1} disks: $(cut -d' ' -f1 /scratch/o/pause) ms"
    still_well
    no_failures
}
no_failures() { if dmesg | grep -E "I/O error|Buffer I/O|timing out|rejecting I/O"; then fail "the kernel reports failed commands"; fi; }
nothing() { sleep 1; }
killed() { stop_daemon KILL 2>/dev/null; start_daemon; }
restarted() { stop_daemon; start_daemon; }
upgraded() {
    local text before=$DAEMON_PID
    cp "$(command -v img-tcmu)" /scratch/o/next
    text=$(img-tcmu upgrade /scratch/o/next) || return 1
    echo "$text"
    want_match "upgrade" "$text" "the pause was [0-9.]+ ms"
    want_equal "the daemon's process" "$DAEMON_PID" "$before"
    want_match "its program" "$(readlink "/proc/$DAEMON_PID/exe")" "/scratch/o/next"
    wait_for "$PATIENCE" name_owned || fail "the successor is not on the bus"
}
must_fail img-tcmu upgrade /bin/true
want_match "an upgrade to something else" "$OUTPUT" "it is another program"
must_fail img-tcmu upgrade /etc/passwd
chmod 666 /scratch/o/base.raw
must_fail img-tcmu upgrade /scratch/o/base.raw
want_match "an upgrade to anybody's file" "$OUTPUT" "others than its owner can write to it"
all_pauses() {
    pause_of "nothing" nothing
    pause_of "kill -9 and start" killed
    pause_of "stop and start" restarted
    pause_of "upgrade" upgraded
}
all_pauses

step "the same with 50 disks"
for n in $(seq 49); do
    qemu-img create -q -f qcow2 "/scratch/o/$n.qcow2" 16M
    img-tcmu attach --name "many$n" "/scratch/o/$n.qcow2" >/dev/null || fail "attach $n"
done
disks=50
all_pauses
want_equal "disks that are served" "$(img-tcmu status | grep -c ' served ')" 50
echo "RSS with 50 disks: $(sed -n 's/^VmRSS:\t *//p' "/proc/$DAEMON_PID/status"), $(ls "/proc/$DAEMON_PID/task" | wc -l) threads"

rm /scratch/o/go
wait $load || fail "fio failed: $(cat /bed/out/fio.log)"
echo "$(wc -l </scratch/o/passes) passes of fio were verified"
seq 49 | xargs -P 4 -I{} img-tcmu detach many{} >/dev/null || fail "detach"
img-tcmu detach web >/dev/null || fail "detach"
want_clean /scratch/o/web.qcow2
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

# A daemon that cannot read the kernel's events in time (a tiny buffer, a stopped process): whoever made a device is told, nobody
# waits for ever, and the daemon finds by itself what came and went meanwhile.
. /bed/guest/lib.sh
DEVICES=24
start_daemon --event-buffer 4096
mkdir -p /scratch/e
device() { echo "$CONFIGFS/core/user_$1/lost$1"; }
prepare() { # NUMBER: everything but the enabling
    mkdir -p "$(device "$1")"
    echo -n "dev_config=img/@file=/scratch/e/$1.raw@format=raw,max_data_area_mb=8" >"$(device "$1")/control"
    echo -n dev_size=1048576 >"$(device "$1")/control"
}
enable() { echo 1 2>"/bed/out/enable.$1" >"$(device "$1")/enable" || return 1; }
remove() { rmdir "$(device "$1")" "$CONFIGFS/core/user_$1"; }
served() { img-tcmu list 2>/dev/null | grep -c 'lost[0-9]' || true; }
stuck() { for status in /proc/[0-9]*/status; do ! grep -q '^State:.D' "$status" 2>/dev/null || sed -n 's/^Name:\t//p' "$status"; done | grep -xc 'bash\|rmdir' || true; }

step "$DEVICES devices for a daemon that does not listen"
for n in $(seq "$DEVICES"); do
    head -c 1M /dev/urandom >"/scratch/e/$n.raw"
    prepare "$n"
done
kill -STOP "$DAEMON_PID"
makers=()
for n in $(seq "$DEVICES"); do
    (if enable "$n"; then echo made; else echo refused; fi >"/bed/out/made.$n") &
    makers+=($!)
    # One after the other: the kernel's UIO layer takes a number that is being given back.
    sleep 0.2
done
refusals() { [ "$(cat /bed/out/made.* 2>/dev/null | grep -c refused)" -ge $((DEVICES / 2)) ]; }
wait_for "$PATIENCE" refusals || fail "nobody was told: $(cat /bed/out/made.* 2>/dev/null | sort | uniq -c)"
want_match "what the refused were told" "$(cat /bed/out/enable.*)" "No buffer space"
kill -CONT "$DAEMON_PID"
for maker in "${makers[@]}"; do wait "$maker"; done
made=$(cat /bed/out/made.* | grep -c made)
step "$made made, $((DEVICES - made)) refused at once"
[ "$made" -ge 1 ] && [ "$made" -lt "$DEVICES" ] || fail "$made of $DEVICES"
heard() { grep -q "events came faster" "$LOG"; }
wait_for "$PATIENCE" heard || fail "the daemon did not notice"

step "those that were refused can be made now"
for n in $(seq "$DEVICES"); do
    [ "$(cat "/bed/out/made.$n")" = refused ] || continue
    rmdir "$(device "$n")"
    prepare "$n"
    enable "$n" || fail "device $n: $(cat "/bed/out/enable.$n")"
done
for n in 1 $((DEVICES / 2)) $DEVICES; do
    target=$CONFIGFS/loopback/$(naa_of "lost$n")/tpgt_1
    mkdir -p "$target/lun/lun_0"
    naa_of "nexus$n" >"$target/nexus"
    ln -s "$(device "$n")" "$target/lun/lun_0/disk"
    loopback_disk "$(naa_of "lost$n")"
    want_same "$DISK" "/scratch/e/$n.raw"
    rm "$target/lun/lun_0/disk"
    rmdir "$target/lun/lun_0" "$target" "${target%/*}"
done

step "all removed while the daemon does not listen"
kill -STOP "$DAEMON_PID"
removers=()
for n in $(seq "$DEVICES"); do
    remove "$n" &
    removers+=($!)
    sleep 0.1
done
sleep 2
kill -CONT "$DAEMON_PID"
for remover in "${removers[@]}"; do wait "$remover" || fail "a remover failed"; done
no_leftovers
want_equal "the number of processes that hang" "$(stuck)" 0
let_go() { ! ls -l "/proc/$DAEMON_PID/fd" | grep -q '/dev/uio\|/scratch/e'; }
wait_for "$PATIENCE" let_go || fail "the daemon still holds $(ls -l "/proc/$DAEMON_PID/fd" | grep '/dev/uio\|/scratch/e')"
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

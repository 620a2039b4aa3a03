# What must not be served is refused at create with a reason, harms neither the image nor the devices already there,
# and leaves nothing in configfs.
. /bed/guest/lib.sh
start_daemon

# A device that has to work through all of it.
image=$(take_sample base.qcow2 good)
create_backstore good "$image"
loopback_up good
good_disk=$DISK
good_digest=$(digest_of base.qcow2)
good_works() {
    blockdev --flushbufs "$good_disk"
    want_equal "the digest of the device beside it" "$(sha256sum <"$good_disk" | cut -d' ' -f1)" "$good_digest"
}
good_works

# refused WHAT REASON SIZE CFGSTRING FILE...: create fails; the user can find REASON (in targetcli's answer or, for what
# only an open shows, in the daemon's log); the files have the bytes they had.
refused() {
    local what=$1 reason=$2 size=$3 config=$4 before after from
    shift 4
    step "$what"
    before=$(sums "$@")
    from=$(($(wc -l <"$LOG") + 1))
    must_fail targetcli_once "/backstores/user:$SUBTYPE" create bad "$size" "$config"
    local said
    said=$OUTPUT$'\n'$(sed -n "$from,\$p" "$LOG")
    want_match "what targetcli and the log say" "$said" "$reason"
    no_leftovers "good "
    after=$(sums "$@")
    want_equal "the files' digests" "$after" "$before"
    daemon_alive || fail "the daemon is gone"
    good_works
}
sums() { for file in "$@"; do [ ! -e "$file" ] || sha256sum "$file"; done; }

mkdir -p /scratch/e
cd /scratch/e
refused "no such file" "no such file|not found|does not exist" 16M @id=bad@file=/scratch/e/absent.qcow2
if [ -e absent.qcow2 ]; then fail "the absent file has been made"; fi
refused "a directory" "directory|not a regular file" 16M @id=bad@file=/scratch/e
mkfifo fifo
refused "a FIFO" "fifo|not a regular file|pipe" 16M @id=bad@file=/scratch/e/fifo

qemu-img create -q -f qcow2 small.qcow2 16M
refused "a size larger than the image" "16777216|16 ?MiB" 32M @id=bad@file=/scratch/e/small.qcow2 small.qcow2
truncate -s 16M small.raw
refused "a size larger than a raw image" "16777216|16 ?MiB" 32M @id=bad@file=/scratch/e/small.raw@format=raw small.raw

step "a size smaller than the image is served, with a warning"
create_backstore smaller /scratch/e/small.qcow2 "" 8388608
want_match "the daemon's log" "$(tail -n 20 "$LOG")" "smaller|larger"
delete_backstore smaller

poke() { # FILE OFFSET HEX: overwrites bytes
    printf "$(sed 's/../\\x&/g' <<<"$3")" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
qemu-img create -q -f qcow2 good.qcow2 16M
cp good.qcow2 bad.qcow2
poke bad.qcow2 0 00000000
refused "a damaged magic, named as qcow2" "magic|not a qcow2" 16M @id=bad@file=/scratch/e/bad.qcow2@format=qcow2 bad.qcow2
cp good.qcow2 bad.qcow2
truncate -s 60 bad.qcow2
refused "a cut-off header" "header|truncated|short" 16M @id=bad@file=/scratch/e/bad.qcow2@format=qcow2 bad.qcow2
cp good.qcow2 bad.qcow2
poke bad.qcow2 40 7fffffffffff0000
refused "an L1 table beyond the end" "L1" 16M @id=bad@file=/scratch/e/bad.qcow2 bad.qcow2
cp good.qcow2 bad.qcow2
poke bad.qcow2 36 ffffffff
refused "an absurd L1 size" "L1" 16M @id=bad@file=/scratch/e/bad.qcow2 bad.qcow2
cp good.qcow2 bad.qcow2
poke bad.qcow2 79 02
refused "the corrupt bit, read-write" "corrupt|marked as damaged" 16M @id=bad@file=/scratch/e/bad.qcow2 bad.qcow2
cp good.qcow2 bad.qcow2
poke bad.qcow2 72 8000000000000000
refused "an unknown incompatible feature" "feature" 16M @id=bad@file=/scratch/e/bad.qcow2 bad.qcow2
qemu-img create -q -f qcow2 back.qcow2 16M
qemu-img create -q -f qcow2 -b back.qcow2 -F qcow2 top.qcow2
rm back.qcow2
refused "a backing file that is gone" "back.qcow2" 16M @id=bad@file=/scratch/e/top.qcow2 top.qcow2
qemu-img create -q -f qcow2 -u -b loop-b.qcow2 -F qcow2 loop-a.qcow2 16M
qemu-img create -q -f qcow2 -u -b loop-a.qcow2 -F qcow2 loop-b.qcow2 16M
refused "a backing chain that loops" "loop|cycle|chain" 16M @id=bad@file=/scratch/e/loop-a.qcow2 loop-a.qcow2 loop-b.qcow2

step "an image that a QEMU process has open"
qemu-nbd -f qcow2 -k /run/qemu-nbd.sock -t good.qcow2 --fork || fail "qemu-nbd did not start"
nbd=$(fuser good.qcow2 2>/dev/null | tr -d ' ')
refused "locked by qemu-nbd" "lock|in use" 16M @id=bad@file=/scratch/e/good.qcow2
kill "$nbd"
wait_for "$PATIENCE" eval "! kill -0 $nbd 2>/dev/null" || fail "qemu-nbd does not end"

step "QEMU is refused while the daemon has it open"
create_backstore mine /scratch/e/good.qcow2
must_fail qemu-io -f qcow2 -c 'write 0 4k' good.qcow2
want_match "what qemu-io says" "$OUTPUT" "lock"
step "a second backstore on the same image"
must_fail targetcli_once "/backstores/user:$SUBTYPE" create twice 16M @id=twice@file=/scratch/e/good.qcow2
no_leftovers "good mine "
delete_backstore mine
qemu-io -f qcow2 -c 'write 0 4k' good.qcow2 >/dev/null || fail "the lock is still there after delete"
want_clean good.qcow2

step "a read-only image"
cp "$SAMPLES/base.qcow2" ro.qcow2
before=$(sums ro.qcow2)
create_backstore ro /scratch/e/ro.qcow2 @read-only=on
loopback_up ro
want_equal "the read-only flag of $DISK" "$(blockdev --getro "$DISK")" 1
want_equal "the digest of $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$good_digest"
blockdev --setrw "$DISK" 2>/dev/null || true
if dd if=/dev/zero of="$DISK" bs=4k count=1 oflag=direct status=none 2>/dev/null; then fail "a write to a read-only disk succeeded"; fi
loopback_down ro
delete_backstore ro
want_equal "the read-only image's digest" "$(sums ro.qcow2)" "$before"

good_works
loopback_down good
delete_backstore good
no_leftovers
want_clean "$image"
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0

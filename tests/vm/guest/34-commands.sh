# The sub-commands: attach, list, detach; info, map, cat, check, check-config beside qemu-img's answers.
. /bed/guest/lib.sh

json() { python3 -c "import json, sys; d = json.load(sys.stdin); print($1)"; }

step "info, cat, check without a daemon"
for name in base overlay cloud cloud-zstd over-raw; do
    image=$(take_sample "$name.qcow2" "$name")
    want_equal "virtual-size of $name" "$(img-tcmu info --json "$image" | json 'd["virtual-size"]')" "$(size_of "$image")"
    want_equal "format of $name" "$(img-tcmu info --json "$image" | json 'd["format"]')" qcow2
    want_equal "the digest of cat $name" "$(img-tcmu cat "$image" | sha256sum | cut -d' ' -f1)" "$(digest_of "$name.qcow2")"
    img-tcmu check "$image" >/bed/out/check 2>&1 || fail "check $name: $(cat /bed/out/check)"
    img-tcmu map "$image" >/bed/out/map || fail "map $name"
    [ -s /bed/out/map ] || fail "map $name printed nothing"
done
want_equal "backing-filename" "$(img-tcmu info --json /scratch/overlay/overlay.qcow2 | json 'd["backing-filename"]')" base.qcow2
want_equal "a part of cat" "$(img-tcmu cat /scratch/cloud/cloud.qcow2 --offset 510 --length 2 | od -An -tx1 | tr -d ' ')" 55aa
must_fail img-tcmu info /scratch/absent.qcow2
want_match "the error" "$OUTPUT" "/scratch/absent.qcow2"
must_fail img-tcmu check-config "@id=x@fiel=/scratch/a"
want_match "the error" "$OUTPUT" "fiel"
img-tcmu check-config "@id=x@file=/scratch/overlay/overlay.qcow2" >/dev/null || fail "check-config refuses a good cfgstring"
poked=/scratch/poked.qcow2
cp "$SAMPLES/base.qcow2" "$poked"
printf '\xff\xff' | dd of="$poked" bs=1 seek=8200 conv=notrunc status=none
must_fail img-tcmu check "$poked"

step "attach without a daemon"
must_fail img-tcmu attach /scratch/base/base.qcow2
want_match "the error" "$OUTPUT" "serve|daemon|systemctl"
no_leftovers

start_daemon
step "attach, list, detach"
text=$(timeout "$PATIENCE" img-tcmu attach /scratch/overlay/overlay.qcow2 --name first) || fail "attach: $text"
DISK=$(grep -o '/dev/sd[a-z]*' <<<"$text" | head -1)
want_equal "the digest of $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$(digest_of overlay.qcow2)"
want_match "list" "$(img-tcmu list)" "first.*"
want_match "list" "$(img-tcmu list)" "$DISK"
text=$(timeout "$PATIENCE" img-tcmu attach "@file=/scratch/cloud/cloud.qcow2" --read-only) || fail "attach: $text"
second=$(grep -o '/dev/sd[a-z]*' <<<"$text" | head -1)
want_equal "the read-only flag of $second" "$(blockdev --getro "$second")" 1
want_equal "the digest of $second" "$(sha256sum <"$second" | cut -d' ' -f1)" "$(digest_of cloud.qcow2)"
must_fail img-tcmu attach /scratch/absent.qcow2
want_match "the error" "$OUTPUT" "absent"

step "detach while mounted is refused or safe"
mount "$(partition 1)" /mnt
STATUS=0
OUTPUT=$(timeout "$PATIENCE" img-tcmu detach first 2>&1) || STATUS=$?
if [ "$STATUS" != 0 ]; then
    want_match "the error" "$OUTPUT" "use|busy|mounted"
    (cd /mnt && sha256sum --quiet -c SHA256SUMS) || fail "the mounted file system suffered"
    umount /mnt
    timeout "$PATIENCE" img-tcmu detach first || fail "detach"
else
    fail "detach took a mounted disk away"
fi
for name in $(img-tcmu list | grep -o 'cloud[^ ]*' | head -1); do
    timeout "$PATIENCE" img-tcmu detach "$name" || fail "detach $name"
done
no_leftovers
want_equal "the loopback targets left" "$(ls "$CONFIGFS/loopback" 2>/dev/null | grep -c naa || true)" 0
stop_daemon

# targetcli shows the handler, explains its cfgstring, and creates and deletes a backstore; a bad cfgstring is refused
# with a reason before anything is made.
. /bed/guest/lib.sh

start_daemon
step "targetcli ls"
text=$(targetcli_once ls /)
want_match "targetcli ls" "$text" "user:$SUBTYPE"

step "help create"
text=$(targetcli_once "/backstores/user:$SUBTYPE" help create 2>&1)
want_match "the help of create" "$text" "file="

step "create and delete"
image=$(take_sample base.qcow2 a)
create_backstore a "$image"
text=$(targetcli_once "/backstores/user:$SUBTYPE" ls)
want_match "the backstore's line" "$text" "a .*32.0MiB"
delete_backstore a
no_leftovers

step "positional arguments, as in the howto"
mkdir -p /root
truncate -s 16M /root/test.file
text=$(targetcli_once "/backstores/user:$SUBTYPE" create test 16M @id=test@file=/root/test.file 2>&1) || fail "create: $text"
no_leftovers "test "
delete_backstore test

step "cfgstrings that are wrong"
refused() { # CFGSTRING REGEX
    must_fail targetcli_once "/backstores/user:$SUBTYPE" create bad 16M "$1"
    want_match "the answer to $1" "$OUTPUT" "$2"
    no_leftovers
}
refused "@id=x@fiel=/scratch/disk" "fiel"
refused "@id=x" "file"
refused "@id=x@file=/scratch/disk,b" ","
refused "@id=x@file=/root/test.file@format=fancy" "fancy"

stop_daemon
want_equal "the daemon's exit status after SIGTERM" "$DAEMON_STATUS" 0
text=$(targetcli_once ls /backstores)
if grep -q "user:$SUBTYPE" <<<"$text"; then fail "user:$SUBTYPE is still there without the daemon"; fi

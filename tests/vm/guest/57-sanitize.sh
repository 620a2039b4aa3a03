# libiscsi's test that an overwriting SANITIZE survives task management and the loss of its session, on a disk that takes long
# enough for it: the test looks for the operation after three seconds, and then asks once a minute whether it has ended.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/s
truncate -s 3G /scratch/s/large
text=$(targetcli_once "/backstores/user:$SUBTYPE" create name=large size=3G "cfgstring=@id=large@file=/scratch/s/large" 2>&1) ||
    fail "create: $text"
[ "$(cat "$CONFIGFS"/core/user_*/large/attrib/tmr_notification)" = 1 ] || fail "the kernel does not tell of commands that are given up"
iscsi_target_up large
url=$(url_of large)
iscsi-test-cu --dataloss --allow-sanitize -v -t SCSI.Sanitize.Reset "$url" "$url" >/bed/out/sanitize.txt 2>&1 || true
grep -q '^ *tests  *1  *1  *1  *0 ' /bed/out/sanitize.txt || fail "$(cat /bed/out/sanitize.txt)"
daemon_alive || fail "the daemon died"
[ -z "$(tr -d '\0' </scratch/s/large | head -c 1)" ] || fail "the medium was not overwritten"
targetcli_once /iscsi delete "$(iqn_of large)" >/dev/null
delete_backstore large
stop_daemon

# saveconfig, clear, restore: the LUN comes back with its size, its serial and its bytes, also when the daemon starts
# only after the restore.
. /bed/guest/lib.sh
start_daemon

image=$(take_sample base.qcow2 saved)
create_backstore saved "$image"
loopback_up saved
iscsi_target_up saved
mount "$(partition 1)" /mnt
echo "before the restore" >/mnt/BEFORE.txt
umount /mnt
sync
serial=$(cat "$(core_of saved)/wwn/vpd_unit_serial")
digest=$(sha256sum <"$DISK")

saved_is_back() {
    [ -d "$(core_of saved)" ] || fail "no device after the restore: $1"
    want_equal "the serial" "$(cat "$(core_of saved)/wwn/vpd_unit_serial")" "$serial"
    loopback_disk "$(naa_of saved)"
    want_equal "the digest of $DISK" "$(timeout "$PATIENCE" sha256sum <"$DISK")" "$digest"
    [ -e "$CONFIGFS/iscsi/$(iqn_of saved)/tpgt_1/lun/lun_0" ] || fail "no iSCSI LUN after the restore: $1"
    mount -o ro "$(partition 1)" /mnt
    want_equal "the file" "$(cat /mnt/BEFORE.txt)" "before the restore"
    umount /mnt
}

step "saveconfig"
targetcli_once saveconfig >/dev/null
want_match "saveconfig.json" "$(cat /etc/rtslib-fb-target/saveconfig.json)" "img/@id=test@file=$image"
step "clear"
timeout "$PATIENCE" targetctl clear || fail "targetctl clear"
no_leftovers
want_clean "$image"
step "restore"
text=$(timeout "$PATIENCE" targetctl restore 2>&1) || fail "targetctl restore: $text"
if grep -qiE 'error|could not|fail' <<<"$text"; then fail "targetctl restore complains: $text"; fi
saved_is_back "$text"

step "clear, daemon down and up, restore"
timeout "$PATIENCE" targetctl clear || fail "targetctl clear"
stop_daemon
start_daemon
text=$(timeout "$PATIENCE" targetctl restore 2>&1) || fail "targetctl restore: $text"
saved_is_back "$text"

step "clear"
timeout "$PATIENCE" targetctl clear || fail "targetctl clear"
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean "$image"

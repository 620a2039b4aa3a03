# A device made by hand through configfs, without targetcli and without CheckConfig, with the daemon up before it and
# with the daemon started after it.
. /bed/guest/lib.sh

image=$(take_sample overlay.qcow2 hand)
size=$(size_of "$image")
device=$CONFIGFS/core/user_7/disk0
naa=naa.5001405aaaaaaaaa
target=$CONFIGFS/loopback/$naa/tpgt_1
make_device() {
    mkdir -p "$device"
    echo -n "dev_config=img/@id=hand@file=$image" >"$device/control"
    echo -n "dev_size=$size" >"$device/control"
    echo 1 >"$device/enable"
}
make_lun() {
    uuidgen >"$device/wwn/vpd_unit_serial"
    mkdir -p "$target/lun/lun_0"
    echo naa.5001405bbbbbbbbb >"$target/nexus"
    ln -s "$device" "$target/lun/lun_0/disk0"
    loopback_disk "$naa"
}
remove() {
    rm "$target/lun/lun_0/disk0"
    rmdir "$target/lun/lun_0" "$target" "${target%/*}" "$device" "${device%/*}"
}

step "the daemon first, then the device"
start_daemon
timeout "$PATIENCE" bash -c "$(declare -f make_device); device=$device image=$image size=$size make_device" || fail "enable failed or hangs"
make_lun
want_equal "the digest of $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$(digest_of overlay.qcow2)"
serial=$(sed 's/.*: //' "$device/wwn/vpd_unit_serial")
want_match "the unit serial by INQUIRY" "$(sg_inq -p 0x80 "$DISK")" "$serial"
remove
wait_for "$PATIENCE" eval '! ls /dev/uio* 2>/dev/null' || fail "the UIO device is still there"

step "the device first, then the daemon"
stop_daemon
# The kernel remembers that a daemon with replies was there, and would wait for one: as without any daemon before.
mkdir -p "$device"
echo -n nl_reply_supported=-1 >"$device/control"
timeout "$PATIENCE" bash -c "$(declare -f make_device); device=$device image=$image size=$size make_device" || fail "enable failed or hangs"
start_daemon
make_lun
want_equal "the digest of $DISK" "$(sha256sum <"$DISK" | cut -d' ' -f1)" "$(digest_of overlay.qcow2)"
remove

step "another handler's device is left alone"
mkdir -p "$device"
echo -n nl_reply_supported=-1 >"$device/control"
echo -n "dev_config=other/@id=hand@file=$image" >"$device/control"
echo -n "dev_size=$size" >"$device/control"
timeout "$PATIENCE" bash -c "echo 1 >$device/enable" || fail "enable failed or hangs"
sleep 1
uio=$(ls /dev/uio*)
must_fail fuser -s "$uio"
rmdir "$device" "${device%/*}"
daemon_alive || fail "the daemon is gone"
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean "$image"

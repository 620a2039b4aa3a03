# Functions for the guest's test scripts: assertions, waiting, the daemon, backstores, LUNs over loopback and iSCSI.
# A script sources it first; it then runs with -e and ends by fail() or by its end. Times are generous: an emulated
# guest on a busy host is a hundred times slower than metal.
set -eEuo pipefail

. /bed/settings
CONFIGFS=/sys/kernel/config/target
LOG=/bed/out/daemon.log
SAMPLES=/bed/samples
PATIENCE=120
[ "$kind" != qemu ] || PATIENCE=300

# --- assertions ----------------------------------------------------------------------------------------------------
step() { echo "--- [$SECONDS s] $*"; }
fail() {
    trap - ERR
    echo "FAILED: $*"
    diagnose
    exit 1
}
skip() { echo "SKIPPED: $*"; exit 77; }
diagnose() {
    if [ -s "$LOG" ]; then
        echo "--- the daemon's last lines"
        tail -n "${DIAGNOSE_LINES:-40}" "$LOG"
    fi
    echo "--- the kernel's last lines"
    dmesg | tail -n 15
    if [ -n "${DAEMON_PID:-}" ] && [ -d "/proc/$DAEMON_PID" ]; then
        echo "--- the daemon's threads"
        for task in /proc/"$DAEMON_PID"/task/*; do
            echo "$(cat "$task/comm") $(sed -n 's/^State:\t//p' "$task/status") $(cat "$task/wchan" 2>/dev/null)"
        done | sort | uniq -c
    fi
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

want_equal() { # WHAT FOUND WANTED
    [ "$2" = "$3" ] || fail "$1 is '$2', wanted '$3'"
}
want_match() { # WHAT TEXT EXTENDED-REGEX
    grep -qiE -- "$3" <<<"$2" || fail "$1 does not match /$3/: $2"
}
want_same() { # FILE FILE
    cmp -- "$1" "$2" || fail "$1 and $2 differ"
}
want_clean() { # qcow2 FILE: nothing wrong with it, leaks included
    local text
    text=$(qemu-img check "$1" 2>&1) || fail "qemu-img check $1: $text"
}
want_fsck() { # DEVICE with an unmounted ext4 on it
    local text
    text=$(e2fsck -fn "$1" 2>&1) || fail "e2fsck finds damage: $text"
}
# Runs a command that must fail; its output is then in $OUTPUT and its status in $STATUS.
must_fail() {
    STATUS=0
    OUTPUT=$("$@" 2>&1) || STATUS=$?
    [ "$STATUS" != 0 ] || fail "succeeded, and should not have: $* ($OUTPUT)"
}
wait_for() { # SECONDS COMMAND...
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 0.1
    done
}

# --- the daemon ----------------------------------------------------------------------------------------------------
# DAEMON=tcmu-runner lets the same scripts drive the peer (its qcow handler), which shows that the bed itself works.
DAEMON=${DAEMON:-img-tcmu}
DAEMON_PID=
case $DAEMON in
    img-tcmu) SUBTYPE=img ;;
    tcmu-runner) SUBTYPE=qcow ;;
    tcmu-runner-file) SUBTYPE=file ;;
esac
name_owned() {
    dbus-send --system --print-reply=literal --dest=org.freedesktop.DBus /org/freedesktop/DBus \
        org.freedesktop.DBus.NameHasOwner string:org.kernel.TCMUService1 2>/dev/null | grep -q 'boolean true'
}
name_free() { ! name_owned; }
start_daemon() { # [ARGUMENT OF serve]...
    case $DAEMON in
        img-tcmu) RUST_BACKTRACE=1 img-tcmu serve "$@" >>"$LOG" 2>&1 </dev/null & ;;
        *) tcmu-runner >>"$LOG" 2>&1 </dev/null & ;;
    esac
    DAEMON_PID=$!
    wait_for "$PATIENCE" daemon_up || fail "the daemon is not on the bus"
}
daemon_up() {
    kill -0 "$DAEMON_PID" 2>/dev/null || fail "the daemon ended at its start"
    name_owned
}
stop_daemon() { # [SIGNAL]: ends it and waits until it is gone from the bus; its exit status is in $DAEMON_STATUS
    kill -"${1:-TERM}" "$DAEMON_PID"
    local until=$((SECONDS + PATIENCE))
    while kill -0 "$DAEMON_PID" 2>/dev/null; do
        [ "$SECONDS" -lt "$until" ] || fail "the daemon is still there $PATIENCE s after SIG${1:-TERM}"
        sleep 0.05
    done
    DAEMON_STATUS=0
    wait "$DAEMON_PID" || DAEMON_STATUS=$?
    DAEMON_PID=
    wait_for "$PATIENCE" name_free || fail "the daemon's name is still on the bus"
}
daemon_alive() { kill -0 "$DAEMON_PID" 2>/dev/null; }

# --- backstores ----------------------------------------------------------------------------------------------------
tcli() { # targetcli commands on stdin; the batch's own exit status says nothing, callers check the objects
    timeout "$((PATIENCE * 2))" targetcli 2>&1
}
targetcli_once() { timeout "$PATIENCE" targetcli "$@"; }
config_of() { # FILE [@key=value...]: the cfgstring for this daemon
    case $DAEMON in
        img-tcmu) echo "@id=test@file=$1${2:-}" ;;
        *) echo "$1" ;;
    esac
}
size_of() { # FILE [FORMAT]: the guest's size in bytes, by qemu-img
    qemu-img info ${2:+-f "$2"} -U --output=json "$1" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["virtual-size"])'
}
create_backstore() { # NAME FILE [@key=value...] [SIZE] [CONTROL]
    local text
    text=$(targetcli_once "/backstores/user:$SUBTYPE" create "name=$1" "size=${4:-$(size_of "$2")}" \
        "cfgstring=$(config_of "$2" "${3:-}")" ${5:+"control=$5"} 2>&1) || fail "targetcli create: $text"
    [ -n "$(echo "$CONFIGFS"/core/user_*/"$1"/udev_path)" ] || fail "no configfs directory for $1"
}
delete_backstore() { targetcli_once "/backstores/user:$SUBTYPE" delete "$1" >/dev/null || fail "cannot delete backstore $1"; }
core_of() { echo "$CONFIGFS"/core/user_*/"$1"; }
no_leftovers() { # nothing of a failed create is left in configfs
    local left
    left=$(find "$CONFIGFS/core" -mindepth 2 -maxdepth 2 -type d -path '*/user_*/*' -printf '%f\n' | sort | tr '\n' ' ')
    want_equal "the list of devices in configfs" "$left" "${1:-}"
}

# --- LUNs ----------------------------------------------------------------------------------------------------------
# Both ways set DISK to the block device.
naa_of() { printf 'naa.5001405%09x' $((0x$(md5sum <<<"$1" | cut -c1-8))); }
iqn_of() { echo "iqn.2026-01.org.example:$1"; }
loopback_up() { # NAME
    local naa
    naa=$(naa_of "$1")
    tcli >/bed/out/targetcli.log <<T
/loopback create $naa
/loopback/$naa/luns create /backstores/user:$SUBTYPE/$1
exit
T
    loopback_disk "$naa"
}
loopback_disk() { # NAA
    local address=$CONFIGFS/loopback/$1/tpgt_1/address
    wait_for "$PATIENCE" test -e "$address" || fail "no loopback target: $(cat /bed/out/targetcli.log)"
    find_disk "/sys/bus/scsi/devices/$(cat "$address"):0/block"
}
find_disk() { # SYSFS-DIRECTORY whose only entry is the disk's name
    wait_for "$PATIENCE" test -d "$1" || fail "no SCSI disk appeared at $1"
    DISK=/dev/$(ls "$1")
    wait_for "$PATIENCE" test -b "$DISK" || fail "no device node $DISK"
}
loopback_down() { targetcli_once /loopback delete "$(naa_of "$1")" >/dev/null || fail "cannot delete the loopback target of $1"; }
iscsi_target_up() { # NAME
    local iqn
    iqn=$(iqn_of "$1")
    tcli >/bed/out/targetcli.log <<T
/iscsi create $iqn
/iscsi/$iqn/tpg1/luns create /backstores/user:$SUBTYPE/$1
/iscsi/$iqn/tpg1 set attribute authentication=0 demo_mode_write_protect=0 generate_node_acls=1 cache_dynamic_acls=1
exit
T
    [ -e "$CONFIGFS/iscsi/$iqn/tpgt_1/lun/lun_0" ] || fail "no iSCSI target: $(cat /bed/out/targetcli.log)"
}
iscsid_ready() { ss -xl | grep -q ISCSIADM; }
iscsi_up() { # NAME: target, discovery, login
    iscsi_target_up "$1"
    if ! iscsid_ready; then
        echo "InitiatorName=$(iscsi-iname)" >/etc/iscsi/initiatorname.iscsi
        iscsid -f >>/bed/out/iscsid.log 2>&1 </dev/null &
        wait_for "$PATIENCE" iscsid_ready || fail "iscsid did not start"
    fi
    iscsiadm -m discovery -t sendtargets -p 127.0.0.1 >/bed/out/iscsiadm.log 2>&1 || fail "discovery: $(cat /bed/out/iscsiadm.log)"
    iscsiadm -m node -T "$(iqn_of "$1")" -p 127.0.0.1:3260 --login >/bed/out/iscsiadm.log 2>&1 ||
        fail "login: $(cat /bed/out/iscsiadm.log)"
    iscsi_disk "$1"
}
iscsi_session_of() { # IQN
    local name
    for name in /sys/class/iscsi_session/session*; do
        [ "$(cat "$name/targetname" 2>/dev/null)" != "$1" ] || { echo "$name"; return; }
    done
    return 1
}
iscsi_disk() { # NAME
    local session target
    session=$(iscsi_session_of "$(iqn_of "$1")") || fail "no iSCSI session"
    wait_for "$PATIENCE" eval "ls -d $session/device/target*/*:0/block >/dev/null 2>&1" || fail "no disk in the iSCSI session"
    target=$(echo "$session"/device/target*/*:0/block)
    find_disk "$target"
}
iscsi_down() { # NAME
    iscsiadm -m node -T "$(iqn_of "$1")" -p 127.0.0.1:3260 --logout >/bed/out/iscsiadm.log 2>&1 ||
        fail "logout: $(cat /bed/out/iscsiadm.log)"
    targetcli_once /iscsi delete "$(iqn_of "$1")" >/dev/null || fail "cannot delete the iSCSI target of $1"
}
url_of() { echo "iscsi://127.0.0.1:3260/$(iqn_of "$1")/0"; }
lun_up() { # loopback|iscsi NAME
    "$1_up" "$2"
    DISK_SIZE=$(blockdev --getsize64 "$DISK")
}
lun_down() { "$1_down" "$2"; }
partition() { # NUMBER: waits for the kernel to have it
    wait_for "$PATIENCE" test -b "$DISK$1" || fail "the kernel sees no partition $1 on $DISK: $(sfdisk -l "$DISK" 2>&1)"
    echo "$DISK$1"
}

# --- samples -------------------------------------------------------------------------------------------------------
digest_of() { sed -n "s/^$1 [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$SAMPLES/MANIFEST"; }
# Copies a sample (and what it stands on) to /scratch/NAME/; prints the copy's path.
take_sample() { # FILE NAME
    mkdir -p "/scratch/$2"
    local file=$1
    while [ "$file" != - ] && [ -n "$file" ]; do
        cp "$SAMPLES/$file" "/scratch/$2/$file"
        file=$(awk -v f="$file" '$1 == f { print $5 }' "$SAMPLES/MANIFEST")
    done
    echo "/scratch/$2/$1"
}

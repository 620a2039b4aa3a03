# What a unit knows of its surroundings: the target port groups that LIO keeps for it, and the other units, which EXTENDED
# COPY reaches.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/p
head -c 16M /dev/urandom >/scratch/p/one.raw
qemu-img create -q -f qcow2 /scratch/p/two.qcow2 16M
create_backstore one /scratch/p/one.raw @format=raw 16M
create_backstore two /scratch/p/two.qcow2
loopback_up one
one=$DISK
loopback_up two
two=$DISK
core=$(core_of one)

step "target port groups are reported as LIO has them"
want_match "TPGS of INQUIRY" "$(sg_inq "$one")" "TPGS=[123]"
report() { # again after the unit attention that a change leaves
    sg_rtpg -d "$one" 2>&1 || sg_rtpg -d "$one" 2>&1
}
want_match "the group" "$(report)" "target port group asymmetric access state : 0x00"
rel=$(cat "$CONFIGFS/loopback/$(naa_of one)/tpgt_1/rtpi" 2>/dev/null ||
    cat "$CONFIGFS/loopback/$(naa_of one)/tpgt_1/lun/lun_0/statistics/scsi_port/indx")
want_match "the port" "$(report | tr "\n" " ")" "Relative target port ids:[[:space:]]+$(printf 0x%02x "$rel")"
want_match "the port's designator" "$(sg_vpd -p di "$one")" "Relative target port: $(printf 0x%x "$rel")"
step "the administrator changes the state"
echo 1 >"$core/alua/default_tg_pt_gp/alua_access_state"
want_match "the group" "$(report)" "active/non optimized|active/non-optimized"
step "an initiator changes the state"
text=$(sg_stpg --tp=0 --state=0 "$one" 2>&1) || fail "sg_stpg: $text"
want_equal "the state that LIO has" "$(cat "$core/alua/default_tg_pt_gp/alua_access_state")" 0
want_match "why" "$(cat "$core/alua/default_tg_pt_gp/alua_access_status")" "Explicit"
report >/dev/null
want_match "the answer about a group that is not there" "$(sg_stpg --tp=77 --state=0 "$one" 2>&1)" "Illegal request"

generic() { echo "/dev/$(ls "/sys/block/${1##*/}/device/scsi_generic")"; }
from=$(generic "$one") to=$(generic "$two")
step "EXTENDED COPY from one unit to the other"
text=$(sg_xcopy if="$from" of="$to" bs=512 count=16384 seek=64 id_usage=disable verbose=1 2>&1) || fail "sg_xcopy: $text"
blockdev --flushbufs "$two"
want_same <(dd if=/scratch/p/one.raw bs=512 count=16384 status=none) <(dd if="$two" bs=512 skip=64 count=16384 iflag=direct status=none)
step "a unit that is gone is not reached"
loopback_down two
must_fail sg_xcopy if="$from" of="$to" bs=512 count=64
loopback_down one
delete_backstore one
delete_backstore two
no_leftovers
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean /scratch/p/two.qcow2

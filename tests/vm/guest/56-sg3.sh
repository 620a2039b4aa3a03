# sg3_utils' view of a LUN: capacity, pages, opcodes, provisioning, verification, logs, reservations, formatting and sanitizing.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/s
qemu-img create -q -f qcow2 /scratch/s/disk.qcow2 64M
create_backstore sg /scratch/s/disk.qcow2
loopback_up sg
good() { # COMMAND...: succeeds; its output is in $OUTPUT
    OUTPUT=$("$@" 2>&1) || fail "$*: $OUTPUT"
}
step "capacity and pages"
good sg_readcap "$DISK"
want_match "READ CAPACITY (10)" "$OUTPUT" "Last LBA=131071"
good sg_readcap --long "$DISK"
want_match "READ CAPACITY (16)" "$OUTPUT" "lbpme=1.*lbprz=1|lbprz=1.*lbpme=1|Logical block provisioning: lbpme=1, lbprz=1"
for page in 0x00 0x80 0x83 0x86 0xb0 0xb1 0xb2; do
    good sg_vpd --page=$page "$DISK"
done
good sg_vpd --page=bl "$DISK"
want_match "block limits" "$OUTPUT" "Write same non-zero.*1"
good sg_inq "$DISK"
good sg_luns "$DISK"
good sg_modes --all "$DISK"
good sg_logs --all "$DISK"
good sg_requests "$DISK"
good sg_turs "$DISK"
step "opcodes"
good sg_opcodes "$DISK"
for name in "Read\(16\)" "Write\(16\)" "Unmap" "Compare and write" "Extended copy" "Get LBA status" "Verify\(16\)" "Sanitize"; do
    want_match "the opcodes" "$OUTPUT" "$name"
done
good sg_opcodes --opcode=0x93 "$DISK"
want_match "WRITE SAME (16)" "$OUTPUT" "supported"
step "data"
head -c 64k /dev/urandom >/scratch/s/data
good sg_dd if=/scratch/s/data of="$DISK" bs=512 count=128 cdbsz=16
good sg_dd if="$DISK" of=/scratch/s/back bs=512 count=128 cdbsz=12
want_same /scratch/s/data /scratch/s/back
good sg_verify --lba=0 --count=128 "$DISK"
good sg_verify --16 --lba=0 --count=128 "$DISK"
good sg_write_verify --16 --lba=256 --num=128 --in=/scratch/s/data "$DISK"
(head -c 512 /scratch/s/data; head -c 512 /dev/zero) >/scratch/s/both
good sg_compare_and_write --lba=256 --num=1 --in=/scratch/s/both --xferlen=1024 "$DISK"
must_fail sg_compare_and_write --lba=256 --num=1 --in=/scratch/s/both --xferlen=1024 "$DISK"
want_match "the answer" "$OUTPUT" "miscompare|compare"
good sg_sync "$DISK"
step "provisioning"
good sg_get_lba_status --lba=0 "$DISK"
want_match "LBA 0" "$OUTPUT" "mapped"
good sg_get_lba_status --lba=65536 "$DISK"
want_match "LBA 65536" "$OUTPUT" "deallocated"
good sg_unmap --lba=0 --num=128 --force "$DISK"
good sg_get_lba_status --lba=0 "$DISK"
want_match "LBA 0" "$OUTPUT" "deallocated"
must_fail sg_unmap --lba=131072 --num=1 --force "$DISK"
step "persistent reservations are the kernel's"
good sg_persist --out --register --param-sark=abc "$DISK"
good sg_persist --in --read-keys "$DISK"
want_match "the keys" "$OUTPUT" "0xabc"
good sg_persist --out --reserve --param-rk=abc --prout-type=5 "$DISK"
good sg_persist --in --read-reservation "$DISK"
want_match "the reservation" "$OUTPUT" "Write Exclusive, registrants only"
good sg_persist --out --clear --param-rk=abc "$DISK"
step "format and sanitize"
good sg_dd if=/scratch/s/data of="$DISK" bs=512 count=128
good sg_format --format --quick --wait "$DISK"
want_equal "what is left" "$(dd if="$DISK" bs=64k count=1 iflag=direct status=none | tr -d '\0' | wc -c)" 0
good sg_dd if=/scratch/s/data of="$DISK" bs=512 count=128
good sg_sanitize --block --quick --wait "$DISK"
want_equal "what is left" "$(dd if="$DISK" bs=64k count=1 iflag=direct status=none | tr -d '\0' | wc -c)" 0
loopback_down sg
delete_backstore sg
stop_daemon
want_equal "the daemon's exit status" "$DAEMON_STATUS" 0
want_clean /scratch/s/disk.qcow2

# Not a test: fio over loopback LUNs of the kernel's fileio, tcmu-runner (qcow) and this daemon (raw, qcow2) in one guest,
# rounds interleaved, medians as a share of fileio's. RUNS (3), SECONDS_PER_JOB (3), JOBS narrow it. CSV in /bed/out.
. /bed/guest/lib.sh
mkdir -p /scratch/p
SIZE=256M
jobs_all="randread:4k:1 randread:4k:32 randwrite:4k:1 randwrite:4k:32 read:64k:32 read:1m:32 write:1m:32"

for name in runner img; do
    qemu-img create -q -f qcow2 "/scratch/p/$name.qcow2" $SIZE
    qemu-io -f qcow2 -c "write -q -P 0x5a 0 $SIZE" "/scratch/p/$name.qcow2"
done
for name in fileio img; do head -c $SIZE /dev/zero | tr '\0' 'Z' >"/scratch/p/$name.raw"; done

declare -A disk cpu_of
subtype_up() { # NAME
    loopback_up "$1"
    disk[$1]=$DISK
}
tcli >/dev/null <<T
/backstores/fileio create name=fileio file_or_dev=/scratch/p/fileio.raw write_back=true
/loopback create $(naa_of fileio)
/loopback/$(naa_of fileio)/luns create /backstores/fileio/fileio
exit
T
loopback_disk "$(naa_of fileio)"
disk[fileio]=$DISK

# The peer and this daemon cannot own the bus name together: each serves its own devices, which stay while the other is
# started; a device's daemon is stopped (SIGSTOP) while another's is measured.
DAEMON=tcmu-runner SUBTYPE=qcow
start_daemon
runner_pid=$DAEMON_PID
create_backstore runner-qcow /scratch/p/runner.qcow2
subtype_up runner-qcow
DAEMON=img-tcmu SUBTYPE=img
img-tcmu serve >>"$LOG" 2>&1 &
DAEMON_PID=$!
# tcmu-runner answers the kernel for every device, and for ours with an error: the kernel must not ask.
ours() { targetcli_once /backstores ls | grep -q user:img; }
wait_for "$PATIENCE" ours || fail "user:img is not there beside tcmu-runner"
create_backstore img-raw /scratch/p/img.raw @format=raw "" nl_reply_supported=-1
subtype_up img-raw
create_backstore img-qcow2 /scratch/p/img.qcow2 "" "" nl_reply_supported=-1
subtype_up img-qcow2

ticks_of() { awk '{ print $14 + $15 }' "/proc/$1/stat"; }
measure() { # BACKSTORE RW BS DEPTH
    local pid= before=0 after=0 result
    case $1 in runner-*) pid=$runner_pid ;; img-*) pid=$DAEMON_PID ;; esac
    [ -z "$pid" ] || before=$(ticks_of "$pid")
    result=$(fio --name=j --filename="${disk[$1]}" --rw="$2" --bs="$3" --iodepth="$4" --ioengine=libaio --direct=1 \
        --time_based --ramp_time=0.5 --runtime="${SECONDS_PER_JOB:-3}" --randrepeat=0 --norandommap --output-format=json)
    [ -z "$pid" ] || after=$(ticks_of "$pid")
    python3 -c '
import json, sys
job = json.load(sys.stdin)["jobs"][0]
side = job["read"] if "read" in sys.argv[2] else job["write"]
ticks = float(sys.argv[5])
count = side["total_ios"] * 1.15  # the ramp time is not in the count
cpu = ticks * 1e4 / count if count else 0
print(",".join(sys.argv[1:5]), "%.1f,%.3f,%.1f" % (side["iops"], side["bw"] / 1024, cpu), sep=",")
' "$1" "$2" "$3" "$4" "$((after - before))" <<<"$result" >>/bed/out/peers.csv
}
echo "backstore,rw,bs,depth,iops,mib_per_s,daemon_us_per_command" >/bed/out/peers.csv
for run in $(seq "${RUNS:-3}"); do
    for job in ${JOBS:-$jobs_all}; do
        IFS=: read -r rw bs depth <<<"$job"
        for backstore in fileio runner-qcow img-raw img-qcow2; do measure "$backstore" "$rw" "$bs" "$depth"; done
    done
    step "round $run of ${RUNS:-3}"
done
python3 - <<'P'
import csv, statistics
rows = {}
order = []
with open("/bed/out/peers.csv") as file:
    for row in csv.DictReader(file):
        job = (row["rw"], row["bs"], row["depth"])
        if job not in order:
            order.append(job)
        rows.setdefault((job, row["backstore"]), []).append((float(row["iops"]), float(row["daemon_us_per_command"])))
names = ["fileio", "runner-qcow", "img-raw", "img-qcow2"]
print("%-18s" % "job", *["%24s" % name for name in names])
for job in order:
    unit = statistics.median(i for i, _ in rows[job, "fileio"])
    cells = []
    for name in names:
        values = rows[job, name]
        iops = statistics.median(i for i, _ in values)
        cpu = statistics.median(c for _, c in values)
        cells.append("%9.0f  x%.2f %6.0f us" % (iops, iops / unit if unit else 0, cpu))
    print("%-18s" % " ".join(job), *["%24s" % cell for cell in cells])
P

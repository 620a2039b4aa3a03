#!/bin/bash
# Makes first inputs for the fuzz targets, out of samples/ and with other people's tools (qemu-img, gzip, xz, zstd, bzip2, lz4, lzip, bgzip).
# They go to fuzz/seeds/TARGET, which Git ignores. Targets that are not named here make something of any bytes.
#
# Usage: fuzz/seeds.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
samples=$here/../samples
out=$here/seeds
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$out"/{qcow2,vhdx,vhd,vmdk,ova,raw_probe,gzip,xz,zstd,bzip2,lz4,lzip,cfgstring,nbd,netlink}

# Small disks: text, noise, zeros.
python3 - "$work/disk" "$work/odd" <<'P'
import random, sys
r = random.Random(1)
disk = b"".join([b"the quick brown fox %d " % n for n in range(900)] + [r.randbytes(3000), bytes(20000)])
open(sys.argv[1], "wb").write(disk[: len(disk) // 512 * 512])
open(sys.argv[2], "wb").write(disk[:7001])
P

# script FROM TO: an image behind the 64 bytes that say what is done with it: everything once.
script() { { python3 -c 'import sys; sys.stdout.buffer.write(bytes(range(64)))' && cat "$1"; } >"$2"; }

# probe FROM TO: a file behind the 601 bytes that say how it is opened (for writing) and what is written to it if it is raw.
probe() { { printf '\001' && head -c 600 /dev/zero && cat "$1"; } >"$2"; }

# runs FROM TO: the same for VHDX, without its holes.
runs() { python3 - "$@" <<'P'
import sys
data = open(sys.argv[1], "rb").read()
out = bytearray(range(64))
at = 0
while at < len(data):
    end = at
    while end < len(data) and end - at < 65024 and any(data[end:end + 512]):
        end += 512
    run = data[at:end].rstrip(b"\0")
    if run:
        out += (at // 512).to_bytes(3, "little") + len(run).to_bytes(2, "little") + run
    at = max(end, at + 512)
if len(data) % 512 == 0 and not any(data[-1:]):
    out += (len(data) // 512 - 1).to_bytes(3, "little") + (512).to_bytes(2, "little") + bytes(512)
open(sys.argv[2], "wb").write(out)
P
}

make_qcow2() { # NAME OPTIONS...
    local name=$1
    shift
    qemu-img convert -q -f raw -O qcow2 "$@" "$work/disk" "$work/q"
    script "$work/q" "$out/qcow2/$name"
    probe "$work/q" "$out/raw_probe/$name"
}
make_qcow2 small -o cluster_size=512
make_qcow2 v2 -o cluster_size=512,compat=0.10
make_qcow2 refcount1 -o cluster_size=512,refcount_bits=1
make_qcow2 refcount64 -o cluster_size=512,refcount_bits=64
make_qcow2 lazy -o cluster_size=1k,lazy_refcounts=on
make_qcow2 zlib -c -o cluster_size=1k
make_qcow2 zstd -c -o cluster_size=1k,compression_type=zstd
qemu-img convert -q -f raw -O qcow2 -o cluster_size=512 "$work/disk" "$work/q"
qemu-img snapshot -c first "$work/q"
qemu-img bitmap --add "$work/q" bits
script "$work/q" "$out/qcow2/snapshot"
(cd "$work" && qemu-img create -q -f qcow2 -o cluster_size=512 -b disk -F raw q2 64k)
script "$work/q2" "$out/qcow2/overlay"

for options in subformat=dynamic,block_size=1M subformat=fixed,block_size=1M subformat=dynamic,block_size=1M,log_size=2M; do
    qemu-img convert -q -f raw -O vhdx -o "$options" "$work/disk" "$work/x"
    runs "$work/x" "$out/vhdx/$options"
done
for options in subformat=dynamic subformat=fixed subformat=fixed,force_size=on; do
    truncate -s 20k "$work/short"
    qemu-img convert -q -f raw -O vpc -o "$options" "$work/short" "$work/v"
    # Dynamic images have blocks of 2 MiB: one that holds nothing is short.
    script "$work/v" "$out/vhd/$options"
    probe "$work/v" "$out/raw_probe/vhd-$options"
done
for options in subformat=monolithicSparse subformat=streamOptimized zeroed_grain=on; do
    qemu-img convert -q -f raw -O vmdk -o "$options" "$work/short" "$work/disk.vmdk"
    script "$work/disk.vmdk" "$out/vmdk/$options"
    probe "$work/disk.vmdk" "$out/raw_probe/vmdk-$options"
done
(cd "$work" && qemu-img convert -q -f raw -O vmdk -o subformat=monolithicFlat short flat.vmdk && echo '<Envelope/>' >disk.ovf)
script "$work/flat.vmdk" "$out/vmdk/descriptor"
for format in ustar gnu pax; do
    tar -C "$work" --format="$format" -cf "$work/disk.ova" disk.ovf disk.vmdk
    script "$work/disk.ova" "$out/ova/$format"
done
head -c 40000 "$samples/tiny.raw" >"$work/tiny"
probe "$work/tiny" "$out/raw_probe/tiny"

for disk in disk odd; do
    from=$work/$disk
    gzip -9nc "$from" >"$out/gzip/$disk"
    { head -c 3000 "$from" | gzip -1c; tail -c +3001 "$from" | gzip -c; } >"$out/gzip/$disk-members"
    bgzip -c "$from" >"$out/gzip/$disk-bgzf"
    xz -0c "$from" >"$out/xz/$disk"
    xz -0 --block-size=4KiB -C sha256 -T2 -c "$from" >"$out/xz/$disk-blocks"
    zstd -qc "$from" >"$out/zstd/$disk"
    zstd -qc --no-check <"$from" >"$out/zstd/$disk-unsized"
    { head -c 3000 "$from" | zstd -qc; tail -c +3001 "$from" | zstd -qc -19; } >"$out/zstd/$disk-frames"
    bzip2 -1c "$from" >"$out/bzip2/$disk"
    { head -c 3000 "$from" | bzip2 -c; tail -c +3001 "$from" | bzip2 -c; } >"$out/bzip2/$disk-streams"
    lz4 -q -B4 -BI -c "$from" >"$out/lz4/$disk"
    lz4 -q -B4 -BD -BX --content-size -c "$from" >"$out/lz4/$disk-linked"
    lzip.lzip -0c "$from" >"$out/lzip/$disk"
    { head -c 3000 "$from" | lzip.lzip -0c; tail -c +3001 "$from" | lzip.lzip -0c; } >"$out/lzip/$disk-members"
done
for kind in gzip xz zstd bzip2 lz4 lzip; do
    probe "$(find "$out/$kind" -name 'odd*' | sort | head -1)" "$out/raw_probe/$kind"
done

n=0
while IFS= read -r line; do
    n=$((n + 1))
    printf '\000%s' "$line" >"$out/cfgstring/$n"
    printf '\001img/%s\n' "$line" >"$out/cfgstring/d$n"
done <<'T'
@id=disk0@file=/var/lib/images/disk0.qcow2@format=qcow2
/var/lib/images/a b.raw
@NAME
@file=/a%2Cb@@c%20@read-only=on@discard=ignore@detect-zeroes=on
@file=/a@snapshot=on@snapshot-name=x@parent=/b@cache-size=32M@offset=1M@size=64K@direct=on
@file=/a@overlay=/b@partition=3
T
printf '\002log = "info"\nallowed = ["/srv"]\n[exports.a]\nfile = "/a"\nformat = "raw"\n' >"$out/cfgstring/file"

# A client's bytes: flags, GO, a read, a write, a flush, the end; and netlink messages of the family.
python3 - "$out" <<'P'
import struct, sys
out = sys.argv[1]
def option(n, data=b""): return struct.pack(">QII", 0x49484156454F5054, n, len(data)) + data
go = struct.pack(">I", 4) + b"disk" + b"\0\0"
def request(kind, at, n, data=b"", flags=0): return struct.pack(">IHHQQI", 0x25609513, flags, kind, 7, at, n) + data
talk = struct.pack(">I", 3) + option(8) + option(10, struct.pack(">I", 4) + b"disk" + struct.pack(">II", 1, 15) + b"base:allocation") + option(7, go)
talk += request(0, 512, 1024) + request(1, 0, 512, b"x" * 512, 1) + request(7, 0, 4096) + request(6, 4096, 4096) + request(3, 0, 0) + request(2, 0, 0)
open(out + "/nbd/talk", "wb").write(b"\1" + talk)
open(out + "/nbd/scripted", "wb").write(bytes(range(0, 250, 2)))
def attribute(kind, data): return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)
def message(command, *attributes):
    body = struct.pack("=BBH", command, 2, 0) + b"".join(attributes)
    return struct.pack("=IHHII", len(body) + 16, 30, 0, 1, 0) + body
device = [attribute(1, b"tcm-user/0/d/img/@file=/a/b\0"), attribute(2, struct.pack("=I", 3)), attribute(8, struct.pack("=I", 42))]
for name, bytes_ in {
    "added": message(1, *device), "removed": message(2, *device),
    "size": message(3, *device, attribute(5, struct.pack("=Q", 1 << 30))), "config": message(3, *device, attribute(4, b"img/x\0")),
    "family": message(1, attribute(1, struct.pack("=H", 30)), attribute(7, attribute(1, attribute(1, b"config\0") + attribute(2, struct.pack("=I", 9))))),
}.items():
    open(out + "/netlink/" + name, "wb").write(bytes_)
P
find "$out" -type f -size +300k -delete
for dir in "$out"/*; do echo "$(basename "$dir"): $(find "$dir" -type f | wc -l) inputs, $(du -sk "$dir" | cut -f1) KiB"; done

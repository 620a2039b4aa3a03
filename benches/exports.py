#!/usr/bin/python3
"""Our NBD and FUSE exports beside qemu-nbd and qemu-storage-daemon, with one client: fio.

Usage: benches/exports.py BINARY [SECONDS [ROUNDS]]     (as root, for FUSE; packages fio, qemu-utils, qemu-system-common)

Every round serves the same raw and the same qcow2 image (512 MiB, allocated, in the page cache) with each server in turn, in the opposite order
every other round. Prints a Markdown table: the median of the rounds, and the best.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SIZE = 512 << 20
CASES = [("randread", "4k", 1), ("randread", "4k", 32), ("randwrite", "4k", 1), ("randwrite", "4k", 32), ("read", "1M", 4), ("write", "1M", 4)]
SERVERS = {
    "raw": ["nbd", "qemu-nbd", "fuse", "fuse --direct-io", "fuse passthrough", "qemu-storage-daemon"],
    "qcow2": ["nbd", "qemu-nbd", "fuse", "fuse --direct-io", "qemu-storage-daemon"],
}


def wait(ready, what):
    for _ in range(1500):
        if ready():
            return
        time.sleep(0.02)
    sys.exit(f"{what} does not get ready")


def start(binary, name, kind, image, directory):
    """The process, the target, and fio's engine for it."""
    spec = f"@file={image}@format={kind}"
    quiet = {"stderr": subprocess.DEVNULL}
    if "nbd" in name:
        path = os.path.join(directory, "socket")
        if os.path.exists(path):
            os.unlink(path)
        qemu = ["qemu-nbd", "-f", kind, "-k", path, "-t", "-e", "8", "--cache=writeback", "--discard=unmap", image]
        process = subprocess.Popen(qemu if name == "qemu-nbd" else [binary, "nbd", "--socket", path, spec], **quiet)
        wait(lambda: os.path.exists(path), name)
        return process, ["--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}"]
    if name == "qemu-storage-daemon":
        path = os.path.join(directory, "file")
        open(path, "a").close()
        process = subprocess.Popen([
            name, "--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap", "--blockdev",
            f"driver={kind},node-name=disk,file=file,discard=unmap", "--export", f"type=fuse,id=e,node-name=disk,mountpoint={path},writable=on",
        ], **quiet)
        wait(lambda: os.path.getsize(path) == SIZE, name)
    else:
        point = os.path.join(directory, "mnt")
        os.makedirs(point, exist_ok=True)
        passthrough = "always" if "passthrough" in name else "never"
        options = ["--passthrough", passthrough] + (["--direct-io"] if "direct" in name else [])
        process = subprocess.Popen([binary, "fuse", *options, spec, point], **quiet)
        path = os.path.join(point, "disk")
        wait(lambda: os.path.exists(path), name)
    return process, ["--ioengine=libaio", "--direct=1", f"--filename={path}"]


def measure(target, case, seconds, directory):
    """Requests a second."""
    kind, block, depth = case
    out = subprocess.run(
        ["fio", "--name=x", "--output-format=json", f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", "--time_based",
         f"--runtime={seconds}", f"--size={SIZE}", "--norandommap", "--fallocate=none", *target],
        check=True, capture_output=True, text=True, cwd=directory, timeout=120).stdout
    job = json.loads(out[out.index("{"):])["jobs"][0]
    return job["write" if "write" in kind else "read"]["iops"]


def main():
    binary = os.path.abspath(sys.argv[1])
    seconds = sys.argv[2] if len(sys.argv) > 2 else "2"
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        images = {kind: os.path.join(directory, f"disk.{kind}") for kind in SERVERS}
        with open(images["raw"], "wb") as raw:
            for _ in range(SIZE >> 20):
                raw.write(random.randbytes(1 << 20))
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", images["raw"], images["qcow2"]], check=True)
        for turn in range(rounds):
            for kind, names in SERVERS.items():
                for name in names if turn % 2 == 0 else reversed(names):
                    process, target = start(binary, name, kind, images[kind], directory)
                    try:
                        for case in CASES:
                            found.setdefault((kind, name, case), []).append(measure(target, case, seconds, directory))
                    finally:
                        process.send_signal(signal.SIGTERM)
                        process.wait()
    print("| | " + " | ".join(f"{kind} {block} q{depth}" for kind, block, depth in CASES) + " |")
    print("|---" * (len(CASES) + 1) + "|")
    for kind, names in SERVERS.items():
        for name in names:
            cells = [f"{statistics.median(v):.0f} ({max(v):.0f})" for v in (found[kind, name, case] for case in CASES)]
            print(f"| {kind}: {name} | " + " | ".join(cells) + " |")


main()

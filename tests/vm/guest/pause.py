"""Reads a block of a disk again and again, past the page cache, until its standard input ends; then prints the longest time that
a read took, in milliseconds, and how many there were: pause.py DISK. A read that fails ends it with status 1."""

import mmap
import os
import select
import sys
import time

disk = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
longest, count, last_look = 0.0, 0, 0.0
while True:
    begun = time.monotonic()
    os.preadv(disk, [block], count % 256 * 4096)
    ended = time.monotonic()
    longest = max(longest, ended - begun)
    count += 1
    if ended - last_look > 0.02:
        last_look = ended
        if select.select([sys.stdin], [], [], 0)[0]:
            break
print(f"{longest * 1000:.0f} {count}")

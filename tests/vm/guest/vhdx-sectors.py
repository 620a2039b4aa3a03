"""Gives an empty VHDX, as `qemu-img create` makes it, sectors of another size, which QEMU cannot make: vhdx-sectors.py FILE BYTES

[MS-VHDX] 2.6.2.4, 2.6.2.5: the logical and the physical sector size are items of the metadata region, which has no checksum.
The logical size sets how many payload entries of the block table stand before a bitmap entry; a disk of fewer blocks than the
smaller of the two numbers has the same table for both.
"""

import struct
import sys
import uuid

METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
SECTORS = (uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f"), uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556"))

path, size = sys.argv[1], int(sys.argv[2])
with open(path, "r+b") as file:
    file.seek(192 << 10)
    regions = file.read(64 << 10)
    entries = [regions[16 + 32 * n :][:32] for n in range(struct.unpack_from("<I", regions, 8)[0])]
    [region] = [struct.unpack_from("<Q", e, 16)[0] for e in entries if uuid.UUID(bytes_le=e[:16]) == METADATA]
    file.seek(region)
    table = file.read(64 << 10)
    changed = 0
    for n in range(struct.unpack_from("<H", table, 10)[0]):
        entry = table[32 + 32 * n :][:32]
        if uuid.UUID(bytes_le=entry[:16]) in SECTORS:
            file.seek(region + struct.unpack_from("<I", entry, 16)[0])
            file.write(struct.pack("<I", size))
            changed += 1
assert changed == 2, f"{path}: {changed} of 2 sector sizes found"

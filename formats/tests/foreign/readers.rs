//! Independent readers of VHD and VHDX: libvhdi and dissect.hypervisor, both by their Python modules.

use super::{Raw, try_run};
use std::path::Path;

const COMPARE: &str = "
def compare(image, size, raw_path):
    with open(raw_path, 'rb') as raw:
        raw.seek(0, 2)
        assert raw.tell() == size, f'size {size}, should be {raw.tell()}'
        step = 1 << 20
        for at in range(0, size, step):
            raw.seek(at)
            want = raw.read(step)
            image.seek(at)
            got = b''
            while len(got) < len(want):
                part = image.read(len(want) - len(got))
                assert part, f'short read at {at}'
                got += part
            if got != want:
                first = next(i for i in range(len(want)) if got[i] != want[i])
                raise SystemExit(f'byte {at + first}: {got[first]:#x}, should be {want[first]:#x}')
";

const LIBVHDI: &str = "
import sys, pyvhdi
raw, names = sys.argv[1], sys.argv[2:]
chain = []
for name in names:
    file = pyvhdi.file()
    file.open(name)
    chain.append(file)
for child, parent in reversed(list(zip(chain, chain[1:]))):
    child.set_parent(parent)
compare(chain[0], chain[0].get_media_size(), raw)
";

const DISSECT: &str = "
import sys
from pathlib import Path
raw, name = sys.argv[1], sys.argv[2]
if open(name, 'rb').read(8) == b'vhdxfile':
    from dissect.hypervisor.disk.vhdx import VHDX
    image = VHDX(Path(name))
elif open(name, 'rb').read(4) in (b'KDMV', b'COWD', b'# Di', bytes.fromhex('bebafeca')):
    from dissect.hypervisor.disk.vmdk import VMDK
    image = VMDK(Path(name))
else:
    from dissect.hypervisor.disk.vhd import VHD
    image = VHD(open(name, 'rb'))
compare(image, image.size, raw)
";

const DISSECT_ON_PARENT: &str = "
import io, sys
from pathlib import Path
raw, name, kind = sys.argv[1], sys.argv[2], sys.argv[3]
base = Path(name).parent / 'base'

class Longer:
    'A parent with zeros behind its end.'
    def __init__(self, disk):
        self.disk = disk
    def seek(self, at):
        self.disk.seek(at)
    def read(self, count):
        got = self.disk.read(count)
        return got + bytes(count - len(got))

if kind == 'vdi':
    from dissect.hypervisor.disk.vdi import VDI
    parent = Longer(VDI(base).open()) if base.exists() else None
    disk = VDI(Path(name), parent)
    image, size = disk.open(), disk.size
compare(image, size, raw)
";

/// The Python that has dissect.hypervisor: `$DISSECT_PYTHON`, or the first one in the path.
fn dissect_python() -> String {
    std::env::var("DISSECT_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// libvhdi reads the chain, whose first file is the image, as what is in the plain file.
pub fn libvhdi_agrees(dir: &Path, chain: &[&str], raw: &Raw) {
    let script = format!("{COMPARE}{LIBVHDI}");
    let mut args = vec!["-c", &script, raw.path.to_str().unwrap()];
    args.extend(chain);
    let (ok, text) = try_run(dir, "/usr/bin/python3", &args);
    assert!(ok, "libvhdi (Debian: python3-libvhdi) on {chain:?}: {text}");
}

/// dissect.hypervisor reads an image, whose parents it finds itself, as what is in the plain file.
pub fn dissect_agrees(dir: &Path, image: &str, raw: &Raw) {
    let script = format!("{COMPARE}{DISSECT}");
    let (ok, text) = try_run(dir, &dissect_python(), &["-c", &script, raw.path.to_str().unwrap(), image]);
    assert!(ok, "dissect.hypervisor (pip install dissect.hypervisor; DISSECT_PYTHON names the Python that has it) on {image}: {text}");
}

/// dissect.hypervisor reads an image of a kind that it has to be told, on the file `base` beside it if there is one, as these bytes.
pub fn dissect_reads(kind: &str, file: &Path, content: &[u8]) {
    let plain = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    std::fs::write(plain.path(), content).unwrap();
    let script = format!("{COMPARE}{DISSECT_ON_PARENT}");
    let args = ["-c", &script, plain.path().to_str().unwrap(), file.to_str().unwrap(), kind];
    let (ok, text) = try_run(file.parent().unwrap(), &dissect_python(), &args);
    assert!(ok, "dissect.hypervisor (pip install dissect.hypervisor) on {}: {text}", file.display());
}

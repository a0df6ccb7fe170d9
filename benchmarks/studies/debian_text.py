"""Lays natural language from Debian packages into a folder: `python -m benchmarks.studies.debian_text FOLDER`

Kernel documentation, dictionaries and the manual of Perl, about 115 MB. It needs `apt-get` and `dpkg`, and installs
nothing. Long files are cut at line ends, so that what is held out comes from all of them.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGES = ("linux-doc-6.1", "dict-gcide", "dict-wn", "dict-foldoc", "dict-jargon", "perl-doc")
ENDINGS = (".rst.gz", ".txt.gz", ".dict.dz", ".pod")
PIECE_BYTES = 2**16


def pieces(content: bytes) -> Iterator[bytes]:
    """Cuts a text at line ends into pieces of at most ``PIECE_BYTES``, or of one line where that is longer."""
    piece = bytearray()
    for line in content.splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
        piece += line
    if piece:
        yield bytes(piece)


def lay(unpacked: Path, folder: Path) -> int:
    """Writes the texts of an unpacked package into ``folder`` as `NUMBER.txt`, and returns how many there are."""
    paths = sorted(path for path in unpacked.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())
    contents = (gzip.decompress(raw) if path.suffix != ".pod" else raw for path in paths for raw in [path.read_bytes()])
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for piece in (piece for content in contents for piece in pieces(content)):
        number += 1
        (folder / f"{number:05}.txt").write_bytes(piece)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the texts go; it must not exist yet")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        parser.error(f"folder: expected a path where nothing is, got {folder}; remove it or take another")
    with TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        for package in PACKAGES:
            unpacked = Path(work) / package
            (archive,) = Path(work).glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
            print(f"{package}: {lay(unpacked, folder / package)} texts", flush=True)


if __name__ == "__main__":
    main()

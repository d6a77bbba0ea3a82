"""Copy an image's archive from ``docker save`` to stdout, gzipped and without some of its layers.

The arguments are the SHA-256 digests of the layers to leave out. An engine opens a layer in the
archive only if it does not have that layer, so those that all receivers have may be missing.
Engines before version 25 do not name a layer's file by its digest; such a layer is copied to a
temporary file to compute the digest.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

MIB = 1 << 20
BLOBS = "blobs/sha256/"


class Meter:
    """A file that reports on stderr how much of it was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.count = 0

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        data = self.file.read(size)
        before, self.count = self.count, self.count + len(data)
        if self.count // (100 * MIB) > before // (100 * MIB):
            print(f"{self.count // MIB:,} MiB of the image", file=sys.stderr, flush=True)
        return data


class Gzip:
    """A file that gzips what is written to it into another file, on all processors."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.processors = os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.processors)
        self.blocks = deque()

    def write(self, data: bytes) -> None:
        """Write a block as a gzip member of its own; a sequence of members is a valid gzip file."""
        self.blocks.append(self.pool.submit(zlib.compress, data, level=1, wbits=31))
        self.drain(2 * self.processors)

    def drain(self, left: int = 0) -> None:
        """Write finished blocks to the file, and wait until at most ``left`` are unfinished."""
        while len(self.blocks) > left:
            self.file.write(self.blocks.popleft().result())


def spool(content: BinaryIO) -> tuple[BinaryIO, str]:
    """Return ``content`` as a file that can be read again, and its SHA-256."""
    file, digest = tempfile.TemporaryFile(), hashlib.sha256()
    while data := content.read(MIB):
        file.write(data)
        digest.update(data)
    file.seek(0)
    return file, digest.hexdigest()


def strip_layers(source: Meter, target: Gzip, held: Set[str]) -> None:
    """Copy the archive ``source`` to ``target`` without the layers of the digests ``held``."""
    with (
        tarfile.open(fileobj=source, mode="r|", bufsize=MIB) as old,
        tarfile.open(fileobj=target, mode="w|", bufsize=MIB, copybufsize=MIB) as new,
    ):
        for member in old:
            content, digest = None, ""
            if member.isfile():
                content = old.extractfile(member)
                if member.name.startswith(BLOBS):
                    digest = member.name.removeprefix(BLOBS)
                elif held and member.name.endswith("/layer.tar"):
                    content, digest = spool(content)
            if digest not in held:
                new.addfile(member, content)


if __name__ == "__main__":
    print("the engine exports the image", file=sys.stderr, flush=True)
    digests = {digest.removeprefix("sha256:") for digest in sys.argv[1:]}
    archive = Gzip(sys.stdout.buffer)
    strip_layers(Meter(sys.stdin.buffer), archive, digests)
    archive.drain()

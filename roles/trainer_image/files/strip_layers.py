"""Copy an image's archive from ``docker save``, gzipped, less the layers that are named.

An engine looks for a layer among its own before it opens the archive's, so what all receivers have
may be missing there. Engines before 25 name a layer's file by something else than its digest: such
a layer waits in a temporary file until its digest is known.
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
    """A file that is read and that says on stderr how far."""

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
    """A file that gzips what is written, into another one and on all processors."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.processors = os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.processors)
        self.blocks = deque()

    def write(self, data: bytes) -> None:
        """Write a block. Each is gzipped by itself: a series of these is valid, too."""
        self.blocks.append(self.pool.submit(zlib.compress, data, level=1, wbits=31))
        self.drain(2 * self.processors)

    def drain(self, left: int = 0) -> None:
        """Pass on what is ready; wait where more than ``left`` blocks are not."""
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


def thin(source: Meter, target: Gzip, held: Set[str]) -> None:
    """Copy the archive ``source`` to ``target`` without the layers ``held``, by SHA-256."""
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
    print("the engine writes the image out", file=sys.stderr, flush=True)
    digests = {digest.removeprefix("sha256:") for digest in sys.argv[1:]}
    archive = Gzip(sys.stdout.buffer)
    thin(Meter(sys.stdin.buffer), archive, digests)
    archive.drain()

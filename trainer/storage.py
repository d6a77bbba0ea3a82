"""Storage of checkpoints: a directory of each host, or a bucket that all hosts share.

In both a checkpoint is ``checkpoint-<step>/`` with safetensors files, and may be copied from one to
the other. In a directory each host writes one file, ``state-<host>-of-<hosts>``. In a bucket it
writes several, ``state-<host>-of-<hosts>.<part>-of-<parts>``, so that an upload needs memory for
one part only, and a lost connection repeats one part only.
"""

import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch_xla.runtime as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from .flags import BadInput

PART_BYTES = 128 * 2**20  # most bytes in an object, unless a single shard is larger
UPLOADS = 4  # at the same time; each needs a few times PART_BYTES of memory
Shards = Mapping[str, torch.Tensor]
Describe = Callable[[Shards], dict[str, str]]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FILE = re.compile(r"state-(\d+)-of-(\d+)(?:\.(\d+)-of-(\d+))?\.safetensors")
_HEADER_BYTES = 100_000_000  # the largest header that safetensors allows
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}  # the dtypes of weights and moments
_ADVICE = {
    "401": (
        "Nobody is logged in here: a TPU VM needs a service account; elsewhere set "
        "GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login"
    ),
    "403": "Give this account roles/storage.objectUser on the bucket",
    "404": "Check its name, or make it: gcloud storage buckets create",
}


class Directory:
    """A directory of this host that is a checkpoint, or contains checkpoints.

    A checkpoint is written under a hidden name, and renamed once all its data is on the disk. So a
    directory named ``checkpoint-<step>`` is always complete.
    """

    shared = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "Directory":
        return Directory(self.path / name)

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return _steps(path.name for path in self.path.glob("checkpoint-*"))

    def write(self, name: str, shards: Shards, describe: Describe) -> None:
        """Write this host's shards as the checkpoint ``name``, replacing an earlier one.

        ``describe`` returns the metadata for a file with the given shards. Raises OSError or
        SafetensorError.
        """
        path, hidden = self.path / name, self.path / f".{name}"
        file = hidden / f"{_stem()}.safetensors"
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        save_file(dict(shards), file, describe(shards))
        file.chmod(0o644)  # safetensors gives access to its owner alone
        _flush(file)
        _flush(hidden)
        self.remove(name)
        hidden.rename(path)
        _flush(self.path)

    def remove(self, name: str) -> None:
        """Remove a checkpoint atomically: first its name, then its files."""
        path = self.path / name
        if path.exists():
            hidden = path.with_name(f".{name}.removed")
            path.rename(hidden)
            shutil.rmtree(hidden)

    def remove_incomplete(self) -> None:
        """Remove what is left of checkpoints that were being written or removed."""
        for path in self.path.glob(".checkpoint-*"):
            shutil.rmtree(path)

    def files(self) -> list[str]:
        """Return the names of a checkpoint's files; none if it is no checkpoint."""
        return sorted(path.name for path in self.path.glob("state-*.safetensors"))

    def open(self, file: str) -> Any:
        """Open one of the files; raises OSError or SafetensorError, also when it is read."""
        return safe_open(self.path / file, framework="pt")


class Bucket:
    """A path in a bucket, ``gs://bucket/path``, that is a checkpoint or contains checkpoints.

    All hosts write into the same checkpoint. An object appears only when it is complete. A
    checkpoint is complete when all objects of all hosts exist; their names give the numbers.

    Every method raises BadInput for a request that the storage refuses.
    """

    shared = True

    def __init__(self, url: str) -> None:
        import tensorstore

        self.url = url.rstrip("/")
        bucket, _, path = self.url.removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": path and f"{path}/"}
        self._store = tensorstore.KvStore.open(spec).result()
        self._objects: dict[str, _Object] = {}

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    def check(self, *, new: bool) -> None:
        """Raise BadInput unless this host may list, write and remove objects here.

        For a ``new`` run, raise BadInput also if there are checkpoints already.
        """
        probe = f".{_stem()}"
        self._result(self._store.write(probe, b""))
        seen = self._keys()
        self._result(self._store.write(probe, None))
        if probe not in seen:
            raise BadInput(f"{self}: its objects cannot be listed. {_ADVICE['403']}")
        if (steps := self.checkpoints()) and new:
            raise BadInput(
                f"{self} holds the checkpoints of an earlier run, up to checkpoint-{steps[-1]}; "
                "give another path, or --resume_from_checkpoint auto to continue it"
            )

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return _steps(name for name, files in self._list().items() if _complete(files))

    def write(self, name: str, shards: Shards, describe: Describe) -> None:
        """Write this host's shards into the checkpoint ``name``; see :meth:`Directory.write`."""
        parts = list(_parts(shards))

        def upload(number: int) -> None:
            file = f"{_stem()}.{number:05}-of-{len(parts):05}.safetensors"
            data = save(parts[number], describe(parts[number]))
            self._result(self._store.write(f"{name}/{file}", data))

        with ThreadPoolExecutor(UPLOADS) as threads:
            list(threads.map(upload, range(len(parts))))

    def remove(self, name: str) -> None:
        """Remove the files of a checkpoint, complete or not, but no other objects below it."""
        files = (self / name).files()
        for removed in [self._store.write(f"{name}/{file}", None) for file in files]:
            self._result(removed)

    def remove_incomplete(self) -> None:
        """Remove what is left of checkpoints that were being written or removed."""
        for name, files in self._list().items():
            if not _complete(files):
                self.remove(name)

    def files(self) -> list[str]:
        """Return the names of a checkpoint's files; none if it is no checkpoint."""
        return sorted(key for key in self._keys() if _FILE.fullmatch(key))

    @contextmanager
    def open(self, file: str) -> Iterator["_Object"]:
        """Open one of the files; raises SafetensorError, also when it is read."""
        if file not in self._objects:
            self._objects[file] = _Object(lambda *bounds: self._read(file, *bounds))
        yield self._objects[file]

    def _list(self) -> dict[str, list[str]]:
        """Return the files of every checkpoint, complete or not."""
        found = defaultdict(list)
        for key in self._keys():
            name, _, file = key.partition("/")
            if _CHECKPOINT.fullmatch(name) and _FILE.fullmatch(file):
                found[name].append(file)
        return found

    def _keys(self) -> list[str]:
        """Return the names of all objects here."""
        keys = [key.decode() for key in self._result(self._store.list())]
        if not keys:
            # A refused listing looks like an empty one. A refused read of a missing object raises.
            self._result(self._store.read("-"))
        return keys

    def _read(self, file: str, start: int, stop: int) -> bytes:
        return self._result(self._store.read(file, byte_range=slice(start, stop))).value

    def _result(self, future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            # The text is a status, the storage's message and, in brackets, HTTP code and response.
            said = str(error).partition(" [")[0].rstrip(".")
            if said.startswith("OUT_OF_RANGE"):
                raise SafetensorError(said) from error
            code = re.search(r"\[http_response_code='(\d+)'\]", str(error))
            advice = _ADVICE.get(code[1], "") if code else ""
            raise BadInput(f"{self.url}: {said}. {advice}".strip()) from error


class _Object:
    """A safetensors file in a bucket, read tensor by tensor, like ``safe_open`` for a local file.

    ``read(start, stop)`` returns a range of its bytes. The format:
    https://huggingface.co/docs/safetensors/index#format
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        size = int.from_bytes(read(0, 8), "little")
        if not 0 < size <= _HEADER_BYTES:
            raise SafetensorError(f"its header has {size} bytes")
        self._start = 8 + size
        try:
            self._tensors = json.loads(read(8, self._start))
            self._metadata = self._tensors.pop("__metadata__", {})
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            raise SafetensorError(f"its header cannot be read: {error}") from error

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, key: str) -> torch.Tensor:
        try:
            entry = self._tensors[key]
            start, stop = entry["data_offsets"]
            data = bytearray(self._read(self._start + start, self._start + stop))
            return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except BadInput:
            raise
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise SafetensorError(f"{error!r}") from error


def at(place: Path | str) -> Directory | Bucket:
    """Return the storage that a path or a ``gs://`` address names."""
    text = str(place)
    return Bucket(text) if text.startswith("gs://") else Directory(Path(text).expanduser())


def _stem() -> str:
    return f"state-{xr.process_index():05}-of-{xr.process_count():05}"


def _steps(names: Iterable[str]) -> list[int]:
    return sorted(int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name)))


def _complete(files: Iterable[str]) -> bool:
    """Return whether ``files`` are all files, of all hosts, of one checkpoint."""
    counts = Counter(_FILE.fullmatch(file).group(1, 2, 4) for file in files)
    hosts = {hosts for _, hosts, _ in counts}
    return (
        len(hosts) == 1
        and len(counts) == int(hosts.pop())
        and all(count == int(parts or 1) for (_, _, parts), count in counts.items())
    )


def _parts(shards: Shards) -> Iterator[Shards]:
    """Yield the shards in parts of at most PART_BYTES, at least one part."""
    part, size = {}, 0
    for name, shard in shards.items():
        if part and size + shard.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = shard
        size += shard.nbytes
    yield part


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: weights, optimizer state and step, written while training goes on.

``checkpoint-<step>`` is the state after so many steps. Each host writes one file into it,
``state-<host>-of-<hosts>.safetensors``: the shards of its own devices, each under its tensor's name
and its place in it, ``lm_head.weight[0:320,16:32]``. Put together from these, a tensor can be cut
for any other mesh. The header holds the step, what a run that resumes must have in common with the
one that saved, and a checksum of every shard.

The directory is written under a hidden name and renamed when everything in it is on the disk: what
is called ``checkpoint-<step>`` is complete. All access to the storage is in this file.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch_xla
import torch_xla.runtime as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trainer.flags import BadInput
from trainer.sharding import Range, from_hosts, local_places

OTHER = "resume from another checkpoint, or leave --resume_from_checkpoint out to start afresh"


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message says which and why."""


class Saver:
    """Saves ``state`` every so many steps, in the background, one checkpoint at a time.

    Args:
        directory: where the checkpoints go.
        state: tensors on the mesh by name; they are updated in place from step to step.
        identity: what must be the same where a run resumes, as JSON can hold it.
        every: save after so many steps.
        keep: how many complete checkpoints stay; None: all. One more is there while the newest has
            not proved, by a finite loss, to be a good one.
    """

    def __init__(
        self,
        directory: Path,
        state: Mapping[str, torch.Tensor],
        identity: Mapping[str, Any],
        *,
        every: int,
        keep: int | None,
    ) -> None:
        self.directory, self.state, self.identity = directory, state, dict(identity)
        self.every, self.keep = every, keep
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Copy the state after ``step`` steps to the host, and begin to write it.

        Waits for the devices and for the checkpoint before. Raises SaveFailed if that one failed.
        """
        self.wait()
        self._remove_oldest()
        self._writing = self._thread.submit(self._write, step, _local_shards(self.state))

    def wait(self) -> None:
        """Wait until what was begun is complete; raises SaveFailed if it could not be written."""
        if self._writing:
            self._writing.result()

    def discard(self, step: int) -> None:
        """Remove the checkpoint of ``step``, whose weights gave a loss that is not finite."""
        self.wait()
        _remove(self.directory / _name(step))

    def close(self) -> None:
        """Wait as :meth:`wait` does, and leave no more checkpoints than are to be kept."""
        self.wait()
        self._remove_oldest()
        self._thread.shutdown()

    def _remove_oldest(self) -> None:
        if self.keep:
            for step in _complete(self.directory)[: -self.keep]:
                _remove(self.directory / _name(step))

    def _write(self, step: int, shards: Mapping[str, torch.Tensor]) -> None:
        path, hidden = self.directory / _name(step), self.directory / f".{_name(step)}"
        header = {
            "step": step,
            "identity": self.identity,
            "crc32": {name: _crc32(shard) for name, shard in shards.items()},
        }
        text = json.dumps(header)
        metadata = {"checkpoint": text, "crc32": str(zlib.crc32(text.encode()))}
        file = hidden / f"state-{xr.process_index():05}-of-{xr.process_count():05}.safetensors"
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            save_file(dict(shards), file, metadata)
            file.chmod(0o644)  # safetensors makes it its owner's alone
            _flush(file)
            _flush(hidden)
            _remove(path)
            hidden.rename(path)
            _flush(self.directory)
        except (OSError, SafetensorError) as error:
            raise SaveFailed(f"{path} cannot be written: {error}") from error
        print(f"saved {path}", flush=True)


class Checkpoint:
    """A complete checkpoint, to be read.

    Raises BadInput, also from its methods, if something in it is missing, damaged, or of a run with
    another ``identity`` than this one's.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.step = 0
        self._checksums: dict[str, int] = {}
        self._shards: dict[str, dict[Path, dict[Range, str]]] = {}  # their keys in their files
        files = sorted(path.glob("state-*.safetensors"))
        if not files:
            raise BadInput(
                f"{path} is no checkpoint: there is no state-*.safetensors in it. Give a directory "
                "checkpoint-<step> that a run with --save_strategy steps has left"
            )
        for file in files:
            header = self._open(file)
            self._check_identity(header["identity"], identity)
            if self.step and header["step"] != self.step:
                raise BadInput(f"{path} holds files of steps {self.step} and {header['step']}")
            self.step = header["step"]
            self._checksums |= header["crc32"]
            for key in header["crc32"]:
                name, place = _parse(key)
                self._shards.setdefault(name, {}).setdefault(file, {})[place] = key

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return a tensor of ``shape`` on the host, as far as the files here have its shards.

        What they do not have is undefined and, untouched, takes no memory. See :meth:`check`.
        """
        tensor = None
        for file, keys in self._shards.get(name, {}).items():
            try:
                with safe_open(file, framework="pt") as opened:
                    shards = {place: opened.get_tensor(key) for place, key in keys.items()}
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, f"{name} cannot be read: {error}") from error
            for place, shard in shards.items():
                if _crc32(shard) != self._checksums[keys[place]]:
                    raise self._damaged(file, f"the checksum of {keys[place]} is wrong")
                inside = len(place) == len(shape) and all(
                    stop <= size for (_, stop), size in zip(place, shape, strict=True)
                )
                if not inside or list(shard.shape) != [stop - start for start, stop in place]:
                    raise BadInput(
                        f"{file}: {keys[place]} does not fit into the model's {name}, which is "
                        f"{list(shape)}; {OTHER}"
                    )
                tensor = torch.empty(shape, dtype=shard.dtype) if tensor is None else tensor
                tensor[tuple(slice(*part) for part in place)] = shard
        if tensor is None:
            raise BadInput(f"{self.path} has no {name}, which the model has; {OTHER}")
        return tensor

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise BadInput unless the files here have all that this host's devices now hold."""
        for name, tensor in state.items():
            for place in local_places(tensor):
                # Different hosts may have the same shard.
                shards = set().union(*self._shards.get(name, {}).values())
                found = sum(_overlap(place, shard) for shard in shards)
                if found != _overlap(place, place):
                    raise BadInput(
                        f"{self.path} has not all of {_key(name, place)}. If several hosts have "
                        f"saved it, put all their files into this directory; else {OTHER}"
                    )

    def _open(self, file: Path) -> dict[str, Any]:
        """Return the header of one file, after a look at what it holds."""
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                keys = set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, str(error)) from error
        text = metadata.get("checkpoint", "")
        if str(zlib.crc32(text.encode())) != metadata.get("crc32"):
            raise self._damaged(file, "the checksum of its header is wrong")
        header = json.loads(text)
        if differing := keys ^ header["crc32"].keys():
            raise self._damaged(file, f"its list of tensors is wrong at {min(differing)}")
        return header

    def _damaged(self, file: Path, why: str) -> BadInput:
        return BadInput(f"{file} is damaged: {why}. Delete {self.path.name}; {OTHER}")

    def _check_identity(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        for key in ours:
            if theirs.get(key) != ours[key]:
                raise BadInput(
                    f"{self.path} was saved by a run whose {key} is {theirs.get(key)!r}; of this "
                    f"run it is {ours[key]!r}. Make them the same; else {OTHER}"
                )


def find(resume_from_checkpoint: str | None, directory: Path) -> Path | None:
    """Return the checkpoint that the flag means, or None if there is none to resume from.

    ``auto`` is the newest in ``directory`` that all hosts have. Raises BadInput where a host misses
    what the others have.
    """
    if resume_from_checkpoint != "auto":
        return Path(resume_from_checkpoint).expanduser() if resume_from_checkpoint else None
    steps = from_hosts(max(_complete(directory), default=0))
    common, latest = int(steps.min().item()), int(steps.max().item())
    path = directory / _name(common)
    if latest and not path.is_dir():
        raise BadInput(
            f"the hosts have no checkpoint in common: {directory} holds {_name(latest)} on one of "
            f"them, and on another nothing after step {common}. Bring it to all hosts, or {OTHER}"
        )
    return path if latest else None


def remove_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps than ``step``, and what is left of incomplete ones."""
    for other in _complete(directory):
        if other > step:
            _remove(directory / _name(other))
    for path in directory.glob(".checkpoint-*"):
        shutil.rmtree(path)


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _complete(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in ``directory``, ascending."""
    names = (path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _remove(path: Path) -> None:
    """Remove a checkpoint; under its name it is whole or not there at any moment."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _local_shards(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of this host's shards of all tensors, each part once, by name and place."""
    shards = {}
    for name, tensor in state.items():
        local = torch_xla._XLAC._get_local_shards([tensor])[0]
        for place, (shard, _) in zip(local_places(tensor), local, strict=True):
            shards[_key(name, place)] = shard
    return shards


def _key(name: str, place: Range) -> str:
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in place)}]"


def _parse(key: str) -> tuple[str, Range]:
    name, _, place = key.removesuffix("]").partition("[")
    parts = (part.partition(":") for part in place.split(","))
    return name, tuple((int(start), int(stop)) for start, _, stop in parts)


def _overlap(a: Range, b: Range) -> int:
    """Return how many elements two parts of a tensor have in common."""
    return math.prod(
        max(0, min(a_stop, b_stop) - max(a_start, b_start))
        for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True)
    )


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())


def _flush(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: weights, optimizer state and step, written in the background during training.

``checkpoint-<step>`` is the state after that many steps. Each host writes the shards of its own
devices, under the tensor's name and the shard's index ranges: ``lm_head.weight[0:320,16:32]``. From
these a tensor can be assembled and sharded over any other mesh. The header of every file holds the
step, the run's ``identity`` (the settings that a resuming run must share) and a checksum of every
shard. ``storage.py`` decides where checkpoints are and when one is complete.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla
import torch_xla.runtime as xr
from safetensors import SafetensorError

from .arguments import NEWEST
from .flags import BadInput
from .sharding import Range, Spec, from_hosts, local_parts, local_places, local_replicas
from .storage import Bucket, Directory, at

OTHER = "resume from another checkpoint, or leave --resume_from_checkpoint out to start afresh"
READS = 16  # concurrent reads of a checkpoint


class SaveFailed(RuntimeError):
    """A checkpoint could not be written or removed; the message says which one and why."""


@contextmanager
def _naming(failure: str) -> Iterator[None]:
    """Turn the storage's errors in this context into SaveFailed, prefixed with ``failure``."""
    try:
        yield
    except (OSError, SafetensorError, BadInput) as error:
        raise SaveFailed(f"{failure}: {error}") from error


class Saver:
    """Saves ``state`` in the background, one checkpoint at a time.

    Args:
        place: where checkpoints are written.
        state: tensors on the mesh by name; steps update them in place.
        identity: the settings that a resuming run must share, as JSON values.
        every: number of steps between checkpoints; the training loop reads it.
        keep: number of complete checkpoints to keep; None: all. One more is kept until the newest
            one has given a finite loss.
    """

    def __init__(
        self,
        place: Directory | Bucket,
        state: Mapping[str, torch.Tensor],
        identity: Mapping[str, Any],
        *,
        every: int,
        keep: int | None,
    ) -> None:
        self.place, self.state, self.identity = place, state, dict(identity)
        self.every, self.keep = every, keep
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Copy the state after ``step`` steps to the host, and start writing a checkpoint.

        Waits for the devices and for the previous checkpoint; raises SaveFailed if that one failed.
        """
        self._remove_oldest()
        shards = _local_shards(self.state, once=self.place.shared)
        self._writing = self._thread.submit(self._write, step, shards)

    def wait(self) -> None:
        """Wait for the checkpoint being written; raises SaveFailed if writing failed."""
        if self._writing:
            self._writing.result()

    def discard(self, step: int) -> None:
        """Remove the checkpoint of ``step``: its weights have given a loss that is not finite."""
        self.wait()
        with _naming(f"{self.place / _name(step)} cannot be removed"):
            self.place.remove(_name(step))

    def close(self) -> None:
        """Wait as :meth:`wait` does, then remove checkpoints beyond the number to keep."""
        self._remove_oldest()
        self._thread.shutdown()

    def _remove_oldest(self) -> None:
        self.wait()
        if self.keep and xr.process_count() > 1:
            from_hosts(0).max().item()  # a barrier: all hosts have finished writing
        if self.keep and _removes(self.place):
            with _naming(f"the oldest checkpoint in {self.place} cannot be removed"):
                for step in self.place.checkpoints()[: -self.keep]:
                    self.place.remove(_name(step))

    def _write(self, step: int, shards: Mapping[str, torch.Tensor]) -> None:
        def describe(shards: Mapping[str, torch.Tensor]) -> dict[str, str]:
            header = {
                "step": step,
                "identity": self.identity,
                "crc32": {name: _crc32(shard) for name, shard in shards.items()},
            }
            text = json.dumps(header)
            return {"checkpoint": text, "crc32": str(zlib.crc32(text.encode()))}

        path = self.place / _name(step)
        with _naming(f"{path} cannot be written"):
            self.place.write(_name(step), shards, describe)
        print(f"saved {path}", flush=True)


class Checkpoint:
    """A complete checkpoint, for reading.

    The constructor and all methods raise BadInput for data that is missing or damaged, and for a
    checkpoint whose ``identity`` is not this run's.
    """

    def __init__(self, place: Directory | Bucket, identity: Mapping[str, Any]) -> None:
        self.place = place
        self.step = 0
        # Tensor name → part of the tensor → (file, key in the file, checksum) of its shard
        self._shards: dict[str, dict[Range, tuple[str, str, int]]] = {}
        files = place.files()
        if not files:
            raise BadInput(
                f"{place} is no checkpoint: there is no state-*.safetensors in it. Give a "
                "checkpoint-<step> that a run with --save_strategy steps has left"
            )
        with ThreadPoolExecutor(READS) as threads:
            headers = list(threads.map(self._header, files))
        for file, header in zip(files, headers, strict=True):
            self._check_identity(header["identity"], identity)
            if self.step and header["step"] != self.step:
                raise BadInput(f"{place} holds files of steps {self.step} and {header['step']}")
            self.step = header["step"]
            for key, checksum in header["crc32"].items():
                name, part = _parse(key)
                self._shards.setdefault(name, {})[part] = (file, key, checksum)

    def read(self, name: str, shape: torch.Size, spec: Spec | None = None) -> torch.Tensor:
        """Return a tensor of ``shape`` on the host, assembled from its shards.

        With ``spec``, only the parts that this host's devices need are read. Parts that are not
        read or not in these files are undefined, and take no memory; :meth:`check` finds the
        latter.
        """
        if name not in self._shards:
            raise BadInput(f"{self.place} has no {name}, which the model has; {OTHER}")
        found = self._shards[name]
        for part, (file, key, _) in found.items():
            if len(part) != len(shape) or any(
                stop > size for (_, stop), size in zip(part, shape, strict=True)
            ):
                raise self._misfit(file, key, name, shape)
        if spec:
            needed = local_parts(shape, spec)
            found = {
                part: where
                for part, where in found.items()
                if any(_overlap(part, other) for other in needed)
            }
        tensor = None
        with ThreadPoolExecutor(READS) as threads:
            for part, shard in zip(found, threads.map(self._shard, found.values()), strict=True):
                if list(shard.shape) != [stop - start for start, stop in part]:
                    raise self._misfit(*found[part][:2], name, shape)
                tensor = torch.empty(shape, dtype=shard.dtype) if tensor is None else tensor
                tensor[tuple(slice(*bounds) for bounds in part)] = shard
        return torch.empty(shape) if tensor is None else tensor

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise BadInput unless the files have all parts of ``state`` that this host holds."""
        for name, tensor in state.items():
            for part in local_places(tensor):
                found = sum(_overlap(part, shard) for shard in self._shards.get(name, ()))
                if found != _overlap(part, part):
                    raise BadInput(
                        f"{self.place} has not all of {_key(name, part)}. If several hosts have "
                        f"saved it, put all their files into this directory; else {OTHER}"
                    )

    def _header(self, file: str) -> dict[str, Any]:
        """Return the header of one file, after checking its list of tensors."""
        try:
            with self.place.open(file) as opened:
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

    def _shard(self, where: tuple[str, str, int]) -> torch.Tensor:
        """Return one shard, after checking its checksum."""
        file, key, checksum = where
        try:
            with self.place.open(file) as opened:
                shard = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, f"{key} cannot be read: {error}") from error
        if _crc32(shard) != checksum:
            raise self._damaged(file, f"the checksum of {key} is wrong")
        return shard

    def _damaged(self, file: str, why: str) -> BadInput:
        name = str(self.place).rpartition("/")[2]
        return BadInput(f"{self.place}/{file} is damaged: {why}. Delete {name}; {OTHER}")

    def _misfit(self, file: str, key: str, name: str, shape: torch.Size) -> BadInput:
        return BadInput(
            f"{self.place}/{file}: {key} does not fit into the model's {name}, which is "
            f"{list(shape)}; {OTHER}"
        )

    def _check_identity(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        for key in ours:
            if theirs.get(key) != ours[key]:
                raise BadInput(
                    f"{self.place} was saved by a run whose {key} is {theirs.get(key)!r}; of this "
                    f"run it is {ours[key]!r}. Make them the same; else {OTHER}"
                )


def find(
    resume_from_checkpoint: str | None, place: Directory | Bucket
) -> Directory | Bucket | None:
    """Return the checkpoint that ``--resume_from_checkpoint`` means; None: start afresh.

    ``auto`` and ``must`` mean the newest checkpoint in ``place`` that all hosts have. Raises
    BadInput where some host has no checkpoint in common with the others, and where ``must`` finds
    none.
    """
    if resume_from_checkpoint not in NEWEST:
        return at(resume_from_checkpoint) if resume_from_checkpoint else None
    complete = place.checkpoints()
    steps = from_hosts(max(complete, default=0))
    common, latest = int(steps.min().item()), int(steps.max().item())
    if latest and common not in complete:
        raise BadInput(
            f"the hosts have no checkpoint in common: {place} holds {_name(latest)} on one of "
            f"them, and on another nothing after step {common}. Bring it to all hosts, or {OTHER}"
        )
    if not latest and resume_from_checkpoint == "must":
        raise BadInput(
            f"there must be a checkpoint to resume from, and {place} has no complete one. Give "
            "another place, or --resume_from_checkpoint auto to start afresh"
        )
    return place / _name(common) if latest else None


def remove_after(place: Directory | Bucket, step: int) -> None:
    """Remove checkpoints of later steps than ``step``, and incomplete ones.

    In a place that all hosts share, the first host removes them. No host can be saving yet: the
    first step needs all hosts, and the first host takes part only after removing.
    """
    if _removes(place):
        for other in place.checkpoints():
            # A bucket without a resumed checkpoint had none (Bucket.check): these are not this
            # run's.
            if other > step and (step or not place.shared):
                place.remove(_name(other))
        place.remove_incomplete()


def _removes(place: Directory | Bucket) -> bool:
    """Return whether this host removes checkpoints in ``place``: of a shared one, the first."""
    return not place.shared or xr.process_index() == 0


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _local_shards(state: Mapping[str, torch.Tensor], once: bool) -> dict[str, torch.Tensor]:
    """Return copies of this host's shards of all tensors by key, without duplicates on this host.

    With ``once``, without duplicates on all hosts together.
    """
    shards = {}
    for name, tensor in state.items():
        local = torch_xla._XLAC._get_local_shards([tensor])[0]
        for (replica, part), (shard, _) in zip(local_replicas(tensor), local, strict=True):
            if replica == 0 or not once:
                shards[_key(name, part)] = shard
    return shards


def _key(name: str, place: Range) -> str:
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in place)}]"


def _parse(key: str) -> tuple[str, Range]:
    name, _, place = key.removesuffix("]").partition("[")
    parts = (part.partition(":") for part in place.split(","))
    return name, tuple((int(start), int(stop)) for start, _, stop in parts)


def _overlap(a: Range, b: Range) -> int:
    """Return the number of elements that two parts of a tensor have in common."""
    return math.prod(
        max(0, min(a_stop, b_stop) - max(a_start, b_start))
        for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True)
    )


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())

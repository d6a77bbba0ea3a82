"""Read from a worker's profile how long its steps took, and where their time went.

On a TPU a step is one run of the training program on a core, on the profile's line «XLA Modules».
Profiles of CPU devices have no device planes: there a step is a marker that the training loop sets
on the host. Fewer than three whole steps give no step time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from trainer.metrics import LEAST_STEPS

from . import xplane

TOP_OPERATIONS = 12
# A first run shorter than this fraction of all other runs was cut off by the start of the trace.
CUT = 0.98

# The training loop's name for the preparation of a step's input
INPUT_MARKER = "input"

_COLLECTIVE = re.compile(
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective|^%?(send|recv)"
)
_OPERATION = re.compile(r"%?[a-z][\w.-]*( = |$)")
_CONTAINER = re.compile("while|conditional")
# The prefix of XLA's own threads on a host
_THREADS = "tf_"
Interval = tuple[float, float]


class BadTrace(ValueError):
    """The file is not a profile of training; the message says why."""


@dataclass(frozen=True)
class Run:
    """One run of a program, or one marked step."""

    start: float  # ns
    end: float  # ns
    number: int | None = None  # of the step, if it is marked

    @property
    def busy(self) -> float:
        """The duration in ns."""
        return self.end - self.start


def read(path: Path) -> dict[str, Any]:
    """Return the numbers of the steps in the profile at ``path``; times are in seconds.

    * ``p50``, ``p90`` and ``mean`` are of the ``n`` step times, each from the start of a step to
    the
      start of the next; of several cores the slowest is reported, because all wait for it
    * ``busy_p50`` is of the program's runs alone; ``idle_share`` is the share of time between them
    * ``split`` divides the mean step of the mean core: ``compute``, while any operation other than
    a
      collective runs; ``communication``, while only collectives run; ``input``, while the host
      prepares input (None if the trainer has not marked it); ``idle``, the rest
    * ``steps`` are the numbers of the first and the last traced step
    * ``operations`` are those that took most time

    Raises BadTrace if the file is not a profile, or has no steps.
    """
    try:
        planes = {plane.name: plane for plane in xplane.load(path).planes}
    except ValueError as error:
        raise BadTrace("no profile, or one that is cut short") from error
    host = planes.get("/host:CPU")
    markers, inputs = _marked(host) if host else ([], [])
    devices = [plane for name, plane in planes.items() if re.match(r"/device:TPU:\d+$", name)]
    cores = [core for core in map(_tpu_core, devices) if core]
    source = "device_trace"
    if not cores and markers:
        cores, source = [_host_core(host, markers)], "step_markers"
    if not cores:
        raise BadTrace("a profile with no steps in it")
    slowest = max(cores, key=lambda core: core.step_time().get("p50") or 0.0)
    numbers = [run.number for run in markers]
    return {
        "source": source,
        "program": slowest.program,
        "cores": len(cores),
        "steps": [min(numbers), max(numbers)] if numbers else None,
        **slowest.step_time(),
        **_where(cores, inputs),
    }


@dataclass(frozen=True)
class Core:
    """The steps and operations of one core."""

    program: str
    runs: Sequence[Run]  # the steps; the last one only marks the end of the step before
    operations: Sequence[tuple[float, float, str]]  # (start, end, name), in ns

    @property
    def enough(self) -> bool:
        """Whether there are enough whole steps for a step time."""
        return len(self.runs) > LEAST_STEPS

    @property
    def window(self) -> Interval:
        """The time in ns from the start of the first step to the start of the last."""
        return self.runs[0].start, self.runs[-1].start

    def step_time(self) -> dict[str, Any]:
        """Return p50, p90 and mean of the step times, in seconds, and the idle share."""
        starts = np.array([run.start for run in self.runs]) / 1e9
        busy = np.array([run.busy for run in self.runs[:-1]]) / 1e9
        steps = np.diff(starts)
        if not self.enough:
            unknown = dict.fromkeys(("p50", "p90", "mean", "busy_p50", "idle_share"))
            return unknown | {"n": len(steps)}
        return {
            "p50": float(np.median(steps)),
            "p90": float(np.quantile(steps, 0.9)),
            "mean": float(steps.mean()),
            "busy_p50": float(np.median(busy)),
            "idle_share": float(1 - busy.sum() / steps.sum()),
            "n": len(steps),
        }

    def split(self, inputs: list[Interval]) -> dict[str, float | None]:
        """Return the seconds of the mean step in each part; their sum is the step time."""
        steps, compute, communication = len(self.runs) - 1, [], []
        for start, end, name in self.operations:
            (communication if is_collective(name) else compute).append((start, end))
        computed, worked, occupied = (
            covered(intervals, self.window) / steps / 1e9
            for intervals in (
                compute,
                compute + communication,
                compute + communication + inputs,
            )
        )
        whole = (self.window[1] - self.window[0]) / steps / 1e9
        return {
            "compute": computed,
            "communication": worked - computed,
            "input": occupied - worked if inputs else None,
            "idle": whole - occupied,
        }


def is_collective(name: str) -> bool:
    """Whether an operation, given by its name or HLO text, is a collective."""
    # Operands may be named after collectives, so only result, opcode and called fusion count.
    result, _, text = name.partition(" = ")
    called = re.findall(r"calls=(\S+)", text)
    opcode = re.findall(r"(?:^| )([a-z-]+)\(", text)[:1]
    return any(_COLLECTIVE.search(word) for word in (result, *opcode, *called))


def covered(intervals: Iterable[Interval], window: Interval) -> float:
    """Return how much of ``window`` lies in at least one of the ``intervals``."""
    spans = np.clip(np.array(sorted(intervals), dtype=float).reshape(-1, 2), *window)
    if not len(spans):
        return 0.0
    # An interval adds only what lies after the end of all intervals before it.
    reached = np.maximum.accumulate(np.concatenate([[window[0]], spans[:-1, 1]]))
    return float(np.maximum(spans[:, 1] - np.maximum(spans[:, 0], reached), 0).sum())


def _where(cores: list[Core], inputs: list[Interval]) -> dict[str, Any]:
    """Return the split of a step's time, and the operations that took most, over all cores."""
    cores = [core for core in cores if core.enough and core.operations]
    if not cores:
        return {"split": None, "operations": []}
    splits = [core.split(inputs) for core in cores]
    split = {
        kind: None if splits[0][kind] is None else float(np.mean([each[kind] for each in splits]))
        for kind in splits[0]
    }
    seconds, counts = Counter(), Counter()
    for core in cores:
        steps = (len(core.runs) - 1) * len(cores)
        first, last = core.window
        for start, end, name in core.operations:
            if first <= start < last:
                seconds[name] += (end - start) / 1e9 / steps
                counts[name] += 1 / steps
    total = sum(seconds.values())
    operations = [
        {
            "name": name.partition(" = ")[0].lstrip("%"),
            "kind": "communication" if is_collective(name) else "compute",
            "seconds": spent,
            "share": spent / total,
            "count": round(counts[name], 3),
        }
        for name, spent in seconds.most_common(TOP_OPERATIONS)
    ]
    return {"split": split, "operations": operations}


def _tpu_core(plane: Message) -> Core | None:
    """Return the runs of the program that took most of a TPU core's time; None without runs."""
    lines, names = {line.name: line for line in plane.lines}, xplane.names(plane.event_metadata)
    programs: dict[str, list[Run]] = defaultdict(list)
    if "XLA Modules" in lines:
        for start, end, event in _events(lines["XLA Modules"]):
            programs[names[event.metadata_id]].append(Run(start, end))
    elif "Steps" in lines:
        programs["steps"] = [Run(start, end) for start, end, _ in _events(lines["Steps"])]
    if not any(programs.values()):
        return None
    program = max(programs, key=lambda name: sum(run.busy for run in programs[name]))
    runs = sorted(programs[program], key=lambda run: run.start)
    inner = [run.busy for run in runs[1:-1]]
    if inner and runs[0].busy < CUT * min(inner):
        runs = runs[1:]
    operations = _leaves(lines["XLA Ops"], names) if "XLA Ops" in lines else []
    return Core(program, runs, operations)


def _host_core(plane: Message, markers: list[Run]) -> Core:
    """Return all CPU devices as one core, because they share the host's threads."""
    names = xplane.names(plane.event_metadata)
    operations = [
        leaf
        for line in plane.lines
        if line.name.startswith(_THREADS)
        for leaf in _leaves(line, names)
    ]
    return Core("steps", markers, operations)


def _marked(host: Message) -> tuple[list[Run], list[Interval]]:
    """Return the steps and the intervals of input that the training loop has marked."""
    names, stats = xplane.names(host.event_metadata), xplane.names(host.stat_metadata)
    markers, inputs = [], []
    for line in host.lines:
        if line.name.startswith(_THREADS):
            continue
        for start, end, event in _events(line):
            for stat in event.stats:
                if stats.get(stat.metadata_id) == "step_num":
                    markers.append(Run(start, end, stat.int64_value or stat.uint64_value))
            if names.get(event.metadata_id) == INPUT_MARKER:
                inputs.append((start, end))
    return sorted(markers, key=lambda run: run.start), inputs


def _leaves(line: Message, names: dict[int, str]) -> list[tuple[float, float, str]]:
    """Return the operations of a line, without loops and others that contain operations.

    Other events on a host's threads are left out by their names.
    """
    operations = {key: name for key, name in names.items() if _OPERATION.match(name)}
    events = [
        (start, end, operations[event.metadata_id])
        for start, end, event in _events(line)
        if event.metadata_id in operations
    ]
    events.sort(key=lambda event: (event[0], -event[1]))
    return [
        event
        for event, following in pairwise([*events, (np.inf, np.inf, "")])
        if following[1] > event[1] and not _CONTAINER.match(event[2].lstrip("%"))
    ]


def _events(line: Message) -> Iterator[tuple[float, float, Message]]:
    """Yield ``(start, end, event)`` of a line's events, in ns."""
    begin = line.timestamp_ns
    for event in line.events:
        start = begin + event.offset_ps / 1e3
        yield start, start + event.duration_ps / 1e3, event

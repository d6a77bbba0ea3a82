"""Profiles as XLA writes them, with times that a test has chosen."""

from collections.abc import Sequence
from pathlib import Path

from report.xplane import XSpace

# Nanoseconds since 1970, as profilers stamp lines
BEGIN = 1_800_000_000_000_000_000
# Name, start and end in ms, and the number where it is a step
Event = tuple[str, float, float] | tuple[str, float, float, int]


class Profile:
    """An xplane.pb in the making."""

    def __init__(self) -> None:
        self.space = XSpace()

    def line(self, plane: str, name: str, events: Sequence[Event], late_ms: float = 0.0) -> None:
        """Add a line of events to a plane; the line itself may begin ``late_ms`` later."""
        found = [it for it in self.space.planes if it.name == plane]
        target = found[0] if found else self.space.planes.add(name=plane)
        line = target.lines.add(name=name, timestamp_ns=BEGIN + round(late_ms * 1e6))
        for title, start, end, *number in events:
            event = line.events.add(
                metadata_id=_id(target.event_metadata, title),
                offset_ps=round((start - late_ms) * 1e9),
                duration_ps=round((end - start) * 1e9),
            )
            if number:
                step = _id(target.stat_metadata, "step_num")
                event.stats.add(metadata_id=step, int64_value=number[0])

    def write(self, worker: Path, session: str = "2026_01_01_10_00_00") -> Path:
        """Write the profile where a worker's trace is; return its path."""
        path = worker / "profile/plugins/profile" / session / "host.xplane.pb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.space.SerializeToString())
        return path


def tpu_worker(own_ms: float, cores: int = 2, steps: int = 5) -> Profile:
    """Return the profile of a TPU worker whose steps take 1000 ms from start to start.

    For ``own_ms`` it computes, for 100 ms it waits in a collective, and in 20 ms of the rest the
    host prepares input. Between the steps runs a short program of another name.
    """
    profile = Profile()
    starts = [1000.0 * step for step in range(steps)]
    markers = [("train", start, start + 5, 4 + step) for step, start in enumerate(starts)]
    inputs = [("input", start + own_ms + 110, start + own_ms + 130) for start in starts]
    profile.line("/host:CPU", "python", markers + inputs)
    for core in range(cores):
        plane = f"/device:TPU:{core}"
        programs, operations = [], []
        for start in starts:
            middle, end = start + own_ms / 2, start + own_ms + 100
            programs += [("step(1)", start, end), ("metric(2)", end + 1, end + 2)]
            operations += [
                ("%while.1 = (f32[]) while(%tuple.1)", start, end),
                ("%fusion.7 = f32[8] fusion(%all-gather.3), kind=kLoop", start, middle),
                ("%all-gather.3 = f32[8] all-gather(%fusion.7)", middle, middle + 100),
                ("%gmm.1 = bf16[8] custom-call(%fusion.7)", middle + 100, end),
                ("%copy.9 = f32[] copy(%p)", end + 1, end + 2),
            ]
        profile.line(plane, "XLA Modules", programs)
        profile.line(plane, "XLA Ops", operations)
    return profile


def _id(entries: object, name: str) -> int:
    """Return the id of a name, which is given one where it has none."""
    known = {entry.value.name: entry.key for entry in entries}
    if name not in known:
        entry = entries.add(key=len(known) + 1)
        entry.value.id, entry.value.name = entry.key, name
    return len(known) + 1 if name not in known else known[name]

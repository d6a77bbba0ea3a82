"""Read the directory of a run, as train.yml leaves it.

Any file may be missing or cut short, because a run can break off at any moment. ``notes`` collect
what was missing.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trainer.metrics import LEAST_STEPS

from .profile import BadTrace
from .profile import read as read_trace

# Relative difference of a step time in the trace and by the host clock that becomes a note
AGREEMENT = 0.02


@dataclass
class Worker:
    """The files of one worker; ``exit``, ``summary`` and ``trace`` are empty if missing."""

    directory: Path
    notes: list[str] = field(repr=False)
    exit: dict[str, Any] = field(init=False)
    summary: dict[str, Any] = field(init=False)
    steps: list[dict[str, Any]] = field(init=False)
    trace: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.exit = self._json("exit.json")
        self.summary = self._json("summary.json")
        self.steps = self._metrics()
        self.trace = self._trace()

    @property
    def host(self) -> str:
        """The worker's name."""
        return self.directory.name

    @cached_property
    def profile(self) -> Path | None:
        """The path of the newest trace; None without traces."""
        traces = sorted((self.directory / "profile").rglob("*.xplane.pb"))
        return traces[-1] if traces else None

    def _json(self, name: str) -> dict[str, Any]:
        value, problem = _load_json(self.directory / name)
        if problem:
            self.notes.append(f"{self.host}: {problem}")
        return value

    def _metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl up to the first that is cut short."""
        path = self.directory / "metrics.jsonl"
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            self.notes.append(f"{self.host}: {path.name} is missing")
            return []
        steps = []
        for number, line in enumerate(lines, 1):
            try:
                steps.append(json.loads(line))
            except ValueError:
                self.notes.append(f"{self.host}: {path.name} is cut short at line {number}")
                break
        return steps

    def _trace(self) -> dict[str, Any]:
        """Return the numbers of the trace, and its mean step time relative to the host clock's."""
        if not self.profile:
            if self.steps:
                self.notes.append(f"{self.host}: there is no profile")
            return {}
        try:
            trace = read_trace(self.profile)
        except BadTrace as error:
            self.notes.append(f"{self.host}: {self.profile.name} is {error}")
            return {}
        first, last = trace["steps"] or (None, None)
        times = {step["step"]: step["step_time_s"] for step in self.steps}
        if times and first is not None and first not in times:
            self.notes.append(
                f"{self.host}: {self.profile.name} shows steps {first} to {last}, which are not in "
                "metrics.jsonl: it is another run's, and nothing of it is used"
            )
            return {}
        if trace["p50"] is None:
            self.notes.append(
                f"{self.host}: the profile shows {trace['n']} whole steps, at least {LEAST_STEPS} "
                "are needed"
            )
        elif first is not None and all(step in times for step in range(first, last)):
            # Both times run from the start of the first step to the start of the last.
            clock = sum(times[step] for step in range(first, last)) / (last - first)
            ratio = trace["over_host_clock"] = trace["mean"] / clock
            if abs(ratio - 1) > AGREEMENT:
                self.notes.append(
                    f"{self.host}: by the profile a step takes {trace['mean']:.4f} s, and by the "
                    f"host clock the same steps take {clock:.4f} s"
                )
        return trace


def read_workers(run_dir: Path, notes: list[str]) -> list[Worker]:
    """Return the workers of the run in ``run_dir``; raises FileNotFoundError without workers/."""
    directories = sorted(path for path in (run_dir / "workers").iterdir() if path.is_dir())
    return [Worker(directory, notes) for directory in directories]


def read_plan(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest plan.json for the same step on the same slice as the run's; None without.

    ``summary`` is the content of the run's summary.json.
    """
    variables = read_variables(run_dir)
    if not (summary.get("model") and variables.get("train_plans_dir")):
        return None
    model = summary["model"]
    batch, block = model["global_batch"], model["block_size"]
    files = Path(variables["train_plans_dir"]).glob("*/plan.json")
    for path in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        plan, _ = _load_json(path)
        # Models are compared by their FLOPs: a user's own configuration has no name.
        flops = summary["model_flops_per_token"] * batch * block / plan.get("chips", 1)
        same = {
            "accelerator_type": variables.get("train_accelerator_type"),
            "experts": summary["experts"]["mode"],
            "flash_attention": variables.get("train_flash_attention"),
            "spmd_2d_sharding": variables.get("train_spmd_2d_sharding"),
            "global_batch": batch,
            "block_size": block,
        }
        if plan.items() >= same.items() and math.isclose(plan["model_flops"], flops):
            return plan
    return None


def read_variables(run_dir: Path) -> dict[str, Any]:
    """Return every variable of the run by name; empty where variables.yml is missing."""
    try:
        return yaml.safe_load((run_dir / "variables.yml").read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, yaml.YAMLError):
        return {}


def steady(steps: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps after the last compilation; empty where that is unknown."""
    if not summary.get("compile"):
        return []
    last_compiled = summary["compile"]["last_step"]
    first = 0 if last_compiled is None else last_compiled + 1
    return [step for step in steps if step["step"] >= first]


def _load_json(path: Path) -> tuple[dict[str, Any], str]:
    """Return the object in a JSON file and "", or an empty object and what is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except ValueError as error:
        return {}, f"{path.name} is not valid JSON: {error}"

"""The directory of a run, as the launcher leaves it, read with nothing assumed to be there.

A run that broke off leaves files missing or cut short. What is missing is said in ``notes``.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from report.profile import BadTrace
from report.profile import read as read_trace
from trainer.metrics import LEAST_STEPS

# Further apart than this over the same steps, and the trace and the host clock disagree.
AGREEMENT = 0.02


@dataclass
class Worker:
    """What one worker brought home: ``exit``, ``summary`` and ``trace`` are empty without it."""

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
        """The newest trace, None where there is none."""
        traces = sorted((self.directory / "profile").rglob("*.xplane.pb"))
        return traces[-1] if traces else None

    def _json(self, name: str) -> dict[str, Any]:
        value, trouble = _load_json(self.directory / name)
        if trouble:
            self.notes.append(f"{self.host}: {trouble}")
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
        """Return what the profile says, and how it compares with the host clock's steps."""
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
            # From the start of the first step to that of the last
            clock = sum(times[step] for step in range(first, last)) / (last - first)
            ratio = trace["over_host_clock"] = trace["mean"] / clock
            if abs(ratio - 1) > AGREEMENT:
                self.notes.append(
                    f"{self.host}: by the profile a step takes {trace['mean']:.4f} s, and by the "
                    f"host clock the same steps take {clock:.4f} s"
                )
        return trace


def read_workers(run_dir: Path, notes: list[str]) -> list[Worker]:
    """Return the workers of the run in ``run_dir``; raises FileNotFoundError if it is none."""
    directories = sorted(path for path in (run_dir / "workers").iterdir() if path.is_dir())
    return [Worker(directory, notes) for directory in directories]


def read_plan(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest plan.json for the step that a run's ``summary`` describes.

    It is what the TPU compiler said of the step, for the same slice; None where there is none.
    """
    variables = read_variables(run_dir)
    if not (summary.get("model") and variables.get("train_plans_dir")):
        return None
    model = summary["model"]
    batch, block = model["global_batch"], model["block_size"]
    files = Path(variables["train_plans_dir"]).glob("*/plan.json")
    for path in sorted(files, key=lambda it: it.stat().st_mtime, reverse=True):
        plan, _ = _load_json(path)
        # The model is told by its arithmetic: a configuration of one's own has no name.
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
    """Return every variable of the run, by name; none where they are missing."""
    try:
        return yaml.safe_load((run_dir / "variables.yml").read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, yaml.YAMLError):
        return {}


def steady(steps: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps after the last compilation; none where that is not known."""
    if not summary.get("compile"):
        return []
    last_compiled = summary["compile"]["last_step"]
    first = 0 if last_compiled is None else last_compiled + 1
    return [step for step in steps if step["step"] >= first]


def _load_json(path: Path) -> tuple[dict[str, Any], str]:
    """Return the object in a JSON file, or an empty one and why."""
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except ValueError as error:
        return {}, f"{path.name} is not valid JSON: {error}"

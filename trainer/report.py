"""``python -m trainer.report RUN_DIR``: what all workers of a run brought home → report.json.

Reads ``workers/<host>/{summary.json,metrics.jsonl,exit.json,profile/}`` with the standard library
alone. A run that broke off leaves files missing or cut short; then the report has null where there
is no number, and says in ``notes`` what was missing.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from trainer.metrics import write_json

# Fewer steps than this say nothing about the time of one.
LEAST_STEPS = 3


def build(run_dir: Path) -> dict[str, Any]:
    """Return the report of the run in ``run_dir``; raises FileNotFoundError if it is none."""
    hosts = sorted(path for path in (run_dir / "workers").iterdir() if path.is_dir())
    notes: list[str] = []
    exits = {host.name: _read_json(host / "exit.json", notes) for host in hosts}
    summaries = {host.name: _read_json(host / "summary.json", notes) for host in hosts}
    steps = {host.name: _read_steps(host / "metrics.jsonl", notes) for host in hosts}
    workers = [
        {
            "host": host.name,
            "status": _status(exits[host.name]),
            "exit_code": exits[host.name].get("exit_code"),
            "step_time_s": _step_time(steps[host.name], summaries[host.name])["p50"],
            "profile": _profile(host, run_dir),
        }
        for host in hosts
    ]
    # Under SPMD all workers compute the same loss in lockstep: any one speaks for the run.
    first = max(steps, key=lambda host: len(steps[host]), default=None)
    first_steps = steps.get(first, [])
    summary = next(filter(None, (summaries.get(first), *summaries.values())), {})
    step_time = _step_time(first_steps, summary)
    if step_time["p50"] is None:
        notes.append(
            f"step_time_s: {step_time['n']} steps after the last compilation, "
            f"at least {LEAST_STEPS} are needed"
        )
    return {
        "run_id": run_dir.resolve().name,
        "status": _overall([worker["status"] for worker in workers]),
        "started": min((e["started"] for e in exits.values() if e.get("started")), default=None),
        "finished": max((e["finished"] for e in exits.values() if e.get("finished")), default=None),
        **{key: summary.get(key) for key in ("model", "mesh", "experts", "attention", "device")},
        "loss": _loss(first_steps, summary, notes),
        "step_time_s": step_time,
        **_throughput(summary, step_time["p50"]),
        "compile": summary.get("compile"),
        "workers": workers,
        "skew": None,
        "notes": notes,
    }


def main(argv: list[str]) -> int:
    """Write report.json into the run directory in ``argv`` and print its path."""
    if len(argv) != 1 or not (Path(argv[0]) / "workers").is_dir():
        print(
            "usage: python -m trainer.report RUN_DIR, where RUN_DIR is the directory of one run "
            f"and holds workers/; got {argv}",
            file=sys.stderr,
        )
        return 2
    path = Path(argv[0]) / "report.json"
    write_json(path, build(path.parent))
    print(path)
    return 0


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.parent.name}: {path.name} is missing")
    except ValueError as error:
        notes.append(f"{path.parent.name}: {path.name} is not valid JSON: {error}")
    return {}


def _read_steps(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl up to the first that is cut short."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        notes.append(f"{path.parent.name}: {path.name} is missing")
        return []
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(json.loads(line))
        except ValueError:
            notes.append(f"{path.parent.name}: {path.name} is cut short at line {number}")
            break
    return steps


def _status(exit_record: dict[str, Any]) -> str:
    if exit_record.get("exit_code") == 0:
        return "succeeded"
    return "stopped" if exit_record.get("signal") in ("SIGTERM", "SIGINT") else "failed"


def _overall(statuses: list[str]) -> str:
    """Return ``failed`` if any worker did, else ``stopped`` if any was, else ``succeeded``."""
    return next((s for s in ("failed", "stopped", "succeeded") if s in statuses), "failed")


def _profile(host: Path, run_dir: Path) -> str | None:
    """Return the newest trace of a worker, as a path inside the run directory."""
    traces = sorted((host / "profile").rglob("*.xplane.pb"))
    return str(traces[-1].relative_to(run_dir)) if traces else None


def _step_time(steps: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the spread of the host clock's step times after the last compilation."""
    times = []
    if "compile" in summary:
        last_compiled = summary["compile"]["last_step"]
        first = 0 if last_compiled is None else last_compiled + 1
        times = [step["step_time_s"] for step in steps if step["step"] >= first]
    enough = len(times) >= LEAST_STEPS
    return {
        "p50": statistics.median(times) if enough else None,
        "p90": statistics.quantiles(times, n=10, method="inclusive")[-1] if enough else None,
        "n": len(times),
        "source": "host_clock",
    }


def _loss(
    steps: list[dict[str, Any]], summary: dict[str, Any], notes: list[str]
) -> dict[str, float | None]:
    """Return first and last loss, in nats a token, and bits per byte of the training text."""
    losses = [step["loss"] for step in steps]
    if None in losses:
        notes.append(f"loss: not a finite number at step {steps[losses.index(None)]['step']}")
    recent = _last_epoch(losses, summary)
    bytes_per_token = summary.get("bytes_per_token")
    bits_per_byte = None
    if recent and None not in recent and bytes_per_token:
        bits_per_byte = statistics.fmean(recent) / (math.log(2) * bytes_per_token)
    return {
        "first": losses[0] if losses else None,
        "last": losses[-1] if losses else None,
        "bits_per_byte": bits_per_byte,
    }


def _last_epoch(losses: list[float | None], summary: dict[str, Any]) -> list[float | None]:
    """Return the losses of the last epoch, or of the last half of a run shorter than an epoch."""
    model, tokens = summary.get("model"), summary.get("tokens_per_epoch")
    if model and tokens:
        epoch = max(1, tokens // (model["global_batch"] * model["block_size"]))
        if len(losses) >= epoch:
            return losses[-epoch:]
    return losses[len(losses) // 2 :]


def _throughput(summary: dict[str, Any], step_time_s: float | None) -> dict[str, float | None]:
    model, device = summary.get("model"), summary.get("device")
    flops, peak = summary.get("model_flops_per_token"), summary.get("peak_flops_per_device")
    tokens_per_s = None
    if step_time_s and model and device:
        tokens = model["global_batch"] * model["block_size"]
        tokens_per_s = tokens / step_time_s / device["count"]
    return {
        "tokens_per_s_per_device": tokens_per_s,
        "model_flops_per_token": flops,
        "mfu": tokens_per_s * flops / peak if tokens_per_s and flops and peak else None,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

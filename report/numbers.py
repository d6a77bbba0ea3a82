"""Compute the numbers of report.json from the files of all workers of a run."""

import math
import statistics
from pathlib import Path
from typing import Any

from trainer.metrics import LEAST_STEPS

from .run_dir import Worker, read_plan, steady


def build(run_dir: Path, workers: list[Worker], notes: list[str]) -> dict[str, Any]:
    """Return the content of report.json for the run in ``run_dir``.

    ``notes`` say what was missing while reading ``workers``; this adds to them.
    """
    # Under SPMD all workers compute the same loss in lockstep; take the one with the most steps.
    first = max(workers, key=lambda worker: len(worker.steps), default=None)
    steps = first.steps if first else []
    summary = next(filter(None, (w.summary for w in [first, *workers] if w)), {})
    clock = host_clock(steps, summary)
    # The slowest worker is reported, because the others wait for it.
    traces = (worker.trace for worker in workers)
    trace = max(traces, key=lambda trace: trace.get("p50") or 0.0, default={})
    step_time = _step_time(trace, clock)
    if step_time["p50"] is None:
        notes.append(
            f"step_time_s: {step_time['n']} steps after the last compilation, "
            f"at least {LEAST_STEPS} are needed"
        )
    rows = [_row(worker, run_dir) for worker in workers]
    exits = [worker.exit for worker in workers]
    return {
        "run_id": run_dir.resolve().name,
        "status": _overall([row["status"] for row in rows]),
        "started": min((e["started"] for e in exits if e.get("started")), default=None),
        "finished": max((e["finished"] for e in exits if e.get("finished")), default=None),
        **{key: summary.get(key) for key in ("model", "mesh", "experts", "attention", "device")},
        "stack": summary.get("stack"),
        "loss": _loss(steps, summary, notes),
        "evaluations": summary.get("evaluations", []),
        "step_time_s": step_time,
        "host_clock_s": clock,
        "trace_over_host_clock": trace.get("over_host_clock"),
        "split_s": _mean_split([row["split_s"] for row in rows if row["split_s"]]),
        "operations": trace.get("operations", []),
        **_throughput(summary, step_time["p50"]),
        "compile": summary.get("compile"),
        "peak_memory_bytes": max(
            (w.summary["peak_memory_bytes"] for w in workers if w.summary.get("peak_memory_bytes")),
            default=None,
        ),
        "expert_load": _expert_load(_last_epoch(steps, summary)),
        "plan": read_plan(run_dir, summary),
        "workers": rows,
        "skew": _skew(rows),
        "notes": notes,
    }


def host_clock(steps: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Return p50, p90 (seconds) and number of the step times after the last compilation."""
    times = [step["step_time_s"] for step in steady(steps, summary)]
    enough = len(times) >= LEAST_STEPS
    return {
        "p50": statistics.median(times) if enough else None,
        "p90": statistics.quantiles(times, n=10, method="inclusive")[-1] if enough else None,
        "n": len(times),
    }


def _row(worker: Worker, run_dir: Path) -> dict[str, Any]:
    """Return a worker's entry in the report."""
    clock = host_clock(worker.steps, worker.summary)
    step_time, profile = _step_time(worker.trace, clock), worker.profile
    return {
        "host": worker.host,
        "status": _status(worker.exit),
        "exit_code": worker.exit.get("exit_code"),
        "step_time_s": step_time["p50"],
        "source": step_time["source"],
        "split_s": worker.trace.get("split"),
        "profile": str(profile.relative_to(run_dir)) if profile else None,
    }


def _status(exit_record: dict[str, Any]) -> str:
    if exit_record.get("exit_code") == 0:
        return "succeeded"
    # A person ended the run, or train.yml did because another worker failed. Any other recorded
    # error is this worker's own.
    stopped = (exit_record.get("error") or "stopped").startswith("stopped")
    signalled = exit_record.get("signal") in ("SIGTERM", "SIGINT")
    return "stopped" if signalled and stopped else "failed"


def _overall(statuses: list[str]) -> str:
    """Return the run's status: failed if any worker failed, else stopped if any was stopped."""
    return next((s for s in ("failed", "stopped", "succeeded") if s in statuses), "failed")


def _step_time(trace: dict[str, Any], clock: dict[str, Any]) -> dict[str, Any]:
    """Return the step time of the trace, or of the host clock where the trace has none."""
    if trace.get("p50") is None:
        return clock | {"busy_p50": None, "idle_share": None, "source": "host_clock"}
    keys = ("p50", "p90", "n", "busy_p50", "idle_share", "source")
    return {key: trace[key] for key in keys}


def _mean_split(splits: list[dict[str, float | None]]) -> dict[str, float | None] | None:
    """Return the mean of the workers' splits of a step's time; None without splits."""
    if not splits:
        return None
    known = {
        kind: [split[kind] for split in splits if split[kind] is not None] for kind in splits[0]
    }
    return {kind: statistics.fmean(values) if values else None for kind, values in known.items()}


def _skew(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return each worker's own time in a step, and the ratio of the slowest to the fastest worker.

    A worker's own time is that outside collectives: computation and waiting for input. Under SPMD
    hosts run in lockstep, so waiting for the slowest worker counts as communication of the others.
    """
    own = {
        row["host"]: row["split_s"]["compute"] + (row["split_s"]["input"] or 0.0)
        for row in rows
        if row["split_s"]
    }
    if len(own) < 2 or not min(own.values()):
        return None
    return {
        "ratio": max(own.values()) / min(own.values()),
        "slowest": max(own, key=own.__getitem__),
        "own_time_s": own,
    }


def _loss(
    steps: list[dict[str, Any]], summary: dict[str, Any], notes: list[str]
) -> dict[str, float | None]:
    """Return first and last loss, in nats a token, and bits per byte of the training text."""
    losses = [step["loss"] for step in steps]
    if None in losses:
        notes.append(f"loss: not a finite number at step {steps[losses.index(None)]['step']}")
    recent = [step["loss"] for step in _last_epoch(steps, summary)]
    bytes_per_token = summary.get("bytes_per_token")
    bits_per_byte = None
    if recent and None not in recent and bytes_per_token:
        bits_per_byte = statistics.fmean(recent) / (math.log(2) * bytes_per_token)
    return {
        "first": losses[0] if losses else None,
        "last": losses[-1] if losses else None,
        "bits_per_byte": bits_per_byte,
    }


def _last_epoch(steps: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of the last epoch, or of the last half of a run shorter than an epoch."""
    model, tokens = summary.get("model"), summary.get("tokens_per_epoch")
    if model and tokens:
        epoch = max(1, tokens // (model["global_batch"] * model["block_size"]))
        if len(steps) >= epoch:
            return steps[-epoch:]
    return steps[len(steps) // 2 :]


def _expert_load(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return each expert's fraction of the tokens over ``steps``, and the balance of the load.

    ``max_over_mean`` is 1 if the load is equal. The result is None where no step has a load.
    """
    loads = [step["expert_load"] for step in steps if step.get("expert_load")]
    if not loads:
        return None
    fractions = [statistics.fmean(expert) for expert in zip(*loads, strict=True)]
    entropies = [step["router_entropy"] for step in steps if step.get("router_entropy") is not None]
    return {
        "fractions": fractions,
        "max_over_mean": max(fractions) / statistics.fmean(fractions),
        "router_entropy": statistics.fmean(entropies) if entropies else None,
    }


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

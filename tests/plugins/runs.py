"""A run's report.json, and directories of runs."""

import json
from pathlib import Path

REPORT = {
    "run_id": "20260102-030405",
    "status": "succeeded",
    "model": {
        "name": "mixtral-8x7b",
        "params_total": 46_702_792_704,
        "params_active": 12_879_425_536,
        "block_size": 4096,
        "global_batch": 1024,
    },
    "mesh": {"fsdp": 128, "tensor": 1},
    "experts": {"mode": "gmm", "kernel": "pallas_megablox"},
    "attention": {"kernel": "pallas_splash"},
    "device": {"kind": "TPU v5p", "count": 128, "hosts": 32},
    "loss": {"first": 10.51234, "last": 3.25, "bits_per_byte": 1.1},
    "evaluations": [
        {"step": 50, "eval_loss": 4.5, "perplexity": 90.02},
        {"step": 100, "eval_loss": 3.5, "perplexity": 33.12},
    ],
    "step_time_s": {"p50": 15.2, "p90": 15.75, "n": 8, "source": "device_trace"},
    "host_clock_s": {"p50": 15.25, "p90": 15.8, "n": 90},
    "split_s": {"compute": 11.4, "communication": 3.04, "input": None, "idle": 0.76},
    "skew": {"ratio": 1.0312, "slowest": "w1", "own_time_s": {"w0": 11.0, "w1": 11.4}},
    "expert_load": {"fractions": [0.125] * 8, "max_over_mean": 1.2, "router_entropy": 2.0},
    "plan": {"modelled": {"step_time_s": 13.0, "step_time_overlapped_s": 9.5, "mfu": 0.45}},
    "peak_memory_bytes": 3 * 2**30,
    "workers": [{"host": "w0", "step_time_s": 15.1}, {"host": "w1", "step_time_s": 15.2}],
    "tokens_per_s_per_device": 2155.8,
    "mfu": 0.3895,
    "compile": {"count": 2, "cached": 1, "seconds": 96.4, "last_step": 1},
    "notes": [],
}


def ended(**changes):
    record = {"exit_code": 1, "signal": None, "oom_killed": False, "error": None, "last_lines": []}
    return record | changes


def write_run(directory: Path, **changes: object) -> Path:
    """Write the files of a run whose worker w1 failed into ``directory``; return it.

    ``changes`` are those of its report.json.
    """
    stopped = ended(exit_code=143, signal="SIGTERM", error="stopped, because w1 failed")
    for worker, record in {
        "w0": stopped,
        "w1": ended(last_lines=["Traceback:", "  RuntimeError: boom"]),
        "w2": ended(exit_code=0),
    }.items():
        (directory / "workers" / worker).mkdir(parents=True)
        (directory / "workers" / worker / "exit.json").write_text(json.dumps(record))
    report = REPORT | {"status": "failed"} | changes
    (directory / "report.json").write_text(json.dumps(report))
    return directory

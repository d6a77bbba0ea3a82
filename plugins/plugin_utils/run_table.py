"""The table of a run, from its report.json and its workers' exit.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible import constants as C

from .screen import show, show_heading

# With more workers, their step times are only in report.html.
MOST_WORKERS = 16
UNKNOWN = "\N{EN DASH}"
LAST_LINES = 12
# The operating system's message about a full disk
NO_SPACE = "No space left on device"
UNREACHABLE = (
    "check that the worker is up and has this address (ansible-playbook status.yml asks every "
    "worker). A trainer on a worker that cannot be reached ends with its lease"
)

Row = tuple[str, str]
# What the Cloud TPU API reports of each worker, by worker
Symptoms = Mapping[str, list[str]]


class RunTable(NamedTuple):
    """A run as lines: what was measured and where its files are, and which workers failed."""

    report: dict[str, Any]
    heading: str
    results: list[str]
    failures: list[str]

    def show(self) -> None:
        """Display it, in the colour of its status."""
        color = C.COLOR_OK if self.report["status"] == "succeeded" else C.COLOR_ERROR
        show_heading(self.heading, color)
        show("\n".join(self.results))
        show("\n".join(self.failures), color)


def results(report: dict[str, Any]) -> list[Row]:
    """Return the measurements of report.json as rows of label and text."""
    model, device = report.get("model") or {}, report.get("device") or {}
    step, loss, compiled = report["step_time_s"], report["loss"], report.get("compile") or {}
    experts, attention = report.get("experts") or {}, report.get("attention") or {}
    clock = report["host_clock_s"]
    return [
        (
            "model",
            f"{text(model.get('name'))}, {text(model.get('params_total'), ',')} parameters "
            f"({text(model.get('params_active'), ',')} active)",
        ),
        (
            "batch",
            f"{text(model.get('global_batch'))} sequences of "
            f"{text(model.get('block_size'))} tokens",
        ),
        ("devices", f"{text(device.get('count'))} {text(device.get('kind'))}"),
        (
            "kernels",
            f"{text(experts.get('mode'))} experts by {text(experts.get('kernel'))}, "
            f"attention by {text(attention.get('kernel'))}",
        ),
        (
            "step time",
            f"p50 {text(step['p50'], '.3f')} s, p90 {text(step['p90'], '.3f')} s "
            f"({step['n']} steps, {step['source'].replace('_', ' ')})",
        ),
        *(
            [("  by the host clock", f"p50 {text(clock['p50'], '.3f')} s ({clock['n']} steps)")]
            if step["source"] != "host_clock"
            else []
        ),
        *optional_results(report),
        ("tokens/s per device", text(report.get("tokens_per_s_per_device"), ",.0f")),
        ("MFU", text(report.get("mfu"), ".1%")),
        ("loss", f"{text(loss['first'], '.3f')} → {text(loss['last'], '.3f')}"),
        ("bits per byte", text(loss["bits_per_byte"], ".3f")),
        *(
            (
                "evaluation",
                f"loss {evaluation['eval_loss']:.3f}, perplexity {evaluation['perplexity']:,.1f}, "
                f"after step {evaluation['step']}",
            )
            for evaluation in report["evaluations"][-1:]
        ),
        (
            "compilations",
            f"{text(compiled.get('count'))} in {text(compiled.get('seconds'), '.0f')} s, "
            f"the last at step {text(compiled.get('last_step'))}",
        ),
        *(
            [("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB")]
            if report["peak_memory_bytes"]
            else []
        ),
        *(("note", note) for note in report.get("notes", [])),
    ]


def optional_results(report: dict[str, Any]) -> list[Row]:
    """Return the measurements that only some runs have, the parts of a step's time first."""
    rows: list[Row] = []
    if split := report["split_s"]:
        whole = sum(filter(None, split.values()))
        parts = [
            f"{kind} {spent / whole:.0%}" for kind, spent in split.items() if spent is not None
        ]
        rows.append(("  of which", ", ".join(parts)))
    if skew := report["skew"]:
        rows.append(("skew", f"{skew['ratio']:.3f}, the slowest is {skew['slowest']}"))
    if load := report["expert_load"]:
        ratio = f"{load['max_over_mean']:.2f}"
        rows.append(("expert load", f"the busiest expert has {ratio} times the mean"))
    if modelled := (report["plan"] or {}).get("modelled"):
        rows.append(
            (
                "the plan's model",
                f"step {text(modelled.get('step_time_s'), '.3f')} s, "
                f"{text(modelled.get('step_time_overlapped_s'), '.3f')} s with communication "
                f"hidden, MFU {text(modelled.get('mfu'), '.1%')}",
            )
        )
    workers = report["workers"]
    if 1 < len(workers) <= MOST_WORKERS:
        rows += [
            (f"  {worker['host']}", f"{text(worker['step_time_s'], '.3f')} s") for worker in workers
        ]
    return rows


def text(value: Any, form: str = "") -> str:
    """Return ``value`` in the format ``form``, and a dash for None."""
    return UNKNOWN if value is None else format(value, form)


def what_happened(record: dict[str, Any]) -> str:
    """Return how a worker's run ended, from its exit.json."""
    if record["exit_code"] is None:
        end = "lost"
    elif record["oom_killed"]:
        end = "out of memory"
    elif record["signal"]:
        end = f"ended by {record['signal']}"
    else:
        end = f"exit code {record['exit_code']}"
    error = record["error"] or (NO_SPACE if is_out_of_space(record) else None)
    return f"{end}: {error}" if error else end


def is_out_of_space(record: dict[str, Any]) -> bool:
    """Return whether the trainer's last lines report a full disk."""
    return any(NO_SPACE in line for line in record["last_lines"])


def what_to_do(record: dict[str, Any]) -> str:
    """Return the next step for the user, from a worker's exit.json."""
    if record["exit_code"] is None:
        return UNREACHABLE
    if is_out_of_space(record):
        return (
            "free disk space on the worker: delete old runs from the directory runs of worker_dir"
        )
    if "Docker engine, was restarted" in (record["error"] or ""):
        return (
            "find the cause with journalctl --unit docker on the worker, then start the run again: "
            "ansible-playbook train.yml"
        )
    if record["oom_killed"]:
        return "take less memory: a smaller per_device_train_batch_size or block_size"
    if record["signal"] == "SIGKILL":
        return "find out what killed the trainer: dmesg on the worker lists what ran out of memory"
    if record["signal"] in ("SIGTERM", "SIGINT"):
        return "the trainer was told to end; start it again: ansible-playbook train.yml"
    return "read the last lines of the trainer's log below, or the whole log"


def symptom_rows(symptoms: Symptoms, worker: str) -> list[Row]:
    """Return a row for each symptom that the Cloud TPU API reports of a worker."""
    return [("TPU symptom", symptom) for symptom in symptoms.get(worker, [])]


def failures(run_dir: Path, displayed: str, symptoms: Symptoms) -> list[str]:
    """Return the lines about the workers that did not succeed.

    Workers that were stopped because of another one come first. Each of the others follows with the
    last lines of its log. ``displayed`` is the run's directory as users read it, and ``symptoms``
    has those that the Cloud TPU API reports, by worker.
    """
    stopped, failed = [], []
    for path in sorted(run_dir.glob("workers/*/exit.json")):
        record, worker = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if (record["error"] or "").startswith("stopped, because"):
            stopped += [(worker, record["error"]), *symptom_rows(symptoms, worker)]
        elif record["exit_code"] != 0:
            rows = [
                ("worker", worker),
                ("what happened", what_happened(record)),
                *symptom_rows(symptoms, worker),
                ("what to do", what_to_do(record)),
                ("whole log", f"{displayed}/workers/{worker}/trainer.log"),
            ]
            failed += ["", *table(rows)]
            failed += [f"  | {line}" for line in record["last_lines"][-LAST_LINES:]]
    return (["", *table(stopped)] if stopped else []) + failed


def table(rows: list[Row]) -> list[str]:
    """Return the rows as lines with the texts in one column; a row may take several lines."""
    width = max(len(label) for label, _ in rows) + 2
    indent = "\n" + " " * (width + 2)
    return [f"  {label:{width}}{text.strip().replace(chr(10), indent)}" for label, text in rows]


def run_table(
    run_dir: Path, symptoms: Symptoms, failed: Mapping[str, list[Row]] | None = None
) -> RunTable:
    """Return the table of the run in ``run_dir``, which has a report.json.

    ``failed`` has the rows about each worker that has failed, by worker. They are shown for a
    worker without an exit.json, which has failed before its trainer ran.
    """
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    # A path from / is not read as one without it.
    inside = run_dir.is_relative_to(Path.cwd()) and Path.cwd() != Path("/")
    displayed = os.path.relpath(run_dir) if inside else str(run_dir)
    measured = (report["loss"]["first"] or report["step_time_s"]["p50"]) is not None
    rows = [*(results(report) if measured else []), ("artifacts", displayed)]
    if (run_dir / "report.html").exists():
        rows.append(("report", f"{displayed}/report.html"))
    lines = failures(run_dir, displayed, symptoms)
    for worker, its_rows in (failed or {}).items():
        if not (run_dir / "workers" / worker / "exit.json").exists():
            lines += ["", *table([*its_rows, *symptom_rows(symptoms, worker)])]
    heading = f"RUN {report['run_id']}: {report['status']}"
    return RunTable(report, heading, table(rows), lines)

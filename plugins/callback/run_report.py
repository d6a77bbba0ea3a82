"""The last thing on the screen: how fast the model trained, or what failed and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible.executor.stats import AggregateStats
from ansible.executor.task_result import CallbackTaskResult
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: run_report
type: aggregate
short_description: Shows the report of a run, or what failed, after the recap
description:
  - >-
    Reads report.json and the workers' exit.json in the directory that a play names with
    ansible.builtin.set_stats as train_run_dir, and what the TPU's API says of each worker in
    slice_symptoms.
"""

# More workers than this no screen shows; the page does.
MOST_WORKERS = 16
UNKNOWN = "\N{EN DASH}"
LAST_LINES = 12
# What the operating system says of a full disk
NO_SPACE = "No space left on device"
REACH = (
    "is it up, and at this address? ansible-playbook status.yml asks every worker. A trainer that "
    "nobody reaches ends by itself with its lease"
)

Row = tuple[str, str]


def results(report: dict[str, Any]) -> list[Row]:
    """Return what the run has measured, as pairs of label and text."""
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
        *where_the_time_goes(report),
        ("tokens/s per device", text(report.get("tokens_per_s_per_device"), ",.0f")),
        ("MFU", text(report.get("mfu"), ".1%")),
        ("loss", f"{text(loss['first'], '.3f')} → {text(loss['last'], '.3f')}"),
        ("bits per byte", text(loss["bits_per_byte"], ".3f")),
        *(
            (
                "evaluation",
                f"loss {it['eval_loss']:.3f}, perplexity {it['perplexity']:,.1f}, "
                f"after step {it['step']}",
            )
            for it in report["evaluations"][-1:]
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


def where_the_time_goes(report: dict[str, Any]) -> list[Row]:
    """Return what a step's time went into, and what else is only known of some runs."""
    rows: list[Row] = []
    if split := report["split_s"]:
        whole = sum(filter(None, split.values()))
        parts = [
            f"{kind} {spent / whole:.0%}" for kind, spent in split.items() if spent is not None
        ]
        rows.append(("  went into", ", ".join(parts)))
    if skew := report["skew"]:
        rows.append(("skew", f"{skew['ratio']:.3f}, the slowest is {skew['slowest']}"))
    if load := report["expert_load"]:
        rows.append(("expert load", f"the fullest {load['max_over_mean']:.2f} times the mean"))
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
        rows += [(f"  {it['host']}", f"{text(it['step_time_s'], '.3f')} s") for it in workers]
    return rows


def text(value: Any, form: str = "") -> str:
    """Return ``value`` in the format ``form``, a dash where there is none."""
    return UNKNOWN if value is None else format(value, form)


def what_happened(record: dict[str, Any]) -> str:
    """Return in a few words how a worker's run ended, from its exit.json."""
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
    """Tell from a trainer's last words whether its worker's disk was full."""
    return any(NO_SPACE in line for line in record["last_lines"])


def what_to_do(record: dict[str, Any]) -> str:
    """Return the next step after a run that ended as exit.json says."""
    if record["exit_code"] is None:
        return f"see what became of the worker: {REACH}"
    if is_out_of_space(record):
        return "free disk on the worker: old runs are in ~/mixtral-trainer/runs"
    if (record["error"] or "").startswith("its Docker engine"):
        return "see why: journalctl --unit docker on the worker. Then: ansible-playbook train.yml"
    if record["oom_killed"]:
        return "take less memory: a smaller per_device_train_batch_size or block_size"
    if record["signal"] == "SIGKILL":
        return "it was killed from outside; dmesg on the worker says if for want of memory"
    if record["signal"] in ("SIGTERM", "SIGINT"):
        return "it was asked to end; start it again: ansible-playbook train.yml"
    return "read the trainer's last words below, and the whole log"


def said(symptoms: dict[str, list[str]], worker: str) -> list[Row]:
    """Return what the TPU's API says of a worker."""
    return [("the TPU says", text) for text in symptoms.get(worker, [])]


def failures(run_dir: Path, shown: str, symptoms: dict[str, list[str]]) -> list[str]:
    """Return what to say about the workers that did not succeed; ``shown`` is the run's directory.

    Those that failed by themselves come last, each with its log's last lines. ``symptoms`` are what
    the TPU's API says of a worker.
    """
    stopped, failed = [], []
    for path in sorted(run_dir.glob("workers/*/exit.json")):
        record, worker = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if (record["error"] or "").startswith("stopped, because"):
            stopped += [(worker, record["error"]), *said(symptoms, worker)]
        elif record["exit_code"] != 0:
            rows = [
                ("worker", worker),
                ("what happened", what_happened(record)),
                *said(symptoms, worker),
                ("what to do", what_to_do(record)),
                ("whole log", f"{shown}/workers/{worker}/trainer.log"),
            ]
            failed += ["", *table(rows)]
            failed += [f"  | {line}" for line in record["last_lines"][-LAST_LINES:]]
    return (["", *table(stopped)] if stopped else []) + failed


def table(rows: list[Row]) -> list[str]:
    """Return the rows as lines, the texts one below the other."""
    width = max(len(label) for label, _ in rows) + 2
    indent = "\n" + " " * (width + 2)
    return [f"  {label:{width}}{text.strip().replace(chr(10), indent)}" for label, text in rows]


class CallbackModule(CallbackBase):
    """Remembers what failed, and has the last word."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "run_report"

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, list[Row]] = {}
        self.symptoms: dict[str, list[str]] = {}

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        """Remember the first failure of each worker."""
        if not ignore_errors:
            self._remember(result)

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        """Remember a worker that could not be reached."""
        self._remember(result, ("what to do", REACH))

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        """Print the table."""
        custom = stats.custom.get("_run", {})
        run_dir, self.symptoms = custom.get("train_run_dir"), custom.get("slice_symptoms", {})
        report = Path(run_dir or ".") / "report.json"
        if run_dir and report.exists():
            self._show_run(report.parent, json.loads(report.read_text(encoding="utf-8")))
        elif self.failed:
            self._display.banner("FAILED", color=C.COLOR_ERROR)
            for worker, rows in self.failed.items():
                lines = [*table([*rows, *said(self.symptoms, worker)]), ""]
                self._display.display("\n".join(lines), color=C.COLOR_ERROR)

    def _remember(self, result: CallbackTaskResult, *more: Row) -> None:
        # A loop says only that something of it has failed; its items say what.
        items = [it for it in result.result.get("results", []) if it.get("failed")]
        message = "\n".join(
            str(it.get("msg", "no reason given")) for it in items or [result.result]
        )
        rows = [
            ("worker", result.host.get_name()),
            ("task", result.task.get_name()),
            ("what happened", message),
            *more,
        ]
        self.failed.setdefault(result.host.get_name(), rows)

    def _show_run(self, run_dir: Path, report: dict[str, Any]) -> None:
        here = run_dir.is_relative_to(Path.cwd())
        shown = os.path.relpath(run_dir) if here else str(run_dir)
        color = C.COLOR_OK if report["status"] == "succeeded" else C.COLOR_ERROR
        self._display.banner(f"RUN {report['run_id']}: {report['status']}", color=color)
        measured = (report["loss"]["first"] or report["step_time_s"]["p50"]) is not None
        rows = [*(results(report) if measured else []), ("artifacts", shown)]
        if (run_dir / "report.html").exists():
            rows.append(("report", f"{shown}/report.html"))
        self._display.display("\n".join(table(rows)))
        lines = failures(run_dir, shown, self.symptoms)
        # What failed before a trainer ran has left no record on the run's side.
        for worker, rows in self.failed.items():
            if not (run_dir / "workers" / worker / "exit.json").exists():
                lines += ["", *table([*rows, *said(self.symptoms, worker)])]
        self._display.display("\n".join(lines), color=color)

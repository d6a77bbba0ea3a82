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
    ansible.builtin.set_stats as train_run_dir.
"""

UNKNOWN = "\N{EN DASH}"
LAST_LINES = 12

Row = tuple[str, str]


def results(report: dict[str, Any]) -> list[Row]:
    """Return what the run has measured, as pairs of label and text."""
    model, device = report.get("model") or {}, report.get("device") or {}
    step, loss, compiled = report["step_time_s"], report["loss"], report.get("compile") or {}
    experts, attention = report.get("experts") or {}, report.get("attention") or {}
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
        ("tokens/s per device", text(report.get("tokens_per_s_per_device"), ",.0f")),
        ("MFU", text(report.get("mfu"), ".1%")),
        ("loss", f"{text(loss['first'], '.3f')} → {text(loss['last'], '.3f')}"),
        ("bits per byte", text(loss["bits_per_byte"], ".3f")),
        (
            "compilations",
            f"{text(compiled.get('count'))} in {text(compiled.get('seconds'), '.0f')} s, "
            f"the last at step {text(compiled.get('last_step'))}",
        ),
        *(("note", note) for note in report.get("notes", [])),
    ]


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
    return f"{end}: {record['error']}" if record["error"] else end


def what_to_do(record: dict[str, Any]) -> str:
    """Return the next step after a run that ended as exit.json says."""
    if record["exit_code"] is None:
        return "see what became of the worker: ansible-playbook status.yml"
    if record["oom_killed"]:
        return "take less memory: a smaller per_device_train_batch_size or block_size"
    if record["signal"] == "SIGKILL":
        return "it was killed from outside; dmesg on the worker says if for want of memory"
    if record["signal"] in ("SIGTERM", "SIGINT"):
        return "it was asked to end; start it again: ansible-playbook train.yml"
    return "read the trainer's last words below, and the whole log"


def failures(run_dir: Path, shown: str) -> list[str]:
    """Return what to say about the workers that did not succeed; ``shown`` is the run's directory.

    Those that failed by themselves come last, each with its log's last lines.
    """
    stopped, failed = [], []
    for path in sorted(run_dir.glob("workers/*/exit.json")):
        record, worker = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if (record["error"] or "").startswith("stopped, because"):
            stopped.append((worker, record["error"]))
        elif record["exit_code"] != 0:
            rows = [
                ("worker", worker),
                ("what happened", what_happened(record)),
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

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        """Remember the first failure of each worker."""
        if not ignore_errors:
            self._remember(result)

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        """Remember a worker that could not be reached."""
        self._remember(result)

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        """Print the table."""
        run_dir = stats.custom.get("_run", {}).get("train_run_dir")
        report = Path(run_dir or ".") / "report.json"
        if run_dir and report.exists():
            self._show_run(report.parent, json.loads(report.read_text(encoding="utf-8")))
        elif self.failed:
            self._display.banner("FAILED", color=C.COLOR_ERROR)
            for rows in self.failed.values():
                self._display.display("\n".join([*table(rows), ""]), color=C.COLOR_ERROR)

    def _remember(self, result: CallbackTaskResult) -> None:
        message = str(result.result.get("msg", "no reason given"))
        rows = [
            ("worker", result.host.get_name()),
            ("task", result.task.get_name()),
            ("what happened", message),
        ]
        self.failed.setdefault(result.host.get_name(), rows)

    def _show_run(self, run_dir: Path, report: dict[str, Any]) -> None:
        here = run_dir.is_relative_to(Path.cwd())
        shown = os.path.relpath(run_dir) if here else str(run_dir)
        color = C.COLOR_OK if report["status"] == "succeeded" else C.COLOR_ERROR
        self._display.banner(f"RUN {report['run_id']}: {report['status']}", color=color)
        measured = report["loss"]["first"] is not None
        rows = [*(results(report) if measured else []), ("artifacts", shown)]
        self._display.display("\n".join(table(rows)))
        lines = failures(run_dir, shown)
        # What failed before a trainer ran has left no record on the run's side.
        for worker, rows in self.failed.items():
            if not (run_dir / "workers" / worker / "exit.json").exists():
                lines += ["", *table(rows)]
        self._display.display("\n".join(lines), color=color)

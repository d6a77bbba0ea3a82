"""Display a run's report after the recap: its measurements, or what failed and the next step."""

from __future__ import annotations

from pathlib import Path

from ansible import constants as C
from ansible.executor.stats import AggregateStats
from ansible.executor.task_result import CallbackTaskResult
from ansible.plugins.callback import CallbackBase

from ..plugin_utils.run_table import UNREACHABLE, Row, run_table, symptom_rows, table
from ..plugin_utils.screen import show, show_heading

DOCUMENTATION = """
name: run_report
type: aggregate
short_description: Displays the report of a run, or what failed, after the recap
description:
  - >-
    Reads report.json and the workers' exit.json in the run's directory. A play gives this
    directory as train_run_dir to ansible.builtin.set_stats, and the symptoms that the Cloud TPU
    API reports of each worker as slice_symptoms.
"""


class CallbackModule(CallbackBase):
    """Collects failures, and displays the report or the failures at the end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "run_report"

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, list[Row]] = {}

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        """Store the first failure of each worker."""
        if not ignore_errors:
            self._store_failure(result)

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        """Store a worker that could not be reached."""
        self._store_failure(result, ("what to do", UNREACHABLE))

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        """Display the report of the run; without one, the failures."""
        custom = stats.custom.get("_run", {})
        run_dir, symptoms = custom.get("train_run_dir"), custom.get("slice_symptoms", {})
        if run_dir and Path(run_dir, "report.json").exists():
            run_table(Path(run_dir), symptoms, self.failed).show()
        elif self.failed:
            show_heading("FAILED", C.COLOR_ERROR)
            for worker, rows in self.failed.items():
                lines = [*table([*rows, *symptom_rows(symptoms, worker)]), ""]
                show("\n".join(lines), C.COLOR_ERROR)

    def _store_failure(self, result: CallbackTaskResult, *more: Row) -> None:
        # The result of a loop only says that an item has failed; the items' own results say why.
        items = [item for item in result.result.get("results", []) if item.get("failed")]
        message = "\n".join(
            str(item.get("msg", "no reason given")) for item in items or [result.result]
        )
        rows = [
            ("worker", result.host.get_name()),
            ("task", result.task.get_name()),
            ("what happened", message),
            *more,
        ]
        self.failed.setdefault(result.host.get_name(), rows)

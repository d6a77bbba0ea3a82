"""Display the table of a run, unless the callback run_report displays it after the recap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import callback_loader

from ..plugin_utils.run_table import run_table

CALLBACK = "mixtral.tpu.run_report"
# What is returned of report.json; the file has more, such as every worker's own numbers.
NUMBERS = (
    "loss",
    "step_time_s",
    "host_clock_s",
    "split_s",
    "tokens_per_s_per_device",
    "mfu",
    "compile",
    "peak_memory_bytes",
)


def callback_is_enabled() -> bool:
    """Return whether Ansible's configuration enables the callback, under any of its names."""
    found = map(callback_loader.find_plugin_with_context, C.CALLBACKS_ENABLED)
    return CALLBACK in [context.resolved_fqcn for context in found]


class ActionModule(ActionBase):
    """The action ``show_run``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Display the table, and return it as lines and as numbers."""
        result = super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "run_dir": {"type": "path", "required": True},
                "symptoms": {"type": "dict", "default": {}},
            }
        )
        table = run_table(Path(args["run_dir"]), args["symptoms"])
        if not callback_is_enabled():
            table.show()
        return result | {
            "changed": False,
            "run_id": table.report["run_id"],
            "status": table.report["status"],
            "numbers": {name: table.report[name] for name in NUMBERS},
            "report": str(Path(args["run_dir"], "report.json")),
            "lines": [table.heading, *table.results, *table.failures],
        }

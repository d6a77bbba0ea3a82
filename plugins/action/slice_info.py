"""Tell which TPU slices there are, how old they are, and what ails them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

# See plugins/plugin_utils/__init__.py.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from plugins.plugin_utils.cloud_tpu import (
    CloudTpu,
    CloudTpuError,
    Slice,
    age_hours,
    from_environment,
    is_expired,
)


def line(slice_: Slice) -> str:
    """Return what there is to say of a slice: state, age, cost, and each worker's symptoms."""
    hours = age_hours(slice_)
    words = [
        f"{slice_['name']}: {slice_['accelerator_type']}, {slice_['state']}",
        slice_["health"].lower().replace("_", " ").replace("health unspecified", ""),
        slice_["health_description"],
        "spot" if slice_["spot"] else "",
        f"{hours:.1f} hours old, {hours * slice_['chips']:.1f} chip-hours",
        "has outlived its max_hours: slice.yml -e expired=true" if is_expired(slice_) else "",
    ]
    words += [
        f"worker {it['worker']} {it['type']} {it['details']}".strip() for it in slice_["symptoms"]
    ]
    return ", ".join(filter(None, words))


class ActionModule(ActionBase):
    """``slice_info: {project, zone}``, on the controller."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(("project", "zone"))

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return ``lines``, one a slice, and by the worker's host the ``symptoms``."""
        super().run(tmp, task_vars)
        args = self._task.args
        try:
            slices = CloudTpu(args["project"], args["zone"], from_environment()).slices()
        except CloudTpuError as problem:
            return {"failed": True, "msg": str(problem)}
        symptoms: dict[str, list[str]] = {}
        for it in slices:
            for symptom in it["symptoms"]:
                words = [f"{symptom['type']} {symptom['details']}".strip(), symptom["time"]]
                text = ", at ".join(filter(None, words))
                symptoms.setdefault(f"{it['name']}-w{symptom['worker']}", []).append(text)
            if it["state"] != "READY":
                text = f"the slice is {it['state']} {it['health_description']}".strip()
                text += ". Make it anew: ansible-playbook slice.yml -e state=present"
                for worker in range(len(it["workers"])):
                    symptoms.setdefault(f"{it['name']}-w{worker}", []).append(text)
        lines = [line(it) for it in sorted(slices, key=lambda it: it["name"])]
        return {"changed": False, "lines": lines, "symptoms": symptoms}

"""List the TPU slices of a zone with their state, age, chip-hours and symptoms."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from ..plugin_utils.cloud_tpu import (
    CloudTpu,
    CloudTpuError,
    Slice,
    from_environment,
    is_expired,
    symptom_text,
    symptoms,
    usage,
)


def summary(slice_: Slice) -> str:
    """Return one line about a slice: state, health, age, chip-hours and each worker's symptoms."""
    parts = [
        f"{slice_['name']}: {slice_['accelerator_type']}, {slice_['state']}",
        slice_["health"].lower().replace("_", " ").replace("health unspecified", ""),
        slice_["health_description"],
        "spot" if slice_["spot"] else "",
        usage([slice_]),
        "is older than its max_hours: slice.yml -e expired=true" if is_expired(slice_) else "",
        *symptoms(slice_),
    ]
    return ", ".join(filter(None, parts))


class ActionModule(ActionBase):
    """The action ``slice_info``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return ``lines``, one for each slice, and ``symptoms``, a list for each worker's host."""
        super().run(tmp, task_vars)
        _, args = self.validate_argument_spec(
            {
                "project": {"type": "str", "required": True},
                "zone": {"type": "str", "required": True},
            }
        )
        try:
            slices = CloudTpu(args["project"], args["zone"], from_environment()).slices()
        except CloudTpuError as error:
            return {"failed": True, "msg": str(error)}
        by_host: dict[str, list[str]] = {}
        for slice_ in slices:
            for symptom in slice_["symptoms"]:
                text = ", at ".join(filter(None, [symptom_text(symptom), symptom["time"]]))
                by_host.setdefault(f"{slice_['name']}-w{symptom['worker']}", []).append(text)
            if slice_["state"] != "READY":
                text = f"the slice is {slice_['state']} {slice_['health_description']}".strip()
                text += ". Create it anew: ansible-playbook slice.yml -e state=present"
                for worker in range(len(slice_["workers"])):
                    by_host.setdefault(f"{slice_['name']}-w{worker}", []).append(text)
        lines = [summary(slice_) for slice_ in sorted(slices, key=lambda slice_: slice_["name"])]
        return {"changed": False, "lines": lines, "symptoms": by_host}

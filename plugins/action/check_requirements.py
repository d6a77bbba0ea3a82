"""Fail unless the controller's Python has the packages of requirements.txt."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from ..plugin_utils.requirements import unmet_requirements


class ActionModule(ActionBase):
    """The action ``check_requirements``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset()

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Fail with what is missing and the command that installs it."""
        super().run(tmp, task_vars)
        message = unmet_requirements()
        return {"failed": True, "msg": message} if message else {"changed": False}

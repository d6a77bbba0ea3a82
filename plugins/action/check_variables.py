"""Refuse variables that nobody reads and values that do not fit, before anything is touched.

What is known is written down once, in places that need it anyway: the map from public names to role
variables (playbooks/group_vars/all/), the roles' argument specs, which give each its type, and the
trainer's flags, some of which have two names.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

from ...trainer.arguments import GROUPS
from ...trainer.flags import flags_of
from ..plugin_utils.variables import Spec, public_names, role_options

ALIASES = {it.alias: it.name for group in GROUPS for it in flags_of(group) if it.alias}


def unknown(given: Mapping[str, Any], known: Mapping[str, Spec]) -> list[str]:
    """Return a complaint about every name in ``given`` that is not in ``known``."""
    complaints = []
    for name in given:
        if name not in known and not name.startswith("ansible_"):
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            complaints.append(f"-e {name}: there is no such variable.{hint}")
    return complaints


def unfit(values: Mapping[str, Any], known: Mapping[str, Spec]) -> list[str]:
    """Return a complaint about every value in ``values`` that is not of the type of its name."""
    complaints = []
    for name, value in values.items():
        # An empty value says «leave it to the trainer», whatever the type.
        if name in known and value not in (None, ""):
            keys = known[name].keys() & {"type", "elements", "choices"}
            spec = {key: known[name][key] for key in keys}
            verdict = ArgumentSpecValidator({name: spec}).validate({name: value})
            complaints += verdict.error_messages
    return complaints


def given_twice(values: Mapping[str, Any], typed: Collection[str]) -> list[str]:
    """Return a complaint about every variable in ``values`` that is given by both of its names.

    An inventory may make one name the default of the other; then they are equal, and only one of
    them is among those ``typed`` after ``-e``.
    """
    return [
        f"{alias} is {values[alias]} and {name} is {values[name]}, but they are two names of one "
        "variable. Give one of them, with -e or in the inventory"
        for alias, name in ALIASES.items()
        if {alias, name} <= values.keys()
        if {alias, name} <= set(typed) or str(values[alias]) != str(values[name])
    ]


class ActionModule(ActionBase):
    """``check_variables: {map: the public names' directory, roles: the roles' directory}``."""

    _requires_connection = False
    _VALID_ARGS = frozenset(("map", "roles"))

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Fail, naming everything that is wrong, unless all variables are known and fit."""
        super().run(tmp, task_vars)
        options = role_options(Path(self._task.args["roles"]))
        public = public_names(Path(self._task.args["map"]), options)
        given = load_extra_vars(self._loader)
        # What the user wrote, not what the map makes of it: there, 'maybe' is false.
        set_by_user = [name for name in {**public, **given} if name in task_vars]
        values = {name: self._templar.template(task_vars[name]) for name in set_by_user}
        complaints = unknown(given, options | public) + unfit(values, options | public)
        complaints += given_twice(values, given)
        if complaints:
            where = "All names and their types: docs/variables.md"
            return {"failed": True, "msg": "\n".join([*complaints, where])}
        return {"changed": False}

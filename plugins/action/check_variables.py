"""Refuse variables that nobody reads and values that do not fit, before anything is touched.

What is known is written down once, in places that need it anyway: the names that users set are the
defaults of the role mixtral, the roles' argument specs give each its type, and some of the
trainer's flags have two names.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible.utils.vars import load_extra_vars
from ansible.vars.reserved import get_reserved_names

from ...trainer.arguments import GROUPS
from ...trainer.flags import flags_of
from ..plugin_utils.variables import PREFIX, Spec, public_names, role_options

ROLES = Path(__file__).parents[2] / "roles"
ALIASES = {it.alias: it.name for group in GROUPS for it in flags_of(group) if it.alias}
# What Ansible, AWX and Semaphore set by themselves
OTHERS = ("ansible_", "awx_", "tower_", "semaphore_vars")
# So near is a name in an inventory that was meant for this collection.
NEAR = 0.85
# What the inventory plugin says of a worker
DESCRIBED = "tpu_"

display = Display()


def unknown(given: Mapping[str, Any], known: Mapping[str, Spec]) -> list[str]:
    """Return a complaint about every name in ``given`` that is not in ``known``."""
    complaints = []
    for name in given:
        if name not in known and not name.startswith(OTHERS):
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            complaints.append(f"-e {name}: there is no such variable.{hint}")
    return complaints


def nearly_known(names: Collection[str], known: Mapping[str, Spec]) -> list[str]:
    """Return a warning about every name of an inventory that is nearly one of ``known``."""
    ansibles = get_reserved_names()
    warnings = []
    for name in sorted(names):
        others = name in ansibles or "__" in name or name.startswith((*OTHERS, DESCRIBED))
        if name not in known and not others:
            for close in difflib.get_close_matches(name, known, 1, cutoff=NEAR):
                warnings.append(f"{name} in the inventory has no effect. Did you mean {close}?")
    return warnings


def unfit(
    values: Mapping[str, Any], known: Mapping[str, Spec], given: Collection[str]
) -> list[str]:
    """Return a complaint about every value in ``values`` that is not of the type of its name.

    Those that are not ``given`` after ``-e`` come from an inventory.
    """
    complaints = []
    for name, value in values.items():
        # An empty value says «leave it to the trainer», whatever the type.
        if name in known and value not in (None, ""):
            keys = known[name].keys() & {"type", "elements", "choices"}
            spec = {key: known[name][key] for key in keys}
            verdict = ArgumentSpecValidator({name: spec}).validate({name: value})
            twin = PREFIX + name
            hint = f". If {name} means something else in the inventory, set {twin}, which counts"
            said = "" if name in given or twin not in known else hint
            complaints += [message + said for message in verdict.error_messages]
    return complaints


def given_twice(values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Return a complaint about every variable that has two names and is given by both.

    ``values`` are the plain names that are set, ``given`` those after ``-e``, which count more than
    the others: a complaint is about two names after ``-e``, or two in an inventory.
    """
    return [
        f"{alias} is {values[alias]} and {name} is {values[name]}, but they are two names of one "
        "variable. Give one of them"
        for alias, name in ALIASES.items()
        if {alias, name} <= values.keys()
        if (alias in given) == (name in given) and str(values[alias]) != str(values[name])
    ]


def settings_given(public: Collection[str], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that a name after ``-e`` decides although it is not the setting's own.

    Each is the name with the prefix that the roles read, and the name in ``given`` that has its
    value.
    """
    for name in public:
        setting = PREFIX + ALIASES.get(name, name)
        spellings = [spelling for spelling in (PREFIX + name, name) if spelling in given]
        if spellings and setting not in given:
            yield setting, spellings[0]


class ActionModule(ActionBase):
    """The action ``check_variables``; its documentation is in plugins/modules."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset()

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Fail, naming everything that is wrong, unless all variables are known and fit.

        ``given`` in the result has the settings whose value a name after ``-e`` decides, and that
        name.
        """
        super().run(tmp, task_vars)
        options = role_options(ROLES)
        public = public_names(ROLES)
        known = options | public
        given = load_extra_vars(self._loader)

        def value(name: str) -> Any:
            return self._templar.template(task_vars[name])

        decided = {
            setting: name
            for setting, name in settings_given(public, given)
            if value(setting) != value(name)
        }
        # What the user wrote, not what the roles make of it: there, 'maybe' is false. A plain name
        # in an inventory that has no effect may be anything.
        values = {name: value(name) for name in given if name in task_vars}
        for name in public:
            spelling = name if name in task_vars else PREFIX + name
            if PREFIX + name not in decided and value(spelling) == value(PREFIX + name):
                values[spelling] = value(spelling)
        plain = {name: value(name) for name in public if name in task_vars}
        complaints = unknown(given, known) + unfit(values, known, given) + given_twice(plain, given)
        if complaints:
            where = "All names and their types: docs/variables.md"
            return {"failed": True, "msg": "\n".join([*complaints, where])}
        for warning in nearly_known(task_vars.keys() - given.keys(), known):
            display.warning(warning)
        return {"changed": False, "given": decided}

"""The names that users set, and the options of the roles that take their defaults from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, nodes

# Every public name has a twin with this prefix, for who means something else by the plain name.
PREFIX = "mixtral_"
# Whose options explain a public name, if several roles take it; the others follow in the order of
# the alphabet.
FIRST = ("mixtral_config", "slice", "train")

Spec = dict[str, Any]


def read_variables(path: Path) -> dict[str, Any]:
    """Return the variables in a YAML file, or in all those of a directory, or nothing."""
    variables: dict[str, Any] = {}
    for file in sorted(path.glob("**/*.yml")) if path.is_dir() else [path]:
        if file.exists():
            variables |= yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return variables


def role_options(roles: Path, role: str = "*") -> dict[str, Spec]:
    """Return the options of the argument specs of ``role``, or every role, by name."""
    options: dict[str, Spec] = {}
    for path in sorted(roles.glob(f"{role}/meta/argument_specs.yml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"].values():
            options |= entry.get("options", {})
    return options


def public_names(roles: Path) -> dict[str, Spec]:
    """Return the public names, each with its spec.

    Those are the defaults of the role mixtral, without their prefix. The spec of a name is that of
    the role variable which takes its default from it, or of the key where it becomes a value of a
    dictionary.
    """
    names: dict[str, Spec] = {
        name.removeprefix(PREFIX): {} for name in read_variables(roles / "mixtral/defaults")
    }
    helpers = read_variables(roles / "mixtral/vars")
    others = {path.name for path in roles.iterdir()} - {"mixtral"}
    for role in sorted(others, key=lambda role: (role not in FIRST, role)):
        options = role_options(roles, role)
        for variable, expression in read_variables(roles / role / "defaults").items():
            for name, key in sources(expression, helpers):
                spec = options[variable]
                names[name] = names[name] or (spec.get("options", {}).get(key, {}) if key else spec)
    return names


def sources(expression: Any, helpers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the public names that a default is made of, each with its key in a dictionary or "".

    A name that only decides something in the expression is none of them. ``helpers`` are variables
    of the role mixtral that an expression may name instead.
    """
    if not isinstance(expression, str):
        return
    output = Environment().parse(expression).body
    node = output[0].nodes[0] if len(output) == 1 and len(output[0].nodes) == 1 else None
    while isinstance(node, (nodes.Filter, nodes.CondExpr)):
        node = node.node if isinstance(node, nodes.Filter) else node.expr1
    if isinstance(node, nodes.Dict):
        yield from (
            (pair.value.name.removeprefix(PREFIX), pair.key.as_const())
            for pair in node.items
            if isinstance(pair.value, nodes.Name) and pair.value.name.startswith(PREFIX)
        )
    elif isinstance(node, nodes.Name) and node.name in helpers:
        yield from sources(helpers[node.name], helpers)
    elif isinstance(node, nodes.Name) and node.name.startswith(PREFIX):
        yield node.name.removeprefix(PREFIX), ""

"""The project's variables: public names, and the options of the roles that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, nodes

Spec = dict[str, Any]


def read_variables(path: Path) -> dict[str, Any]:
    """Return the variables in a YAML file, or in all those of a directory."""
    variables: dict[str, Any] = {}
    for file in sorted(path.glob("*.yml")) if path.is_dir() else [path]:
        variables |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return variables


def role_options(roles: Path, role: str = "*") -> dict[str, Spec]:
    """Return the options of the argument specs of ``role``, or every role, by name."""
    options: dict[str, Spec] = {}
    for path in sorted(roles.glob(f"{role}/meta/argument_specs.yml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"].values():
            options |= entry.get("options", {})
    return options


def public_names(mapping: Path, options: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return the public names that ``mapping`` turns into role variables, each with its spec.

    A public name is one that stands before ``default(...)`` in an expression. Its spec is that of
    the role variable, or of the key where it becomes a value of a dictionary.
    """
    names: dict[str, Spec] = {}
    for variable, expression in read_variables(mapping).items():
        tree, spec = Environment().parse(expression), options.get(variable, {})
        parts = [(tree, spec)]
        if "options" in spec:
            pairs = tree.find_all(nodes.Pair)
            parts = [(pair.value, spec["options"][pair.key.as_const()]) for pair in pairs]
        for part, its_spec in parts:
            for name in names_with_default(part):
                names.setdefault(name, {}).update(its_spec)
    return names


def names_with_default(tree: nodes.Node) -> Iterator[str]:
    """Yield the names in an expression that stand before ``default(...)``."""
    # A node that is one itself is not among those below it.
    for item in [tree, *tree.find_all(nodes.Filter)]:
        if isinstance(item, nodes.Filter) and item.name == "default":
            yield from (node.name for node in [item.node] if isinstance(node, nodes.Name))

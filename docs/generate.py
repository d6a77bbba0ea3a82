"""Write the documentation that is derived: every role's README.md, and docs/variables.md.

`python -m docs.generate` writes what is out of date and names it. With `--check` it writes nothing,
and the exit code is 1 when something is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import nodes

from plugins.action.check_variables import public_names, role_options

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ROOT / "playbooks" / "group_vars" / "all.yml"

# Ansible's markup, as far as the roles use it
MARKUP = [
    (re.compile(r"\b[CVOE]\(([^)]*)\)"), r"`\1`"),
    (re.compile(r"\bI\(([^)]*)\)"), r"*\1*"),
    (re.compile(r"\bB\(([^)]*)\)"), r"**\1**"),
    (re.compile(r"\bL\(([^,)]*), *([^)]*)\)"), r"[\1](\2)"),
]


def paragraphs(description: str | list[str] | None) -> list[str]:
    """Return a description's paragraphs as Markdown."""
    texts = [description] if isinstance(description, str) else description or []
    for pattern, replacement in MARKUP:
        texts = [pattern.sub(replacement, " ".join(text.split())) for text in texts]
    return texts


def meaning(details: dict[str, Any]) -> str:
    """Return the cell of a table that says what an option means and which values it takes."""
    texts = paragraphs(details.get("description"))
    if "choices" in details:
        texts.append("One of " + ", ".join(code(choice) for choice in details["choices"]) + ".")
    return " ".join(texts).replace("|", "\\|")


def type_name(details: dict[str, Any]) -> str:
    """Return an option's type, with that of its elements."""
    name = details.get("type", "str")
    return f"{name} of {details['elements']}" if "elements" in details else name


def code(value: object) -> str:
    """Return a value as it is written in YAML, in code marks; nothing for None."""
    if value is None:
        return ""
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def default(details: dict[str, Any]) -> str:
    """Return the cell of a table that says what an option is when nobody sets it."""
    return "(required)" if details.get("required") else code(details.get("default"))


def public_defaults(expression: str) -> Iterator[tuple[str, Any]]:
    """Yield every public name in an expression of the map, with its default there.

    The default is None where it is no constant but follows from other variables.
    """
    for item in jinja2.Environment().parse(expression).find_all(nodes.Filter):
        if item.name == "default" and isinstance(item.node, nodes.Name):
            try:
                yield item.node.name, item.args[0].as_const()
            except nodes.Impossible:
                yield item.node.name, None


def sections() -> list[dict[str, Any]]:
    """Return the map of public names as its comments divide it: title, text, rows of a table."""
    specs = public_names(VARIABLES, role_options(ROOT / "roles"))
    result = []
    seen = set()
    for block in VARIABLES.read_text(encoding="utf-8").split("\n\n")[1:]:
        lines = block.splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        title, _, text = comment.partition(". ")
        rows = []
        for expression in yaml.safe_load(block).values():
            for name, value in public_defaults(expression):
                if name not in seen:
                    seen.add(name)
                    rows.append({"name": name, "default": value, "spec": specs[name]})
        if rows:
            result.append({"title": title, "text": text, "rows": rows})
    return result


def documents() -> Iterator[tuple[Path, str]]:
    """Yield every derived file with what should stand in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "docs" / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "default_value": default,
        "meaning": meaning,
        "paragraphs": paragraphs,
        "type": type_name,
    }
    role_page = environment.get_template("role.md.j2")
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        role = path.parent.parent
        yield role / "README.md", role_page.render(name=role.name, entry_points=specs)
    variables_page = environment.get_template("variables.md.j2")
    yield ROOT / "docs" / "variables.md", variables_page.render(sections=sections())


def main() -> int:
    """Write the derived documentation that is out of date."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    outdated = [
        (path, text)
        for path, text in documents()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in outdated:
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'out of date, run make docs' if check else 'written'}")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    raise SystemExit(main())

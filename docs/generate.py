"""Write the files that are derived: those that list the trainer's flags or chips, every role's
README.md, and docs/variables.md.

Every flag in trainer/arguments.py becomes an option of the role `train`, a default, and a public
name. What stands by hand beside the generated text comes first: an option in argument_specs.yml, by
which a flag is the launcher's own and gets no public name, a default in defaults/main/main.yml, and
an expression in group_vars/all/main.yml.

`python -m docs.generate` writes what is out of date and names it. With `--check` it writes nothing,
and the exit code is 1 when something is out of date.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import nodes

from plugins.plugin_utils.variables import (
    PREFIX,
    public_names,
    read_variables,
    role_options,
    sources,
)
from trainer.arguments import GROUPS, NOT_COMPILED
from trainer.flags import Flag, flags_of
from trainer.tpu import CHIPS, topology_of

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "roles" / "mixtral" / "defaults" / "main"
TRAIN = ROOT / "roles" / "train"
BEGIN = "      # The trainer's flags: written by `make docs` from trainer/arguments.py\n"
END = "      # The end of what `make docs` writes\n"
PLAN = ROOT / "docs" / "plan.md"
CONSTANTS = "<!-- Written by `make docs` from trainer/tpu.py. -->\n"
END_OF_CONSTANTS = "<!-- The end of what `make docs` writes. -->\n"

# Ansible's markup, as far as the roles use it
MARKUP = [
    (re.compile(r"\b[CVOE]\(([^)]*)\)"), r"`\1`"),
    (re.compile(r"\bI\(([^)]*)\)"), r"*\1*"),
    (re.compile(r"\bB\(([^)]*)\)"), r"**\1**"),
    (re.compile(r"\bL\(([^,)]*), *([^)]*)\)"), r"[\1](\2)"),
]


def spec_texts(details: dict[str, Any]) -> list[str]:
    """Return the paragraphs of an option's description, each on one line."""
    description = details.get("description") or []
    texts = [description] if isinstance(description, str) else description
    return [" ".join(text.split()) for text in texts]


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


def public_default(name: str, expression: Any) -> Any:
    """Return what a public name is when nobody sets it, from its line in the role mixtral.

    That is None where it is no constant but follows from other variables.
    """
    if not isinstance(expression, str):
        return expression
    for item in jinja2.Environment().parse(expression).find_all(nodes.Filter):
        if item.name == "default" and isinstance(item.node, nodes.Name) and item.node.name == name:
            with contextlib.suppress(nodes.Impossible):
                return item.args[0].as_const()
            return None
    return expression


def yaml_value(value: object) -> str:
    """Return a scalar, or a list of them, in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    text = yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")
    return json.dumps(value) if text.startswith("'") else text


def role_variable(flag: Flag) -> dict[str, Any]:
    """Return what a flag is as a variable of the role, and the expression of its public name."""
    # What is not given is an empty text among choices and for paths, and null otherwise.
    empty = "" if flag.choices or flag.kind is Path else None
    default = empty if flag.default is None else flag.default
    public = flag.guide.value if flag.guide else default
    literal = repr(public) if isinstance(public, str) else repr(public).lower()
    expression = f"{flag.name} | default({literal})"
    if flag.alias:
        expression = f"mixtral_{flag.alias} | default({expression}, true)"
    number = flag.kind in (bool, int, float) and public is not None
    return {
        "name": flag.name,
        "variable": f"train_{flag.name}",
        "type": {bool: "bool", int: "int", float: "float", Path: "path"}.get(flag.kind, "str"),
        "choices": ([""] if flag.optional and flag.choices else []) + list(flag.choices),
        "description": re.sub(r"`([^`]+)`", r"C(\1)", flag.help),
        "alias": flag.alias,
        "public": expression,
        "filter": f" | {flag.kind.__name__}" if number else "",
    }


def flag_title(group: type) -> str:
    """Return the title that a group of flags has among the public names."""
    return f"The trainer's flags: {group.__doc__.lower()}"


def flag_files(environment: jinja2.Environment) -> Iterator[tuple[Path, str]]:
    """Yield every file that lists the trainer's flags, with what should stand in it."""
    # --validate stops before there is a run: it is no setting of one.
    groups = {
        flag_title(group): [role_variable(it) for it in flags_of(group) if it.name != "validate"]
        for group in GROUPS
    }
    flags = [flag for group in groups.values() for flag in group]
    names = [flag["name"] for flag in flags]
    lists = environment.get_template("flags.vars.yml.j2")
    yield TRAIN / "vars/main/flags.yml", lists.render(names=names, not_compiled=NOT_COMPILED)

    path = TRAIN / "meta/argument_specs.yml"
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    launchers_own = yaml.safe_load(head + tail)["argument_specs"]["main"]["options"]
    settings = [flag for flag in flags if flag["variable"] not in launchers_own]
    text = environment.get_template("flags.argument_specs.yml.j2").render(flags=settings)
    yield path, head + BEGIN + text + END + tail

    by_hand = read_variables(TRAIN / "defaults/main/main.yml")
    defaults = [flag for flag in settings if flag["variable"] not in by_hand]
    text = environment.get_template("flags.defaults.yml.j2").render(flags=defaults)
    yield TRAIN / "defaults/main/flags.yml", text

    public = {
        title: [flag for flag in group if flag in defaults] for title, group in groups.items()
    }
    text = environment.get_template("flags.settings.yml.j2").render(groups=public)
    yield SETTINGS / "flags.yml", text


def chip_files(environment: jinja2.Environment) -> Iterator[tuple[Path, str]]:
    """Yield every file that lists the trainer's chips, with what should stand in it."""
    # For the doctor, which runs without the trainer: libtpu's name of a slice of four chips, and
    # libtpu's further options, by the chip's names in an accelerator type.
    topologies = {}
    for chip in CHIPS.values():
        name = f"{chip.libtpu_name}:{'x'.join(map(str, topology_of(chip, 4)))}"
        config = chip.libtpu_chip_config
        options = {"chip_config_name": config} if config else {}
        topologies |= {key: [name, options] for key in (chip.name, chip.cloud_name)}
    yield ROOT / "runtime/topologies.json", json.dumps(topologies, indent=2) + "\n"

    head, rest = PLAN.read_text(encoding="utf-8").split(CONSTANTS)
    tail = rest.split(END_OF_CONSTANTS)[1]
    table = environment.get_template("constants.md.j2").render(chips=list(CHIPS.values()))
    yield PLAN, head + CONSTANTS + table + END_OF_CONSTANTS + tail


def settings() -> dict[str, dict[str, Any]]:
    """Return every public name with its spec, in which ``default`` may be None."""
    specs = public_names(ROOT / "roles")
    for flag in (flag for group in GROUPS for flag in flags_of(group) if flag.alias):
        meaning = f"Another name of C({flag.name})."
        specs[flag.alias] = specs[flag.name] | {"description": meaning}
    for name, expression in read_variables(SETTINGS).items():
        plain = name.removeprefix(PREFIX)
        specs[plain] = specs[plain] | {"default": public_default(plain, expression)}
    return specs


def sections() -> list[dict[str, Any]]:
    """Return the public names as the comments of the role mixtral divide them.

    A section has a title, a text and the rows of a table. Blocks of the same title are one section,
    with the flags in their own order.
    """
    specs = settings()
    found: dict[str, dict[str, Any]] = {}
    for path in (SETTINGS / "main.yml", SETTINGS / "flags.yml"):
        for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
            lines = block.splitlines()
            comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
            title, _, text = comment.partition(". ")
            section = found.setdefault(title, {"title": title, "text": text, "rows": []})
            for variable in yaml.safe_load(block):
                name = variable.removeprefix(PREFIX)
                section["rows"].append({"name": name, "spec": specs[name]})
    order = [name for group in GROUPS for it in flags_of(group) for name in (it.name, it.alias)]
    for title in map(flag_title, GROUPS):
        found[title]["rows"].sort(key=lambda row: order.index(row["name"]))
    return [section for section in found.values() if section["rows"]]


def settings_of(defaults: Path) -> defaultdict[str, str | None]:
    """Return the setting that each default of a role takes its value from; else None."""
    helpers = read_variables(ROOT / "roles/mixtral/vars")
    return defaultdict(
        lambda: None,
        {
            variable: PREFIX + name
            for variable, expression in read_variables(defaults).items()
            for name, key in sources(expression, helpers)
            if not key
        },
    )


def role_sections() -> Iterator[dict[str, Any]]:
    """Yield every role: its name, the variables that public names set, and its other options."""
    helpers = read_variables(ROOT / "roles/mixtral/vars")
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        role = path.parents[1]
        if role.name != "mixtral":
            defaults = read_variables(role / "defaults")
            options = role_options(path.parents[2], role.name)
            mapped = [name for name in options if any(sources(defaults.get(name), helpers))]
            yield {
                "name": role.name,
                "mapped": mapped,
                "options": {name: it for name, it in options.items() if name not in mapped},
            }


def documents() -> Iterator[tuple[Path, str]]:
    """Yield every derived file with what should stand in it.

    Each is made from those before it, which therefore have to be written before the next is asked
    for.
    """
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
        "yaml": yaml_value,
    }
    yield from flag_files(environment)
    yield from chip_files(environment)
    path = ROOT / "roles/mixtral/meta/argument_specs.yml"
    names = {
        name: spec | {"meaning": " ".join(spec_texts(spec))} for name, spec in settings().items()
    }
    yield path, environment.get_template("settings.argument_specs.yml.j2").render(names=names)
    role_page = environment.get_template("role.md.j2")
    for path in sorted(ROOT.glob("roles/*/meta/argument_specs.yml")):
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        role = path.parent.parent
        page = role_page.render(
            name=role.name, entry_points=specs, settings=settings_of(role / "defaults")
        )
        yield role / "README.md", page
    variables_page = environment.get_template("variables.md.j2")
    yield (
        ROOT / "docs" / "variables.md",
        variables_page.render(sections=sections(), roles=list(role_sections())),
    )


def main() -> int:
    """Write the derived files that are out of date."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    outdated = False
    for path, text in documents():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated = True
            if not check:
                path.write_text(text, encoding="utf-8")
            print(
                f"{path.relative_to(ROOT)}: {'out of date, run make docs' if check else 'written'}"
            )
    return 1 if check and outdated else 0


if __name__ == "__main__":
    raise SystemExit(main())

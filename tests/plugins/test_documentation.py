"""ansible-doc knows every plugin of the collection, and says of its options what the code does."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DESCRIBED = {"type", "elements", "required", "default", "choices"}


def files(room: str) -> set[str]:
    return {path.stem for path in ROOT.glob(f"plugins/{room}/*.py")}


def filters() -> set[str]:
    """Every filter, of which several may share a file."""
    package = "ansible_collections.mixtral.tpu.plugins.filter"
    found = [importlib.import_module(f"{package}.{name}") for name in files("filter")]
    return {name for module in found for name in module.FilterModule().filters()}


ROOMS = {path.parent.name for path in ROOT.glob("plugins/*/*.py")}
OTHERS = ROOMS - {"action", "modules", "filter", "module_utils", "plugin_utils"}
# By the types of ansible-doc, to which an action is a module
PLUGINS = {"module": files("action") | files("modules"), "filter": filters()}
PLUGINS |= {room: files(room) for room in OTHERS}
EACH = [(kind, name) for kind in sorted(PLUGINS) for name in sorted(PLUGINS[kind])]


def ansible_doc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-doc"), *arguments],
        cwd=ROOT, env=os.environ | {"ANSIBLE_NOCOLOR": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """All that ansible-doc lists of the collection, by type and full name."""
    dumped = ansible_doc("--metadata-dump", "--no-fail-on-errors", "mixtral.tpu")
    return json.loads(dumped.stdout)["all"]


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_plugin_is_documented(known: dict[str, dict[str, Any]], kind: str, name: str) -> None:
    found = known[kind][f"mixtral.tpu.{name}"]
    assert found["doc"]["short_description"]
    assert found["doc"]["description"]
    # A callback is enabled in ansible.cfg, and used nowhere.
    assert kind == "callback" or f"mixtral.tpu.{name}" in found["examples"]


@pytest.mark.parametrize("kind", sorted(PLUGINS))
def test_the_documentation_is_rendered(kind: str) -> None:
    names = [f"mixtral.tpu.{name}" for name in sorted(PLUGINS[kind])]
    page = ansible_doc("--type", kind, *names)
    assert (page.returncode, page.stderr) == (0, "")
    headings = [line.split()[2] for line in page.stdout.splitlines() if line.startswith("> ")]
    assert headings == names


def argument_spec(name: str) -> dict[str, Any]:
    """The argument spec in the code of an action or a module, empty where there is none."""
    room = "action" if name in files("action") else "modules"
    code = (ROOT / "plugins" / room / f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "AnsibleModule", "self.validate_argument_spec",
        ):  # fmt: skip
            given = [word.value for word in node.keywords if word.arg == "argument_spec"]
            return ast.literal_eval((node.args or given)[0])
    return {}


@pytest.mark.parametrize("name", sorted(PLUGINS["module"]))
def test_the_documented_options_are_those_of_the_code(
    known: dict[str, dict[str, Any]], name: str
) -> None:
    options = known["module"][f"mixtral.tpu.{name}"]["doc"]["options"]
    documented = {
        option: {key: about[key] for key in about.keys() & DESCRIBED}
        for option, about in options.items()
    }
    assert documented == argument_spec(name)

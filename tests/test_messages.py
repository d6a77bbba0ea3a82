"""What holds for every text that a user reads."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from jinja2.nativetypes import NativeEnvironment

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTATION = {"DOCUMENTATION", "EXAMPLES", "RETURN"}


def default_worker_dir() -> str:
    """The default of worker_dir."""
    paths = ROOT.glob("roles/mixtral/defaults/**/*.yml")
    defaults = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    (found,) = {
        value
        for variables in defaults
        for name, value in (variables or {}).items()
        if name == "mixtral_worker_dir"
    }
    return str(NativeEnvironment().from_string(found).render())


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """The texts of a Python file, without docstrings and the documentation of a plugin."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and DOCUMENTATION & {
            ast.unparse(it) for it in node.targets
        }:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
        yield from texts(node)


def displayed() -> Iterator[tuple[str, str]]:
    """Every text that may be displayed, with its place: what is no default and no documentation."""
    for path in sorted(ROOT.glob("plugins/**/*.py")):
        for node in texts(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value
    for room in ("roles", "playbooks"):
        for path in sorted((ROOT / room).rglob("*")):
            if path.is_dir() or {"defaults", "meta"} & set(path.parts) or path.suffix == ".md":
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if "default(" not in line and not line.lstrip().startswith("#"):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def test_no_message_writes_out_the_default_of_worker_dir() -> None:
    name = Path(default_worker_dir()).name
    home = r"(^|~\w*|\$HOME|\$\{HOME\}|\}\}|/root|/home/[\w.-]+)"
    written_out = re.compile(rf"{home}/{re.escape(name)}(?![\w-])")
    assert written_out.search(f"old runs are in {default_worker_dir()}/runs")
    assert not [place for place, text in displayed() if written_out.search(text)]

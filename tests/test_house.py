"""What has to hold across the whole tree, whoever edits it."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from jinja2.nativetypes import NativeEnvironment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ["requirements-lock.txt", "requirements-dev.txt"]
ROLES = sorted(path.name for path in ROOT.glob("roles/*"))
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)


def tree() -> list[Path]:
    """Every text file that is, or would be, part of a commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(re.escape(f"{ROOT}/"), id="path of the checkout"),
        pytest.param(
            r"pypi\.org|pythonhosted\.org|(deb|security|snapshot)\.debian\.org|npmjs\.(org|com)",
            id="package registry",
        ),
        pytest.param(
            r"\bhf_[A-Za-z0-9]{30,}|\bgh[ps]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
            r"|\bya29\.[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY",
            id="secret",
        ),
    ],
)
def test_the_tree_holds_no(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tree()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(what, line)
    ]
    assert not found


def pins(lock: str) -> dict[str, str]:
    """The version of every package in a lock file."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_pins_hashes_and_names_no_index(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            assert re.fullmatch(r"\S+==\S+( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+", line)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_has_what_the_project_asks_for(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = project["dependencies"] + [line for line in needed if not line.startswith("#")]
    if lock == "requirements-dev.txt":
        asked = asked + project["optional-dependencies"]["dev"]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins(lock)[requirement.name]), (
            f"{requirement}: make lock"
        )


def test_developers_run_what_users_run() -> None:
    assert pins("requirements-lock.txt").items() <= pins("requirements-dev.txt").items()


def test_the_version_is_that_of_the_newest_release() -> None:
    galaxy = yaml.safe_load((ROOT / "galaxy.yml").read_text(encoding="utf-8"))
    changelog = yaml.safe_load((ROOT / "changelogs/changelog.yaml").read_text(encoding="utf-8"))
    # Until the first release it is the version that this will have.
    assert galaxy["version"] == max(changelog["releases"], key=Version, default="0.1.0")


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_defaults_are_those_of_its_argument_spec(role: str) -> None:
    directory = ROOT / "roles" / role
    specs = yaml.safe_load((directory / "meta/argument_specs.yml").read_text(encoding="utf-8"))
    options = {}
    for spec in specs["argument_specs"].values():
        options |= spec.get("options", {})
    # One file, or those of a directory
    defaults = {}
    for path in [directory / "defaults/main.yml", *directory.glob("defaults/main/*.yml")]:
        if path.exists():
            defaults |= yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    optional = {name for name, option in options.items() if not option.get("required")}
    assert set(defaults) == optional
    documented = {name: it["default"] for name, it in options.items() if "default" in it}
    if role == "mixtral":
        # They are expressions, which give their defaults where nobody sets a plain name.
        defaults = {
            name: NativeEnvironment().from_string(value).render() if "{{" in str(value) else value
            for name, value in defaults.items()
            if name in documented
        }
    assert {name: defaults[name] for name in documented} == documented


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_commands_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets
    for playbook in re.findall(r"ansible-playbook (?:-\S+ \S+ )*([\w/-]+\.yml)", text):
        assert (ROOT / playbook).is_file(), playbook


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_only_to_files_that_exist(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, also late and for types alone."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules(*rooms: str) -> dict[str, set[str]]:
    """Every module of some rooms, with those that it imports."""
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): set(
            imported(path)
        )
        for path in paths
    }


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("trainer", ["report", "runtime", "plugins", "ansible", "docker", "google"]),
        ("report", ["runtime", "plugins", "ansible"]),
        ("runtime", ["trainer", "report", "plugins", "ansible"]),
        ("plugins", ["report", "runtime", "tests"]),
    ],
)
def test_a_room_knows_only_what_is_below_it(room: str, above: list[str]) -> None:
    for module, names in modules(room).items():
        known = {name.partition(".")[0] for name in names}
        assert not known & set(above), module


def test_no_module_imports_one_that_imports_it() -> None:
    found = modules("trainer", "report")
    # Raises CycleError with the circle.
    TopologicalSorter({name: names & found.keys() for name, names in found.items()}).prepare()

"""What the stacks are made of: lock files, and where they come from."""

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "runtime/requirements"
STACKS = sorted(path.stem for path in REQUIREMENTS.glob("*.env"))
LOCKED = ["guide", "release"]
LOCKS = sorted(path for path in REQUIREMENTS.glob("*.txt") if path.stem != "nightly")


def pins(name: str) -> dict[str, str]:
    text = (REQUIREMENTS / name).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {package.replace("_", "-"): version for package, version in found}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_pin_is_hashed_and_none_has_an_address(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line and not line.startswith(("#", " ")):
            assert re.fullmatch(r"[a-z0-9._-]+==\S+ \\", line)
            assert following.startswith("    --hash=sha256:")
        if not line.startswith("#"):
            assert "://" not in line
            assert not line.startswith("-")


@pytest.mark.parametrize("stack", LOCKED)
def test_the_locks_hold_what_was_asked_for(stack):
    locked = pins(f"{stack}.torch.txt") | pins(f"{stack}.txt")
    asked = pins(f"{stack}.in")
    assert asked
    assert asked == {name: locked.get(name) for name in asked}


@pytest.mark.parametrize("stack", LOCKED)
def test_torch_and_its_cuda_libraries_stand_apart(stack):
    assert list(pins(f"{stack}.torch.txt")) == ["torch"]
    locked = pins(f"{stack}.txt")
    assert "torch" not in locked
    assert not [name for name in locked if name.startswith(("nvidia-", "triton"))]
    assert all(name.startswith(("nvidia-", "triton")) for name in pins(f"{stack}.cuda.txt"))


@pytest.mark.parametrize("stack", LOCKED)
def test_the_tests_packages_agree_with_the_stack_s(stack):
    locked, tests = pins(f"{stack}.txt"), pins("test.txt")
    both = locked.keys() & tests.keys()
    assert {name: locked[name] for name in both} == {name: tests[name] for name in both}


def test_nightly_has_the_trainers_libraries_as_release_has_them():
    nightly = pins("nightly.txt")
    assert nightly.keys() == {"transformers", "datasets"}
    assert nightly.items() <= pins("release.txt").items()


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_declares_its_python_on_a_line_that_ansible_finds(stack):
    text = (REQUIREMENTS / f"{stack}.env").read_text(encoding="utf-8")
    # The image's Debian has this one.
    assert re.findall(r"^PYTHON=(\S+)$", text, re.MULTILINE) == ["3.11"]


def test_every_variable_of_the_nightly_is_declared():
    used = re.findall(r"\$\{(\w+)\}", (REQUIREMENTS / "nightly.txt").read_text(encoding="utf-8"))
    declared = (REQUIREMENTS / "nightly.env").read_text(encoding="utf-8")
    assert used
    assert not [name for name in used if not re.search(rf"^{name}=\S", declared, re.MULTILINE)]

"""The lock files of the stack."""

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "container/requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.txt"))


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


def test_the_locks_hold_what_was_asked_for():
    locked = pins("release.torch.txt") | pins("release.txt")
    asked = pins("release.in")
    assert asked
    assert asked == {name: locked.get(name) for name in asked}


def test_torch_and_its_cuda_libraries_stand_apart():
    assert list(pins("release.torch.txt")) == ["torch"]
    assert "torch" not in pins("release.txt")
    assert not [name for name in pins("release.txt") if name.startswith(("nvidia-", "triton"))]
    assert all(name.startswith(("nvidia-", "triton")) for name in pins("release.cuda.txt"))


def test_the_tests_packages_agree_with_the_stack_s():
    stack, tests = pins("release.txt"), pins("test.txt")
    both = stack.keys() & tests.keys()
    assert {name: stack[name] for name in both} == {name: tests[name] for name in both}

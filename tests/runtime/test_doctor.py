"""What the doctor says of a stack: comparison with the lock files, and what last words mean."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import doctor
from runtime.doctor import TOPOLOGIES, diagnosis, minor, pins, wrong_versions
from trainer.tpu import CHIPS, topology_of

DOCTOR = Path(doctor.__file__)
PYTEST = importlib.metadata.version("pytest")
PINNED = {"torch": "2.9.1", "torch_xla": "2.9.0", "libtpu": "0.0.24", "flax": "0.12.0"}


def test_pins_are_read_from_hashed_lock_files(tmp_path):
    (tmp_path / "a.txt").write_text("# a comment\npytest==9.0 \\\n    --hash=sha256:0\n")
    (tmp_path / "b.txt").write_text("torch-xla==2.9.0 ; python_version < '4'\n")
    assert pins(sorted(tmp_path.iterdir())) == {"pytest": "9.0", "torch-xla": "2.9.0"}


def test_what_is_installed_as_pinned_is_right():
    assert list(wrong_versions({"pytest": PYTEST})) == []


def test_another_version_and_a_missing_package_are_named_with_what_mends_them():
    assert list(wrong_versions({"pytest": "1.0", "no-such_package.x": "2.0"})) == [
        (f"pytest is {PYTEST}, 1.0 is pinned", "pip install --no-deps pytest==1.0"),
        (
            "no-such_package.x is missing, 2.0 is pinned",
            "pip install --no-deps no-such_package.x==2.0",
        ),
    ]


@pytest.fixture
def installed(monkeypatch):
    def packages(**versions):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    packages(torch="2.9.1+cpu", torch_xla="2.9.0", libtpu="0.0.24", jax="0.7.1", jaxlib="0.7.1")
    return packages


def test_a_local_version_is_the_public_one(installed):
    assert list(wrong_versions({"torch": "2.9.1"})) == []
    assert list(wrong_versions({"torch": "2.9"})) != []


def test_a_minor_version_is_two_numbers():
    assert minor("2.9.1") == "2.9"
    assert minor(None) == ""


# What these libraries really say
@pytest.mark.parametrize(
    ("changes", "words", "said", "mend"),
    [
        (
            {"libtpu": "0.0.21"},
            "INTERNAL: Mosaic failed to compile TPU kernel: Failed to deserialize the Mosaic "
            "module: Unsupported version: expected <= 7 but got 8",
            "libtpu 0.0.21 reads kernels up to version 7, and jax 0.7.1 writes version 8",
            "pip install --no-deps libtpu==0.0.24",
        ),
        (
            {},
            "ImportError: Jax is required for this feature. pip install torch_xla[pallas]",
            "torch_xla's Pallas kernels need flax",
            "pip install --no-deps flax==0.12.0",
        ),
        (
            {"torch_xla": "2.8.0"},
            "ImportError: _XLAC.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN5torch4lazy",
            "torch is 2.9.1 and torch_xla 2.8.0: they load only in the same minor version",
            "pip install --no-deps torch==2.9.1 torch_xla==2.9.0",
        ),
        (
            {},
            "ModuleNotFoundError: No module named 'flax.nnx'",
            "flax is missing",
            "pip install --no-deps flax==0.12.0",
        ),
        (
            {},
            "Traceback:\n  boom\nRuntimeError: something new\n",
            "RuntimeError: something new",
            "",
        ),
        ({}, "", "it ended without a word", ""),
    ],
)
def test_last_words_have_a_meaning_and_a_remedy(installed, changes, words, said, mend):
    whole = {"torch": "2.9.1", "torch_xla": "2.9.0", "libtpu": "0.0.24"}
    installed(**(whole | {"jax": "0.7.1", "jaxlib": "0.7.1"} | changes))
    assert diagnosis(words, PINNED) == (said, mend)


# The doctor runs without the trainer, from a file that is generated.
def test_the_doctor_knows_every_chip_of_the_trainer_by_all_its_names():
    expected = {}
    for chip in CHIPS.values():
        topology = f"{chip.libtpu_name}:{'x'.join(map(str, topology_of(chip, 4)))}"
        config = chip.libtpu_chip_config
        options = {"chip_config_name": config} if config else {}
        expected |= {key: [topology, options] for key in (chip.name, chip.cloud_name)}
    assert expected == TOPOLOGIES


def test_an_unknown_chip_is_refused_with_the_known_ones():
    ran = subprocess.run(
        [sys.executable, DOCTOR, "--accelerator-type", "v9-8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "--accelerator-type v9-8: known chips are v4, v5e, v5litepod, v5p, v6e" in ran.stderr


def test_a_stack_that_is_not_there_fails_with_a_line_for_each_package(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text("no-such-package==1.0\n")
    ran = subprocess.run(
        [sys.executable, DOCTOR, lock], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "FAIL   versions: no-such-package is missing, 1.0 is pinned" in ran.stdout
    assert "mend it: pip install --no-deps no-such-package==1.0" in ran.stdout

"""The doctor on the stack of the image, whole and broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tpu import CHIPS

DOCTOR = Path(__file__).parents[3] / "runtime/doctor.py"


def examine(accelerator_type: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCTOR, "--accelerator-type", accelerator_type],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("chip", [chip.cloud_name for chip in CHIPS.values()])
def test_every_kernel_compiles_for_every_chip(chip):
    ran = examine(f"{chip}-8")
    assert ran.returncode == 0, ran.stdout
    assert (
        f"kernels compile for {chip}: gmm forward, gmm backward, flash attention forward, "
        "flash attention backward" in ran.stdout
    )


def test_without_flax_it_names_flax(tmp_path):
    (tmp_path / "flax.py").write_text("raise ModuleNotFoundError(\"No module named 'flax'\")\n")
    ran = examine("v5p-8", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    assert "FAIL   kernels compile for v5p (gmm forward): torch_xla's Pallas kernels need flax" in (
        ran.stdout
    )
    assert "mend it: pip install --no-deps flax" in ran.stdout


def test_a_library_that_cannot_be_loaded_takes_nothing_along(tmp_path):
    # As libtpu does: it ends the process.
    (tmp_path / "torch_xla.py").write_text("import os; os.abort()\n")
    ran = examine("v5p-8", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    assert ran.stdout.count("FAIL") == 2

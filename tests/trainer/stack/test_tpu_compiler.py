"""The step as it runs on a TPU, by the real TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("compile_for_tpu.py")
PALLAS = "tpu_custom_call"


@pytest.mark.parametrize(
    ("mode", "kernels"),
    # Flash attention: forward, the same recomputed, two kernels in backward. Megablox: two products
    # forward, the same recomputed, four in backward.
    [("gmm", 12), ("static", 4)],
)
def test_the_step_compiles_for_a_v5p_slice(mode, kernels):
    done = subprocess.run(
        [sys.executable, SCRIPT, mode, "v5:2x2x1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[PALLAS] == kernels
    assert found["all-gather"] > 0
    assert found["reduce-scatter"] > 0

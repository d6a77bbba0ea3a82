"""Which workers of an inventory train.yml takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLICES = {"my-a": 2, "my-b": 1}


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Two slices, all of whose workers are this machine."""
    groups = {
        name.replace("-", "_"): {
            "hosts": {
                f"{name}-w{worker}": {"tpu_slice_id": name, "tpu_worker_id": worker}
                for worker in range(workers)
            }
        }
        for name, workers in SLICES.items()
    }
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"tpu_workers": {"children": groups, "vars": here}}))
    return path


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("slice=my-a", "my-a-w1"),
        ("slice=my-c", "there is no slice my_c in the inventory; its groups are my_a, my_b"),
        ("gmm=true", "has the slices my-a, my-b: name the one that trains, -e slice=my-a"),
        ("multislice=true", "my-b-w0"),
    ],
)
def test_a_run_is_one_slice_or_several_that_are_asked_for(inventory, asked, said) -> None:
    # Nothing on a worker has this tag.
    run = subprocess.run(
        ["ansible-playbook", "-i", inventory, "train.yml", "--tags=validate", "-e", asked],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in " ".join(run.stdout.split())
    assert ("my-b-w0" in run.stdout) == (asked == "multislice=true")

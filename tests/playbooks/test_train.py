"""Which workers of an inventory train.yml takes."""

import json
from pathlib import Path

import pytest

from tests.playbook import HERE, run_playbook

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
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"tpu_workers": {"children": groups, "vars": HERE}}))
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
    run = run_playbook("train.yml", "--tags=validate", "-e", asked, inventory=inventory)
    assert said in run.words
    assert ("my-b-w0" in run.screen) == (asked == "multislice=true")

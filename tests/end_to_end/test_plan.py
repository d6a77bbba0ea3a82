"""The plan on this machine: a verdict, and then the same without compiling, before a launch too."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def play(name: str, directory: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", name, "-e", f"train_plans_dir={directory}/plans"]
    command += ["-e", f"train_runs_dir={directory}/runs"]
    for variable in variables:
        command += ["-e", variable]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_plan_is_made_once_and_brought_home(tmp_path):
    asked = ("accelerator_type=v5p-8", "gmm=true")
    first = play("plan.yml", tmp_path, *asked)
    assert first.returncode == 0, first.stdout
    assert "PLAN: fits" in first.stdout
    (written,) = tmp_path.glob("plans/v5p-8-*/plan.json")
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["chip"], found["chips"], found["topology"]) == ("v5p", 4, "2x2x1")
    # What is no part of the program is no reason to compile again.
    again = play("plan.yml", tmp_path, *asked, "max_steps=7", "learning_rate=0.1")
    assert again.returncode == 0, again.stdout
    assert "changed=0" in again.stdout
    trained = play("train.yml", tmp_path, *asked, "plan=true", "max_steps=1")
    assert trained.returncode == 0, trained.stdout
    assert "PLAN: fits" in trained.stdout.partition("Create the container")[0]
    assert len(list((tmp_path / "plans").iterdir())) == 1


def test_a_slice_that_is_none_is_named(tmp_path):
    refused = play("plan.yml", tmp_path, "accelerator_type=v9-8")
    assert refused.returncode != 0
    assert "unknown accelerator type 'v9-8'; known are v4-N" in refused.stdout
    assert not list(tmp_path.rglob("plan.json"))

"""The plan on this machine: a verdict before the launch, and then the same without compiling."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def plan(directory: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "plan.yml", "-e", f"train_plans_dir={directory}"]
    for variable in variables:
        command += ["-e", variable]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_plan_is_made_before_the_launch_and_brought_home(screen, plans):
    assert "PLAN: fits" in screen.partition("Create the container")[0]
    (written,) = plans.glob("v5p-8-*/plan.json")
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["chip"], found["chips"], found["topology"]) == ("v5p", 4, "2x2x1")


def test_what_is_no_part_of_the_program_is_no_reason_to_compile_again(screen, plans):
    again = plan(plans, "accelerator_type=v5p-8", "gmm=true", "max_steps=7", "learning_rate=0.1")
    assert again.returncode == 0, again.stdout
    assert "PLAN: fits" in again.stdout
    assert "changed=0" in again.stdout
    assert len(list(plans.iterdir())) == 1


def test_a_slice_that_is_none_is_named(tmp_path):
    refused = plan(tmp_path, "accelerator_type=v9-8")
    assert refused.returncode != 0
    assert "unknown accelerator type 'v9-8'; known are v4-N" in refused.stdout
    assert not list(tmp_path.rglob("plan.json"))

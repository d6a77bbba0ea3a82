"""The plan on this machine: a verdict before the launch, and then the same without compiling."""

import json

from tests.playbook import run_playbook


def test_a_plan_is_made_before_the_launch_and_brought_home(screen, plans):
    assert "PLAN: fits" in screen.partition("Create the container")[0]
    (written,) = plans.glob("v5p-8-*/plan.json")
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["chip"], found["chips"], found["topology"]) == ("v5p", 4, "2x2x1")


def test_what_is_no_part_of_the_program_is_no_reason_to_compile_again(screen, plans):
    options = {"accelerator_type": "v5p-8", "gmm": True, "max_steps": 7, "learning_rate": 0.1}
    again = run_playbook("plan.yml", train_plans_dir=str(plans), **options)
    assert again.code == 0
    assert "PLAN: fits" in again.screen
    assert not again.changed
    assert len(list(plans.iterdir())) == 1


def test_a_slice_that_is_none_is_named(tmp_path):
    refused = run_playbook("plan.yml", train_plans_dir=str(tmp_path), accelerator_type="v9-8")
    assert refused.code != 0
    assert "unknown accelerator type 'v9-8'; known are v4-N" in refused.screen
    assert not list(tmp_path.rglob("plan.json"))

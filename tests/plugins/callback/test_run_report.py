"""What stands on the screen at the very end."""

import pytest

from tests.playbook import run_playbook, write_inventory, write_play
from tests.plugins.runs import write_run


def shown_at_the_end(tmp_path, *tasks):
    return run_playbook(write_play(tmp_path, *tasks)).recap


def test_a_run_is_shown_after_the_recap(tmp_path):
    run_dir = write_run(tmp_path)
    task = {"ansible.builtin.set_stats": {"data": {"train_run_dir": str(run_dir)}}}
    shown = shown_at_the_end(tmp_path, task)
    assert "RUN 20260102-030405: failed" in shown
    assert f"artifacts            {run_dir}" in shown
    assert shown.rstrip().endswith("RuntimeError: boom")


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """What stands at the end when workers have failed: at a task, in a loop, at connecting."""
    directory = tmp_path_factory.mktemp("failed")
    nobody = {
        "ansible_connection": "ssh",
        "ansible_host": "localhost",
        "ansible_port": 1,
        "ansible_ssh_retries": 0,
        "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null",
    }
    tasks = [
        {
            "ansible.builtin.fail": {"msg": "no such thing"},
            "when": "inventory_hostname == 'task'",
        },
        {
            "ansible.builtin.assert": {"that": "item != 'b'", "fail_msg": "{{ item }} is wrong"},
            "loop": ["a", "b"],
            "when": "inventory_hostname == 'loop'",
        },
        {"ansible.builtin.ping": {}, "when": "inventory_hostname == 'nobody'"},
    ]
    workers = write_inventory(directory, {"task": {}, "loop": {}, "nobody": nobody})
    return run_playbook(write_play(directory, *tasks), inventory=workers).recap


def test_a_failure_before_the_run_is_said_again_after_the_recap(failed):
    assert "what happened  no such thing" in failed


def test_of_a_loop_every_item_that_failed_is_said(failed):
    assert "what happened  b is wrong" in failed
    assert "a is wrong" not in failed


def test_a_worker_that_cannot_be_reached_has_a_next_step(failed):
    assert "ssh: connect to host localhost port 1: Connection refused" in failed
    assert "what to do     check that the worker is up" in failed


def test_a_success_without_a_run_says_nothing(tmp_path):
    task = {"ansible.builtin.meta": "noop"}
    assert "FAILED" not in shown_at_the_end(tmp_path, task)


def test_a_worker_that_never_started_is_said_too(tmp_path):
    unknown = {"loss": {"first": None, "last": None}, "step_time_s": {"p50": None}}
    run_dir = write_run(tmp_path, **unknown)
    shown = shown_at_the_end(
        tmp_path,
        {
            "block": [{"name": "Start", "ansible.builtin.fail": {"msg": "no such image"}}],
            "always": [
                {"ansible.builtin.set_stats": {"data": {"train_run_dir": str(run_dir)}}},
                {"ansible.builtin.set_stats": {"data": {"slice_symptoms": {"localhost": ["HOT"]}}}},
            ],
        },
    )
    assert "RUN 20260102-030405: failed" in shown
    assert "step time" not in shown
    assert "what happened  no such image" in shown
    assert shown.rstrip().endswith("TPU symptom    HOT")

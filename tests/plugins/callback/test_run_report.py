"""What stands on the screen at the very end."""

import json

import pytest
from ansible_collections.mixtral.tpu.plugins.callback.run_report import (
    failures,
    results,
    table,
    what_to_do,
)

from tests.playbook import run_playbook, write_inventory, write_play

REPORT = {
    "run_id": "20260102-030405",
    "status": "succeeded",
    "model": {
        "name": "mixtral-8x7b",
        "params_total": 46_702_792_704,
        "params_active": 12_879_425_536,
        "block_size": 4096,
        "global_batch": 1024,
    },
    "mesh": {"fsdp": 128, "tensor": 1},
    "experts": {"mode": "gmm", "kernel": "pallas_megablox"},
    "attention": {"kernel": "pallas_splash"},
    "device": {"kind": "TPU v5p", "count": 128, "hosts": 32},
    "loss": {"first": 10.51234, "last": 3.25, "bits_per_byte": 1.1},
    "evaluations": [
        {"step": 50, "eval_loss": 4.5, "perplexity": 90.02},
        {"step": 100, "eval_loss": 3.5, "perplexity": 33.12},
    ],
    "step_time_s": {"p50": 15.2, "p90": 15.75, "n": 8, "source": "device_trace"},
    "host_clock_s": {"p50": 15.25, "p90": 15.8, "n": 90},
    "split_s": {"compute": 11.4, "communication": 3.04, "input": None, "idle": 0.76},
    "skew": {"ratio": 1.0312, "slowest": "w1", "own_time_s": {"w0": 11.0, "w1": 11.4}},
    "expert_load": {"fractions": [0.125] * 8, "max_over_mean": 1.2, "router_entropy": 2.0},
    "plan": {"modelled": {"step_time_s": 13.0, "step_time_overlapped_s": 9.5, "mfu": 0.45}},
    "peak_memory_bytes": 3 * 2**30,
    "workers": [{"host": "w0", "step_time_s": 15.1}, {"host": "w1", "step_time_s": 15.2}],
    "tokens_per_s_per_device": 2155.8,
    "mfu": 0.3895,
    "compile": {"count": 2, "cached": 1, "seconds": 96.4, "last_step": 1},
    "notes": [],
}


def test_the_table_tells_what_was_measured():
    rows = dict(results(REPORT))
    assert rows["step time"] == "p50 15.200 s, p90 15.750 s (8 steps, device trace)"
    assert rows["  by the host clock"] == "p50 15.250 s (90 steps)"
    assert rows["  of which"] == "compute 75%, communication 20%, idle 5%"
    assert rows["skew"] == "1.031, the slowest is w1"
    assert rows["expert load"] == "the busiest expert has 1.20 times the mean"
    assert rows["the plan's model"].startswith("step 13.000 s, 9.500 s with communication hidden")
    assert (rows["  w0"], rows["  w1"]) == ("15.100 s", "15.200 s")
    assert rows["peak memory"] == "3.00 GiB"
    assert rows["tokens/s per device"] == "2,156"
    assert rows["MFU"] == "39.0%"
    assert rows["loss"] == "10.512 → 3.250"
    assert rows["bits per byte"] == "1.100"
    assert rows["evaluation"] == "loss 3.500, perplexity 33.1, after step 100"
    assert rows["devices"] == "128 TPU v5p"
    assert rows["kernels"] == "gmm experts by pallas_megablox, attention by pallas_splash"
    assert rows["compilations"] == "2 in 96 s, the last at step 1"


def test_what_is_not_known_is_a_dash_and_no_number():
    report = REPORT | {
        "model": None,
        "device": None,
        "compile": None,
        "mfu": None,
        "tokens_per_s_per_device": None,
        "step_time_s": {"p50": None, "p90": None, "n": 1, "source": "host_clock"},
        **dict.fromkeys(("split_s", "skew", "expert_load", "plan", "peak_memory_bytes")),
        "notes": ["w0: summary.json is missing"],
    }
    rows = dict(results(report))
    dash = "\N{EN DASH}"
    assert rows["MFU"] == rows["tokens/s per device"] == dash
    assert rows["step time"] == f"p50 {dash} s, p90 {dash} s (1 steps, host clock)"
    assert rows["note"] == "w0: summary.json is missing"


def test_texts_stand_one_below_the_other():
    assert table([("a", "1\n2"), ("longer", "3")]) == ["  a       1\n          2", "  longer  3"]


def ended(**changes):
    record = {"exit_code": 1, "signal": None, "oom_killed": False, "error": None, "last_lines": []}
    return record | changes


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        (ended(exit_code=None), "status.yml"),
        (ended(exit_code=137, signal="SIGKILL", oom_killed=True), "less memory"),
        (ended(exit_code=137, signal="SIGKILL"), "dmesg"),
        (ended(exit_code=143, signal="SIGTERM"), "train.yml"),
        (ended(last_lines=["OSError: [Errno 28] No space left on device", "…"]), "free disk"),
        (
            ended(
                exit_code=143,
                signal="SIGTERM",
                error="the worker, or its Docker engine, was restarted",
            ),
            "journalctl",
        ),
        (ended(), "last lines"),
    ],
)
def test_every_end_has_a_next_step(record, advice):
    assert advice in what_to_do(record)


@pytest.fixture
def run_dir(tmp_path):
    stopped = ended(exit_code=143, signal="SIGTERM", error="stopped, because w1 failed")
    for worker, record in {
        "w0": stopped,
        "w1": ended(last_lines=["Traceback:", "  RuntimeError: boom"]),
        "w2": ended(exit_code=0),
    }.items():
        (tmp_path / "workers" / worker).mkdir(parents=True)
        (tmp_path / "workers" / worker / "exit.json").write_text(json.dumps(record))
    return tmp_path


def test_the_culprit_comes_last_with_its_last_words(run_dir):
    lines = failures(run_dir, "runs/r", {})
    assert "w2" not in "\n".join(lines)
    assert lines[1] == "  w0  stopped, because w1 failed"
    assert lines[3:5] == ["  worker         w1", "  what happened  exit code 1"]
    assert lines[6] == "  whole log      runs/r/workers/w1/trainer.log"
    assert lines[7:] == ["  | Traceback:", "  |   RuntimeError: boom"]


def test_what_the_tpu_says_of_a_worker_stands_with_it(run_dir):
    lines = failures(run_dir, "runs/r", {"w0": ["LOW_MEMORY"], "w1": ["MESH_BUILD_FAIL 3 links"]})
    assert lines[1:3] == [
        "  w0           stopped, because w1 failed",
        "  TPU symptom  LOW_MEMORY",
    ]
    assert lines[6] == "  TPU symptom    MESH_BUILD_FAIL 3 links"


def shown_at_the_end(tmp_path, *tasks):
    return run_playbook(write_play(tmp_path, *tasks)).recap


def test_a_run_is_shown_after_the_recap(tmp_path, run_dir):
    (run_dir / "report.json").write_text(json.dumps(REPORT | {"status": "failed"}))
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


def test_a_worker_that_never_started_is_said_too(tmp_path, run_dir):
    unknown = {"loss": {"first": None, "last": None}, "step_time_s": {"p50": None}}
    report = REPORT | {"status": "failed"} | unknown
    (run_dir / "report.json").write_text(json.dumps(report))
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

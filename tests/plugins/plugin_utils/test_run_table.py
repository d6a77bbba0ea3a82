"""The lines that say what a run has measured, and which workers failed."""

import pytest
from ansible_collections.mixtral.tpu.plugins.plugin_utils.run_table import (
    failures,
    results,
    run_table,
    table,
    what_to_do,
)

from tests.plugins.runs import REPORT, ended, write_run


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


def test_the_culprit_comes_last_with_its_last_words(tmp_path):
    lines = failures(write_run(tmp_path), "runs/r", {})
    assert "w2" not in "\n".join(lines)
    assert lines[1] == "  w0  stopped, because w1 failed"
    assert lines[3:5] == ["  worker         w1", "  what happened  exit code 1"]
    assert lines[6] == "  whole log      runs/r/workers/w1/trainer.log"
    assert lines[7:] == ["  | Traceback:", "  |   RuntimeError: boom"]


def test_what_the_tpu_says_of_a_worker_stands_with_it(tmp_path):
    lines = failures(
        write_run(tmp_path), "runs/r", {"w0": ["LOW_MEMORY"], "w1": ["MESH_BUILD_FAIL 3 links"]}
    )
    assert lines[1:3] == [
        "  w0           stopped, because w1 failed",
        "  TPU symptom  LOW_MEMORY",
    ]
    assert lines[6] == "  TPU symptom    MESH_BUILD_FAIL 3 links"


def test_a_run_says_where_it_is(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "runs/r")
    (run_dir / "report.html").touch()
    monkeypatch.chdir("/")
    assert run_table(run_dir, {}).results[-2:] == [
        f"  artifacts            {run_dir}",
        f"  report               {run_dir}/report.html",
    ]
    monkeypatch.chdir(tmp_path)
    assert run_table(run_dir, {}).results[-2:] == [
        "  artifacts            runs/r",
        "  report               runs/r/report.html",
    ]

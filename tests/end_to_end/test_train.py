"""`ansible-playbook train.yml` on this machine, from the launch to the report. Needs the image."""

import json

import pytest

from tests.end_to_end.conftest import ROOT, STEPS


def test_the_run_succeeds(report: dict) -> None:
    assert report["status"] == "succeeded"
    assert [worker["exit_code"] for worker in report["workers"]] == [0]


def test_the_model_learns(report: dict) -> None:
    assert report["loss"]["last"] < report["loss"]["first"] - 0.5


def test_the_experts_mode_is_the_one_asked_for(report: dict) -> None:
    assert report["experts"]["mode"] == "gmm"


def test_the_step_time_is_that_of_compiled_steps(report: dict) -> None:
    assert report["host_clock_s"]["n"] == STEPS - 1 - report["compile"]["last_step"]
    for step_time in (report["step_time_s"], report["host_clock_s"]):
        assert 0 < step_time["p50"] <= step_time["p90"]


def test_the_profile_gives_the_step_time_and_agrees_with_the_host_clock(report: dict) -> None:
    assert report["step_time_s"]["source"] == "step_markers"
    assert report["step_time_s"]["n"] >= 3
    assert report["trace_over_host_clock"] == pytest.approx(1, abs=0.02)
    assert report["notes"] == []


def test_the_profile_shows_every_part_of_a_step(report: dict) -> None:
    assert min(report["split_s"].values()) > 0
    assert {it["kind"] for it in report["operations"]} == {"compute", "communication"}


def test_the_step_is_compiled_at_most_twice(report: dict) -> None:
    assert report["compile"]["count"] + report["compile"]["cached"] <= 2


def test_throughput_follows_from_step_time(report: dict) -> None:
    tokens = report["model"]["global_batch"] * report["model"]["block_size"]
    per_device = tokens / report["step_time_s"]["p50"] / report["device"]["count"]
    assert report["tokens_per_s_per_device"] == pytest.approx(per_device, rel=0.01)


def test_every_artifact_is_fetched(report: dict) -> None:
    worker = ROOT / "runs/latest/workers/localhost"
    metrics = [json.loads(line) for line in (worker / "metrics.jsonl").open(encoding="utf-8")]
    assert [line["step"] for line in metrics] == list(range(STEPS))
    assert (worker / "trainer.log").stat().st_size > 0
    assert json.loads((worker / "exit.json").read_text(encoding="utf-8"))["exit_code"] == 0
    assert list(worker.glob("profile/**/*.xplane.pb"))


def test_the_screen_ends_with_the_report(screen: str, report: dict) -> None:
    last = screen[screen.index("PLAY RECAP") :]
    assert f"runs/{report['run_id']}/report.html" in last
    assert f"{report['loss']['last']:.3f}" in last

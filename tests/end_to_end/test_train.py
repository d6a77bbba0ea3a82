"""`ansible-playbook train.yml` on this machine, from the launch to the report. Needs the image."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def screen() -> str:
    """What a short run prints, shown as it comes; it must end well."""
    command = ["ansible-playbook", "train.yml", "-e", "gmm=true", "-e", f"max_steps={STEPS}"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    assert run.returncode == 0
    return "".join(lines)


@pytest.fixture(scope="module")
def report(screen: str) -> dict:
    return json.loads((ROOT / "runs/latest/report.json").read_text(encoding="utf-8"))


def test_the_run_succeeds(report: dict) -> None:
    assert report["status"] == "succeeded"
    assert [worker["exit_code"] for worker in report["workers"]] == [0]


def test_the_model_learns(report: dict) -> None:
    assert report["loss"]["last"] < report["loss"]["first"] - 0.5


def test_the_experts_mode_is_the_one_asked_for(report: dict) -> None:
    assert report["experts"]["mode"] == "gmm"


def test_the_step_time_is_that_of_compiled_steps(report: dict) -> None:
    step_time = report["step_time_s"]
    assert step_time["source"] == "host_clock"
    assert step_time["n"] == STEPS - 1 - report["compile"]["last_step"]
    assert 0 < step_time["p50"] <= step_time["p90"]


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
    assert "runs/" in last
    assert f"{report['loss']['last']:.3f}" in last

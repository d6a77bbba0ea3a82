"""Whole runs of ``python -m trainer`` in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRESETS = Path(__file__).parents[3] / "trainer" / "presets"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write a config that compiles in seconds."""
    config = json.loads((PRESETS / "mixtral-tiny.json").read_text())
    config |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    config |= {"vocab_size": 512}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def train(tmp_path: Path, config: Path, *flags: str, **environment: str):
    """Run the trainer with the guide's flags; return the process and the output directory."""
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "trainer", "--do_train", "--output_dir", str(out)),
        *("--overwrite_output_dir", "--config_name", str(config)),
        *("--dataset_name", "python-help", "--block_size", "64"),
        *("--per_device_train_batch_size", "8", "--optim", "adafactor"),
        *("--save_strategy", "no", "--logging_strategy", "no", "--fsdp", "full_shard"),
        *("--fsdp_config", str(PRESETS / "fsdp_config.json"), "--torch_dtype", "bfloat16"),
        *("--dataloader_drop_last", "yes", "--flash_attention", *flags),
    ]
    environment = os.environ | {"PROFILE_LOGDIR": ""} | environment
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done, out


def steps(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_guides_flags_train(tmp_path, small, devices):
    """Loss falls, a line a step, one compile although warm-up starts and the schedule ends at 0."""
    done, out = train(
        *(tmp_path, small, "--gmm", "--max_steps", "12"),
        *("--learning_rate", "3e-3", "--warmup_steps", "3"),
        PROFILE_LOGDIR=str(tmp_path / "profile"),
        PROFILE_DURATION_MS="100",
    )
    assert done.returncode == 0, done.stderr
    lines = steps(out)
    assert [line["step"] for line in lines] == list(range(12))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    summary = json.loads((out / "summary.json").read_text())
    assert summary["compile"]["count"] <= 2
    assert summary["compile"]["last_step"] <= 1
    assert summary["mesh"] == {"fsdp": devices, "tensor": 1}
    assert summary["experts"] == {"mode": "gmm", "kernel": "grouped_loop"}
    assert summary["attention"] == {"kernel": "dense"}
    traces = list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 10_000


def test_the_same_seed_gives_the_same_losses(tmp_path, small):
    losses = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        done, out = train(tmp_path / run, small, "--static", "--max_steps", "3")
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in steps(out)])
    assert losses[0] == losses[1]


def test_a_diverged_run_says_its_step(tmp_path, small):
    done, out = train(
        *(tmp_path, small, "--max_steps", "8", "--learning_rate", "1e30"),
        *("--max_grad_norm", "0", "--lr_scheduler_type", "constant"),
    )
    assert done.returncode == 1
    assert "training diverged" in done.stderr
    assert steps(out)[-1]["loss"] is None


def test_bad_input_ends_before_the_stack_is_loaded(tmp_path, small):
    done, out = train(tmp_path, small, "--gmm", "--static")
    assert done.returncode == 2
    assert "--gmm and --static" in done.stderr
    assert not out.exists()

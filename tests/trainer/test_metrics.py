import json
import math
from datetime import datetime
from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.metrics import MetricsWriter, flops_per_token, parameter_counts, write_json
from trainer.tpu import CHIPS


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    # The model cards: 46.7 B and 12.9 B; 141 B and 39 B.
    [("mixtral-8x7b", 46.70e9, 12.88e9), ("mixtral-8x22b", 140.6e9, 39.15e9)],
)
def test_parameters_are_those_published(
    presets: Path, preset: str, total: float, active: float
) -> None:
    counts = parameter_counts(load_config(presets / f"{preset}.json"))
    assert counts == pytest.approx((total, active), rel=1e-3)


@pytest.mark.parametrize(
    ("chip", "tokens_per_s", "mfu"),
    # MaxText's Mixtral 8x7B at 4096 tokens: tokens per second and chip, and the MFU it states.
    [("v5p", 2909, 0.5256), ("v6e", 3899, 0.3523)],
)
def test_flops_and_peaks_reproduce_published_mfus(
    presets: Path, chip: str, tokens_per_s: float, mfu: float
) -> None:
    flops = flops_per_token(load_config(presets / "mixtral-8x7b.json"), 4096)
    assert flops * tokens_per_s / CHIPS[chip].peak_bf16_flops == pytest.approx(mfu, abs=2e-4)


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier run\n")
    with MetricsWriter(path) as writer:
        writer.write(step=0, loss=7.5, expert_load=[0.25, 0.75])
        writer.write(step=1, loss=math.nan, expert_load=[0.5, 0.5])
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert datetime.fromisoformat(lines[0].pop("time")).utcoffset().total_seconds() == 0
    assert lines[0] == {"step": 0, "loss": 7.5, "expert_load": [0.25, 0.75]}
    assert lines[1]["loss"] is None


def test_a_resumed_run_goes_on_from_its_step(tmp_path: Path) -> None:
    """Also where a kill has cut the last line short."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, kept_steps=0) as writer:
        writer.write(step=2, loss=7.5)
        writer.write(step=3, loss=7.0)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricsWriter(path, kept_steps=3) as writer:
        writer.write(step=3, loss=6.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 7.5), (3, 6.5)]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"mesh": {"fsdp": 4}})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"mesh": {"fsdp": math.nan}})
    assert json.loads(path.read_text()) == {"mesh": {"fsdp": 4}}

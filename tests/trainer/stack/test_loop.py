"""Whole runs of ``python -m trainer`` in a process of their own."""

import json
import math
import os
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, MixtralForCausalLM

from report.profile import read as read_trace
from trainer.data import load_tokenizer
from trainer.metrics import LEAST_STEPS
from trainer.text_sources import load_texts
from trainer.validation import parse

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
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
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
        PROFILE_DURATION_MS="1",
    )
    assert done.returncode == 0, done.stderr
    lines = steps(out)
    assert [line["step"] for line in lines] == list(range(12))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for line in lines:
        assert sum(line["expert_load"]) == pytest.approx(1, abs=1e-3)
        assert 0 < line["router_entropy"] <= math.log(8)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["compile"]["count"] == 1
    assert summary["compile"]["last_step"] == 0
    assert summary["mesh"] == {"slice": 1, "fsdp": devices, "tensor": 1}
    assert summary["experts"] == {"mode": "gmm", "kernel": "grouped_loop"}
    assert summary["attention"] == {"kernel": "dense"}
    traces = list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].name == f"{socket.gethostname()}.xplane.pb"
    trace = read_trace(traces[0])
    # As short as it is to be, it shows steps enough.
    assert (trace["source"], trace["steps"], trace["n"]) == ("step_markers", [4, 7], LEAST_STEPS)
    assert min(trace["split"].values()) > 0
    assert any(it["kind"] == "communication" for it in trace["operations"]) == (devices > 1)


def test_the_same_seed_gives_the_same_losses(tmp_path, small):
    losses = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        done, out = train(tmp_path / run, small, "--static", "--max_steps", "3")
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in steps(out)])
    assert losses[0] == losses[1]


def test_a_stream_of_documents_apart_is_resumed_where_it_was(tmp_path, small):
    name = ["--do_train", "--output_dir", "o", "--dataset_name", "python-help"]
    arguments = parse([*name, "--config_name", str(small)])
    load_tokenizer(arguments, load_texts(arguments)).save_pretrained(tmp_path / "tokenizer")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(topics["lambda"])
    flags = (
        *("--streaming", "--reset_attention_mask", "--tokenizer_name", str(tmp_path / "tokenizer")),
        *("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"),
        *("--validation_file", str(held_out), "--eval_strategy", "steps", "--eval_steps", "2"),
        *("--report_to", "tensorboard", "--logging_dir", str(tmp_path / "board")),
    )
    losses, evaluations = [], []
    for checkpoint in ("auto", str(tmp_path / "out" / "checkpoint-2")):
        done, out = train(tmp_path, small, *flags, "--resume_from_checkpoint", checkpoint)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in steps(out)])
        evaluations.append(json.loads((out / "summary.json").read_text())["evaluations"])
    assert "after step 2" in done.stdout
    assert "evaluation after step 2" not in done.stdout
    assert len(set(losses[0])) == 4
    assert losses[0] == losses[1]
    assert [found["step"] for found in evaluations[0]] == [2, 4]
    assert evaluations[0] == evaluations[1]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [it.step for it in board.Scalars("eval/eval_loss")] == [1, 3]


def test_batches_in_parts_train_as_whole_ones_and_are_evaluated(tmp_path, small):
    """The oracle of the evaluation is transformers, with the model that the run has left."""
    flags = ("--static", "--max_steps", "3", "--torch_dtype", "float32", "--do_eval")
    (tmp_path / "whole").mkdir()
    done, whole = train(tmp_path / "whole", small, *flags)
    assert done.returncode == 0, done.stderr
    done, out = train(
        *(tmp_path, small, *flags, "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "8"),
        *("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps"),
        *("--report_to", "tensorboard", "--logging_dir", str(tmp_path / "board")),
    )
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in steps(out)]
    assert losses == pytest.approx([line["loss"] for line in steps(whole)], rel=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"]["global_batch"] == 8
    assert summary["compile"]["last_step"] == 0
    assert [found["step"] for found in summary["evaluations"]] == [2, 3]
    found = summary["evaluations"][-1]
    assert f"eval_loss {found['eval_loss']:.4f} perplexity" in done.stdout

    tokenizer = AutoTokenizer.from_pretrained(out)
    held_out = [topics[topic] for topic in sorted(topics)][: len(topics) * 5 // 100]
    tokens = torch.tensor(list(chain(*tokenizer(held_out)["input_ids"])))
    blocks = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    assert len(blocks) % 8  # what completes the last batch does not count
    model = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = model(blocks, labels=blocks).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)

    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [it.value for it in board.Scalars("train/loss")] == pytest.approx(losses)
    assert board.Scalars("eval/eval_loss")[-1].value == pytest.approx(found["eval_loss"])


def test_a_diverged_run_says_its_step(tmp_path, small):
    done, out = train(
        *(tmp_path, small, "--max_steps", "8", "--learning_rate", "1e30"),
        *("--max_grad_norm", "0", "--lr_scheduler_type", "constant"),
        PROFILE_LOGDIR=str(tmp_path / "profile"),
        PROFILE_STEP="7",
    )
    assert "no profile: it would begin after step 7 (PROFILE_STEP 7, PROFILE_EPOCH 0" in done.stdout
    assert done.returncode == 1
    assert f"the loss of step {steps(out)[-1]['step']} is " in done.stderr
    assert "training diverged" in done.stderr
    assert steps(out)[-1]["loss"] is None


def test_bad_input_ends_before_the_stack_is_loaded(tmp_path, small):
    done, out = train(tmp_path, small, "--gmm", "--static")
    assert done.returncode == 2
    assert "--gmm and --static" in done.stderr
    assert not out.exists()

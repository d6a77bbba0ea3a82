"""Every option of a step reaches the program of the training loop and the program of the plan."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch_xla

from trainer import loop
from trainer.run import run
from trainer.step import StepOptions, TrainStep
from trainer.validation import parse

ROOT = Path(__file__).parents[3]
MODEL = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,  # of width 128, which the TPU's attention kernel needs
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
# The flags that change one field and nothing else: also the batch of a step stays 8 sequences.
CHANGES = {
    "experts_mode": ["--static"],
    "flash_attention": ["--flash_attention"],
    "dtype": ["--torch_dtype", "bfloat16"],
    "tensor_devices": ["--spmd_2d_sharding", "2"],
    "recompute": ["--fsdp_config", str(ROOT / "trainer/presets/fsdp_config.json")],
    "isolate_documents": ["--reset_attention_mask"],
    "accumulation": [
        *("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"),
    ],
    "max_grad_norm": ["--max_grad_norm", "0.5"],
    "weight_decay": ["--weight_decay", "0.1"],
}
VARIANTS = {"unchanged": [], "unchanged again": []} | CHANGES


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("step")
    config, text = directory / "config.json", directory / "text.txt"
    config.write_text(json.dumps(MODEL))
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 500)
    return [
        *("--do_train", "--output_dir", str(directory / "out"), "--overwrite_output_dir"),
        *("--config_name", str(config), "--train_file", str(text), "--block_size", "128"),
        *("--per_device_train_batch_size", "8", "--max_steps", "1"),
    ]


def test_each_change_is_of_one_field_and_every_field_has_one(flags):
    unchanged = asdict(StepOptions.from_arguments(parse(flags)))
    assert CHANGES.keys() == unchanged.keys() == {field.name for field in fields(StepOptions)}
    for name, change in CHANGES.items():
        changed = asdict(StepOptions.from_arguments(parse([*flags, *change])))
        assert {key for key in changed if changed[key] != unchanged[key]} == {name}


class Traced(Exception):
    """The first step has been traced; the message identifies its program."""


def test_every_option_reaches_the_training_loop(flags, monkeypatch):
    call = TrainStep.__call__

    def trace_only(train_step: TrainStep, *inputs) -> None:
        outputs = [call(train_step, *inputs), *train_step.state.values()]
        program = torch_xla._XLAC._get_xla_tensors_hlo(outputs)
        # On CPU both ways of attention run the same kernel, under different names.
        raise Traced(f"{train_step.model.config._attn_implementation}\n{program}")

    monkeypatch.setattr(TrainStep, "__call__", trace_only)
    # It would run the step when it ends.
    monkeypatch.setattr(loop.xp, "StepTrace", lambda *_, **__: contextlib.nullcontext())
    programs = {}
    for name, change in VARIANTS.items():
        try:
            run(parse([*flags, *change]))
        except Traced as traced:
            programs[name] = str(traced)
        gc.collect()  # updates of the traced step that are still to be computed
    check_differ(programs)


def test_every_option_reaches_the_plan(flags):
    variants = {name: [*flags, *change] for name, change in VARIANTS.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.stack.trace_steps", "v5p-8", json.dumps(variants)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_differ(json.loads(done.stdout.splitlines()[-1]))


def check_differ(programs: dict[str, str]) -> None:
    assert programs.keys() == VARIANTS.keys()
    assert programs["unchanged"] == programs["unchanged again"]
    same = [name for name in CHANGES if programs[name] == programs["unchanged"]]
    assert not same, f"these options do not reach the program: {same}"

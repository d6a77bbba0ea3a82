import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from trainer import arguments
from trainer.config import MIXTRAL_KEYS, load_config
from trainer.metrics import flops_per_token, parameter_counts

NAMES = ["mixtral-8x7b", "mixtral-8x22b", "mixtral-tiny"]


def test_every_key_that_transformers_writes_is_known(tmp_path: Path) -> None:
    config = MixtralConfig(
        architectures=["MixtralForCausalLM"], dtype="bfloat16", max_position_embeddings=4096
    )
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path / "config.json")
    assert config.to_dict().keys() <= MIXTRAL_KEYS.keys()
    assert {field.name for field in dataclasses.fields(MixtralConfig)} <= MIXTRAL_KEYS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_transformers_model(presets: Path, name: str) -> None:
    config = load_config(presets / f"{name}.json")
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig.from_dict(config))
    assert parameter_counts(config)[0] == sum(weight.numel() for weight in model.parameters())


def test_tied_weights_count_once(presets: Path) -> None:
    config = load_config(presets / "mixtral-tiny.json") | {"tie_word_embeddings": True}
    model = MixtralForCausalLM(MixtralConfig.from_dict(config))
    assert parameter_counts(config)[0] == model.num_parameters()


@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}], ids=["derived", "head_dim"])
def test_flops_are_those_that_torch_counts(presets: Path, changes: dict[str, int]) -> None:
    batch, block_size = 2, 128
    config = load_config(presets / "mixtral-tiny.json") | changes
    model = MixtralForCausalLM._from_config(
        MixtralConfig.from_dict(config), attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.randint(config["vocab_size"], (batch, block_size))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    counted = counter.get_total_flops() / (batch * block_size)
    assert flops_per_token(config, block_size) == pytest.approx(counted, rel=1e-3)


def test_defaults_are_those_of_transformers_but_where_this_trainer_differs() -> None:
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    # It has one optimizer, saves only when asked, prints every step, and evaluates on batches as
    # large as those it trains on; what is off there as "" or "no" is None here.
    differing = {"optim", "save_strategy", "logging_steps", "fsdp", "eval_strategy"}
    differing |= {"per_device_eval_batch_size", "overwrite_output_dir", "output_dir"}
    for field in dataclasses.fields(arguments.TrainingArguments):
        if field.name in theirs and field.name not in differing:
            assert field.default == theirs[field.name].default, field.name


@pytest.mark.parametrize("name", NAMES)
def test_presets_read_the_same_in_transformers(presets: Path, name: str) -> None:
    published = json.loads((presets / f"{name}.json").read_text())
    config = MixtralConfig.from_dict(published).to_dict()
    assert config["rope_parameters"]["rope_theta"] == published.pop("rope_theta")
    assert str(config["dtype"]) == published.pop("torch_dtype")
    assert published.items() <= config.items()

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import BadInput, load_config, load_fsdp_config

# config.json of mistralai/Mixtral-8x7B-v0.1 as it is published.
PUBLISHED = """
{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
 "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
 "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
 "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
 "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
 "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
 "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
 "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000}
"""


def refusal(load: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_published_config_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "mixtral87.json"
    path.write_text(PUBLISHED)
    assert load_config(path) == json.loads(PUBLISHED)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b", "mixtral-tiny"])
def test_presets_pass(presets: Path, name: str) -> None:
    assert load_config(presets / f"{name}.json")["num_local_experts"] == 8


def test_the_8x7b_preset_has_the_published_values(presets: Path) -> None:
    published = {"_name_or_path": "mistralai/Mixtral-8x7B-v0.1"} | json.loads(PUBLISHED)
    del published["transformers_version"]
    assert load_config(presets / "mixtral-8x7b.json") == published


def test_the_spelling_of_transformers_5_passes(write_config: Callable[..., Path]) -> None:
    path = write_config(
        dtype="bfloat16",
        torch_dtype=...,
        rope_theta=...,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        head_dim=None,
        eos_token_id=[2, 3],
    )
    assert load_config(path)["dtype"] == "bfloat16"


def test_a_number_may_be_written_as_an_integer(write_config: Callable[..., Path]) -> None:
    assert load_config(write_config(rope_theta=1000000))["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_expert_per_tok": 2}, ["'num_expert_per_tok'", "value is 2", "num_experts_per_tok?"]),
        ({"hidden_size": "256"}, ["hidden_size", '"256"', "an integer"]),
        ({"hidden_size": 256.0}, ["hidden_size", "256.0", "an integer"]),
        ({"hidden_size": True}, ["hidden_size", "true", "an integer"]),
        ({"hidden_size": None}, ["hidden_size", "null", "an integer"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", '"1e-5"', "a number"]),
        ({"use_cache": 1}, ["use_cache", "1", "true or false"]),
        ({"sliding_window": "no"}, ["sliding_window", '"no"', "an integer or null"]),
        ({"vocab_size": 0}, ["vocab_size", "0", "at least 1"]),
        ({"hidden_size": ..., "vocab_size": ...}, ["missing: vocab_size, hidden_size"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "at most", "8"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "8", "multiple", "3"]),
        ({"hidden_size": 260}, ["hidden_size", "260", "multiple of num_attention_heads", "8"]),
        ({"head_dim": 33}, ["head_dim", "33", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act", '"gelu"', '"silu"']),
        ({"output_router_logits": 1}, ["output_router_logits", "1", "true or false"]),
        ({"model_type": "llama"}, ["not a Mixtral", '"llama"', '"mixtral"']),
        ({"model_type": ...}, ["not a Mixtral", "null", '"mixtral"']),
    ],
)
def test_a_wrong_config_is_refused(
    write_config: Callable[..., Path], changes: dict[str, Any], said: list[str]
) -> None:
    message = refusal(load_config, write_config(**changes))
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "holds [1, 2]"),
        (b'{"model_type": "mixtr\xe9l"}', "byte 0xe9 at offset 21"),
    ],
)
@pytest.mark.parametrize("load", [load_config, load_fsdp_config])
def test_what_is_no_json_object_is_refused(
    tmp_path: Path, load: Callable[[Path], Any], content: bytes, said: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    assert said in refusal(load, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(load_config, tmp_path / "absent.json")
    assert "Is a directory" in refusal(load_config, tmp_path)


def test_the_fsdp_preset_asks_for_checkpointing(presets: Path) -> None:
    assert load_fsdp_config(presets / "fsdp_config.json").activation_checkpointing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"xla_fsdp_grad_ckp": True}, ["'xla_fsdp_grad_ckp'", "Did you mean xla_fsdp_grad_ckpt?"]),
        ({"xla_fsdp_grad_ckpt": "yes"}, ["xla_fsdp_grad_ckpt", '"yes"', "true or false"]),
        ({"xla": False}, ["xla is false", "only true"]),
        ({"xla_fsdp_v2": ...}, ["missing", "xla_fsdp_v2"]),
        (
            {"fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
            ["LlamaDecoderLayer", "MixtralDecoderLayer"],
        ),
    ],
)
def test_a_wrong_fsdp_config_is_refused(
    tmp_path: Path, presets: Path, changes: dict[str, Any], said: list[str]
) -> None:
    options = json.loads((presets / "fsdp_config.json").read_text()) | changes
    path = tmp_path / "fsdp_config.json"
    path.write_text(json.dumps({key: options[key] for key in options if options[key] is not ...}))
    message = refusal(load_fsdp_config, path)
    for part in said:
        assert part in message


def test_checkpointing_is_off_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "fsdp_config.json"
    path.write_text('{"xla": true, "xla_fsdp_v2": true}')
    assert not load_fsdp_config(path).activation_checkpointing

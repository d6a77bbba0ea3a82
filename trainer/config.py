"""Read and check ``config.json``, the model's, and ``fsdp_config.json``.

Imports the standard library alone: the controller, which has no transformers, checks both files
before they are sent to any worker.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .flags import BadInput, did_you_mean

# The sizes of a Mixtral. For a missing one transformers would silently take that of Mixtral 8x7B.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
# The keys that determine the model's function: a checkpoint fits only where all of them are equal.
ARCHITECTURE = (
    *SIZES,
    "head_dim",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
)
# The keys of transformers' MixtralConfig, as version 5 and, where they differ, version 4 name them
MIXTRAL_KEYS: dict[str, Any] = {
    "model_type": str,
    **dict.fromkeys(SIZES, int),
    "head_dim": int | None,
    "hidden_act": str,
    "initializer_range": float,
    "rms_norm_eps": float,
    "sliding_window": int | None,
    "attention_dropout": float,
    "tie_word_embeddings": bool,
    "rope_parameters": dict | None,
    "rope_theta": float,
    "rope_scaling": dict | None,
    "output_router_logits": bool,
    "router_aux_loss_coef": float,
    "router_jitter_noise": float,
    "pad_token_id": int | None,
    "bos_token_id": int | None,
    "eos_token_id": int | list | None,
    "dtype": str | None,
    "torch_dtype": str | None,
    "use_cache": bool,
    "return_dict": bool,
    "output_attentions": bool,
    "output_hidden_states": bool,
    "is_encoder_decoder": bool,
    "chunk_size_feed_forward": int,
    "id2label": dict | None,
    "label2id": dict | None,
    "problem_type": str | None,
    "architectures": list | None,
    "transformers_version": str | None,
    "_name_or_path": str | None,
}
FSDP_KEYS: dict[str, Any] = {
    "fsdp_transformer_layer_cls_to_wrap": list,
    "xla": bool,
    "xla_fsdp_v2": bool,
    "xla_fsdp_grad_ckpt": bool,
}
# Keys of which the trainer implements one value only; another would be ignored, so it is refused.
ONLY_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "fsdp_transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
    "xla": True,
    "xla_fsdp_v2": True,
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class FsdpConfig:
    """The content of fsdp_config.json."""

    activation_checkpointing: bool = False  # backward recomputes each layer


def load_config(path: Path) -> dict[str, Any]:
    """Return the Mixtral configuration in ``path``, checked and unchanged.

    Raises BadInput if the file is not a JSON object, not a Mixtral's, or has an unknown key, a
    missing key or a wrong value.
    """
    config = _load_object(path)
    if config.get("model_type") != "mixtral":
        raise BadInput(
            f"{path}: not a Mixtral config: model_type is {_show(config.get('model_type'))}; it "
            'must be "mixtral". Take the config.json of a model such as mistralai/Mixtral-8x7B-v0.1'
        )
    _check_keys(path, config, MIXTRAL_KEYS, SIZES)
    for key in (*SIZES, "head_dim", "sliding_window"):
        if config.get(key) is not None and config[key] < 1:
            raise BadInput(f"{path}: {key} is {config[key]}; it must be at least 1")
    experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
    if chosen > experts:
        raise BadInput(
            f"{path}: num_experts_per_tok is {chosen}; it must be at most num_local_experts, "
            f"which is {experts}"
        )
    _check_divides(path, config, "num_key_value_heads", "num_attention_heads")
    if config.get("head_dim") is None:
        _check_divides(path, config, "num_attention_heads", "hidden_size")
    if head_dim(config) % 2:
        raise BadInput(f"{path}: head_dim is {head_dim(config)}; rotary embeddings need it even")
    return config


def head_dim(config: dict[str, Any]) -> int:
    """Return the width of an attention head: ``head_dim``, or hidden size / heads without it."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def load_fsdp_config(path: Path) -> FsdpConfig:
    """Return the options in the fsdp_config.json ``path``; raises BadInput as load_config does."""
    options = _load_object(path)
    _check_keys(path, options, FSDP_KEYS, ("xla", "xla_fsdp_v2"))
    return FsdpConfig(activation_checkpointing=options.get("xla_fsdp_grad_ckpt", False))


def read_utf8(path: Path) -> str:
    """Return the text in ``path``; raises BadInput if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}. Give a file's path") from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}. Only UTF-8 is read; convert the file, for example with iconv"
        ) from error


def _load_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds {_show(value)}; it must be a JSON object, {{...}}")
    return value


def _check_keys(
    path: Path, values: dict[str, Any], types: dict[str, Any], required: Iterable[str]
) -> None:
    for key, value in values.items():
        if key not in types:
            raise BadInput(
                f"{path}: unknown key {key!r} (its value is {_show(value)})."
                f"{did_you_mean(key, types)} Known keys: {', '.join(sorted(types))}"
            )
        allowed = get_args(types[key]) or (types[key],)
        if not _is_one_of(value, allowed):
            names = " or ".join(_TYPE_NAMES[kind] for kind in allowed)
            raise BadInput(f"{path}: {key} is {_show(value)}; it must be {names}")
        if key in ONLY_VALUES and value != ONLY_VALUES[key]:
            raise BadInput(
                f"{path}: {key} is {_show(value)}; this trainer supports only "
                f"{_show(ONLY_VALUES[key])}"
            )
    missing = [key for key in required if key not in values]
    if missing:
        raise BadInput(f"{path}: these keys are missing: {', '.join(missing)}; add them")


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):  # in Python, unlike JSON, bool is a subclass of int
        return bool in types
    return isinstance(value, types) or (float in types and isinstance(value, int))


def _check_divides(path: Path, config: dict[str, Any], divisor: str, key: str) -> None:
    if config[key] % config[divisor]:
        raise BadInput(
            f"{path}: {key} is {config[key]}; it must be a multiple of {divisor}, which is "
            f"{config[divisor]}"
        )


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

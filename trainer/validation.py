"""Every check of user input: flags and their combinations, local data, devices.

Imports neither torch nor transformers: ``--validate`` runs on the controller, on a bare Python,
before anything is launched.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from . import data, tpu
from .arguments import (
    GROUPS,
    PYTHON_HELP,
    Arguments,
    DataArguments,
    ExpertsMode,
    ModelArguments,
    Profile,
    TrainingArguments,
)
from .config import FsdpConfig, load_config, load_fsdp_config
from .flags import BadInput, parse_flags
from .text_sources import check_parquet, read_texts

# https://cloud.google.com/storage/docs/buckets#naming, as far as it can be wrong by accident
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^/\s][^\s]*)?/?")


def parse(argv: list[str]) -> Arguments:
    """Return the flags in ``argv`` with both JSON files loaded and block_size filled in.

    Raises BadInput for a flag, a value, a combination or a JSON file that cannot work.
    """
    model, texts, training = parse_flags(argv, "python -m trainer", GROUPS)
    _check_combinations(model, texts, training)
    if not model.config_name:
        model = dataclasses.replace(model, config_name=_config_of(model.model_name_or_path))
    config = load_config(model.config_name)
    limit = config["max_position_embeddings"]
    texts = dataclasses.replace(texts, block_size=texts.block_size or min(1024, limit))
    if texts.block_size > limit:
        raise BadInput(
            f"block_size is {texts.block_size}, more than the max_position_embeddings of "
            f"{model.config_name}; allowed are 2 to {limit}"
        )
    _check_tensor_axis(model, config)
    fsdp = load_fsdp_config(training.fsdp_config) if training.fsdp_config else FsdpConfig()
    return Arguments(model, texts, training, config, fsdp)


def validate(argv: list[str], environ: Mapping[str, str] = os.environ) -> Arguments:
    """Return ``parse(argv)`` after every check that needs neither device nor network.

    ``environ`` tells how many devices there will be: PJRT_DEVICE, with CPU_NUM_DEVICES or
    TPU_ACCELERATOR_TYPE. Where it does not, call check_devices once it is known. Raises BadInput.
    """
    arguments = parse(argv)
    profile(environ)
    _check_texts(arguments)
    devices, chip = _devices(environ)
    if devices:
        check_devices(arguments, devices, slices(environ), chip)
    return arguments


def _check_combinations(
    model: ModelArguments, texts: DataArguments, training: TrainingArguments
) -> None:
    modes = [f"--{mode}" for mode in get_args(ExpertsMode) if getattr(model, mode)]
    if len(modes) > 1:
        raise BadInput(
            f"{' and '.join(modes)} are given together, but the experts run in one mode; give one "
            f"of --{', --'.join(get_args(ExpertsMode))}, or none for gmm"
        )
    if model.spmd_2d_sharding and training.fsdp:
        raise BadInput(
            f"--spmd_2d_sharding {model.spmd_2d_sharding} and --fsdp {training.fsdp} are given "
            "together; 2D sharding splits over both axes by itself: give one of them"
        )
    if texts.dataset_name and texts.train_file:
        raise BadInput(
            f"--dataset_name {texts.dataset_name} and --train_file {texts.train_file} are given "
            "together; give one of them"
        )
    if not texts.dataset_name and not texts.train_file:
        raise BadInput(
            "no training text: give --dataset_name or --train_file; "
            f"--dataset_name {PYTHON_HELP} needs no download"
        )
    if texts.streaming and not (model.tokenizer_name and training.max_steps > 0):
        missing = "--tokenizer_name" if training.max_steps > 0 else "--max_steps"
        raise BadInput(
            f"--streaming is given without {missing}: before a text was read to its end, no "
            "tokenizer can be trained on it, and the steps of an epoch are unknown; give "
            f"{missing}, or leave --streaming out"
        )
    if not training.do_train:
        raise BadInput("nothing to do: --do_train is missing, and the trainer only trains; add it")
    eval_batch, reports = training.per_device_eval_batch_size, training.report_to == "tensorboard"
    warms_up, saves = training.lr_scheduler_type != "constant", training.save_strategy == "steps"
    scheduler = "--lr_scheduler_type constant_with_warmup"
    of_hub = texts.dataset_name not in ("", PYTHON_HELP)
    for flag, value, used, needed in (
        ("validation_file", texts.validation_file, training.evaluates, "--do_eval"),
        ("per_device_eval_batch_size", eval_batch, training.evaluates, "--do_eval"),
        ("eval_steps", training.eval_steps, training.evaluate_every, "--eval_strategy steps"),
        ("logging_dir", training.logging_dir, reports, "--report_to tensorboard"),
        ("checkpoint_bucket", training.checkpoint_bucket, saves, "--save_strategy steps"),
        ("save_total_limit", training.save_total_limit, saves, "--save_strategy steps"),
        ("dataset_config_name", texts.dataset_config_name, of_hub, "--dataset_name of the hub"),
        ("warmup_steps", training.warmup_steps, warms_up, scheduler),
        ("warmup_ratio", training.warmup_ratio, warms_up, scheduler),
    ):
        if value and not used:
            raise BadInput(
                f"--{flag} {value} would be ignored without {needed}; give that as well, or neither"
            )
    addresses = [("checkpoint_bucket", training.checkpoint_bucket)]
    if "://" in (training.resume_from_checkpoint or ""):
        addresses.append(("resume_from_checkpoint", training.resume_from_checkpoint))
    for flag, address in addresses:
        if address and not _BUCKET.fullmatch(address):
            raise BadInput(
                f"{flag} is {address!r}; a place in a bucket is gs://<bucket>/<path>, with the "
                "bucket in lower case. Without a bucket, checkpoints are in output_dir"
            )
    if training.warmup_ratio > 1:
        raise BadInput(
            f"warmup_ratio is {training.warmup_ratio}; it is a share of all steps, 0 to 1"
        )
    if texts.validation_split_percentage > 99:
        raise BadInput(
            f"validation_split_percentage is {texts.validation_split_percentage}; allowed are 1 to "
            "99, for something must be left to train on"
        )
    if training.max_steps < 1 and training.num_train_epochs == 0:
        raise BadInput("nothing to do: num_train_epochs is 0; set it, or max_steps, above 0")
    earlier = [training.output_dir / "metrics.jsonl", *training.output_dir.glob("checkpoint-*")]
    replaced = training.overwrite_output_dir or training.continues
    if any(path.exists() for path in earlier) and not replaced:
        raise BadInput(
            f"output_dir {training.output_dir} holds an earlier run; give another directory, "
            "--overwrite_output_dir to replace it, or --resume_from_checkpoint auto to continue it"
        )


def _config_of(name_or_path: str) -> Path:
    """Return the config.json of a model's directory."""
    if not name_or_path:
        raise BadInput(
            "--config_name missing; give it, or a model's directory as --model_name_or_path"
        )
    path = Path(name_or_path).expanduser() / "config.json"
    if not path.is_file():
        raise BadInput(
            f"model_name_or_path is {name_or_path!r}, and there is no {path} here; give "
            "--config_name as well, or the directory of a model with its config.json"
        )
    return path


def _check_tensor_axis(model: ModelArguments, config: Mapping[str, Any]) -> None:
    """Raise BadInput unless what ``spmd_2d_sharding`` splits can be split so."""
    split = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    for key in split:
        if config[key] % model.tensor_devices:
            possible = math.gcd(*(config[key] for key in split))
            raise BadInput(
                f"spmd_2d_sharding is {model.spmd_2d_sharding}, which does not divide {key} "
                f"{config[key]} of {model.config_name}; allowed are the divisors of {possible}"
            )


def _check_texts(arguments: Arguments) -> None:
    """Raise BadInput if the local text cannot fill one block, or its vocabulary cannot be built."""
    vocab_size = arguments.config["vocab_size"]
    smallest = data.BYTE_ALPHABET + len(data.SPECIAL_TOKENS)
    if not arguments.model.tokenizer_name and vocab_size < smallest:
        raise BadInput(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}. Raise "
            f"it in {arguments.model.config_name}, or give --tokenizer_name"
        )
    for flag in ("train_file", "validation_file"):
        path = getattr(arguments.data, flag)
        if path and path.suffix == ".parquet":
            check_parquet(path, flag)
        elif path:
            # No token is shorter than a byte.
            size = sum(len(text.encode()) for text in read_texts(path, flag))
            data.check_fills_block(path, size, "bytes", arguments.data.block_size)


def profile(environ: Mapping[str, str] = os.environ) -> Profile:
    """Return when and where a profile is to be taken, as the guide's PROFILE_* variables say."""

    def number(name: str, default: int) -> int:
        text = environ.get(name) or str(default)
        if not text.isdecimal():
            raise BadInput(f"{name} is {text!r}; it must be a whole number, at least 0")
        return int(text)

    directory = environ.get("PROFILE_LOGDIR", "")
    if "://" in directory:
        raise BadInput(
            f"PROFILE_LOGDIR is {directory!r}; profiles are written to a directory of the host: "
            "give one, and copy it from there"
        )
    return Profile(
        number("PROFILE_EPOCH", 0),
        number("PROFILE_STEP", 3),
        number("PROFILE_DURATION_MS", 20000),
        directory,
    )


def slices(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many slices train together, as MEGASCALE_NUM_SLICES says."""
    count = environ.get("MEGASCALE_NUM_SLICES") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise BadInput(f"MEGASCALE_NUM_SLICES is {count!r}; it must be a whole number, at least 1")
    return int(count)


def _devices(environ: Mapping[str, str]) -> tuple[int | None, tpu.Chip | None]:
    """Return how many devices ``environ`` promises, None if it does not say, and their chip."""
    if environ.get("XLA_USE_SPMD", "1") != "1":
        raise BadInput(
            f"XLA_USE_SPMD is {environ['XLA_USE_SPMD']!r}; this trainer always runs under SPMD: "
            "set it to 1, or leave it out"
        )
    device = environ.get("PJRT_DEVICE")
    if device == "CPU":
        count = environ.get("CPU_NUM_DEVICES", "1")
        if not count.isdecimal() or int(count) < 1:
            raise BadInput(f"CPU_NUM_DEVICES is {count!r}; it must be a whole number, at least 1")
        return int(count), None
    if device not in ("TPU", "", None):
        raise BadInput(
            f"PJRT_DEVICE is {device!r}; set it to CPU or TPU, which the trainer runs on"
        )
    if not device or not environ.get("TPU_ACCELERATOR_TYPE"):
        return None, None
    try:
        chip, chips, _ = tpu.parse_accelerator_type(environ["TPU_ACCELERATOR_TYPE"])
    except ValueError as error:
        raise BadInput(f"TPU_ACCELERATOR_TYPE: {error}") from error
    return chips * slices(environ), chip


def check_devices(
    arguments: Arguments, devices: int, slices: int = 1, chip: tpu.Chip | None = None
) -> None:
    """Raise BadInput unless ``devices`` devices, of all slices, share batch and weights evenly.

    With ``chip``, each slice is one of that chip and the message speaks of slices.
    """
    batch = arguments.training.per_device_train_batch_size
    hidden = arguments.config["hidden_size"]
    tensor = arguments.model.tensor_devices

    def name(count: int) -> str:
        type_ = f" ({chip.accelerator_type(count // slices)})" if chip else ""
        return f"{count} devices{type_}"

    def shares(count: int) -> tuple[int, int]:
        """Return into how many parts a weight's hidden size and the batch are split."""
        return count // slices // tensor, count // tensor

    def fits(count: int) -> bool:
        weight, rows = shares(count)
        return count % (slices * tensor) == 0 and hidden % weight == 0 and batch % rows == 0

    counts = [n * slices for n in chip.slice_chips] if chip else range(1, devices + 1)
    fitting = [count for count in counts if count <= devices and fits(count)]
    largest = f"The largest slice that this batch fits: {name(max(fitting)) if fitting else 'none'}"
    if devices % (slices * tensor):
        raise BadInput(
            f"spmd_2d_sharding is {tensor}, which does not divide the {name(devices // slices)} of "
            "a slice; give a divisor"
        )
    weight, rows = shares(devices)
    over = f" in groups of {tensor} (spmd_2d_sharding)" if tensor > 1 else ""
    if hidden % weight:
        raise BadInput(
            f"hidden_size is {hidden}, which {name(devices)}{over} do not divide; the weights are "
            f"split along it into {weight} parts, and the global batch is {batch}. {largest}"
        )
    if batch % rows:
        below = batch // rows * rows
        nearest = f"{below} and {below + rows}" if below else f"{rows}"
        raise BadInput(
            f"per_device_train_batch_size, the global batch, is {batch} sequences, which "
            f"{name(devices)}{over} do not divide. Nearest batches that work: {nearest}. {largest}"
        )
    evaluated = arguments.training.eval_batch
    if arguments.training.evaluates and evaluated % rows:
        raise BadInput(
            f"per_device_eval_batch_size, the global batch of an evaluation, is {evaluated} "
            f"sequences, which {name(devices)}{over} do not divide; give a multiple of {rows}"
        )

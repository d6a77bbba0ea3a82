"""The trainer's flags, as Hugging Face's ``run_clm.py`` has them, and every check of user input.

Imports neither torch nor transformers: ``--validate`` runs on the controller, on a bare Python,
before anything is launched.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from trainer import data, tpu
from trainer.config import FsdpConfig, load_config, load_fsdp_config
from trainer.flags import AtLeast, BadInput, parse_flags

__all__ = ["Arguments", "BadInput", "check_devices", "parse", "validate"]

ExpertsMode = Literal["gmm", "gmm_stack", "static"]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is trained"""

    config_name: Annotated[Path, "the model's config.json"]
    tokenizer_name: Annotated[
        str,
        "a tokenizer's name on the Hugging Face hub, or its directory; without one, a byte-level "
        "BPE of the model's vocab_size is trained on the training text",
    ] = ""
    cache_dir: Annotated[Path | None, "where downloads are kept"] = None
    torch_dtype: Annotated[Literal["float32", "bfloat16"], "type of the weights"] = "float32"
    flash_attention: Annotated[bool, "use the Pallas flash attention kernel"] = False
    gmm: Annotated[bool, "experts as grouped matmuls; the default of the three modes"] = False
    gmm_stack: Annotated[bool, "gmm on weights kept per expert, for debugging"] = False
    static: Annotated[bool, "every expert on every token, as a baseline"] = False

    @property
    def experts_mode(self) -> ExpertsMode:
        """The one mode that the experts run in."""
        return next((mode for mode in get_args(ExpertsMode) if getattr(self, mode)), "gmm")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What it is trained on"""

    dataset_name: Annotated[
        str,
        f"a dataset's name on the Hugging Face hub, or {data.PYTHON_HELP}: the text of Python's "
        "own help topics, which needs no download",
    ] = ""
    dataset_config_name: Annotated[str, "the configuration of that dataset"] = ""
    train_file: Annotated[Path | None, f"a text instead of a dataset: {data.TEXT_FILES}"] = None
    block_size: Annotated[
        int,
        "tokens in a sequence (default: 1024, or max_position_embeddings if that is less)",
        AtLeast(2),
    ] = 0  # parse fills it in


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How it is trained"""

    output_dir: Annotated[Path, "where metrics.jsonl and summary.json are written"]
    overwrite_output_dir: Annotated[bool, "replace an earlier run in output_dir"] = False
    do_train: Annotated[bool, "train; nothing else can be asked for"] = False
    validate: Annotated[bool, "check all input and stop"] = False
    per_device_train_batch_size: Annotated[
        int, "the GLOBAL batch, in sequences: under SPMD the slice is one device", AtLeast(1)
    ] = 8
    max_steps: Annotated[int, "steps; above 0 it overrides num_train_epochs", AtLeast(-1)] = -1
    num_train_epochs: Annotated[float, "passes over the data", AtLeast(0)] = 3.0
    optim: Annotated[Literal["adafactor"], "the optimizer"] = "adafactor"
    learning_rate: Annotated[float, "the highest of the schedule", AtLeast(0)] = 5e-5
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "constant"], "how the learning rate goes on after warm-up"
    ] = "linear"
    warmup_steps: Annotated[int, "steps in which the learning rate rises from 0", AtLeast(0)] = 0
    max_grad_norm: Annotated[float, "clip the gradient's norm to this; 0: do not", AtLeast(0)] = 1.0
    seed: Annotated[int, "of the initial weights and the order of the data", AtLeast(0)] = 42
    save_strategy: Annotated[Literal["no"], "when to save checkpoints"] = "no"
    logging_strategy: Annotated[Literal["no", "steps"], "when to print a line"] = "steps"
    logging_steps: Annotated[int, "print a line every so many steps", AtLeast(1)] = 1
    fsdp: Annotated[
        Literal["full_shard"], "shard every parameter over all devices; there is no other way yet"
    ] = "full_shard"
    fsdp_config: Annotated[Path | None, "the fsdp_config.json"] = None
    dataloader_drop_last: Annotated[
        bool, "drop an epoch's incomplete last batch, do not complete it from the epoch's beginning"
    ] = False


@dataclass(frozen=True)
class Arguments:
    """All flags, and what stands in the two JSON files they name; ``config`` is config.json."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    config: dict[str, Any]
    fsdp: FsdpConfig


def parse(argv: list[str]) -> Arguments:
    """Return the flags in ``argv`` with both JSON files loaded and block_size filled in.

    Raises BadInput for a flag, a value, a combination or a JSON file that cannot work.
    """
    groups = (ModelArguments, DataArguments, TrainingArguments)
    model, texts, training = parse_flags(argv, "python -m trainer", groups)
    _check_combinations(model, texts, training)
    config = load_config(model.config_name)
    limit = config["max_position_embeddings"]
    texts = dataclasses.replace(texts, block_size=texts.block_size or min(1024, limit))
    if texts.block_size > limit:
        raise BadInput(
            f"block_size is {texts.block_size}, more than the max_position_embeddings of "
            f"{model.config_name}; allowed are 2 to {limit}"
        )
    fsdp = load_fsdp_config(training.fsdp_config) if training.fsdp_config else FsdpConfig()
    return Arguments(model, texts, training, config, fsdp)


def validate(argv: list[str], environ: Mapping[str, str] = os.environ) -> Arguments:
    """Return ``parse(argv)`` after every check that needs neither device nor network.

    ``environ`` tells how many devices there will be: PJRT_DEVICE, with CPU_NUM_DEVICES or
    TPU_ACCELERATOR_TYPE. Where it does not, call check_devices once it is known. Raises BadInput.
    """
    arguments = parse(argv)
    data.check(arguments)
    devices, chip = _devices(environ)
    if devices:
        check_devices(arguments, devices, chip)
    return arguments


def check_devices(arguments: Arguments, devices: int, chip: tpu.Chip | None = None) -> None:
    """Raise BadInput unless ``devices`` devices can share batch and weights evenly.

    With ``chip``, the devices are a slice of that chip and the message speaks of slices.
    """
    batch = arguments.training.per_device_train_batch_size
    hidden = arguments.config["hidden_size"]

    def name(count: int) -> str:
        return f"{count} devices" + (f" ({chip.accelerator_type(count)})" if chip else "")

    counts = chip.slice_chips if chip else range(1, devices + 1)
    fitting = [n for n in counts if n <= devices and hidden % n == 0 and batch % n == 0]
    largest = f"The largest slice that this batch fits: {name(max(fitting)) if fitting else 'none'}"
    if hidden % devices:
        raise BadInput(
            f"hidden_size is {hidden}, which {name(devices)} do not divide; the weights are "
            f"sharded along it, and the global batch is {batch}. {largest}"
        )
    if batch % devices:
        below = batch // devices * devices
        nearest = f"{below} and {below + devices}" if below else f"{devices}"
        raise BadInput(
            f"per_device_train_batch_size, the global batch, is {batch} sequences, which "
            f"{name(devices)} do not divide. Nearest batches that work: {nearest}. {largest}"
        )


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
            raise BadInput(f"CPU_NUM_DEVICES is {count!r}; it must be a number, at least 1")
        return int(count), None
    if device not in ("TPU", "", None):
        raise BadInput(f"PJRT_DEVICE is {device!r}; this trainer runs on CPU or TPU")
    if not device or not environ.get("TPU_ACCELERATOR_TYPE"):
        return None, None
    try:
        chip, chips, _ = tpu.parse_accelerator_type(environ["TPU_ACCELERATOR_TYPE"])
    except ValueError as error:
        raise BadInput(f"TPU_ACCELERATOR_TYPE: {error}") from error
    return chips, chip


def _check_combinations(
    model: ModelArguments, texts: DataArguments, training: TrainingArguments
) -> None:
    modes = [f"--{mode}" for mode in get_args(ExpertsMode) if getattr(model, mode)]
    if len(modes) > 1:
        raise BadInput(
            f"{' and '.join(modes)} are given together, but the experts run in one mode; give one "
            f"of --{', --'.join(get_args(ExpertsMode))}, or none for gmm"
        )
    if texts.dataset_name and texts.train_file:
        raise BadInput(
            f"--dataset_name {texts.dataset_name} and --train_file {texts.train_file} are given "
            "together; give one of them"
        )
    if not texts.dataset_name and not texts.train_file:
        raise BadInput(
            "no training text: give --dataset_name or --train_file; "
            f"--dataset_name {data.PYTHON_HELP} needs no download"
        )
    if not training.do_train:
        raise BadInput("nothing to do: --do_train is missing, and training is all there is; add it")
    if training.max_steps < 1 and training.num_train_epochs == 0:
        raise BadInput("nothing to do: num_train_epochs is 0; set it, or max_steps, above 0")
    if (training.output_dir / "metrics.jsonl").exists() and not training.overwrite_output_dir:
        raise BadInput(
            f"output_dir {training.output_dir} holds an earlier run; give another directory, or "
            "--overwrite_output_dir to replace it"
        )

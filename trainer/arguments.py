"""The trainer's flags, as Hugging Face's ``run_clm.py`` has them: type, default, choices, help.

Imports neither torch nor transformers, and reads no file. What flags may not be together, and what
they may not be for some data or devices, is in trainer.validation.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from trainer.config import FsdpConfig
from trainer.flags import AtLeast

PYTHON_HELP = "python-help"
TEXT_FILES = (
    'a .txt, or a .json or .jsonl with one object {"text": ...} a line, in UTF-8, or a .parquet '
    "with a column text, or else with texts in its first one"
)
ExpertsMode = Literal["gmm", "gmm_stack", "static"]
NEWEST = ("auto", "must")  # in place of a checkpoint: the newest


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is trained"""

    config_name: Annotated[
        Path | None, "the model's config.json (default: the one in model_name_or_path)"
    ] = None  # parse fills it in
    model_name_or_path: Annotated[
        str,
        "weights to begin with, in Hugging Face's safetensors: a directory, or a name on the hub; "
        "without them, random ones",
    ] = ""
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
    spmd_2d_sharding: Annotated[
        int,
        "also split heads and experts over so many devices, so that the mesh is (devices/N, N); "
        "conflicts with --fsdp",
        AtLeast(0),
    ] = 0

    @property
    def tensor_devices(self) -> int:
        """Over how many devices heads and experts are split."""
        return self.spmd_2d_sharding or 1

    @property
    def experts_mode(self) -> ExpertsMode:
        """The one mode that the experts run in."""
        return next((mode for mode in get_args(ExpertsMode) if getattr(self, mode)), "gmm")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """What it is trained on"""

    dataset_name: Annotated[
        str,
        f"a dataset's name on the Hugging Face hub, or {PYTHON_HELP}: the text of Python's "
        "own help topics, which needs no download",
    ] = ""
    dataset_config_name: Annotated[str, "the configuration of that dataset"] = ""
    train_file: Annotated[Path | None, f"a text instead of a dataset: {TEXT_FILES}"] = None
    validation_file: Annotated[
        Path | None,
        "a text to evaluate on (default: the dataset's validation split, or, where it has none, "
        "the first validation_split_percentage of the training text, which is then not trained on)",
    ] = None
    validation_split_percentage: Annotated[
        int, "how many percent of its texts that is", AtLeast(1)
    ] = 5
    block_size: Annotated[
        int,
        "tokens in a sequence (default: 1024, or max_position_embeddings if that is less)",
        AtLeast(2),
    ] = 0  # parse fills it in
    streaming: Annotated[
        bool,
        "tokenize as the run goes, and keep nothing; needs --max_steps and --tokenizer_name",
    ] = False
    preprocessing_num_workers: Annotated[
        int | None, "how many threads tokenize (default: one for each core)", AtLeast(1)
    ] = None
    reset_attention_mask: Annotated[
        bool, "hide the documents that a sequence is packed from from each other"
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How it is trained"""

    output_dir: Annotated[Path, "where metrics.jsonl, summary.json and checkpoints are written"]
    checkpoint_bucket: Annotated[
        str,
        "gs://bucket/path: where checkpoints are written in place of output_dir, by all hosts; a "
        "path for each run",
    ] = ""
    overwrite_output_dir: Annotated[
        bool, "replace an earlier run in output_dir, unless it is the one that is resumed"
    ] = False
    do_train: Annotated[bool, "train; there is no run without"] = False
    do_eval: Annotated[bool, "evaluate: loss and perplexity of the validation text, at the end"] = (
        False
    )
    eval_strategy: Annotated[
        Literal["no", "steps"] | None,
        "steps: evaluate every eval_steps as well, also without do_eval",
    ] = None
    eval_steps: Annotated[
        int | None, "evaluate every so many steps (default: logging_steps)", AtLeast(1)
    ] = None
    validate: Annotated[bool, "check all input and stop"] = False
    per_device_train_batch_size: Annotated[
        int, "the GLOBAL batch, in sequences: under SPMD the slice is one device", AtLeast(1)
    ] = 8
    per_device_eval_batch_size: Annotated[
        int | None, "the GLOBAL batch of an evaluation (default: that of training)", AtLeast(1)
    ] = None
    gradient_accumulation_steps: Annotated[
        int,
        "batches that make one step: its gradient is their mean, its memory that of one",
        AtLeast(1),
    ] = 1
    max_steps: Annotated[int, "steps; above 0 it overrides num_train_epochs", AtLeast(-1)] = -1
    num_train_epochs: Annotated[float, "passes over the data", AtLeast(0)] = 3.0
    optim: Annotated[Literal["adafactor"], "the optimizer"] = "adafactor"
    learning_rate: Annotated[float, "the highest of the schedule", AtLeast(0)] = 5e-5
    weight_decay: Annotated[
        float, "what weights lose of themselves at a step, times the learning rate", AtLeast(0)
    ] = 0.0
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "inverse_sqrt", "constant", "constant_with_warmup"],
        "how the learning rate goes on after warm-up",
    ] = "linear"
    warmup_steps: Annotated[int, "steps in which the learning rate rises from 0", AtLeast(0)] = 0
    warmup_ratio: Annotated[
        float, "the same as a share of all steps, where warmup_steps is 0", AtLeast(0)
    ] = 0.0
    max_grad_norm: Annotated[float, "clip the gradient's norm to this; 0: do not", AtLeast(0)] = 1.0
    seed: Annotated[int, "of the initial weights and the order of the data", AtLeast(0)] = 42
    save_strategy: Annotated[
        Literal["no", "steps"],
        "steps: save a checkpoint every save_steps, at the end, and on SIGTERM; and the model at "
        "the end",
    ] = "no"
    save_steps: Annotated[int, "save a checkpoint every so many steps", AtLeast(1)] = 500
    save_total_limit: Annotated[
        int | None, "how many checkpoints to keep (default: all)", AtLeast(1)
    ] = None
    resume_from_checkpoint: Annotated[
        str | None,
        "a checkpoint, in a directory or a bucket; or the newest of this run: must, or auto, which "
        "is a fresh start if there is none",
    ] = None
    logging_strategy: Annotated[Literal["no", "steps"], "when to print a line"] = "steps"
    logging_steps: Annotated[int, "print a line every so many steps", AtLeast(1)] = 1
    report_to: Annotated[Literal["none", "tensorboard"], "where else metrics are written"] = "none"
    logging_dir: Annotated[
        Path | None, "TensorBoard's directory (default: tensorboard in output_dir)"
    ] = None
    fsdp: Annotated[
        Literal["full_shard"] | None,
        "shard every parameter over all devices; without --spmd_2d_sharding there is no other way",
    ] = None
    fsdp_config: Annotated[Path | None, "the fsdp_config.json"] = None
    dataloader_drop_last: Annotated[
        bool, "drop an epoch's incomplete last batch, do not complete it from the epoch's beginning"
    ] = False

    @property
    def global_batch(self) -> int:
        """How many sequences a step trains on."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def eval_batch(self) -> int:
        """How many sequences are evaluated at once."""
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.do_eval or self.eval_strategy == "steps"

    @property
    def evaluate_every(self) -> int | None:
        """After how many steps the model is evaluated; None: only at the end, if at all."""
        return (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else None

    def warmup(self, max_steps: int) -> int:
        """Return in how many of all steps the learning rate rises."""
        return self.warmup_steps or math.ceil(max_steps * self.warmup_ratio)

    @property
    def continues(self) -> bool:
        """Whether the run that is resumed is the earlier one of the same output_dir, or bucket."""
        resumed = self.resume_from_checkpoint
        if not resumed or resumed in NEWEST:
            return bool(resumed)
        if self.checkpoint_bucket:
            return resumed.rstrip("/").rpartition("/")[0] == self.checkpoint_bucket.rstrip("/")
        return Path(resumed).expanduser().resolve().parent == self.output_dir.resolve()


@dataclass(frozen=True)
class Profile:
    """The guide's profile: of which epoch, after which step, how long, where; "" for none."""

    epoch: int
    step: int
    duration_ms: int
    directory: str


@dataclass(frozen=True)
class Arguments:
    """All flags, and what stands in the two JSON files they name; ``config`` is config.json."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    config: dict[str, Any]
    fsdp: FsdpConfig

"""The trainer's flags, as Hugging Face's ``run_clm.py`` has them: type, default, choices, help.

From these annotations ``make docs`` writes what else lists the flags. Imports neither torch nor
transformers, and reads no file. What flags may not be together, and what they may not be for some
data or devices, is in trainer.validation.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from .config import FsdpConfig
from .flags import Alias, AtLeast, Guide

PYTHON_HELP = "python-help"
TEXT_FILES = (
    'a .txt, or a .json or .jsonl with one object {"text": ...} a line, in UTF-8, or a .parquet '
    "with texts in its column text or, where there is none, in its first column"
)
ExpertsMode = Literal["gmm", "gmm_stack", "static"]
NEWEST = ("auto", "must")  # in place of a checkpoint: the newest


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Model"""

    config_name: Annotated[
        Path | None, "The model's `config.json`. Default: the one in `model_name_or_path`."
    ] = None  # parse fills it in
    model_name_or_path: Annotated[
        str,
        "Pretrained weights to start from, in Hugging Face's safetensors format: a model's name on "
        "the hub, or a directory where the trainer runs. Without it, weights are initialized at "
        "random.",
    ] = ""
    tokenizer_name: Annotated[
        str,
        "The tokenizer: a name on the Hugging Face hub, or a directory where the trainer runs. "
        "Without it, a byte-level BPE of the model's `vocab_size` is trained on the training text.",
        Guide("mistralai/Mixtral-8x7B-v0.1"),
    ] = ""
    cache_dir: Annotated[Path | None, "Directory for downloads."] = None
    torch_dtype: Annotated[
        Literal["float32", "bfloat16"], "Data type of the weights.", Guide("bfloat16")
    ] = "float32"
    flash_attention: Annotated[bool, "Use the Pallas flash attention kernel.", Guide(True)] = False
    gmm: Annotated[
        bool,
        "Compute the experts as grouped matrix multiplications, by Pallas Megablox on a TPU. At "
        "most one of `gmm`, `gmm_stack` and `static` can be on; when none is, it is `gmm`.",
    ] = False
    gmm_stack: Annotated[
        bool, "Like `gmm`, with separate weights for each expert, for debugging. Much slower."
    ] = False
    static: Annotated[bool, "Compute every expert on every token, as a baseline. Much slower."] = (
        False
    )
    spmd_2d_sharding: Annotated[
        int,
        "Also split attention heads and experts over this many devices (N), so that the mesh is "
        "(devices/N, N). Conflicts with `fsdp`. 0 shards over one axis alone.",
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
    """Data"""

    dataset_name: Annotated[
        str,
        f"A dataset's name on the Hugging Face hub, or `{PYTHON_HELP}`: the text of Python's own "
        "help topics, which needs no download.",
    ] = ""
    dataset_config_name: Annotated[str, "The dataset's configuration, by its name on the hub."] = ""
    train_file: Annotated[
        Path | None,
        "A text file to train on instead of a dataset, on the machine where the command is given: "
        f"{TEXT_FILES}.",
    ] = None
    validation_file: Annotated[
        Path | None,
        "A text file to evaluate on, of the same formats as `train_file`. Default: the dataset's "
        "validation split, or, where it has none, the first `validation_split_percentage` of the "
        "training text, which is then not trained on.",
    ] = None
    validation_split_percentage: Annotated[
        int,
        "How many percent of the training text are held out for evaluation, where there is no "
        "validation text.",
        AtLeast(1),
    ] = 5
    block_size: Annotated[
        int | None,
        "Tokens in a sequence. Default: 1024, or the model's `max_position_embeddings` if that is "
        "less.",
        AtLeast(2),
        Guide(4096),
    ] = None  # parse fills it in
    streaming: Annotated[
        bool,
        "Tokenize while training and keep nothing on disk, for a dataset larger than that. Needs "
        "`max_steps` and `tokenizer_name`.",
    ] = False
    preprocessing_num_workers: Annotated[
        int | None, "Number of threads that tokenize. Default: one for each core.", AtLeast(1)
    ] = None
    reset_attention_mask: Annotated[
        bool,
        "Hide documents that are packed into the same sequence from each other. A document is a "
        "row of the dataset, or a line of a `.txt`.",
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Training"""

    output_dir: Annotated[Path, "Directory for `metrics.jsonl`, `summary.json` and checkpoints."]
    checkpoint_bucket: Annotated[
        str,
        "Where all hosts write checkpoints, instead of `output_dir`: `gs://bucket/path`, a path "
        "for each run.",
    ] = ""
    overwrite_output_dir: Annotated[
        bool,
        "Replace an earlier run in the output directory, unless it is the one that is resumed.",
        Guide(True),
    ] = False
    do_train: Annotated[
        bool, "Train. Always needed: the trainer does nothing else.", Guide(True)
    ] = False
    do_eval: Annotated[bool, "Evaluate at the end: loss and perplexity of the validation text."] = (
        False
    )
    eval_strategy: Annotated[
        Literal["no", "steps"] | None,
        "`steps` evaluates every `eval_steps` steps as well, also without `do_eval`.",
    ] = None
    eval_steps: Annotated[
        int | None, "Steps between two evaluations. Default: `logging_steps`.", AtLeast(1)
    ] = None
    validate: Annotated[bool, "Check all input and stop."] = False
    per_device_train_batch_size: Annotated[
        int,
        "The global batch size in sequences, over all devices: under SPMD the whole slice is one "
        "device.",
        AtLeast(1),
        Guide(32),
        Alias("global_batch"),
    ] = 8
    per_device_eval_batch_size: Annotated[
        int | None,
        "The global batch size of an evaluation in sequences, over all devices. Default: that of "
        "training.",
        AtLeast(1),
    ] = None
    gradient_accumulation_steps: Annotated[
        int,
        "Batches in one optimizer step. Gradients are averaged over them, and memory is that of "
        "one batch; the step's program and its compile time are so many times as long.",
        AtLeast(1),
    ] = 1
    max_steps: Annotated[
        int, "Steps to train. Above 0 it overrides `num_train_epochs`.", AtLeast(-1), Guide(10)
    ] = -1
    num_train_epochs: Annotated[float, "Passes over the training data.", AtLeast(0)] = 3.0
    optim: Annotated[Literal["adafactor"], "The optimizer."] = "adafactor"
    learning_rate: Annotated[float, "The peak learning rate.", AtLeast(0)] = 5e-5
    weight_decay: Annotated[
        float,
        "Decoupled weight decay: a step reduces weights by this times the learning rate. Norms are "
        "not decayed.",
        AtLeast(0),
    ] = 0.0
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "inverse_sqrt", "constant", "constant_with_warmup"],
        "The learning rate's schedule after warm-up.",
    ] = "linear"
    warmup_steps: Annotated[
        int, "Steps over which the learning rate rises from 0 to its peak.", AtLeast(0)
    ] = 0
    warmup_ratio: Annotated[
        float, "Warm-up as a share of all steps, 0 to 1, where `warmup_steps` is 0.", AtLeast(0)
    ] = 0.0
    max_grad_norm: Annotated[
        float, "Clip the gradient's norm to this. 0 does not clip.", AtLeast(0)
    ] = 1.0
    seed: Annotated[
        int, "Random seed of the initial weights and of the order of the data.", AtLeast(0)
    ] = 42
    save_strategy: Annotated[
        Literal["no", "steps"],
        "`steps` saves a checkpoint every `save_steps` steps, at the end and on SIGTERM, and the "
        "model at the end.",
    ] = "no"
    save_steps: Annotated[int, "Steps between two checkpoints.", AtLeast(1)] = 500
    save_total_limit: Annotated[
        int | None, "How many checkpoints to keep, the newest. Default: all of them.", AtLeast(1)
    ] = None
    resume_from_checkpoint: Annotated[
        str | None,
        "A checkpoint to resume from: a directory where the trainer runs, a `gs://` address, or "
        "the newest one of this run, as `must`, or as `auto`, which starts anew if there is none.",
    ] = None
    logging_strategy: Annotated[
        Literal["no", "steps"],
        "`steps` prints a line every `logging_steps` steps. `metrics.jsonl` has every step in any "
        "case.",
        Guide("no"),
    ] = "steps"
    logging_steps: Annotated[int, "Steps between two printed lines.", AtLeast(1)] = 1
    report_to: Annotated[
        Literal["none", "tensorboard"],
        "Where metrics are written as well: `tensorboard` writes TensorBoard's event files.",
    ] = "none"
    logging_dir: Annotated[
        Path | None,
        "Directory for TensorBoard's event files. Default: `tensorboard` in the output directory.",
    ] = None
    fsdp: Annotated[
        Literal["full_shard"] | None,
        "`full_shard` shards every parameter over all devices, which is also what happens without "
        "it, unless `spmd_2d_sharding` is given.",
    ] = None
    fsdp_config: Annotated[Path | None, "The `fsdp_config.json`, which says how to shard."] = None
    dataloader_drop_last: Annotated[
        bool,
        "Drop an epoch's incomplete last batch instead of completing it from the epoch's "
        "beginning.",
        Guide(True),
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


GROUPS = (ModelArguments, DataArguments, TrainingArguments)
# Flags that change nothing about the compiled step: a plan holds for all of their values.
NOT_COMPILED = (
    "tokenizer_name",
    "dataset_name",
    "dataset_config_name",
    "train_file",
    "validation_file",
    "validation_split_percentage",
    "checkpoint_bucket",
    "eval_strategy",
    "eval_steps",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "seed",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "logging_strategy",
    "logging_steps",
    "logging_dir",
    "report_to",
)


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

"""One training run, from its arguments to the files in its output directory.

Importing this module imports torch_xla and JAX: validate the input and call ``start_client`` first.
"""

import dataclasses
import importlib.metadata
import json
import math
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch_xla.runtime as xr
from transformers import MixtralForCausalLM

from . import (
    attention,
    checkpoint,
    data,
    experts,
    loop,
    metrics,
    model,
    optimizer,
    profiling,
    storage,
    tpu,
    weights,
)
from .arguments import Arguments
from .config import ARCHITECTURE
from .sharding import AXES, local_rows, partition_spec, size
from .step import StepOptions, TrainStep, build_model
from .validation import check_devices, profile, slices

# The packages whose versions summary.json records
STACK = ("torch", "torch_xla", "transformers", "jax", "libtpu")


def run(arguments: Arguments) -> int:
    """Train as ``arguments`` say; return the process's exit code.

    Writes metrics.jsonl and summary.json into the output directory, and with ``--save_strategy
    steps`` checkpoints and the trained model. Raises BadInput for input that turns out to be wrong
    only with the devices, the hub or the files of earlier runs at hand.
    """
    training = arguments.training
    devices, chip = xr.global_runtime_device_count(), tpu.current_chip()
    check_devices(arguments, devices, slices(), chip)
    checkpoints = storage.at(training.checkpoint_bucket or training.output_dir)
    if training.checkpoint_bucket:
        print(f"checkpoints are in {checkpoints}", flush=True)
        checkpoints.check(new=not training.continues)
    text = data.stream(arguments) if arguments.data.streaming else data.blocks(arguments)
    batch, epoch_steps = training.global_batch, training.max_steps
    if not arguments.data.streaming:
        epoch_steps = data.steps_per_epoch(text, batch, training.dataloader_drop_last)
    max_steps = training.max_steps
    if max_steps < 1:
        max_steps = max(1, round(training.num_train_epochs * epoch_steps))

    options = StepOptions.from_arguments(arguments)
    mixtral = build_model(arguments.config, options, devices=devices, slices=slices())
    identity = _identity(arguments, options, text.crc32)
    train_step, first_step = _load_state(arguments, options, mixtral, checkpoints, identity)

    training.output_dir.mkdir(parents=True, exist_ok=True)
    # A run that continues an earlier one keeps its files, up to the step it resumes after.
    kept_steps = first_step if training.continues else 0
    checkpoint.remove_after(checkpoints, kept_steps)
    saver = None
    if training.save_strategy == "steps":
        saver = checkpoint.Saver(
            checkpoints,
            train_step.state,
            identity,
            every=training.save_steps,
            keep=training.save_total_limit,
        )
    summary = _summary(arguments, train_step, chip, max_steps) | {
        "bytes_per_token": text.bytes_per_token,
        "tokens_per_epoch": (
            None if arguments.data.streaming else epoch_steps * batch * arguments.data.block_size
        ),
        "evaluations": _evaluations(arguments, min(kept_steps, max_steps - 1)),
    }

    def write_summary(compilations: loop.Compilations | None = None) -> None:
        if compilations:
            summary["compile"] = dataclasses.asdict(compilations)
        # Under SPMD torch_xla cannot report how much memory of a TPU is in use.
        if xr.device_type() == "CPU":
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            summary["peak_memory_bytes"] = 1024 * peak_kib
        metrics.write_json(training.output_dir / "summary.json", summary)

    write_summary(loop.Compilations())
    print(_headline(summary), flush=True)
    with metrics.MetricsWriter(
        training.output_dir / "metrics.jsonl", kept_steps, _board(arguments, kept_steps)
    ) as writer:

        def evaluate(step: int) -> None:
            count, isolate = training.eval_batch, options.isolate_documents
            batches = data.validation_batches(text.validation, local_rows(count), count, isolate)
            loss = loop.evaluate(train_step, batches)
            evaluation = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            shown = (f"{name} {value:.4f}" for name, value in evaluation.items())
            print(f"evaluation after step {step}:", *shown)
            # At the number of the step before: a run that resumes after it keeps its scalars.
            writer.show(step - 1, "eval", **evaluation)
            summary["evaluations"].append({"step": step, **evaluation})
            write_summary()

        try:
            loop.train(
                train_step,
                _batches(arguments, options, text, first_step),
                writer,
                profiling.Profiler(profile(), epoch_steps, first_step, max_steps),
                saver,
                first_step=first_step,
                max_steps=max_steps,
                learning_rate=optimizer.schedule(
                    training.lr_scheduler_type,
                    training.learning_rate,
                    training.warmup(max_steps),
                    max_steps,
                ),
                log_every=training.logging_steps if training.logging_strategy == "steps" else 0,
                on_compile=write_summary,
                evaluate_every=training.evaluate_every,
                on_evaluate=evaluate,
            )
            if training.evaluates:
                evaluate(max_steps)
        except (loop.TrainingFailed, checkpoint.SaveFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except loop.Stopped as stopped:
            print(stopped, flush=True)
            return 128 + signal.SIGTERM
        finally:
            write_summary()
    if saver:
        weights.save(mixtral, text.tokenizer, training.output_dir)
        print(f"saved the model in {training.output_dir}", flush=True)
    return 0


def _identity(arguments: Arguments, options: StepOptions, text_crc32: int) -> dict[str, Any]:
    """Return the settings that must equal those of the run whose checkpoint is resumed."""
    training = arguments.training
    return {
        **{key: arguments.config.get(key) for key in ARCHITECTURE},
        "torch_dtype": options.dtype,
        "text_crc32": text_crc32,
        "block_size": arguments.data.block_size,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "dataloader_drop_last": training.dataloader_drop_last,
        "seed": training.seed,
        "reset_attention_mask": options.isolate_documents,
    }


def _load_state(
    arguments: Arguments,
    options: StepOptions,
    mixtral: MixtralForCausalLM,
    checkpoints: storage.Directory | storage.Bucket,
    identity: dict[str, Any],
) -> tuple[TrainStep, int]:
    """Give the model the weights of a checkpoint, published ones, or random ones.

    Returns the step with its optimizer state, and the number of steps already trained.
    """
    training = arguments.training
    resumed = checkpoint.find(training.resume_from_checkpoint, checkpoints)
    saved = checkpoint.Checkpoint(resumed, identity) if resumed else None
    if saved:
        model.load(mixtral, lambda name, shape: saved.read(name, shape, partition_spec(name)))
    elif name := arguments.model.model_name_or_path:
        directory = weights.fetch(name, arguments.model.cache_dir)
        model.load(mixtral, weights.Weights(directory).read)
    else:
        model.initialize(mixtral, training.seed)
    if not saved:
        return TrainStep(options, mixtral), 0
    train_step = TrainStep(options, mixtral, saved.read)
    saved.check(train_step.state)
    print(f"resuming from {resumed}, after step {saved.step}", flush=True)
    return train_step, saved.step


def _summary(
    arguments: Arguments, train_step: TrainStep, chip: tpu.Chip | None, max_steps: int
) -> dict[str, Any]:
    """Return the part of summary.json that is known before the first step and without the text."""
    mode, block_size = train_step.options.experts_mode, arguments.data.block_size
    total, active = metrics.parameter_counts(arguments.config)
    return {
        "model": {
            "name": arguments.config.get("_name_or_path") or arguments.model.config_name.stem,
            "params_total": total,
            "params_active": active,
            "block_size": block_size,
            "global_batch": arguments.training.global_batch,
        },
        "mesh": {axis: size(axis) for axis in AXES},
        "experts": {"mode": mode, "kernel": experts.kernel_of(mode)},
        "attention": {"kernel": attention.kernel_of(train_step.model.config, block_size)},
        "device": {
            "kind": chip.name if chip else xr.device_type(),
            "count": xr.global_runtime_device_count(),
            "hosts": xr.process_count(),
        },
        "stack": {name: importlib.metadata.version(name) for name in STACK},
        "model_flops_per_token": metrics.flops_per_token(arguments.config, block_size),
        "peak_flops_per_device": chip.peak_bf16_flops if chip else None,
        "max_steps": max_steps,
    }


def _headline(summary: dict[str, Any]) -> str:
    """Return one line on the model, its size, the devices, the kernels and the steps."""
    trained, device = summary["model"], summary["device"]
    return (
        f"{trained['name']}: {trained['params_total'] / 1e6:,.1f} M parameters, "
        f"{trained['params_active'] / 1e6:,.1f} M active; "
        f"{device['count']} {device['kind']} devices; experts {summary['experts']['mode']} "
        f"({summary['experts']['kernel']}), attention {summary['attention']['kernel']}; "
        f"{summary['max_steps']} steps of {trained['global_batch']} x {trained['block_size']} "
        "tokens"
    )


def _evaluations(arguments: Arguments, steps: int) -> list[dict[str, float]]:
    """Return the earlier run's evaluations of its first ``steps`` steps, which this run keeps."""
    file = arguments.training.output_dir / "summary.json"
    if not (steps and file.exists()):
        return []
    evaluations = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
    return [evaluation for evaluation in evaluations if evaluation["step"] <= steps]


def _batches(
    arguments: Arguments, options: StepOptions, text: data.Blocks | data.Stream, first_step: int
) -> Iterator[data.Batch]:
    """Return this host's rows of every step's global batch, from ``first_step`` on."""
    training, isolate = arguments.training, options.isolate_documents
    batch = training.global_batch
    rows = local_rows(batch)
    if arguments.data.streaming:
        return data.stream_batches(text, rows, batch, first_step, isolate)
    drop_last = training.dataloader_drop_last
    return data.batches(text, rows, batch, training.seed, drop_last, first_step, isolate)


def _board(arguments: Arguments, kept_steps: int) -> Any:
    """Return a TensorBoard writer on the first host of a ``--report_to tensorboard`` run."""
    training = arguments.training
    if training.report_to != "tensorboard" or xr.process_index():
        return None
    from torch.utils.tensorboard import SummaryWriter

    directory = training.logging_dir or training.output_dir / "tensorboard"
    return SummaryWriter(str(directory), purge_step=kept_steps or None, flush_secs=10)

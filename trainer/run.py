"""One run, from its arguments to what it leaves in the output directory.

Imports the whole stack, JAX too: only after ``start_client``, and when the input was found good.
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

import torch
import torch_xla.runtime as xr
from transformers import MixtralForCausalLM

from trainer import (
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
from trainer.arguments import Arguments
from trainer.config import ARCHITECTURE
from trainer.sharding import AXES, local_rows, make_mesh, partition_spec, size
from trainer.validation import check_devices, profile, slices

# The packages that the report names with their versions
STACK = ("torch", "torch_xla", "transformers", "jax", "libtpu")


def run(arguments: Arguments) -> int:
    """Train as ``arguments`` say and leave metrics.jsonl and summary.json in the output directory;
    with ``--save_strategy steps`` checkpoints and the model, too. Return the exit code.

    Raises BadInput for what only the devices, the hub or earlier files tell.
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

    make_mesh(devices, tensor=arguments.model.tensor_devices, slices=slices())
    mixtral = model.build(
        arguments.config,
        experts_mode=arguments.model.experts_mode,
        flash_attention=arguments.model.flash_attention,
        dtype=getattr(torch, arguments.model.torch_dtype),
    )
    identity = _identity(arguments, text.crc32)
    adafactor, first_step = _load_state(arguments, mixtral, checkpoints, identity)

    training.output_dir.mkdir(parents=True, exist_ok=True)
    # What output_dir holds of a run that this one continues stays, up to the step it resumes from.
    kept_steps = first_step if training.continues else 0
    checkpoint.remove_after(checkpoints, kept_steps)
    saver = None
    if training.save_strategy == "steps":
        saver = checkpoint.Saver(
            checkpoints,
            dict(mixtral.named_parameters()) | adafactor.state,
            identity,
            every=training.save_steps,
            keep=training.save_total_limit,
        )
    summary = _summary(arguments, mixtral, chip, max_steps) | {
        "bytes_per_token": text.bytes_per_token,
        "tokens_per_epoch": (
            None if arguments.data.streaming else epoch_steps * batch * arguments.data.block_size
        ),
        "evaluations": _evaluations(arguments, min(kept_steps, max_steps - 1)),
    }
    recompute = arguments.fsdp.activation_checkpointing

    def write_summary(compilations: loop.Compilations | None = None) -> None:
        if compilations:
            summary["compile"] = dataclasses.asdict(compilations)
        # Under SPMD torch_xla does not tell what memory a TPU has in use.
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
            count, isolate = training.eval_batch, arguments.data.reset_attention_mask
            batches = data.validation_batches(text.validation, local_rows(count), count, isolate)
            loss = loop.evaluate(mixtral, batches, recompute=recompute)
            found = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            print(f"evaluation after step {step}:", *(f"{k} {v:.4f}" for k, v in found.items()))
            # Beside the last step before it, whose place in the board is kept when a run resumes.
            writer.show(step - 1, "eval", **found)
            summary["evaluations"].append({"step": step, **found})
            write_summary()

        try:
            loop.train(
                mixtral,
                adafactor,
                _batches(arguments, text, first_step),
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
                accumulation=training.gradient_accumulation_steps,
                max_grad_norm=training.max_grad_norm,
                recompute=recompute,
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


def _identity(arguments: Arguments, text_crc32: int) -> dict[str, Any]:
    """Return what a run must have in common with the one whose checkpoint it resumes from."""
    training = arguments.training
    return {
        **{key: arguments.config.get(key) for key in ARCHITECTURE},
        "torch_dtype": arguments.model.torch_dtype,
        "text_crc32": text_crc32,
        "block_size": arguments.data.block_size,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "dataloader_drop_last": training.dataloader_drop_last,
        "seed": training.seed,
        "reset_attention_mask": arguments.data.reset_attention_mask,
    }


def _load_state(
    arguments: Arguments,
    mixtral: MixtralForCausalLM,
    checkpoints: storage.Directory | storage.Bucket,
    identity: dict[str, Any],
) -> tuple[optimizer.Adafactor, int]:
    """Give the model its weights: a checkpoint's, published ones, or random ones. Return its
    optimizer, and the number of steps that are done.
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
    initial = {"initial": saved.read} if saved else {}
    adafactor = optimizer.Adafactor(
        mixtral.named_parameters(), **initial, weight_decay=training.weight_decay
    )
    if not saved:
        return adafactor, 0
    saved.check(dict(mixtral.named_parameters()) | adafactor.state)
    print(f"resuming from {resumed}, after step {saved.step}", flush=True)
    return adafactor, saved.step


def _summary(
    arguments: Arguments, mixtral: MixtralForCausalLM, chip: tpu.Chip | None, max_steps: int
) -> dict[str, Any]:
    """Return what summary.json says of the run before its first step, but for the text."""
    mode, block_size = arguments.model.experts_mode, arguments.data.block_size
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
        "attention": {"kernel": attention.kernel_of(mixtral.config, block_size)},
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
    """Return the line that says what is trained, and how."""
    of_model, device = summary["model"], summary["device"]
    return (
        f"{of_model['name']}: {of_model['params_total'] / 1e6:,.1f} M parameters, "
        f"{of_model['params_active'] / 1e6:,.1f} M active; "
        f"{device['count']} {device['kind']} devices; experts {summary['experts']['mode']} "
        f"({summary['experts']['kernel']}), attention {summary['attention']['kernel']}; "
        f"{summary['max_steps']} steps of {of_model['global_batch']} x {of_model['block_size']} "
        "tokens"
    )


def _evaluations(arguments: Arguments, steps: int) -> list[dict[str, float]]:
    """Return the evaluations of the run that this one continues, of its first ``steps`` steps."""
    file = arguments.training.output_dir / "summary.json"
    if not (steps and file.exists()):
        return []
    evaluations = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
    return [found for found in evaluations if found["step"] <= steps]


def _batches(
    arguments: Arguments, text: data.Blocks | data.Stream, first_step: int
) -> Iterator[data.Batch]:
    """Return this host's rows of every global batch from ``first_step`` on."""
    training, isolate = arguments.training, arguments.data.reset_attention_mask
    batch = training.global_batch
    rows = local_rows(batch)
    if arguments.data.streaming:
        return data.stream_batches(text, rows, batch, first_step, isolate)
    drop_last = training.dataloader_drop_last
    return data.batches(text, rows, batch, training.seed, drop_last, first_step, isolate)


def _board(arguments: Arguments, kept_steps: int) -> Any:
    """Return TensorBoard's writer, on the first host, where it is asked for."""
    training = arguments.training
    if training.report_to != "tensorboard" or xr.process_index():
        return None
    from torch.utils.tensorboard import SummaryWriter

    directory = training.logging_dir or training.output_dir / "tensorboard"
    return SummaryWriter(str(directory), purge_step=kept_steps or None, flush_secs=10)

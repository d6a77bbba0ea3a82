"""``python -m trainer <flags of the guide's run_clm.py>``: train Mixtral on the devices of a slice.

Exit codes: 0 done (or, with ``--validate``, the input can work), 1 the run failed, 2 bad input, 143
ended by SIGTERM; a run that saves checkpoints has saved one then, if it was at its steps.
"""

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import resource
import signal
import sys

from trainer.arguments import Arguments, BadInput, check_devices, profile, slices, validate
from trainer.config import ARCHITECTURE

# The packages that the report names with their versions
STACK = ("torch", "torch_xla", "transformers", "jax", "libtpu")


def main(argv: list[str]) -> int:
    """Run the command line ``argv``, without the program's name; return the exit code."""
    try:
        arguments = validate(argv)
        if arguments.training.validate:
            print("ok")
            return 0
        return run(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: Arguments) -> int:
    """Train as ``arguments`` say and leave metrics.jsonl and summary.json in the output directory;
    with ``--save_strategy steps`` checkpoints and the model, too.

    Imports the stack only here, after the input was found good.
    """
    prepare_environment()
    import torch
    import torch_xla.runtime as xr

    xr.use_spmd()  # before anything touches a device
    import torch_xla

    # XLA's client must exist before the process runs any backward, or later ones fail.
    torch.zeros(1).to(torch_xla.device()).cpu()

    from trainer import (
        attention,
        checkpoint,
        data,
        experts,
        loop,
        metrics,
        model,
        profiling,
        storage,
        tpu,
        weights,
    )
    from trainer import optimizer as optim
    from trainer.sharding import AXES, local_rows, make_mesh, partition_spec, size

    training, block_size = arguments.training, arguments.data.block_size
    devices = xr.global_runtime_device_count()
    chip = tpu.current_chip()
    check_devices(arguments, devices, slices(), chip)
    checkpoints = storage.at(training.checkpoint_bucket or training.output_dir)
    if training.checkpoint_bucket:
        print(f"checkpoints are in {checkpoints}", flush=True)
        checkpoints.check(new=not training.continues)
    streaming, isolate = arguments.data.streaming, arguments.data.reset_attention_mask
    text = data.stream(arguments) if streaming else data.blocks(arguments)
    batch = training.global_batch
    max_steps = epoch_steps = training.max_steps
    if not streaming:
        epoch_steps = data.steps_per_epoch(text, batch, training.dataloader_drop_last)
    if max_steps < 1:
        max_steps = max(1, round(training.num_train_epochs * epoch_steps))

    make_mesh(devices, tensor=arguments.model.tensor_devices, slices=slices())
    mode = arguments.model.experts_mode
    mixtral = model.build(
        arguments.config,
        experts_mode=mode,
        flash_attention=arguments.model.flash_attention,
        dtype=getattr(torch, arguments.model.torch_dtype),
    )
    identity = {
        **{key: arguments.config.get(key) for key in ARCHITECTURE},
        "torch_dtype": arguments.model.torch_dtype,
        "text_crc32": text.crc32,
        "block_size": block_size,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "dataloader_drop_last": training.dataloader_drop_last,
        "seed": training.seed,
        "reset_attention_mask": isolate,
    }
    resumed = checkpoint.find(training.resume_from_checkpoint, checkpoints)
    if resumed:
        saved = checkpoint.Checkpoint(resumed, identity)
        first_step = saved.step
        model.load(mixtral, lambda name, shape: saved.read(name, shape, partition_spec(name)))
        initial = {"initial": saved.read}
    else:
        first_step, initial = 0, {}
        if name := arguments.model.model_name_or_path:
            directory = weights.fetch(name, arguments.model.cache_dir)
            model.load(mixtral, weights.Weights(directory).read)
        else:
            model.initialize(mixtral, training.seed)
    optimizer = optim.Adafactor(
        mixtral.named_parameters(), **initial, weight_decay=training.weight_decay
    )
    state = dict(mixtral.named_parameters()) | optimizer.state
    if resumed:
        saved.check(state)
        print(f"resuming from {resumed}, after step {first_step}", flush=True)

    training.output_dir.mkdir(parents=True, exist_ok=True)
    # What output_dir holds of a run that this one continues stays, up to the step it resumes from.
    kept_steps = first_step if training.continues else 0
    checkpoint.remove_after(checkpoints, kept_steps)
    saver = None
    if training.save_strategy == "steps":
        saver = checkpoint.Saver(
            checkpoints,
            state,
            identity,
            every=training.save_steps,
            keep=training.save_total_limit,
        )
    total, active = metrics.parameter_counts(arguments.config)
    summary = {
        "model": {
            "name": arguments.config.get("_name_or_path") or arguments.model.config_name.stem,
            "params_total": total,
            "params_active": active,
            "block_size": block_size,
            "global_batch": batch,
        },
        "mesh": {axis: size(axis) for axis in AXES},
        "experts": {"mode": mode, "kernel": experts.kernel_of(mode)},
        "attention": {"kernel": attention.kernel_of(mixtral.config, block_size)},
        "device": {
            "kind": chip.name if chip else xr.device_type(),
            "count": devices,
            "hosts": xr.process_count(),
        },
        "stack": {name: importlib.metadata.version(name) for name in STACK},
        "model_flops_per_token": metrics.flops_per_token(arguments.config, block_size),
        "peak_flops_per_device": chip.peak_bf16_flops if chip else None,
        "max_steps": max_steps,
        "bytes_per_token": text.bytes_per_token,
        "tokens_per_epoch": None if streaming else epoch_steps * batch * block_size,
        "evaluations": [],
    }
    if kept_steps and (before := training.output_dir / "summary.json").exists():
        evaluations = json.loads(before.read_text(encoding="utf-8"))["evaluations"]
        summary["evaluations"] = [
            it for it in evaluations if it["step"] <= kept_steps and it["step"] < max_steps
        ]
    recompute = arguments.fsdp.activation_checkpointing

    def write_summary(compilations: loop.Compilations | None = None) -> None:
        if compilations:
            summary["compile"] = dataclasses.asdict(compilations)
        # Under SPMD torch_xla does not tell what memory a TPU has in use.
        if xr.device_type() == "CPU":
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            summary["peak_memory_bytes"] = 1024 * peak_kib
        metrics.write_json(training.output_dir / "summary.json", summary)

    def evaluate(step: int) -> None:
        count = training.eval_batch
        batches = data.validation_batches(text.validation, local_rows(count), count, isolate)
        loss = loop.evaluate(mixtral, batches, recompute=recompute)
        found = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        print(f"evaluation after step {step}:", *(f"{k} {v:.4f}" for k, v in found.items()))
        # Beside the last step before it, whose place in the board is kept when a run resumes.
        writer.show(step - 1, "eval", **found)
        summary["evaluations"].append({"step": step, **found})
        write_summary()

    write_summary(loop.Compilations())
    print(
        f"{summary['model']['name']}: {total / 1e6:,.1f} M parameters, "
        f"{active / 1e6:,.1f} M active; "
        f"{devices} {summary['device']['kind']} devices; experts {mode} "
        f"({summary['experts']['kernel']}), attention {summary['attention']['kernel']}; "
        f"{max_steps} steps of {batch} x {block_size} tokens",
        flush=True,
    )
    rows = local_rows(batch)
    if streaming:
        batches = data.stream_batches(text, rows, batch, first_step, isolate)
    else:
        drop_last = training.dataloader_drop_last
        batches = data.batches(text, rows, batch, training.seed, drop_last, first_step, isolate)
    board = None
    if training.report_to == "tensorboard" and xr.process_index() == 0:
        from torch.utils.tensorboard import SummaryWriter

        directory = training.logging_dir or training.output_dir / "tensorboard"
        board = SummaryWriter(str(directory), purge_step=kept_steps or None, flush_secs=10)
    file = training.output_dir / "metrics.jsonl"
    with metrics.MetricsWriter(file, kept_steps, board) as writer:
        try:
            loop.train(
                mixtral,
                optimizer,
                batches,
                writer,
                profiling.Profiler(profile(), epoch_steps, first_step, max_steps),
                saver,
                first_step=first_step,
                max_steps=max_steps,
                learning_rate=optim.schedule(
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


def prepare_environment() -> None:
    """Set what torch_xla, XLA and JAX read when they are imported."""
    # The trainer calls use_spmd() itself; the variable only makes torch_xla warn.
    os.environ.pop("XLA_USE_SPMD", None)
    # Without the warnings of libraries that nobody here can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if os.environ.get("PJRT_DEVICE") == "CPU":
        # JAX only traces kernels here; it need not look for a TPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # XLA's CPU client deadlocks in collectives with fewer threads than virtual devices.
        devices = int(os.environ.get("CPU_NUM_DEVICES", "1"))
        os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

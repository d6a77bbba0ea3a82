"""``python -m trainer <flags of the guide's run_clm.py>``: train Mixtral on the devices of a slice.

Exit codes: 0 done (or, with ``--validate``, the input can work), 1 the run failed, 2 bad input.
"""

import dataclasses
import logging
import os
import sys

from trainer.arguments import Arguments, BadInput, check_devices, validate


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
    """Train as ``arguments`` say and leave metrics.jsonl and summary.json in the output directory.

    Imports the stack only here, after the input was found good.
    """
    prepare_environment()
    import torch
    import torch_xla.runtime as xr

    xr.use_spmd()  # before anything touches a device
    import torch_xla

    # XLA's client must exist before the process runs any backward, or later ones fail.
    torch.zeros(1).to(torch_xla.device()).cpu()

    from trainer import attention, data, experts, loop, metrics, model, optimizer, profiling, tpu
    from trainer.sharding import fsdp_mesh

    training, block_size = arguments.training, arguments.data.block_size
    devices = xr.global_runtime_device_count()
    chip = tpu.current_chip()
    check_devices(arguments, devices, chip)
    blocks = data.blocks(arguments)
    batch = training.per_device_train_batch_size
    epoch_steps = data.steps_per_epoch(blocks, batch, training.dataloader_drop_last)
    max_steps = training.max_steps
    if max_steps < 1:
        max_steps = max(1, round(training.num_train_epochs * epoch_steps))

    fsdp_mesh(devices)
    mode = arguments.model.experts_mode
    mixtral = model.build(
        arguments.config,
        experts_mode=mode,
        flash_attention=arguments.model.flash_attention,
        dtype=getattr(torch, arguments.model.torch_dtype),
    )
    model.initialize(mixtral, training.seed)

    training.output_dir.mkdir(parents=True, exist_ok=True)
    total, active = metrics.parameter_counts(arguments.config)
    summary = {
        "model": {
            "name": arguments.config.get("_name_or_path") or arguments.model.config_name.stem,
            "params_total": total,
            "params_active": active,
            "block_size": block_size,
            "global_batch": batch,
        },
        "mesh": {"fsdp": devices, "tensor": 1},
        "experts": {"mode": mode, "kernel": experts.kernel_of(mode)},
        "attention": {"kernel": attention.kernel_of(mixtral.config, block_size)},
        "device": {
            "kind": chip.name if chip else xr.device_type(),
            "count": devices,
            "hosts": xr.process_count(),
        },
        "model_flops_per_token": metrics.flops_per_token(arguments.config, block_size),
        "peak_flops_per_device": chip.peak_bf16_flops if chip else None,
        "max_steps": max_steps,
        "bytes_per_token": blocks.bytes_per_token,
        "tokens_per_epoch": epoch_steps * batch * block_size,
    }

    def write_summary(compilations: loop.Compilations) -> None:
        summary["compile"] = dataclasses.asdict(compilations)
        metrics.write_json(training.output_dir / "summary.json", summary)

    write_summary(loop.Compilations())
    print(
        f"{summary['model']['name']}: {total / 1e6:,.1f} M parameters, "
        f"{active / 1e6:,.1f} M active; "
        f"{devices} {summary['device']['kind']} devices; experts {mode} "
        f"({summary['experts']['kernel']}), attention {summary['attention']['kernel']}; "
        f"{max_steps} steps of {batch} x {block_size} tokens",
        flush=True,
    )
    with metrics.MetricsWriter(training.output_dir / "metrics.jsonl") as writer:
        try:
            loop.train(
                mixtral,
                data.batches(blocks, batch, training.seed, training.dataloader_drop_last),
                writer,
                profiling.Profiler(epoch_steps),
                max_steps=max_steps,
                learning_rate=optimizer.schedule(
                    training.lr_scheduler_type,
                    training.learning_rate,
                    training.warmup_steps,
                    max_steps,
                ),
                max_grad_norm=training.max_grad_norm,
                recompute=arguments.fsdp.activation_checkpointing,
                log_every=training.logging_steps if training.logging_strategy == "steps" else 0,
                on_compile=write_summary,
            )
        except loop.TrainingFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
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

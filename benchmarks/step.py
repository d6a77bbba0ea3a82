"""Compare the training step with a plain torch loop over transformers' own model, on CPU.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release benchmarks/step.py [--steps 12] [--hidden_size 256]

runs inside the trainer's image. Both loops do the same work on one CPU device: the same weights,
batches, Adafactor and clipping, in fp32, without recomputation. The first losses must agree; later
ones may differ, because gate and up projections are one weight in transformers and two in the
trainer, and Adafactor clips the update of each weight by itself.

Prints the median time of a step of both and their ratio, the time to trace a step in Python, the
time of pipelined steps over that of synchronised ones, the cost of recomputing layers, and how many
programs were compiled during the first steps and later.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}

from trainer.__main__ import start_client

start_client()

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.optimization import Adafactor as TheirAdafactor

from trainer import experts, model
from trainer.optimizer import Adafactor
from trainer.sharding import BATCH_SHARDING, shard
from trainer.step import StepOptions, TrainStep, build_model

LEARNING_RATE = 1e-3
WARM_UP = 2  # first steps, which may compile and are not timed


def train_plainly(
    config: dict, state: dict, batches: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Train transformers' own model with torch alone; return losses and seconds of the steps."""
    reference = MixtralForCausalLM(MixtralConfig.from_dict(config))
    reference.load_state_dict(state)
    optimizer = TheirAdafactor(
        reference.parameters(), lr=LEARNING_RATE, scale_parameter=False, relative_step=False
    )
    losses, times = [], []
    for batch in batches:
        began = time.monotonic()
        loss = reference(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.monotonic() - began)
    return losses, times


def build_step(
    config: dict, state: dict, *, recompute: bool
) -> Callable[[int, torch.Tensor], tuple]:
    """Return the trainer's step, a function of its 0-based number and its batch.

    It returns the loss, on the device, and the seconds that tracing took.
    """
    options = StepOptions(
        experts_mode="gmm",
        flash_attention=False,
        dtype="float32",
        tensor_devices=1,
        recompute=recompute,
        isolate_documents=False,
        accumulation=1,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )
    mixtral = build_model(config, options, devices=1, slices=1)
    theirs = MixtralForCausalLM(MixtralConfig.from_dict(config))
    theirs.load_state_dict(state)
    for layer in theirs.model.layers:
        experts.split_projections(layer.mlp.experts)
    laid_out = theirs.state_dict()
    model.load(mixtral, lambda name, shape: laid_out[name].reshape(shape))
    train_step = TrainStep(options, mixtral)
    torch_xla.sync(wait=True)
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)

    def step(number: int, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        began = time.monotonic()
        rates = torch.tensor([LEARNING_RATE, Adafactor.decay(number)]).to(torch_xla.device())
        tokens = shard(batch.to(torch_xla.device()), BATCH_SHARDING)
        loss, *_ = train_step(tokens, None, rates[0], rates[1])
        traced = time.monotonic() - began
        torch_xla.sync()
        return loss, traced

    return step


def synchronised(step, batches) -> tuple[list[float], list[float], list[float]]:
    """Wait for every step before the next; return losses, seconds, and seconds of tracing."""
    losses, times, traces = [], [], []
    for number, batch in enumerate(batches):
        began = time.monotonic()
        loss, traced = step(number, batch)
        losses.append(loss.item())
        times.append(time.monotonic() - began)
        traces.append(traced)
    return losses, times, traces


def pipelined(step, first: int, batches) -> float:
    """Dispatch all steps, reading each loss one step late; return the seconds of all together."""
    began, before = time.monotonic(), None
    for number, batch in enumerate(batches, first):
        loss, _ = step(number, batch)
        if before is not None:
            before.item()
        before = loss
    before.item()
    xm.wait_device_ops()
    return time.monotonic() - began


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=256)
    options = parser.parse_args()
    config = json.loads((ROOT / "trainer/presets/mixtral-tiny.json").read_text())
    config |= {"hidden_size": options.hidden_size, "intermediate_size": 2 * options.hidden_size}
    torch.manual_seed(0)
    state = MixtralForCausalLM(MixtralConfig.from_dict(config)).state_dict()
    shape = (options.steps, options.batch, options.block_size)
    batches = torch.randint(config["vocab_size"], shape)

    step = build_step(config, state, recompute=False)
    losses, times, traces = synchronised(step, batches)
    compiled = xla_metrics.metric_data("CompileTime")[0]
    each = sum(synchronised(step, batches)[1])
    together = pipelined(step, options.steps, batches)
    later = xla_metrics.metric_data("CompileTime")[0] - compiled
    expected, their_times = train_plainly(config, state, batches)
    _, recomputing, _ = synchronised(build_step(config, state, recompute=True), batches)

    usual, theirs, again = (
        statistics.median(t[WARM_UP:]) for t in (times, their_times, recomputing)
    )
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    print(f"{options.batch} x {options.block_size} tokens, hidden size {options.hidden_size}, fp32")
    print(f"transformers and torch: {theirs:.3f} s a step")
    print(f"the trainer:            {usual:.3f} s a step, {theirs / usual:.2f} times as fast")
    print(f"  recomputing layers:   {again:.3f} s a step, {again / usual:.2f} times as long")
    print(f"  traced in             {statistics.median(traces[WARM_UP:]):.3f} s a step")
    print(f"  {options.steps} steps, pipelined over synchronised: {together / each:.2f}")
    print(f"  programs compiled: {compiled} in the first {options.steps} steps, {later} later")
    print(f"difference of the first loss: {differences[0]:.1e}, largest: {max(differences):.1e}")


if __name__ == "__main__":
    main()

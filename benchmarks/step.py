"""One training step beside a plain torch loop over transformers' model: inside the trainer's image.

    docker run --rm --volume "$PWD:/src:ro" --workdir /src --entrypoint python \\
        mixtral-trainer:release benchmarks/step.py [--steps 12] [--hidden_size 256]

Both do the same work on one CPU device: the same weights, batches, Adafactor and clipping, in fp32,
nothing recomputed. The first loss must agree; later ones may differ by what Adafactor makes of gate
and up, which are one weight in transformers and two in the trainer. Printed are the medians of a
step and their ratio, how long the step's trace takes in Python, what steps that are dispatched one
after the other take of the same steps when each is waited for, what recomputing costs, and what was
compiled when.
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

from trainer import experts, loop, model
from trainer.optimizer import Adafactor
from trainer.sharding import BATCH_SHARDING, make_mesh, shard

LEARNING_RATE = 1e-3
WARM = 2  # steps that may compile


def plain(config: dict, state: dict, batches: torch.Tensor) -> tuple[list[float], list[float]]:
    """Train transformers' own model with torch alone; return the losses and the times."""
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


def ours(config: dict, state: dict, *, recompute: bool) -> Callable[[int, torch.Tensor], tuple]:
    """Return the trainer's step: it takes its number and batch, and returns loss and trace time."""
    make_mesh(1)
    mixtral = model.build(config, experts_mode="gmm", flash_attention=False, dtype=torch.float32)
    theirs = MixtralForCausalLM(MixtralConfig.from_dict(config))
    theirs.load_state_dict(state)
    for layer in theirs.model.layers:
        experts.split_projections(layer.mlp.experts)
    laid_out = theirs.state_dict()
    model.load(mixtral, lambda name, shape: laid_out[name].reshape(shape))
    optimizer = Adafactor(mixtral.named_parameters())
    torch_xla.sync(wait=True)
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)

    def step(number: int, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        began = time.monotonic()
        rates = torch.tensor([LEARNING_RATE, Adafactor.decay(number)]).to(torch_xla.device())
        tokens = shard(batch.to(torch_xla.device()), BATCH_SHARDING)
        loss, *_ = loop.train_step(
            *(mixtral, optimizer, tokens, rates[0], rates[1]),
            max_grad_norm=1.0,
            recompute=recompute,
        )
        traced = time.monotonic() - began
        torch_xla.sync()
        return loss, traced

    return step


def synchronised(step, batches) -> tuple[list[float], list[float], list[float]]:
    """Run every step to its end before the next; return losses, times and trace times."""
    losses, times, traces = [], [], []
    for number, batch in enumerate(batches):
        began = time.monotonic()
        loss, traced = step(number, batch)
        losses.append(loss.item())
        times.append(time.monotonic() - began)
        traces.append(traced)
    return losses, times, traces


def pipelined(step, first: int, batches) -> float:
    """Dispatch all steps, reading each loss one step late; return the seconds of all."""
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
    """Print the ratios."""
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

    step = ours(config, state, recompute=False)
    losses, times, traces = synchronised(step, batches)
    compiled = xla_metrics.metric_data("CompileTime")[0]
    each = sum(synchronised(step, batches)[1])
    together = pipelined(step, options.steps, batches)
    later = xla_metrics.metric_data("CompileTime")[0] - compiled
    expected, their_times = plain(config, state, batches)
    _, recomputing, _ = synchronised(ours(config, state, recompute=True), batches)

    usual, theirs, again = (statistics.median(t[WARM:]) for t in (times, their_times, recomputing))
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    print(f"{options.batch} x {options.block_size} tokens, hidden size {options.hidden_size}, fp32")
    print(f"transformers and torch: {theirs:.3f} s a step")
    print(f"the trainer:            {usual:.3f} s a step, {theirs / usual:.2f} times as fast")
    print(f"  recomputing layers:   {again:.3f} s a step, {again / usual:.2f} times as long")
    print(f"  traced in             {statistics.median(traces[WARM:]):.3f} s a step")
    print(f"  {options.steps} steps, pipelined over synchronised: {together / each:.2f}")
    print(f"  programs compiled: {compiled} in the first {options.steps} steps, {later} later")
    print(f"difference of the first loss: {differences[0]:.1e}, largest: {max(differences):.1e}")


if __name__ == "__main__":
    main()

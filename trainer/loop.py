"""One training step, and the loop around it."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch_xla
import torch_xla.debug.metrics as xla_metrics
import torch_xla.debug.profiler as xp
import torch_xla.runtime as xr
from transformers import MixtralForCausalLM

from trainer.metrics import MetricsWriter
from trainer.model import causal_lm_loss
from trainer.optimizer import Adafactor, clip_gradients
from trainer.profiling import Profiler
from trainer.sharding import BATCH_SHARDING, shard


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


@dataclass
class Compilations:
    """What the loop compiled: how often, for how long, and during which step the last time."""

    count: int = 0
    cached: int = 0
    seconds: float = 0.0
    last_step: int | None = None

    def __post_init__(self) -> None:
        self._before = self._totals()

    def update(self, step: int) -> bool:
        """Count what was compiled since the loop began; return whether this step added to it."""
        count, seconds = (
            now - before for now, before in zip(self._totals(), self._before, strict=True)
        )
        grew = count > self.count
        self.count, self.seconds = count, round(seconds, 3)
        self.last_step = step if grew else self.last_step
        return grew

    @staticmethod
    def _totals() -> tuple[int, float]:
        count, nanoseconds, _ = xla_metrics.metric_data("CompileTime") or (0, 0.0, None)
        return count, nanoseconds / 1e9


def train_step(
    model: MixtralForCausalLM,
    optimizer: Adafactor,
    tokens_BT: torch.Tensor,
    learning_rate: torch.Tensor,
    decay: torch.Tensor,
    *,
    max_grad_norm: float,
    recompute: bool,
) -> torch.Tensor:
    """Trace forward, backward and update of one global batch; return the loss, an fp32 scalar.

    Nothing runs until the graph is dispatched. Every argument that changes from step to step is a
    tensor on the device, so every step is the same program.
    """
    loss = causal_lm_loss(model, tokens_BT, recompute=recompute)
    loss.backward()
    if max_grad_norm:
        clip_gradients(optimizer.parameters, max_grad_norm)
    optimizer.step(learning_rate, decay)
    return loss.detach()


def train(
    model: MixtralForCausalLM,
    batches: Iterator[np.ndarray],
    metrics: MetricsWriter,
    profiler: Profiler,
    *,
    max_steps: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float,
    recompute: bool,
    log_every: int,
    on_compile: Callable[[Compilations], None],
) -> Compilations:
    """Run ``max_steps`` steps and write one line of metrics for each.

    On a TPU the host runs one step ahead: the loss of a step is read after the next one is
    dispatched. A step's time is the time between its loss and the one before it.

    Args:
        batches: int32 ``[global batch, block_size]``, at least ``max_steps`` of them.
        log_every: print a line every so many steps; 0 for none.
        on_compile: called whenever a step turns out to have compiled something.

    Raises TrainingFailed when the loss is no longer finite.
    """
    optimizer = Adafactor(model.named_parameters())
    torch_xla.sync(wait=True)
    # Python numbers in the step are part of the program. As parameters, torch_xla's default, they
    # would enter the manual region unsharded, on which the partitioner aborts.
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    compilations = Compilations()
    last = time.monotonic()

    def finish(step: int, loss: torch.Tensor, tokens: int) -> None:
        nonlocal last
        value = loss.item()  # waits for the step
        now = time.monotonic()
        seconds, last = now - last, now
        metrics.write(step, value, seconds, tokens / seconds)
        if log_every and (step % log_every == 0 or step == max_steps - 1):
            print(
                f"step {step + 1}/{max_steps} loss {value:.4f} {seconds:.3f} s "
                f"{tokens / seconds:.0f} tokens/s",
                flush=True,
            )
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss of step {step} is {value}: training diverged; lower --learning_rate, "
                "lengthen --warmup_steps, or clip with --max_grad_norm"
            )

    in_flight: deque[tuple[int, torch.Tensor, int]] = deque()
    # XLA's CPU client runs a program while it is dispatched: there is nothing to run ahead of, and
    # a step's time would appear on the line of the step before it.
    ahead = 0 if xr.device_type() == "CPU" else 1
    try:
        for step in range(max_steps):
            with xp.StepTrace("train", step_num=step):  # dispatches the graph when it ends
                batch = torch.from_numpy(next(batches).astype(np.int64))
                rates = torch.tensor([learning_rate(step), Adafactor.decay(step)])
                rates = rates.to(torch_xla.device())
                loss = train_step(
                    model,
                    optimizer,
                    shard(batch.to(torch_xla.device()), BATCH_SHARDING),
                    rates[0],
                    rates[1],
                    max_grad_norm=max_grad_norm,
                    recompute=recompute,
                )
            if compilations.update(step):
                on_compile(compilations)
            in_flight.append((step, loss, batch.numel()))
            while len(in_flight) > ahead:
                finish(*in_flight.popleft())
            profiler.step_dispatched(step)
        while in_flight:
            finish(*in_flight.popleft())
    finally:
        profiler.stop()
    return compilations

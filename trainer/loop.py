"""One training step, and the loop around it."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import torch_xla
import torch_xla.debug.metrics as xla_metrics
import torch_xla.debug.profiler as xp
import torch_xla.runtime as xr
from transformers import MixtralForCausalLM

from trainer.checkpoint import SaveFailed, Saver
from trainer.data import Batch
from trainer.metrics import MetricsWriter
from trainer.model import IGNORED, causal_lm_loss, targets, training_loss
from trainer.optimizer import Adafactor, clip_gradients
from trainer.profiling import Profiler
from trainer.sharding import BATCH_SHARDING, from_hosts, from_rows, shard


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step and why."""


class Stopped(Exception):
    """The run was asked to end, and has saved a checkpoint; the message says which."""


@dataclass
class Compilations:
    """What the loop compiled: how many programs, how many of them came from the persistent cache,
    for how long, and during which step the last time."""

    count: int = 0
    cached: int = 0
    seconds: float = 0.0
    last_step: int | None = None

    def __post_init__(self) -> None:
        self._before = self._totals()

    def update(self, step: int) -> bool:
        """Count what was compiled since the loop began; return whether this step added to it."""
        count, cached, seconds = (
            now - before for now, before in zip(self._totals(), self._before, strict=True)
        )
        grew = count > self.count
        self.count, self.cached, self.seconds = count, cached, round(seconds, 3)
        self.last_step = step if grew else self.last_step
        return grew

    def leave_out(self) -> None:
        """Never count what was compiled since the last update."""
        counted = (self.count, self.cached, self.seconds)
        self._before = tuple(
            now - before for now, before in zip(self._totals(), counted, strict=True)
        )

    @staticmethod
    def _totals() -> tuple[int, int, float]:
        count, nanoseconds, _ = xla_metrics.metric_data("CompileTime") or (0, 0.0, None)
        cached = xla_metrics.counter_value("PersistentCacheHit") or 0
        return count + cached, cached, nanoseconds / 1e9


def train_step(
    model: MixtralForCausalLM,
    optimizer: Adafactor,
    tokens_BT: torch.Tensor,
    learning_rate: torch.Tensor,
    decay: torch.Tensor,
    segments_BT: torch.Tensor | None = None,
    *,
    accumulation: int = 1,
    max_grad_norm: float,
    recompute: bool,
) -> torch.Tensor:
    """Trace forward, backward and update of one global batch; return what was measured.

    That is fp32 ``[3 + E]``: the loss, the auxiliary loss, the routers' entropy and, of each
    expert, the load, as ``experts.Routing`` has them.

    Nothing runs until the graph is dispatched. Every argument that changes from step to step is a
    tensor on the device, so every step is the same program. With ``accumulation`` above 1 the batch
    is computed in so many parts, one after the other; loss and gradient are their means.
    """
    inputs = [tokens_BT] if segments_BT is None else [tokens_BT, segments_BT]
    # Every device keeps its own rows: the parts are taken from between them.
    parts = [x.unflatten(0, (-1, accumulation)).unbind(1) for x in inputs]
    measured = []
    for part in zip(*parts, strict=True):
        part = [shard(x * 1, BATCH_SHARDING) for x in part]
        cross_entropy, routing = causal_lm_loss(model, *part, recompute=recompute)
        loss = training_loss(model.config, cross_entropy, routing)
        (loss / accumulation).backward()
        scalars = torch.stack([loss, routing.aux_loss, routing.entropy])
        measured.append(torch.cat([scalars, routing.load]).detach())
    if max_grad_norm:
        clip_gradients(optimizer.parameters, max_grad_norm)
    optimizer.step(learning_rate, decay)
    return torch.stack(measured).mean(0)


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, batches: Iterable[Batch], *, recompute: bool) -> float:
    """Return the mean cross-entropy of all predicted tokens that count, in nats.

    Raises TrainingFailed if it is not finite.
    """
    sums = []
    for batch in batches:
        tokens, segments = _on_mesh(batch)
        counted = np.less(batch.rows, batch.counted)[:, None]
        inputs = tokens, segments, from_rows(counted, batch.rows, batch.size)
        cross_entropy, _ = causal_lm_loss(model, *inputs, recompute=recompute)
        count = (targets(*inputs) != IGNORED).sum()
        sums.append(torch.stack([cross_entropy * count, count.float()]))
        torch_xla.sync()
    losses, counts = zip(*(pair.tolist() for pair in sums), strict=True)
    mean = math.fsum(losses) / math.fsum(counts)
    if not math.isfinite(mean):
        raise TrainingFailed(f"the loss of the validation text is {mean}: training diverged")
    return mean


def train(
    model: MixtralForCausalLM,
    optimizer: Adafactor,
    batches: Iterator[Batch],
    metrics: MetricsWriter,
    profiler: Profiler,
    saver: Saver | None,
    *,
    first_step: int,
    max_steps: int,
    learning_rate: Callable[[int], float],
    accumulation: int,
    max_grad_norm: float,
    recompute: bool,
    log_every: int,
    on_compile: Callable[[Compilations], None],
    evaluate_every: int | None,
    on_evaluate: Callable[[int], None],
) -> None:
    """Run the steps from ``first_step`` up to ``max_steps`` and write one line of metrics for each.

    On a TPU the host runs one step ahead: the loss of a step is read after the next one is
    dispatched. A step's time is the time between its loss and the one before it.

    Args:
        batches: of ``accumulation`` times the global batch, one for each step.
        saver: saves a checkpoint every so many steps and at the end; None: there are none.
        log_every: print a line every so many steps; 0 for none.
        on_compile: called whenever a step turns out to have compiled something.
        on_evaluate: called with the number of steps done, after every ``evaluate_every`` of them
            but the last.

    Raises TrainingFailed when the loss is no longer finite, SaveFailed when a checkpoint cannot be
    written, and, only with a saver, Stopped after SIGTERM.
    """
    torch_xla.sync(wait=True)
    # Python numbers in the step are part of the program. As parameters, torch_xla's default, they
    # would enter the manual region unsharded, on which the partitioner aborts.
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    compilations = Compilations()
    last = time.monotonic()
    terminated = stop = False  # what this host was asked for, and what all of them know of

    def terminate(signal_number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True

    def finish(step: int, result: torch.Tensor, tokens: int) -> None:
        nonlocal last, stop
        stop, value, aux_loss, entropy, *load = result.tolist()  # waits for the step
        now = time.monotonic()
        seconds, last = now - last, now
        metrics.write(
            step,
            loss=value,
            learning_rate=learning_rate(step),
            step_time_s=seconds,
            tokens_per_s=tokens / seconds,
            aux_loss=aux_loss,
            router_entropy=entropy,
            expert_load=[round(share, 4) for share in load],
        )
        if log_every and (step % log_every == 0 or step == max_steps - 1):
            print(
                f"step {step + 1}/{max_steps} loss {value:.4f} {seconds:.3f} s "
                f"{tokens / seconds:.0f} tokens/s",
                flush=True,
            )
        if not math.isfinite(value):
            said = (
                f"the loss of step {step} is {value}: training diverged; lower --learning_rate, "
                "lengthen --warmup_steps, or clip with --max_grad_norm"
            )
            if saver:
                try:
                    saver.discard(step)
                except SaveFailed as error:
                    said += f". And {error}"
            raise TrainingFailed(said)

    in_flight: deque[tuple[int, torch.Tensor, int]] = deque()

    def drain(ahead: int = 0) -> None:
        while len(in_flight) > ahead:
            finish(*in_flight.popleft())

    # XLA's CPU client runs a program while it is dispatched: there is nothing to run ahead of, and
    # a step's time would appear on the line of the step before it.
    ahead = 0 if xr.device_type() == "CPU" else 1
    # Only here: before, there is nothing to save, and the signal may end the process as it does.
    handler = signal.signal(signal.SIGTERM, terminate) if saver else None
    try:
        for step in range(first_step, max_steps):
            with xp.StepTrace("train", step_num=step):  # dispatches the graph when it ends
                with xp.Trace("input"):
                    tokens, segments = _on_mesh(next(batches))
                    rates = torch.tensor([learning_rate(step), Adafactor.decay(step)])
                    rates = rates.to(torch_xla.device())
                measured = train_step(
                    model,
                    optimizer,
                    tokens,
                    rates[0],
                    rates[1],
                    segments,
                    accumulation=accumulation,
                    max_grad_norm=max_grad_norm,
                    recompute=recompute,
                )
                # Read with the loss, so that all hosts stop after the same step.
                result = torch.cat([from_hosts(terminated).max().unsqueeze(0), measured])
            if compilations.update(step):
                on_compile(compilations)
            in_flight.append((step, result, tokens.numel()))
            drain(ahead)
            profiler.step_dispatched(step)
            done = step + 1
            # First, so that weights whose loss is not finite are not saved, and that what a run
            # resumes from was evaluated.
            if evaluate_every and done % evaluate_every == 0 and done < max_steps and not stop:
                drain()
                on_evaluate(done)
                compilations.leave_out()
                last = time.monotonic()
            if saver and (stop or done % saver.every == 0 or done == max_steps):
                drain()
                saver.save(done)
                compilations.leave_out()  # what the hosts tell each other by
                if stop and done < max_steps:
                    saver.wait()  # and keep the one before: this one's loss nobody has seen
                    raise Stopped(f"asked to end by SIGTERM; step {done} is saved")
        drain()
        if saver:
            saver.close()
    finally:
        if saver:
            signal.signal(signal.SIGTERM, handler)
        profiler.stop()


def _on_mesh(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a global batch's tokens, int64, and its segments, int32, split over the devices."""
    segments = batch.segments
    if segments is not None:
        segments = from_rows(segments, batch.rows, batch.size)
    return from_rows(batch.tokens.astype(np.int64), batch.rows, batch.size), segments

"""The training loop: runs the steps, writes their metrics, evaluates and saves."""

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

from .checkpoint import SaveFailed, Saver
from .data import Batch
from .metrics import MetricsWriter
from .model import IGNORED, targets
from .optimizer import Adafactor
from .profiling import Profiler
from .sharding import from_hosts, from_rows
from .step import TrainStep


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message says at which step and why."""


class Stopped(Exception):
    """SIGTERM ended the run after a checkpoint was saved; the message names its step."""


@dataclass
class Compilations:
    """The programs compiled since the loop began.

    ``count`` programs, of which ``cached`` were loaded from the persistent cache, took ``seconds``
    in all; ``last_step`` is the latest step (0-based) that compiled one, None before any.
    """

    count: int = 0
    cached: int = 0
    seconds: float = 0.0
    last_step: int | None = None

    def __post_init__(self) -> None:
        self._before = self._totals()

    def update(self, step: int) -> bool:
        """Read the counters after ``step``; return whether that step compiled anything."""
        count, cached, seconds = (
            now - before for now, before in zip(self._totals(), self._before, strict=True)
        )
        grew = count > self.count
        self.count, self.cached, self.seconds = count, cached, round(seconds, 3)
        self.last_step = step if grew else self.last_step
        return grew

    def leave_out(self) -> None:
        """Leave out of the count what was compiled since the last update, outside the steps."""
        counted = (self.count, self.cached, self.seconds)
        self._before = tuple(
            now - before for now, before in zip(self._totals(), counted, strict=True)
        )

    @staticmethod
    def _totals() -> tuple[int, int, float]:
        count, nanoseconds, _ = xla_metrics.metric_data("CompileTime") or (0, 0.0, None)
        cached = xla_metrics.counter_value("PersistentCacheHit") or 0
        return count + cached, cached, nanoseconds / 1e9


@torch.no_grad()
def evaluate(train_step: TrainStep, batches: Iterable[Batch]) -> float:
    """Return the mean cross-entropy, in nats, of all predicted tokens in the rows that count.

    Raises TrainingFailed if the mean is not finite.
    """
    sums = []
    for batch in batches:
        tokens, segments = _on_mesh(batch)
        counted = np.less(batch.rows, batch.counted)[:, None]
        inputs = tokens, segments, from_rows(counted, batch.rows, batch.size)
        cross_entropy, _ = train_step.forward(*inputs)
        count = (targets(*inputs) != IGNORED).sum()
        sums.append(torch.stack([cross_entropy * count, count.float()]))
        torch_xla.sync()
    losses, counts = zip(*(pair.tolist() for pair in sums), strict=True)
    mean = math.fsum(losses) / math.fsum(counts)
    if not math.isfinite(mean):
        raise TrainingFailed(
            f"the loss of the validation text is {mean}: training diverged; lower --learning_rate, "
            "lengthen --warmup_steps, or clip with --max_grad_norm"
        )
    return mean


def train(
    train_step: TrainStep,
    batches: Iterator[Batch],
    metrics: MetricsWriter,
    profiler: Profiler,
    saver: Saver | None,
    *,
    first_step: int,
    max_steps: int,
    learning_rate: Callable[[int], float],
    log_every: int,
    on_compile: Callable[[Compilations], None],
    evaluate_every: int | None,
    on_evaluate: Callable[[int], None],
) -> None:
    """Run the steps ``first_step`` to ``max_steps - 1`` and write a line of metrics for each.

    On a TPU the host runs one step ahead: it reads a step's loss after dispatching the next step. A
    step's time runs from the arrival of the previous step's loss to the arrival of its own.

    Args:
        batches: one for each step, all its microbatches together.
        saver: saves a checkpoint every ``saver.every`` steps and after the last one; None: no
            checkpoints.
        learning_rate: returns the learning rate of a step, 0-based.
        log_every: print a line every so many steps; 0: print none.
        on_compile: called after a step that compiled a program.
        evaluate_every: call ``on_evaluate``, with the number of finished steps, whenever so many
            more steps are finished, except after the last step; None: never.

    Raises TrainingFailed when the loss is no longer finite, SaveFailed when a checkpoint cannot be
    written, and, only with a saver, Stopped after SIGTERM.
    """
    torch_xla.sync(wait=True)
    # Python numbers in the step are part of the program. As parameters, torch_xla's default, they
    # would enter the manual region unsharded, on which the partitioner aborts.
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    compilations = Compilations()
    last = time.monotonic()
    terminated = False  # this host has received SIGTERM
    stop = False  # some host has, as all hosts know since the last step

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
            message = (
                f"the loss of step {step} is {value}: training diverged; lower --learning_rate, "
                "lengthen --warmup_steps, or clip with --max_grad_norm"
            )
            if saver:
                try:
                    saver.discard(step)
                except SaveFailed as error:
                    message += f". And {error}"
            raise TrainingFailed(message)

    in_flight: deque[tuple[int, torch.Tensor, int]] = deque()

    def drain(ahead: int = 0) -> None:
        while len(in_flight) > ahead:
            finish(*in_flight.popleft())

    # XLA's CPU client runs a program while dispatching it: running ahead would gain nothing, and
    # would write each step's time on the line of the step before.
    ahead = 0 if xr.device_type() == "CPU" else 1
    # Before the first step there is nothing to save, and SIGTERM ends the process at once.
    handler = signal.signal(signal.SIGTERM, terminate) if saver else None
    try:
        for step in range(first_step, max_steps):
            with xp.StepTrace("train", step_num=step):  # dispatches the graph when it ends
                with xp.Trace("input"):
                    tokens, segments = _on_mesh(next(batches))
                    rates = torch.tensor([learning_rate(step), Adafactor.decay(step)])
                    rates = rates.to(torch_xla.device())
                measured = train_step(tokens, segments, rates[0], rates[1])
                # In one tensor with the loss, so that all hosts stop after the same step.
                result = torch.cat([from_hosts(terminated).max().unsqueeze(0), measured])
            if compilations.update(step):
                on_compile(compilations)
            in_flight.append((step, result, tokens.numel()))
            drain(ahead)
            profiler.step_dispatched(step)
            done = step + 1
            # Evaluation comes before saving: weights whose loss is not finite are not saved, and
            # every checkpoint at such a step has been evaluated.
            if evaluate_every and done % evaluate_every == 0 and done < max_steps and not stop:
                drain()
                on_evaluate(done)
                compilations.leave_out()
                last = time.monotonic()
            if saver and (stop or done % saver.every == 0 or done == max_steps):
                drain()
                saver.save(done)
                compilations.leave_out()  # the programs by which the hosts agree on a checkpoint
                if stop and done < max_steps:
                    # The previous checkpoint stays: the loss of the new one is not known yet.
                    saver.wait()
                    raise Stopped(f"asked to end by SIGTERM; step {done} is saved")
        drain()
        if saver:
            saver.close()
    finally:
        if saver:
            signal.signal(signal.SIGTERM, handler)
        profiler.stop()


def _on_mesh(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a global batch's tokens, int64, and segments, int32 or None, split on the batch."""
    segments = batch.segments
    if segments is not None:
        segments = from_rows(segments, batch.rows, batch.size)
    return from_rows(batch.tokens.astype(np.int64), batch.rows, batch.size), segments

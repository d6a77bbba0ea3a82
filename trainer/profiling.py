"""The profiler trace that the PROFILE_* variables of the guide ask for."""

import time
from pathlib import Path

import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as xp

from .arguments import Profile
from .metrics import LEAST_STEPS


class Profiler:
    """Takes one trace of this host's devices; none without PROFILE_LOGDIR.

    The trace begins once the device has finished step PROFILE_STEP (0-based) of epoch
    PROFILE_EPOCH. It ends with the first step that finishes PROFILE_DURATION_MS later, but not
    before it shows the ``metrics.LEAST_STEPS`` whole steps that a step time needs, or else with the
    run. The file is ``<PROFILE_LOGDIR>/plugins/profile/<time>/<host>.xplane.pb``, which TensorBoard
    opens. Where the run, from ``first_step`` to ``max_steps - 1``, does not have that step, a
    message says so.
    """

    def __init__(
        self, profile: Profile, steps_per_epoch: int, first_step: int, max_steps: int
    ) -> None:
        self.directory = profile.directory
        self._after_step = profile.epoch * steps_per_epoch + profile.step
        self._duration_s = profile.duration_ms / 1000
        self._started: float | None = None
        if self.directory and not first_step <= self._after_step < max_steps - 1:
            print(
                f"no profile: it would begin after step {self._after_step} (PROFILE_STEP "
                f"{profile.step}, PROFILE_EPOCH {profile.epoch} of {steps_per_epoch} steps), and "
                f"the run goes from step {first_step} to {max_steps - 1}",
                flush=True,
            )

    def step_dispatched(self, step: int) -> None:
        """Begin or end the trace if it is due after ``step``."""
        if self._started is None and self.directory and step == self._after_step:
            xm.wait_device_ops()
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            xp.start_trace(self.directory)
            self._started = time.monotonic()
        # One step more than LEAST_STEPS: a step time runs from a step's start to the next one's.
        elif (
            self._started
            and time.monotonic() - self._started >= self._duration_s
            and step - self._after_step > LEAST_STEPS
        ):
            self.stop()

    def stop(self) -> None:
        """End a running trace and write it."""
        if self._started:
            xm.wait_device_ops()
            xp.stop_trace()
            self._started, self.directory = None, ""

"""The guide's profile: one trace, begun after a given step of a given epoch, for a given time."""

import os
import time
from pathlib import Path

import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as xp


class Profiler:
    """Takes one trace of this host as PROFILE_EPOCH, PROFILE_STEP, PROFILE_DURATION_MS and
    PROFILE_LOGDIR say; without PROFILE_LOGDIR it takes none.

    The trace begins once the device has finished step PROFILE_STEP (0-based, within PROFILE_EPOCH)
    and ends with the first step that finishes PROFILE_DURATION_MS later, or with the run. It
    becomes ``<PROFILE_LOGDIR>/plugins/profile/<time>/<host>.xplane.pb``, which TensorBoard opens.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.directory = os.environ.get("PROFILE_LOGDIR", "")
        epoch = int(os.environ.get("PROFILE_EPOCH", "0"))
        self._after_step = epoch * steps_per_epoch + int(os.environ.get("PROFILE_STEP", "3"))
        self._duration_s = int(os.environ.get("PROFILE_DURATION_MS", "20000")) / 1000
        self._started: float | None = None

    def step_dispatched(self, step: int) -> None:
        """Begin or end the trace, where this is the step to do it at."""
        if self._started is None and self.directory and step == self._after_step:
            xm.wait_device_ops()
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            xp.start_trace(self.directory)
            self._started = time.monotonic()
        elif self._started and time.monotonic() - self._started >= self._duration_s:
            self.stop()

    def stop(self) -> None:
        """End a running trace and write it."""
        if self._started:
            xm.wait_device_ops()
            xp.stop_trace()
            self._started, self.directory = None, ""

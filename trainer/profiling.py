"""The guide's profile: one trace, begun after a given step of a given epoch, for a given time."""

import time
from pathlib import Path

import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as xp

from trainer.arguments import Profile
from trainer.metrics import LEAST_STEPS


class Profiler:
    """Takes one trace of this host as PROFILE_EPOCH, PROFILE_STEP, PROFILE_DURATION_MS and
    PROFILE_LOGDIR say; without PROFILE_LOGDIR it takes none. Says so where the run, from
    ``first_step`` to ``max_steps``, has no step after which it would begin.

    The trace begins once the device has finished step PROFILE_STEP (0-based, within PROFILE_EPOCH)
    and ends with the first step that finishes PROFILE_DURATION_MS later, or with the run. Where
    steps are long it takes as many as a step time needs, which are more than that. It becomes
    ``<PROFILE_LOGDIR>/plugins/profile/<time>/<host>.xplane.pb``, which TensorBoard opens.
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
        """Begin or end the trace, where this is the step to do it at."""
        if self._started is None and self.directory and step == self._after_step:
            xm.wait_device_ops()
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            xp.start_trace(self.directory)
            self._started = time.monotonic()
        # The last step's time nobody sees: it is from its start to the start of the next.
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

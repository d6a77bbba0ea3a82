"""Adafactor, gradient clipping and the learning-rate schedules, without recompilation.

Whatever changes from step to step enters the program as a tensor: a Python number is a constant of
the compiled graph, and another number would compile the step again.
"""

import math
import re
from collections.abc import Callable, Iterable

import torch

from .sharding import partition_spec, to_mesh

EPSILON = 1e-30  # added to the squared gradient
CLIP_THRESHOLD = 1.0  # largest root mean square of an update
DECAY_RATE = -0.8  # exponent of the second moment's decay, 1 - step^-0.8
# The parameters that Hugging Face's Trainer exempts from weight decay
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def zeros(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the moment that an optimizer starts from, whatever its name."""
    return torch.zeros(shape)


class Adafactor:
    """Adafactor as Hugging Face's Trainer configures it for ``--optim adafactor``.

    The learning rate is given, not derived from the step; there is no first moment, and updates are
    not scaled by the parameter. The second moment of a matrix is kept factored, as one mean per row
    and one per column of its last two dimensions (Shazeer and Stern 2018, section 4). Moments are
    fp32 and sharded like the parameter. Weight decay is decoupled: at every step each parameter,
    except norms, shrinks by the fraction ``weight_decay`` times the learning rate.

    ``state`` holds the moments under transformers' names. ``initial`` returns a moment of a given
    name and shape on the host.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        initial: Callable[[str, tuple[int, ...]], torch.Tensor] = zeros,
        *,
        weight_decay: float,
    ):
        self.parameters: list[torch.nn.Parameter] = []
        self.weight_decays: list[float] = []
        self.moments: list[tuple[torch.Tensor, ...]] = []
        self.state: dict[str, torch.Tensor] = {}
        for name, parameter in named_parameters:
            shape, spec = tuple(parameter.shape), partition_spec(name)
            kept = {"exp_avg_sq": (shape, spec)}
            if len(shape) >= 2:
                kept = {
                    "exp_avg_sq_row": (shape[:-1], spec[:-1]),
                    "exp_avg_sq_col": (shape[:-2] + shape[-1:], spec[:-2] + spec[-1:]),
                }
            moments = {
                f"{name}.{moment}": to_mesh(initial(f"{name}.{moment}", s), p)
                for moment, (s, p) in kept.items()
            }
            self.parameters.append(parameter)
            self.weight_decays.append(0.0 if NOT_DECAYED.search(name.lower()) else weight_decay)
            self.moments.append(tuple(moments.values()))
            self.state |= moments

    @staticmethod
    def decay(step: int) -> float:
        """Return the decay rate of the second moment at ``step`` (0-based), in [0, 1)."""
        return 1.0 - math.pow(step + 1, DECAY_RATE)

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, decay: torch.Tensor) -> None:
        """Update every parameter from its gradient, and free the gradient.

        Args:
            learning_rate: fp32 scalar on the device.
            decay: fp32 scalar on the device, :meth:`decay` of this step.
        """
        for parameter, moments, weight_decay in zip(
            self.parameters, self.moments, self.weight_decays, strict=True
        ):
            gradient = parameter.grad.float()
            square = gradient.square() + EPSILON
            if len(moments) == 2:
                row, column = moments
                row.copy_(decay * row + (1 - decay) * square.mean(-1))
                column.copy_(decay * column + (1 - decay) * square.mean(-2))
                row_factor = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
                update = gradient * row_factor * column.unsqueeze(-2).rsqrt()
            else:
                (moment,) = moments
                moment.copy_(decay * moment + (1 - decay) * square)
                update = gradient * moment.rsqrt()
            update = update / (_rms(update) / CLIP_THRESHOLD).clamp(min=1.0)
            if weight_decay:
                update = update + weight_decay * parameter.float()
            parameter.copy_(parameter.float() - learning_rate * update)
            parameter.grad = None


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> None:
    """Scale all gradients together so that their global L2 norm is at most ``max_norm``."""
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: as torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.copy_(gradient * scale)


def schedule(kind: str, peak: float, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the 0-based step, as transformers schedules it.

    The learning rate rises linearly from 0 to ``peak`` over ``warmup_steps``. Then ``linear`` and
    ``cosine`` reach 0 at ``max_steps``, ``inverse_sqrt`` falls as 1 / sqrt(step), ``constant`` and
    ``constant_with_warmup`` stay at the peak.
    """
    timescale = warmup_steps or 10_000  # inverse_sqrt's, as transformers chooses it

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        shape = {
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "inverse_sqrt": math.sqrt(timescale / (step - warmup_steps + timescale)),
            "constant": 1.0,
            "constant_with_warmup": 1.0,
        }
        return peak * max(0.0, shape[kind])

    return learning_rate

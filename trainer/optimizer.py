"""Adafactor, the learning-rate schedules and gradient clipping, free of recompilation.

Everything that changes from step to step enters the program as a tensor: a Python number is part of
the compiled graph, and the step would be compiled anew.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch_xla

from trainer.sharding import partition_spec, shard

EPSILON = 1e-30  # added to the squared gradient
CLIP_THRESHOLD = 1.0  # largest root mean square of an update
DECAY_RATE = -0.8  # exponent of the second moment's decay, 1 - step^-0.8


class Adafactor:
    """Adafactor as Hugging Face's Trainer configures it for ``--optim adafactor``.

    A given learning rate, no first moment, no weight decay, no scaling by the parameter. The second
    moment of a matrix is kept as one mean per row and one per column of its last two dimensions
    (Shazeer and Stern 2018, section 4); moments are fp32, sharded like the parameter.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]):
        self.parameters: list[torch.nn.Parameter] = []
        self.moments: list[tuple[torch.Tensor, ...]] = []
        device = torch_xla.device()
        for name, parameter in named_parameters:
            shape, spec = tuple(parameter.shape), partition_spec(name)
            kept = [(shape, spec)]
            if len(shape) >= 2:
                kept = [(s[:-1], s[:-2] + s[-1:]) for s in (shape, spec)]
                kept = list(zip(*kept, strict=True))
            self.parameters.append(parameter)
            self.moments.append(tuple(shard(torch.zeros(s).to(device), p) for s, p in kept))

    @staticmethod
    def decay(step: int) -> float:
        """Return how much of the second moment step ``step`` (0-based) keeps, in [0, 1)."""
        return 1.0 - math.pow(step + 1, DECAY_RATE)

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, decay: torch.Tensor) -> None:
        """Update every parameter from its gradient and drop the gradient.

        Args:
            learning_rate: fp32 scalar on the device.
            decay: fp32 scalar on the device, :meth:`decay` of this step.
        """
        for parameter, moments in zip(self.parameters, self.moments, strict=True):
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

    It rises linearly from 0 over ``warmup_steps`` to ``peak``, then goes on as ``kind`` says:
    ``linear`` and ``cosine`` reach 0 at ``max_steps``, ``constant`` stays.
    """

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        shape = {
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "constant": 1.0,
        }
        return peak * max(0.0, shape[kind])

    return learning_rate

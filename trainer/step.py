"""One training step: the options that it depends on, and the program that they make of a model.

The training loop, the evaluation, the plan and the benchmarks all build their step from one
:class:`StepOptions`, so a new option cannot reach one of them and miss another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import MixtralForCausalLM

from . import model, sharding
from .arguments import Arguments, ExpertsMode
from .experts import Routing
from .optimizer import Adafactor, clip_gradients, zeros


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a step depends on, besides config.json, the devices and the shape of the batch.

    No field has a default: whoever builds a step must decide about each of them.
    """

    experts_mode: ExpertsMode
    flash_attention: bool  # else dense attention
    dtype: str  # of the weights: "float32" or "bfloat16"
    tensor_devices: int  # size of the tensor-parallel axis; 1: FSDP alone
    recompute: bool  # activation checkpointing: backward recomputes each layer
    isolate_documents: bool  # attention and loss do not cross the documents packed in a sequence
    accumulation: int  # microbatches per step; the gradient is their mean
    max_grad_norm: float  # global L2 norm that gradients are clipped to; 0: no clipping
    weight_decay: float  # decoupled, times the learning rate

    @classmethod
    def from_arguments(cls, arguments: Arguments) -> Self:
        """Return the options that the command line and fsdp_config.json ask for."""
        return cls(
            experts_mode=arguments.model.experts_mode,
            flash_attention=arguments.model.flash_attention,
            dtype=arguments.model.torch_dtype,
            tensor_devices=arguments.model.tensor_devices,
            recompute=arguments.fsdp.activation_checkpointing,
            isolate_documents=arguments.data.reset_attention_mask,
            accumulation=arguments.training.gradient_accumulation_steps,
            max_grad_norm=arguments.training.max_grad_norm,
            weight_decay=arguments.training.weight_decay,
        )


def build_model(
    config: dict[str, Any], options: StepOptions, *, devices: int, slices: int
) -> MixtralForCausalLM:
    """Make the mesh over all ``devices`` the global one; return the model, without weights.

    ``config`` is the content of a config.json. ``model.initialize`` or ``model.load`` gives the
    model its weights, sharded over that mesh.
    """
    sharding.make_mesh(devices, tensor=options.tensor_devices, slices=slices)
    return model.build(
        config,
        experts_mode=options.experts_mode,
        flash_attention=options.flash_attention,
        dtype=getattr(torch, options.dtype),
    )


class TrainStep:
    """The step of a model that has its weights: forward, backward, clipping and Adafactor.

    ``initial_moments`` returns the optimizer's moment of a given name and shape, on the host: zeros
    or a checkpoint's values.
    """

    def __init__(
        self,
        options: StepOptions,
        mixtral: MixtralForCausalLM,
        initial_moments: Callable[[str, tuple[int, ...]], torch.Tensor] = zeros,
    ) -> None:
        self.options = options
        self.model = mixtral
        self.optimizer = Adafactor(
            mixtral.named_parameters(), initial_moments, weight_decay=options.weight_decay
        )

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a step updates in place, by name: the weights and the moments."""
        return dict(self.model.named_parameters()) | self.optimizer.state

    def __call__(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor | None,
        learning_rate: torch.Tensor,
        decay: torch.Tensor,
    ) -> torch.Tensor:
        """Trace one step on a global batch; return its metrics, fp32 ``[3 + E]``.

        Nothing runs before the graph is dispatched. What changes from step to step is a tensor on
        the device, so that every step is the same program.

        Args:
            tokens_BT: int64 on the mesh, split on the batch. It is computed as
                ``options.accumulation`` microbatches, one after the other.
            segments_BT: int32 like tokens_BT, the document of every position; None unless
                ``options.isolate_documents``.
            learning_rate: fp32 scalar on the device.
            decay: fp32 scalar on the device, ``Adafactor.decay`` of this step.

        Returns:
            The loss, the auxiliary loss, the router entropy and each expert's load, as
            ``experts.Routing`` defines them: means over the microbatches.
        """
        options = self.options
        inputs = [tokens_BT] if segments_BT is None else [tokens_BT, segments_BT]
        # Every device has rows of every microbatch: row i belongs to microbatch i % accumulation.
        parts = [x.unflatten(0, (-1, options.accumulation)).unbind(1) for x in inputs]
        measured = []
        for microbatch in zip(*parts, strict=True):
            microbatch = [sharding.shard(x * 1, sharding.BATCH_SHARDING) for x in microbatch]
            cross_entropy, routing = self.forward(*microbatch)
            loss = model.training_loss(self.model.config, cross_entropy, routing)
            (loss / options.accumulation).backward()
            scalars = torch.stack([loss, routing.aux_loss, routing.entropy])
            measured.append(torch.cat([scalars, routing.load]).detach())
        if options.max_grad_norm:
            clip_gradients(self.optimizer.parameters, options.max_grad_norm)
        self.optimizer.step(learning_rate, decay)
        return torch.stack(measured).mean(0)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor | None = None,
        counted_B1: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing]:
        """Return the mean cross-entropy and the routing, as ``model.causal_lm_loss`` does."""
        return model.causal_lm_loss(
            self.model, tokens_BT, segments_BT, counted_B1, recompute=self.options.recompute
        )

"""The trainer's parameters as transformers has them."""

import torch


def as_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the parameters, or their gradients, the names and shapes that transformers has."""
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith("gate_proj")]:
        halves = tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(halves, dim=2).mT
    return tensors

"""Splash attention, interpreted, against plain PyTorch; and which kernel is for which model."""

import pytest
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.runtime as xr
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from trainer import attention

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 256, 128


def draw(heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((BATCH, heads, LENGTH, WIDTH), generator=generator)


def outcome(function, tensors: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Return the result for ``tensors`` and the gradients of its sum, weighted at random."""
    leaves = [tensor.to(device).requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = draw(HEADS, 9).to(device)
    gradients = torch.autograd.grad((out * weights).sum(), leaves)
    torch_xla.sync()
    return [tensor.detach().cpu() for tensor in (out, *gradients)]


def plain(window: int | None, documents: list[list[int]]):
    """Attention over each document alone; ``documents`` are the lengths of them in every row."""
    position = torch.arange(LENGTH)
    distance = position[:, None] - position[None]
    visible = (distance >= 0) & (distance < (window or LENGTH))

    def one(q, k, v):
        mask = visible[: q.shape[1], : q.shape[1]]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)

    def rows(q, k, v):
        split = [[x[row].split(lengths, 1) for x in (q, k, v)] for row, lengths in documents]
        return torch.stack(
            [torch.cat([one(*x) for x in zip(*row, strict=True)], 1) for row in split]
        )

    documents = list(enumerate(documents))
    return rows


# A window longer than the text is none.
@pytest.mark.parametrize(
    ("kv_heads", "window", "documents"),
    [
        (2, None, None),
        (4, 100, None),
        (1, 1000, None),
        (2, None, [[1, 127, 100, 28], [200, 56]]),
        (4, 100, [[256], [150, 106]]),
    ],
)
def test_splash_and_its_gradients_are_those_of_plain_attention(kv_heads, window, documents):
    device, ids = torch_xla.device(), None
    if documents:
        ids = torch.stack(
            [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in documents]
        )
        ids = ids.int().to(device)
    tensors = [draw(HEADS, 0) * WIDTH**-0.5, draw(kv_heads, 1), draw(kv_heads, 2)]
    ours = outcome(lambda q, k, v: attention.splash(q, k, v, window, ids), tensors, device)
    expected = outcome(plain(window, documents or [[LENGTH]] * BATCH), tensors, "cpu")
    for found, wanted in zip(ours, expected, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize(
    ("changes", "length", "kernel"),
    [
        ({}, 1024, "pallas_splash"),
        ({"num_key_value_heads": 8}, 1024, "pallas_splash"),
        ({}, 1000, "dense"),
        ({"hidden_size": 512}, 1024, "dense"),
    ],
)
def test_the_kernel_for_a_model_on_a_tpu(monkeypatch, changes, length, kernel):
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = MixtralConfig(**(sizes | changes), attn_implementation=attention.FLASH)
    assert attention.kernel_of(config, length) == "dense"
    monkeypatch.setattr(xr, "device_type", lambda: "TPU")
    assert attention.kernel_of(config, length) == kernel


def test_the_models_rotary_embeddings_take_our_function(monkeypatch):
    attention.register()
    used = []
    monkeypatch.setattr(modeling_mixtral, "rotate_half", lambda x: used.append(x.shape) or x)
    q, k = draw(HEADS, 0), draw(2, 1)
    modeling_mixtral.apply_rotary_pos_emb(q, k, *torch.zeros(2, BATCH, LENGTH, WIDTH))
    assert used == [q.shape, k.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_rotated_exactly(dtype):
    x = draw(HEADS, 1).to(dtype)
    ours = outcome(attention.rotate_half, [x], torch_xla.device())
    theirs = outcome(
        lambda x: torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1), [x], "cpu"
    )
    assert all(torch.equal(mine, expected) for mine, expected in zip(ours, theirs, strict=True))

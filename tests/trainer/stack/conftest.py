"""Tests that need the trainer's stack; they run inside the image, one process per device count.

CPU_NUM_DEVICES says how many virtual devices this process has; XLA reads it once.
"""

import os

import pytest

from trainer.__main__ import prepare_environment


def pytest_configure():
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    prepare_environment()
    import torch
    import torch_xla
    import torch_xla.runtime as xr

    xr.use_spmd()
    torch.zeros(1).to(torch_xla.device()).cpu()  # XLA's client exists before the first backward


@pytest.fixture(scope="session")
def devices() -> int:
    return int(os.environ["CPU_NUM_DEVICES"])


@pytest.fixture(autouse=True)
def mesh(devices):
    """Every test starts on a fresh mesh over all devices, with numbers baked in as in the loop."""
    import torch_xla

    from trainer.sharding import fsdp_mesh

    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    return fsdp_mesh(devices)

"""Tests that need the trainer's stack; they run inside the image, one process per device count.

CPU_NUM_DEVICES says how many virtual devices this process has; XLA reads it once.
"""

import os
import tempfile

import pytest

from tests.servers.hub import Hub
from trainer.__main__ import start_client


def pytest_configure(config):
    # The only hub there is, known before huggingface_hub is imported, which reads this once.
    config.hub = Hub().__enter__()
    os.environ |= {"HF_ENDPOINT": config.hub.endpoint, "HF_HOME": tempfile.mkdtemp()}
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    # Most of the time goes into compiling programs that run once.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")  # for the TPU's compiler
    start_client()


@pytest.fixture(scope="session")
def devices() -> int:
    return int(os.environ["CPU_NUM_DEVICES"])


@pytest.fixture(autouse=True)
def mesh(devices):
    """Every test starts on a fresh mesh over all devices, with numbers baked in as in the loop."""
    import torch_xla

    from trainer.sharding import make_mesh

    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    return make_mesh(devices)

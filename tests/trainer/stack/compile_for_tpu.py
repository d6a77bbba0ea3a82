"""Compile the training step for a TPU slice with libtpu's compiler, which needs no TPU.

    python compile_for_tpu.py EXPERTS_MODE TOPOLOGY

Prints one JSON object: the custom calls and collectives in the compiled program. A program of its
own, because libtpu may end the process instead of raising.
"""

import collections
import json
import os
import re
import sys

DEVICES = 4
CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}

# The step is traced on virtual CPU devices; the TPU exists only as a topology.
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(DEVICES), "JAX_PLATFORMS": "cpu"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def traced_step(mode: str) -> str:
    """Return the MLIR of one step as it runs on a TPU: forward, backward, clipping and update."""
    import torch
    import torch_xla
    import torch_xla.runtime as xr
    from jax._src import stages
    from jaxlib import _jax

    xr.use_spmd()
    torch.zeros(1).to(torch_xla.device()).cpu()
    # Make the trainer choose, and JAX lower, the kernels of a TPU.
    xr.device_type = lambda: "TPU"
    lower = stages.Traced.lower
    stages.Traced.lower = lambda self, **_: lower(self, lowering_platforms=("tpu",))

    from trainer import loop, model
    from trainer.optimizer import Adafactor
    from trainer.sharding import BATCH_SHARDING, fsdp_mesh, shard

    fsdp_mesh(DEVICES)
    mixtral = model.build(CONFIG, experts_mode=mode, flash_attention=True, dtype=torch.bfloat16)
    model.initialize(mixtral, seed=0)
    optimizer = Adafactor(mixtral.named_parameters())
    device = torch_xla.device()
    tokens = shard(torch.zeros(8, 1024, dtype=torch.int64).to(device), BATCH_SHARDING)
    rates = torch.tensor([1e-3, 0.5]).to(device)
    torch_xla.sync()
    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    loss = loop.train_step(
        mixtral, optimizer, tokens, rates[0], rates[1], max_grad_norm=1.0, recompute=True
    )
    moments = [tensor for kept in optimizer.moments for tensor in kept]
    outputs = [loss, *(parameter.data for parameter in mixtral.parameters()), *moments]
    proto = torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs)
    return _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(proto))


def compiled(module: str, topology: str) -> str:
    """Return the optimized HLO of ``module`` for the slice ``topology``, such as ``v5:2x2x1``."""
    import numpy as np
    from jax._src import compiler
    from jax.experimental.topologies import get_topology_desc
    from jaxlib import _jax

    devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=DEVICES,
        device_assignment=np.arange(DEVICES).reshape(1, DEVICES),
        use_spmd_partitioning=True,
    )
    executable = devices[0].client.compile(
        module.encode(), _jax.DeviceList(tuple(devices)), options
    )
    return executable.hlo_modules()[0].to_string()


if __name__ == "__main__":
    text = compiled(traced_step(sys.argv[1]), sys.argv[2])
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    collectives = re.findall(r" (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    print(json.dumps(collections.Counter(calls + collectives)))

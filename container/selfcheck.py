"""What an image must show before it counts as built.

    python selfcheck.py stack FILE ...   what the files pin is installed, every import works
    python selfcheck.py step             the trainer takes a step on two CPU devices

It ends with exit code 1 and says why where one of them fails.
"""

import importlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What the trainer imports, the kernels' own needs included: torch_xla's Pallas kernels are jax
# functions, and calling them takes flax too.
IMPORTS = (
    "torch",
    "torch_xla",
    "torch_xla.runtime",
    "torch_xla.distributed.spmd",
    "torch_xla.experimental.custom_kernel",
    "jax.experimental.pallas.ops.tpu.megablox",
    "flax",
    "libtpu",
    "transformers",
    "tokenizers",
    "datasets",
)

MODEL = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
FSDP = {
    "fsdp_transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
    "xla": True,
    "xla_fsdp_v2": True,
    "xla_fsdp_grad_ckpt": True,
}
DEVICES = 2


def wrong_versions(requirements: str) -> list[str]:
    """Return a complaint for every pin in `requirements` that is not what is installed."""
    complaints = []
    for name, pinned in re.findall(r"^([\w.-]+)==([^\s;]+)", requirements, re.MULTILINE):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        # torch's CPU build calls itself 2.9.1+cpu.
        if installed.partition("+")[0] != pinned:
            complaints.append(f"{name}: pinned {pinned}, installed {installed}")
    return complaints


def check_stack(files: list[str]) -> None:
    """Compare what is installed with the lock files, and import what the trainer imports."""
    complaints = []
    for file in files:
        complaints += wrong_versions(Path(file).read_text(encoding="utf-8"))
    if complaints:
        sys.exit("selfcheck: the stack is not what its lock files pin\n" + "\n".join(complaints))
    for name in IMPORTS:
        importlib.import_module(name)
    print(f"selfcheck: versions are as in {', '.join(files)}; {len(IMPORTS)} imports work")


def check_step() -> None:
    """Train a Mixtral of one small layer for one step, sharded over two devices."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(DEVICES),
        # With fewer threads than this, XLA's CPU devices wait for each other for ever.
        "NPROC": str(2 * DEVICES),
        # The program runs once: what the compiler would spend on making it fast is lost.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    with tempfile.TemporaryDirectory() as directory:
        config, fsdp, text, output = (
            Path(directory, name) for name in ("config.json", "fsdp.json", "text.txt", "output")
        )
        config.write_text(json.dumps(MODEL), encoding="utf-8")
        fsdp.write_text(json.dumps(FSDP), encoding="utf-8")
        text.write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
        flags = {
            "config_name": config,
            "fsdp": "full_shard",
            "fsdp_config": fsdp,
            "train_file": text,
            "block_size": 32,
            "per_device_train_batch_size": 2 * DEVICES,
            "max_steps": 1,
            "output_dir": output,
        }
        command = [sys.executable, "-m", "trainer", "--do_train", "--gmm"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        trained = subprocess.run(command, env=environment)
        if trained.returncode:
            sys.exit(f"selfcheck: the trainer failed, exit code {trained.returncode}")
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    if summary["device"]["count"] != DEVICES:
        sys.exit(f"selfcheck: {summary['device']} where {DEVICES} devices were asked for")
    # A model that knows nothing yet is as good as one that guesses evenly.
    loss, even = json.loads(last)["loss"], math.log(MODEL["vocab_size"])
    if not math.isclose(loss, even, rel_tol=0.1):
        sys.exit(f"selfcheck: the first loss is {loss}, and not about ln(vocabulary) = {even:.2f}")
    print(f"selfcheck: one step on {DEVICES} devices, loss {loss:.3f}")


def main(arguments: list[str]) -> None:
    """Run the check that is named first."""
    match arguments:
        case ["stack", *files] if files:
            check_stack(files)
        case ["step"]:
            check_step()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

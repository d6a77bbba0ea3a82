"""Check an installed stack: its versions, its imports, and its kernels for the chip.

    python doctor.py [--accelerator-type v5p-8] [--device] FILE ...

``container/Dockerfile`` runs it at the end of every build of a stack, the role ``torch_xla`` at the
end of every native installation, and ``doctor.yml`` on every worker, in the image or natively. It
needs neither a TPU nor the trainer.

The FILEs are the lock files that the stack was installed from. Every check prints one line. A
failed check also prints the reason and the command that repairs the stack, and the exit code is 1.

* installed versions equal those in the lock files; CUDA's libraries (.cuda.txt) count only with a
  CUDA build of torch
* torch, torch_xla and the trainer's other imports load together
* torch_xla's Pallas kernels, Megablox and flash attention, forward and backward, compile for the
  chip with the stack's own libtpu (the plan compiles the whole step)
* with --device: the TPU exists, and no other process holds it

Each check runs in a process of its own, because mismatched libraries may abort the process instead
of raising.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# By a chip's name in an accelerator type, libtpu's name of a slice of four and its further options.
# `make docs` writes them from the trainer's table of chips, which is not where this file runs.
TOPOLOGIES = json.loads(Path(__file__).with_name("topologies.json").read_text(encoding="utf-8"))
# The packages that are listed with version and origin
SHOWN = ("torch", "torch_xla", "libtpu", "jax", "jaxlib", "flax", "transformers", "datasets")
# The trainer's imports other than the kernels
IMPORTS = ("torch_xla.distributed.spmd", "transformers", "tokenizers", "datasets")
SECONDS = 600  # until a check counts as failed


def pins(files: list[Path]) -> dict[str, str]:
    """Return the version of every package in the lock files ``files``."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))


def installed(name: str) -> str | None:
    """Return the version of a package without its build, 2.9.1 for 2.9.1+cpu; None if missing."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def build(name: str) -> str:
    """Return the build in a package's version, cpu for 2.9.1+cpu; "" if it names none."""
    try:
        return importlib.metadata.version(name).partition("+")[2]
    except importlib.metadata.PackageNotFoundError:
        return ""


def origin(name: str) -> str:
    """Return where a package was installed from, as far as its installer recorded it."""
    distribution = importlib.metadata.distribution(name)
    url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url")
    return url or (f"an index, build {build(name)}" if build(name) else "an index")


def install(name: str, pinned: dict[str, str]) -> str:
    """Return the command that installs a package in its pinned version."""
    version = f"=={pinned[name]}" if name in pinned else ""
    return f"pip install --no-deps {name}{version}"


def wrong_versions(pinned: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each deviation from the pinned versions, with the command that repairs it."""
    for name, version in pinned.items():
        found = installed(name)
        if found is None:
            yield f"{name} is missing, {version} is pinned", install(name, pinned)
        elif found != version:
            yield f"{name} is {found}, {version} is pinned", install(name, pinned)


def minor(version: str | None) -> str:
    """Return the first two numbers of a version."""
    return ".".join((version or "").split(".")[:2])


def diagnosis(words: str, pinned: dict[str, str]) -> tuple[str, str]:
    """Return the cause of a failed check, from its output, and the command that repairs it.

    The patterns are failures of this stack that have been observed.
    """
    torch, torch_xla = installed("torch"), installed("torch_xla")
    if minor(torch) != minor(torch_xla):
        wanted = f"torch_xla=={pinned.get('torch_xla', minor(torch) + '.0')}"
        return (
            f"torch is {torch} and torch_xla {torch_xla}: they load only in the same minor version",
            f"pip install --no-deps torch=={pinned.get('torch', minor(torch_xla) + '.0')} {wanted}",
        )
    if missing := re.search(r"No module named '(\w+)", words):
        return f"{missing[1]} is missing", install(missing[1], pinned)
    if "Jax is required for this feature" in words:
        absent = [name for name in ("jax", "jaxlib", "flax") if not installed(name)] or ["flax"]
        commands = "; ".join(install(name, pinned) for name in absent)
        return f"torch_xla's Pallas kernels need {', '.join(absent)}", commands
    if mosaic := re.search(r"Unsupported version: expected <= (\d+) but got (\d+)", words):
        return (
            f"libtpu {installed('libtpu')} reads kernels up to version {mosaic[1]}, and jax "
            f"{installed('jax')} writes version {mosaic[2]}",
            install("libtpu", pinned) if "libtpu" in pinned else "pip install --upgrade libtpu",
        )
    return words.strip().splitlines()[-1] if words.strip() else "it ended without a word", ""


def load() -> None:
    """Import what the trainer imports, and compute with torch and torch_xla together."""
    import torch
    import torch_xla

    assert (torch.ones(2, device=torch_xla.device()) + 1).cpu().tolist() == [2, 2]
    for name in IMPORTS:
        importlib.import_module(name)


def kernels(accelerator_type: str) -> None:
    """Compile torch_xla's Pallas kernels, each as a program of its own, and print their names."""
    import torch
    import torch_xla
    import torch_xla.experimental.custom_kernel as pallas
    from jax._src import stages

    # By default JAX would lower for the CPU of this process.
    lower = stages.Traced.lower
    stages.Traced.lower = lambda self, **_: lower(self, lowering_platforms=("tpu",))
    device = torch_xla.device()

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    groups, rows, width, tiling = 4, 512, 1024, (128, 512, 512)
    sizes = torch.full((groups,), rows // groups, dtype=torch.int32, device=device)
    x, weight = tensor(rows, width), tensor(groups, width, width)
    query, key, value = (tensor(1, 2, 512, 128).requires_grad_() for _ in range(3))

    def flash() -> torch.Tensor:
        return pallas.flash_attention(query, key, value, causal=True)

    # torch_xla 2.6 has no transpose_rhs.
    known = inspect.signature(pallas.gmm).parameters
    transposed = {"transpose_rhs": True} if "transpose_rhs" in known else {}

    programs: dict[str, Callable[[], list[torch.Tensor]]] = {
        "gmm forward": lambda: [pallas.gmm(x, weight, sizes, tiling, **transposed)],
        "gmm backward": lambda: [
            pallas.gmm(x, weight, sizes, tiling),
            pallas.tgmm(x.t(), x, sizes, tiling),
        ],
        "flash attention forward": lambda: [flash()],
        "flash attention backward": lambda: list(
            torch.autograd.grad(flash().sum(), (query, key, value))
        ),
    }
    for name, program in programs.items():
        print(f"compiling {name}", flush=True)
        compile_for(accelerator_type, program())
    print(", ".join(programs))


def compile_for(accelerator_type: str, outputs: list) -> None:
    """Compile the program of ``outputs`` for one device of the chip's smallest slice."""
    import numpy as np
    import torch_xla
    from jax._src import compiler
    from jax.experimental.topologies import get_topology_desc

    name, options = TOPOLOGIES[chip_of(accelerator_type)]
    devices = get_topology_desc(platform="tpu", topology_name=name, **options).devices[:1]
    try:
        from jaxlib import _jax

        placed = [_jax.DeviceList(tuple(devices))]
    except ImportError:  # the jaxlib of torch_xla 2.6, whose compile() takes no devices
        from jaxlib import xla_extension as _jax

        placed = []
    proto = torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs)
    module = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(proto))
    devices[0].client.compile(
        module.encode(),
        *placed,
        compiler.get_compile_options(
            num_replicas=1, num_partitions=1, device_assignment=np.zeros((1, 1), dtype=int)
        ),
    )


def device() -> None:
    """Compute on the TPU; fails without one, and if another process holds it."""
    import torch
    import torch_xla
    import torch_xla.runtime as xr

    assert (torch.ones(2, device=torch_xla.device()) + 1).cpu().tolist() == [2, 2]
    print(f"{xr.global_runtime_device_count()} devices: {xr.device_type()}")


def chip_of(accelerator_type: str) -> str:
    """Return the chip in an accelerator type, such as v5p in v5p-128."""
    return accelerator_type.partition("-")[0]


# The environment of each check's process. The TPU's compiler must not look for a TPU.
CPU = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
CPU |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
CHECKS = {"load": CPU, "kernels": CPU, "device": {"PJRT_DEVICE": "TPU"}}


def ask(check: str, accelerator_type: str) -> tuple[bool, str]:
    """Run a check in a process of its own; return whether it succeeded, and its output."""
    command = [sys.executable, __file__, "--accelerator-type", accelerator_type, "--run", check]
    try:
        ran = subprocess.run(
            command,
            env=os.environ | CHECKS[check],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {SECONDS} s"
    return ran.returncode == 0, ran.stdout


class Verdict:
    """Prints the results of the checks, and remembers whether any has failed."""

    def __init__(self) -> None:
        self.failed = False

    def good(self, what: str, words: str = "") -> None:
        """Print that a check has succeeded."""
        print(f"ok     {what}{': ' if words else ''}{words}", flush=True)

    def bad(self, what: str, words: str, mend: str) -> None:
        """Print that a check has failed, and the command that repairs the stack."""
        self.failed = True
        print(f"FAIL   {what}: {words}", flush=True)
        if mend:
            print(f"       mend it: {mend}", flush=True)


def examine(accelerator_type: str, with_device: bool, files: list[Path]) -> bool:
    """Print a line for every package and every check; return whether all checks succeeded."""
    if build("torch") == "cpu":
        files = [file for file in files if not file.name.endswith(".cuda.txt")]
    pinned, verdict = pins(files), Verdict()
    for name in SHOWN:
        version = installed(name)
        source = f"from {origin(name)}" if version else ""
        print(f"       {name:13} {version or 'missing':10} {source}".rstrip())
    wrong = list(wrong_versions(pinned))
    for words, mend in wrong:
        verdict.bad("versions", words, mend)
    if not wrong:
        verdict.good("versions", f"{len(pinned)} packages are as {len(files)} lock files pin them")
    checks = {
        "load": "torch, torch_xla and what the trainer imports load together",
        "kernels": f"kernels compile for {chip_of(accelerator_type)}",
    }
    if with_device:
        checks["device"] = "the TPU is there and free"
    for check, what in checks.items():
        well, words = ask(check, accelerator_type)
        if well:
            verdict.good(what, words.strip().splitlines()[-1] if check != "load" else "")
        else:
            current = re.findall(r"^compiling (.*)$", words, re.MULTILINE)
            verdict.bad(f"{what} ({current[-1]})" if current else what, *diagnosis(words, pinned))
    return not verdict.failed


def main() -> int:
    """Parse the command line and examine the stack."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator-type", default="v5p-8", help="what the kernels are for")
    parser.add_argument("--device", action="store_true", help="look for the TPU, too")
    parser.add_argument("--run", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="lock files")
    options = parser.parse_args()
    if chip_of(options.accelerator_type) not in TOPOLOGIES:
        parser.error(
            f"--accelerator-type {options.accelerator_type}: "
            f"known chips are {', '.join(TOPOLOGIES)}"
        )
    if options.run:
        check = {"load": load, "device": device}.get(options.run)
        check() if check else kernels(options.accelerator_type)
        return 0
    return 0 if examine(options.accelerator_type, options.device, options.files) else 1


if __name__ == "__main__":
    sys.exit(main())

"""``python -m trainer <flags of the guide's run_clm.py>``: train Mixtral on the devices of a slice.

Exit codes: 0 success (with ``--validate``: the input is valid), 1 the run failed, 2 bad input, 143
ended by SIGTERM. A run with ``--save_strategy steps`` that SIGTERM ends between its first and its
last step has saved a checkpoint.
"""

import logging
import os
import sys

from .flags import BadInput
from .validation import validate


def main(argv: list[str]) -> int:
    """Run the command line ``argv``, without the program's name; return the exit code."""
    try:
        arguments = validate(argv)
        if arguments.training.validate:
            print("ok")
            return 0
        # torch_xla and JAX take seconds to import, so the input is validated first.
        start_client()
        from .run import run

        return run(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def start_client() -> None:
    """Set the environment that torch_xla, XLA and JAX read, then start torch_xla's client (SPMD).

    The client must take the devices before JAX does, which would keep a TPU for itself, and before
    the process runs any backward: a backward before the client exists makes later ones fail.
    """
    # The trainer calls use_spmd() itself; the variable would only make torch_xla warn.
    os.environ.pop("XLA_USE_SPMD", None)
    # Hide the libraries' warnings, which users of the trainer cannot act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if os.environ.get("PJRT_DEVICE") == "CPU":
        # JAX only traces kernels here and must not look for a TPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # XLA's CPU client deadlocks in collectives with fewer threads than virtual devices.
        devices = int(os.environ.get("CPU_NUM_DEVICES", "1"))
        os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))

    import torch
    import torch_xla
    import torch_xla.runtime as xr

    xr.use_spmd()  # must precede the first use of a device
    torch.zeros(1).to(torch_xla.device()).cpu()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m trainer <flags of the guide's run_clm.py>``: train Mixtral on the devices of a slice.

Exit codes: 0 done (or, with ``--validate``, the input can work), 1 the run failed, 2 bad input, 143
ended by SIGTERM; a run that saves checkpoints has saved one then, if it was at its steps.
"""

import logging
import os
import sys

from trainer.flags import BadInput
from trainer.validation import validate


def main(argv: list[str]) -> int:
    """Run the command line ``argv``, without the program's name; return the exit code."""
    try:
        arguments = validate(argv)
        if arguments.training.validate:
            print("ok")
            return 0
        # The stack takes seconds to import: only now, when the input was found good.
        start_client()
        from trainer.run import run

        return run(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def start_client() -> None:
    """Set what torch_xla, XLA and JAX read when they are imported, and let XLA's client take the
    devices, under SPMD.

    It must do so before JAX can, which would keep a TPU for itself, and before the process runs any
    backward, or later ones fail.
    """
    # The trainer calls use_spmd() itself; the variable only makes torch_xla warn.
    os.environ.pop("XLA_USE_SPMD", None)
    # Without the warnings of libraries that nobody here can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if os.environ.get("PJRT_DEVICE") == "CPU":
        # JAX only traces kernels here; it need not look for a TPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # XLA's CPU client deadlocks in collectives with fewer threads than virtual devices.
        devices = int(os.environ.get("CPU_NUM_DEVICES", "1"))
        os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))

    import torch
    import torch_xla
    import torch_xla.runtime as xr

    xr.use_spmd()  # before anything touches a device
    torch.zeros(1).to(torch_xla.device()).cpu()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m trainer.plan``: compile the training step for a TPU slice, without the TPU.

    python -m trainer.plan --accelerator_type v5p-256 <the trainer's flags>

The step is the one that the training loop runs; libtpu compiles it in a process of its own. Prints
a table, writes it as plan.txt, and the same numbers as plan.json, into ``--output_dir``.

Exit codes: 0 the step fits the memory of the chips, 2 bad input, 3 the step does not fit, 4 it does
not compile.
"""

import argparse
import importlib.metadata
import os
import sys
from typing import NoReturn

from .. import metrics
from ..arguments import Arguments
from ..flags import BadInput
from ..tpu import Slice, parse_slice
from ..validation import check_devices, parse
from . import estimate
from .table import table

FITS, BAD_INPUT, DOES_NOT_FIT, DOES_NOT_COMPILE = 0, 2, 3, 4


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def main(argv: list[str]) -> int:
    """Run the command line ``argv``, without the program's name; return the exit code."""
    try:
        slice_, arguments, flags = read(argv)
    except (BadInput, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    measured = estimate.measure(slice_, flags)
    if "supported_chips" in measured:
        libtpu = f"libtpu {importlib.metadata.version('libtpu')}"
        supported = ", ".join(measured["supported_chips"]) or "none of this project's chips"
        print(
            f"error: {libtpu} cannot compile for {slice_.chip.name}; it compiles for: {supported}. "
            "Plan for one of these, or install the libtpu that the stack's lock file pins",
            file=sys.stderr,
        )
        return BAD_INPUT
    plan = estimate.verdict(arguments, slice_, measured)
    if plan["fits"] is False:
        print(
            f"does not fit {slice_}; compiling smaller batches and larger slices",
            file=sys.stderr,
            flush=True,
        )
        plan["what_to_change"] = estimate.what_fits(arguments, slice_, flags, measured)
    arguments.training.output_dir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(arguments.training.output_dir / "plan.json", plan)
    text = table(plan)
    (arguments.training.output_dir / "plan.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    if "error" not in measured:
        return FITS if plan["fits"] else DOES_NOT_FIT
    return DOES_NOT_FIT if plan["fits"] is False else DOES_NOT_COMPILE


def read(argv: list[str]) -> tuple[Slice, Arguments, list[str]]:
    """Return the slice, the trainer's arguments, and the trainer's flags as given in ``argv``.

    Raises BadInput or ValueError for flags that cannot work, on any slice or on this one.
    """
    parser = _Parser(
        prog="python -m trainer.plan",
        allow_abbrev=False,
        epilog="All other flags are the trainer's.",
    )
    parser.add_argument(
        "--accelerator_type",
        required=True,
        help="such as v5p-256; or, with --topology, the chip alone: v5p",
    )
    parser.add_argument(
        "--topology", default="", help="such as 4x4x8 (default: that of --accelerator_type)"
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="number of such slices that train together"
    )
    options, flags = parser.parse_known_args(argv)
    if options.slices < 1:
        raise BadInput(f"--slices is {options.slices}; it must be at least 1")
    slice_ = parse_slice(options.accelerator_type, options.topology, options.slices)
    arguments = parse(flags)
    check_devices(arguments, slice_.chips, slice_.slices, slice_.chip)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(
            "libtpu is not installed, whose compiler the plan needs; run the plan in the trainer's "
            "image"
        ) from None
    return slice_, arguments, flags


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv[1:]))

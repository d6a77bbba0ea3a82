"""``python -m trainer.plan``: compile the training step for a TPU slice, without the TPU.

    python -m trainer.plan --accelerator_type v5p-256 <the trainer's flags>

The step is the one that training runs; libtpu's own compiler compiles it in a process apart. Prints
a table and writes plan.json, and the table as plan.txt, into the directory of ``--output_dir``.

Exit codes: 0 the step fits, 2 bad input, 3 it does not fit the memory, 4 it does not compile.
"""

import argparse
import importlib.metadata
import os
import sys
from typing import NoReturn

from trainer import metrics
from trainer.arguments import Arguments
from trainer.flags import BadInput
from trainer.plan import estimate
from trainer.plan.table import table
from trainer.tpu import Slice, parse_slice
from trainer.validation import check_devices, parse

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
    if "known" in measured:
        libtpu = f"libtpu {importlib.metadata.version('libtpu')}"
        known = ", ".join(measured["known"]) or "none that this project knows"
        print(
            f"error: {libtpu} does not know {slice_.chip.name}; the chips it does: {known}",
            file=sys.stderr,
        )
        return BAD_INPUT
    plan = estimate.verdict(arguments, slice_, measured)
    if plan["fits"] is False:
        print(f"does not fit {slice_}; compiling what should", file=sys.stderr, flush=True)
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
    """Return the slice, the trainer's arguments, and the trainer's flags as they were given.

    Raises BadInput or ValueError for what cannot work on any slice or not on this one.
    """
    parser = _Parser(
        prog="python -m trainer.plan", allow_abbrev=False, epilog="All others are the trainer's."
    )
    parser.add_argument("--accelerator_type", required=True, help="as v5p-256; or v5p")
    parser.add_argument("--topology", default="", help="as 4x4x8; by default that of the type")
    parser.add_argument("--slices", type=int, default=1, help="how many such slices")
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
            "there is no libtpu here, whose compiler the plan needs; run it in the trainer's image"
        ) from None
    return slice_, arguments, flags


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv[1:]))

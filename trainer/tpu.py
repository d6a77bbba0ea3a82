"""The TPU chips this project knows: speeds, memory, and how their slices are named."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One generation of Cloud TPU. Speeds and sizes are those of one chip.

    ``ici_bytes_per_s`` counts all links, both directions; None where it is not published.
    ``units_per_chip`` is what the number in an accelerator type counts: 2 for TensorCores, 1 for
    chips. ``slice_chips`` are the sizes of slices: a slice of up to ``max_chips_per_host`` chips is
    one host, a larger one has ``chips_per_host`` chips on each.
    """

    name: str
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float | None
    units_per_chip: int
    chips_per_host: int
    max_chips_per_host: int
    slice_chips: Sequence[int]

    def accelerator_type(self, chips: int) -> str:
        """Return the name of a slice of so many chips: v5p-128 for 64 chips of v5p."""
        return f"{self.name}-{chips * self.units_per_chip}"


GIB = 2**30
# Parts of a cube of 4 x 4 x 4 chips, then whole cubes.
_TORUS_3D = (4, 8, 16, 32)
_TORUS_2D = (1, 4, 8, 16, 32, 64, 128, 256)

# Google's pages on each generation (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200e9, None, 2, 4, 4, (*_TORUS_3D, *range(64, 4097, 64))),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 400e9, 1, 4, 8, _TORUS_2D),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 1200e9, 2, 4, 4, (*_TORUS_3D, *range(64, 6145, 64))),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 800e9, 1, 4, 8, _TORUS_2D),
    )
}
# Cloud TPU itself names v5e slices v5litepod-N.
_ALIASES = {"v5litepod": "v5e"}


def parse_accelerator_type(accelerator_type: str) -> tuple[Chip, int, int]:
    """Return ``(chip, chips, hosts)`` of a slice: ``v5p-128`` is 64 chips of v5p on 16 hosts.

    Raises ValueError, naming what is known, for any other chip or a size that has no slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", accelerator_type)
    chip = match and CHIPS.get(_ALIASES.get(match[1], match[1]))
    if not chip:
        raise ValueError(
            f"unknown accelerator type {accelerator_type!r}; known are "
            f"{', '.join(f'{name}-N' for name in (*CHIPS, *_ALIASES))}, for example v5p-128"
        )
    chips, rest = divmod(int(match[2]), chip.units_per_chip)
    if rest or chips not in chip.slice_chips:
        sizes = [size * chip.units_per_chip for size in chip.slice_chips]
        common = ", ".join(str(size) for size in sizes[:8])
        more = f", ... {sizes[-1]}" if len(sizes) > 8 else ""
        counts = "TensorCores, two a chip" if chip.units_per_chip == 2 else "chips"
        raise ValueError(
            f"accelerator type {accelerator_type!r} has no slice of that size; the number counts "
            f"{counts}, and the sizes of {chip.name} are {common}{more}"
        )
    hosts = 1 if chips <= chip.max_chips_per_host else chips // chip.chips_per_host
    return chip, chips, hosts


def current_chip(environ: Mapping[str, str] = os.environ) -> Chip | None:
    """Return the chip that PJRT_DEVICE and TPU_ACCELERATOR_TYPE promise; None if they do not."""
    if environ.get("PJRT_DEVICE") != "TPU" or not environ.get("TPU_ACCELERATOR_TYPE"):
        return None
    return parse_accelerator_type(environ["TPU_ACCELERATOR_TYPE"])[0]

"""The TPU chips this project knows: speeds, memory, and how their slices are named."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of Cloud TPU. Speeds and sizes are those of one chip.

    Attributes:
        name: what this project calls the generation.
        cloud_name: what Cloud TPU calls it in an accelerator type.
        libtpu_name: what libtpu calls it in a topology.
        libtpu_chip_config: libtpu's chip_config_name, where its default does not fit.
        peak_bf16_flops: FLOP/s in bfloat16.
        matrix_units: its matrix units, counted in units of 128 x 128 multipliers.
        hbm_bytes: size of its memory.
        hbm_bytes_per_s: bandwidth of its memory.
        ici_bytes_per_s: all links of a slice's network, both directions.
        dcn_bytes_per_s: share of its host's network, one direction.
        dimensions: of the mesh or torus that a slice is: 2 or 3.
        units_per_chip: 2 where the number in an accelerator type counts TensorCores, 1 for chips.
        chips_per_host: chips on each host of a slice of several hosts.
        max_chips_per_host: chips of the largest slice of one host.
        slice_chips: the sizes of slices, in chips.
    """

    name: str
    cloud_name: str
    libtpu_name: str
    libtpu_chip_config: str = ""
    peak_bf16_flops: float
    matrix_units: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    dcn_bytes_per_s: float
    dimensions: int
    units_per_chip: int
    chips_per_host: int
    max_chips_per_host: int
    slice_chips: Sequence[int]

    def accelerator_type(self, chips: int) -> str:
        """Return the name of a slice of so many chips: v5p-128 for 64 chips of v5p."""
        return f"{self.name}-{chips * self.units_per_chip}"

    @property
    def clock_hz(self) -> float:
        """Cycles a second, as far as the peak tells: in each, a matrix unit multiplies and adds
        128 x 128 numbers.
        """
        return self.peak_bf16_flops / (self.matrix_units * 2 * 128 * 128)


@dataclass(frozen=True)
class Slice:
    """What trains: ``slices`` slices of a chip, each a mesh or torus of the shape ``topology``."""

    chip: Chip
    topology: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The chips of all slices."""
        return math.prod(self.topology) * self.slices

    def __str__(self) -> str:
        name = self.chip.accelerator_type(math.prod(self.topology))
        count = f"{self.slices} x " if self.slices > 1 else ""
        return f"{count}{name} ({'x'.join(map(str, self.topology))})"


GIB = 2**30
# Parts of a cube of 4 x 4 x 4 chips, then whole cubes.
_TORUS_3D = (4, 8, 16, 32)
_TORUS_2D = (1, 4, 8, 16, 32, 64, 128, 256)

# Google's pages on each generation (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            cloud_name="v4",
            libtpu_name="v4",
            libtpu_chip_config="megacore",  # else each of its two TensorCores is a device
            peak_bf16_flops=275e12,
            matrix_units=8,
            hbm_bytes=32 * GIB,
            hbm_bytes_per_s=1200e9,
            ici_bytes_per_s=600e9,
            dcn_bytes_per_s=6.25e9,
            dimensions=3,
            units_per_chip=2,
            chips_per_host=4,
            max_chips_per_host=4,
            slice_chips=(*_TORUS_3D, *range(64, 4097, 64)),
        ),
        Chip(
            name="v5e",
            cloud_name="v5litepod",
            libtpu_name="v5e",
            peak_bf16_flops=197e12,
            matrix_units=4,
            hbm_bytes=16 * GIB,
            hbm_bytes_per_s=819e9,
            ici_bytes_per_s=400e9,
            dcn_bytes_per_s=3.125e9,
            dimensions=2,
            units_per_chip=1,
            chips_per_host=4,
            max_chips_per_host=8,
            slice_chips=_TORUS_2D,
        ),
        Chip(
            name="v5p",
            cloud_name="v5p",
            libtpu_name="v5",
            peak_bf16_flops=459e12,
            matrix_units=8,
            hbm_bytes=95 * GIB,
            hbm_bytes_per_s=2765e9,
            ici_bytes_per_s=1200e9,
            dcn_bytes_per_s=6.25e9,
            dimensions=3,
            units_per_chip=2,
            chips_per_host=4,
            max_chips_per_host=4,
            slice_chips=(*_TORUS_3D, *range(64, 6145, 64)),
        ),
        Chip(
            name="v6e",
            cloud_name="v6e",
            libtpu_name="v6e",
            peak_bf16_flops=918e12,
            matrix_units=16,
            hbm_bytes=32 * GIB,
            hbm_bytes_per_s=1638e9,
            ici_bytes_per_s=800e9,
            dcn_bytes_per_s=12.5e9,
            dimensions=2,
            units_per_chip=1,
            chips_per_host=4,
            max_chips_per_host=8,
            slice_chips=_TORUS_2D,
        ),
    )
}
# Each chip by both of its names, for v5e-16 and v5litepod-16 are the same slice
CHIP_NAMES = {name: chip for chip in CHIPS.values() for name in (chip.name, chip.cloud_name)}


def parse_accelerator_type(accelerator_type: str) -> tuple[Chip, int, int]:
    """Return ``(chip, chips, hosts)`` of a slice: ``v5p-128`` is 64 chips of v5p on 16 hosts.

    Raises ValueError, naming what is known, for any other chip or a size that has no slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", accelerator_type)
    chip = match and CHIP_NAMES.get(match[1])
    if not chip:
        raise ValueError(
            f"unknown accelerator type {accelerator_type!r}; known are "
            f"{', '.join(f'{name}-N' for name in CHIP_NAMES)}, for example v5p-128"
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


def topology_of(chip: Chip, chips: int) -> tuple[int, ...]:
    """Return the shape of a slice of so many chips, as Cloud TPU makes it where no topology is
    given: the one with the shortest sides, which from 64 chips of v4 and v5p on are multiples of 4.
    """
    step = 4 if chip.dimensions == 3 and chips >= 64 else 1
    sides = range(step, chips + 1, step)
    if chip.dimensions == 2:
        shapes = [(a, chips // a) for a in sides if chips % a == 0 and a * a <= chips]
    elif chips < 64:
        shapes = [{4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]]
    else:
        pairs = [(a, b) for a in sides if a**3 <= chips for b in sides if a <= b]
        shapes = [
            (a, b, chips // (a * b))
            for a, b in pairs
            if chips % (a * b * step) == 0 and a * b * b <= chips
        ]
    return min(shapes, key=sum)


def parse_slice(accelerator_type: str, topology: str = "", slices: int = 1) -> Slice:
    """Return the slice that a name (v5p-256), or a chip (v5p) and a shape (4x4x8), mean.

    Raises ValueError, naming what is known, where there is none.
    """
    if not topology:
        chip, chips, _ = parse_accelerator_type(accelerator_type)
        return Slice(chip, topology_of(chip, chips), slices)
    if accelerator_type in CHIP_NAMES:
        chip, chips = CHIP_NAMES[accelerator_type], None
    else:
        chip, chips, _ = parse_accelerator_type(accelerator_type)
    sides = "x".join(["[0-9]+"] * chip.dimensions)
    shape = tuple(map(int, topology.split("x"))) if re.fullmatch(sides, topology) else ()
    default = shape and math.prod(shape) in chip.slice_chips and topology_of(chip, math.prod(shape))
    cubes = chip.dimensions == 3 and shape and not any(side % 4 for side in shape)
    if not default or not (cubes or shape == default):
        few = [topology_of(chip, count) for count in chip.slice_chips[:8]]
        more = ", and any cuboid of 4x4x4 cubes" if chip.dimensions == 3 else ""
        raise ValueError(
            f"topology {topology!r} is no slice of {chip.name}; known are "
            f"{', '.join('x'.join(map(str, sides)) for sides in few)}{more}"
        )
    if chips and math.prod(shape) != chips:
        raise ValueError(
            f"topology {topology!r} has {math.prod(shape)} chips and accelerator type "
            f"{accelerator_type!r} {chips}; give {chip.name} with the topology, or the type alone"
        )
    return Slice(chip, shape, slices)


def current_chip(environ: Mapping[str, str] = os.environ) -> Chip | None:
    """Return the chip that PJRT_DEVICE and TPU_ACCELERATOR_TYPE promise; None if they do not."""
    if environ.get("PJRT_DEVICE") != "TPU" or not environ.get("TPU_ACCELERATOR_TYPE"):
        return None
    return parse_accelerator_type(environ["TPU_ACCELERATOR_TYPE"])[0]

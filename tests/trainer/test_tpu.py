import math
from pathlib import Path

import pytest

from trainer.tpu import CHIPS, Chip, current_chip, parse_accelerator_type, parse_slice, topology_of

ROOT = Path(__file__).resolve().parents[2]
GIGA = 1e9


@pytest.mark.parametrize(
    ("accelerator_type", "chip", "chips", "hosts"),
    [
        ("v4-8", "v4", 4, 1),
        ("v4-32", "v4", 16, 4),
        ("v5litepod-1", "v5e", 1, 1),
        ("v5litepod-8", "v5e", 8, 1),
        ("v5litepod-16", "v5e", 16, 4),
        ("v5e-256", "v5e", 256, 64),
        ("v5p-8", "v5p", 4, 1),
        ("v5p-128", "v5p", 64, 16),
        ("v5p-256", "v5p", 128, 32),
        ("v5p-12288", "v5p", 6144, 1536),
        ("v6e-8", "v6e", 8, 1),
        ("v6e-256", "v6e", 256, 64),
    ],
)
def test_the_number_in_the_name(accelerator_type: str, chip: str, chips: int, hosts: int) -> None:
    assert parse_accelerator_type(accelerator_type) == (CHIPS[chip], chips, hosts)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_slice_has_a_name_that_is_understood(chip) -> None:
    for chips in chip.slice_chips:
        found, count, hosts = parse_accelerator_type(chip.accelerator_type(chips))
        assert (found, count) == (chip, chips)
        assert chips / hosts in (1, 4, 8)


@pytest.mark.parametrize(
    ("accelerator_type", "said"),
    [
        ("v3-8", ["'v3-8'", "v4-N, v5e-N, v5litepod-N, v5p-N, v6e-N"]),
        ("v5p", ["'v5p'", "v5p-128"]),
        ("", ["''", "v5p-128"]),
        ("v5p-9", ["'v5p-9'", "TensorCores", "8, 16, 32, 64, 128", "12288"]),
        ("v5p-100", ["'v5p-100'", "8, 16, 32, 64, 128"]),
        ("v6e-512", ["'v6e-512'", "chips", "1, 4, 8, 16, 32, 64, 128, 256"]),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(
    accelerator_type: str, said: list[str]
) -> None:
    with pytest.raises(ValueError, match="accelerator type") as caught:
        parse_accelerator_type(accelerator_type)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "chip"),
    [
        ({"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}, CHIPS["v5e"]),
        ({"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": ""}, None),
        ({"PJRT_DEVICE": "TPU"}, None),
        ({"PJRT_DEVICE": "CPU", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}, None),
        ({}, None),
    ],
)
def test_the_chip_of_this_machine(environ: dict[str, str], chip) -> None:
    assert current_chip(environ) == chip


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_slice_has_a_shape_of_its_chips(chip) -> None:
    for chips in chip.slice_chips:
        shape = topology_of(chip, chips)
        assert (math.prod(shape), len(shape)) == (chips, chip.dimensions)
        if chip.dimensions == 3 and chips >= 64:
            assert not any(side % 4 for side in shape)
        name = "x".join(map(str, shape))
        assert parse_slice(chip.accelerator_type(chips)) == parse_slice(chip.name, name)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def constants() -> dict[str, dict[str, float]]:
    """The table of constants in docs/plan.md: what it says of each chip, by the constant."""
    lines = (ROOT / "docs/plan.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| constant |"))
    chips = cells(lines[start])[1:-1]
    found: dict[str, dict[str, float]] = {chip: {} for chip in chips}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *values, _ = cells(line)
        for chip, value in zip(chips, values, strict=True):
            found[chip][name] = float(value)
    return found


def test_the_documented_constants_are_those_of_the_table() -> None:
    assert constants() == {
        chip.name: pytest.approx(
            {
                "bf16 TFLOP/s": chip.peak_bf16_flops / 1e12,
                "HBM GB/s": chip.hbm_bytes_per_s / GIGA,
                "clock, GHz": chip.clock_hz / GIGA,
                "one link, one direction, GB/s": chip.ici_bytes_per_s / 4 / chip.dimensions / GIGA,
                "network between slices, GB/s a chip": chip.dcn_bytes_per_s / GIGA,
            },
            abs=0.005,
        )
        for chip in CHIPS.values()
    }


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("README.md", "{chip.name}"),
        ("docs/report.md", "{chip.name} {peak:g}"),
    ],
)
def test_a_page_that_lists_the_chips_lists_all(page: str, words: str, chip: Chip) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert words.format(chip=chip, peak=chip.peak_bf16_flops / 1e12) in text

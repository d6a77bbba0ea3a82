"""What needs no compiler: input, reading programs, what the verdict makes of a refusal."""

import pytest

from trainer import validation
from trainer.plan import __main__ as plan
from trainer.plan import estimate, hlo
from trainer.tpu import CHIPS, Slice, parse_slice


@pytest.fixture
def flags(tmp_path):
    def given(**changes: object) -> list[str]:
        values = {
            "accelerator_type": "v5p-256",
            "output_dir": tmp_path,
            "config_name": "trainer/presets/mixtral-8x7b.json",
            "dataset_name": "python-help",
            "per_device_train_batch_size": 1024,
        } | changes
        return ["--do_train", *(f"--{k}={v}" for k, v in values.items() if v is not None)]

    return given


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accelerator_type": "v9-8"}, ["'v9-8'", "v4-N"]),
        ({"accelerator_type": None}, ["--accelerator_type"]),
        ({"topology": "4x4x5"}, ["'4x4x5'", "4x4x8"]),
        ({"topology": "4x4x4"}, ["64 chips", "128"]),
        ({"slices": 0}, ["--slices", "at least 1"]),
        ({"per_device_train_batch_size": 100}, ["100", "128"]),
        ({"block_sise": 4096}, ["block_sise", "--block_size"]),
        ({}, ["libtpu"]),  # here there is none
    ],
)
def test_bad_input_is_named_before_anything_is_compiled(flags, capsys, tmp_path, changes, said):
    assert plan.main(flags(**changes)) == plan.BAD_INPUT
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "topology", "expected"),
    [
        ("v5p-256", "", (4, 4, 8)),
        ("v5p-8", "", (2, 2, 1)),
        ("v4-128", "", (4, 4, 4)),
        ("v5p", "4x4x16", (4, 4, 16)),
        ("v6e-256", "", (16, 16)),
        ("v5litepod-8", "", (2, 4)),
        ("v5p-12288", "", (16, 16, 24)),
    ],
)
def test_a_name_has_a_shape(name, topology, expected):
    assert parse_slice(name, topology).topology == expected


COMPILED = """\
HloModule step, is_scheduled=true

%fused (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.9 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], \
dimensions={0}, frontend_attributes={chain_id="1"}, metadata={source_line=2}
}

%also (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %all-gather.8 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], \
dimensions={0}, frontend_attributes={chain_id="1"}, metadata={source_line=2}
}

%body (p: bf16[4,8]) -> bf16[4,8] {
  %fusion.1 = bf16[16,8]{1,0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"700"}
  %fusion.2 = bf16[16,8]{1,0} fusion(%p), calls=%also, backend_config={"estimated_cycles":"50"}
  %never = bf16[4,8]{1,0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %reduce-scatter.1 = bf16[4,8]{1,0} reduce-scatter(%fusion.1), channel_id=1, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, metadata={source_line=1}
}

%condition (p: bf16[4,8]) -> pred[] {
  ROOT %less = pred[] compare(%p, %p)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %while.1 = bf16[4,8]{1,0} while(%p), condition=%condition, body=%body
  %all-reduce.1 = (f32[], f32[64,8]{1,0:T(8,128)}) all-reduce(%a, %b), replica_groups={{0,1}}
  ROOT %add.1 = bf16[4,8]{1,0} add(%p, %p), backend_config={"estimated_cycles":"10"}
}
"""
LOWERED = '"stablehlo.reduce_scatter"\n"stablehlo.all_gather"\n'


def test_a_loop_counts_once_for_every_layer_and_a_repeated_text_once():
    compiled = hlo.Compiled(COMPILED, layers=5)
    assert compiled.cycles() == {0: 10, 1: 5 * 750}
    assert compiled.unestimated_bytes() == {1: 5 * 2 * 4 * 8 * 2}
    sizes = hlo.Sizes(sequences=2, length=64, weights=frozenset({(16, 8)}))
    assert [
        (one.kind, one.moves, one.bytes, one.times, one.group, one.loop)
        for one in sorted(compiled.collectives(LOWERED, sizes), key=lambda one: one.kind)
    ] == [
        ("all-gather", "weights", 16 * 8 * 2 * 3 / 4, 5, (0, 1, 2, 3), 1),
        ("all-reduce", "activations", (4 + 64 * 8 * 4) * 2 * 1 / 2, 1, (0, 1), 0),
        ("reduce-scatter", "gradients", 4 * 8 * 2, 5, (0, 4), 1),
    ]


@pytest.mark.parametrize(
    ("chip", "topology", "group", "links"),
    # Along x and y of a 4x4x8 torus are two rings, along z is one; a link is 100 GB/s each way.
    [
        ("v5p", (4, 4, 8), range(16), 4),
        ("v5p", (4, 4, 8), range(0, 128, 16), 2),
        ("v5p", (4, 4, 8), range(4), 2),
        ("v5p", (4, 4, 8), range(128), 6),
        ("v5p", (4, 4, 8), (0, 1), 2),
        # Smaller than a cube of 4x4x4, a slice has no rings.
        ("v5p", (2, 4, 4), range(32), 3),
        ("v6e", (16, 16), range(256), 4),
        ("v6e", (8, 16), range(128), 3),
        ("v6e", (8, 8), range(64), 2),
    ],
)
def test_a_collective_has_the_links_of_the_axes_that_it_spans(chip, topology, group, links):
    one = hlo.Collective("all-gather", "weights", 1e9, 1, tuple(group), 0)
    slice_ = Slice(CHIPS[chip], topology)
    assert estimate.collective_time(one, slice_) == pytest.approx(1e9 / (links * 100e9))


def test_a_kernel_is_bound_by_its_flops_or_its_bytes():
    slice_ = Slice(CHIPS["v5p"], (4, 4, 8))
    kernels = [hlo.Kernel(459e12, 1.0, 2, 1), hlo.Kernel(1.0, 2765e9, 1, 2)]
    moves = [hlo.Collective("all-gather", "weights", 400e9, 3, tuple(range(16)), 1)]
    found = estimate.model_time(slice_, kernels, moves, {0: 1.0}, 459e12, 0.5)
    assert found["computing_s"] == pytest.approx(2 / 0.5 + 1 + 1)
    assert found["step_time_s"] == pytest.approx(6 + 3)
    assert found["step_time_overlapped_s"] == pytest.approx(4 + 1 + 1)
    assert found["mfu"] == pytest.approx(1 / 6)


def test_a_compiler_that_dies_is_a_verdict_with_its_last_words(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda _: "0.0.21")
    words = "Unsupported version: expected <= 7 but got 8"
    script = f"import os, sys; print({words!r}, file=sys.stderr, flush=True); os.abort()"
    run = estimate.subprocess.run
    monkeypatch.setattr(
        estimate.subprocess, "run", lambda command, **rest: run([command[0], "-c", script], **rest)
    )
    assert plan.main(flags()) == plan.DOES_NOT_COMPILE
    text = (tmp_path / "plan.txt").read_text()
    assert "DOES NOT COMPILE" in text
    assert "signal 6" in text
    assert words in text
    assert "install the libtpu" in text


def test_a_chip_that_libtpu_does_not_know_is_bad_input(flags, monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda _: "0.0.20")
    monkeypatch.setattr(estimate, "measure", lambda *_: {"supported_chips": ["v4", "v5p"]})
    assert plan.main(flags(accelerator_type="v6e-256")) == plan.BAD_INPUT
    message = capsys.readouterr().err
    assert all(part in message for part in ("libtpu 0.0.20", "v6e", "v4, v5p"))


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "global_batch"])
def test_what_does_not_fit_names_what_does_after_compiling_it(flags, monkeypatch, tmp_path, name):
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda _: "0.0.24")
    compiled = []

    def measure(slice_, flags):
        """A chip holds 1 GiB of state, 15 GiB for each sequence, and 10 GiB whatever the batch."""
        batch = validation.parse(flags).training.per_device_train_batch_size
        compiled.append((slice_.chips, batch))
        used = 1 + 10 + 15 * batch / slice_.chips
        found = {
            "hbm_bytes": used * 2**30,
            "weight_bytes": 2**30,
            "optimizer_bytes": 0,
            "trace_seconds": 1.0,
        }
        return found | ({"error": f"Used {used}G of 95.74G hbm."} if used > 95 else REST)

    monkeypatch.setattr(estimate, "measure", measure)
    given = flags(**{"per_device_train_batch_size": None, name: 1024})
    assert plan.main(given) == plan.DOES_NOT_FIT
    text = (tmp_path / "plan.txt").read_text()
    assert "131.00 of 95 GiB" in text
    # By proportion 5 of a chip's 8 sequences take nine tenths of it, in truth 86 GiB.
    assert f"--{name}=640 fits this slice: 86.00 of 95 GiB" in text
    # 192 chips do not divide the hidden size.
    assert "v5p-512 (4x8x8) holds this batch: 71.00 of 95 GiB" in text
    assert compiled == [(128, 1024), (128, 640), (256, 1024)]


REST = {
    "compile_seconds": 1.0,
    "kernels": [],
    "products": {},
    "collectives": [],
    "cycles": {"0": 1.0},
    "unestimated_bytes": {},
    "pallas_calls": 0,
    "rematerialised": 0,
    "host_bytes": 2**32,
}

from pathlib import Path

import pytest
from xprof.profile_data import ProfileData

from report.profile import BadTrace, covered, is_collective, read
from tests.report.profiles import BEGIN, Profile, tpu_worker

CORE = "/device:TPU:0"


@pytest.mark.parametrize("cores", [1, 4])
def test_the_steps_of_a_tpu_are_the_runs_of_its_main_program(tmp_path: Path, cores: int) -> None:
    trace = read(tpu_worker(own_ms=700, cores=cores).write(tmp_path))
    assert (trace["source"], trace["program"], trace["cores"]) == ("device_trace", "step(1)", cores)
    assert trace["steps"] == [4, 8]
    # Five starts are a second apart; the end of the fifth step nothing shows.
    assert (trace["p50"], trace["p90"], trace["n"]) == (1.0, 1.0, 4)
    assert trace["busy_p50"] == pytest.approx(0.8)
    assert trace["idle_share"] == pytest.approx(0.2)


def test_where_the_time_of_a_step_went(tmp_path: Path) -> None:
    trace = read(tpu_worker(own_ms=700).write(tmp_path))
    # The loop around them counts for nothing; the short program between the steps is computing.
    assert trace["split"] == pytest.approx(
        {"compute": 0.701, "communication": 0.1, "input": 0.02, "idle": 0.179}
    )
    operations = {it["name"]: it for it in trace["operations"]}
    assert operations.keys() == {"fusion.7", "gmm.1", "all-gather.3", "copy.9"}
    assert operations["gmm.1"]["seconds"] == pytest.approx(0.35)
    assert operations["all-gather.3"]["kind"] == "communication"
    assert operations["fusion.7"]["kind"] == "compute"
    assert operations["all-gather.3"]["share"] == pytest.approx(100 / 801)


def test_uneven_steps_have_a_spread_and_edges_that_were_cut_none(tmp_path: Path) -> None:
    profile = Profile()
    starts = [0, 300, 1300, 2400, 3400, 4900]
    ends = [250, 1200, 2200, 3300, 4300, 5000]  # the first and the last run are cut
    runs = [("step(1)", *span) for span in zip(starts, ends, strict=True)]
    # Many short runs of another program, some of them within a step's.
    other = [("other(2)", start + 5, start + 15) for start in range(0, 5000, 20)]
    profile.line(CORE, "XLA Modules", [*other, *runs], late_ms=-50)
    trace = read(profile.write(tmp_path))
    assert trace["n"] == 4
    assert trace["p50"] == pytest.approx(1.05)  # of 1.0, 1.0, 1.1 and 1.5
    assert trace["p90"] == pytest.approx(1.38)
    assert trace["mean"] == pytest.approx(1.15)
    assert trace["busy_p50"] == pytest.approx(0.9)
    assert trace["idle_share"] == pytest.approx(1 - 3.6 / 4.6)
    assert trace["split"] is None


def test_of_several_cores_the_slowest_speaks(tmp_path: Path) -> None:
    profile = Profile()
    for core, period in enumerate((1000, 1250)):
        runs = [("step(1)", period * step, period * step + 900) for step in range(4)]
        profile.line(f"/device:TPU:{core}", "XLA Modules", runs)
    # Another core of the chip, which runs no program.
    profile.line("/device:TPU:0 SparseCore 0", "XLA Modules", [("sparse(3)", 0, 90_000)])
    trace = read(profile.write(tmp_path))
    assert (trace["p50"], trace["n"], trace["cores"]) == (1.25, 3, 2)


def test_where_programs_are_not_shown_the_device_s_steps_are_taken(tmp_path: Path) -> None:
    profile = Profile()
    profile.line(CORE, "Steps", [(str(step), 500 * step, 500 * step + 400) for step in range(5)])
    assert read(profile.write(tmp_path))["p50"] == pytest.approx(0.5)


def test_on_cpu_the_host_s_markers_are_the_steps(tmp_path: Path) -> None:
    profile = Profile()
    markers = [("train", 200 * step, 200 * step + 190, 10 + step) for step in range(5)]
    inputs = [("input", 200 * step, 200 * step + 30) for step in range(5)]
    profile.line("/host:CPU", "python", [*inputs, *markers, ("train", 0, 9000)])
    # Two threads of XLA: they compute together from 50 to 90 and apart until 120, and from there
    # to 150 both are in a collective, the first one a little longer.
    for thread, (end, late) in enumerate(((120, 5), (90, 0))):
        operations = []
        for start in range(0, 1000, 200):
            operations += [
                ("ThunkExecutor::Execute", start, start + 195),
                ("while.3", start + 40, start + 170),
                ("dot.1", start + 50, start + end),
                ("end: dot.1", start + end, start + end),
                ("all-reduce.2", start + 120, start + 150 + late),
                ("Rendezvous", start + 121, start + 149),
            ]
        profile.line("/host:CPU", f"tf_XLAEigen/{thread}", operations)
    trace = read(profile.write(tmp_path))
    assert (trace["source"], trace["steps"], trace["n"]) == ("step_markers", [10, 14], 4)
    assert trace["p50"] == pytest.approx(0.2)
    assert trace["idle_share"] == pytest.approx(0.05)
    assert trace["split"] == pytest.approx(
        {"compute": 0.07, "communication": 0.035, "input": 0.03, "idle": 0.065}
    )
    assert [it["name"] for it in trace["operations"]] == ["dot.1", "all-reduce.2"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_than_three_whole_steps_are_counted_and_not_averaged(
    tmp_path: Path, steps: int
) -> None:
    trace = read(tpu_worker(own_ms=700, steps=steps).write(tmp_path))
    assert trace["n"] == steps - 1
    for key in ("p50", "p90", "mean", "busy_p50", "idle_share", "split"):
        assert trace[key] is None


def test_a_trace_that_ends_in_the_middle_is_no_profile(tmp_path: Path) -> None:
    path = tpu_worker(own_ms=700).write(tmp_path)
    for content in (path.read_bytes()[:-7], b"PK not a profile"):
        path.write_bytes(content)
        with pytest.raises(BadTrace, match="cut short"):
            read(path)


def test_a_trace_without_steps_says_so(tmp_path: Path) -> None:
    profile = Profile()
    profile.line("/host:CPU", "python", [("something", 0, 10)])
    for foreign in (profile, Profile()):
        with pytest.raises(BadTrace, match="no steps"):
            read(foreign.write(tmp_path))


@pytest.mark.parametrize(
    ("name", "collective"),
    [
        ("all-gather-start.5", True),
        ("reduce-scatter", True),
        ("%recv-done.1 = token[] recv-done(%recv.1)", True),
        ("%fusion.3 = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", True),
        ("%async-done.2 = f32[2] async-done(%s), calls=%collective-permute.1", True),
        ("%fusion.4 = f32[2] fusion(%all-gather.3), kind=kLoop, calls=%fused_computation", False),
        ("ascending_sort.1", False),
    ],
)
def test_a_collective_is_known_by_what_it_is_and_not_by_its_operands(
    name: str, collective: bool
) -> None:
    assert is_collective(name) is collective


def test_xprof_reads_the_same_in_these_profiles(tmp_path: Path) -> None:
    """The format is XLA's and not one that only this project writes and reads."""
    path = tpu_worker(own_ms=700, cores=1).write(tmp_path)
    planes = {plane.name: plane for plane in ProfileData.from_file(path).planes}
    lines = {line.name: line for line in planes[CORE].lines}
    runs = [event for event in lines["XLA Modules"].events if event.name == "step(1)"]
    starts = [run.start_ns - BEGIN for run in runs]
    assert starts == pytest.approx([1e9 * step for step in range(5)], abs=1000)
    assert {run.duration_ns for run in runs} == {8e8}
    (python,) = planes["/host:CPU"].lines
    steps = [dict(it.stats)["step_num"] for it in python.events if it.name == "train"]
    assert steps == ["4", "5", "6", "7", "8"]


def test_time_that_several_cover_counts_once() -> None:
    # The second lies within the first, which reaches into the third; the last is beyond the window.
    intervals = [(3, 12), (0, 10), (1, 2), (14, 16), (30, 40)]
    assert covered(intervals, (5, 15)) == (12 - 5) + (15 - 14)

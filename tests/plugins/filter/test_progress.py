from ansible_collections.mixtral.tpu.plugins.filter.progress import clock, last_steps, progress


def test_lines_that_are_cut_are_left_out():
    assert last_steps('ss": 2.0}\n{"step": 7}\n{"step": 8}\n{"st') == [{"step": 7}, {"step": 8}]
    assert last_steps("") == []


def test_progress_counts_steps_from_one():
    step = {"step": 11, "loss": 2.5, "step_time_s": 1.234, "tokens_per_s": 1660.2}
    said = "step  12 of {}   loss 2.5000   1.23 s/step   1,660 tokens/s"
    assert progress([step], 120) == f"{said.format(120)}   2:13 left"
    # One slow step among the newest does not change what is expected of the others.
    assert progress([step, step, step | {"step_time_s": 90.0}, step], 9012).endswith("3:05:06 left")
    assert progress([step], 12) == said.replace("  12", " 12").format(12)


def test_progress_survives_a_loss_that_is_not_finite():
    step = {"step": 0, "loss": None, "step_time_s": 1.0, "tokens_per_s": 2048.0}
    assert progress([step], None) == "step 1   loss not finite   1.00 s/step   2,048 tokens/s"


def test_time_reads_as_minutes_and_seconds_and_from_an_hour_on_with_hours():
    durations = {0: "0:00", 9.9: "0:09", 60: "1:00", 125: "2:05", 3725: "1:02:05"}
    assert {seconds: clock(seconds) for seconds in durations} == durations

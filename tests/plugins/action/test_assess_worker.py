"""What keeps a worker from training, and which run it can follow."""

import hashlib

import pytest

from plugins.action.assess_worker import (
    accelerator_complaints,
    broken_off_run,
    configuration_complaints,
    differences,
    disk_complaints,
    image_complaints,
    live_run,
    resume_complaints,
    run_complaints,
    stack_complaints,
)

WANTED = {
    "command": ["python", "-m", "trainer", "--max_steps", "10", "--gmm"],
    "environment": {"PJRT_DEVICE": "TPU"},
}


def look(run_id="run-1", running=True, detached=False, collected=False, checkpoint=None, **changes):
    state = {
        "run_id": run_id,
        "started_by": "me@here",
        "started": "2026-01-02T03:04:05Z",
        "running": running,
        "exit_code": 0 if running else 143,
        "detached": detached,
        "command": WANTED["command"],
        "environment": {"PJRT_DEVICE": "TPU", "PATH": "/bin"},
    }
    files = {"collected": collected, "exists": True, "checkpoint": checkpoint}
    return {"engine": True, "state": state | changes, **files}


IDLE = {"engine": True, "collected": False, "exists": False, "checkpoint": None, "state": None}


def test_what_the_image_adds_to_the_environment_is_no_difference():
    assert differences(look()["state"], WANTED) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": ["python", "-m", "trainer", "--max_steps", "20", "--gmm"]}, "--max_steps 20"),
        ({"command": ["python", "-m", "trainer", "--max_steps", "10"]}, "--gmm not given"),
        (
            {"command": ["python", "-m", "trainer", "--max_steps", "10", "--gmm", "--static"]},
            "--static",
        ),
        ({"environment": {"PJRT_DEVICE": "CPU"}}, "PJRT_DEVICE=CPU"),
    ],
)
def test_a_difference_is_said_as_the_running_one_has_it(change, said):
    assert differences(look(**change)["state"], WANTED) == [said]


@pytest.mark.parametrize(
    ("found", "run"),
    [
        (IDLE, None),
        (look(), "run-1"),
        (look(running=False), None),
        (look(running=False, detached=True), "run-1"),
        (look(running=False, detached=True, collected=True), None),
        (look(running=False, detached=True, command=[]), None),
        # It is in the way, whatever it is.
        (look(command=[]), "run-1"),
    ],
)
def test_a_run_is_followed_while_it_goes_on_or_waits_to_be_brought_home(found, run):
    assert live_run(found, WANTED) == run


def test_a_run_of_all_workers_that_is_what_was_asked_for_is_followed():
    assert not list(run_complaints("w0", {"w0": look(), "w1": look()}, WANTED))


@pytest.mark.parametrize("other", [IDLE, look(run_id="run-2")])
def test_half_a_run_is_not_followed(other):
    (said,) = run_complaints("w0", {"w0": look(), "w1": other}, WANTED)
    assert "Run run-1, started by me@here" in said
    assert "but not on w1" in said
    assert "stop.yml" in said


def test_by_another_name_it_is_another_run():
    waits = look(running=False, detached=True)
    assert live_run(waits, WANTED, "mine") is None
    assert live_run(waits, WANTED, "run-1") == "run-1"
    (said,) = run_complaints("w0", {"w0": look()}, WANTED, "mine")
    assert "Run run-1, started by me@here" in said
    assert "and run_name is mine" in said


def test_a_run_under_a_lease_is_not_left_to_itself():
    leased, detached = {"w0": look()}, {"w0": look(detached=True)}
    assert not list(run_complaints("w0", leased, WANTED))
    assert not list(run_complaints("w0", detached, WANTED, detach=True))
    (said,) = run_complaints("w0", leased, WANTED, detach=True)
    assert "is training here under a lease" in said
    assert "without detach" in said
    assert "stop.yml" in said


BROKEN_OFF = look(running=False, checkpoint=40)
OTHER_FLAGS = look(running=False, checkpoint=40, command=["python", "--max_steps", "20"])
SUCCEEDED = look(running=False, checkpoint=40, exit_code=0)
NO_CHECKPOINT = look(running=False)


@pytest.mark.parametrize(
    ("found", "name", "run"),
    [
        (BROKEN_OFF, "", "run-1"),
        (OTHER_FLAGS, "", None),
        (SUCCEEDED, "", None),
        (NO_CHECKPOINT, "", None),
        (IDLE, "", None),
        # By its name it is resumed whatever has become of it: the trainer itself knows what fits.
        (OTHER_FLAGS, "run-1", "run-1"),
        (SUCCEEDED, "run-1", "run-1"),
        (NO_CHECKPOINT, "run-1", None),
        (IDLE | {"exists": True, "checkpoint": 40}, "run-1", "run-1"),
        (IDLE, "run-1", None),
    ],
)
def test_a_run_is_resumed_that_broke_off_or_is_named(found, name, run):
    assert broken_off_run(found, WANTED, name) == run


@pytest.mark.parametrize(
    ("resume", "name", "own", "other", "said"),
    [
        ("auto", "", BROKEN_OFF, BROKEN_OFF, []),
        ("auto", "", NO_CHECKPOINT, NO_CHECKPOINT, []),
        ("auto", "", IDLE, IDLE, []),
        ("auto", "mine", IDLE, IDLE, []),
        ("auto", "", IDLE, BROKEN_OFF, ["no checkpoint here of run run-1, of which w1 has one"]),
        ("auto", "", BROKEN_OFF, IDLE, []),  # w1 complains
        (
            *("auto", "", BROKEN_OFF, look("run-2", running=False, checkpoint=40)),
            ["Run run-1 would be resumed here, and others on w1. Start anew: -e resume=never"],
        ),
        ("auto", "run-1", NO_CHECKPOINT, NO_CHECKPOINT, ["run_name, or remove", "runs/run-1"]),
        ("never", "", BROKEN_OFF, IDLE, []),
        ("never", "run-1", BROKEN_OFF, BROKEN_OFF, ["here already, and resume is never"]),
        ("never", "mine", IDLE, IDLE, []),
        ("bucket", "run-1", NO_CHECKPOINT, IDLE, []),
        ("must", "", BROKEN_OFF, BROKEN_OFF, []),
        ("must", "", IDLE, IDLE, ["no checkpoint of a last run here", "save_strategy=steps"]),
        ("must", "mine", IDLE, IDLE, ["there is no checkpoint of run mine here"]),
        ("must", "", OTHER_FLAGS, OTHER_FLAGS, ["--max_steps 20", "-e run_name=run-1"]),
        ("must", "", SUCCEEDED, SUCCEEDED, ["has succeeded", "run_name=run-1 and a larger"]),
    ],
)
def test_what_cannot_be_resumed_is_said(resume, name, own, other, said):
    complaints = list(resume_complaints("w0", {"w0": own, "w1": other}, WANTED, resume, name))
    assert len(complaints) == bool(said)
    assert all(words in complaints[0] for words in said)


def test_a_run_with_other_variables_is_left_alone():
    other = look(environment={"PJRT_DEVICE": "CPU"})
    (said,) = run_complaints("w0", {"w0": other, "w1": other}, WANTED)
    assert "with other variables (it has PJRT_DEVICE=CPU)" in said
    assert "stop.yml" in said


def image(identity):
    return {"Config": {"Labels": identity and {"mixtral-trainer.inputs": identity}}}


def test_a_stack_must_be_on_the_worker():
    assert not list(stack_complaints("nightly", "~/stacks/nightly-1", True))
    (complaint,) = stack_complaints("nightly", "~/stacks/nightly-1", False)
    assert "~/stacks/nightly-1" in complaint
    assert "site.yml -e runtime=native -e stack=nightly" in complaint


def test_the_right_image_is_no_complaint():
    assert not list(image_complaints("t:release", [image("a" * 64)], "a" * 64))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "There is no image t:release"),
        ([image("b" * 64)], "is bbbbbbbbbbbb"),
        ([image(None)], "is not set"),
    ],
)
def test_a_missing_or_another_image_is_named(found, said):
    (complaint,) = image_complaints("t:release", found, "a" * 64)
    assert said in complaint
    assert "site.yml" in complaint


@pytest.fixture
def configuration(tmp_path):
    source = tmp_path / "config.json"
    source.write_text("{}\n")

    def result(**stat):
        return {"item": {"name": "config.json", "source": str(source)}, "stat": stat}

    return result


def test_a_file_that_is_the_controllers_is_no_complaint(configuration):
    checksum = hashlib.sha1(b"{}\n").hexdigest()
    same = configuration(exists=True, path="/home/me/config.json", checksum=checksum)
    assert not list(configuration_complaints([same]))


def test_a_file_that_differs_or_is_missing_is_named(configuration):
    other = configuration(exists=True, path="/home/me/config.json", checksum="0" * 40)
    missing = configuration(exists=False)
    differs, misses = configuration_complaints([other, missing])
    assert "/home/me/config.json is not the same" in differs
    assert "~/config.json is missing" in misses


def test_who_holds_the_accelerator_is_named_with_the_command_that_ends_it():
    user = {"pid": 42, "command": "python3 old.py", "path": "/dev/vfio/0"}
    (said,) = accelerator_complaints([user])
    assert "Process 42 (python3 old.py) holds /dev/vfio/0" in said
    assert "sudo kill 42" in said


def test_too_little_disk_is_said_with_both_figures():
    assert not list(disk_complaints(1.0, 1))
    (said,) = disk_complaints(0.25, 1)
    assert "0.25 GiB" in said
    assert "1 are needed" in said

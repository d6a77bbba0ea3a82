"""What keeps a worker from training, and which run it can follow."""

import hashlib

import pytest
from ansible_collections.mixtral.tpu.plugins.action.assess_worker import (
    accelerator_errors,
    configuration_errors,
    differences,
    disk_errors,
    follow_errors,
    image_errors,
    resume_errors,
    run_to_follow,
    run_to_resume,
    stack_errors,
)

WANTED = {
    "command": ["python", "-m", "trainer", "--max_steps", "10", "--gmm"],
    "environment": {"PJRT_DEVICE": "TPU"},
}


def inspection(
    run_id="run-1", running=True, detached=False, collected=False, checkpoint=None, **changes
):
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
    assert differences(inspection()["state"], WANTED) == []


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
    assert differences(inspection(**change)["state"], WANTED) == [said]


@pytest.mark.parametrize(
    ("found", "run"),
    [
        (IDLE, None),
        (inspection(), "run-1"),
        (inspection(running=False), None),
        (inspection(running=False, detached=True), "run-1"),
        (inspection(running=False, detached=True, collected=True), None),
        (inspection(running=False, detached=True, command=[]), None),
        # It is in the way, whatever it is.
        (inspection(command=[]), "run-1"),
    ],
)
def test_a_run_is_followed_while_it_goes_on_or_waits_to_be_brought_home(found, run):
    assert run_to_follow(found, WANTED) == run


def test_a_run_of_all_workers_that_is_what_was_asked_for_is_followed():
    assert not list(follow_errors("w0", {"w0": inspection(), "w1": inspection()}, WANTED))


@pytest.mark.parametrize("other", [IDLE, inspection(run_id="run-2")])
def test_half_a_run_is_not_followed(other):
    (said,) = follow_errors("w0", {"w0": inspection(), "w1": other}, WANTED)
    assert "Run run-1, started by me@here" in said
    assert "but not on w1" in said
    assert "stop.yml" in said


def test_by_another_name_it_is_another_run():
    waits = inspection(running=False, detached=True)
    assert run_to_follow(waits, WANTED, "mine") is None
    assert run_to_follow(waits, WANTED, "run-1") == "run-1"
    (said,) = follow_errors("w0", {"w0": inspection()}, WANTED, "mine")
    assert "Run run-1, started by me@here" in said
    assert "and run_name is mine" in said


def test_a_run_under_a_lease_is_not_left_to_itself():
    leased, detached = {"w0": inspection()}, {"w0": inspection(detached=True)}
    assert not list(follow_errors("w0", leased, WANTED))
    assert not list(follow_errors("w0", detached, WANTED, detach=True))
    (said,) = follow_errors("w0", leased, WANTED, detach=True)
    assert "is training on this worker under a lease" in said
    assert "without detach" in said
    assert "stop.yml" in said


BROKEN_OFF = inspection(running=False, checkpoint=40)
OTHER_FLAGS = inspection(running=False, checkpoint=40, command=["python", "--max_steps", "20"])
SUCCEEDED = inspection(running=False, checkpoint=40, exit_code=0)
NO_CHECKPOINT = inspection(running=False)


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
    assert run_to_resume(found, WANTED, name) == run


@pytest.mark.parametrize(
    ("resume", "name", "own", "other", "said"),
    [
        ("auto", "", BROKEN_OFF, BROKEN_OFF, []),
        ("auto", "", NO_CHECKPOINT, NO_CHECKPOINT, []),
        ("auto", "", IDLE, IDLE, []),
        ("auto", "mine", IDLE, IDLE, []),
        ("auto", "", IDLE, BROKEN_OFF, ["no checkpoint of run run-1, and w1 has one"]),
        ("auto", "", BROKEN_OFF, IDLE, []),  # w1 complains
        (
            *("auto", "", BROKEN_OFF, inspection("run-2", running=False, checkpoint=40)),
            ["would resume run run-1, and w1 another one. To start a new run: -e resume=never"],
        ),
        ("auto", "run-1", NO_CHECKPOINT, NO_CHECKPOINT, ["run_name, or delete /runs/run-1"]),
        ("never", "", BROKEN_OFF, IDLE, []),
        ("never", "run-1", BROKEN_OFF, BROKEN_OFF, ["on this worker already, and resume is never"]),
        ("never", "mine", IDLE, IDLE, []),
        ("bucket", "run-1", NO_CHECKPOINT, IDLE, []),
        ("must", "", BROKEN_OFF, BROKEN_OFF, []),
        ("must", "", IDLE, IDLE, ["no checkpoint of an earlier run", "save_strategy=steps"]),
        ("must", "mine", IDLE, IDLE, ["has no checkpoint of run mine"]),
        ("must", "", OTHER_FLAGS, OTHER_FLAGS, ["--max_steps 20", "-e run_name=run-1"]),
        ("must", "", SUCCEEDED, SUCCEEDED, ["has succeeded", "run_name=run-1 and a larger"]),
    ],
)
def test_what_cannot_be_resumed_is_said(resume, name, own, other, said):
    both = {"w0": own, "w1": other}
    errors = list(resume_errors("w0", both, WANTED, resume, name, "/runs"))
    assert len(errors) == bool(said)
    assert all(words in errors[0] for words in said)


def test_a_run_with_other_variables_is_left_alone():
    other = inspection(environment={"PJRT_DEVICE": "CPU"})
    (said,) = follow_errors("w0", {"w0": other, "w1": other}, WANTED)
    assert "with other variables (PJRT_DEVICE=CPU)" in said
    assert "stop.yml" in said


def image(identity):
    return {"Config": {"Labels": identity and {"mixtral-trainer.inputs": identity}}}


def test_a_stack_must_be_on_the_worker():
    assert not list(stack_errors("nightly", "~/stacks/nightly-1", True))
    (error,) = stack_errors("nightly", "~/stacks/nightly-1", False)
    assert "~/stacks/nightly-1" in error
    assert "site.yml -e runtime=native -e stack=nightly" in error


def test_the_right_image_is_no_error():
    assert not list(image_errors("t:release", [image("a" * 64)], "a" * 64))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "There is no image t:release"),
        ([image("b" * 64)], "is bbbbbbbbbbbb"),
        ([image(None)], "is not set"),
    ],
)
def test_a_missing_or_another_image_is_named(found, said):
    (error,) = image_errors("t:release", found, "a" * 64)
    assert said in error
    assert "site.yml" in error


@pytest.fixture
def configuration(tmp_path):
    source = tmp_path / "config.json"
    source.write_text("{}\n")

    def result(**stat):
        return {"item": {"name": "config.json", "source": str(source)}, "stat": stat}

    return result


def test_a_file_that_is_the_controllers_is_no_error(configuration):
    checksum = hashlib.sha1(b"{}\n").hexdigest()
    same = configuration(exists=True, path="/home/me/config.json", checksum=checksum)
    assert not list(configuration_errors([same]))


def test_a_file_that_differs_or_is_missing_is_named(configuration):
    other = configuration(exists=True, path="/home/me/config.json", checksum="0" * 40)
    missing = configuration(exists=False)
    differs, misses = configuration_errors([other, missing])
    assert "/home/me/config.json is not the same" in differs
    assert "~/config.json is missing" in misses


def test_who_holds_the_accelerator_is_named_with_the_command_that_ends_it():
    user = {"pid": 42, "command": "python3 old.py", "path": "/dev/vfio/0"}
    (said,) = accelerator_errors([user])
    assert "Process 42 (python3 old.py) holds /dev/vfio/0" in said
    assert "sudo kill 42" in said


def test_too_little_disk_is_said_with_both_figures():
    assert not list(disk_errors(1.0, 1, "/runs"))
    (said,) = disk_errors(0.25, 1, "/runs")
    assert "0.25 GiB" in said
    assert "1 are needed. Delete old runs from /runs" in said

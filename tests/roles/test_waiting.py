"""What does not answer once it was started: the last word is why, and what to do."""

import pytest
import yaml

from tests.playbook import ROOT, run_playbook, write_play


@pytest.mark.parametrize(
    ("tasks", "variables", "words"),
    [
        (
            "docker_engine/tasks/install.yml",
            {"docker_engine_log": "{{ log }}", "docker_engine_start_seconds": 1},
            "ansible-playbook site.yml",
        ),
        (
            "tensorboard/tasks/start.yml",
            {"tensorboard__log": "{{ log }}", "tensorboard__address": "http://127.0.0.1:9"},
            "ansible-playbook tensorboard.yml",
        ),
    ],
)
def test_a_service_that_does_not_answer_is_told_with_the_end_of_its_log(
    tmp_path, tasks, variables, words
) -> None:
    (tmp_path / "log").write_text("the disk is full\n")
    # What has to be installed and started before is left out.
    all_tasks = yaml.safe_load((ROOT / "roles" / tasks).read_text())
    first = next(i for i, task in enumerate(all_tasks) if task["name"].startswith("Wait"))
    waiting = [{**task, "become": False} for task in all_tasks[first:]]
    waiting[0] |= {"retries": 1, "delay": 0}
    run = run_playbook(
        write_play(tmp_path, *waiting, vars=variables),
        environment={"DOCKER_HOST": f"unix://{tmp_path}/none"},
        log=str(tmp_path / "log"),
    )
    assert run.code == 2
    assert "the disk is full" in run.recap
    assert words in run.recap

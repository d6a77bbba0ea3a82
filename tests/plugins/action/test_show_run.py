"""The task that shows a run's table where no callback does."""

import json

import pytest

from tests.playbook import run_playbook, write_play
from tests.plugins.runs import REPORT, write_run

TIMER, OURS = "ansible.posix.timer", "mixtral.tpu.run_report"


@pytest.mark.parametrize("callbacks", [TIMER, f"{TIMER}, {OURS}"])
def test_a_run_is_shown_once(tmp_path, callbacks):
    run_dir = write_run(tmp_path / "run")
    show = {"run_dir": str(run_dir), "symptoms": {"w1": ["HOT"]}}
    play = write_play(
        tmp_path,
        {"ansible.builtin.set_stats": {"data": {"train_run_dir": str(run_dir)}}},
        {"mixtral.tpu.show_run": show, "register": "shown"},
        {
            "ansible.builtin.copy": {
                "content": "{{ shown | to_json }}",
                "dest": str(tmp_path / "shown"),
            }
        },
    )
    ran = run_playbook(play, environment={"ANSIBLE_CALLBACKS_ENABLED": callbacks})
    assert ran.code == 0
    assert ran.screen.count("RUN 20260102-030405: failed ***") == 1
    assert ("RUN 2026" in ran.recap) == (OURS in callbacks)
    assert ran.screen.count("  | Traceback:") == 1
    assert ran.screen.count(f"artifacts            {run_dir}\n") == 1

    shown = json.loads((tmp_path / "shown").read_text())
    assert not shown["changed"]
    assert (shown["run_id"], shown["status"]) == (REPORT["run_id"], "failed")
    assert shown["numbers"]["step_time_s"] == REPORT["step_time_s"]
    assert shown["numbers"]["loss"]["last"] == 3.25
    assert shown["report"] == f"{run_dir}/report.json"
    assert shown["lines"][0] == "RUN 20260102-030405: failed"
    assert "  TPU symptom    HOT" in shown["lines"]

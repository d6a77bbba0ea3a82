"""What the trainer is started with: its argument list, and the file that a model's name means."""

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.mixtral.tpu.plugins.filter.launch import command_line, preset_file


def test_command_line_leaves_out_what_the_trainer_assumes_anyway():
    flags = {"gmm": True, "static": False, "train_file": "", "block_size": None, "max_steps": 10}
    assert command_line(flags) == ["--gmm", "--max_steps", "10"]


def test_zero_is_a_value():
    assert command_line({"max_grad_norm": 0, "warmup_steps": 0.0}) == [
        "--max_grad_norm",
        "0",
        "--warmup_steps",
        "0.0",
    ]


def test_text_from_the_command_line_is_left_to_the_trainer():
    assert command_line({"gmm": "false"}) == ["--gmm", "false"]


@pytest.fixture
def presets(tmp_path):
    for name in ("mixtral-8x7b", "mixtral-tiny", "fsdp_config"):
        (tmp_path / f"{name}.json").write_text("{}")
    return tmp_path


def test_a_preset_is_found_by_its_name(presets):
    assert preset_file("mixtral-tiny", str(presets)) == str(presets / "mixtral-tiny.json")


def test_a_file_is_found_from_where_the_command_was_given(presets, monkeypatch):
    monkeypatch.chdir(presets)
    assert preset_file("mixtral-8x7b.json", "/elsewhere") == str(presets / "mixtral-8x7b.json")


def test_a_wrong_name_is_told_the_nearest_and_all_presets(presets):
    with pytest.raises(AnsibleFilterError) as error:
        preset_file("mixtrl-tiny", str(presets))
    assert "Did you mean mixtral-tiny?" in str(error.value)
    assert "The presets are mixtral-8x7b, mixtral-tiny; " in str(error.value)


def test_a_missing_file_is_named(presets):
    with pytest.raises(AnsibleFilterError, match=f"there is no file {presets}/own.json"):
        preset_file(f"{presets}/own.json", str(presets))

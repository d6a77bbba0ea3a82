"""Names and values that a user sets, against what this repository knows."""

import pytest

from plugins.action.check_variables import public_names, role_options, unfit, unknown
from tests.playbook import ROOT, run_playbook

OPTIONS = role_options(ROOT / "roles")
PUBLIC = public_names(ROOT / "playbooks/group_vars/all.yml", OPTIONS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gmm", "bool"),
        ("max_steps", "int"),
        ("learning_rate", "float"),
        ("dataset_name", "str"),
        ("profile_step", "int"),
        # A key of a dictionary has a type of its own.
        ("torch_index", "str"),
    ],
)
def test_a_public_name_has_the_type_of_its_role_variable(name, kind):
    assert PUBLIC[name]["type"] == kind


def test_helpers_of_the_map_are_no_public_names():
    assert not {"playbook_dir", "train_train_file", "mixtral_config_model"} & PUBLIC.keys()


def test_a_key_of_a_dictionary_is_told_from_its_neighbours():
    assert "torch_xla" in PUBLIC["torch_xla_wheel"]["description"]
    assert "git" in PUBLIC["transformers_repository"]["description"]


def test_an_unknown_name_is_told_the_nearest():
    assert unknown({"gmmm": "true"}, PUBLIC) == [
        "-e gmmm: there is no such variable. Did you mean gmm?"
    ]


def test_known_names_and_ansibles_own_pass():
    assert not unknown({"gmm": "true", "train_gmm": "true", "ansible_user": "me"}, PUBLIC | OPTIONS)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gmm", "maybe", "'maybe' is not a valid boolean"),
        ("max_steps", "ten", "cannot be converted to an int"),
        ("torch_dtype", "fp16", "must be one of: float32, bfloat16, got: fp16"),
        ("stack", "nightli", "must be one of: release, nightly, guide, got: nightli"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, said):
    (complaint,) = unfit({name: value}, PUBLIC)
    assert name in complaint
    assert said in complaint


@pytest.mark.parametrize(
    "values",
    [
        {"gmm": "true"},
        {"gmm": False},
        {"gmm": "yes"},
        {"max_steps": "10"},
        {"learning_rate": "2e-3"},
        {"tokenizer_name": ""},
    ],
)
def test_what_can_be_meant_passes(values):
    assert not unfit(values, PUBLIC)


def test_ansible_passes_what_is_right():
    run = run_playbook("playbooks/check_workers.yml", "-e", "gmm=true", max_steps=3)
    assert run.code == 0


def test_ansible_refuses_and_names_everything_that_is_wrong(tmp_path):
    extra = tmp_path / "extra.yml"
    extra.write_text("gmm: maybe\nmax_stepps: 3\n")
    run = run_playbook("playbooks/check_workers.yml", "-e", f"@{extra}")
    assert run.code != 0
    assert "'maybe' is not a valid boolean" in run.screen
    assert "-e max_stepps: there is no such variable. Did you mean max_steps?" in run.screen

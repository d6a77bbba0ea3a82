"""Names and values that a user sets, against what this repository knows."""

import re

import pytest
from ansible_collections.mixtral.tpu.plugins.action.check_variables import (
    given_twice,
    public_names,
    role_options,
    unfit,
    unknown,
)

from tests.playbook import ROOT, run_playbook

OPTIONS = role_options(ROOT / "roles")
PUBLIC = public_names(ROOT / "playbooks/group_vars/all", OPTIONS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gmm", "bool"),
        ("max_steps", "int"),
        ("learning_rate", "float"),
        ("dataset_name", "str"),
        ("profile_step", "int"),
        ("global_batch", "int"),
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


def test_the_page_lists_what_is_accepted():
    page = (ROOT / "docs/variables.md").read_text()
    public, roles = page.split("## Variables of the roles")
    rows = r"^\| `(\w+)` \|"
    listed_publicly = re.findall(rows, public, re.MULTILINE)
    set_by_them = re.findall(r"`(\w+)`", re.sub(r"^\|.*", "", roles, flags=re.MULTILINE))
    listed = [*listed_publicly, *set_by_them, *re.findall(rows, roles, re.MULTILINE)]
    assert "train_poll_seconds" in listed
    assert set(listed) == OPTIONS.keys() | PUBLIC.keys()
    assert set(listed_publicly) == PUBLIC.keys()


@pytest.mark.parametrize(
    ("values", "typed", "refused"),
    [
        ({"global_batch": "16"}, ["global_batch"], False),
        ({"per_device_train_batch_size": 8}, [], False),
        # Both in an inventory, both after -e, or one here and one there
        ({"global_batch": 16, "per_device_train_batch_size": 8}, [], True),
        ({"global_batch": "16", "per_device_train_batch_size": 8}, ["global_batch"], True),
        (
            {"global_batch": "8", "per_device_train_batch_size": "8"},
            ["global_batch", "per_device_train_batch_size"],
            True,
        ),
        # An inventory that falls back on the name that is typed
        ({"global_batch": "16", "per_device_train_batch_size": 16}, ["global_batch"], False),
    ],
)
def test_two_names_of_one_variable_are_not_given_together(values, typed, refused):
    complaints = given_twice(values, typed)
    assert len(complaints) == refused
    for complaint in complaints:
        assert f"global_batch is {values['global_batch']}" in complaint
        assert "Give one of them" in complaint


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


def test_ansible_refuses_a_batch_that_an_inventory_gives_by_its_other_name(tmp_path):
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(
        "tpu_workers:\n"
        "  hosts: {localhost: {ansible_connection: local}}\n"
        "  vars: {per_device_train_batch_size: 32}\n"
    )
    run = run_playbook("playbooks/check_workers.yml", "-e", "global_batch=64", inventory=hosts)
    assert run.code != 0
    assert "global_batch is 64 and per_device_train_batch_size is 32" in run.screen


def test_inventories_of_this_repository_leave_the_batch_both_of_its_names():
    for name in ("global_batch", "per_device_train_batch_size"):
        assert run_playbook("playbooks/check_workers.yml", "-e", f"{name}=16").code == 0

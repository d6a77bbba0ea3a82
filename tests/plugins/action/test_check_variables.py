"""Names and values that a user sets, against what this repository knows."""

import json
import re

import pytest
import yaml
from ansible_collections.mixtral.tpu.plugins.action.check_variables import (
    given_twice,
    nearly_known,
    settings_given,
    unfit,
    unknown,
)
from ansible_collections.mixtral.tpu.plugins.plugin_utils.variables import (
    public_names,
    role_options,
)

from tests.playbook import HERE, ROOT, run_playbook

OPTIONS = role_options(ROOT / "roles")
PUBLIC = public_names(ROOT / "roles")


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


def test_every_public_name_is_explained_by_a_variable_of_a_role():
    # The other name of a flag, which no role reads
    assert [name for name, spec in PUBLIC.items() if not spec] == ["global_batch"]


def test_what_others_set_is_no_public_name():
    assert not {"tpu_zone", "tpu_project", "mixtral_zone", "nightly__date"} & PUBLIC.keys()


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
    (complaint,) = unfit({name: value}, PUBLIC, [name])
    assert name in complaint
    assert said in complaint


def test_what_an_inventory_may_mean_otherwise_has_another_name():
    (complaint,) = unfit({"stack": "production"}, PUBLIC | OPTIONS, [])
    assert "set mixtral_stack, which counts" in complaint
    (complaint,) = unfit({"mixtral_stack": "production"}, PUBLIC | OPTIONS, [])
    assert "means something else" not in complaint


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
    assert not unfit(values, PUBLIC, values)


def test_the_page_lists_what_is_accepted():
    page = (ROOT / "docs/variables.md").read_text()
    public, roles = page.split("## Variables of the roles")
    rows = r"^\| `(\w+)` \|"
    listed_publicly = re.findall(rows, public, re.MULTILINE)
    set_by_them = re.findall(r"`(\w+)`", re.sub(r"^\|.*", "", roles, flags=re.MULTILINE))
    listed = [*listed_publicly, *set_by_them, *re.findall(rows, roles, re.MULTILINE)]
    assert "train_poll_seconds" in listed
    twins = {f"mixtral_{name}" for name in PUBLIC}
    assert set(listed) | twins == OPTIONS.keys() | PUBLIC.keys()
    assert set(listed_publicly) == PUBLIC.keys()


@pytest.mark.parametrize(
    ("values", "given", "refused"),
    [
        ({"global_batch": "16"}, ["global_batch"], False),
        ({"per_device_train_batch_size": 8}, [], False),
        # Both in an inventory, both after -e
        ({"global_batch": 16, "per_device_train_batch_size": 8}, [], True),
        (
            {"global_batch": "16", "per_device_train_batch_size": "8"},
            ["global_batch", "per_device_train_batch_size"],
            True,
        ),
        # One here and one there: what is given after -e counts.
        ({"global_batch": "16", "per_device_train_batch_size": 8}, ["global_batch"], False),
        ({"global_batch": "16", "per_device_train_batch_size": 16}, [], False),
    ],
)
def test_two_names_of_one_variable_are_not_given_together(values, given, refused):
    complaints = given_twice(values, given)
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


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"zone": "a"}, {"mixtral_zone": "zone"}),
        ({"zone": "a", "mixtral_zone": "b"}, {}),
        ({"global_batch": 1}, {"mixtral_per_device_train_batch_size": "global_batch"}),
        (
            {"mixtral_global_batch": 1, "global_batch": 2},
            {"mixtral_per_device_train_batch_size": "mixtral_global_batch"},
        ),
        ({"train_zone": "a", "ansible_user": "me"}, {}),
    ],
)
def test_a_name_after_e_decides_its_setting(given, settings):
    assert dict(settings_given(PUBLIC, given)) == settings


def test_a_name_in_an_inventory_that_is_nearly_known_is_warned_of():
    names = {"max_step", "train_gmmm", "ntp_servers", "ansible_usr", "max_steps", "groups"}
    assert nearly_known(names, PUBLIC | OPTIONS) == [
        "max_step in the inventory has no effect. Did you mean max_steps?",
        "train_gmmm in the inventory has no effect. Did you mean train_gmm?",
    ]


@pytest.mark.parametrize("name", ["awx_job_id", "tower_user_name", "semaphore_vars"])
def test_what_an_automation_platform_adds_passes(name):
    assert not unknown({name: "1"}, PUBLIC)


@pytest.fixture
def settings(tmp_path):
    """What some variables are for a worker, with these in the inventory and those after -e."""

    def read(everywhere, workers, one_slice, **given):
        hosts = tmp_path / "hosts.json"
        slice_ = {"hosts": {"w0": {}}, "vars": one_slice}
        group = {"vars": HERE | workers, "children": {"my_a": slice_}}
        hosts.write_text(
            json.dumps({"all": {"vars": everywhere, "children": {"tpu_workers": group}}})
        )
        tell = {"ansible.builtin.copy": {"dest": str(tmp_path / "said"), "content": SAID}}
        checks = {"ansible.builtin.import_playbook": str(ROOT / "playbooks/check_workers.yml")}
        role = {"name": "mixtral.tpu.slice", "tasks_from": "status.yml"}
        train = {"name": "mixtral.tpu.train", "tasks_from": "status.yml"}
        tasks = [{"ansible.builtin.import_role": it, "when": False} for it in (role, train)]
        play = {"hosts": "all", "gather_facts": False, "tasks": [*tasks, tell]}
        path = tmp_path / "play.json"
        path.write_text(json.dumps([checks, play]))
        run = run_playbook(path, inventory=hosts, **given)
        assert run.code == 0
        return json.loads((tmp_path / "said").read_text()), run

    return read


SETTINGS = ["train_max_steps", "train_seed", "train_block_size", "slice_zone", "slice_state"]
SAID = f"{{{{ dict({SETTINGS} | zip(query('ansible.builtin.vars', *{SETTINGS}))) | to_json }}}}"


def test_an_inventory_wins_over_defaults_and_the_command_line_over_an_inventory(settings):
    everywhere = {"train_max_steps": 7, "mixtral_seed": 5, "zone": "a-shop-s", "state": "absent"}
    everywhere |= {"mixtral_zone": "z", "blok_size": 64}
    said, run = settings(everywhere, {"block_size": 64}, {"block_size": 128})
    assert said == {
        "train_max_steps": 7,
        "train_seed": 5,
        "train_block_size": 128,
        "slice_zone": "z",
        "slice_state": "",
    }
    assert run.screen.count("blok_size in the inventory has no effect") == 1
    said, _ = settings(
        everywhere, {}, {}, zone="of-e", seed=1, max_steps=3, state="present", mixtral_seed=2
    )
    assert said == {
        "train_max_steps": 7,
        "train_seed": 2,
        "train_block_size": 4096,
        "slice_zone": "of-e",
        "slice_state": "present",
    }


def test_what_the_inventories_of_this_repository_set_is_not_warned_of():
    names = set()
    for path in ROOT.glob("inventory/*/group_vars/*.yml"):
        names |= yaml.safe_load(path.read_text()).keys()
    described = (ROOT / "plugins/inventory/gcp_tpu.py").read_text()
    names |= set(re.findall(r"tpu_\w+", described))
    assert {"tpu_zone", "simulated_name", "pjrt_device"} <= names
    assert not nearly_known(names, PUBLIC | OPTIONS)

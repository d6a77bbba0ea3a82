"""The role's variables against the trainer's flags, and the guide's command line against both."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import filter_loader, init_plugin_loader
from ansible.template import Templar

from trainer.arguments import DataArguments, ModelArguments, TrainingArguments

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/train"
OPTIONS = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"][
    "options"
]
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
FLAGS = {
    field.name: (get_type_hints(group)[field.name], field.default)
    for group in (ModelArguments, DataArguments, TrainingArguments)
    for field in dataclasses.fields(group)
    if field.name != "validate"
}

# The guide's command line and environment, less what says where its files are.
GUIDE = {
    "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-2-raw-v1",
    "per_device_train_batch_size": "32",
    "do_train": True,
    "overwrite_output_dir": True,
    "tokenizer_name": "mistralai/Mixtral-8x7B-v0.1",
    "block_size": "4096",
    "optim": "adafactor",
    "save_strategy": "no",
    "logging_strategy": "no",
    "fsdp": "full_shard",
    "torch_dtype": "bfloat16",
    "dataloader_drop_last": True,
    "flash_attention": True,
    "max_steps": "10",
    "gmm": True,
}
GUIDE_ENVIRONMENT = {
    "PJRT_DEVICE": "TPU",
    "XLA_USE_SPMD": "1",
    "XLA_IR_DEBUG": "1",
    "XLA_HLO_DEBUG": "1",
    "PROFILE_EPOCH": "0",
    "PROFILE_STEP": "3",
    "PROFILE_DURATION_MS": "20000",
    "PROFILE_LOGDIR": "/tmp/home/",
}


def bare(kind: Any) -> Any:
    """Return the type of a field without its ``| None``."""
    return get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def ansible_type(kind: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}
    return "str" if get_origin(bare(kind)) is Literal else names[bare(kind)]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_a_variable_of_its_type_and_choices(flag):
    kind, _ = FLAGS[flag]
    option = OPTIONS[f"train_{flag}"]
    # An empty path is a file that is not given, so the one of the text is a string.
    assert option["type"] == ("str" if flag == "train_file" else ansible_type(kind))
    choices = get_args(bare(kind)) if get_origin(bare(kind)) is Literal else ()
    assert option.get("choices", []) == list(choices)


# The role always trains, into a directory of its own, with paths of its own.
@pytest.mark.parametrize("flag", FLAGS.keys() - {"do_train", "overwrite_output_dir"})
def test_a_default_is_the_trainer_s(flag):
    kind, default = FLAGS[flag]
    if bare(kind) is Path and flag != "train_file":
        return
    assert (DEFAULTS[f"train_{flag}"] or None) == (default or None)


def test_a_boolean_that_is_left_out_is_off():
    assert not any(default for kind, default in FLAGS.values() if kind is bool)


def test_defaults_are_as_documented():
    documented = {
        name: option["default"] for name, option in OPTIONS.items() if "default" in option
    }
    assert {name: DEFAULTS[name] for name in documented} == documented


def test_every_documented_variable_has_a_default():
    assert OPTIONS.keys() == DEFAULTS.keys()


@pytest.fixture(scope="module")
def resolve():
    """Return what the role makes of public names, as Ansible resolves them in train.yml."""
    init_plugin_loader()
    filter_loader.add_directory(str(ROOT / "plugins/filter"))
    loader = DataLoader()
    variables: dict[str, Any] = {}
    for path in (
        ROLE / "defaults/main.yml",
        ROOT / "playbooks/group_vars/all.yml",
        ROLE / "vars/main.yml",
    ):
        variables |= loader.load_from_file(str(path), trusted_as_template=True)
    variables |= {"playbook_dir": str(ROOT / "playbooks"), "role_path": str(ROLE)}

    def resolved(name: str, **public: Any) -> Any:
        return Templar(loader, variables=variables | public).template(variables[name])

    return resolved


def test_without_a_word_it_is_the_guide_s_command(resolve):
    flags = resolve("train__flags_in_container", gmm="true")
    assert {name: str(flags[name]) for name in GUIDE} == {k: str(v) for k, v in GUIDE.items()}
    places = {"config_name", "fsdp_config", "cache_dir", "output_dir"}
    for name in flags.keys() - GUIDE.keys() - places:
        # Said or not, the trainer does the same.
        assert (flags[name] or None) == (FLAGS[name][1] or None), name


def test_without_a_word_it_is_the_guide_s_environment(resolve):
    assert resolve("train__environment") == GUIDE_ENVIRONMENT


def test_on_a_cpu_there_are_two_threads_for_each_device(resolve):
    environment = resolve("train__environment", pjrt_device="CPU", cpu_num_devices="4")
    assert environment == GUIDE_ENVIRONMENT | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": "4",
        "NPROC": "8",
    }


def test_a_text_takes_the_place_of_the_dataset(resolve):
    flags = resolve("train__flags_in_container", train_file="texts/my text.txt")
    assert flags["train_file"] == "/data/my text.txt"
    assert not flags["dataset_name"]
    assert not flags["dataset_config_name"]


def test_the_validator_sees_the_controller_s_files(resolve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = resolve("train__flags_on_controller", train_file="mine.txt", model="mixtral-tiny")
    assert flags["train_file"] == str(tmp_path / "mine.txt")
    assert flags["config_name"] == str(ROOT / "trainer/presets/mixtral-tiny.json")
    assert flags["fsdp_config"] == str(ROOT / "trainer/presets/fsdp_config.json")

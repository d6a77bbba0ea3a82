"""The role's variables against the trainer's flags, and the guide's command line against both."""

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

from trainer.arguments import NOT_COMPILED, DataArguments, ModelArguments, TrainingArguments

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/train"
OPTIONS = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"][
    "options"
]
SETTINGS = ROOT / "roles/mixtral"
FLAGS = {
    field.name: (get_type_hints(group)[field.name], field.default)
    for group in (ModelArguments, DataArguments, TrainingArguments)
    for field in dataclasses.fields(group)
    if field.name != "validate"
}
# Where the trainer finds what the role brings to it; but for the last, nobody sets them.
PLACES = ("config_name", "fsdp_config", "cache_dir", "output_dir", "logging_dir")

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


def variables_in(*directories: Path) -> dict[str, Any]:
    """Return what Ansible loads from the files below some directories, as they stand."""
    loader = DataLoader()
    variables: dict[str, Any] = {}
    for directory in directories:
        for path in sorted(directory.glob("**/*.yml")):
            variables |= loader.load_from_file(str(path), trusted_as_template=True)
    return variables


DEFAULTS = variables_in(ROLE / "defaults/main")


def bare(kind: Any) -> Any:
    """Return the type of a field without its ``| None``."""
    return get_args(kind)[0] if get_origin(kind) in (types.UnionType, Union) else kind


def ansible_type(kind: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", Path: "path"}
    return "str" if get_origin(bare(kind)) is Literal else names[bare(kind)]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_a_variable_of_its_type_and_choices(flag):
    kind, _ = FLAGS[flag]
    option = OPTIONS[f"train_{flag}"]
    assert option["type"] == ansible_type(kind)
    choices = get_args(bare(kind)) if get_origin(bare(kind)) is Literal else ()
    # An empty value leaves it to the trainer; where there are choices, it has to be one of them.
    assert [it for it in option.get("choices", []) if it] == list(choices)


@pytest.mark.parametrize("public", [{}, {"spmd_2d_sharding": "2"}, {"do_eval": "yes"}])
def test_what_the_role_is_given_is_what_its_spec_allows(resolve, public):
    options = {
        name: {key: spec[key] for key in spec.keys() & {"type", "elements", "choices"}}
        for name, spec in OPTIONS.items()
    }
    names = [f"train_{flag}" for flag in FLAGS]
    values = {name: resolve(name, **public) for name in names}
    validator = ArgumentSpecValidator({name: options[name] for name in names})
    assert not validator.validate(values).error_messages


def test_a_boolean_that_is_left_out_is_off():
    assert not any(default for kind, default in FLAGS.values() if kind is bool)


@pytest.fixture(scope="module")
def resolve():
    """Return what the role makes of public names, as Ansible resolves them in train.yml."""
    others = [ROOT / "roles" / name / "defaults" for name in ("huggingface", "nightly")]
    settings = [SETTINGS / "defaults", SETTINGS / "vars"]
    variables = variables_in(*settings, *others, ROLE / "defaults", ROLE / "vars")
    variables["role_path"] = str(ROLE)

    def resolved(name: str, **public: Any) -> Any:
        return Templar(DataLoader(), variables=variables | public).template(variables[name])

    return resolved


def test_without_a_word_it_is_the_guide_s_command(resolve):
    flags = resolve("train__flags_of_run", gmm="true")
    assert {name: str(flags[name]) for name in GUIDE} == {k: str(v) for k, v in GUIDE.items()}
    for name in flags.keys() - GUIDE.keys() - set(PLACES):
        # Said or not, the trainer does the same.
        assert (flags[name] or None) == (FLAGS[name][1] or None), name


@pytest.mark.parametrize("flag", sorted(FLAGS.keys() - set(PLACES)))
def test_every_flag_reaches_the_trainer(resolve, flag):
    """By its public name, under its own, with the value that it was given."""
    kind = bare(FLAGS[flag][0])
    own = {"checkpoint_bucket": "gs://b/p", "train_file": "/p/a.txt", "validation_file": "/p/a.txt"}
    values = get_args(kind) if get_origin(kind) is Literal else {
        bool: ("false", "true"), int: ("3", "7"), float: ("0.25", "0.5")
    }.get(kind, (own.get(flag, "mine"),))  # fmt: skip
    for value in values:
        argv = resolve("train__flags_on_controller", run_name="r", **{flag: value})
        if kind is bool:
            assert argv[flag] is (value == "true")
        else:
            passed = f"{value}/r" if flag == "checkpoint_bucket" else value
            assert str(argv[flag]) == passed


@pytest.mark.parametrize("flag", PLACES)
def test_the_trainer_is_told_where_everything_is(resolve, flag):
    given = resolve("train__flags_of_run", report_to="tensorboard")[flag]
    assert given == resolve(f"train_{flag}")
    assert given.startswith("/")


def test_the_other_name_of_the_batch_is_taken(resolve):
    flags = resolve("train__flags_of_run", global_batch="16")
    assert flags["per_device_train_batch_size"] == 16
    assert "global_batch" not in flags


def test_a_plan_holds_for_what_is_not_compiled(resolve):
    assert set(NOT_COMPILED) <= FLAGS.keys()
    image = {"train__plan_image": {"images": [{"Id": "sha256:1"}]}}
    key = resolve("train__plan_key", **image)
    for public in ({"learning_rate": "1"}, {"max_steps": "3"}, {"tokenizer_name": "mine"}):
        assert resolve("train__plan_key", **image, **public) == key
    for public in ({"block_size": "64"}, {"max_grad_norm": "0"}, {"static": "true"}):
        assert resolve("train__plan_key", **image, **public) != key


def test_without_a_word_it_is_the_guide_s_environment(resolve):
    assert resolve("train__environment") == GUIDE_ENVIRONMENT


def test_on_a_cpu_there_are_two_threads_for_each_device(resolve):
    environment = resolve("train__environment", pjrt_device="CPU", cpu_num_devices="4")
    assert environment == GUIDE_ENVIRONMENT | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": "4",
        "NPROC": "8",
        "JAX_PLATFORMS": "cpu",
    }


def test_slices_that_train_as_one_know_each_other(resolve):
    hosts = {
        f"{slice_}-w{worker}": {"tpu_slice_id": slice_, "tpu_internal_ip": f"10.0.{index}.{worker}"}
        for index, slice_ in enumerate(["a", "b"])
        for worker in range(2)
    }
    play = {"ansible_play_hosts_all": list(hosts), "hostvars": hosts, "tpu_slice_id": "b"}
    assert resolve("train__environment", multislice="true", **play) == GUIDE_ENVIRONMENT | {
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.0",
    }
    # What is compiled before the start is what is going to train.
    assert resolve("train__plan_flags", multislice="true", **play)["slices"] == 2


@pytest.mark.parametrize(("public", "slices"), [({}, 1), ({"slices": "4"}, 4)])
def test_a_plan_is_for_one_slice_or_for_those_that_are_named(resolve, public, slices):
    assert resolve("train__plan_flags", **public)["slices"] == slices


def test_a_slice_that_is_chosen_is_asked_alone_for_its_nightly(resolve):
    groups = {"tpu_workers": ["a-w0", "b-w0"], "my_a": ["a-w0"]}
    assert resolve("nightly_workers", slice="my-a", groups=groups) == ["a-w0"]
    assert resolve("nightly_workers", groups=groups) == ["a-w0", "b-w0"]


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:8000"])
@pytest.mark.parametrize("logged_in", [False, True])
def test_the_hub_is_reached_as_from_the_controller_and_with_the_workers_login(
    resolve, monkeypatch, endpoint, logged_in
):
    for name in ("HF_ENDPOINT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    login = {"stat": {"exists": logged_in}}
    expected = {"HF_ENDPOINT": endpoint} if endpoint else {}
    expected |= {"HF_TOKEN_PATH": "/hf/token"} if logged_in else {}
    assert resolve("train__hub_environment", train__login=login) == expected
    # It makes no other run of one that goes on.
    assert resolve("train__environment", train__login=login) == GUIDE_ENVIRONMENT


@pytest.mark.parametrize(
    ("public", "flag"),
    [
        ({}, None),
        ({"save_strategy": "steps"}, "auto"),
        ({"run_name": "mine"}, "auto"),
        (
            {"save_strategy": "steps", "resume_from_checkpoint": "/a/checkpoint-4"},
            "/a/checkpoint-4",
        ),
        ({"save_strategy": "steps", "stack": "guide"}, None),
        ({"run_name": "mine", "checkpoint_bucket": "gs://b/p"}, "auto"),
        ({"run_name": "mine", "checkpoint_bucket": "gs://b/p", "resume": "must"}, "must"),
        ({"run_name": "mine", "checkpoint_bucket": "gs://b/p", "resume": "never"}, None),
        (
            {
                "checkpoint_bucket": "gs://b/p",
                "resume_from_checkpoint": "gs://b/other/checkpoint-4",
            },
            "gs://b/other/checkpoint-4",
        ),
    ],
)
def test_a_run_begins_as_it_is_resumed(resolve, public, flag):
    assert (resolve("train__flags_of_run", **public)["resume_from_checkpoint"] or None) == flag


@pytest.mark.parametrize(
    ("ready", "name", "again"),
    [
        ({"run_id": None, "resumes": None}, "", False),
        ({"run_id": None, "resumes": "20260101-100000"}, "", True),
        ({"run_id": None, "resumes": None}, "mine", True),
        ({"run_id": "mine", "resumes": None}, "mine", False),
    ],
)
def test_what_ended_before_is_forgotten_where_a_run_goes_on(resolve, ready, name, again):
    assert resolve("train__goes_on", run_name=name, train__ready=ready) == again


@pytest.mark.parametrize("bucket", ["gs://my-bucket/path", "gs://my-bucket/path/"])
def test_every_run_has_a_path_of_its_own_in_the_bucket(resolve, bucket):
    public = {"checkpoint_bucket": bucket, "run_name": "mine"}
    for flags in ("train__flags_of_run", "train__flags_on_controller"):
        assert resolve(flags, **public)["checkpoint_bucket"] == "gs://my-bucket/path/mine"


def test_a_tpu_keeps_what_it_has_compiled_for_each_image(resolve):
    image, venv = "0123456789abcdef", "/home/me/mixtral-trainer/stacks/nightly-1"

    def cache(**public):
        return resolve("train__cache_environment", train_image_identity=image, **public)

    assert cache() == {"XLA_PERSISTENT_CACHE_PATH": "/cache/xla/0123456789ab"}
    native = cache(runtime="native", train__venv=venv, train__worker_dir="/w", train__home="/h")
    assert native == {"XLA_PERSISTENT_CACHE_PATH": "/w/cache/native/xla/nightly-1"}
    assert cache(pjrt_device="CPU") == {}


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_the_container_trusts_whom_the_controller_trusts(resolve, monkeypatch, name):
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.setenv(name, "/etc/company.crt")
    assert resolve("train_ca_file") == "/etc/company.crt"
    environment = resolve("train__hub_environment", train__login={"stat": {"exists": False}})
    assert environment["SSL_CERT_FILE"] == "/ca.crt"


def test_the_container_cannot_write_to_the_login(resolve):
    (mount,) = resolve("train__login_mount", ansible_facts={"user_dir": "/home/me"})
    assert mount == {
        "type": "bind",
        "source": "/home/me/mixtral-trainer/hf",
        "target": "/hf",
        "read_only": True,
    }


def test_no_variable_that_is_recorded_holds_the_token(resolve):
    tasks = (ROLE / "tasks/prepare.yml").read_text()
    recorded = re.search(r"builtin\.varnames', '(.+?)'", tasks)[1]
    names = [name for name in DEFAULTS if re.search(recorded, name)]
    assert "train_max_steps" in names
    assert not re.search(recorded, "mixtral_hf_token")
    assert not re.search(recorded, "hf_token")
    assert not re.search(recorded, "huggingface_token")
    assert resolve("huggingface_token", hf_token="of-this-test") == "of-this-test"
    for name in names:
        assert "of-this-test" not in str(resolve(name, hf_token="of-this-test")), name


def test_a_text_takes_the_place_of_the_dataset(resolve):
    flags = resolve("train__flags_of_run", train_file="texts/my text.txt")
    assert flags["train_file"] == "/data/my text.txt"
    assert not flags["dataset_name"]
    assert not flags["dataset_config_name"]


def test_the_validator_sees_the_controller_s_files(resolve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = resolve("train__flags_on_controller", train_file="mine.txt", model="mixtral-tiny")
    assert flags["train_file"] == str(tmp_path / "mine.txt")
    assert flags["config_name"] == str(ROOT / "trainer/presets/mixtral-tiny.json")
    assert flags["fsdp_config"] == str(ROOT / "trainer/presets/fsdp_config.json")

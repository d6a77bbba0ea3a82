import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.flags import BadInput
from trainer.validation import check_devices, parse, validate

ROOT = Path(__file__).parents[2]


def refusal(argv: list[str], **environ: str) -> str:
    with pytest.raises(BadInput) as caught:
        validate(argv, environ)
    return str(caught.value)


def test_the_guides_command_is_taken_as_it_stands(presets: Path, tmp_path: Path) -> None:
    command = f"""
      --dataset_name wikitext
      --dataset_config_name wikitext-2-raw-v1
      --per_device_train_batch_size 32
      --do_train
      --output_dir {tmp_path}/test-clm
      --overwrite_output_dir
      --config_name {presets}/mixtral-8x7b.json
      --cache_dir /tmp
      --tokenizer_name mistralai/Mixtral-8x7B-v0.1
      --block_size 4096
      --optim adafactor
      --save_strategy no
      --logging_strategy no
      --fsdp full_shard
      --fsdp_config {presets}/fsdp_config.json
      --torch_dtype bfloat16
      --dataloader_drop_last yes
      --flash_attention
      --max_steps 10
      --gmm
    """
    arguments = validate(command.split(), {})
    model, data, training = arguments.model, arguments.data, arguments.training
    assert (data.dataset_name, data.dataset_config_name) == ("wikitext", "wikitext-2-raw-v1")
    assert (data.block_size, data.train_file) == (4096, None)
    assert model.tokenizer_name == "mistralai/Mixtral-8x7B-v0.1"
    assert (model.torch_dtype, model.flash_attention) == ("bfloat16", True)
    assert (model.experts_mode, model.cache_dir) == ("gmm", Path("/tmp"))
    assert (training.per_device_train_batch_size, training.max_steps) == (32, 10)
    assert (training.fsdp, training.dataloader_drop_last) == ("full_shard", True)
    assert arguments.fsdp.activation_checkpointing
    assert arguments.config["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ([], "gmm"),
        (["--gmm"], "gmm"),
        (["--gmm_stack"], "gmm_stack"),
        (["--static", "yes"], "static"),
        (["--gmm", "false", "--static"], "static"),
    ],
)
def test_one_mode_of_the_experts_or_gmm(argv: list[str], flags: list[str], mode: str) -> None:
    assert parse([*argv, *flags]).model.experts_mode == mode


@pytest.mark.parametrize("pair", [("gmm", "static"), ("gmm_stack", "static"), ("gmm", "gmm_stack")])
def test_two_modes_are_refused(argv: list[str], pair: tuple[str, str]) -> None:
    message = refusal([*argv, *(f"--{mode}" for mode in pair)])
    assert f"--{pair[0]} and --{pair[1]} are given together" in message
    assert "one of --gmm, --gmm_stack, --static" in message


def test_without_a_block_size_it_is_1024_or_what_the_model_can(
    argv: list[str], write_config: Callable[..., Path]
) -> None:
    write_config(max_position_embeddings=4096)
    assert parse(argv).data.block_size == 1024
    write_config(max_position_embeddings=512)
    assert parse(argv).data.block_size == 512


def test_a_block_longer_than_the_model_can_is_refused(argv: list[str]) -> None:
    message = refusal([*argv, "--block_size", "2048"])
    assert "2048" in message
    assert "2 to 1024" in message


def test_texts_are_one_or_the_other(argv: list[str], tmp_path: Path) -> None:
    message = refusal([*argv, "--train_file", "book.txt"])
    assert "python-help" in message
    assert "book.txt" in message
    position = argv.index("--dataset_name")
    message = refusal([*argv[:position], *argv[position + 2 :]])
    assert "--dataset_name or --train_file" in message


def test_a_stream_has_no_epochs_and_trains_no_tokenizer(argv: list[str]) -> None:
    streaming = [*argv, "--streaming"]
    assert "without --max_steps" in refusal([*streaming, "--tokenizer_name", "gpt2"])
    assert "leave --streaming out" in refusal([*streaming, "--max_steps", "1"])
    assert "without --tokenizer_name" in refusal([*streaming, "--max_steps", "1"])
    assert validate([*streaming, "--max_steps", "1", "--tokenizer_name", "gpt2"], {})


def test_there_must_be_something_to_do(argv: list[str]) -> None:
    assert "add it" in refusal([flag for flag in argv if flag != "--do_train"])
    assert "num_train_epochs is 0" in refusal([*argv, "--num_train_epochs", "0"])
    assert validate([*argv, "--num_train_epochs", "0", "--max_steps", "1"], {})


def test_an_earlier_run_is_replaced_only_on_demand(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer.log").write_text("the launcher's\n")
    assert validate(argv, {})
    (tmp_path / "out" / "metrics.jsonl").write_text("{}\n")
    assert "--overwrite_output_dir" in refusal(argv)
    assert validate([*argv, "--overwrite_output_dir"], {})


def test_a_run_is_continued_where_it_is_resumed(argv: list[str], tmp_path: Path) -> None:
    """A checkpoint elsewhere begins another run, which must not mix with one that is there."""
    newest = tmp_path / "out" / "checkpoint-4"
    newest.mkdir(parents=True)
    assert "or --resume_from_checkpoint auto to continue it" in refusal(argv)
    assert validate([*argv, "--resume_from_checkpoint", "auto"], {})
    assert validate([*argv, "--resume_from_checkpoint", str(newest)], {})
    elsewhere = [*argv, "--resume_from_checkpoint", str(tmp_path / "other" / "checkpoint-4")]
    assert "holds an earlier run" in refusal(elsewhere)
    assert validate([*elsewhere, "--overwrite_output_dir"], {})


@pytest.mark.parametrize(
    ("resumed", "continues"),
    [
        ("auto", True),
        ("must", True),
        ("gs://my-bucket/runs/a/checkpoint-4", True),
        ("gs://my-bucket/runs/a/checkpoint-4/", True),
        ("gs://my-bucket/runs/b/checkpoint-4", False),
        ("out/checkpoint-4", False),
    ],
)
def test_checkpoints_in_a_bucket_are_a_run_s(
    argv: list[str], resumed: str, continues: bool
) -> None:
    flags = ["--save_strategy", "steps", "--checkpoint_bucket", "gs://my-bucket/runs/a"]
    training = validate([*argv, *flags, "--resume_from_checkpoint", resumed], {}).training
    assert training.continues is continues
    assert not validate([*argv, *flags], {}).training.continues


@pytest.mark.parametrize(
    "address", ["my-bucket/a", "/mnt/a", "s3://my-bucket/a", "gs://", "gs://My/a"]
)
def test_an_address_that_is_none_of_a_bucket_is_refused(argv: list[str], address: str) -> None:
    flags = ["--save_strategy", "steps", "--checkpoint_bucket", address]
    assert f"checkpoint_bucket is {address!r}; a place in a bucket is gs://" in refusal(
        [*argv, *flags]
    )
    if "://" in address:
        message = refusal([*argv, "--resume_from_checkpoint", f"{address}/checkpoint-4"])
        assert f"resume_from_checkpoint is '{address}/checkpoint-4'; a place in a bucket" in message


@pytest.mark.parametrize("flag", ["--save_steps", "--save_total_limit"])
def test_checkpoints_are_counted_from_one(argv: list[str], flag: str) -> None:
    assert f"{flag}: '0' is not allowed" in refusal([*argv, "--save_strategy", "steps", flag, "0"])
    assert validate([*argv, "--save_strategy", "steps", flag, "1"], {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--eval_steps 5", "--eval_steps 5 would be ignored without --eval_strategy steps"),
        ("--per_device_eval_batch_size 4", "would be ignored without --do_eval"),
        ("--validation_file a.txt", "--validation_file a.txt would be ignored without --do_eval"),
        (
            "--checkpoint_bucket gs://my-bucket/a",
            "--checkpoint_bucket gs://my-bucket/a would be ignored without --save_strategy steps",
        ),
        ("--save_total_limit 2", "--save_total_limit 2 would be ignored without --save_strategy"),
        ("--dataset_config_name en", "en would be ignored without --dataset_name of the hub"),
        ("--logging_dir d", "--logging_dir d would be ignored without --report_to tensorboard"),
        (
            "--lr_scheduler_type constant --warmup_steps 3",
            "--warmup_steps 3 would be ignored without --lr_scheduler_type constant_with_warmup",
        ),
        ("--warmup_ratio 1.5", "warmup_ratio is 1.5; it is a share of all steps, 0 to 1"),
        ("--do_eval --validation_split_percentage 100", "allowed are 1 to 99"),
        ("--gradient_accumulation_steps 0", "must be an integer, at least 1"),
        ("--report_to wandb", "'wandb' is not allowed; allowed are 'none', 'tensorboard'"),
        ("--do_eval --validation_file nowhere.txt", "nowhere.txt: cannot be read"),
    ],
)
def test_nothing_is_ignored(argv: list[str], flags: str, said: str) -> None:
    assert said in refusal([*argv, *flags.split()])


def test_an_evaluation_has_the_batch_of_training_or_its_own(argv: list[str]) -> None:
    four = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    assert parse([*argv, "--do_eval"]).training.eval_batch == 8
    flags = [*argv, "--per_device_eval_batch_size", "6"]
    assert "is 6 sequences, which 4 devices do not divide; give a multiple of 4" in refusal(
        [*flags, "--eval_strategy", "steps"], **four
    )


def test_the_global_batch_has_a_name_that_says_so(argv: list[str]) -> None:
    assert validate([*argv, "--global_batch", "12"], {}).training.per_device_train_batch_size == 12
    message = refusal([*argv, "--global_batch", "12", "--per_device_train_batch_size", "8"])
    assert "--global_batch 12 and --per_device_train_batch_size 8 are given together" in message
    assert message.endswith("give one of them")


def test_a_share_of_the_steps_warms_up(argv: list[str]) -> None:
    assert parse([*argv, "--warmup_ratio", "0.25"]).training.warmup(10) == 3
    assert parse([*argv, "--warmup_ratio", "0.25", "--warmup_steps", "5"]).training.warmup(10) == 5


def test_a_model_s_directory_brings_its_config(argv: list[str], tmp_path: Path) -> None:
    position = argv.index("--config_name")
    bare = [*argv[:position], *argv[position + 2 :]]
    assert "--config_name missing; give it, or a model's directory" in refusal(bare)
    directory = Path(argv[position + 1]).parent
    assert parse([*bare, "--model_name_or_path", str(directory)]).config["hidden_size"] == 256
    for name in ("mistralai/Mixtral-8x7B-v0.1", str(tmp_path / "nowhere")):
        message = refusal([*bare, "--model_name_or_path", name])
        assert f"there is no {name}/config.json here; give --config_name as well" in message
        assert validate([*argv, "--model_name_or_path", name], {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"short\n", "has 6 bytes, fewer than one block of 1024 tokens"),
        (b"caf\xe9 " * 1024, "byte 0xe9 at offset 3"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_refused(
    argv: list[str], tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    message = refusal([*argv, "--dataset_name", "", "--train_file", str(path)])
    assert str(path) in message
    assert said in message


def test_a_vocabulary_smaller_than_the_bytes_needs_a_tokenizer(
    argv: list[str], write_config: Callable[..., Path]
) -> None:
    write_config(vocab_size=258)
    assert "at least 259" in refusal(argv)
    assert validate([*argv, "--tokenizer_name", "some/tokenizer"], {})


@pytest.mark.parametrize(
    ("batch", "environ", "nearest", "most"),
    [
        (6, {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}, "4 and 8", "2 devices"),
        (3, {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}, "4", "1 devices"),
        (
            32,
            {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v5p-256"},
            "128",
            "32 devices (v5p-64)",
        ),
        (
            96,
            {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v5p-128"},
            "64 and 128",
            "32 devices (v5p-64)",
        ),
        (
            12,
            {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v5litepod-8"},
            "8 and 16",
            "4 devices (v5e-4)",
        ),
        (6, {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v4-8"}, "4 and 8", "none"),
    ],
)
def test_a_batch_that_the_devices_do_not_divide_is_refused(
    argv: list[str], batch: int, environ: dict[str, str], nearest: str, most: str
) -> None:
    message = refusal([*argv, "--per_device_train_batch_size", str(batch)], **environ)
    assert f"is {batch} sequences, which" in message
    assert f"Nearest batches that work: {nearest}." in message
    assert message.endswith(f"The largest slice that this batch fits: {most}")


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 5, 6, 12, 30, 100])
def test_what_the_refusal_recommends_works(argv: list[str], batch: int, devices: int) -> None:
    cpu = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    flags = [*argv, "--per_device_train_batch_size"]
    if batch % devices == 0:
        validate([*flags, str(batch)], cpu)
        return
    message = refusal([*flags, str(batch)], **cpu)
    nearest, most = re.search(r"that work: (.*)\. The largest .*: (\d+) devices$", message).groups()
    for other in nearest.split(" and "):
        validate([*flags, other], cpu)
    validate([*flags, str(batch)], cpu | {"CPU_NUM_DEVICES": most})


def test_weights_that_the_devices_do_not_divide_are_refused(argv: list[str]) -> None:
    message = refusal(
        [*argv, "--per_device_train_batch_size", "6"], PJRT_DEVICE="CPU", CPU_NUM_DEVICES="6"
    )
    assert "hidden_size is 256" in message
    assert message.endswith("fits: 2 devices")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PJRT_DEVICE": ""},
        {"PJRT_DEVICE": "CPU"},
        {"PJRT_DEVICE": "TPU"},
        {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": ""},
        {"PJRT_DEVICE": "CPU", "TPU_ACCELERATOR_TYPE": "v5p-128"},
    ],
)
def test_where_the_device_count_is_unknown_or_one_any_batch_passes(
    argv: list[str], environ: dict[str, str]
) -> None:
    arguments = validate([*argv, "--per_device_train_batch_size", "7"], environ)
    with pytest.raises(BadInput, match="is 7"):
        check_devices(arguments, 4)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PJRT_DEVICE": "CUDA"}, "'CUDA'"),
        ({"XLA_USE_SPMD": "0"}, "set it to 1"),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "four"}, "'four'"),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "0"}, "'0'"),
        ({"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v9-8"}, "'v9-8'"),
        ({"PROFILE_STEP": "three"}, "PROFILE_STEP is 'three'; it must be a whole number"),
        ({"PROFILE_DURATION_MS": "-1"}, "PROFILE_DURATION_MS is '-1'"),
        (
            {"PROFILE_LOGDIR": "gs://bucket/p"},
            "profiles are written to a directory",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    argv: list[str], environ: dict[str, str], said: str
) -> None:
    assert said in refusal(argv, **environ)


def test_validation_needs_no_package(argv: list[str]) -> None:
    program = "import sys; from trainer.validation import validate; validate(sys.argv[1:], {})"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_two_ways_to_shard_are_refused(argv: list[str]) -> None:
    message = refusal([*argv, "--fsdp", "full_shard", "--spmd_2d_sharding", "2"])
    assert "--spmd_2d_sharding 2 and --fsdp full_shard are given together" in message


def test_along_the_tensor_axis_the_batch_is_not_split(argv: list[str]) -> None:
    eight = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    flags = [*argv, "--spmd_2d_sharding", "2", "--per_device_train_batch_size"]
    validate([*flags, "4"], eight)
    message = refusal([*flags, "6"], **eight)
    assert "8 devices in groups of 2 (spmd_2d_sharding) do not divide. Nearest" in message
    assert "Nearest batches that work: 4 and 8." in message


# The tiny Mixtral has 4 key and value heads, and 7 devices are no multiple of 2.
@pytest.mark.parametrize(
    ("split", "devices", "said"),
    [
        (8, 8, "which does not divide num_key_value_heads 4"),
        (8, 8, "allowed are the divisors of 4"),
        (2, 7, "spmd_2d_sharding is 2, which does not divide the 7 devices of a slice"),
    ],
)
def test_what_cannot_be_split_is_refused(
    argv: list[str], split: int, devices: int, said: str
) -> None:
    flags = [*argv, "--spmd_2d_sharding", str(split)]
    assert said in refusal(flags, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices))


def test_all_slices_share_the_batch(argv: list[str]) -> None:
    slices = {"PJRT_DEVICE": "TPU", "TPU_ACCELERATOR_TYPE": "v5p-16", "MEGASCALE_NUM_SLICES": "2"}
    flags = [*argv, "--per_device_train_batch_size"]
    validate([*flags, "16"], slices)
    message = refusal([*flags, "8"], **slices)
    assert "16 devices (v5p-16) do not divide" in message
    assert message.endswith("fits: 8 devices (v5p-8)")


def test_a_number_of_slices_that_is_none_is_refused(argv: list[str]) -> None:
    assert "MEGASCALE_NUM_SLICES is 'two'" in refusal(
        argv, PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4", MEGASCALE_NUM_SLICES="two"
    )

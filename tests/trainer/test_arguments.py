import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.arguments import BadInput, check_devices, parse, validate

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
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    argv: list[str], environ: dict[str, str], said: str
) -> None:
    assert said in refusal(argv, **environ)


def test_validation_needs_no_package(argv: list[str]) -> None:
    program = "import sys; from trainer.arguments import validate; validate(sys.argv[1:], {})"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.arguments import BadInput, parse
from trainer.data import Blocks, batches, blocks, load_texts, load_tokenizer, steps_per_epoch

BLOCK = 64


@pytest.fixture(scope="module")
def numbered() -> Blocks:
    """Ten blocks; the first token of a block is its number."""
    tokens = np.arange(10, dtype=np.int32)[:, None] * np.ones((1, BLOCK), dtype=np.int32)
    return Blocks(tokens, bytes_per_token=1.0, tokenizer=None)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    line = "The café's  cat — 🙂 — sat\ton the mat, and read <pages> of Ünïcode.\r\n"
    path.write_bytes("".join(f"{n}: {line}" for n in range(400)).encode())
    return path


def parse_book(argv: list[str], book: Path, *flags: str):
    text = ("--dataset_name", "", "--train_file", str(book), "--block_size", str(BLOCK))
    return parse([*argv, *text, *flags])


def test_blocks_hold_the_text_in_order(argv: list[str], book: Path) -> None:
    packed = blocks(parse_book(argv, book))
    assert packed.tokens.dtype == np.int32
    assert packed.tokens.shape[1] == BLOCK
    text = packed.tokenizer.decode(packed.tokens.reshape(-1))
    original = book.read_bytes().decode()
    assert original.startswith(text)
    # Only what does not fill a block is dropped, and no token is longer than the line.
    assert len(original) - len(text) < BLOCK * 80
    tokens = sum(len(packed.tokenizer(line)["input_ids"]) for line in original.splitlines(True))
    assert packed.bytes_per_token == pytest.approx(len(original.encode()) / tokens)
    assert len(packed.tokens) == tokens // BLOCK


def test_the_built_in_tokenizer_survives_any_text(argv: list[str]) -> None:
    arguments = parse(argv)
    tokenizer = load_tokenizer(arguments, load_texts(arguments))
    assert len(tokenizer) == arguments.config["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    text = "漢字, emoji 🙂, \x00 control,  two spaces\n\n and bytes never seen ÿþ"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_host_trains_the_same_tokenizer(argv: list[str]) -> None:
    arguments = parse(argv)
    texts = load_texts(arguments)
    first, second = (load_tokenizer(arguments, texts) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_tokenizer_can_come_from_a_directory(
    argv: list[str], book: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    built_in = blocks(parse_book(argv, book))
    built_in.tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ("--tokenizer_name", str(tmp_path / "tokenizer"))
    loaded = blocks(parse_book(argv, book, *flags))
    assert np.array_equal(loaded.tokens, built_in.tokens)
    write_config(vocab_size=260)
    with pytest.raises(BadInput, match="more than the model's vocab_size of 260"):
        blocks(parse_book(argv, book, *flags))


def test_a_dataset_can_come_from_a_directory(argv: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "dataset"
    directory.mkdir()
    rows = [{"id": 1, "text": "first"}, {"id": 2, "text": ""}, {"id": 3, "text": "third\n"}]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = parse(
        [*argv, "--dataset_name", str(directory), "--cache_dir", str(tmp_path / "cache")]
    )
    assert list(load_texts(arguments)) == ["first", "", "third\n"]


@pytest.mark.parametrize("flag", ["--dataset_name", "--tokenizer_name"])
def test_what_cannot_be_loaded_is_refused_by_name(argv: list[str], flag: str) -> None:
    arguments = parse([*argv, flag, "./no/such/directory"])
    with pytest.raises(BadInput, match=r"'\./no/such/directory'.* cannot be loaded"):
        blocks(arguments)


def test_a_text_shorter_than_a_block_of_tokens_is_refused(argv: list[str], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the same words again and again " * 10)
    with pytest.raises(BadInput, match=f"tokens, fewer than one block of {BLOCK} tokens"):
        blocks(parse_book(argv, path))


def test_drop_last_needs_a_whole_batch(argv: list[str], book: Path) -> None:
    flags = ("--per_device_train_batch_size", "100000")
    assert len(blocks(parse_book(argv, book, *flags)).tokens)
    with pytest.raises(BadInput, match="fewer than one batch of 100000"):
        blocks(parse_book(argv, book, *flags, "--dataloader_drop_last"))


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 2), (False, 3)])
def test_an_epoch_takes_each_block_once(numbered: Blocks, drop_last: bool, steps: int) -> None:
    assert steps_per_epoch(numbered, 4, drop_last) == steps
    stream = batches(numbered, 4, seed=1, drop_last=drop_last)
    epochs = []
    for _ in range(3):
        taken = list(itertools.islice(stream, steps))
        assert all(batch.shape == (4, BLOCK) and batch.dtype == np.int32 for batch in taken)
        epochs.append(np.concatenate(taken)[:, 0].tolist())
    for order in epochs:
        assert len(set(order)) == (8 if drop_last else 10)
        assert order[10:] == order[: len(order[10:])]
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone(numbered: Blocks) -> None:
    def order(seed: int) -> list[int]:
        stream = batches(numbered, 5, seed=seed, drop_last=True)
        return np.concatenate(list(itertools.islice(stream, 4)))[:, 0].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_batch_larger_than_the_text_repeats_it(numbered: Blocks) -> None:
    batch = next(batches(numbered, 24, seed=1, drop_last=False))
    assert steps_per_epoch(numbered, 24, drop_last=False) == 1
    assert sorted(np.bincount(batch[:, 0]).tolist()) == [2] * 6 + [3] * 4

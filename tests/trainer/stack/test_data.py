import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch_xla
from transformers import PreTrainedTokenizerFast

from trainer import sharding
from trainer.data import (
    Batch,
    Blocks,
    batches,
    blocks,
    load_tokenizer,
    steps_per_epoch,
    stream,
    stream_batches,
    validation_batches,
)
from trainer.flags import BadInput
from trainer.text_sources import load_texts, stream_texts
from trainer.validation import parse

BLOCK = 64


@pytest.fixture(scope="module")
def numbered() -> Blocks:
    """Ten blocks; the tokens of a block are its number."""
    tokens = np.arange(10, dtype=np.int32)[:, None] * np.ones((1, BLOCK), dtype=np.int32)
    ends = np.cumsum([1, 0, 62, 2, 200, 64, 64, 247], dtype=np.int64)
    return Blocks(tokens, bytes_per_token=1.0, tokenizer=None, ends=ends)


def take(blocks: Blocks, count: int, batch: int, **options) -> np.ndarray:
    """Return the tokens of the first batches, [count, batch, BLOCK]."""
    options = {"rows": range(batch), "seed": 1, "drop_last": False} | options
    found = itertools.islice(batches(blocks, global_batch=batch, **options), count)
    return np.stack([one.tokens for one in found])


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    line = "The café's  cat — 🙂 — sat\ton the mat, and read <pages> of Ünïcode.\r\n"
    path.write_bytes("".join(f"{n}: {line}" for n in range(400)).encode())
    return path


def parse_book(argv: list[str], book: Path, *flags: str):
    name = ("--dataset_name", "", "--train_file", str(book))
    if book.is_dir():
        name = ("--dataset_name", str(book))
    return parse([*argv, *name, "--block_size", str(BLOCK), *flags])


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
    texts = [None, "first", "", None, "third\n"]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = parse(
        [*argv, "--dataset_name", str(directory), "--cache_dir", str(tmp_path / "cache")]
    )
    assert list(load_texts(arguments)) == ["first", "", "third\n"]
    streaming = replace(arguments.data, streaming=True)
    rows, column = stream_texts(replace(arguments, data=streaming))
    assert [row[column] for row in rows] == ["first", "", "third\n"]


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
    taken = take(numbered, 3 * steps, 4, drop_last=drop_last)
    assert taken.dtype == np.int32
    epochs = taken[:, :, 0].reshape(3, -1).tolist()
    for order in epochs:
        assert len(set(order)) == (8 if drop_last else 10)
        assert order[10:] == order[: len(order[10:])]
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone(numbered: Blocks) -> None:
    assert np.array_equal(take(numbered, 4, 5), take(numbered, 4, 5))
    assert not np.array_equal(take(numbered, 4, 5), take(numbered, 4, 5, seed=2))


@pytest.mark.parametrize("first_step", [1, 3, 5])
@pytest.mark.parametrize("drop_last", [True, False])
def test_it_can_begin_at_any_step(numbered: Blocks, first_step: int, drop_last: bool) -> None:
    whole = take(numbered, 9, 4, drop_last=drop_last)
    resumed = take(numbered, 9 - first_step, 4, drop_last=drop_last, first_step=first_step)
    assert np.array_equal(whole[first_step:], resumed)


def test_a_batch_larger_than_the_text_repeats_it(numbered: Blocks) -> None:
    batch = take(numbered, 1, 24)[0]
    assert steps_per_epoch(numbered, 24, drop_last=False) == 1
    assert sorted(np.bincount(batch[:, 0]).tolist()) == [2] * 6 + [3] * 4


def test_segments_number_the_documents_of_a_row(numbered: Blocks) -> None:
    lengths = np.diff(numbered.ends, prepend=0)
    documents = np.repeat(np.arange(len(lengths)), lengths).reshape(10, BLOCK)
    found = next(batches(numbered, range(10), 10, seed=1, drop_last=True, isolate=True))
    assert found.segments.dtype == np.int32
    for tokens, segments in zip(found.tokens, found.segments, strict=True):
        expected = documents[tokens[0]]
        assert segments.tolist() == (expected - expected[0]).tolist()


class Watched(np.ndarray):
    """Tokens that know which of their blocks were asked for."""

    def __getitem__(self, index):
        self.asked.update(np.ravel(index).tolist())
        return np.asarray(self)[index]


def test_a_host_reads_its_own_rows_and_no_others(numbered: Blocks) -> None:
    whole, shares = take(numbered, 5, 4), ([0, 3], [2], [1])
    for rows in shares:
        tokens = numbered.tokens.view(Watched)
        tokens.asked = set()
        share = take(Blocks(tokens, 1.0, None), 5, 4, rows=rows)
        assert np.array_equal(share, whole[:, rows])
        # The generator is one batch ahead of nobody: what it read is what it gave.
        assert tokens.asked == set(share[:, :, 0].ravel().tolist())


HOSTS = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]]


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize(
    "axes", [{}, {"tensor": 2}, {"tensor": 4}, {"slices": 2}, {"slices": 2, "tensor": 2}]
)
def test_the_hosts_shares_make_the_global_batch(devices, monkeypatch, axes, hosts) -> None:
    """Each host is told, as torch_xla would tell it, of its own devices, and gives their rows."""
    sharding.make_mesh(devices, **axes)
    whole = np.arange(8 * 3, dtype=np.int64).reshape(8, 3)
    places_of = torch_xla._XLAC._get_local_shard_replica_and_indices
    found = {}
    for host in hosts:

        def of_host(tensors, host=host):
            return [[places[device] for device in host] for places in places_of(tensors)]

        monkeypatch.setattr(torch_xla._XLAC, "_get_local_shard_replica_and_indices", of_host)
        rows = sharding.local_rows(8)
        assert len(rows) <= 8 // devices * len(host) * axes.get("tensor", 1)
        on_mesh = sharding.from_rows(whole[rows], rows, 8)
        shards = torch_xla._XLAC._get_local_shards([on_mesh])[0]
        places = places_of([on_mesh])[0]
        found |= {device: (shards[device][0], places[device][1]) for device in host}
    assembled = np.full_like(whole, -1)
    for shard, place in found.values():
        assembled[... if place is Ellipsis else tuple(place)] = shard.numpy()
    assert sorted(found) == list(range(devices))
    assert np.array_equal(assembled, whole)
    for shard, place in found.values():  # also where several devices have the same rows
        assert np.array_equal(shard.numpy(), whole[... if place is Ellipsis else tuple(place)])


def test_a_text_is_tokenized_once(argv: list[str], book: Path, tmp_path: Path, monkeypatch) -> None:
    cache = ("--cache_dir", str(tmp_path / "cache"))
    first = blocks(parse_book(argv, book, *cache))
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", None)
        again = blocks(parse_book(argv, book, *cache, "--block_size", "32"))
        assert again.crc32 == first.crc32
        assert again.bytes_per_token == first.bytes_per_token
        common = min(first.tokens.size, again.tokens.size)
        assert np.array_equal(first.tokens.ravel()[:common], again.tokens.ravel()[:common])
        assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    book.write_bytes(book.read_bytes().replace(b"7: The", b"7: A"))
    assert blocks(parse_book(argv, book, *cache)).crc32 != first.crc32
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_named(argv: list[str], book: Path) -> None:
    with pytest.raises(
        BadInput, match=r"cannot be written to .*: Not a directory. Make room there"
    ):
        blocks(parse_book(argv, book, "--cache_dir", str(book)))


def test_the_text_to_evaluate_on_is_not_trained_on(argv, book: Path, tmp_path: Path) -> None:
    lines = book.read_bytes().decode().splitlines(keepends=True)
    packed = blocks(parse_book(argv, book, "--do_eval", "--validation_split_percentage", "30"))
    held_out, trained_on = (
        packed.tokenizer.decode(one.tokens.ravel()) for one in (packed.validation, packed)
    )
    assert "".join(lines[:120]).startswith(held_out)
    assert "".join(lines[120:]).startswith(trained_on)
    other = write_parquet(tmp_path / "other.parquet", text=lines[::-1])
    packed = blocks(parse_book(argv, book, "--do_eval", "--validation_file", str(other)))
    assert "".join(lines[::-1]).startswith(
        packed.tokenizer.decode(packed.validation.tokens.ravel())
    )
    shares = [list(validation_batches(packed.validation, rows, 7)) for rows in ([0, 4], range(7))]
    assert len(shares[1]) == -(-len(packed.validation.tokens) // 7)
    whole = np.concatenate([batch.tokens for batch in shares[1]])
    assert np.array_equal(whole[: len(packed.validation.tokens)], packed.validation.tokens)
    for share, batch in zip(*shares, strict=True):
        assert np.array_equal(share.tokens, batch.tokens[[0, 4]])
        assert share.counted == batch.counted
    assert sum(batch.counted for batch in shares[1]) == len(packed.validation.tokens)
    assert {batch.counted for batch in shares[1][:-1]} == {7}


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_texts_can_come_from_parquet(argv: list[str], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2, 3], text=["one\n", None, "é 漢"])
    assert load_texts(parse_book(argv, path)) == ["one\n", "é 漢"]
    path = write_parquet(tmp_path / "b.parquet", line=["one", "two"], other=["no", "no"])
    assert load_texts(parse_book(argv, path)) == ["one", "two"]


def test_parquet_without_texts_is_refused(argv: list[str], tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(BadInput) as caught:
            load_texts(parse_book(argv, path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    numbers = write_parquet(tmp_path / "a.parquet", id=[1, 2], title=["one", "two"])
    assert "has no text: there is no column 'text' with strings, and 'id' is int64" in refused(
        numbers
    )
    assert "is empty" in refused(write_parquet(tmp_path / "b.parquet", text=["", " "]))
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:20] + b"spoiled" * 50 + whole[-4:])
    assert "cannot be read as Parquet: " in refused(numbers)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.jsonl", "", "has nothing in its split 'train'"),
        ("train.csv", "text\n", "has nothing in its split 'train'|corresponds to no data"),
        ("train.csv", "id,title\n1,a\n", "has no text: .* its first column 'id' holds 1"),
        ("train.parquet", "no parquet", "cannot be loaded; check it, .*: Parquet magic bytes not"),
    ],
)
@pytest.mark.parametrize(
    "flags", [(), ("--streaming", "--tokenizer_name", "t", "--max_steps", "1")]
)
def test_a_dataset_without_texts_is_refused(argv, tmp_path, name, content, said, flags) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / name).write_text(content)
    where = ("--dataset_name", str(tmp_path / "dataset"), "--cache_dir", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match=said):
        load_texts(parse([*argv, *where, *flags]))


@pytest.fixture
def streamed(argv: list[str], book: Path, tmp_path: Path) -> Callable[..., list[Batch]]:
    """Return the first batches of the book as a stream, from a file or as a dataset."""
    blocks(parse_book(argv, book)).tokenizer.save_pretrained(tmp_path / "tokenizer")
    name = ("--tokenizer_name", str(tmp_path / "tokenizer"))
    options = (*name, "--cache_dir", str(tmp_path / "cache"), "--streaming", "--max_steps", "1")

    def take(count: int, *flags: str, text=book, rows=range(4), **where) -> list[Batch]:
        opened = stream(parse_book(argv, text, *options, *flags))
        return list(itertools.islice(stream_batches(opened, rows, 4, **where), count))

    return take


def test_a_stream_cannot_be_split_for_an_evaluation(streamed, book: Path) -> None:
    with pytest.raises(BadInput, match="Give --validation_file"):
        streamed(1, "--do_eval")
    assert streamed(1, "--do_eval", "--validation_file", str(book))


def text_of(batches: list[Batch], tokenizer) -> str:
    return tokenizer.decode(np.concatenate([batch.tokens.ravel() for batch in batches]))


@pytest.mark.parametrize("source", ["txt", "parquet", "dataset"])
def test_a_stream_gives_every_text_in_an_order_of_its_seed(
    streamed, argv, book, tmp_path, source
) -> None:
    lines = book.read_bytes().decode().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    path = write_parquet(tmp_path / "data" / "train.parquet", text=lines)
    text = {"txt": book, "parquet": path, "dataset": path.parent}[source]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    count = sum(len(tokenizer(line)["input_ids"]) for line in lines) // (4 * BLOCK)
    epoch = streamed(count, text=text)
    found = text_of(epoch, tokenizer).splitlines(keepends=True)
    assert set(found[:-1]) <= set(lines)
    assert len(set(found[:-1])) == len(found) - 1 > 0.9 * len(lines)
    assert found[:-1] != lines[: len(found) - 1]
    other = streamed(count, "--seed", "2", text=text)
    assert not np.array_equal(epoch[0].tokens, other[0].tokens)
    # The next epoch is in another order.
    both = text_of(streamed(2 * count, text=text), tokenizer).splitlines(keepends=True)
    assert sorted(both[: len(lines)]) == sorted(lines)
    assert both[len(lines) : len(lines) + 50] != both[:50]


def test_a_stream_goes_on_where_it_was(streamed) -> None:
    whole = streamed(200, isolate=True)
    for first_step, rows in [(3, [1, 2]), (150, [0, 1, 2, 3])]:
        resumed = streamed(200 - first_step, rows=rows, first_step=first_step, isolate=True)
        for expected, found in zip(whole[first_step:], resumed, strict=True):
            assert np.array_equal(expected.tokens[rows], found.tokens)
            assert np.array_equal(expected.segments[rows], found.segments)


def test_a_stream_s_segments_are_its_texts(streamed, tmp_path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for batch in streamed(60, isolate=True):
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            for number in range(segments[0], segments[-1]):
                text = tokenizer.decode(tokens[segments == number])
                assert text.count("\n") == 1
                assert text.endswith("\n")

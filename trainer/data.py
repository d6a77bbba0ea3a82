"""Texts → tokens → blocks of ``block_size`` → batches.

A text is tokenized once. Its tokens are cached as one array, which is mapped into memory, so that a
host reads only its own rows of every batch. With ``--streaming`` nothing is cached: texts are read,
shuffled in a buffer and tokenized during the run.

numpy and transformers are imported inside the functions that need them, because the controller,
which validates input with this module, does not have transformers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import hub
from .arguments import Arguments
from .flags import BadInput
from .text_sources import (
    split_texts,
    stream_texts,
    validation_texts,
)

if TYPE_CHECKING:
    import numpy as np
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2, as in Mixtral's own tokenizer
BYTE_ALPHABET = 256  # tokens of a byte-level BPE before any merge
_TEXTS_AT_ONCE = 1000
_SHUFFLE_BUFFER = 10_000  # texts, of a stream


class Batch(NamedTuple):
    """This host's rows of a global batch."""

    tokens: np.ndarray  # int32 [rows, block_size]
    segments: np.ndarray | None  # int32 like tokens: the documents of a row, numbered from 0
    rows: Sequence[int]  # the numbers of these rows in the global batch
    size: int  # rows of the global batch
    counted: int | None = None  # in an evaluation: the first rows, which count; the others pad


@dataclass(frozen=True)
class Blocks:
    """A tokenized text, packed into blocks."""

    tokens: np.ndarray  # int32 [blocks, block_size]
    bytes_per_token: float  # UTF-8 length of the text / number of its tokens
    tokenizer: PreTrainedTokenizerFast
    ends: np.ndarray | None = None  # int64, ascending: where documents end in the joined tokens
    crc32: int = 0  # of all tokens
    validation: Blocks | None = None  # the text to evaluate on; None without evaluation


@dataclass(frozen=True)
class Stream:
    """The training text of ``--streaming``; ``bytes_per_token`` and ``crc32`` are of a sample."""

    texts: IterableDataset
    column: str
    block_size: int
    bytes_per_token: float
    tokenizer: PreTrainedTokenizerFast
    crc32: int
    validation: Blocks | None


def load_tokenizer(arguments: Arguments, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of ``--tokenizer_name``, or a byte-level BPE trained on ``texts``.

    The BPE has vocab_size tokens. Raises BadInput for a tokenizer that cannot be loaded or has more
    tokens than the model.
    """
    name, vocab_size = arguments.model.tokenizer_name, arguments.config["vocab_size"]
    if not name:
        return _train_tokenizer(texts, vocab_size)

    from transformers import AutoTokenizer

    otherwise = "without --tokenizer_name, one is trained on the text"
    with hub.loading("tokenizer", name, "check it", otherwise):
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=arguments.model.cache_dir)
    if not tokenizer.is_fast:
        raise BadInput(f"tokenizer {name!r} is a slow one; take one that has a tokenizer.json")
    if len(tokenizer) > vocab_size:
        raise BadInput(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, more than the model's vocab_size of "
            f"{vocab_size}. Raise it in {arguments.model.config_name}, or take another tokenizer"
        )
    return tokenizer


def blocks(arguments: Arguments) -> Blocks:
    """Load, tokenize and pack the training and the validation text; print the progress.

    As in run_clm, all texts are joined and cut into blocks; tokens that do not fill the last block
    are dropped. Tokens come from the cache where it has them. Raises BadInput, also for a text that
    is shorter than one block or, with ``--dataloader_drop_last``, than one batch.
    """
    _limit_threads(arguments)
    source = arguments.data.train_file or arguments.data.dataset_name
    batch = arguments.training.global_batch
    texts, validation = split_texts(arguments)
    tokenizer = load_tokenizer(arguments, texts) if arguments.model.tokenizer_name else None
    packed = _pack(arguments, source, texts, tokenizer)
    count = len(packed.tokens)
    if count < batch and arguments.training.dataloader_drop_last:
        raise BadInput(
            f"{source} has {count} blocks of {arguments.data.block_size} tokens, fewer than one "
            f"batch of {batch}, and --dataloader_drop_last drops an incomplete batch; lower the "
            "batch or block_size"
        )
    return replace(packed, validation=_pack_validation(arguments, validation, packed.tokenizer))


def stream(arguments: Arguments) -> Stream:
    """Return the stream of ``--streaming``; raises BadInput if its first texts are unusable."""
    import numpy as np

    _limit_threads(arguments)
    texts, column = stream_texts(arguments)
    tokenizer = load_tokenizer(arguments, [])
    sample = [row[column] for row in texts.take(_TEXTS_AT_ONCE)]
    tokens = np.concatenate(_tokenize(tokenizer, sample))
    size = sum(len(text.encode()) for text in sample)
    source = arguments.data.train_file or arguments.data.dataset_name
    check_fills_block(source, len(tokens), "tokens", 1)
    texts = texts.shuffle(seed=arguments.training.seed, buffer_size=_SHUFFLE_BUFFER)
    block_size, crc32 = arguments.data.block_size, zlib.crc32(tokens)
    validation = _pack_validation(arguments, validation_texts(arguments), tokenizer)
    return Stream(texts, column, block_size, size / len(tokens), tokenizer, crc32, validation)


def _pack(
    arguments: Arguments,
    source: Path | str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast | None,
) -> Blocks:
    """Return the blocks of ``texts``; without a ``tokenizer``, one is trained or from the cache."""
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    directory = _cached(arguments, texts, tokenizer)
    if directory.is_dir():
        _print(f"tokens are in {directory}")
        tokenizer = tokenizer or PreTrainedTokenizerFast.from_pretrained(directory)
    else:
        tokenizer = tokenizer or load_tokenizer(arguments, texts)
        _write_tokens(directory, tokenizer, texts)
    info = json.loads((directory / "info.json").read_text())
    block_size = arguments.data.block_size
    check_fills_block(source, info["tokens"], "tokens", block_size)
    shape = (info["tokens"] // block_size, block_size)
    _print(
        f"{source}: {len(texts)} texts, {info['tokens']} tokens, {shape[0]} blocks of {block_size}"
    )
    tokens = np.memmap(directory / "tokens", np.int32, "r", shape=shape)
    ends = np.load(directory / "ends.npy", mmap_mode="r")
    return Blocks(tokens, info["bytes"] / info["tokens"], tokenizer, ends, info["crc32"])


def _pack_validation(
    arguments: Arguments, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> Blocks | None:
    if not arguments.training.evaluates:
        return None
    source = arguments.data.validation_file or "the text to evaluate on"
    return _pack(arguments, source, texts, tokenizer)


def steps_per_epoch(blocks: Blocks, global_batch: int, drop_last: bool) -> int:
    """Return the number of batches that one pass over the blocks makes."""
    full, rest = divmod(len(blocks.tokens), global_batch)
    return full + bool(rest and not drop_last)


def batches(
    blocks: Blocks,
    rows: Sequence[int],
    global_batch: int,
    seed: int,
    drop_last: bool,
    first_step: int = 0,
    isolate: bool = False,
) -> Iterator[Batch]:
    """Yield ``rows`` of every global batch, endlessly; the order depends on (seed, epoch) alone.

    Only these rows are read. Every batch is full: without ``drop_last`` the last batch of an epoch
    is completed from the epoch's beginning. The first batch is that of ``first_step``, counted from
    0 over all epochs. With ``isolate``, batches have segments.
    """
    import numpy as np

    steps = steps_per_epoch(blocks, global_batch, drop_last)
    first_epoch, skipped = divmod(first_step, steps)
    for epoch in itertools.count(first_epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(blocks.tokens))
        for chosen in np.resize(order, (steps, global_batch))[skipped:]:
            yield _batch(blocks, chosen, rows, isolate)
        skipped = 0


def validation_batches(
    blocks: Blocks, rows: Sequence[int], global_batch: int, isolate: bool = False
) -> Iterator[Batch]:
    """Yield ``rows`` of global batches that cover every block once, in order.

    The last batch is padded with rows from the beginning, which do not count.
    """
    import numpy as np

    count = len(blocks.tokens)
    steps = steps_per_epoch(blocks, global_batch, drop_last=False)
    for step, chosen in enumerate(np.resize(np.arange(count), (steps, global_batch))):
        counted = min(global_batch, count - step * global_batch)
        yield _batch(blocks, chosen, rows, isolate)._replace(counted=counted)


def _batch(blocks: Blocks, chosen: np.ndarray, rows: Sequence[int], isolate: bool) -> Batch:
    """Return ``rows`` of the global batch of the ``chosen`` blocks; only these rows are read."""
    import numpy as np

    size, chosen = len(chosen), chosen[rows]
    segments = None
    if isolate:
        length = blocks.tokens.shape[1]
        positions = chosen[:, None].astype(np.int64) * length + np.arange(length)
        documents = np.searchsorted(blocks.ends, positions, side="right")
        segments = (documents - documents[:, :1]).astype(np.int32)
    return Batch(blocks.tokens[chosen], segments, rows, size)


def stream_batches(
    stream: Stream,
    rows: Sequence[int],
    global_batch: int,
    first_step: int = 0,
    isolate: bool = False,
) -> Iterator[Batch]:
    """Yield ``rows`` of every global batch of a stream, endlessly, as :func:`batches` does.

    To reach ``first_step`` the stream is read from its beginning.
    """
    import numpy as np

    printed = time.monotonic()
    packed = _stream_blocks(stream)
    for step in itertools.count():
        blocks = [next(packed) for _ in range(global_batch)]
        if step < first_step:
            if time.monotonic() - printed > 5:
                printed = time.monotonic()
                _print(
                    f"skipped {step} of {first_step} batches, which earlier steps have trained on"
                )
            continue
        tokens, documents = (np.stack([pair[part] for pair in blocks])[rows] for part in (0, 1))
        segments = documents - documents[:, :1] if isolate else None
        yield Batch(tokens, segments, rows, global_batch)


def _stream_blocks(stream: Stream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the tokens of every block, int32 [block_size], and the numbers of their documents."""
    import numpy as np

    tokens = documents = np.empty(0, np.int32)
    for epoch in itertools.count():
        stream.texts.set_epoch(epoch)
        texts = (row[stream.column] for row in stream.texts)
        while chunk := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
            ids = _tokenize(stream.tokenizer, chunk)
            first = documents[-1] + 1 if len(documents) else 0
            numbers = np.arange(first, first + len(ids), dtype=np.int32)
            tokens = np.concatenate([tokens, *ids])
            documents = np.concatenate([documents, np.repeat(numbers, [len(each) for each in ids])])
            whole = len(tokens) // stream.block_size * stream.block_size
            pairs = (part[:whole].reshape(-1, stream.block_size) for part in (tokens, documents))
            yield from zip(*pairs, strict=True)
            tokens, documents = tokens[whole:], documents[whole:] - first


def _cached(
    arguments: Arguments, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast | None
) -> Path:
    """Return the cache directory, existing or not, for the tokens of these texts."""
    import tokenizers
    from huggingface_hub import constants

    built_in = f"{tokenizers.__version__} {arguments.config['vocab_size']}"
    digest = hashlib.sha256()
    digest.update(tokenizer.backend_tokenizer.to_str().encode() if tokenizer else built_in.encode())
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    cache = arguments.model.cache_dir or Path(constants.HF_HOME)
    return cache / "tokens" / digest.hexdigest()


def _write_tokens(
    directory: Path, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> None:
    """Tokenize ``texts`` into ``directory``, which appears only when it is complete."""
    import numpy as np

    printed = started = time.monotonic()
    lengths, size, crc32 = [], 0, 0
    hidden = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=directory.parent))
        with (hidden / "tokens").open("wb") as file:
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                chunk = texts[start : start + _TEXTS_AT_ONCE]
                ids = _tokenize(tokenizer, chunk)
                lengths += [len(each) for each in ids]
                size += sum(len(text.encode()) for text in chunk)
                joined = np.concatenate(ids)
                crc32 = zlib.crc32(joined, crc32)
                joined.tofile(file)
                done = start + len(chunk)
                if (now := time.monotonic()) - printed > 5:
                    printed = now
                    left = (now - started) / done * (len(texts) - done)
                    _print(f"{100 * done // len(texts)} % of {len(texts)} texts, {left:.0f} s left")
        np.save(hidden / "ends.npy", np.cumsum(lengths, dtype=np.int64))
        tokenizer.save_pretrained(hidden)
        info = {"tokens": sum(lengths), "bytes": size, "crc32": crc32}
        (hidden / "info.json").write_text(json.dumps(info))
        hidden.chmod(0o755)  # mkdtemp gives access to its owner alone
        hidden.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # else another process has written it meanwhile
            raise BadInput(
                f"the tokens cannot be written to {directory}: {error.strerror or error}. Make "
                "room there, or give another --cache_dir"
            ) from error
    finally:
        if hidden:
            shutil.rmtree(hidden, ignore_errors=True)


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the tokens of each text, int32, as calling the tokenizer would, but in threads."""
    import numpy as np

    # A call would also make masks and offsets, which are not needed, in a single thread.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    found = backend.encode_batch_fast(list(texts))
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]


def _limit_threads(arguments: Arguments) -> None:
    if count := arguments.data.preprocessing_num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(count)  # read when the first text is tokenized


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _print(f"training a byte-level tokenizer of {vocab_size} tokens on {len(texts)} texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    unknown, beginning, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=beginning, eos_token=end
    )


def check_fills_block(source: Path | str, length: int, unit: str, block_size: int) -> None:
    """Raise BadInput if ``length`` units of text, such as tokens, do not fill one block."""
    if length < block_size:
        raise BadInput(
            f"{source} has {length} {unit}, fewer than one block of {block_size} tokens; give more "
            "text, or a smaller --block_size"
        )


def _print(message: str) -> None:
    print(f"data: {message}", flush=True)

"""Text → tokens → blocks of ``block_size`` → batches.

Reading and checking local text needs only the standard library. What needs numpy, datasets or
transformers imports them where it does, because they exist only in the trainer's image.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import read_utf8
from trainer.flags import BadInput

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from trainer.arguments import Arguments

PYTHON_HELP = "python-help"
TEXT_FILES = 'a .txt, or a .json or .jsonl with one object {"text": ...} a line, in UTF-8'
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2, as in Mixtral's own tokenizer
_BYTES = 256  # the alphabet of a byte-level BPE
_TEXTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Blocks:
    """The training text as ``tokens``, int32 [blocks, block_size], and the tokenizer it came from.

    ``bytes_per_token`` is the UTF-8 length of the text over its number of tokens.
    """

    tokens: np.ndarray
    bytes_per_token: float
    tokenizer: PreTrainedTokenizerFast


def check(arguments: Arguments) -> None:
    """Raise BadInput if the local text cannot fill one block, or its vocabulary cannot be built."""
    vocab_size = arguments.config["vocab_size"]
    if not arguments.model.tokenizer_name and vocab_size < _BYTES + len(SPECIAL_TOKENS):
        raise BadInput(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least "
            f"{_BYTES + len(SPECIAL_TOKENS)}. Raise it in {arguments.model.config_name}, or give "
            "--tokenizer_name"
        )
    path = arguments.data.train_file
    if path:
        # No token is shorter than a byte.
        _check_fills_block(path, _size(read_texts(path)), "bytes", arguments.data.block_size)


def load_texts(arguments: Arguments) -> Sequence[str]:
    """Return the training texts: a dataset's train split, a file's lines, or Python's help topics.

    As in run_clm, a dataset's texts are its column ``text``, or its first column. Raises BadInput.
    """
    name, config_name = arguments.data.dataset_name, arguments.data.dataset_config_name
    if arguments.data.train_file:
        return read_texts(arguments.data.train_file)
    if name == PYTHON_HELP:
        from pydoc_data.topics import topics

        return [topics[topic] for topic in sorted(topics)]

    from datasets import load_dataset

    try:
        dataset = load_dataset(
            name, config_name or None, split="train", cache_dir=arguments.model.cache_dir
        )
    except (OSError, ValueError) as error:
        raise BadInput(
            f"dataset {name!r} with configuration {config_name or None!r} cannot be loaded; check "
            f"the names and the network, or take {PYTHON_HELP}, which needs none: {error}"
        ) from error
    column = "text" if "text" in dataset.column_names else dataset.column_names[0]
    return dataset[column]


def read_texts(path: Path) -> list[str]:
    """Return the lines of a .txt, with their ends, or the ``text`` of each line of a .json(l).

    Raises BadInput if the file is missing, empty, or something else.
    """
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise BadInput(f"train_file {path} ends in {path.suffix!r}; allowed is {TEXT_FILES}")
    # Not splitlines: it also splits at characters that a .txt or a JSON string may well contain.
    lines = read_utf8(path).split("\n")
    texts = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
    if path.suffix != ".txt":
        numbered = ((number, line) for number, line in enumerate(texts, 1) if line.strip())
        texts = [_text_of(path, number, line) for number, line in numbered]
    texts = [text for text in texts if text]
    if not any(text.strip() for text in texts):
        raise BadInput(f"train_file {path} is empty; it must hold {TEXT_FILES}")
    return texts


def load_tokenizer(arguments: Arguments, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the flags name, or a byte-level BPE of vocab_size trained on texts.

    Raises BadInput if it cannot be loaded or has more tokens than the model.
    """
    name, vocab_size = arguments.model.tokenizer_name, arguments.config["vocab_size"]
    if not name:
        return _train_tokenizer(texts, vocab_size)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=arguments.model.cache_dir)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tokenizer {name!r} cannot be loaded; check its name, the network, and whether it "
            f"asks for a login (without --tokenizer_name, one is trained on the text): {error}"
        ) from error
    if len(tokenizer) > vocab_size:
        raise BadInput(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, more than the model's vocab_size of "
            f"{vocab_size}. Raise it in {arguments.model.config_name}, or take another tokenizer"
        )
    return tokenizer


def blocks(arguments: Arguments) -> Blocks:
    """Load, tokenize and pack the training text, saying how far it is.

    As in run_clm, all texts are joined and cut into blocks; what does not fill the last is dropped.
    Raises BadInput, also if the text is shorter than one block or, under drop_last, than one batch.
    """
    import numpy as np

    source = arguments.data.train_file or arguments.data.dataset_name
    block_size = arguments.data.block_size
    batch = arguments.training.per_device_train_batch_size
    texts = load_texts(arguments)
    tokenizer = load_tokenizer(arguments, texts)
    tokens = np.concatenate(list(_tokenize(tokenizer, texts)))
    _check_fills_block(source, len(tokens), "tokens", block_size)
    count = len(tokens) // block_size
    if count < batch and arguments.training.dataloader_drop_last:
        raise BadInput(
            f"{source} has {count} blocks of {block_size} tokens, fewer than one batch of {batch}, "
            "and --dataloader_drop_last drops an incomplete batch; lower the batch or block_size"
        )
    _say(f"{len(texts)} texts, {len(tokens)} tokens, {count} blocks of {block_size}")
    packed = tokens[: count * block_size].reshape(count, block_size)
    return Blocks(packed, _size(texts) / len(tokens), tokenizer)


def steps_per_epoch(blocks: Blocks, global_batch: int, drop_last: bool) -> int:
    """Return the number of batches that one pass over the blocks makes."""
    full, rest = divmod(len(blocks.tokens), global_batch)
    return full + bool(rest and not drop_last)


def batches(blocks: Blocks, global_batch: int, seed: int, drop_last: bool) -> Iterator[np.ndarray]:
    """Yield int32 [global_batch, block_size] without end, in an order that (seed, epoch) decides.

    Every batch is full: without ``drop_last``, an epoch's last is completed from its beginning.
    """
    import numpy as np

    steps = steps_per_epoch(blocks, global_batch, drop_last)
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(blocks.tokens))
        for rows in np.resize(order, (steps, global_batch)):
            yield blocks.tokens[rows]


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    _say(f"training a byte-level tokenizer of {vocab_size} tokens on {len(texts)} texts")
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


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of each text, int32, and say every few seconds how far it is."""
    import numpy as np

    said = time.monotonic()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        if time.monotonic() - said > 2:
            said = time.monotonic()
            _say(f"{start} of {len(texts)} texts tokenized")
        for ids in tokenizer(texts[start : start + _TEXTS_AT_ONCE])["input_ids"]:
            yield np.asarray(ids, dtype=np.int32)


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"train_file {path}: line {number} is {line.strip()[:60]!r}; it must be a JSON object "
            'whose "text" is a text'
        ) from error
    return text


def _check_fills_block(source: Path | str, length: int, unit: str, block_size: int) -> None:
    if length < block_size:
        raise BadInput(
            f"{source} has {length} {unit}, fewer than one block of {block_size} tokens; give more "
            "text, or a smaller --block_size"
        )


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _say(message: str) -> None:
    print(f"data: {message}", flush=True)

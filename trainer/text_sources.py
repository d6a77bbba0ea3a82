"""Read the training and validation texts: from a dataset, a file, or Python's own help topics.

Reading and checking local text needs only the standard library. datasets and pyarrow are imported
inside the functions that need them, because the controller, which validates input with this module,
does not have them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import hub
from .arguments import PYTHON_HELP, TEXT_FILES, Arguments
from .flags import BadInput

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_PARQUET = b"PAR1"  # a Parquet file begins and ends with it
_ROWS_AT_ONCE = 1000


def split_texts(arguments: Arguments) -> tuple[Sequence[str], Sequence[str]]:
    """Return the training texts and the validation texts; the latter are empty without evaluation.

    As in run_clm, where neither a validation file nor a validation split exists, the first
    ``validation_split_percentage`` of the training texts are evaluated, and not trained on. Raises
    BadInput.
    """
    texts, validation = load_texts(arguments), validation_texts(arguments)
    if validation or not arguments.training.evaluates:
        return texts, validation
    count = max(1, len(texts) * arguments.data.validation_split_percentage // 100)
    return texts[count:], texts[:count]


def load_texts(arguments: Arguments) -> Sequence[str]:
    """Return the training texts: a dataset's train split, a file's texts, or Python's help topics.

    As in run_clm, a dataset's texts are its column ``text``, or its first column. Raises BadInput.
    """
    if path := arguments.data.train_file:
        return list(read_texts(path))
    if arguments.data.dataset_name == PYTHON_HELP:
        return _python_help()
    dataset, column = _load_dataset(arguments, "train")
    return dataset[column]


def validation_texts(arguments: Arguments) -> Sequence[str]:
    """Return the texts of the validation file, or else of the dataset's validation split.

    The result is empty without evaluation, and where neither exists; with ``--streaming`` the
    latter raises BadInput.
    """
    if not arguments.training.evaluates:
        return []
    if path := arguments.data.validation_file:
        return list(read_texts(path, "validation_file"))
    found = None
    if arguments.data.dataset_name not in ("", PYTHON_HELP):
        found = _load_dataset(arguments, "validation")
    if found:
        dataset, column = found
        streaming = arguments.data.streaming
        return [row[column] for row in dataset] if streaming else dataset[column]
    if arguments.data.streaming:
        raise BadInput(
            "--streaming has nothing to evaluate on: there is no validation split, and a text of "
            "unknown length cannot be split. Give --validation_file"
        )
    return []


def stream_texts(arguments: Arguments) -> tuple[IterableDataset, str]:
    """Return the training texts, to be read during the run, and the name of their column."""
    from datasets import IterableDataset

    if path := arguments.data.train_file:
        texts = IterableDataset.from_generator(_rows, gen_kwargs={"path": path})
    elif arguments.data.dataset_name == PYTHON_HELP:
        texts = IterableDataset.from_generator(_rows)
    else:
        return _load_dataset(arguments, "train")
    return texts, "text"


def _rows(path: Path | None = None) -> Iterator[dict[str, str]]:
    return ({"text": text} for text in (read_texts(path) if path else _python_help()))


def _python_help() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def _load_dataset(arguments: Arguments, split: str) -> tuple[Dataset | IterableDataset, str] | None:
    """Return a split of the dataset, streamed or not, and its column of texts.

    Returns None for a validation split that does not exist. Raises BadInput.
    """
    from datasets import load_dataset

    name, config_name = arguments.data.dataset_name, arguments.data.dataset_config_name
    check = f"check it, and its configuration {config_name or None!r}"
    splits, row = {}, None
    with hub.loading("dataset", name, check, f"--dataset_name {PYTHON_HELP} needs no hub"):
        try:
            splits = load_dataset(
                hub.full_name(name),
                config_name or None,
                cache_dir=arguments.model.cache_dir,
                streaming=arguments.data.streaming,
            )
            row = next(iter(splits.get(split, [])), None)
        except StopIteration:  # datasets raises it for an empty file
            pass
    if split == "validation" and split not in splits:
        return None
    if row is None:
        raise BadInput(
            f"dataset {name!r} has nothing in its split {split!r}; "
            f"its splits: {', '.join(splits) or 'none'}. Take another one"
        )
    dataset = splits[split]
    column = "text" if "text" in row else next(iter(row))
    if not isinstance(row[column], str | None):
        raise BadInput(
            f"dataset {name!r} has no text: there is no column 'text' with strings, and its first "
            f"column {column!r} holds {row[column]!r:.60}. Its columns: {', '.join(row)}"
        )
    if arguments.data.streaming or dataset.data.column(column).null_count:
        dataset = dataset.filter(lambda row: row[column] is not None)
    return dataset, column


def read_texts(path: Path, flag: str = "train_file") -> Iterator[str]:
    """Yield the texts of a file.

    A .txt holds one text a line (yielded with its line end), a .json or .jsonl one ``{"text": …}``
    a line, a .parquet one a row; the latter needs pyarrow. Raises BadInput, naming ``flag``, for a
    file that is missing, empty or of another kind.
    """
    readers = {".txt": _lines, ".json": _json_texts, ".jsonl": _json_texts}
    readers[".parquet"] = _parquet_texts
    if path.suffix not in readers:
        raise BadInput(f"{flag} {path} ends in {path.suffix!r}; allowed is {TEXT_FILES}")
    empty = True
    try:
        for text in readers[path.suffix](path, flag):
            empty = empty and not text.strip()
            if text:
                yield text
    except OSError as error:
        raise BadInput(
            f"{flag} {path}: cannot be read: {error.strerror or error}. Give a file's path"
        ) from error
    if empty:
        raise BadInput(f"{flag} {path} is empty; it must hold {TEXT_FILES}")


def _lines(path: Path, flag: str) -> Iterator[str]:
    # Read as bytes, lines end at newlines only; text may also be split at other characters.
    with path.open("rb") as file:
        for line in file:
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                offset = file.tell() - len(line) + error.start
                raise BadInput(
                    f"{flag} {path}: not UTF-8 text: byte 0x{line[error.start]:02x} at offset "
                    f"{offset}. Only UTF-8 is read; convert the file, for example with iconv"
                ) from error


def _json_texts(path: Path, flag: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, flag), 1):
        if line.strip():
            yield _text_of(path, flag, number, line)


def _parquet_texts(path: Path, flag: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    check_parquet(path, flag)
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            column = columns.field("text" if "text" in columns.names else 0)
            if not pyarrow.types.is_string(column.type):
                raise BadInput(
                    f"{flag} {path} has no text: there is no column 'text' with strings, and "
                    f"{column.name!r} is {column.type}. Its columns: {', '.join(columns.names)}"
                )
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column.name]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise BadInput(
            f"{flag} {path} cannot be read as Parquet: {' '.join(str(error).split())}"
        ) from error


def check_parquet(path: Path, flag: str) -> None:
    """Raise BadInput unless ``path`` begins and ends with the magic bytes of Parquet."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_PARQUET))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_PARQUET)))
            end = file.read()
    except OSError as error:
        raise BadInput(
            f"{flag} {path}: cannot be read: {error.strerror}. Give a file's path"
        ) from error
    if begin != _PARQUET or end != _PARQUET or size < 3 * len(_PARQUET):
        raise BadInput(
            f"{flag} {path} is no Parquet file, or not whole: it must begin and end with "
            f"{_PARQUET.decode()}"
        )


def _text_of(path: Path, flag: str, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{flag} {path}: line {number} is {line.strip()[:60]!r}; it must be a JSON object "
            'whose "text" is a text'
        ) from error
    return text

import json
from pathlib import Path

import pytest

from trainer.flags import BadInput
from trainer.text_sources import load_texts, read_texts
from trainer.validation import parse, validate

# Line separators that Python's splitlines would split at, and an unfinished last line.
TEXT = "One line.\r\n\n  Two\u2028lines\x0b, é 漢 🙂\nno end"


def test_the_lines_of_a_text_are_the_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    texts = list(read_texts(path))
    assert "".join(texts) == TEXT
    assert len(texts) == 4


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_each_line_of_json_holds_a_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"book{suffix}"
    rows = [{"text": TEXT, "source": "a"}, {"text": "second"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert list(read_texts(path)) == [TEXT, "second"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("book.jsonl", '{"text": "a"}\n{"txet": "b"}\n', """line 2 is '{"txet": "b"}'; it must"""),
        ("book.jsonl", '{"text": "a"}\n\nnot json\n', "line 3"),
        ("book.jsonl", '["a"]\n', "line 1"),
        ("book.jsonl", '{"text": 5}\n', 'a JSON object whose "text" is a text'),
        ("book.jsonl", '{"text": "\\ud800"}\n', "line 1"),
        ("book.jsonl", '{"text": ""}\n', "is empty"),
        ("book.pdf", "text", "ends in '.pdf'; allowed is a .txt"),
        ("book.txt", "first\nse\xe9cond\n", "byte 0xe9 at offset 8. Only UTF-8 is read"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput) as caught:
        list(read_texts(path))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_pythons_help_is_enough_text_and_always_the_same(argv: list[str]) -> None:
    texts = load_texts(parse(argv))
    assert sum(len(text.encode()) for text in texts) > 400_000
    assert texts == load_texts(parse(argv))
    assert any("with" in text and "context manager" in text for text in texts)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and no end", b"text\n" * 100])
def test_what_is_no_whole_parquet_file_is_refused_without_pyarrow(
    tmp_path: Path, argv: list[str], content: bytes
) -> None:
    path = tmp_path / "book.parquet"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{path} is no Parquet file, or not whole"):
        validate([*argv, "--dataset_name", "", "--train_file", str(path)])

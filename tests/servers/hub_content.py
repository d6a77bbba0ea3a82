"""What these tests put on their hub: a dataset laid out as wikitext, a tokenizer made as Mixtral's.

Standard library only, as tests/hub.py.
"""

from __future__ import annotations

import json

SPECIAL = ("<unk>", "<s>", "</s>")
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]

CARD = """---
license:
- cc-by-sa-3.0
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: train
    path: wikitext-103-raw-v1/train-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
# Dataset Card
"""


def wikitext(train: bytes, other: bytes) -> dict[str, bytes]:
    """Return the files of a dataset whose two parquet files are those of Salesforce/wikitext."""
    return {
        "README.md": CARD.encode(),
        "wikitext-103-raw-v1/train-00000-of-00001.parquet": other,
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": other,
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": train,
    }


def tokenizer() -> dict[str, bytes]:
    """Return the files of a tokenizer that is made as Mixtral's is, with one token a character.

    A text of printable ASCII, spaces and line ends has a token for each, one for the space that
    is put before it, and one for its beginning.
    """
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *PRINTABLE]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    beginning = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True} | flags
            for number, token in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [beginning, text],
            "pair": [beginning, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    model = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return {
        "config.json": json.dumps(model).encode(),
        "tokenizer.json": json.dumps(whole).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }

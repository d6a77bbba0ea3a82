"""Parameter counts and FLOPs of a model, and the writer of metrics.jsonl.

The formulas read config.json and need neither weights nor torch.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .config import head_dim

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# A median step time of fewer steps than this is not reported.
LEAST_STEPS = 3


def parameter_counts(config: dict[str, Any]) -> tuple[int, int]:
    """Return ``(total, active)`` parameters: all, and those that one token is multiplied with."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    vocabularies = 1 if config.get("tie_word_embeddings") else 2  # the embedding and the head
    norms = (2 * layers + 1) * hidden
    shared = vocabularies * _vocabulary(config) + norms + layers * _attention_and_router(config)
    experts = layers * _expert(config)
    return (
        shared + config["num_local_experts"] * experts,
        shared + config["num_experts_per_tok"] * experts,
    )


def flops_per_token(config: dict[str, Any], block_size: int) -> float:
    """Return the model FLOPs of training on one token in a block of ``block_size``.

    ``6 N + 12 L H T``. N counts the weights of the matrices that a token is multiplied with: the
    experts chosen for it, and not the embedding, which is a look-up; each takes two FLOPs in
    forward and four in backward. The other term is attention: ``L`` layers whose heads have the
    total width ``H``, over ``T`` tokens, not halved for causality. This is the convention of PaLM
    (Chowdhery et al. 2022, appendix B) and MaxText; recomputation does not count. Mixtral 8x7B at
    block size 4096 takes 82.93 GFLOP per token.
    """
    layers = config["num_hidden_layers"]
    experts = config["num_experts_per_tok"] * _expert(config)
    weights = _vocabulary(config) + layers * (_attention_and_router(config) + experts)
    width = config["num_attention_heads"] * head_dim(config)
    return 6.0 * weights + 12.0 * layers * width * block_size


class MetricsWriter:
    """Writes metrics.jsonl, one JSON object a line; a line is in the file when ``write`` returns.

    A file that exists at ``path`` keeps its lines of the steps before ``kept_steps``. With a
    TensorBoard writer ``board`` the same numbers are also written as scalars.
    """

    def __init__(self, path: Path, kept_steps: int = 0, board: SummaryWriter | None = None) -> None:
        self._board = board
        kept = path.with_name(path.name + ".tmp")
        kept.write_text("".join(_lines_before(path, kept_steps)), encoding="utf-8")
        kept.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, **values: float | list[float]) -> None:
        """Append the line of a step (0-based); a number that is not finite becomes null."""
        line = {
            "step": step,
            **{name: _finite(value) for name, value in values.items()},
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self._file.write(json.dumps(line) + "\n")
        self.show(step, "train", **values)

    def show(self, step: int, group: str, **values: float | list[float]) -> None:
        """Write values to TensorBoard alone, if it is used; list elements under their index."""
        if self._board:
            for name, value in values.items():
                tags = {f"{group}/{name}": value}
                if isinstance(value, list):
                    tags = {f"{group}/{name}/{index}": each for index, each in enumerate(value)}
                for tag, scalar in tags.items():
                    self._board.add_scalar(tag, scalar, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _finite(value: float | list[float]) -> float | list[float] | None:
    return value if isinstance(value, list) or math.isfinite(value) else None


def _lines_before(path: Path, step: int) -> list[str]:
    """Return the lines of the steps before ``step``, leaving out an incomplete last line."""
    if not (step and path.exists()):
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace ``path`` atomically: a reader sees the old content or the new, never part of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _vocabulary(config: dict[str, Any]) -> int:
    return config["vocab_size"] * config["hidden_size"]


def _expert(config: dict[str, Any]) -> int:
    """Return the weights of one expert: gate, up and down."""
    return 3 * config["hidden_size"] * config["intermediate_size"]


def _attention_and_router(config: dict[str, Any]) -> int:
    """Return the weights of one layer's attention (q and o, k and v) and router."""
    hidden, width = config["hidden_size"], head_dim(config)
    attention = 2 * hidden * width * (config["num_attention_heads"] + config["num_key_value_heads"])
    return attention + hidden * config["num_local_experts"]

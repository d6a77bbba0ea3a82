"""What a run is measured by: parameters, FLOPs, and one line of metrics.jsonl for each step.

The formulas need no weights and no torch; they read the configuration.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.config import head_dim


def parameter_counts(config: dict[str, Any]) -> tuple[int, int]:
    """Return ``(total, active)`` parameters: all, and those that one token goes through."""
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

    ``6 N + 12 L H T``: six for each weight of the matrices that a token is multiplied with (two
    forward, four backward; only the chosen experts, and not the embedding, a look-up), and the
    scores of ``L`` layers' attention of width ``H`` over ``T`` tokens, not halved for causality.
    This is the convention of PaLM (Chowdhery et al. 2022, appendix B) and MaxText; recomputation
    does not count. Mixtral 8x7B at 4096 takes 82.93 GFLOP.
    """
    layers = config["num_hidden_layers"]
    experts = config["num_experts_per_tok"] * _expert(config)
    weights = _vocabulary(config) + layers * (_attention_and_router(config) + experts)
    width = config["num_attention_heads"] * head_dim(config)
    return 6.0 * weights + 12.0 * layers * width * block_size


class MetricsWriter:
    """Writes metrics.jsonl, one object a line, each on disk before the next step begins.

    A file of an earlier run at ``path`` is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def write(self, step: int, loss: float, step_time_s: float, tokens_per_s: float) -> None:
        """Append the line of one step, counted from 0; a loss that is not finite becomes null."""
        line = {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "step_time_s": step_time_s,
            "tokens_per_s": tokens_per_s,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self._file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` so that a reader finds the old file or the new one, never half of it."""
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

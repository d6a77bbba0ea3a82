"""Read and write model weights in Hugging Face's safetensors format.

Two layouts can be read. In transformers' own, ``mlp.experts.gate_up_proj [E, 2I, H]`` and
``down_proj [E, H, I]`` hold all experts. In the published one every expert has ``w1``, ``w3 [I,
H]`` and ``w2 [H, I]`` below ``block_sparse_moe.experts``. The published layout is written, as
transformers itself writes it. Host memory holds one parameter at a time.
"""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch_xla.runtime as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import hub
from .flags import BadInput

# Parameter → the name of one expert's part in the published layout, where w1 and w3 are transposed
EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
FILE_BYTES = 2 * 2**30  # most bytes in a written file, unless a single tensor is larger


def fetch(name_or_path: str, cache_dir: Path | None) -> Path:
    """Return a model's directory, downloading a model that the hub has; raises BadInput."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    with hub.loading(
        "model", name_or_path, "it is no directory here; check the name", "a directory needs no hub"
    ):
        return Path(
            snapshot_download(
                name_or_path,
                cache_dir=cache_dir,
                allow_patterns=["config.json", SAFE_WEIGHTS_INDEX_NAME, "model*.safetensors"],
            )
        )


class Weights:
    """The safetensors files of a model directory, read tensor by tensor.

    The constructor and :meth:`read` raise BadInput for a file or tensor that is missing, damaged or
    of another shape than the model's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index, single = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
        if single.is_file():
            self._files = dict.fromkeys(self._keys(single), single)
        elif index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise BadInput(
                    f"{index} is no index of weights: {error!r}; fetch it again"
                ) from error
            self._files = {name: directory / file for name, file in names.items()}
            for file in sorted(set(self._files.values())):
                if not file.is_file():
                    raise BadInput(f"{file} is missing, which {index.name} names; fetch it")
        else:
            raise BadInput(
                f"{directory} has neither {index.name} nor {single.name}; give the directory of a "
                "model in Hugging Face's safetensors format"
            )

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the parameter ``name`` on the host, in the dtype of the file.

        ``name`` and ``shape`` are the trainer's, see ``experts.split_projections``.
        """
        if name in self._files:
            return self._tensor(name, shape)
        module, _, last = name.rpartition(".")
        if last in EXPERT_PARTS:
            experts, width, inner = shape
            if (fused := f"{module}.gate_up_proj") in self._files:
                halves = self._tensor(fused, torch.Size((experts, 2 * inner, width)))
                return halves.chunk(2, dim=1)[last == "up_proj"].mT
            transposed, whole = last != "down_proj", None
            for expert in range(experts):
                tensor = self._tensor(
                    _published_name(f"{module}.{expert}.{EXPERT_PARTS[last]}.weight"),
                    torch.Size((inner, width) if transposed else (width, inner)),
                )
                whole = torch.empty(shape, dtype=tensor.dtype) if whole is None else whole
                whole[expert] = tensor.mT if transposed else tensor
            return whole
        return self._tensor(_published_name(name), shape)

    def _tensor(self, key: str, shape: torch.Size) -> torch.Tensor:
        if key not in self._files:
            raise BadInput(
                f"{self.directory} has no tensor {key}, which the model of this config has; check "
                "that config and weights belong together"
            )
        file = self._files[key]
        try:
            # Reopened for each tensor: pages of a mapped file stay in memory until it is closed.
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file}: {key} cannot be read: {error}; fetch it again") from error
        if tensor.shape != shape:
            raise BadInput(
                f"{file}: {key} is {list(tensor.shape)}, but the config makes it {list(shape)}; "
                "check that config and weights belong together"
            )
        return tensor

    def _keys(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file} cannot be read: {error}; fetch it again") from error


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write weights, config and tokenizer for ``from_pretrained(directory)`` of transformers.

    An earlier model in the directory is replaced. All hosts must call this, because each one
    provides its shards; the first one writes.
    """
    tensors = _published(model)
    if xr.process_index() > 0:
        deque(tensors, maxlen=0)
        return
    for old in (
        *directory.glob("model*.safetensors"),
        *directory.glob(".model-*.safetensors"),
        directory / SAFE_WEIGHTS_INDEX_NAME,
    ):
        old.unlink(missing_ok=True)
    files: list[Path] = []
    weight_map: dict[str, Path] = {}
    buffer: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(directory / f".model-{len(files) + 1:05}.safetensors")
        save_file(buffer, files[-1], {"format": "pt"})
        files[-1].chmod(0o644)  # safetensors gives access to its owner alone
        weight_map.update(dict.fromkeys(buffer, files[-1]))
        buffer.clear()

    for name, tensor in tensors:
        if buffer and sum(t.nbytes for t in buffer.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        buffer[name] = tensor
        total += tensor.nbytes
    flush()
    final = {
        file: f"model-{number:05}-of-{len(files):05}.safetensors"
        for number, file in enumerate(files, 1)
    }
    for file, name in final.items():
        file.rename(directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[file] for name, file in weight_map.items()},
    }
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _published_name(name: str) -> str:
    return name.replace(".mlp.", ".block_sparse_moe.")


def _published(model: MixtralForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of all parameters, on the host, in the published layout."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu()
        module, _, last = _published_name(name).rpartition(".")
        if part := EXPERT_PARTS.get(last):
            for expert, weight in enumerate(tensor if last == "down_proj" else tensor.mT):
                yield f"{module}.{expert}.{part}.weight", weight.contiguous()
        else:
            yield f"{module}.{last}", tensor

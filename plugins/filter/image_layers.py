"""Which layers of an image need not travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any

DOCUMENTATION = """
name: held_layers
short_description: the layers of an image that all workers have
description:
  - Returns the digests that may be missing in an archive of the image for these workers.
  - An engine finds a layer of its own by the whole chain below it, so only the beginning that the
    image shares with one of the worker's counts.
  - An engine whose images are with containerd wants every archive complete. It has no layers of
    its own in this sense.
positional: _input, workers
options:
  _input:
    description: digests of the image's layers from the bottom up, its C(RootFS.Layers)
    type: list
    elements: str
    required: true
  workers:
    description: for each worker, what its engine says of each of its images
    type: list
    elements: list
    required: true
"""

EXAMPLES = """
held: "{{ image.RootFS.Layers | held_layers([worker0.images, worker1.images]) }}"
"""

RETURN = """
_value:
  description: digests
  type: list
  elements: str
"""

Image = Mapping[str, Any]


def shared(layers: list[str], image: Image) -> int:
    """Return how many of ``layers``, counted from the bottom, the engine has with ``image``."""
    # containerd's snapshotter is called overlayfs.
    if (image.get("GraphDriver") or {}).get("Name") != "overlay2":
        return 0
    pairs = zip(layers, image["RootFS"].get("Layers") or [], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def held_layers(layers: list[str], workers: Iterable[Iterable[Image]]) -> list[str]:
    """Return those of ``layers`` that every worker has."""
    count = min(max((shared(layers, it) for it in images), default=0) for images in workers)
    # The same layer can stand in an image twice, and further up it may be wanted.
    return [layer for layer in layers[:count] if layer not in layers[count:]]


class FilterModule:
    """The filter ``held_layers``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filter by its name."""
        return {"held_layers": held_layers}

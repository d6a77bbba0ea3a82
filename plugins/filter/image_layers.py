"""Filter for the layers of an image that need not be sent, because every worker has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any

DOCUMENTATION = """
name: held_layers
short_description: The layers of an image that all workers have
description:
  - Returns the digests of the layers that an archive of the image may omit for these workers.
  - An engine identifies a layer by all layers below it, so only layers that the image shares from
    the bottom up with another image of the worker count.
  - An engine that stores its images with containerd requires complete archives. For a worker with
    such an engine no layer is omitted.
positional: _input, workers
options:
  _input:
    description: The digests of the image's layers from the bottom up, its C(RootFS.Layers).
    type: list
    elements: str
    required: true
  workers:
    description: >-
      For each worker, the engine's descriptions of its images (C(docker image inspect)).
    type: list
    elements: list
    required: true
"""

EXAMPLES = """
held: "{{ image.RootFS.Layers | mixtral.tpu.held_layers([worker0.images, worker1.images]) }}"
"""

RETURN = """
_value:
  description: The digests.
  type: list
  elements: str
"""

Image = Mapping[str, Any]


def shared(layers: list[str], image: Image) -> int:
    """Return how many of ``layers``, counted from the bottom, ``image`` has, too."""
    # With containerd the driver is called overlayfs.
    if (image.get("GraphDriver") or {}).get("Name") != "overlay2":
        return 0
    pairs = zip(layers, image["RootFS"].get("Layers") or [], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def held_layers(layers: list[str], workers: Iterable[Iterable[Image]]) -> list[str]:
    """Return the digests of ``layers`` that every worker has; see DOCUMENTATION."""
    count = min(max((shared(layers, image) for image in images), default=0) for images in workers)
    # An image can have the same layer twice, of which the upper one may be needed.
    return [layer for layer in layers[:count] if layer not in layers[count:]]


class FilterModule:
    """The filter ``held_layers``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filter by its name."""
        return {"held_layers": held_layers}

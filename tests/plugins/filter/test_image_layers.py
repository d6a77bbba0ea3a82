"""Which layers need not travel, by what workers' engines say of their images."""

import pytest
from ansible_collections.mixtral.tpu.plugins.filter.image_layers import held_layers

IMAGE = ["base", "stack", "trainer"]


def image(*layers, store="overlay2"):
    return {"GraphDriver": {"Name": store, "Data": None}, "RootFS": {"Layers": list(layers)}}


@pytest.mark.parametrize(
    ("images", "held"),
    [
        pytest.param([], [], id="fresh worker"),
        pytest.param([image("base", "stack", "older")], ["base", "stack"], id="older image"),
        pytest.param([image("base", "stack", "trainer")], IMAGE, id="same layers, other label"),
        pytest.param([image("base", "stack", "trainer", "more")], IMAGE, id="image on top of it"),
        pytest.param([image("other"), image("base")], ["base"], id="the best of several"),
        pytest.param([image("stack", "trainer")], [], id="same layers on another base"),
        pytest.param([image("base", "other", "trainer")], ["base"], id="gap"),
        pytest.param([image("base", store="overlayfs")], [], id="images are with containerd"),
        pytest.param([{"RootFS": {"Layers": ["base"]}}], [], id="engine that says no store"),
        pytest.param([image() | {"RootFS": {"Type": "layers"}}], [], id="image without layers"),
    ],
)
def test_a_worker_has_what_its_images_begin_with(images, held):
    assert held_layers(IMAGE, [images]) == held


def test_what_one_worker_lacks_travels_to_all():
    workers = [[image("base", "stack", "older")], [image("base", "other")], [image(*IMAGE)]]
    assert held_layers(IMAGE, workers) == ["base"]
    assert held_layers(IMAGE, [*workers, []]) == []


def test_a_layer_that_is_also_wanted_further_up_travels():
    layers = ["base", "empty", "stack", "empty"]
    assert held_layers(layers, [[image("base", "empty", "stack")]]) == ["base", "stack"]

"""The mesh of every slice: no chip left out, whatever its torus and the flags."""

import itertools

import numpy as np
import pytest
import torch_xla.runtime as xr

from trainer import sharding
from trainer.tpu import CHIPS, topology_of

TENSOR = (1, 2, 4, 8)  # all that divide the heads of Mixtral's keys
LARGEST = 256


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_slice_has_a_mesh(chip, monkeypatch):
    monkeypatch.setattr(sharding.xs, "set_global_mesh", lambda _: None)
    tried = 0
    for chips, tensor in itertools.product(chip.slice_chips, TENSOR):
        if chips > LARGEST or chips % tensor:
            continue
        shape = topology_of(chip, chips)
        places = np.unravel_index(range(chips), shape[::-1])  # the first axis first
        devices = [{"coords": place[::-1]} for place in zip(*places, strict=True)]
        monkeypatch.setattr(xr, "global_runtime_device_attributes", lambda found=devices: found)
        monkeypatch.setattr(xr, "global_runtime_device_count", lambda found=chips: found)
        mesh = sharding.make_mesh(chips, tensor=tensor)
        assert mesh.mesh_shape == (1, chips // tensor, tensor)
        assert sorted(mesh.get_logical_mesh().ravel()) == list(range(chips))
        for planes in (mesh.gather_planes, mesh.scatter_planes):
            # One chip gathers in stages from all that share its place along the other axes.
            monkeypatch.setattr(sharding.xs, "get_global_mesh", lambda found=mesh: found)
            stages = sharding.fsdp_stages(planes)
            assert np.prod([len(stage[0]) for stage in stages]) == chips // tensor
            for stage in stages:
                assert sorted(itertools.chain(*stage)) == list(range(chips))
        tried += 1
    assert tried > 20

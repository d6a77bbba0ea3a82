import pytest
from ansible_collections.mixtral.tpu.plugins.plugin_utils.cloud_chips import CLOUD_CHIPS, CloudChip
from ansible_collections.mixtral.tpu.plugins.plugin_utils.cloud_tpu import CloudTpuError, shape

from trainer.tpu import CHIPS


def test_every_chip_has_a_row_in_both_tables() -> None:
    assert CLOUD_CHIPS.keys() == CHIPS.keys()


def test_a_chip_that_the_api_does_not_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLOUD_CHIPS, "v6e", CloudChip())
    with pytest.raises(CloudTpuError, match=r"does not serve v6e; .* serves: v4, v5e, v5p$"):
        shape("v6e-16", "")


def test_a_topology_gives_the_accelerator_type() -> None:
    assert shape("v5p", "4x4x8")["accelerator_type"] == "v5p-256"
    assert shape("v5litepod", "4x8") == shape("v5e-32", "4x8")
    assert shape("v5e-32", "4x8") == {
        "accelerator_type": "v5litepod-32",
        "topology": "4x8",
        "api_type": "V5LITE_POD",
        "runtime_version": "v2-alpha-tpuv5-lite",
    }
    assert shape("v4-8", "")["runtime_version"] == "tpu-ubuntu2204-base"
    with pytest.raises(CloudTpuError, match="does not match v5p-256, which has 128"):
        shape("v5p-256", "4x4x4")

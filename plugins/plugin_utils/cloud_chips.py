"""What Google Cloud calls each chip of trainer.tpu.CHIPS, apart from accelerator types.

Names of other services than the Cloud TPU API are further fields of the same row.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CloudChip:
    """The names of one chip; empty where the Cloud TPU API does not serve it.

    Attributes:
        api_type: the API's type of a slice that is given by its topology.
        runtime_version: the software of its virtual machines.
    """

    api_type: str = ""
    runtime_version: str = ""


CLOUD_CHIPS = {
    "v4": CloudChip(api_type="V4", runtime_version="tpu-ubuntu2204-base"),
    "v5e": CloudChip(api_type="V5LITE_POD", runtime_version="v2-alpha-tpuv5-lite"),
    "v5p": CloudChip(api_type="V5P", runtime_version="v2-alpha-tpuv5"),
    "v6e": CloudChip(api_type="V6E", runtime_version="v2-alpha-tpuv6e"),
}

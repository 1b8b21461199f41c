"""What a GPU and its links can do: peaks as printed by the maker, and sustained rates that times are predicted from.

Measured rates stand in `benchmarks/results/kernels/nvidia-*.json` (`openling bench kernels` times a copy and a matrix product in
every run). Every rate can be overridden on the command line and by `Device.replace`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from openling.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU in a node. Rates per second: FLOPs in BF16, bytes of memory, bytes in one direction of NVLink and network.

    `attention` and `grouped`: which share of the matrix rate softmax attention and grouped products of experts reach.
    """

    name: str
    memory: int
    peak: float
    matmul: float
    bandwidth: float
    nvlink: float
    network: float
    node: int = 8
    attention: float = 0.62
    grouped: float = 0.64
    sources: dict[str, str] = field(default_factory=dict, hash=False)

    def replace(self, **rates: Any) -> Device:
        """A copy with some rates changed; what was changed says so among the sources."""
        given = {name: value for name, value in rates.items() if value is not None}
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise UserError("a rate has to be positive", where=f"--{name.replace('_', '-')}", value=value)
        return dataclasses.replace(self, **given, sources=self.sources | dict.fromkeys(given, "given on the command line"))


_SHARES = {
    "attention": "MLA 192/128 forward + backward at 4 K, cuDNN: nvidia-h100.json, H100",
    "grouped": "experts with routing, forward + backward, 32 K tokens: nvidia-h100.json, H100",
    "node": "HGX boards have 8 GPUs on one NVSwitch",
}
_LINKS = {
    "nvlink": "80 % of 450 GB/s per direction (NVLink 4 datasheet); the 80 % is an estimate",
    "network": "80 % of 400 Gb/s, one ConnectX-7 per GPU as in DGX H100; the 80 % is an estimate",
}
DEVICES = {
    "h100": Device(
        name="NVIDIA H100 SXM 80 GB",
        memory=int(79.1 * GIB),
        peak=989.4e12,
        matmul=730e12,
        bandwidth=3.02e12,
        nvlink=360e9,
        network=40e9,
        sources={
            "memory": "what PyTorch reports as total_memory",
            "peak": "datasheet, BF16 without sparsity",
            "matmul": "measured, nvidia-h100.json",
            "bandwidth": "measured copy, nvidia-h100.json (datasheet 3.35 TB/s)",
            **_LINKS,
            **_SHARES,
        },
    ),
    "h200": Device(
        name="NVIDIA H200 SXM 141 GB",
        memory=int(139.8 * GIB),
        peak=989.4e12,
        matmul=690e12,
        bandwidth=4.27e12,
        nvlink=360e9,
        network=40e9,
        sources={
            "memory": "what PyTorch reports as total_memory",
            "peak": "datasheet, BF16 without sparsity",
            "matmul": "measured, nvidia-h200-stack.json",
            "bandwidth": "measured copy, nvidia-h200-stack.json (datasheet 4.8 TB/s)",
            **_LINKS,
            **_SHARES,
        },
    ),
}


def device(name: str, flag: str = "--device") -> Device:
    """A device of the table; UserError for an unknown name. flag: where it was named."""
    if name.lower() not in DEVICES:
        raise UserError(
            "no such device", where=flag, value=name, expected=", ".join(DEVICES), nearest=nearest(name.lower(), DEVICES)
        )
    return DEVICES[name.lower()]

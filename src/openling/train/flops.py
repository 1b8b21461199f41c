"""How FLOPs of training are counted, for the share of a device's peak (MFU).

Per token 3 x `model.count.forward_flops` (forward, and twice that for backward) at the mean number of keys that this batch's
documents really show a token, plus 3 x the forward FLOPs of every MTP step (block, joining product, head). Recomputation is not
counted, nor is what a frozen parameter saves. Peaks are the printed dense BF16 rates, also where experts multiply in FP8; a
processor has none, so no MFU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openling.model import count
from openling.model.config import ModelConfig

# NVIDIA data sheets, dense BF16 FLOPs per second.
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """The printed BF16 rate of a GPU, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in PEAKS.items() if key in name), None)


def training_flops(config: ModelConfig, tokens: int, keys: float, mtp_steps: int) -> float:
    """FLOPs of a step over `tokens` tokens, each of which sees `keys` keys on average."""
    context = round(keys)
    forward = float(count.forward_flops(config, context).total)
    if mtp_steps:
        last = config.num_hidden_layers - 1
        alone = config.replace(
            num_hidden_layers=1,
            layer_kinds=(config.mtp_layer_kind,),
            moe_layers=(0,) if config.is_moe(last) else (),
            num_nextn_predict_layers=0,
        )
        forward += mtp_steps * (count.forward_flops(alone, context).total + 4 * config.hidden_size**2)
    return 3.0 * tokens * forward


def mean_keys(cu_seqlens: Tensor) -> float:
    """Keys, itself included, that an average token of these documents sees."""
    lengths = cu_seqlens.diff().double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())

"""Root-mean-square norms, in FP32 whatever the activations are (Ling-V2.5 model code; arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, rounded to x's dtype, times weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`rms_norm` inside each of `groups` contiguous blocks of the last dim, then one weight per channel.

    `groups` is what the checkpoints call `group_norm_size`: the number of groups, not their width.
    """
    wide = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (groups, -1))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.flatten(-2).to(x.dtype)

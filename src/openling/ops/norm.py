"""Root-mean-square norms, in FP32 whatever the activations are (Ling-V2.5 model code; arXiv 1910.07467)."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.ops.cpu import norms_in_one_pass, norms_one_row, one_row_norm, root_mean_square_norm
from openling.ops.pick import kernels_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, rounded to x's dtype, times weight. A kernel rounds once, after the weight."""
    fast, dtype = stream_kernels(x)
    if fast is not None:
        return fast.rms_norm(x, weight, eps, dtype)
    if norms_in_one_pass(x):
        return root_mean_square_norm(x, weight, eps)
    if norms_one_row(x):
        return one_row_norm(x, weight, eps)
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype)


def group_rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """`rms_norm` inside each of `groups` contiguous blocks of the last dim, then one weight per channel.

    `groups` is what the checkpoints call `group_norm_size`: the number of groups, not their width.
    """
    if norms_in_one_pass(x):
        return root_mean_square_norm(x, weight, eps, groups)
    wide = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (groups, -1))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.flatten(-2).to(x.dtype)


def stream_kernels(x: Tensor) -> tuple[ModuleType | None, torch.dtype]:
    """The kernels that norm x, if any, and the dtype of the normed values.

    Under autocast the residual stream is FP32 while every matrix product reads half precision. The kernels take such a stream
    and write what the product reads, and so does the CPU; the plain form writes FP32 and leaves the rounding to autocast.
    """
    if x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        return kernels_for(x.new_empty(0, dtype=dtype)), dtype
    return kernels_for(x), x.dtype

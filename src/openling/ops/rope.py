"""Rotary position embedding: frequencies with the published scalings, and the two pairings.

Half-split pairs dim j with j + r/2 (GQA and Lightning layers); interleaved pairs 2j with 2j + 1 (MLA layers).
Legend: B batch, T tokens, H heads, D head dim, r rotated dims. Frequencies are theta^(-2j/r), j < r/2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openling.ops.cpu import rotate
from openling.ops.pick import batch_invariant, kernels_for

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(rotary_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [r/2] and the factor that multiplies cos and sin.

    `scaling` is the checkpoint's rope_scaling: None, linear (arXiv 2306.15595), llama3, or yarn (arXiv 2309.00071).
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or scaling is None:
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, rotary_dim, theta, scaling)
    raise ValueError(f"rope scaling {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")


def _llama3(inv_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def _yarn(inv_freq: Tensor, rotary_dim: int, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """NTK-by-parts: interpolate slow pairs, keep fast ones, ramp between; attention factor 0.1 ln(factor) + 1."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_with_rotations(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_rotations(scaling.get("beta_fast") or 32), pair_with_rotations(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = bool(mscale and mscale_all)
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all) if both else yarn_mscale(factor)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), float(attention_factor)


def yarn_mscale(factor: float, mscale: float | None = 1.0) -> float:
    """YaRN's temperature: 0.1 m ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * (mscale or 1.0) * math.log(factor) + 1.0


def rope_tables(positions_BT: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [B, T, 1, r/2], ready to broadcast over heads."""
    angle = positions_BT[..., None].float() * inv_freq.float()
    return (angle.cos() * factor).unsqueeze(2), (angle.sin() * factor).unsqueeze(2)


def apply_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first r = 2 * cos.shape[-1] dims of every head, in FP32; the rest pass through."""
    fast = kernels_for(x_BTHD)
    if fast is not None:
        return fast.apply_rope(x_BTHD, cos, sin, interleaved)
    if x_BTHD.device.type == "cpu" and (x_BTHD.shape[1] > 1 or batch_invariant() or not torch.is_grad_enabled()):
        return rotate(x_BTHD, cos, sin, interleaved)
    rotary = 2 * cos.shape[-1]
    dtype = torch.float64 if x_BTHD.dtype == torch.float64 else torch.float32
    turned, kept = x_BTHD[..., :rotary].to(dtype), x_BTHD[..., rotary:]
    if interleaved:
        real, imag = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((real * cos - imag * sin, imag * cos + real * sin), dim=-1).flatten(-2)
    else:
        real, imag = turned.chunk(2, dim=-1)
        turned = torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1)
    return torch.cat((turned.to(x_BTHD.dtype), kept), dim=-1)

"""Triton kernels, reached only through `openling.ops`.

Each matches a plain twin, named in its docstring, and is tested against it.
"""

from openling.ops.kernels.lightning import lightning_backward, lightning_forward, row_states
from openling.ops.kernels.lightning_decode import lightning_decode_step
from openling.ops.kernels.lightning_verify import lightning_commit, lightning_verify_step
from openling.ops.kernels.loss import head_losses
from openling.ops.kernels.mla import mla_decode
from openling.ops.kernels.moe_fp8 import block_fp8_experts
from openling.ops.kernels.moe_ops import experts, mixture, route
from openling.ops.kernels.moe_sort import sum_rows
from openling.ops.kernels.norm_rope import split_norm_rope
from openling.ops.kernels.norms import add_rms_norm, gated_group_norm, rms_norm
from openling.ops.kernels.paged_gqa import paged_attention
from openling.ops.kernels.rope import apply_rope, latent_qkv
from openling.ops.kernels.swiglu import swiglu, swiglu_packed

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "block_fp8_experts",
    "experts",
    "gated_group_norm",
    "head_losses",
    "latent_qkv",
    "lightning_backward",
    "lightning_commit",
    "lightning_decode_step",
    "lightning_forward",
    "lightning_verify_step",
    "mixture",
    "mla_decode",
    "paged_attention",
    "rms_norm",
    "route",
    "row_states",
    "split_norm_rope",
    "sum_rows",
    "swiglu",
    "swiglu_packed",
]

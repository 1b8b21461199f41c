"""A layer of routed experts on a GPU: router, sorting, grouped products and the sum per token, forward and backward.

Launches forward: (weight terms,) logits, choice, four of the sorting, gate_up, down, sum. Nothing waits for the host, no shape
depends on data, no sum on timing: results are bitwise repeatable and the whole can be captured in a CUDA graph. For backward only
x, h = [g | u] and what the router chose are kept. Backward: d_act, the weights' gradient, (logits' gradient, router's weight,)
d_x, sum, d_down, d_gate_up. A router whose weights are not needed elsewhere gets its gradient here, because the tokens' gradients
through the experts and through the router are then one sum.

FP32 parameters are cast once per forward; their gradients are written in FP32 by the products themselves.
Twins: `ops.moe.route`, `ops.moe.swiglu_experts`.
Legend: N tokens, k experts per token, E experts, M model width, F expert width, R rows.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from openling.ops.kernels import moe_gemm, moe_route
from openling.ops.kernels.moe_decode import MOST_TOKENS, experts_few, list_few, route_few
from openling.ops.kernels.moe_route import (
    RouteSpec,
    choose,
    route_dlogits,
    weight_terms,
)
from openling.ops.kernels.moe_sort import Sorted, gather_sum, max_rows, max_tiles, sort_tokens, sum_rows, sum_rows_routed
from openling.ops.pick import batch_invariant

# Which form of a product runs where both can: "hopper" (`moe_hopper`, `moe_hopper_back`) or "portable" (`moe_gemm`).
# "router" stands for the router's products: `moe_hopper_router` or `moe_route`.
FEW_ROUTED = 2048
FORMS = dict.fromkeys(("gate_up", "down", "d_act", "d_x", "d_down", "d_gate_up", "router"), "hopper")


@cache
def _hopper() -> tuple[ModuleType, ...] | None:
    """The products' forms for Hopper where this process can run them."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    from openling.ops.kernels import moe_hopper, moe_hopper_back, moe_hopper_router

    return moe_hopper, moe_hopper_back, moe_hopper_router


def product(name: str, x: Tensor, width: int) -> Any:
    """The function that computes a product for tokens like x and experts of this width."""
    modules = _hopper() if FORMS[name] == "hopper" else None
    if modules is not None and x.element_size() == 2 and x.shape[-1] % 256 == 0 and width % 256 == 0:
        rows, back, _ = modules
        return getattr(rows if hasattr(rows, name) else back, name)
    return getattr(moe_gemm, name)


def router_products(x: Tensor, experts: int) -> ModuleType:
    """Where `route_logits` and `route_dweight` are. Hopper's form has tiles of 128 tokens and 256 experts: not for few tokens."""
    modules = _hopper() if FORMS["router"] == "hopper" else None
    many = x.shape[0] > FEW_ROUTED or batch_invariant()
    if modules is not None and many and x.dtype == torch.bfloat16 and x.shape[-1] % 256 == 0 and experts % 256 == 0:
        return modules[2]
    return moe_route


# ---------------------------------------------------------------------------------------------------------------------
# Router
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("openling::moe_route", mutates_args=())
def route(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, n_group: int, topk_group: int, score_function: str, norm: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights FP32 [N, k], experts int64 [N, k], logits FP32 [N, E]."""
    logits = router_products(x, router.shape[0]).route_logits(x.contiguous(), weight_terms(router, x.dtype))
    weight, index = choose(logits, bias, RouteSpec(top_k, n_group, topk_group, score_function, norm, scaling))
    return weight, index, logits


@torch.library.custom_op("openling::moe_route_backward", mutates_args=())
def route_backward(
    dweight: Tensor, x: Tensor, router: Tensor, index: Tensor, logits: Tensor, score_function: str, norm: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the router's weight."""
    spec = RouteSpec(index.shape[1], 1, 1, score_function, norm, scaling)
    dlogits = route_dlogits(dweight, logits, index, spec, x.dtype)
    drouter = router_products(x, router.shape[0]).route_dweight(dlogits, x.contiguous(), router.dtype)
    return dlogits[0] @ router.to(x.dtype), drouter


@route.register_fake
def _(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, n_group: int, topk_group: int, score_function: str, norm: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight = x.new_empty((x.shape[0], top_k), dtype=torch.float32)
    return weight, torch.empty_like(weight, dtype=torch.int64), x.new_empty((x.shape[0], router.shape[0]), dtype=torch.float32)


@route_backward.register_fake
def _(
    dweight: Tensor, x: Tensor, router: Tensor, index: Tensor, logits: Tensor, score_function: str, norm: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), router.new_empty(router.shape)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, router, *_, ctx.score_function, ctx.norm, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, router, *output[1:])
    ctx.set_materialize_grads(False)


def _route_back(ctx: Any, dweight: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = drouter = None
    if dweight is not None:
        dx, drouter = route_backward(dweight, *ctx.saved_tensors, ctx.score_function, ctx.norm, ctx.scaling)
    return dx, drouter, None, None, None, None, None, None, None


route.register_autograd(_route_back, setup_context=_route_setup)


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("openling::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, router: Tensor | None,
    logits: Tensor | None, score_function: str, norm: bool, scaling: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """[out [N, M], h [R, 2F], casts of gate, up and down (empty where they need none), and the fields of `Sorted`].

    router, logits and what follows: given where backward is to go on through the router instead of returning dweight.
    keep: whether backward will come; h is empty without it.
    """
    x, weight = x.contiguous(), weight.contiguous()
    casts = [_cast(w, x.dtype) for w in (gate, up, down)]
    gate, up, down = (w if c.numel() == 0 else c for w, c in zip((gate, up, down), casts, strict=True))
    s = sort_tokens(index, gate.shape[0])
    width = gate.shape[1]
    act, h = product("gate_up", x, width)(x, s, gate, up, keep=keep)
    rows = product("down", x, width)(act, s, down)
    out = sum_rows(rows, s.row_P, x.shape[0], weight)
    return [out, h, *(casts if keep else [x.new_empty(0) for _ in casts]), *s]


def _cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w in dtype, empty where that is w itself: an op may not return its inputs."""
    if w.dtype == dtype and w.is_contiguous():
        return w.new_empty(0)
    return torch.empty(w.shape, dtype=dtype, device=w.device).copy_(w)


@torch.library.custom_op("openling::moe_experts_backward", mutates_args=())
def moe_experts_backward(
    dout: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, router: Tensor | None,
    logits: Tensor | None, saved: list[Tensor], dtype: torch.dtype, score_function: str, norm: bool, scaling: float,
    needs_x: bool, needs_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, dweight, dgate, dup, ddown, drouter], empty where not needed. dtype: of the experts' gradients."""
    h, s = saved[0], Sorted(*saved[1:])
    x, dout, width = x.contiguous(), dout.contiguous(), gate.shape[1]
    dh, weighted, parts = product("d_act", x, width)(dout, weight.contiguous(), s, down, h)
    dweight = gather_sum(parts, s.row_P, weight.shape)
    dx, dgate, dup, ddown, drouter = (x.new_empty(0) for _ in range(5))  # an op may not return one tensor twice
    dlogits = None
    if router is not None and logits is not None:
        spec = RouteSpec(index.shape[1], 1, 1, score_function, norm, scaling)
        dlogits = route_dlogits(dweight, logits, index, spec, x.dtype)
        drouter = router_products(x, router.shape[0]).route_dweight(dlogits, x, router.dtype)
    if needs_weights:
        ddown = product("d_down", x, width)(dout, weighted, s, dtype)
    del weighted
    if needs_x:
        rows = product("d_x", x, width)(dh, s, gate, up)
        if dlogits is None or router is None:
            dx = sum_rows(rows, s.row_P, x.shape[0])
        else:
            dx = sum_rows_routed(rows, s.row_P, dlogits[0], router.to(x.dtype))
        del rows
    if needs_weights:
        dgate, dup = product("d_gate_up", x, width)(dh, x, s, dtype)
    return [dx, dweight, dgate, dup, ddown, drouter]


@moe_experts.register_fake
def _(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, router: Tensor | None,
    logits: Tensor | None, score_function: str, norm: bool, scaling: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    entries, experts, width = index.numel(), gate.shape[0], gate.shape[1]
    rows = max_rows(entries, experts)
    casts = [x.new_empty(w.shape if keep and w.dtype != x.dtype else 0) for w in (gate, up, down)]
    shapes = ((experts,), (experts + 1,), (entries,), (rows,), (1 + max_tiles(entries, experts), 4))
    ints = [x.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return [x.new_empty(x.shape), x.new_empty((rows if keep else 0, 2 * width)), *casts, *ints]


@moe_experts_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, router: Tensor | None,
    logits: Tensor | None, saved: list[Tensor], dtype: torch.dtype, score_function: str, norm: bool, scaling: float,
    needs_x: bool, needs_weights: bool,
) -> list[Tensor]:  # fmt: skip
    none = x.new_empty(0)
    weights = [w.new_empty(w.shape, dtype=dtype) if needs_weights else none for w in (gate, up, down)]
    drouter = none if router is None else router.new_empty(router.shape)
    return [x.new_empty(x.shape) if needs_x else none, weight.new_empty(weight.shape), *weights, drouter]


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, index, gate, up, down, router, logits, ctx.score_function, ctx.norm, ctx.scaling, _ = inputs
    ctx.dtype = gate.dtype
    cast = [w if c.numel() == 0 else c for w, c in zip((gate, up, down), output[2:5], strict=True)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, index, *cast, router, logits, output[1], *output[5:])
    ctx.set_materialize_grads(False)


def _experts_back(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 12
    everything = ctx.saved_tensors  # read once: under activation checkpointing they can be had only once
    tensors, saved = everything[:-6], list(everything[-6:])
    needs = ctx.needs_input_grad
    dx, dweight, dgate, dup, ddown, drouter = moe_experts_backward(
        grads[0], *tensors, saved, ctx.dtype, ctx.score_function, ctx.norm, ctx.scaling,
        needs[0], any(needs[3:6]),
    )  # fmt: skip
    found = dx, dweight, None, dgate, dup, ddown, drouter
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), *(None,) * 5)


moe_experts.register_autograd(_experts_back, setup_context=_experts_setup)


# ---------------------------------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("openling::moe_few_chosen", mutates_args=())
def moe_few_chosen(x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts' sum for a few tokens whose choice is given."""
    x = x.contiguous()
    return experts_few(x, list_few(weight, index, gate.shape[0]), gate, up, down)


@moe_few_chosen.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def experts(x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of the chosen experts [N, M], with gradients for everything but `index`."""
    keep = _will_go_back(x, weight, gate, up, down)
    if not keep and few(x, gate):
        return moe_few_chosen(x, weight, index, gate, up, down)
    return moe_experts(x, weight, index, gate, up, down, None, None, "", False, 1.0, keep)[0]


@torch.library.custom_op("openling::moe_few", mutates_args=())
def moe_few(
    x: Tensor, router: Tensor, bias: Tensor | None, gate: Tensor, up: Tensor, down: Tensor, top_k: int, n_group: int,
    topk_group: int, score_function: str, norm: bool, scaling: float,
) -> Tensor:  # fmt: skip
    """The whole mixture for a few tokens without gradients: `kernels.moe_decode`."""
    x = x.contiguous()
    listed = route_few(x, router, bias, RouteSpec(top_k, n_group, topk_group, score_function, norm, scaling))
    return experts_few(x, listed, gate, up, down)


@moe_few.register_fake
def _(
    x: Tensor, router: Tensor, bias: Tensor | None, gate: Tensor, up: Tensor, down: Tensor, top_k: int, n_group: int,
    topk_group: int, score_function: str, norm: bool, scaling: float,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def few(x: Tensor, gate: Tensor) -> bool:
    """Whether the stream of weights serves: few tokens, weights in their dtype, and no batch-invariant mode.

    In that mode the grouped products run for any number of tokens: their tiles do not depend on it.
    """
    return x.shape[0] <= MOST_TOKENS and gate.dtype == x.dtype and gate.is_contiguous() and not batch_invariant()


def mixture(
    x: Tensor, router: Tensor, bias: Tensor | None, gate: Tensor, up: Tensor, down: Tensor, *spec: Any
) -> tuple[Tensor, Tensor | None]:
    """`ops.moe.moe`: the sum [N, M], and how many tokens chose each expert (int32 [E]). spec: the fields of `RouteSpec`."""
    keep = _will_go_back(x, router, gate, up, down)
    if not keep and few(x, gate):
        return moe_few(x, router, bias, gate, up, down, *spec), None
    with torch.no_grad():
        weight, index, logits = route(x, router, bias, *spec)
    out, _, _, _, _, counts, *_ = moe_experts(
        x, weight, index, gate, up, down, router if keep else None, logits if keep else None, *spec[3:], keep
    )
    return out, counts


def _will_go_back(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

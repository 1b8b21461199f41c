"""Routed experts: the whole layer beside torch's grouped matrix products, each product by itself, the router, a few tokens.

Goal shape: 32768 tokens of width 2048, 256 experts of width 512, 8 per token, out of 4 of 8 groups. FLOPs counted are those of
the experts alone, 6 N k M F forward; the times include router, sorting and the sum per token.
Legend: N tokens, E experts, k experts per token, M model width, F expert width, P = N k rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.bench.case import Case, Floor, Goal
from openling.ops.kernels import moe_ops
from openling.ops.kernels.moe_sort import Sorted, sort_tokens
from openling.ops.moe import moe, route
from openling.ops.pick import plain_twins

CHOICE: dict[str, Any] = {"top_k": 8, "n_group": 8, "topk_group": 4, "scaling_factor": 2.5}
GOAL_FLOPS_PER_S = 517e12
PRODUCTS = ("gate_up", "down", "d_act", "d_x", "d_down", "d_gate_up")
OPS = (
    *(f"MoE {name}{passes}" for name in ("", "router ") for passes in ("forward", "forward + backward")),
    *(f"MoE {name}" for name in (*PRODUCTS, "sort", "decode")),
)


@dataclass(frozen=True)
class Layer:
    """One layer's tensors."""

    x: Tensor
    router: Tensor
    bias: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of `ops.moe.moe`."""
        return self.x, self.router, self.bias, self.gate, self.up, self.down

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.x, self.router, self.gate, self.up, self.down]

    @property
    def flops(self) -> int:
        """Of the experts, forward."""
        return 6 * self.x.shape[0] * CHOICE["top_k"] * self.gate[0].numel()

    def name(self) -> str:
        """The shape, for the table."""
        tokens, model = self.x.shape
        experts, width, _ = self.gate.shape
        return f"{tokens} tokens of {model}, {experts} experts of {width}, {CHOICE['top_k']} each"


def cases(quick: bool) -> Iterator[Case]:
    """The goal's layer, its parts unless quick, and decoding."""
    torch.manual_seed(0)
    layer = make_layer(32768, 2048, 512, 256)
    yield from layer_cases(layer)
    if not quick:
        yield from product_cases(layer)
        yield from router_cases(layer)
    for tokens in (8, 32) if quick else (1, 8, 32):
        yield decode_case(layer, tokens)


def make_layer(tokens: int, model: int, width: int, experts: int, device: str = "cuda") -> Layer:
    """Random tensors of unit variance through the layer, the router in FP32 as in training."""

    def half(*shape: int, deviation: float) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, deviation)

    router = torch.randn(experts, model, device=device) * model**-0.5
    bias = 0.01 * torch.randn(experts, device=device)
    gate, up = (half(experts, width, model, deviation=model**-0.5) for _ in range(2))
    return Layer(half(tokens, model, deviation=1), router, bias, gate, up, half(experts, model, width, deviation=width**-0.5))


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


def layer_cases(layer: Layer) -> Iterator[Case]:
    """Forward, and forward with backward for everything."""
    weights = sum(w.nbytes for w in layer.tensors[1:])
    calls = partial(moe, *layer.tensors, **CHOICE), partial(plain_pipeline, *layer.tensors)
    dout = torch.randn_like(layer.x)
    for backward in (False, True):
        ours, peer = (with_backward(call, layer.leaves, dout) if backward else without_gradients(call) for call in calls)
        for leaf in layer.leaves:
            leaf.requires_grad_(backward)
        bytes_moved = (2 * layer.x.nbytes + weights) if not backward else (5 * layer.x.nbytes + 3 * weights)
        yield Case(
            op="MoE forward + backward" if backward else "MoE forward",
            shape=layer.name(),
            ours=ours,
            peer=peer,
            peer_name="torch sort, grouped_mm x 3, index_add",
            floor=Floor(bytes=bytes_moved, flops=(3 if backward else 1) * layer.flops),
            goal=Goal(us=3e6 * layer.flops / GOAL_FLOPS_PER_S) if backward else None,
            note="517 TFLOP/s with routing and permutation" if backward else None,
        )
    for leaf in layer.leaves:
        leaf.requires_grad_(False)


def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    """The call under no_grad."""

    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def with_backward(call: Callable[[], tuple[Tensor, object]], leaves: list[Tensor], dout: Tensor) -> Callable[[], object]:
    """The call and its gradients."""
    return lambda: torch.autograd.grad(call()[0], leaves, dout)


def plain_pipeline(x: Tensor, router: Tensor, bias: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes with torch alone: router, argsort, gathered copies, three grouped products, index_add."""
    with plain_twins():
        weight, index = route(x, router, bias, **CHOICE)
    flat = index.flatten()
    order = flat.argsort(stable=True)
    ends = counts_of(flat, gate.shape[0]).cumsum(0).int()
    token = order // CHOICE["top_k"]
    rows = x[token]
    g, u = (F.grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (gate, up))
    y = F.grouped_mm(F.silu(g) * u, down.transpose(1, 2), offs=ends)
    scaled = y * weight.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add_(0, token, scaled), ends


def counts_of(flat: Tensor, experts: int) -> Tensor:
    """Tokens per expert."""
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


# ---------------------------------------------------------------------------------------------------------------------
# Its parts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Everything that the products read, for ours in sorted segments and for torch in rows without gaps."""

    s: Sorted
    weight: Tensor
    dout: Tensor
    act: Tensor
    h: Tensor
    dh: Tensor
    ends: Tensor
    rows: Tensor
    rows_dout: Tensor
    rows_act: Tensor
    rows_dh: Tensor


def make_work(layer: Layer) -> Work:
    """Inputs of all six products. Values of the copies without gaps do not matter for their time."""
    width = layer.gate.shape[1]
    with torch.no_grad():
        weight, index = route(layer.x, layer.router, layer.bias, **CHOICE)
        s = sort_tokens(index, layer.gate.shape[0])
        dout = torch.randn_like(layer.x)
        act, h = moe_ops.product("gate_up", layer.x, width)(layer.x, s, layer.gate, layer.up, keep=True)
        dh, weighted, _ = moe_ops.product("d_act", layer.x, width)(dout, weight, s, layer.down, h)
    count = index.numel()
    token = index.flatten().argsort(stable=True) // CHOICE["top_k"]
    ends = s.counts_E.cumsum(0).int()
    return Work(s, weight, dout, weighted, h, dh, ends, layer.x[token], dout[token], act[:count], dh[:count])


def products(layer: Layer, w: Work) -> dict[str, tuple[Callable[[Callable[..., object]], object], Callable[[], object], int]]:
    """By name: how to call one of our forms, torch's grouped products on copies that exist already, and FLOPs."""
    x, gate, up, down, s = layer.x, layer.gate, layer.up, layer.down, w.s
    width, one = gate.shape[1], layer.flops // 3
    dg, du = w.rows_dh[:, :width].contiguous(), w.rows_dh[:, width:].contiguous()
    mm = partial(F.grouped_mm, offs=w.ends)
    turned = [t.transpose(1, 2) for t in (gate, up, down)]
    return {
        "gate_up": (lambda f: f(x, s, gate, up, keep=True), lambda: (mm(w.rows, turned[0]), mm(w.rows, turned[1])), 2 * one),
        "down": (lambda f: f(w.act, s, down), lambda: mm(w.rows_act, turned[2]), one),
        "d_act": (lambda f: f(w.dout, w.weight, s, down, w.h), lambda: mm(w.rows_dout, down), one),
        "d_x": (lambda f: f(w.dh, s, gate, up), lambda: mm(dg, gate) + mm(du, up), 2 * one),
        "d_down": (lambda f: f(w.dout, w.act, s, down.dtype), lambda: mm(w.rows_dout.T, w.rows_act), one),
        "d_gate_up": (lambda f: f(w.dh, x, s, gate.dtype), lambda: (mm(dg.T, w.rows), mm(du.T, w.rows)), 2 * one),
    }


def product_cases(layer: Layer) -> Iterator[Case]:
    """Each product with what is fused to it (gathering, SwiGLU and its gradient) beside torch's product alone."""
    work = make_work(layer)
    for name, (call, peer, flops) in products(layer, work).items():
        yield Case(
            op=f"MoE {name}",
            shape=layer.name(),
            ours=partial(call, moe_ops.product(name, layer.x, layer.gate.shape[1])),
            peer=peer,
            peer_name="grouped_mm on sorted copies, nothing fused",
            floor=Floor(bytes=0, flops=flops),
        )


def router_cases(layer: Layer) -> Iterator[Case]:
    """Router forward and with backward, and the sorting of what it chose."""
    tokens, model = layer.x.shape
    experts = layer.router.shape[0]
    dweight = torch.randn(tokens, CHOICE["top_k"], device=layer.x.device)
    leaves = [layer.x, layer.router]
    call = partial(route, layer.x, layer.router, layer.bias, **CHOICE)
    for backward in (False, True):
        for leaf in leaves:
            leaf.requires_grad_(backward)
        ours = with_backward(call, leaves, dweight) if backward else without_gradients(call)
        yield Case(
            op="MoE router forward + backward" if backward else "MoE router forward",
            shape=f"{tokens} tokens of {model}, {experts} experts",
            ours=ours,
            peer=_plain(ours),
            peer_name="plain twin, FP32",
            # One BF16 product each; three terms of the weight forward, two of the logits' gradient backward.
            floor=Floor(
                bytes=layer.x.nbytes * (3 if backward else 1), flops=2 * tokens * model * experts * (6 if backward else 3)
            ),
        )
    for leaf in leaves:
        leaf.requires_grad_(False)
    index = call()[1]
    yield Case(
        op="MoE sort",
        shape=f"{index.numel()} entries, {experts} experts",
        ours=lambda: sort_tokens(index, experts),
        peer=lambda: (index.flatten().argsort(stable=True), counts_of(index.flatten(), experts).cumsum(0)),
        peer_name="torch argsort and counts",
        floor=Floor(bytes=index.nbytes + 2 * 4 * index.numel()),
        mode="graph",
    )


def _plain(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with plain_twins():
            return call()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# A few tokens
# ---------------------------------------------------------------------------------------------------------------------


def decode_case(layer: Layer, tokens: int) -> Case:
    """Several batches in turn, so that their experts are not all in the L2 cache; the floor counts the experts they hit."""
    batches = [layer.x[i * tokens : (i + 1) * tokens] for i in range(max(2, 64 // tokens))]
    with torch.no_grad():
        chosen = [route(x, layer.router, layer.bias, **CHOICE)[1] for x in batches]
    hit = sum(index.unique().numel() for index in chosen) / len(chosen)
    of_one = 3 * layer.gate[0].nbytes
    ours, peer = cycle(batches), cycle(batches)
    return Case(
        op="MoE decode",
        shape=f"{tokens} tokens, {hit:.1f} of {layer.gate.shape[0]} experts hit",
        ours=without_gradients(lambda: moe(next(ours), *layer.tensors[1:], **CHOICE)),
        peer=without_gradients(lambda: plain_pipeline(next(peer), *layer.tensors[1:])),
        peer_name="torch sort, grouped_mm x 3, index_add",
        floor=Floor(bytes=int(hit * of_one) + layer.router.nbytes, flops=2 * tokens * CHOICE["top_k"] * of_one // 2),
        goal=Goal(fraction=0.85),
        mode="graph",
    )

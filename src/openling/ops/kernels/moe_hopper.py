"""Grouped products over sorted rows for Hopper: gate_up with SwiGLU on the way out, down, d_x and the product of d_act.

Arguments and results are those of `kernels.moe_gemm`; how a program works: `kernels.moe_hopper_parts`.
Shared memory: 4 stages 192 KB, 4 output buffers of 8 KB, of 227 KB. M and F must be multiples of 256.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from openling.ops.kernels.moe_hopper_parts import (
    COLUMNS,
    D_ACT,
    D_X,
    DEPTH,
    DOWN,
    GATE_UP,
    RINGS,
    Ring,
    await_start,
    described,
    init_barriers,
    launch,
    load_rows,
    multiply,
    put,
    quarters,
    release_start,
    top_k,
)
from openling.ops.kernels.moe_sort import Sorted
from openling.ops.kernels.moe_swiglu import swiglu_backward


@gluon.jit
def _consume_rows(
    shared,
    KIND: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """Consumer of gate_up (SwiGLU on the way out), down, d_x and d_act."""
    a_bufs, b_bufs, out_bufs, full, empty, started, tiles, out_desc, h_desc, steps, F, across = shared
    total = gl.load(tiles) * across
    step = 0
    await_start(started, GROUP, LEAD)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tiles + 4 * (1 + t // across)
        n = t % across
        row = gl.load(line + 1) + 64 * GROUP
        live = gl.load(line + 2) > GROUP
        acc, step = multiply(
            a_bufs, b_bufs, full, empty, started, step, steps, live,
            GROUP, STAGES, LEAD, False, (KIND == GATE_UP) | (KIND == DOWN), (KIND == GATE_UP) | (KIND == D_ACT),
        )  # fmt: skip
        if live:
            c0, c1, c2, c3 = quarters(acc)
            if KIND == GATE_UP:
                column = n * 128
                put(out_desc, row, column, c0 / (1.0 + gl.exp(-c0)) * c2, out_bufs, GROUP, 0)
                put(out_desc, row, column + 64, c1 / (1.0 + gl.exp(-c1)) * c3, out_bufs, GROUP, 1)
                if KEEP:
                    put(h_desc, row, column, c0, out_bufs, GROUP, 0)
                    put(h_desc, row, column + 64, c1, out_bufs, GROUP, 1)
                    put(h_desc, row, F + column, c2, out_bufs, GROUP, 0)
                    put(h_desc, row, F + column + 64, c3, out_bufs, GROUP, 1)
            else:
                column = n * COLUMNS
                put(out_desc, row, column, c0, out_bufs, GROUP, 0)
                put(out_desc, row, column + 64, c1, out_bufs, GROUP, 1)
                put(out_desc, row, column + 128, c2, out_bufs, GROUP, 0)
                put(out_desc, row, column + 192, c3, out_bufs, GROUP, 1)
    release_start(started, step, GROUP, LEAD)
    tma.store_wait(0)


@gluon.jit
def rows_kernel(
    a, entry_R, tiles, b0, b1, out_desc, h_desc, depth, b_rows, border, across,
    KIND: gl.constexpr, K: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """gate_up, down, d_x or d_act. depth: the sum's length; b_rows: rows of one expert in the weights [E * rows, columns]."""
    dtype: gl.constexpr = b0.dtype
    GATHERED: gl.constexpr = (KIND == GATE_UP) | (KIND == D_ACT)
    B_SHAPE: gl.constexpr = [64, 256] if (KIND == D_X) | (KIND == D_ACT) else [256, 64]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [4, 64, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, started, STAGES, GATHERED)
    load = (a, entry_R, tiles, b0, b1, a_bufs, b_bufs, full, empty, depth, b_rows, border, across)
    shared = (a_bufs, b_bufs, out_bufs, full, empty, started, tiles, out_desc, h_desc, depth // DEPTH, border, across)
    gl.warp_specialize(
        [
            (load_rows, (load, KIND, K, STAGES)),
            (_consume_rows, (shared, KIND, KEEP, 0, STAGES, LEAD)),
            (_consume_rows, (shared, KIND, KEEP, 1, STAGES, LEAD)),
        ],
        [4, 4],
        [224, 224],
    )


def gate_up(x_NM: Tensor, s: Sorted, gate: Tensor, up: Tensor, *, keep: bool, ring: Ring | None = None) -> tuple[Tensor, Tensor]:
    """As `moe_gemm.gate_up`."""
    ring = ring or RINGS["gate_up"]
    _, width, model = gate.shape
    rows = s.entry_R.numel()
    act, h = x_NM.new_empty(rows, width), x_NM.new_empty(rows if keep else 0, 2 * width)
    act_desc = described(act, 64, 64)
    launch(
        rows_kernel, s.max_tiles * (width // 128), x_NM.device, x_NM, s.entry_R, s.tiles, described(gate, 128, 64),
        described(up, 128, 64), act_desc, described(h, 64, 64) if keep else act_desc, model, width, width, width // 128,
        KIND=int(GATE_UP), K=top_k(s, x_NM), KEEP=keep, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return act, h


def down(act_RF: Tensor, s: Sorted, down_EMF: Tensor, ring: Ring | None = None) -> Tensor:
    """As `moe_gemm.down`."""
    ring = ring or RINGS["down"]
    _, model, width = down_EMF.shape
    out = act_RF.new_empty(act_RF.shape[0], model)
    out_desc, weight = described(out, 64, 64), described(down_EMF, 256, 64)
    launch(
        rows_kernel, s.max_tiles * (model // 256), out.device, described(act_RF, 64, 64), s.entry_R, s.tiles, weight, weight,
        out_desc, out_desc, width, model, width, model // 256,
        KIND=int(DOWN), K=1, KEEP=False, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return out


def d_x(dh_R2F: Tensor, s: Sorted, gate: Tensor, up: Tensor, ring: Ring | None = None) -> Tensor:
    """As `moe_gemm.d_x`."""
    ring = ring or RINGS["d_x"]
    _, width, model = gate.shape
    out = dh_R2F.new_empty(dh_R2F.shape[0], model)
    out_desc = described(out, 64, 64)
    launch(
        rows_kernel, s.max_tiles * (model // 256), out.device, described(dh_R2F, 64, 64), s.entry_R, s.tiles,
        described(gate, 64, 256), described(up, 64, 256), out_desc, out_desc, 2 * width, width, width, model // 256,
        KIND=int(D_X), K=1, KEEP=False, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return out


def d_act(
    dout_NM: Tensor, weight_Nk: Tensor, s: Sorted, down_EMF: Tensor, h_R2F: Tensor, ring: Ring | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_gemm.d_act`, in two launches: p = dout D, rounded, then back through SwiGLU.

    In the output phase of one kernel, reading h and writing dh would hold the tensor cores up for as long as the product takes.
    """
    ring = ring or RINGS["d_act"]
    _, model, width = down_EMF.shape
    p = h_R2F.new_empty(s.entry_R.numel(), width)
    p_desc, weight = described(p, 64, 64), described(down_EMF, 64, 256)
    launch(
        rows_kernel, s.max_tiles * (width // 256), p.device, dout_NM, s.entry_R, s.tiles, weight, weight, p_desc, p_desc,
        model, model, model, width // 256,
        KIND=int(D_ACT), K=top_k(s, dout_NM), KEEP=False, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return swiglu_backward(p, weight_Nk, s, h_R2F)

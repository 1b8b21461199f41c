"""Predicted time of a step: FLOPs at the matrix rate, bytes at the memory rate, communication at the links' rates.

A block's products take the longer of their FLOPs and their weights' bytes; norms, rotations, gates and the Lightning scan are
bound by memory. Backward: twice a product's FLOPs, 2.5 times attention's, 3 scans for Lightning's one, twice the other bytes,
and forward again where it is recomputed. Gathering weights hides behind the same block's compute, everything inside a layer does
not. Stages run one forward, one backward: (micro-batches + stages - 1) x the slowest stage. Kernel launches, imbalance of
experts, stragglers, loading data and checkpoints are left out: a bound from below, not a promise.

Letters as in `activations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from openling.model import count
from openling.model.config import ModelConfig
from openling.plan.devices import Device
from openling.plan.placement import Inventory, Kind
from openling.plan.setup import Setup, Stage, stages
from openling.plan.traffic import Flow, teacher_traffic, traffic

PARTS = (
    "matrix products", "experts", "attention", "Lightning", "norms, gates, RoPE", "LM head and loss", "expert all-to-all",
    "tensor collectives", "context collectives", "weights and gradients", "pipeline bubble", "optimiser", "teacher",
)  # fmt: skip
COMMUNICATION = {"expert": "expert all-to-all", "tensor": "tensor collectives", "context": "context collectives"}


@dataclass(frozen=True)
class Work:
    """Forward work of a layer on one rank and micro-batch: FLOPs by rate, bytes of memory."""

    products: float
    attention: float
    lightning: float
    experts: float
    weights: float
    expert_weights: float
    scan_bytes: float
    stream_bytes: float


@dataclass
class StepTime:
    """Seconds of a step by part, its stages' seconds per micro-batch, and what follows from them."""

    parts: dict[str, float]
    stage_seconds: list[float]
    flows: list[Flow] = field(default_factory=list)
    slowest: int = 0

    @property
    def seconds(self) -> float:
        """Of one optimiser step."""
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def work(c: ModelConfig, layer: int, setup: Setup) -> Work:
    """Forward work of one layer. Attention at the mean of a whole causal sequence: half of seq_len on one rank."""
    M, H, D, kind = c.hidden_size, c.num_attention_heads, c.head_dim, c.layer_kind(layer)
    t, N = setup.mesh.tensor, setup.rows.total
    keys = setup.seq_len * (1 - 0.5 / setup.mesh.context)  # of the last context rank's mean query, which reads most
    mixer = count.size([s for s in count.mixer_shapes(c, kind) if len(s) > 1])
    shapes = [s for s in count.feed_forward_shapes(c, layer, active=True) if len(s) > 1]
    experts = count.size([s for s in shapes if len(s) == 3])
    mlp = count.size(shapes) - experts
    joining = 2 * M * M if layer >= c.num_hidden_layers else 0
    attention = scan = 0.0
    stream = 9.0 * M  # norm, add and norm, add
    width = H * D
    if kind == "lightning":
        scan = 4.0 * width
        stream += 7 * width / t
    elif kind == "gqa":
        attention = 4 * width * keys
        stream += 2 * (H + c.num_key_value_heads) * D / t
    else:
        attention = 2 * H * (c.qk_head_dim + (c.v_head_dim or 0)) * keys
        up = H * ((c.qk_nope_head_dim or 0) + (c.v_head_dim or 0))
        stream += (3 * H * c.qk_head_dim + up) / t + 2 * ((c.q_lora_rank or 0) + (c.kv_lora_rank or 0))
    if c.is_moe(layer):
        stream += 3 * c.moe_shared_expert_intermediate_size / t + (c.num_experts_per_tok + 4) * M
    else:
        stream += 3 * c.intermediate_size / t
    recurrence = 4 * width * (D + count.LIGHTNING_CHUNK) if kind == "lightning" else 0
    return Work(
        products=2 * N * (mixer + mlp + joining) / t,
        attention=N * attention / t,
        lightning=N * recurrence / t,
        experts=2 * N * experts / t,
        weights=2 * (mixer + mlp + joining) / t,
        expert_weights=6 * c.num_experts / setup.mesh.expert * c.moe_intermediate_size * M / t if c.is_moe(layer) else 0,
        scan_bytes=2 * N * scan / t,
        stream_bytes=2 * N * stream,
    )


def layer_seconds(c: ModelConfig, layer: int, setup: Setup) -> dict[str, float]:
    """Compute of one layer, forward and backward and what is recomputed, of one micro-batch, by part."""
    w, d, policy = work(c, layer, setup), setup.device, setup.recompute
    once = forward_seconds(w, d)
    kept = 2.0 if policy == "layer" else 1.0  # forward passes of what "selective" keeps: products and attention
    ours = 1.0 if policy == "none" else 2.0  # and of our kernels
    passes = {
        "matrix products": kept + 2,
        "experts": ours + 2,
        "attention": kept + 2.5,
        "Lightning": ours + 3,
        "norms, gates, RoPE": ours + 2,
    }
    return {part: seconds * passes[part] for part, seconds in once.items()}


def forward_seconds(w: Work, d: Device) -> dict[str, float]:
    """One forward pass of one layer and micro-batch, by part."""
    return {
        "matrix products": max(w.products / d.matmul, w.weights / d.bandwidth),
        "experts": max(w.experts / d.matmul / d.grouped, w.expert_weights / d.bandwidth),
        "attention": w.attention / d.matmul / d.attention,
        "Lightning": max(w.lightning / d.matmul, w.scan_bytes / d.bandwidth),
        "norms, gates, RoPE": w.stream_bytes / d.bandwidth,
    }


def head_seconds(c: ModelConfig, setup: Setup) -> float:
    """LM head and loss of one micro-batch, MTP layers included: three products, and the logits read and written twice."""
    heads, t, N, d = 1 + c.num_nextn_predict_layers, setup.mesh.tensor, setup.rows.total, setup.device
    product = 2 * N * c.vocab_size * c.hidden_size / t / d.matmul
    return heads * (3 * product + 4 * 2 * N * c.vocab_size / t / d.bandwidth)


def optimiser_seconds(c: ModelConfig, stage: Stage, setup: Setup) -> float:
    """AdamW reads and writes seven FP32 values per parameter, clipping reads one. Muon: five Newton-Schulz steps besides.

    Every rank iterates each matrix whole (`parallel.matrices`), of experts those that it holds: 5 (4 m^2 n + 2 m^3) FLOPs for
    m <= n.
    """
    local = sum(b.local for b in stage.blocks.values())
    seconds = 8 * 4 * local / setup.device.bandwidth
    if setup.optimizer == "muon":
        flops = 0.0
        for layer in stage.layers:
            mixer = count.mixer_shapes(c, c.layer_kind(layer))
            shapes = [s for s in [*mixer, *count.feed_forward_shapes(c, layer)] if len(s) > 1]
            for *lead, rows, columns in shapes:
                m, n = sorted((rows, columns))
                held = -(-lead[0] // (setup.mesh.expert * setup.mesh.expert_fsdp)) if lead else 1
                flops += held * 5 * (4 * m * m * n + 2 * m**3)
        seconds += flops / setup.device.matmul
    return seconds


def predict(inv: Inventory, setup: Setup, known: dict[object, dict[str, float]] | None = None) -> StepTime:
    """The step's time, part by part, on the slowest stage. known: seconds of layers that earlier calls have worked out."""
    c, m = inv.config, setup.micro_batches
    known = {} if known is None else known
    all_stages = stages(inv, setup)
    by_like = {stage.index: _stage_seconds(inv, setup, stage, known) for stage in all_stages if stage.like == stage.index}
    found = [by_like[stage.like] for stage in all_stages]
    totals = [sum(parts.values()) for parts, _, _ in found]
    slowest = max(range(len(totals)), key=lambda i: totals[i])
    parts, flows, stage = found[slowest]
    result = {name: parts.get(name, 0.0) * m for name in PARTS}
    result["pipeline bubble"] = (setup.mesh.pipeline - 1) * totals[slowest]
    result["optimiser"] = optimiser_seconds(c, stage, setup)
    result["weights and gradients"] += sum(f.seconds for f in flows if f.when == "once")
    result["teacher"], sent = _teacher_seconds(setup)
    return StepTime(result, totals, flows + sent, slowest)


def _teacher_seconds(setup: Setup) -> tuple[float, list[Flow]]:
    """A teacher's forward passes of a step, which hide the gathering of its weights, and what they send."""
    if (teacher := setup.teacher) is None:
        return 0.0, []
    c, flows = teacher.inventory.config, teacher_traffic(teacher, setup)
    layers = [(number, work(c, first, setup)) for first, number in teacher.kinds().values()]
    computing = sum(number * sum(forward_seconds(w, setup.device).values()) for number, w in layers)
    head = 2 * setup.rows.total * c.vocab_size * c.hidden_size / setup.mesh.tensor / setup.device.matmul * teacher.logits
    hidden, exposed = (sum(f.seconds for f in flows if f.when == when) for when in ("hidden", "exposed"))
    return max(setup.micro_batches * (computing + head), hidden) + exposed, flows


def _stage_seconds(
    inv: Inventory, setup: Setup, stage: Stage, known: dict[object, dict[str, float]]
) -> tuple[dict[str, float], list[Flow], Stage]:
    """One micro-batch on one stage: compute by part, exposed communication, and what weights' traffic outlasts its block."""
    c, m = inv.config, setup.micro_batches
    flows = traffic(c, setup, stage)
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    hidden: dict[Kind | None, float] = {}
    for flow in flows:
        if flow.when == "exposed":
            parts[COMMUNICATION[flow.axis]] += flow.seconds / m
        elif flow.when == "hidden" and flow.collective != "send":
            hidden[flow.kind] = hidden.get(flow.kind, 0.0) + flow.seconds / m
    for kind, (first, number) in stage.kinds.items():
        key = (kind, setup.rows, setup.cut, setup.recompute)
        if key not in known:
            known[key] = layer_seconds(c, first, setup)
        for name, value in known[key].items():
            parts[name] += number * value
        parts["weights and gradients"] += max(0.0, hidden.get(kind, 0.0) - number * sum(known[key].values()))
    head = head_seconds(c, setup) if stage.last else 0.0
    parts["LM head and loss"] += head
    parts["weights and gradients"] += max(0.0, hidden.get(None, 0.0) - head)
    return parts, flows, stage

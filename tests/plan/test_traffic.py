"""What ranks send: against sums by hand, and against what training's own parts send on fake ranks."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from fake_world import fake_ranks
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from openling.config.presets import PRESETS
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.ops.loss import head_loss
from openling.parallel.apply import apply, inside
from openling.parallel.matrices import matrices
from openling.parallel.mesh import Axes, build
from openling.plan.devices import DEVICES, device
from openling.plan.memory import memory
from openling.plan.mesh import GATHERS, Mesh
from openling.plan.placement import inventory
from openling.plan.setup import Followed, Setup, Stage, stages
from openling.plan.traffic import seconds, teacher_traffic, traffic
from openling.train.optim import in_muon


def preset(name: str, **changes) -> ModelConfig:
    return read_config(PRESETS[name]()).replace(**changes)


def setup(mesh: Mesh, *, seq_len: int = 4096, batches: int = 4, **options) -> Setup:
    tokens = seq_len * mesh.data * batches * options.get("micro_batch", 1)
    return Setup(mesh, device("h100"), seq_len, tokens, **options)


def flows(c: ModelConfig, job: Setup) -> dict[str, float]:
    found: dict[str, float] = {}
    for f in traffic(c, job, stages(inventory(c), job)[0]):
        found[f"{f.axis}: {f.what}"] = found.get(f"{f.axis}: {f.what}", 0.0) + f.bytes * f.calls
    return found


def test_bytes_by_hand():
    """Tiny model, 4 shards and 2 tensor ranks; 8 experts over 2 ranks, two micro-batches of 64 tokens."""
    c, mesh = preset("tiny", num_nextn_predict_layers=0, n_group=1, topk_group=1), Mesh(shard=4, tensor=2, expert=2)
    found = flows(c, setup(mesh, seq_len=64, batches=2, recompute="none"))
    experts = 7 * 8 * 3 * 64 * 32 // 2 // 2  # values of all seven expert layers on an expert and tensor rank
    assert found["shard of experts: weights of experts, BF16"] == 2 * experts * (1 / 2) * 2 * 2  # bytes, (g-1)/g, passes, m
    assert found["shard of experts: gradients of experts, FP32"] == 4 * experts * (1 / 2) * 2
    # 2 of 8 experts: both ranks with chance 1/2, so 1.5 copies; 64 values of 2 bytes, and half of 2 weights and 2 indices of 12.
    rows = 64 * 1.5 * (64 * 2 + 12)
    assert found["expert: rows to their experts and back, BF16"] == rows / 2 * 4 * 7 * 2  # to, back, and both again; layers; m
    # An all-reduce of two ranks receives as much as it reduces. One dense layer, seven with routed and shared experts.
    assert found["tensor: outputs and gradients of inputs, BF16"] == 64 * 64 * 2 * (2 + 7 * 3) * 2 * 2
    assert "context: Lightning states, FP32" not in found


class Collectives(TorchDispatchMode):
    """Bytes of the whole buffers that go through each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = {"_allgather_base_": ("all-gather", 0), "_reduce_scatter_base_": ("reduce-scatter", 1)}
        if func.namespace == "c10d" and func._opname in names:
            name, whole = names[func._opname]
            self.bytes[name] += args[whole].nbytes
        if func.namespace == "c10d" and func._opname == "allreduce_":
            self.bytes["all-reduce"] += sum(x.nbytes for x in args[0])
        return func(*args, **(kwargs or {}))


def planned_buffers(c: ModelConfig, job: Setup, stage: Stage) -> dict[str, float]:
    """Bytes of whole buffers that collectives between data ranks are planned to move."""
    found = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    for f in traffic(c, job, stage):
        if f.collective in found:
            size = {"replicate": job.mesh.replicate, "data ranks": job.mesh.all_data}.get(f.axis, job.mesh.shard)
            found[f.collective] += f.bytes * f.calls * size / (size - 1) / (2 if f.collective == "all-reduce" else 1)
    return found


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("replicate", [1, 2])
@pytest.mark.parametrize("gather", GATHERS)
def test_training_sends_what_is_planned(tie, replicate, gather):
    """Three micro-batches of a real model as `parallel.apply` leaves it on eight fake ranks, whose collectives do nothing."""
    c = preset("tiny", num_nextn_predict_layers=0, moe_layers=(), num_experts=0, tie_word_embeddings=tie)
    job = setup(Mesh(replicate=replicate, shard=8 // replicate), seq_len=64, batches=3, gather=gather)
    with fake_ranks(8):
        mesh = build(Axes(data_replicate=replicate), c, "cpu")
        parallel = apply(Ling(c), mesh, model_dtype=torch.bfloat16, gather=gather)
        held = parallel.held(dict(parallel.model.named_parameters()))
        ids = torch.zeros(1, 64, dtype=torch.long)
        with Collectives() as found, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in range(3):
                parallel.last_of_step(part == 2)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = parallel.run(lambda: head_loss(parallel.model.model(ids), parallel.model.lm_head.weight, ids).loss)
                loss.backward()
            parallel.clip(held, 1.0)
    found.bytes["all-reduce"] -= 4  # the norm
    # Nothing is padded: every dim 0 of this model is a multiple of 8.
    assert found.bytes == planned_buffers(c, job, stages(inventory(c), job)[0])


@pytest.mark.parametrize("kinds", [("gqa",) * 8, ("lightning",) * 7 + ("mla",)])
@pytest.mark.parametrize("gather", GATHERS)
def test_a_teacher_sends_and_holds_what_is_planned(gather, kinds):
    """Two steps of two micro-batches, as `train.teacher` and `train.objective` go: embeddings and head stay after the first."""
    student = preset("tiny", num_nextn_predict_layers=0, moe_layers=(), num_experts=0)
    c = student.replace(layer_kinds=kinds, intermediate_size=2 * student.intermediate_size)
    followed = Followed(inventory(c))
    job = setup(Mesh(shard=8), seq_len=64, batches=2, gather=gather, teacher=followed)
    with fake_ranks(8):
        parallel = apply(Ling(c), build(Axes(), c, "cpu"), model_dtype=torch.bfloat16)
        model, ids, steps = parallel.model.eval(), torch.zeros(1, 64, dtype=torch.long), []
        local = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())
        for _ in range(2):
            with Collectives() as found, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                for _ in range(2):
                    head = inside(model, lambda: (model.model(ids), model.lm_head.weight))[1]
            steps.append(found.bytes)
    assert head.shape == (c.vocab_size, c.hidden_size)
    flow = [f for f in teacher_traffic(followed, job) if f.axis == "shard"]
    assert steps[1] == {"all-gather": sum(f.bytes * f.calls * 8 / 7 for f in flow), "reduce-scatter": 0, "all-reduce": 0}
    parts = {p.what: p.bytes for p in memory(inventory(student), job)[0].parts if p.kind == "teacher"}
    assert parts["embeddings and head, FP32, whole from the first step on"] == steps[0]["all-gather"] - steps[1]["all-gather"]
    assert parts["weights, FP32, sharded as the student's"] == local


@pytest.mark.parametrize(("logits", "align"), [(True, False), (False, True), (True, True)])
def test_what_the_loss_has_of_a_teacher(logits, align):
    """By hand, with words enough for the loss to be the fullest moment: 2 x 64 tokens of 64 numbers, eight layers."""
    c = preset("tiny", num_nextn_predict_layers=0, vocab_size=100_000)
    job = setup(Mesh(), seq_len=64, micro_batch=2, teacher=Followed(inventory(c), logits, align))
    parts = {p.what: p.bytes for p in memory(inventory(c), job)[0].parts if p.kind == "teacher"}
    assert parts["hidden states, BF16"] == 2 * 64 * 64 * 2 * (9 if align else 1)
    assert parts["the LM head in BF16"] == 100_000 * 64 * 2
    assert parts.get("a chunk of logits, BF16", 0) == (2 * 64 * 100_000 * 2 if logits else 0)


def test_collectives_inside_a_teachers_layers_run_once_where_a_students_run_twice():
    c = preset("tiny", num_nextn_predict_layers=0, n_group=1, topk_group=1)
    mesh = Mesh(shard=2, context=2, tensor=2, expert=2)
    job = setup(mesh, batches=3, recompute="none", teacher=Followed(inventory(c)))
    own = {f.what: f.calls for f in traffic(c, job, stages(inventory(c), job)[0]) if f.when == "exposed"}
    theirs = {f.what.removeprefix("teacher: "): f.calls for f in teacher_traffic(job.teacher, job) if f.when == "exposed"}
    twice = ["outputs and gradients of inputs, BF16", "rows to their experts and back, BF16", "Lightning states, FP32"]
    assert {what: theirs[what] for what in twice} == {what: own[what] / 2 for what in twice}
    assert theirs["latents, BF16"] == own["latents, BF16"] and not any(what.startswith("gradients of") for what in theirs)


def test_muon_gathers_what_is_planned():
    """Every matrix once in BF16 by `parallel.matrices` itself, experts' over tensor ranks alone."""
    c, mesh = preset("tiny"), Mesh(shard=4, tensor=2, expert=2)
    with fake_ranks(8):
        parallel = apply(Ling(c), build(Axes(tensor=2, expert=2), c, "cpu"), model_dtype=torch.bfloat16)
        held = {n: p for n, p in parallel.held(dict(parallel.model.named_parameters())).items() if in_muon(n, p)}
        with Collectives() as found:
            for p, matrix in matrices(parallel, held).items():
                matrix.whole(torch.zeros_like(p, dtype=torch.bfloat16))
    job = setup(mesh, seq_len=64, batches=1, optimizer="muon")
    planned = [f for f in traffic(c, job, stages(inventory(c), job)[0]) if "Muon" in f.what]
    sizes = {"shard": 4, "tensor": 2}
    assert found.bytes["all-gather"] == sum(f.bytes * f.calls * sizes[f.axis] / (sizes[f.axis] - 1) for f in planned)


@dataclass
class Part:
    """A micro-batch as a pipeline's stages read it."""

    ids_BT: torch.Tensor  # noqa: N815
    cu_seqlens: None = None
    memory: None = None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_pipeline_sends_and_keeps_buffers_as_planned(index, monkeypatch):
    """Five micro-batches of a real stage of three, its neighbours fake: FSDP's traffic, and buffers of what is received."""

    def told(schedule, stages, has_backward, done):
        """The stages' vote, which fake neighbours cannot take part in: shapes are told, not tried out."""
        for one in stages:
            assert not InferenceMode.needs_dynamic(one._user_meta, has_backward)
            one._inference_mode = InferenceMode.STATIC

    monkeypatch.setattr(Schedule1F1B, "_warmup_p2p", told)
    c = preset("tiny", num_nextn_predict_layers=0, moe_layers=(), num_experts=0)
    job = setup(Mesh(pipeline=3, shard=4), seq_len=64, batches=5, gather="accumulate")
    stage = stages(inventory(c), job)[index]
    with fake_ranks(12, index * 4):
        parallel = apply(Ling(c), build(Axes(pipeline=3), c, "cpu"), model_dtype=torch.bfloat16, seq_len=64)
        pipeline = parallel.pipeline
        with Collectives() as found, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autocast("cpu", torch.bfloat16):
                batches = [Part(torch.zeros(1, 64, dtype=torch.long)) for _ in range(5)]
                pipeline.step(batches, lambda number, h: (parallel.model.lm_head(h).float().sum(), torch.zeros(1)), 1)
        real = pipeline._known[1]._stage
        received = [r for table in (real.args_recv_info, real.grad_recv_info) for infos in table.values() for r in infos]
        buffers = sum(r.buffer.nbytes for r in received if r.buffer is not None)
    planned, sent = planned_buffers(c, job, stage), found.bytes
    del planned["all-reduce"], sent["all-reduce"]  # of `Parallel.clip`, which is not called here
    assert sent == planned
    parts = {p.what: p.bytes for p in memory(inventory(c), job)[index].parts}
    # Off the GPU the residual stream is FP32: twice the bytes.
    assert buffers == 2 * parts["buffers of all micro-batches from neighbour stages, BF16"]


def test_context_ranks_exchange_states_and_latents():
    c = preset("ling-2.6-1t", num_nextn_predict_layers=0)
    found = flows(c, setup(Mesh(context=8, shard=2), seq_len=32768, batches=1, recompute="none"))
    # The published size: 64 heads x 64 KiB = 4 MiB per layer, sequence and rank; 7 other ranks; forward and backward; 70 layers.
    assert found["context: Lightning states, FP32"] == 7 * 4 * 2**20 * 2 * 70
    # 1152 bytes per token (512 + 64 values in BF16) of the other ranks' tokens; 10 MLA layers.
    assert found["context: latents, BF16"] == 1152 * 32768 * 7 / 8 * 10


def test_gathering_and_reducing_once_per_step_save_traffic_and_cost_memory():
    c, mesh = preset("ling-2.6-flash"), Mesh(shard=64, expert=8)
    layer, accumulate, step = (flows(c, setup(mesh, batches=16, gather=gather)) for gather in GATHERS)
    weights, gradients = "shard of experts: weights of experts, BF16", "shard of experts: gradients of experts, FP32"
    assert layer[weights] == accumulate[weights] == 2 * 16 * step[weights]
    assert layer[gradients] == 16 * accumulate[gradients] == 16 * step[gradients]
    inv = inventory(c)
    kinds = [memory(inv, setup(mesh, batches=16, gather=gather))[0].by_kind() for gather in GATHERS]
    assert kinds[0]["gradients"] < kinds[1]["gradients"] == kinds[2]["gradients"]
    assert kinds[0]["gathered weights"] == kinds[1]["gathered weights"] < kinds[2]["gathered weights"]


def test_links():
    gpu, whole = DEVICES["h100"], 1e9
    # Inside a node: 7/8 of the buffer over NVLink. Over 16 nodes: 15/16 through the eight network cards of each.
    assert seconds(gpu, Mesh(shard=8), "fsdp", "all-gather", whole) == pytest.approx(whole * 7 / 8 / gpu.nvlink)
    assert seconds(gpu, Mesh(shard=128), "fsdp", "all-gather", whole) == pytest.approx(whole * 15 / 16 / 8 / gpu.network)
    # One member per node (the others of the node belong to other groups): its own card only.
    assert seconds(gpu, Mesh(shard=4, tensor=8), "fsdp", "all-gather", whole) == pytest.approx(whole * 3 / 4 / gpu.network)
    assert seconds(gpu, Mesh(shard=16, expert=16), "expert", "all-to-all", whole) == pytest.approx(whole / 2 / gpu.network)
    assert seconds(gpu, Mesh(shard=16), "tensor", "all-gather", whole) == 0
    assert seconds(gpu, Mesh(tensor=8), "tensor", "all-reduce", whole) == pytest.approx(2 * whole * 7 / 8 / gpu.nvlink)

"""Meshes and placements against the real model: optimiser states of real steps, and `parallel.apply` on fake ranks."""

import math

import pytest
import torch
from fake_world import fake_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.model import count
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.parallel.apply import Parallel, apply
from openling.parallel.mesh import Axes, build
from openling.plan.devices import device
from openling.plan.memory import memory
from openling.plan.mesh import Mesh, check, meshes, parse_mesh
from openling.plan.placement import inventory, is_muon
from openling.plan.setup import Setup, Stage, stages
from openling.plan.stages import layer_costs


def preset(name: str, **changes) -> ModelConfig:
    return read_config(PRESETS[name]()).replace(**changes)


def parts_of(c: ModelConfig, mesh: Mesh | None = None, **options) -> dict[str, int]:
    """Bytes of the last stage by what they are."""
    setup = Setup(mesh or Mesh(), device("h100"), 64, 64 * (mesh.data if mesh else 1), **options)
    return {part.what: part.bytes for part in memory(inventory(c), setup)[-1].parts}


# ---------------------------------------------------------------------------------------------------------------------
# One rank: exactly what a real model and a real optimiser hold
# ---------------------------------------------------------------------------------------------------------------------


def stepped(c: ModelConfig, make) -> tuple[Ling, list[torch.optim.Optimizer]]:
    model = Ling(c)
    optimizers = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def state_bytes(optimizer: torch.optim.Optimizer, *names: str) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name in names)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"moe_layers": (), "num_experts": 0}])
def test_parameters_gradients_and_adamw_states_to_the_byte(changes):
    c = preset("tiny", **changes)
    model, (adamw,) = stepped(c, lambda model: [torch.optim.AdamW(model.parameters())])
    parts = parts_of(c)
    assert parts["master weights of matrices, FP32, sharded"] + parts["vectors and routers, FP32, on every rank"] == sum(
        p.nbytes for p in model.parameters()
    )
    assert parts["FP32, sharded"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert parts["AdamW: exp_avg, FP32"] == state_bytes(adamw, "exp_avg")
    assert parts["AdamW: exp_avg_sq, FP32"] == state_bytes(adamw, "exp_avg_sq")
    assert parts["AdamW: step numbers, FP32"] == state_bytes(adamw, "step")
    buffers = sum(b.nbytes for b in model.buffers())
    assert parts.get("router bias, FP32, on every rank", 0) == buffers


def test_muon_states_to_the_byte():
    """On a dense model: torch's Muon takes 2-D matrices only."""
    c = preset("tiny", moe_layers=(), num_experts=0)
    chosen = {t.name for t in inventory(c).tensors if is_muon(t)}
    assert {"model.layers.0.attention.dense.weight", "model.layers.3.attention.kv_b_proj.weight"} <= chosen
    assert not chosen & {"lm_head.weight", "model.word_embeddings.weight", "model.norm.weight"}

    def make(model: Ling) -> list[torch.optim.Optimizer]:
        named = dict(model.named_parameters())
        muon = torch.optim.Muon([p for n, p in named.items() if n in chosen])
        return [muon, torch.optim.AdamW([p for n, p in named.items() if n not in chosen])]

    _, (muon, adamw) = stepped(c, make)
    parts = parts_of(c, optimizer="muon")
    assert parts["Muon: momentum of matrices, FP32"] == state_bytes(muon, "momentum_buffer")
    assert parts["AdamW: exp_avg, FP32"] == state_bytes(adamw, "exp_avg")
    assert parts["AdamW: step numbers, FP32"] == state_bytes(adamw, "step")


# ---------------------------------------------------------------------------------------------------------------------
# Many ranks
# ---------------------------------------------------------------------------------------------------------------------


def applied(c: ModelConfig, mesh: Mesh) -> Parallel:
    """The model as training places it on this rank, on the meta device."""
    axes = Axes(mesh.pipeline, mesh.replicate, mesh.shard, mesh.context, mesh.tensor, mesh.expert)
    with torch.device("meta"):
        model = Ling(c)
    return apply(model, build(axes, c, "cpu"), model_dtype=torch.bfloat16, seq_len=4096)


def real_places(model: Ling) -> dict[str, tuple[int, ...]]:
    """Shapes of this rank's parts of every parameter."""
    return {n: tuple((p.to_local() if isinstance(p, DTensor) else p).shape) for n, p in model.named_parameters()}


def gathered_places(parallel: Parallel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Whole shape and dtype of what FSDP gathers."""
    roots = [parallel.model, *(parallel.pipeline.stages if parallel.pipeline else [])]
    modules = {m for root in roots for m in root.modules() if isinstance(m, FSDPModule)}
    found = {}
    for group in filter(None, (fully_shard.state(m)._fsdp_param_group for m in modules)):
        for one in group.fsdp_params:
            found[one.sharded_param] = (tuple(one._orig_size), one.mp_policy.param_dtype or one.sharded_param.dtype)
    return {n: found[p] for n, p in parallel.model.named_parameters() if p in found}


SMALL = [
    Mesh(shard=8),
    Mesh(replicate=2, shard=4),
    Mesh(replicate=4),
    Mesh(shard=6, tensor=2, expert=2),
    Mesh(shard=2, context=2, tensor=2, expert=4),
    Mesh(shard=8, expert=8),
    Mesh(replicate=2, shard=4, context=2, expert=2),
    Mesh(tensor=2),
    Mesh(pipeline=2, shard=4, expert=2),
    Mesh(pipeline=4, replicate=2, tensor=2),
    Mesh(pipeline=3),
]
LARGE = [Mesh(shard=2048, expert=64), Mesh(pipeline=16, shard=64, tensor=2, expert=16), Mesh(pipeline=8, shard=64, context=4)]


@pytest.mark.parametrize(("name", "mesh"), [*(("tiny", m) for m in SMALL), *(("ling-2.6-1t", m) for m in LARGE)], ids=str)
def test_places_are_those_that_training_makes(name, mesh):
    """Every tensor of the whole model as `parallel.apply` itself places it; the first rank of every stage is the fullest."""
    c = preset(name)
    inv = inventory(c)
    planned = stages(inv, Setup(mesh, device("h100"), 4096, 4096 * mesh.data * mesh.pipeline))
    for stage in planned if name == "tiny" else (planned[0], planned[-1]):
        with fake_ranks(mesh.world, stage.index * mesh.world // mesh.pipeline):
            parallel = applied(c, mesh)
            real, gathered = real_places(parallel.model), gathered_places(parallel)
            buffers = {n: tuple(b.shape) for n, b in parallel.model.named_buffers()}
        here = {t.name: t for t in inv.tensors if t.layer in stage.layers or (t.layer is None and outer(t.name, stage))}
        assert real == {n: t.local(mesh) for n, t in here.items() if not t.buffer}
        assert buffers == {n: t.local(mesh) for n, t in here.items() if t.buffer}
        assert sum(map(math.prod, real.values())) == sum(b.local for b in stage.blocks.values())
        wide = {n: torch.bfloat16 if t.layer is not None else torch.float32 for n, t in here.items()}
        expected = {n: (t.whole(mesh), wide[n]) for n, t in here.items() if not t.apart} if mesh.all_data > 1 else {}
        assert gathered == expected


def outer(name: str, stage: Stage) -> bool:
    """Whether a tensor outside the layers is planned for the stage."""
    return ("embeddings" if "word_embeddings" in name else "head") in stage.blocks


@pytest.mark.parametrize("name", ["ling-2.6-flash", "ling-1t", "tiny"])
@pytest.mark.parametrize(
    "text", ["shard=4,tensor=2,expert=4", "shard=2,context=2,tensor=2", "shard=8,expert=4", "replicate=2,shard=4"]
)
def test_every_tensor_has_a_place_and_none_is_lost(name, text):
    c, mesh = preset(name), parse_mesh(text, 8)
    inv = inventory(c)
    parameters = [t for t in inv.tensors if not t.buffer]
    assert sum(math.prod(t.shape) for t in parameters) == count.total_parameters(c, mtp=True)
    for t in parameters:
        ranks = t.shards(mesh) * (mesh.tensor if t.row.tensor is not None else 1) * (mesh.expert if t.row.expert else 1)
        assert math.prod(t.local(mesh)) * ranks >= math.prod(t.shape), t.name
        # Nor does the fullest rank hold more than a full part of every cut, rounded up.
        cuts = [-(-a // b) for a, b in zip(t.shape, t.local(mesh), strict=True)]
        assert math.prod(cuts) * 2 > ranks or min(t.shape) < ranks, t.name


@pytest.mark.parametrize("name", ["ling-2.6-1t", "ling-2.6-flash", "smollm2-135m"])
@pytest.mark.parametrize("stages", [1, 2, 3, 8, 30])
def test_stages_are_runs_of_layers_that_cost_alike(name, stages):
    inv = inventory(preset(name))
    runs = inv.stages(stages, 4096)
    assert [i for run in runs for i in run] == list(range(inv.layers))
    assert len(runs) == stages and all(runs)
    costs = layer_costs(inv.config, 4096)
    sums = [sum(costs[i] for i in run if i < len(costs)) for run in runs]
    # No worse than one layer above the mean, or one layer that is dearer by itself (the last, with head and MTP).
    assert max(sums) <= max(sum(costs) / stages + max(costs[:-1]), costs[-1]) * 1.0001


# ---------------------------------------------------------------------------------------------------------------------
# Meshes that cannot be
# ---------------------------------------------------------------------------------------------------------------------


def test_parsing():
    assert parse_mesh("shard=256,expert=64,pipeline=8", 2048) == Mesh(pipeline=8, shard=256, expert=64)
    assert parse_mesh("tensor=4, pipeline=8", 64) == Mesh(pipeline=8, shard=2, tensor=4)  # shard takes what remains
    assert parse_mesh("", 4) == Mesh(shard=4)
    assert parse_mesh("data_shard=2,data_replicate=4", 8) == Mesh(replicate=4, shard=2)
    assert str(Mesh(pipeline=2, shard=3)) == "pipeline=2,shard=3"


@pytest.mark.parametrize(
    ("text", "where", "nearest"),
    [
        ("tensr=2", "--mesh", "tensor"),
        ("tensor", "--mesh tensor", None),
        ("tensor=0", "--mesh tensor", None),
        ("tensor=-2", "--mesh tensor", None),
        ("tensor=x", "--mesh tensor", None),
        ("tensor=2,tensor=2", "--mesh tensor", None),
        ("shard=3", "--mesh", "shard=8"),
        ("shard=4,tensor=4", "--mesh", "shard=2"),
        ("tensor=3", "--mesh", None),
    ],
)
def test_mistakes_in_a_mesh(text, where, nearest):
    with pytest.raises(UserError) as caught:
        parse_mesh(text, 8)
    assert (caught.value.parts["where"], caught.value.parts["nearest"]) == (where, nearest)


def test_flags_are_shown_as_they_are_typed():
    with pytest.raises(UserError, match="not to --world 2048"):
        parse_mesh("shard=4", 2048)


@pytest.mark.parametrize(
    ("name", "mesh", "axis", "nearest"),
    [
        ("ling-2.6-1t", Mesh(tensor=16), "tensor", "tensor=8"),  # 64 heads divide, 8 norm groups do not
        ("ling-1t", Mesh(tensor=16), "tensor", "tensor=8"),  # 8 key/value heads
        ("ling-2.6-1t", Mesh(shard=24, expert=24), "expert", "expert=32"),
        ("ling-2.6-1t", Mesh(shard=2, tensor=4, expert=8), "expert", "expert=2"),
        ("ling-2.6-1t", Mesh(shard=4, expert=8), "expert", "expert=4"),
        ("ling-2.6-1t", Mesh(pipeline=128), "pipeline", "pipeline=80"),
        ("ling-2.6-1t", Mesh(context=5000), "context", "context=4096"),
        ("smollm2-135m", Mesh(shard=2, expert=2), "expert", "expert=1"),
    ],
)
def test_meshes_that_do_not_divide_name_the_axis_and_the_nearest_degree(name, mesh, axis, nearest):
    with pytest.raises(UserError) as caught:
        check(preset(name), mesh, seq_len=4096)
    assert (caught.value.parts["where"], caught.value.parts["nearest"]) == (f"--mesh {axis}", nearest)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 96), st.sampled_from(["tiny", "ling-2.6-flash", "smollm2-135m"]))
def test_every_mesh_of_a_search_is_whole_and_divides(world, name):
    c = preset(name)
    for mesh in meshes(c, world, seq_len=4096, node=8):
        assert mesh.world == world
        check(c, mesh, seq_len=4096)

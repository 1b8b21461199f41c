"""Predicted times and memory against measured ones, refusals, the search, and what is printed."""

import json
import math
from pathlib import Path

import pytest

from openling.cli import main
from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.model import count
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.plan.activations import POLICIES
from openling.plan.devices import DEVICES, GIB, device
from openling.plan.job import plan_training
from openling.plan.mesh import GATHERS, Mesh, parse_mesh
from openling.plan.placement import inventory
from openling.plan.roofline import layer_seconds, predict
from openling.plan.setup import Setup

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
MEASURED = RESULTS / "kernels/nvidia-h100.json"


def preset(name: str, **changes) -> ModelConfig:
    return read_config(PRESETS[name]()).replace(**changes)


def setup(mesh: Mesh, *, seq_len: int = 4096, batches: int = 4, **options) -> Setup:
    tokens = seq_len * mesh.data * batches * options.get("micro_batch", 1)
    return Setup(mesh, device("h100"), seq_len, tokens, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "batch", "tokens"), [("8 x 4096", 8, 4096), ("1 x 32768", 1, 32768), ("1 x 131072", 1, 131072)]
)
@pytest.mark.parametrize(("kind", "column", "within"), [("lightning", "value", 0.1), ("gqa", "peer_value", 0.2)])
def test_a_stack_of_layers_takes_as_long_as_it_took_on_an_h100(shape, batch, tokens, kind, column, within):
    """Eight layers, forward and backward, recomputed, as `openling bench kernels` measured them in one run.

    The rates of the table are one number each: attention of a long row reaches more than the 62 % it does at 4 K.
    """
    rows = json.loads(MEASURED.read_text())["rows"]
    row = next(r for r in rows if r["name"].startswith(f"stack of 8 layers, training step, {shape}"))
    kinds = ("lightning",) * 7 + ("mla",) if kind == "lightning" else ("gqa",) * 8
    c = ModelConfig(
        vocab_size=32, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, layer_kinds=kinds, partial_rotary_factor=0.5, group_norm_size=4, gqa_qk_norm=True,
        q_lora_rank=1024, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    )  # fmt: skip
    job = setup(Mesh(), seq_len=tokens, micro_batch=batch, recompute="layer")
    predicted = sum(sum(layer_seconds(c, i, job).values()) for i in range(8))
    assert predicted == pytest.approx(row[column] * 1e-6, rel=within)


def test_experts_take_as_long_as_they_took_on_an_h100():
    """The share of the matrix rate is this very measurement, so this holds the FLOPs that it is applied to."""
    rows = json.loads(MEASURED.read_text())["rows"]
    row = next(r for r in rows if r["name"].startswith("MoE forward + backward, 32768 tokens of 2048, 256 experts of 512"))
    c = preset("ling-2.6-flash", hidden_size=2048, moe_intermediate_size=512, num_attention_heads=16, num_key_value_heads=16)
    job = setup(Mesh(), micro_batch=8, recompute="none")
    assert layer_seconds(c, 1, job)["experts"] == pytest.approx(row["value"] * 1e-6, rel=0.03)


@pytest.mark.parametrize(("name", "file"), [("h100", "nvidia-h100.json"), ("h200", "nvidia-h200-stack.json")])
def test_rates_of_the_table_are_those_measured(name, file):
    measured = json.loads((MEASURED.parent / file).read_text())["rates"]["cuda"]
    assert DEVICES[name].matmul == pytest.approx(measured["matmul_flops_per_s"], rel=0.005)
    assert DEVICES[name].bandwidth == pytest.approx(measured["copy_bytes_per_s"], rel=0.005)
    assert all(file in DEVICES[name].sources[field] for field in ("matmul", "bandwidth"))
    assert DEVICES[name].sources.keys() >= {"memory", "peak", "nvlink", "network", "attention", "grouped", "node"}


def test_a_pipeline_idles_for_one_pass_of_the_slowest_stage_per_other_stage():
    inv = inventory(preset("ling-2.6-flash"))
    one, many = (predict(inv, setup(Mesh(pipeline=4, shard=8, expert=8), batches=b)) for b in (4, 32))
    for step, batches in ((one, 4), (many, 32)):
        assert step.parts["pipeline bubble"] == pytest.approx(3 * max(step.stage_seconds))
        once = step.parts["optimiser"] + sum(f.seconds for f in step.flows if f.when == "once")
        assert step.seconds == pytest.approx((batches + 3) * max(step.stage_seconds) + once)


def test_recomputation_adds_a_third_of_the_products():
    c = preset("ling-2.6-flash")
    none, selective, layer = (layer_seconds(c, 1, setup(Mesh(), recompute=policy)) for policy in POLICIES)
    assert layer["matrix products"] == pytest.approx(none["matrix products"] * 4 / 3)
    assert selective["matrix products"] == none["matrix products"]
    assert selective["experts"] == layer["experts"] == pytest.approx(none["experts"] * 4 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(("world", "results"), [(1, "loop-nvidia-h100.json"), (2, "loop-2x-nvidia-h100.json")])
def test_the_peak_of_training_is_as_measured_on_h100s(kind, world, results, monkeypatch):
    """Within 5 %, the goal of `benchmarks/training.py`, from which the models are."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    training = pytest.importorskip("training")
    rows = json.loads((RESULTS / "training" / results).read_text())["rows"]
    measured = next(r["value"] for r in rows if r["name"] == f"1b-{kind}: peak memory")
    c = {"dense": training.dense_1b, "moe": training.moe_1b}[kind]()
    policies = {"recompute": "none", "gather": "step" if world > 1 else "layer"}
    plan = plan_training(
        c, world=world, mesh=f"shard={world}", seq_len=4096, batch_tokens=32 * 4096, micro_batch=4, reserve=0, **policies
    )
    assert plan.fullest.total / GIB == pytest.approx(measured, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and the search
# ---------------------------------------------------------------------------------------------------------------------


def refused(name: str, **options) -> dict[str, object]:
    with pytest.raises(UserError) as caught:
        plan_training(preset(name), **options)
    return {"what": caught.value.what, **caught.value.parts}


def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does():
    parts = refused("ling-2.6-1t", world=2048, mesh="shard=2048")
    assert str(parts["where"]).startswith("--mesh ") and "expert" in str(parts["where"])
    assert "expert=1" in str(parts["value"])
    assert "gathered weights" in str(parts["expected"])
    nearest = str(parts["nearest"]).split()[1]
    assert plan_training(preset("ling-2.6-1t"), world=2048, mesh=nearest).fullest.total <= DEVICES["h100"].memory


def test_a_policy_that_does_not_fit_is_refused_with_one_that_does():
    parts = refused("ling-2.6-1t", world=2048, mesh="shard=256,expert=64,pipeline=8", recompute="none")
    assert (parts["where"], parts["value"], parts["nearest"]) == ("--recompute", "none", "--recompute layer")
    assert "activations" in str(parts["expected"])


def test_too_few_ranks_are_refused():
    parts = refused("ling-2.6-1t", world=64)
    assert parts["where"] == "--world" and "64 ranks" in str(parts["what"])
    assert refused("ling-2.6-1t", world=8, mesh="shard=8")["where"] == "--world"


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    parts = refused("ling-2.6-1t", world=2048, mesh="shard=256,expert=64,pipeline=8", batch_tokens=10**6)
    assert (parts["where"], parts["nearest"]) == ("--batch-tokens", "--batch-tokens 8388608")
    assert refused("tiny", world=0)["where"] == "--world"
    assert refused("tiny", world=1, device="h300")["nearest"] in ("h200", "h100")


def test_what_training_refuses_is_neither_taken_nor_found():
    """`config.recipe` refuses a pipeline whose gather is not accumulate, and torch one with fewer parts than stages."""
    tight = {"world": 8, "mesh": "pipeline=4,shard=2"}
    for gather in ("layer", "step"):
        parts = refused("tiny", gather=gather, **tight)
        assert (parts["where"], parts["nearest"]) == ("--gather", "--gather accumulate")
    assert plan_training(preset("tiny"), gather="accumulate", **tight).setup.gather == "accumulate"
    parts = refused("tiny", seq_len=64, batch_tokens=64 * 2 * 2, **tight)
    assert (parts["where"], parts["nearest"]) == ("--batch-tokens", f"--batch-tokens {64 * 2 * 4}")
    for gather in (None, *GATHERS):
        for world, batch in ((8, 64 * 8), (16, None)):
            plan = plan_training(preset("tiny"), world=world, seq_len=64, batch_tokens=batch, gather=gather)
            for s in (plan.setup, *(r.setup for r in plan.runners_up)):
                assert s.mesh.pipeline == 1 or (s.gather == "accumulate" and s.micro_batches >= s.mesh.pipeline)


def test_the_search_finds_nothing_slower_than_the_meshes_it_lists():
    plan = plan_training(preset("ling-2.6-flash"), world=64)
    assert plan.fullest.total <= plan.setup.device.memory
    assert plan.runners_up
    for other in plan.runners_up:
        assert 0 < other.tokens_per_second <= plan.tokens_per_second
        again = plan_training(
            preset("ling-2.6-flash"), world=64, mesh=other.setup.mesh, recompute=other.setup.recompute, gather=other.setup.gather
        )
        assert again.tokens_per_second == pytest.approx(other.tokens_per_second)


def test_the_published_number_of_stages_of_ling_1t_is_near_the_best():
    """PP 21 on 2016 GPUs (arXiv 2510.22115), here with one forward, one backward instead of interleaved stages."""
    c = preset("ling-1t")
    published = plan_training(c, world=2016, mesh="shard=96,expert=16,pipeline=21", device="h100")
    for other in ("shard=96,expert=32,pipeline=21", "shard=288,expert=32,pipeline=7"):
        assert plan_training(c, world=2016, mesh=other).tokens_per_second < published.tokens_per_second


@pytest.mark.parametrize("mesh", ["shard=256,expert=64,pipeline=8", "shard=128,context=2,tensor=1,expert=64,pipeline=8"])
def test_a_plan_of_1t_adds_up(mesh):
    plan = plan_training(preset("ling-2.6-1t"), world=2048, mesh=mesh)
    out = plan.as_dict()
    assert len(out["tensors"]) == len(plan.inventory.tensors)
    assert out["tensors"]["model.word_embeddings.weight"]["stages"] == [0, 7]  # the MTP layer reads them as well
    assert out["tensors"]["lm_head.weight"]["stages"] == [7]
    for stage in out["memory"]:
        assert stage["total"] == sum(stage["by_kind"].values()) == sum(p["bytes"] for p in stage["parts"])
    assert sum(out["step"]["parts"].values()) == pytest.approx(out["step"]["seconds"])
    # 12 bytes of weight and AdamW states per parameter, once in the job (and once more where MTP reads the embeddings); those of
    # vectors and routers on every data rank.
    states = sum(s["by_kind"]["parameters"] + s["by_kind"]["optimiser"] for s in out["memory"]) * 256
    total = count.total_parameters(preset("ling-2.6-1t"), mtp=True)
    copied = 255 * sum(math.prod(t.shape) for t in plan.inventory.tensors if t.apart)
    assert 12 * (total + copied) <= states <= 12.2 * (total + copied)
    flops = 3 * count.forward_flops(plan.config, 2048).total
    assert out["step"]["mfu"] == pytest.approx(flops * plan.tokens_per_second / 2048 / 989.4e12)
    json.dumps(out)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "ling-2.6-1t", "--world", "2048", "--mesh", "shard=64,expert=16,tensor=2,pipeline=16"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    for said in ("Memory of the fullest rank", "A step takes", "Bottleneck:", "receives per step", "Placement", "MFU"):
        assert said in out
    # No cell of the placement is cut short.
    assert "…" not in out


def test_the_page_of_a_search_fits_and_its_meshes_can_be_copied(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "ling-mini-2.0", "--world", "32", "--no-placement"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    listed = out.split("Runners-up")[1].splitlines()[1:]
    meshes = [line.split()[0] for line in listed if line.startswith(("pipeline", "shard", "replicate", "context"))]
    assert meshes and all(parse_mesh(text, 32).world == 32 for text in meshes)


def test_json_and_overridden_rates(capsys):
    flags = ["plan", "tiny", "--world", "8", "--mesh", "shard=8", "--json", "--matmul-flops", "500", "--gpu-memory", "40"]
    assert main([*flags, "--network-bandwidth", "10", "--gpus-per-node", "4"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["device"]["matmul"], out["device"]["network"], out["device"]["node"]) == (500e12, 10e9, 4)
    assert out["device"]["memory"] == 40 * 10**9
    assert out["device"]["sources"]["matmul"] == "given on the command line"
    assert out["model"] == "tiny" and out["mesh"]["world"] == 8


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["plan"], "MODEL"),
        (["plan", "tiny", "--mesh", "shard=8"], "--world"),
        (["plan", "tiny", "--world", "8", "--dp", "8"], "--dp"),
        (["plan", "tiny", "--world", "8", "--source", "tiny"], "--source"),
        (["plan", "tiny", "--world", "8", "--matmul-flops", "-1"], "--matmul-flops"),
        (["plan", "tiny", "--world", "8", "--seq-len", "0"], "--seq-len"),
        (["plan", "tiny", "--world", "8", "--batch-tokens", "0"], "--batch-tokens"),
        (["plan", "tiny", "--world", "8", "--gpu-memory", "nan"], "--gpu-memory"),
        (["plan", "tiny", "--world", "8", "--gpu-memory", "inf"], "--gpu-memory"),
        (["plan", "tiny", "--world", "8", "--reserve", "nan"], "--reserve"),
        (["plan", "tiny", "--world", "8", "--reserve", "1000"], "--reserve"),
        (["plan", "tiny", "--world", "8", "--device", "a100"], "--device"),
        (["plan", "tiny", "--budget", "1e20"], "MODEL"),
        (["plan", "--budget", "nan"], "--budget"),
        (["plan", "--budget", "1e20", "--world", "8"], "where:    --world\n  value:    8"),
        (["plan", "--budget", "1e20", "--mesh", "shard=8"], "where:    --mesh"),
        (["plan", "--budget", "1e20", "--batch-tokens", "8"], "where:    --batch-tokens"),
    ],
)
def test_mistakes_on_the_command_line(flags, where, capsys):
    assert main(flags) == 2
    assert where in capsys.readouterr().err


def test_the_budget_page_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--budget", "1e22"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "Extrapolated" in out
    assert main(["plan", "--budget", "6.12e24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moe"]["learning_rate"] == pytest.approx(1.878e-4, rel=1e-3)


def test_reserve_is_part_of_the_memory():
    small, large = (plan_training(preset("tiny"), world=1, reserve=r * GIB) for r in (1, 2))
    assert large.fullest.total - small.fullest.total == GIB

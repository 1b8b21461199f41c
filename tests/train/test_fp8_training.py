"""FP8 as a setting of the loop: refused where it cannot run, undone afterwards, and trained with the twin in place of torchao."""

import json

import pytest
import torch
from test_loop import run_training, tiny_config, tiny_model

from openling.config.train import TrainConfig
from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.ling import Experts, Ling
from openling.ops import fp8
from openling.ops.cpu import settle_bf16_matmuls
from openling.ops.moe import swiglu_experts
from openling.parallel.expert import ShardedExperts
from openling.train.fp8 import experts_in_fp8


@pytest.fixture(autouse=True, scope="module")
def no_self_test():
    """A run asks whether BF16 pays; what a busy machine answers here is not for other tests."""
    settle_bf16_matmuls(False)
    yield
    settle_bf16_matmuls(None)


def sparse_model(width=16):
    config = ModelConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, layer_kinds=("lightning", "gqa"), moe_layers=(1,), num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=width, moe_shared_expert_intermediate_size=16, num_shared_experts=1, n_group=1, topk_group=1,
    )  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_processor_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config(fp8_experts="rowwise", precision="bf16")
    with pytest.raises(UserError, match="do not run on this device"):
        run_training(tmp_path / "run", config, model=sparse_model(), parameters=[""])
    assert not (tmp_path / "run" / "train.json").exists()


def test_other_widths_and_dense_models_are_refused(tmp_path):
    config = tiny_config(fp8_experts="rowwise", precision="bf16")
    with pytest.raises(UserError, match="a width of 24"):
        run_training(tmp_path / "a", config, model=sparse_model(24), parameters=[""])
    with pytest.raises(UserError, match="no routed experts"):
        run_training(tmp_path / "b", config, model=tiny_model(), parameters=[""])


def test_fp32_products_and_fp8_do_not_go_together():
    with pytest.raises(ValueError, match="precision must not be fp32"):
        TrainConfig(steps=1, fp8_experts="rowwise", precision="fp32")


def test_a_run_in_fp8_learns_as_in_bf16_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("openling.train.fp8.check_fp8", lambda *about: None)
    shared = {"steps": 40, "lr": 1e-2, "precision": "bf16"}
    model, _ = run_training(tmp_path / "fp8", tiny_config(fp8_experts="rowwise", **shared), model=sparse_model(), parameters=[""])
    run_training(tmp_path / "bf16", tiny_config(**shared), model=sparse_model(), parameters=[""])
    found, half = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert found != half
    assert found[-1] < found[0] - 0.5
    assert abs(found[-1] / half[-1] - 1) < 0.02
    assert all(m.compute is swiglu_experts for m in model.modules() if isinstance(m, Experts))


def test_a_run_in_fp8_does_not_go_on_without(tmp_path, monkeypatch):
    monkeypatch.setattr("openling.train.fp8.check_fp8", lambda *about: None)
    run_training(tmp_path / "run", tiny_config(steps=2, fp8_experts="rowwise", precision="bf16"), model=sparse_model())
    with pytest.raises(UserError, match="(?s)another configuration.*fp8_experts"):
        run_training(tmp_path / "run", tiny_config(steps=2, precision="bf16"), model=sparse_model(), resume=True)


def test_experts_of_a_rank_take_part(monkeypatch):
    """Expert ranks' experts compute as told, and still take no rows."""
    monkeypatch.setattr("openling.train.fp8.check_fp8", lambda *about: None)
    model = sparse_model()
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    experts.__class__ = ShardedExperts
    x, weight, index = torch.randn(5, 32), torch.rand(5, 1), torch.tensor([[0], [1], [2], [2], [0]])
    plain = experts(x, weight, index)
    with experts_in_fp8(model, tiny_config(fp8_experts="rowwise"), torch.device("cpu")):
        found, none = experts(x, weight, index), experts(x[:0], weight[:0], index[:0])
    parts = experts.gate_proj, experts.up_proj, experts.down_proj
    assert torch.equal(found, fp8.fp8_experts(x, weight, index, *parts, form="rowwise"))
    assert not torch.equal(found, plain)
    assert none.shape == (0, 32)

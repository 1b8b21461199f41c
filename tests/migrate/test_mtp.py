"""The multi-token-prediction layer through a migration: exact at full rank, trained in the MLA warm-up, carried by the export."""

import json

import numpy as np
import pytest
import torch
from tiny_gqa import T, build, config, tokens
from torch import nn

import openling
from openling.config.migrate import Conversion, preset
from openling.config.train import TrainConfig
from openling.data.pack import Batches
from openling.errors import UserError
from openling.migrate.convert import to_mla
from openling.migrate.touched import trainable
from openling.train.loop import train
from openling.weights.export import save

QUIET = {"on_layer": lambda i: None, "bf16": False}
HEAD = 2  # its number behind two hidden layers


def teacher_config(**changes):
    return config(num_nextn_predict_layers=1, mtp_layer_kind="gqa", num_key_value_heads=1, **changes)


def mtp_logits(model, ids):
    states: list[torch.Tensor] = []
    model(ids, hidden_states=states)
    return model.mtp_logits(ids, states[-1])[0]


@torch.no_grad()
def test_a_converted_head_predicts_the_same_at_full_rank():
    """One K/V head loses no RoPE; with ranks that cut nothing and latent norms taken out, the logits are the teacher's."""
    teacher = build(teacher_config())
    full = teacher.config.replace(mtp_layer_kind="mla", kv_lora_rank=16, q_lora_rank=None)
    options = Conversion(**{**preset("best").conversion.model_dump(), "latent_norm": "rms", "refit_output": False})
    ids = [tokens(3), tokens(2)]
    hybrid, found = to_mla(teacher, full, ids, options, **QUIET)
    assert {a.layer for a in found.approximations} == {HEAD}
    hybrid.model.layers[HEAD].attention.kv_a_layernorm = nn.Identity()
    unseen = tokens(4)
    assert torch.allclose(mtp_logits(hybrid, unseen), mtp_logits(teacher, unseen), rtol=0, atol=1e-8)
    assert torch.equal(hybrid(unseen), teacher(unseen))


def half_rank():
    teacher = build(teacher_config(), dtype=torch.float32)
    full = teacher.config.replace(layer_kinds=("gqa", "mla"), mtp_layer_kind="mla", kv_lora_rank=8, layer_group_size=2)
    return teacher, to_mla(teacher, full, [tokens(3), tokens(2)], preset("best").conversion, **QUIET)[0]


def test_the_mla_warm_up_trains_the_head_where_its_loss_counts(tmp_path):
    """Its attention moves and its loss falls; what the conversion did not touch stays."""
    _, hybrid = half_rank()
    before = {name: x.clone() for name, x in hybrid.state_dict().items()}
    windows = torch.cat([tokens(7), tokens(9)])
    batches = Batches(windows.numpy().astype(np.int32), batch_size=8)
    c = TrainConfig(steps=6, batch_size=8, sequence_length=T, lr=3e-3, weight_decay=0.0, mtp=1.0, precision="fp32")
    train(hybrid, c, batches, parameters=trainable(hybrid.config, "mla-warmup", "best", mtp=True), run=tmp_path / "run")
    moved = {name.split(".attention.")[0] for name, x in hybrid.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"model.layers.1", f"model.layers.{HEAD}"}
    losses = [json.loads(line)["mtp"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_which_parameters_a_warm_up_names():
    c = half_rank()[1].config
    assert trainable(c, "mla-warmup", "best") == [r"model\.layers\.(1)\.attention\..*"]
    assert trainable(c, "mla-warmup", "best", mtp=True) == [r"model\.layers\.(1|2)\.attention\..*"]
    with pytest.raises(UserError, match="no MTP layer"):
        trainable(c.replace(num_nextn_predict_layers=0), "mla-warmup", "best", mtp=True)


@torch.no_grad()
def test_the_folder_carries_the_head(tmp_path):
    _, hybrid = half_rank()
    save(hybrid, tmp_path / "hybrid")
    again = openling.load(tmp_path / "hybrid").model
    assert torch.equal(mtp_logits(again, tokens(2)), mtp_logits(hybrid, tokens(2)))
    assert json.loads((tmp_path / "hybrid" / "config.json").read_text())["num_nextn_predict_layers"] == 1

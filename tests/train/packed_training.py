"""A small hybrid with experts and an MTP layer, documents of uneven lengths, and one call that trains it."""

import numpy as np
import torch

from openling.config.train import TrainConfig
from openling.data.batches import MemoryStream, Windows, packed
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.train.loop import train


def hybrid(seed=0, **changes):
    fields = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "layer_kinds": ("lightning", "lightning", "mla"), "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_layers": (1, 2), "num_experts": 4,
        "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "moe_router_enable_expert_bias": True, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    model = Ling(ModelConfig(**fields | changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def documents(count=60, seed=0):
    """Each token follows from the one before, with a tenth of noise; 2 to 40 tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = [int(rng.integers(1, 61))]
        for _ in range(int(rng.integers(1, 40))):
            tokens.append(int(rng.integers(61)) if rng.random() < 0.1 else (tokens[-1] * 7 + 3) % 61)
        found.append(tokens)
    return found


class Ramped:
    """`data.batches.MemoryBatches` with smaller batches at first, as mixtures have them."""

    def __init__(self, texts, *, length, rows, seed=0, ramp=()):
        self._windows, self._rows, self._ramp = Windows(MemoryStream(texts), length, f"{seed}"), rows, ramp
        self.tokens_per_step = rows * length

    def batch(self, step):
        rows = next((r for stop, r in self._ramp if step < stop), self._rows)
        start, first = 0, 0
        for stop, r in self._ramp:
            first += r * max(0, min(stop, step) - start)
            start = stop
        first += self._rows * max(0, step - start)
        length = self._windows.length
        ids, targets = (np.empty((rows, length), np.int64) for _ in range(2))
        bounds = []
        for i, place in enumerate(self._windows.places(first + np.arange(rows)).tolist()):
            bounds += [i * length + b for b in self._windows.fill(place, ids[i], targets[i])]
        return packed(ids, targets, bounds, {"text": ids.size})

    def fingerprint(self):
        return f"{self._windows.stream.fingerprint()}/{self._rows}"


def MIXED(**changes):  # noqa: N802
    """Every part of the loss, experts that are balanced; no autocast."""
    values = {"lr": 1e-3, "warmup_steps": 3, "precision": "fp32", "z": 1e-3, "mtp": 0.1, "bias_rate": 1e-3, "seed": 5}
    return TrainConfig(**values | changes)


def run(folder, config, source, *, model=None, **options):
    model = model or hybrid()
    train(model, config, source, parameters=[""], run=folder, progress=False, **options)
    return model

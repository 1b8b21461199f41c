"""Tiny random models of every kind, and engines over them."""

from __future__ import annotations

import itertools

import torch

from openling.model.config import ModelConfig
from openling.model.generate import Sampling, generate
from openling.model.ling import Ling
from openling.serve.engine import Engine
from openling.serve.engine_config import EngineConfig
from openling.serve.types import Output, Request, SamplingParams

VOCAB = 61
BASE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_kinds=("lightning", "lightning", "mla"),
    group_norm_size=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    partial_rotary_factor=0.5,
    max_position_embeddings=1024,
    initializer_range=0.3,
)
EXPERTS = {
    "moe_layers": (1, 2),
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_enable_expert_bias": True,
}
KINDS = {
    "hybrid": BASE,
    "gqa": BASE.replace(layer_kinds=("gqa", "gqa", "gqa")),
    "half": BASE.replace(layer_kinds=("gqa", "lightning", "mla"), q_lora_rank=12),
    "moe": BASE.replace(**EXPERTS),
    "mtp": BASE.replace(num_nextn_predict_layers=1),
}
_ids = itertools.count()


def model(kind: str = "hybrid", seed: int = 0, dtype: torch.dtype = torch.float64) -> Ling:
    """One of `KINDS`."""
    return model_of(KINDS[kind], seed, dtype)


def model_of(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Ling:
    """Weights large enough that greedy continuations vary."""
    m = Ling(config).to(dtype)
    m.init_weights(torch.Generator().manual_seed(seed))
    return m.eval()


def engine(m: Ling, **changes) -> Engine:
    """Small, and poisoned: what was never written is NaN."""
    settings = {"max_running": 8, "step_tokens": 256, "pages": 64, "slots": 24, "poison": True} | changes
    return Engine(m, None, EngineConfig(**settings))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * length + seed)).tolist())


def request(ids, id: str | None = None, namespace: str = "", **params) -> Request:
    """Greedy, unless told otherwise."""
    return Request(
        id or f"r{next(_ids)}", tuple(ids), SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | params)), namespace
    )


def run(e: Engine, requests, *, most_steps: int = 5000) -> dict[str, list[Output]]:
    """All outputs of each request; nothing may be left in the pools' books that nobody owns."""
    for r in requests:
        e.add(r)
    return drain(e, most_steps=most_steps)


def run_patiently(e: Engine, requests) -> dict[str, list[Output]]:
    """`run` for requests that wait for a grammar to be compiled."""
    return run(e, requests, most_steps=10**7)


def drain(e: Engine, *, most_steps: int = 5000) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {}
    for _ in range(most_steps):
        if not e.has_work():
            break
        for output in e.step():
            found.setdefault(output.request_id, []).append(output)
    assert not e.has_work(), "the engine does not come to an end"
    e.check_integrity()
    return found


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@torch.no_grad()
def log_probabilities(m: Ling, ids, temperature: float = 1.0) -> torch.Tensor:
    """[T, V]: what the model says behind each token, without a cache."""
    return (m(torch.tensor([ids]))[0] / temperature).log_softmax(-1)


def expected(m: Ling, ids, count: int) -> list[int]:
    """Greedy continuation by `openling.model.generate`, one request by itself."""
    return generate(m, torch.tensor([ids]), Sampling(max_new_tokens=count), stop_ids=())[0]

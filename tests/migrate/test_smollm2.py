"""The real teacher: SmolLM2-135M-Instruct inside openling against transformers, and the exactness identities on its weights."""

from __future__ import annotations

import functools

import gguf
import pytest
import torch
import torch.nn.functional as F
from test_exactness import as_mha
from transformers import AutoModelForCausalLM

import openling
from openling.config.migrate import preset
from openling.data.corpus import find_corpus
from openling.data.pack import cut_windows, tokenise
from openling.migrate import shipped
from openling.migrate.convert import to_mla
from openling.migrate.layout import target_config
from openling.migrate.mla import Projections, pairs, rorope_basis
from openling.model.generate import Sampling, generate
from openling.ops.cpu import half_products
from openling.ops.lightning import lightning_chunk, lightning_recurrent, log_decay
from openling.weights.gguf import import_gguf, smollm2_gguf

PROMPTS = (
    *("The capital of France is", "Water boils at", "My name is", "def add(a, b):", "Once upon a time"),
    *("The three primary colors are", "In 1969, humans first", "Photosynthesis is the process", "To bake bread you need"),
    *("import numpy as np\n", "The largest planet in", "A prime number is", "Dear Sir or Madam,", "SELECT name FROM"),
    *("The opposite of hot is", "Shakespeare wrote", "E = mc^2 means", "Paris, London and", "Two plus two equals"),
    "How do I learn to play the guitar?",
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Writes the teacher's folder in a dtype."""
    with pytest.MonkeyPatch.context() as patch:
        # Parsing the vocabulary takes seconds, and three readers of every import want it.
        open_once = functools.cache(gguf.GGUFReader)
        patch.setattr(gguf, "GGUFReader", lambda path: open_once(str(path)))
        yield lambda dtype: import_gguf(smollm2_gguf(), tmp_path_factory.mktemp("smol") / "teacher", dtype=dtype)


@pytest.fixture(scope="module")
def teacher(imported):
    return openling.load(imported(torch.float32))


@pytest.fixture(scope="module")
def reference(teacher):
    return AutoModelForCausalLM.from_pretrained(teacher.folder).eval()


@pytest.fixture(scope="module")
def windows(teacher):
    tokens = tokenise(find_corpus("python-docs").documents("heldout"), teacher.tokenizer, vocab_size=49152, max_tokens=1024)
    return torch.from_numpy(cut_windows(tokens, 256)).long()


@torch.no_grad()
def test_perplexity_equals_transformers(teacher, reference, windows):
    ids = windows[:2]
    ours, theirs = (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
        for logits in (teacher.model(ids), reference(ids).logits.float())
    )
    assert 1 < ours < 100
    assert abs(ours - theirs) < 0.01  # the bound; FP32 rounding moves it by about 1e-5


@torch.no_grad()
def test_greedy_tokens_equal_transformers_on_20_prompts(teacher, reference):
    """All prompts of one length at once, so that nothing is padded; some have a length of their own."""
    assert len(PROMPTS) == 20
    by_length: dict[int, list[list[int]]] = {}
    for prompt in PROMPTS:
        ids = teacher.tokenizer(prompt).input_ids
        by_length.setdefault(len(ids), []).append(ids)
    assert any(len(prompts) == 1 for prompts in by_length.values())
    for length, prompts in by_length.items():
        ids = torch.tensor(prompts)
        found = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        ours = generate(teacher.model, ids, Sampling(max_new_tokens=12), stop_ids=[2])
        for prompt, tokens, expected in zip(prompts, ours, found[:, length:].tolist(), strict=True):
            said = teacher.tokenizer.decode(prompt)
            assert tokens == expected[: len(tokens)], said
            assert len(tokens) == 12 or tokens[-1] == 2, said
            assert set(expected[len(tokens) :]) <= {2}, said  # padding of one that ended earlier than others of its length


@torch.no_grad()
def test_replication_and_head_permutation_are_exact(teacher, windows):
    """In FP64, where only rounding is left: far below the 1e-5 asked for in FP32."""
    from openling.migrate.convert import derive

    short = derive(teacher.model, teacher.config.replace(num_hidden_layers=2, layer_kinds=("gqa",) * 2)).double()
    ids = windows[:1, :64]
    expected = short(ids)
    for order in (None, torch.randperm(9, generator=torch.Generator().manual_seed(0))):
        assert (as_mha(short, order)(ids) - expected).abs().max() < 1e-9


@torch.no_grad()
def test_rorope_full_rank_on_real_keys(teacher):
    """The full basis is orthogonal and real, so that rotating keys and queries alike leaves every product unchanged."""
    w = Projections.of(teacher.model.model.layers[5].attention)
    x = torch.randn(64, 577, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    key = pairs(w.k, 64, 1)
    _, basis = rorope_basis(key, x.T @ x / 64)  # [p, K, K]
    identity = torch.eye(3, dtype=torch.float64).expand_as(basis)
    assert (basis @ basis.mT - identity).abs().max() < 1e-12
    parts = torch.einsum("ckpfm,nm->cnpk", key, x)
    rotated = torch.einsum("cnpk,pkj->cnpj", parts, basis)
    before = torch.einsum("cnpk,cmpk->cnmp", parts, parts)
    after = torch.einsum("cnpj,cmpj->cnmp", rotated, rotated)
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


@torch.no_grad()
def test_chunk_equals_recurrence_on_real_activations(teacher, windows):
    model = teacher.model.model
    layer = model.layers[3]
    h = model.word_embeddings(windows[:1])
    heads = layer.attention.query_key_value(layer.input_layernorm(h)).unflatten(-1, (-1, 64))
    q, k, v = heads.split((9, 3, 3), dim=2)
    k, v = k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    q, k = (F.rms_norm(z, (64,)) for z in (q, k))
    decay = log_decay(9, 3, 30)
    chunk, state = lightning_chunk(q, k, v, decay)
    plain, last = lightning_recurrent(q, k, v, decay)
    assert (chunk - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (state - last).abs().max() < 1e-5 * last.abs().max()


@torch.no_grad()
def test_absorbed_decode_equals_expanded_on_the_converted_model(teacher, windows):
    """Five real layers become MLA; the last tokens, decoded absorbed, get the logits of one expanded pass."""
    config = target_config(teacher.config)
    kinds = tuple("mla" if kind == "mla" else "gqa" for kind in config.layer_kinds)
    options = preset("best").conversion.model_copy(update={"rope_fold": 1})  # to measure a fold takes half a minute
    how = {"on_layer": lambda i: None, "bf16": half_products(windows.device)}
    student, found = to_mla(teacher.model, config.replace(layer_kinds=kinds), [windows[:1]], options, **how)
    assert {a.layer for a in found.approximations} == {5, 11, 17, 23, 29}
    ids = windows[:1, :48]
    expected = student(ids)
    cache = student.new_cache()
    parts = [student(piece, cache=cache) for piece in (ids[:, :40], *ids[:, 40:].split(1, 1))]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_shipped_hybrid_has_the_same_logits_in_transformers(imported, windows, tmp_path):
    """The folder that the package's delta makes of the teacher, by the code that lies in it: at most FP32 rounding apart."""
    out = shipped.applied(imported(torch.bfloat16), shipped.find_delta(), tmp_path / "hybrid")
    how = {"trust_remote_code": True, "dtype": torch.float32}
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = windows[:1, :80]
    expected = openling.load(out, dtype=torch.float32).model(ids)
    assert (theirs.eval()(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()

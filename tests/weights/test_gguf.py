"""The SmolLM2 GGUF becomes the Llama folder that transformers reads from the same file."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import openling
from openling.data.tokens import describe
from openling.errors import UserError
from openling.weights.gguf import import_gguf, smollm2_gguf

gguf = pytest.importorskip("gguf")


def write_llama(
    path: Path,
    *,
    architecture: str = "llama",
    tensor: str | None = None,
    without: str | None = None,
    eos: int | None = None,
    heads: int = 4,
) -> None:
    """A tiny random Llama as llama.cpp lays it out."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()} | ({tensor: (4,)} if tensor else {})
    for name, shape in shapes.items():
        if name == without:
            continue
        writer.add_tensor(f"{name}.weight", random.normal(0.1, 0.5, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openling.weights.gguf._tokenizer_files", lambda path, reader, vocabulary: {})


@torch.no_grad()
def test_smollm2_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parsing the vocabulary takes seconds, and four readers here want it.
    open_once = functools.cache(gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: open_once(str(path)))
    path = smollm2_gguf()
    loaded = openling.load(import_gguf(path, tmp_path / "smol"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = ["Hello, world! 12345 + 678", "<|im_start|>user\nHi<|im_end|>\n", " naïve — 中文\n\n  def f(x):\n\treturn x**2"]
    for text in texts:
        ids = loaded.tokenizer(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert loaded.tokenizer.decode(ids) == text
    # llama.cpp's "smollm" parts text at every digit first, before GPT-2's pattern could give a digit's space away.
    assert loaded.tokenizer.tokenize("x   12") == ["x", "ĠĠĠ", "1", "2"]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0}
    assert {name: getattr(loaded.tokenizer, name) for name in ends} == ends
    # What corpora remember of it is the same whichever transformers wrote it.
    assert describe(loaded.tokenizer)[0].sha256.startswith("d8a3ea1a10fd2632")
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert loaded.config.tie_word_embeddings
    assert (loaded.config.rope_theta, loaded.config.rms_norm_eps) == (1e5, 1e-5)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer("The capital of France is Paris, and the capital of Germany is").input_ids])
    logits = loaded.model(ids)
    # Both dequantise the same blocks and multiply in FP32; logits are near 20 in size.
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=0)
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Berlin"


@torch.no_grad()
@pytest.mark.usefixtures("no_tokenizer")
def test_untied_llama_and_bf16(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf")
    loaded = openling.load(import_gguf(tmp_path / "tiny.gguf", tmp_path / "out"))
    assert loaded.tokenizer is None
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(reference.config, LlamaConfig)
    query = reference.model.layers[0].self_attn.q_proj.weight
    stored = next(t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors if t.name == "blk.0.attn_q.weight").data
    # Head 0 has rows 0..7: llama.cpp keeps pairs (j, j + 4) side by side.
    assert np.array_equal(query[[0, 4, 1, 5, 2, 6, 3, 7]], stored[:8])
    half = openling.load(import_gguf(tmp_path / "tiny.gguf", tmp_path / "half", dtype=torch.bfloat16))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[name], tensor.bfloat16())


@pytest.mark.usefixtures("no_tokenizer")
def test_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            import_gguf(tmp_path / "x.gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("no such file")
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    refused("not a whole GGUF file")
    write_llama(tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[: len(data) // 2])
    refused("not a whole GGUF file")
    write_llama(tmp_path / "x.gguf", architecture="gemma3")
    refused("unsupported GGUF architecture")
    write_llama(tmp_path / "x.gguf", tensor="rope_freqs")
    refused("not part of a plain Llama")
    write_llama(tmp_path / "x.gguf", eos=999)
    refused("a special token is beyond the vocabulary")
    write_llama(tmp_path / "x.gguf", heads=5)
    refused("head counts")
    write_llama(tmp_path / "x.gguf", without="blk.0.ffn_up")
    refused(r"lacks a tensor[\s\S]*blk.0.ffn_up.weight[\s\S]*11 of the 12 tensors")
    write_llama(tmp_path / "x.gguf", tensor="blk.7.attn_norm")
    refused(r"of no layer[\s\S]*blk.7.attn_norm.weight[\s\S]*1 layers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="make setup"):
        smollm2_gguf()


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    write_llama(tmp_path / "x.gguf")  # has none at all
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()

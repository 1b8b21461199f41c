"""Exported hybrids under transformers, without Triton or fla: same logits, `generate`, loss; and what a folder holds."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import GOLDEN, HALF_MIGRATED, HYBRID, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import openling
from openling.model.cache import Cache
from openling.model.config import ModelConfig, read_ling
from openling.weights.export import save
from openling.weights.folder import load_tokenizer
from openling.weights.remote import remote_code

IDS = torch.randint(1, 95, (2, 24), generator=torch.Generator().manual_seed(3))
CONFIGS = {"hybrid": HYBRID, "half-migrated": HALF_MIGRATED}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing triton or fla fails; remote code is unpacked in the test's own folder."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def exported(
    config: ModelConfig, folder: Path, **kwargs: object
) -> tuple[openling.model.ling.Ling, transformers.PreTrainedModel]:
    ours = tiny(config)
    save(ours, folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    assert type(theirs).__module__.startswith("transformers_modules")
    return ours, theirs


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_logits_and_loss(name: str, tmp_path: Path) -> None:
    ours, theirs = exported(CONFIGS[name], tmp_path / "out")
    expected = ours(IDS)
    out = theirs(IDS, labels=IDS, output_hidden_states=True)
    # The same operations in the same order on the same values; 1e-5 leaves room for another BLAS path only.
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=0)
    assert len(out.hidden_states) == ours.config.num_hidden_layers + 1
    reloaded = openling.load(tmp_path / "out")
    assert not reloaded.config.tie_word_embeddings
    torch.testing.assert_close(reloaded.model(IDS), expected, atol=1e-5, rtol=0)
    # transformers' own rewriting of config.json (RoPE keys move) means the same model to us.
    assert read_ling(theirs.config.to_dict()) == reloaded.config


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_generate_equals_own_greedy_decoding(name: str, tmp_path: Path) -> None:
    ours, theirs = exported(CONFIGS[name], tmp_path / "out")
    tokens = theirs.generate(IDS, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert tokens.tolist() == greedy(ours, IDS, 10).tolist()


def greedy(model: openling.model.ling.Ling, ids: torch.Tensor, count: int) -> torch.Tensor:
    cache: Cache = model.new_cache()
    new = ids
    for _ in range(count):
        new = model(new, cache=cache)[:, -1:].argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    return ids


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_left_padded_batch_generates_what_each_row_does_alone(name: str, tmp_path: Path) -> None:
    _, theirs = exported(CONFIGS[name], tmp_path / "out")
    ids, mask = IDS[:, 12:], torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    for extra in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        options = dict(max_new_tokens=4, eos_token_id=None, **extra)
        batch = theirs.generate(ids, attention_mask=mask, **options)
        alone = [theirs.generate(ids[:1, 5:], **options)[0, -4:], theirs.generate(ids[1:], **options)[0, -4:]]
        assert batch[:, -4:].tolist() == torch.stack(alone).tolist()


@torch.no_grad()
def test_beam_search_reorders_the_cache(tmp_path: Path) -> None:
    """With a cache or recomputing every prefix: the same beams."""
    _, theirs = exported(HYBRID, tmp_path / "out")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert theirs.generate(IDS[:, :8], **options).tolist() == theirs.generate(IDS[:, :8], use_cache=False, **options).tolist()


@torch.no_grad()
def test_sampling_and_cache_arguments(tmp_path: Path) -> None:
    _, theirs = exported(HYBRID, tmp_path / "out")
    torch.manual_seed(0)
    assert theirs.generate(IDS, max_new_tokens=5, do_sample=True, top_k=20, eos_token_id=None).shape == (2, 29)
    # An empty cache of another kind is replaced, ours is continued, a filled foreign one is refused.
    out = theirs(IDS[:, :10], past_key_values=transformers.DynamicCache())
    rest = theirs(IDS[:, 10:], past_key_values=out.past_key_values, attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(rest.logits, theirs(IDS).logits[:, 10:], atol=1e-5, rtol=0)
    steps = theirs.generate(IDS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True, eos_token_id=None)
    assert [h[-1].shape for h in steps.hidden_states] == [(2, 24, 32), (2, 1, 32)]
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(IDS[:1], max_new_tokens=2, assistant_model=theirs)
    assert theirs(IDS, logits_to_keep=1).logits.shape == (2, 1, 96)
    foreign = transformers.DynamicCache()
    foreign.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="past_key_values"):
        theirs(IDS, past_key_values=foreign)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_positions_that_begin_again_are_packed_documents(name: str, tmp_path: Path) -> None:
    """As data collators of transformers pack them: each document has the logits that it has alone."""
    _, theirs = exported(CONFIGS[name], tmp_path / "out")
    lengths = ((10, 14), (24,))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    found = theirs(IDS, position_ids=positions, use_cache=True, output_hidden_states=True)
    assert found.past_key_values is None and {h.shape for h in found.hidden_states} == {(2, 24, 32)}
    for row, documents in enumerate(lengths):
        parts = zip(IDS[row].split(documents), found.logits[row].split(documents), strict=True)
        for ids, logits in parts:
            torch.testing.assert_close(logits, theirs(ids[None]).logits[0], atol=1e-5, rtol=0)
    assert not torch.allclose(found.logits[0, 10:], theirs(IDS).logits[0, 10:], atol=1e-3)


@torch.no_grad()
def test_positions_say_nothing_else(tmp_path: Path) -> None:
    _, theirs = exported(HYBRID, tmp_path / "out")
    plain, columns = theirs(IDS, use_cache=True), torch.arange(24)[None]
    assert torch.equal(theirs(IDS, position_ids=columns).logits, plain.logits)
    step = theirs(IDS[:, :1], position_ids=torch.tensor([[24]]), past_key_values=plain.past_key_values)
    assert step.logits.shape == (2, 1, 96)
    for wrong in (columns + 1, columns * 2, columns.flip(1)):
        with pytest.raises(ValueError, match="position_ids"):
            theirs(IDS, position_ids=wrong)
    with pytest.raises(ValueError, match="position_ids"):  # a cache holds one document a row
        theirs(IDS[:, :1], position_ids=torch.tensor([[0]]), past_key_values=plain.past_key_values)
    # Padding says where rows begin: positions that are made of it are taken, also of a token behind a padded prompt.
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    padded = theirs(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    assert torch.equal(padded.logits, theirs(IDS, attention_mask=mask).logits)
    longer = torch.cat([mask, mask[:, -1:]], 1)
    last = longer.sum(1, keepdim=True) - 1
    theirs(IDS[:, :1], attention_mask=longer, position_ids=last, past_key_values=padded.past_key_values)


@torch.no_grad()
def test_padding_on_the_right_is_one_pass_alone(tmp_path: Path) -> None:
    """Between tokens of a row padding would enter Lightning's states, so going on behind it is refused."""
    _, theirs = exported(HYBRID, tmp_path / "out")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    padded = theirs(IDS, attention_mask=mask, position_ids=torch.arange(24)[None], use_cache=True)
    torch.testing.assert_close(padded.logits[0, :20], theirs(IDS[:1, :20]).logits[0], atol=1e-5, rtol=0)
    longer = torch.cat([mask, mask[:, :1]], 1)
    with pytest.raises(ValueError, match="pad prompts at the left"):
        theirs(IDS[:, :1], attention_mask=longer, past_key_values=padded.past_key_values)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="between tokens"):
        theirs(IDS, attention_mask=mask)
    mask[0, 5] = 1
    packed = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with pytest.raises(ValueError, match="pack documents without padding"):
        theirs(IDS, attention_mask=mask, position_ids=packed)
    with pytest.raises(ValueError, match="position_ids that begin again"):
        theirs(IDS[:1], cu_seq_lens_q=torch.tensor([0, 10, 24], dtype=torch.int32))


@torch.no_grad()
def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    _, theirs = exported(HYBRID, tmp_path / "out")
    kept = torch.tensor([3, 5])
    assert torch.equal(theirs(IDS, logits_to_keep=kept).logits, theirs(IDS).logits[:, kept])
    with pytest.raises(ValueError, match="output_attentions"):
        theirs(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask"):
        theirs(IDS, attention_mask=torch.ones(2, 1, 24, 24))
    seen = theirs(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="nothing is left"):
        theirs.generate(IDS, past_key_values=seen, max_new_tokens=2)


@torch.no_grad()
def test_bf16_loads_as_openling_does(tmp_path: Path) -> None:
    _, theirs = exported(HYBRID, tmp_path / "out", dtype=torch.bfloat16)
    ours = openling.load(tmp_path / "out", dtype=torch.bfloat16).model
    assert {b.dtype for n, b in theirs.named_buffers() if n.endswith("expert_bias")} == {torch.float32}
    assert torch.equal(theirs(IDS).logits, ours(IDS))


def test_gradients_flow_and_the_model_saves_again(tmp_path: Path) -> None:
    _, theirs = exported(HALF_MIGRATED, tmp_path / "out")
    theirs.train()
    theirs(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in theirs.parameters())
    theirs.eval().save_pretrained(tmp_path / "again")
    again = openling.load(tmp_path / "again").model
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), theirs(IDS).logits, atol=1e-5, rtol=0)


def test_golden_logits_under_transformers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = GOLDEN / "ling-2.6-tiny"
    with pytest.warns(UserWarning, match="lightning_decay_offset"):
        save(openling.load(source).model, tmp_path / "out", source=source)
    expected = load_file(source / "expected.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(expected["input_ids"]).logits, expected["logits"], atol=1e-4, rtol=0)


def test_remote_file_stands_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(remote_code())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def write_tokenizer(folder: Path, size: int) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w5")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.filterwarnings("ignore:lightning_decay_offset")
def test_the_folder_is_complete(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save(tiny(HYBRID), source)
    tokenizer = write_tokenizer(source, 90)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 95], "temperature": 0.7}')
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# source\n")
    loaded = openling.load(source)
    about = {"stage": "lightning", "tokens": 123}
    save(loaded.model, out, source=source, dtype=torch.bfloat16, provenance=about, name="a hybrid")
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["norm_topk_prob"], config["num_kv_heads_for_linear_attn"]) == ("bfloat16", True, 4)
    assert config["layer_kinds"] == ["lightning", "mla"] * 2
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [5, 95]
    assert json.loads((out / "openling.json").read_text())["tokens"] == 123
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| tokens | 123 |" in card
    assert "\n# a hybrid\n" in card
    assert (out / "LICENSE").read_text() == "terms"
    text = "w3 w7 w11"
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)(text).input_ids == tokenizer(text).input_ids
    again = openling.load(out)
    assert again.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert again.tokenizer.chat_template == tokenizer.chat_template
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    for name, tensor in loaded.model.state_dict().items():
        kept = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        assert torch.equal(again.model.state_dict()[name], tensor.to(kept)), name


@pytest.mark.parametrize("named", ["TokenizersBackend", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "llama"])
def test_text_is_split_as_the_source_splits_it(model_type: str, named: str, tmp_path: Path) -> None:
    """transformers chooses a tokenizer's class by the model's type, too, and qwen2's splits blanks in a way of its own."""
    source = tmp_path / "source"
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(source)
    for name, changes in (("tokenizer_config.json", {"tokenizer_class": named}), ("config.json", {"model_type": model_type})):
        path = source / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    save(tiny(HYBRID), tmp_path / "out", companions=source)
    theirs, ours = (load_tokenizer(folder) for folder in (source, tmp_path / "out"))
    text = "\n\n  Hello 12  x"
    assert ours(text).input_ids == theirs(text).input_ids
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after == before or after == before | {"tokenizer_class": type(theirs).__name__}

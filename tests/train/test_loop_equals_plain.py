"""The loop against a plain PyTorch loop written out by hand in FP64: packed documents, experts, MTP, z, accumulation, ramp."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed_training import MIXED, Ramped, documents, hybrid, run

from openling.data.batches import NO_TARGET
from openling.train.balance import shifted_bias
from openling.train.objective import counts, mtp_losses, objective, prepare


def plain_loop(model, source, config, steps):
    """Every document alone through the model, every loss by torch's own cross-entropy, torch's AdamW."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=False, foreach=False)
    losses = []
    model.train()
    for step in range(steps):
        batch = source.batch(step)
        flat, target = batch.flat_ids[0], batch.flat_targets[0]
        bounds = batch.cu_seqlens.tolist()
        ce, mtp, z = [], [], []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            ids, wanted = flat[start:stop][None], target[start:stop]
            h = model.model(ids)
            logits = model.logits(h)[0]
            known = wanted != NO_TARGET
            ce.append(F.cross_entropy(logits[known], wanted[known], reduction="none"))
            z.append(logits[known].logsumexp(-1).square())
            # The layer reads the hidden state at t and the embedding of t + 1, which a row's last token has in the next row.
            following = torch.where(known, wanted, 0)[None]
            layer = model.model.mtp_layers()[0]
            out = layer(h, model.model.word_embeddings(following), model.model.rope(following, 0, None))
            two = wanted[1:]
            mtp.append(F.cross_entropy(model.logits(out)[0, :-1][two != NO_TARGET], two[two != NO_TARGET], reduction="none"))
        parts = [torch.cat(x).mean() for x in (ce, z, mtp)]
        loss = parts[0] + config.z * parts[1] + config.mtp * parts[2]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / config.warmup_steps)
        optimizer.step()
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                bias = layer.mlp.gate.expert_bias
                bias.copy_(shifted_bias(bias, layer.mlp.tokens_E, config.bias_rate))
                layer.mlp.tokens_E = None
        losses.append([float(x.detach()) for x in (loss, parts[0], parts[2])])
    return losses


def test_equals_a_plain_loop_in_float64(tmp_path):
    source = Ramped(documents(), length=24, rows=6, ramp=((2, 2),))
    config = MIXED(steps=5, batch_size=6, accumulation=3, sequence_length=24, ramp={"start": 2, "tokens": 96, "stairs": 1})
    assert config.stairs == ((2, 2),)
    ours = run(tmp_path, config, source, model=hybrid().double())
    theirs = hybrid().double()
    expected = plain_loop(theirs, source, config, 5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Both are sums of at most 144 tokens' losses in FP64, in another order; five steps of AdamW keep rounding near 1e-14 of it,
    # where |g| is not itself rounding. Weights move by lr = 1e-3 a step, so 1e-9 is a millionth of a step.
    found = [[r["loss"], r["ce"], r["mtp"]] for r in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=0, msg=name)
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert [r["tokens"] for r in rows] == [48, 96, 240, 384, 528]


def test_shared_mtp_steps_equal_the_definition():
    """Three steps of one layer, document by document, token by token."""
    model = hybrid().double().train()
    batch = Ramped(documents(), length=24, rows=2).batch(0)
    config = MIXED(steps=1, batch_size=2, sequence_length=24, mtp_steps=3, z=0.0)
    part = prepare(batch, 3)
    found = objective(model, part, counts([part]), config)
    sums, number = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    bounds, flat, target = batch.cu_seqlens.tolist(), batch.flat_ids[0], batch.flat_targets[0]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        # A document that goes on in the next row: its next token is known here, nothing beyond it.
        tokens = flat[start:stop].tolist() + [t for t in target[stop - 1 : stop].tolist() if t != NO_TARGET]
        h = model.model(flat[None, start:stop])
        for k in range(1, 4):
            ahead = torch.tensor([[tokens[t + k] if t + k < len(tokens) else 0 for t in range(stop - start)]])
            h = model.model.mtp_layers()[0](h, model.model.word_embeddings(ahead), model.model.rope(ahead, 0, None))
            for t in range(len(tokens) - k - 1):
                sums[k - 1] -= model.logits(h)[0, t].log_softmax(-1)[tokens[t + k + 1]]
                number[k - 1] += 1
    assert number.tolist() == counts([part])[1:].tolist()
    torch.testing.assert_close(found.mtp, (sums / number).mean(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.loss, found.ce + 0.1 * found.mtp, atol=1e-12, rtol=1e-12)


def test_alignment_is_the_plain_formula_and_shares_add_up():
    """Document by document, against hooks on the layers: the mean over layers and tokens of the relative squared distance."""
    student, teacher = hybrid().double(), hybrid(seed=1).double()
    batch = Ramped(documents(), length=24, rows=4).batch(0)
    config = MIXED(steps=1, batch_size=4, sequence_length=24, align=2.0, kl=1.0, z=0.0, mtp=0.0)
    parts = [prepare(piece, 0) for piece in batch.split(2)]
    losses = [objective(student, part, counts(parts), config, teacher=teacher) for part in parts]

    def streams(model, ids):
        kept: list[torch.Tensor] = []
        hooks = [m.register_forward_hook(lambda m, i, out: kept.append(out)) for m in [*model.model.layers[:2], model.model.norm]]
        model(ids)
        for hook in hooks:
            hook.remove()
        return [x[0] for x in kept if x.dim() == 3][-3:]

    shares = []
    flat, target, bounds = batch.flat_ids[0], batch.flat_targets[0], batch.cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        known = target[start:stop] != NO_TARGET
        own, theirs = (streams(m, flat[None, start:stop]) for m in (student, teacher))
        pairs = [(a[known], b[known]) for a, b in zip(own, theirs, strict=True)]
        shares.append(torch.stack([(a - b).square().sum(-1) / b.square().sum(-1) for a, b in pairs]))
    expected = torch.cat(shares, dim=1).mean()
    torch.testing.assert_close(sum(one.align for one in losses), expected.detach(), atol=1e-12, rtol=1e-12)
    for one in losses:
        torch.testing.assert_close(one.loss, one.ce + one.kl + 2 * one.align, atol=1e-12, rtol=1e-12)
    assert float(objective(teacher, parts[0], counts(parts), config, teacher=teacher).align) == 0


@pytest.mark.parametrize(("form", "reaching"), [("none", [1, 1, 1]), ("later", [1, 0, 0]), ("all", [0, 0, 0])])
def test_mtp_steps_send_gradients_only_where_said(form, reaching):
    model = hybrid()
    part = prepare(Ramped(documents(), length=24, rows=2).batch(0), 3)
    h = torch.randn(1, 48, 32, requires_grad=True)
    base = (h, model.lm_head.weight, model.model.word_embeddings.weight)
    shares = mtp_losses(model, part, h, model.lm_head.weight, [1, 1, 1], form)
    for share, reaches in zip(shares, reaching, strict=True):
        found = torch.autograd.grad(
            share, (*base, model.model.mtp_layers()[0].eh_proj.weight), retain_graph=True, allow_unused=True
        )
        assert [g is not None for g in found[:3]] == [bool(reaches)] * 3
        assert float(found[3].norm()) > 0

"""On a GPU: gradients of a whole model under autocast, in kernels, are as exact as those of plain PyTorch; training resumes."""

import copy
import json

import numpy as np
import pytest
import torch

from openling.config.presets import PRESETS
from openling.config.train import TrainConfig
from openling.data.batches import MemoryBatches
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.ops.loss import head_loss
from openling.ops.pick import plain_twins
from openling.train.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small():
    """Lightning and MLA, dense and sparse layers, an MTP layer."""
    return read_config(PRESETS["nano"]())


def made(config):
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model, ids, bounds, *, half):
    """Of the next-token loss plus the MTP layer's, FP64 on the CPU."""
    h = None
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        h = model.model(ids, cu_seqlens=bounds)
        loss = head_loss(h, model.lm_head.weight, ids).loss
        for layer in model.model.mtp_layers():
            ahead = layer(h, model.model.word_embeddings(ids.roll(-1)), model.model.rope(ids, 0, bounds), cu_seqlens=bounds)
            loss = loss + head_loss(ahead, model.lm_head.weight, ids).loss
    loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def test_gradients_under_autocast_are_as_exact_as_plain_ones():
    # At an eps of 1e-6 a document's first token, which may leave the recurrence as next to nothing, decides a norm's gradient
    # (test_loop_on_gpus.py); the median below is 0.07 at 1e-2, on a CPU as well, and 0.2 to 0.3 at 1e-6.
    exact = made(small().replace(rms_norm_eps=1e-2)).double()
    model = copy.deepcopy(exact).float().cuda()
    ids = torch.randint(0, 250, (1, 700), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 130, 131, 700])
    wanted_loss, wanted = gradients(exact, ids, bounds, half=False)
    kernels_loss, kernels = gradients(model, ids.cuda(), bounds.cuda(), half=True)
    with plain_twins():
        plain_loss, plain = gradients(model, ids.cuda(), bounds.cuda(), half=True)
    assert kernels.keys() == wanted.keys()
    assert abs(kernels_loss - wanted_loss) < 2 * max(abs(plain_loss - wanted_loss), 2**-9 * wanted_loss)

    def error(found):
        # An expert's gradient jumps where rounding moves a token to another one: the whole stack is compared, not each entry.
        return {n: float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted if wanted[n].norm() > 0}

    ours, theirs = error(kernels), error(plain)
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > max(2 * theirs[name], 0.02)}
    assert not worse
    # and both are gradients of this loss: BF16 has 8 bits, and errors of some tens of roundings add up
    assert float(np.median(list(theirs.values()))) < 0.1


def test_the_residual_stream_has_the_dtype_of_autocast():
    model = made(small()).cuda()
    ids = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert model.model.embed(ids).dtype == torch.bfloat16
    assert model.model.embed(ids).dtype == torch.float32


def test_a_run_that_stops_and_resumes_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        rng = np.random.default_rng(0)
        batches = MemoryBatches([rng.integers(0, 16, size=20_000)], length=128, rows=8)
        config = TrainConfig(steps=20, batch_size=8, accumulation=2, sequence_length=128, lr=3e-3, mtp=0.1, bias_rate=1e-3)

        def run(name, settings, *, resume=False):
            model = made(small()).cuda()
            train(model, settings, batches, parameters=[""], run=tmp_path / name, resume=resume, progress=False)
            return model

        whole = run("whole", config)
        run("cut", config.model_copy(update={"max_seconds": 1e-9}))  # stops after its first step
        cut = run("cut", config, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
        rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["loss"] < rows[0]["loss"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200")
def test_experts_in_fp8_train_and_resume(tmp_path, monkeypatch):
    """As BF16 does, to 2 % of the loss (not derived); with the same bits where a run was stopped between."""
    pytest.importorskip("torchao")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rng = np.random.default_rng(0)
    texts = [rng.integers(40, size=200) for _ in range(200)]

    def run(folder, steps=30, resume=False, **changes):
        settings = TrainConfig(
            steps=steps, batch_size=8, sequence_length=128, lr=2e-3, warmup_steps=5, mtp=0.1, bias_rate=1e-3,
            checkpoint_steps=10, **changes,
        )  # fmt: skip
        model = made(small()).cuda()
        batches = MemoryBatches(texts, length=128, rows=8)
        train(model, settings, batches, parameters=[""], run=tmp_path / folder, progress=False, resume=resume)
        return model, [json.loads(line)["loss"] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    torch.use_deterministic_algorithms(True)
    try:
        whole, losses = run("whole", fp8_experts="rowwise")
        run("parts", steps=10, fp8_experts="rowwise")
        parts, again = run("parts", resume=True, fp8_experts="rowwise")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))
    half = run("half")[1]
    assert losses[-1] < losses[0]
    assert abs(losses[-1] / half[-1] - 1) < 0.02
    assert losses != half

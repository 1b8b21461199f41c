"""How often a conversion from disk reads experts, by its byte budget; the bits are the same."""

from collections import Counter

import pytest
import torch
from small_runs import openling_command, refused
from stream_jobs import job, same, settings, teacher, tensors, windows

from openling.migrate import stack
from openling.migrate.estimate import estimate
from openling.migrate.memory import fit_bytes, together
from openling.migrate.stack import weighted_sum
from openling.migrate.stream import convert_folder, outline
from openling.ops.moe import combine_experts
from openling.weights.io import CheckpointReader

SMALL, LARGE = 1, 1 << 40


def reads(monkeypatch, source, out, memory) -> Counter:
    """Reads of each expert's matrix, by its name."""
    counted, real = Counter(), stack.FolderStack.expert

    def expert(self, name, number):
        counted[name, number] += 1
        return real(self, name, number)

    monkeypatch.setattr(stack.FolderStack, "expert", expert)
    asked = job(source, out)
    convert_folder(type(asked)(**vars(asked) | {"memory": memory}), resume=False)
    return counted


def test_with_room_an_expert_is_read_once_in_a_stage(monkeypatch, tmp_path):
    """Without it once for every batch, of teacher and student together; what comes out are the same bits."""
    source = teacher(tmp_path / "source")
    once = reads(monkeypatch, source, tmp_path / "large", LARGE)
    stages = len(settings().stages)
    assert set(once.values()) == {stages}
    many = reads(monkeypatch, source, tmp_path / "small", SMALL)
    assert many.keys() == once.keys()
    batches = len(windows())
    assert stages < max(many.values()) <= stages * batches
    same(tensors(tmp_path / "large"), tensors(tmp_path / "small"))


def test_the_estimate_counts_the_reads(tmp_path):
    source = teacher(tmp_path / "source")
    batches = [w.numel() for w in windows()]
    plan = outline(source, settings(), "copy")
    reader = CheckpointReader(source)
    experts = sum(reader.nbytes(n) for b in plan.opened.bindings.values() if ".mlp.experts." in b.ours for n in b.theirs)
    said = {m: estimate(source, settings(), "copy", beside=tmp_path, batches=batches, memory=m) for m in (SMALL, LARGE)}
    assert said[LARGE].read_for_fits == 2 * reader.total_bytes
    assert said[SMALL].read_for_fits == 2 * (reader.total_bytes + (len(batches) - 1) * experts)
    assert said[LARGE].peak_memory > said[SMALL].peak_memory > fit_bytes(plan, max(batches))


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_batches_that_go_together_are_within_the_budget(tmp_path, left):
    """Budgets at the edge of so many batches, one byte below it, and beyond all."""
    plan = outline(teacher(tmp_path / "source"), settings(), "copy")
    batches = [64, 64, 32]
    fit, row = fit_bytes(plan, 64), 2 * 64 * stack.rows_bytes(plan.target)
    assert together(plan, batches, fit + left * row) == max(1, left)
    assert together(plan, batches, fit + (left + 1) * row - 1) == max(1, left)
    assert together(plan, batches, LARGE) == 3


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_experts_has_the_bits_of_the_whole_one(tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, 8, 48, generator=generator).to(dtype)
    weight = torch.rand(tokens, 8, generator=generator)
    index = torch.arange(8).expand(tokens, 8)
    x = torch.zeros(tokens, 48, dtype=dtype)
    whole = combine_experts(x, weight, index, 8, lambda expert, piece: rows[:, expert])
    assert torch.equal(weighted_sum(rows, weight).to(dtype), whole)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_no_amount_of_memory(tmp_path, value):
    source = teacher(tmp_path / "source")
    refused(openling_command("convert", source, tmp_path / "out", "--memory", value, "--weights-only"), "--memory", "GiB above 0")

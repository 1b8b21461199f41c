"""Lanes write what the model writes alone: over page ends, behind what is given, in lanes that were used before."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from openling.model.capture import CudaCapture
from openling.model.generate import Sampling, generate
from openling.model.lanes import Lanes, Start
from openling.ops.sampling import draw, draw_in_blocks

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from tiny_engine import KINDS, VOCAB, model, model_of  # noqa: E402

ROOM, COLD = 90, 1e-6
NONE = np.zeros(ROOM)
HEADS = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def likeliest(tiny, prompt, new):
    return generate(tiny, torch.tensor([prompt]), Sampling(max_new_tokens=new), stop_ids=())[0]


def until(lanes, count):
    found = []
    while len(found) < count:
        lanes.run(1)
        found += lanes.ended()
    return {e.lane: e.tokens for e in found}


def captured(run):
    """As a CUDA graph comes about: the step runs once beforehand."""
    run()
    return run


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mtp"])
@pytest.mark.parametrize("capture", [None, captured])
def test_every_lane_writes_what_its_prompt_alone_gives(kind, capture):
    tiny = model(kind)
    lanes = Lanes(tiny, count=3, room=ROOM, temperature=COLD, stops={VOCAB}, capture=capture)
    prompts, limits = [[1], [2, 3, 4], [5, 6]], [ROOM, 40, 75]
    lanes.start([Start(i, 0, p, limit, NONE) for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))])
    first = until(lanes, 1)
    assert lanes.free == [1]
    lanes.start([Start(1, 0, [7, 8], 30, NONE)])  # the lane's old keys and states are nobody's
    rest = until(lanes, 3)
    for got, prompt, limit in ((first[1], prompts[1], 40), (rest[0], [1], ROOM), (rest[1], [7, 8], 30), (rest[2], [5, 6], 75)):
        assert got == prompt + likeliest(tiny, prompt, limit - len(prompt))


def test_a_stop_ends_a_lane_and_it_goes_on_with_what_is_given_then():
    tiny = model("gqa")
    wanted = likeliest(tiny, [1], 20)
    stop = next(t for i, t in enumerate(wanted) if i > 2 and t not in wanted[:i])
    at = wanted.index(stop) + 1
    lanes = Lanes(tiny, count=2, room=ROOM, temperature=COLD, stops={stop})
    lanes.start([Start(1, 0, [1], ROOM, NONE)])
    assert until(lanes, 1)[1] == [1, *wanted[:at]]
    lanes.start([Start(1, at, [stop, 9], at + 6)])
    prompt = [1, *wanted[: at - 1], stop, 9]
    alone = likeliest(tiny, prompt, 4)
    end = alone.index(stop) + 1 if stop in alone else 4
    assert until(lanes, 1)[1] == prompt + alone[:end]


@pytest.mark.parametrize("vocab", [5, 256, 257, 1000])
def test_drawing_in_blocks_draws_the_same(vocab):
    generator = torch.Generator().manual_seed(vocab)
    units = (torch.rand(64, vocab, generator=generator) ** 20 * (1 << 40)).long()
    units[:, :3] = 0
    units[:, -1] = 1
    for uniform in (torch.rand(64, generator=generator).double(), torch.zeros(64).double(), torch.full((64,), 1 - 2.0**-53)):
        assert torch.equal(draw_in_blocks(units, uniform.double()), draw(units, uniform.double()))
    assert torch.equal(draw_in_blocks(units * 0, torch.zeros(64).double()), draw(units * 0, torch.zeros(64).double()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["hybrid", "gqa"])
def test_a_graph_writes_what_is_nearly_the_likeliest(kind):
    """In BF16 tokens may part from the FP64 ones; by these they are 0.01 less likely than the best on a CPU, 7 at random."""
    wide = {"hidden_size": 128, "kv_lora_rank": 128, **dict.fromkeys(HEADS, 32)}
    tiny = model_of(KINDS[kind].replace(**wide), dtype=torch.float32).to("cuda", torch.bfloat16)
    lanes = Lanes(tiny, count=7, room=ROOM, temperature=COLD, stops={VOCAB}, capture=CudaCapture())
    lanes.start([Start(i, 0, [i + 1] * (i + 1), ROOM, NONE) for i in range(7)])
    exact = copy.deepcopy(tiny).to("cpu", torch.float64)
    for lane, tokens in until(lanes, 7).items():
        assert len(tokens) == ROOM
        logits = exact(torch.tensor([tokens]))[0, lane:-1]
        chosen = logits.gather(1, torch.tensor(tokens)[lane + 1 :, None])[:, 0]
        assert (logits.amax(1) - chosen).mean() < 0.2

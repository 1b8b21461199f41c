"""The cache: rows, states, masks and bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.model.cache import Cache, GrowingBuffer

CPU = torch.device("cpu")


def rows(batch, count, seed):
    return torch.randn(batch, count, 2, 3, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 9)),
            st.tuples(st.just("crop"), st.integers(0, 30)),
            st.tuples(st.just("reorder"), st.permutations(range(3))),
        ),
        max_size=14,
    )
)
def test_a_growing_buffer_is_concatenation(steps):
    buffer, expected = GrowingBuffer(), torch.zeros(3, 0, 2, 3)
    for i, (what, value) in enumerate(steps):
        if what == "append":
            expected = torch.cat((expected, rows(3, value, i)), dim=1)
            assert torch.equal(buffer.append(rows(3, value, i)), expected)
        elif what == "crop":
            expected = expected[:, :value]
            buffer.crop(value)
        else:
            expected = expected[torch.tensor(value)]
            buffer.reorder(torch.tensor(value))
        assert buffer.nbytes == expected.numel() * 4
    assert torch.equal(buffer.append(rows(3, 0, 0)), expected)


def test_appends_are_amortised():
    """1000 single rows: doubling moves the storage about log2(1000) = 10 times, not 1000."""
    buffer, places = GrowingBuffer(), set()
    for i in range(1000):
        places.add((view := buffer.append(rows(1, 1, i))).data_ptr())
    assert view.shape == (1, 1000, 2, 3)
    assert len(places) <= 12
    assert buffer.nbytes == 1000 * 6 * 4


def test_earlier_views_are_not_overwritten_by_appends():
    buffer = GrowingBuffer()
    buffer.append(rows(1, 5, 0))
    view = buffer.append(rows(1, 1, 1))
    kept = view.clone()
    buffer.append(rows(1, 1, 2))
    assert torch.equal(view, kept)


def test_an_unused_buffer_has_no_bytes_and_can_be_reordered():
    buffer = GrowingBuffer()
    buffer.reorder(torch.tensor([0]))
    buffer.crop(3)
    assert buffer.nbytes == 0


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def test_there_is_no_mask_while_nothing_was_padding():
    cache = Cache(1)
    assert cache.extend_mask(None, 2, 4, CPU) is None
    cache.advance(4)
    assert cache.extend_mask(None, 2, 1, CPU) is None


def test_a_mask_goes_on_with_real_tokens():
    cache = Cache(1)
    first = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert cache.extend_mask(first, 2, 3, CPU).tolist() == first.bool().tolist()
    cache.advance(3)
    assert cache.extend_mask(None, 2, 2, CPU).tolist() == [[False, True, True, True, True], [True] * 5]


def test_tokens_before_the_first_mask_were_real():
    cache = Cache(1)
    cache.extend_mask(None, 1, 3, CPU)
    cache.advance(3)
    assert cache.extend_mask(torch.tensor([[0, 1]]), 1, 2, CPU).tolist() == [[True, True, True, False, True]]


def test_reorder_reaches_states_rows_and_mask():
    cache = Cache(2)
    cache.layers[0].state = torch.arange(3.0)[:, None]
    cache.layers[1].keys.append(torch.arange(3.0)[:, None, None])
    cache.extend_mask(torch.tensor([[0, 1], [1, 1], [1, 1]]), 3, 2, CPU)
    cache.reorder(torch.tensor([2, 0]))
    assert cache.layers[0].state.flatten().tolist() == [2.0, 0.0]
    assert cache.layers[1].keys.append(torch.zeros(2, 0, 1)).flatten().tolist() == [2.0, 0.0]
    assert cache.key_mask.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_rows_in_use_and_of_states(dtype, size):
    cache = Cache(2)
    cache.layers[0].state = torch.zeros(2, 4, 8, 8)
    cache.layers[1].keys.append(torch.zeros(2, 5, 16, dtype=dtype))
    cache.layers[1].keys.append(torch.zeros(2, 1, 16, dtype=dtype))  # capacity 10, 6 in use
    cache.layers[1].values.append(torch.zeros(2, 6, 4, dtype=dtype))
    assert cache.nbytes == 2 * 4 * 8 * 8 * 4 + 2 * 6 * (16 + 4) * size

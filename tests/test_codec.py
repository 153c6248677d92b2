"""Activations to rows and back: to the bit, in the model's own memory order, without padding."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrecycle import BatchError
from torchrecycle.codec import PRECISIONS, Layout, dense_stride, stride_order


def _layout(
    leaf: torch.Tensor, batch_dim: int = 0, ragged_dim: int | None = None, kept: torch.dtype | None = None
) -> Layout:
    ragged = () if ragged_dim is None else (ragged_dim,)
    empty = Layout(leaf.dim(), batch_dim, ragged, stride_order(leaf), (), leaf.dtype, kept or leaf.dtype)
    return replace(empty, shape=empty.row_shape(leaf.shape))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
@pytest.mark.parametrize("ragged_dim", [None, 0, 1, 2])
def test_rows_give_back_the_leaf_to_the_bit_and_in_its_memory_order(order, batch_dim, ragged_dim):
    if ragged_dim == batch_dim:
        return
    leaf = torch.empty_strided((4, 5, 6), dense_stride((4, 5, 6), order)).copy_(torch.randn(4, 5, 6))
    layout = _layout(leaf, batch_dim, ragged_dim)
    rows = layout.to_rows(leaf)
    assert rows.shape[0] == leaf.shape[batch_dim]
    assert ragged_dim is None or rows.shape[1] == leaf.shape[ragged_dim]
    assert rows.shape[1 if ragged_dim is None else 2 :] == layout.shape
    assert torch.equal(rows[2].reshape(-1).sort().values, leaf.select(batch_dim, 2).reshape(-1).sort().values)
    back = layout.to_model(rows.contiguous())
    assert torch.equal(back, leaf)
    assert back.stride() == leaf.stride()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_in_any_order_and_number_give_the_leaf_of_those_objects(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    batch_dim = data.draw(st.integers(0, len(shape) - 1))
    leaf = torch.empty_strided(shape, dense_stride(shape, order)).copy_(torch.randn(shape))
    layout = _layout(leaf, batch_dim)
    pick = torch.tensor(data.draw(st.lists(st.integers(0, shape[batch_dim] - 1), max_size=7)), dtype=torch.long)
    back = layout.to_model(layout.to_rows(leaf).contiguous().index_select(0, pick))
    assert torch.equal(back, leaf.index_select(batch_dim, pick))


def test_channels_last_stays_channels_last():
    leaf = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    layout = _layout(leaf)
    assert layout.shape == (5, 6, 4)
    back = layout.to_model(layout.to_rows(leaf).contiguous())
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back, leaf)


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_is_the_only_loss_and_the_dtype_comes_back(name):
    leaf = torch.randn(3, 7)
    layout = _layout(leaf, kept=PRECISIONS[name])
    rows = layout.to_rows(leaf)
    assert rows.dtype is PRECISIONS[name]
    back = layout.to_model(rows)
    assert back.dtype is torch.float32
    assert torch.equal(back, leaf.to(PRECISIONS[name]).float())
    assert (name == "float32") == torch.equal(back, leaf)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float64, torch.complex64]
)
def test_every_dtype_comes_back_to_the_bit(dtype):
    leaf = (torch.randn(3, 7) * 3).to(dtype)
    layout = _layout(leaf)
    back = layout.to_model(layout.to_rows(leaf))
    assert back.dtype is dtype
    assert torch.equal(back, leaf)


@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
def test_trimming_and_padding_put_each_token_back_at_its_place(side):
    place = torch.arange(6)[None, :]
    lengths = torch.tensor([6, 1, 0, 4])[:, None]
    mask = {
        "right": place < lengths,
        "left": place >= 6 - lengths,
        "both": (place > 0) & (place < lengths),
        "none": torch.ones(4, 6, dtype=torch.bool),
    }[side]
    leaf = torch.randn(4, 6, 3)
    layout = _layout(leaf, ragged_dim=1)
    values, counts = layout.trim(layout.to_rows(leaf), mask.long())
    assert values.shape == (int(mask.sum()), 3)
    assert counts.tolist() == mask.sum(1).tolist()
    back = layout.to_model(layout.pad(values, counts, mask.long()))
    assert torch.equal(back, leaf * mask[:, :, None])


def test_rows_padded_on_the_right_come_back_padded_on_the_left_and_longer():
    leaf = torch.randn(2, 3, 2)
    layout = _layout(leaf, ragged_dim=1)
    values, counts = layout.trim(layout.to_rows(leaf), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    back = layout.pad(values, counts, torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]))
    assert torch.equal(back[0, 3:], leaf[0, :2])
    assert torch.equal(back[1, 2:], leaf[1])
    assert not back[0, :3].any()


def test_a_mask_of_other_lengths_than_the_rows_is_an_error():
    leaf = torch.randn(2, 3, 2)
    layout = _layout(leaf, ragged_dim=1)
    values, counts = layout.trim(layout.to_rows(leaf), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    with pytest.raises(BatchError, match="mask was changed"):
        layout.pad(values, counts, torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_an_object_of_another_size_than_the_example_is_an_error_that_names_both():
    layout = _layout(torch.randn(2, 3, 8, 8))
    with pytest.raises(BatchError, match=r"\[3, 9, 8\] came where \[3, 8, 8\]"):
        layout.to_rows(torch.randn(2, 3, 9, 8))


def test_rows_carry_no_gradient():
    leaf = torch.randn(2, 3, requires_grad=True)
    assert not _layout(leaf).to_rows(leaf).requires_grad


def test_a_dimension_of_one_says_nothing_about_the_order_in_memory():
    assert stride_order(torch.randn(2, 1, 3)) == (0, 1, 2)
    assert dense_stride((2, 0, 3), (0, 1, 2)) == torch.empty(2, 0, 3).stride()

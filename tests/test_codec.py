"""Activations to rows and back: to the bit, in the model's own memory order, without padding."""

from __future__ import annotations

import itertools
import math
import struct
from collections import defaultdict
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


@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != "int8"])
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


# -- whole numbers and scales ------------------------------------------------------------------------------------------


def _scaled(leaf: torch.Tensor, batch_dim: int = 0, ragged_dim: int | None = None, per_object: int = 1) -> Layout:
    order = leaf if per_object == 1 else leaf.unflatten(batch_dim, (-1, per_object))
    layout = replace(_layout(leaf, batch_dim, ragged_dim), per_object=per_object, order=stride_order(order))
    return replace(layout, shape=layout.row_shape(leaf.shape)).kept_in(torch.int8)


def _there_and_back(layout: Layout, leaf: torch.Tensor) -> torch.Tensor:
    return layout.to_model(layout.dequantise(*layout.quantise(layout.to_rows(leaf))))


def _next_bfloat16(value: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", (bits + 0xFFFF) >> 16 << 16))[0]


def _single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _by_hand(leaf: torch.Tensor, objects: int, channels: int, block: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes back, and each value's scale, in a plain loop: a scale for each object and `block` of channels."""
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for place in itertools.product(*map(range, leaf.shape)):
        groups[place[objects], place[channels] // block].append(place)
    back, scales = torch.empty_like(leaf), torch.empty_like(leaf)
    for inside in groups.values():
        scale = _next_bfloat16(_single(max(abs(leaf[place].item()) for place in inside) / 127))
        for place in inside:
            whole = round(_single(leaf[place].item() / scale)) if scale else 0  # ties to even, as Python's own
            back[place], scales[place] = whole * scale, scale
    return back, scales


FORMS = {
    "tokens": ((3, 40, 5), 0, 2, 1),
    "few tokens": ((3, 4, 24), 0, 2, 8),
    "objects second": ((36, 2, 3), 1, 2, 1),
    "map": ((2, 3, 6, 7), 0, 1, 1),
    "small map": ((2, 12, 3, 3), 0, 1, 4),
    "map of one place": ((2, 64, 1, 1), 0, 1, 32),
    "channels behind": ((2, 6, 6, 3), 0, 3, 1),
    "video": ((2, 3, 2, 5, 4), 0, 1, 1),
    "vector": ((3, 96), 0, 1, 32),
    "vector of no such parts": ((2, 37), 0, 1, 37),
    "short vector": ((4, 5), 0, 1, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_int8_is_what_a_plain_loop_gives_and_within_half_a_scale(form, dtype, data):
    shape, objects, channels, block = FORMS[form]
    order = data.draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    size = 10.0 ** data.draw(st.integers(-30, 30) if dtype is not torch.float16 else st.integers(-3, 3))
    values = torch.randn(shape, generator=generator) * size
    values[torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    leaf = torch.empty_strided(shape, dense_stride(shape, order), dtype=dtype).copy_(values)
    layout = _scaled(leaf, objects)
    back = _there_and_back(layout, leaf)
    want, scales = _by_hand(leaf.float(), objects, channels, block)
    assert back.dtype is dtype
    assert back.stride() == leaf.stride()
    assert torch.equal(back, want.to(dtype))
    own = want.abs() * torch.finfo(dtype).eps  # what the model's own dtype rounds
    assert bool(((back.float() - leaf.float()).abs() <= scales * (0.5 + 1e-4) + own).all())


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    width=st.sampled_from([(), (6,), (2, 3)]),
    seed=st.integers(0, 2**32),
)
def test_int8_of_ragged_rows_is_that_of_each_row_alone_whatever_stands_at_padded_places(lengths, width, seed):
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(len(lengths), 9, *width, generator=generator)
    leaf[~mask] = math.inf
    layout = _scaled(leaf, ragged_dim=1)
    values, counts = layout.trim(layout.to_rows(leaf), mask)
    codes, scales = layout.quantise(values, counts)
    assert codes.dtype is torch.int8
    assert codes.shape == values.shape
    assert scales.shape == (len(lengths), *width)
    back = layout.to_model(layout.dequantise(layout.pad(codes, counts, mask), scales))
    for row, length in enumerate(lengths):
        alone = leaf[row : row + 1, :length].reshape(1, length, math.prod(width))
        want = _by_hand(alone, 0, 2)[0] if length else alone
        assert torch.equal(back[row, :length], want.reshape(length, *width))
        assert not back[row, length:].any()


def test_int8_of_frames_has_scales_of_its_own_for_each_frame():
    leaf = torch.randn(6, 4, 6, 6)
    leaf[::2] *= 1000
    layout = _scaled(leaf, per_object=2)
    assert layout.scale_shape == (2, 4)
    assert torch.equal(_there_and_back(layout, leaf), _by_hand(leaf, 0, 1)[0])


def test_a_channel_ten_times_as_large_costs_the_others_nothing():
    leaf = torch.randn(4, 50, 16)
    plain = _there_and_back(_scaled(leaf), leaf)
    leaf[:, :, 3] *= 10
    assert torch.equal(_there_and_back(_scaled(leaf), leaf)[:, :, [2, 4]], plain[:, :, [2, 4]])


def test_int8_takes_a_quarter_of_float32_and_two_bytes_for_each_scale():
    leaf = torch.randn(2, 50, 16)
    layout = _scaled(leaf)
    codes, scales = layout.quantise(layout.to_rows(leaf))
    nbytes = codes[0].numel() + 2 * scales[0].numel()
    assert layout.row_bytes(50 * 16) == nbytes == 50 * 16 + 2 * 16
    assert replace(layout, kept=torch.bfloat16).row_bytes(50 * 16) == 2 * 50 * 16


def test_zeros_stay_zeros_and_the_smallest_numbers_are_within_half_a_scale():
    leaf = torch.zeros(3, 40)
    leaf[1] = 1e-45
    leaf[2] = 1e-40
    layout = _scaled(leaf)
    codes, scales = layout.quantise(layout.to_rows(leaf))
    back = layout.dequantise(codes, scales)
    assert not back[0].any()
    assert bool(((back - leaf).double().abs() <= scales.double() * 0.5001).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_of_a_dtype_do_not_become_infinite(dtype):
    end = torch.finfo(dtype).max
    leaf = torch.tensor([[end, -end, 0.3 * end]], dtype=dtype)
    back = _there_and_back(_scaled(leaf), leaf)
    assert back.isfinite().all()
    assert bool(((back.double() - leaf.double()).abs() <= end / 127 * 1.01).all())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("ragged_dim", [None, 1])
def test_what_int8_has_no_place_for_is_refused_and_bfloat16_is_named(value, ragged_dim):
    leaf = torch.randn(2, 3, 4)
    leaf[1, 1, 2] = value
    layout = _scaled(leaf, ragged_dim=ragged_dim)
    rows = layout.to_rows(leaf)
    arguments = (rows,) if ragged_dim is None else layout.trim(rows, torch.ones(2, 3))
    with pytest.raises(BatchError, match=r"infinities .* 'bfloat16'"):
        layout.quantise(*arguments)


def test_numbers_beyond_float32_are_refused_in_words():
    leaf = torch.full((2, 3), 1e300, dtype=torch.float64)
    with pytest.raises(BatchError, match=r"values up to 1e\+300"):
        _there_and_back(_scaled(leaf), leaf)
    small = torch.randn(2, 40, 3, dtype=torch.float64)
    back = _there_and_back(_scaled(small), small)
    assert back.dtype is torch.float64
    assert (back - small).abs().max() <= small.abs().max() / 127


def test_only_what_whole_numbers_suit_is_scaled():
    assert _scaled(torch.randn(2, 3)).scaled
    assert not _scaled(torch.arange(6).view(2, 3)).scaled
    assert not _scaled(torch.ones(2, 3, dtype=torch.bool)).scaled
    assert not _scaled(torch.ones(2, 3, dtype=torch.int8)).scaled
    assert not _scaled(torch.randn(2, 3, dtype=torch.complex64)).scaled
    assert not _scaled(torch.randn(5)).scaled  # single numbers
    assert not _scaled(torch.randn(5, 0)).scaled
    biases = replace(_layout(torch.randn(2, 4, 6, 6)), ragged_dims=(2, 3), shape=(4,)).kept_in(torch.int8)
    assert not biases.scaled
    assert biases.kept is torch.float32


def test_rows_of_another_granularity_have_another_recipe():
    forms = [_scaled(torch.randn(shape)) for shape in ((2, 40, 6), (2, 6, 8, 8), (2, 8, 8, 6), (2, 240), (2, 4, 24))]
    assert len({layout.recipe for layout in forms}) == len(forms)


def test_no_rows_give_no_rows():
    layout = _scaled(torch.randn(2, 40, 6))
    codes, scales = layout.quantise(torch.empty(0, 40, 6))
    assert layout.dequantise(codes, scales).shape == (0, 40, 6)


def test_a_dimension_of_one_says_nothing_about_the_order_in_memory():
    assert stride_order(torch.randn(2, 1, 3)) == (0, 1, 2)
    assert dense_stride((2, 0, 3), (0, 1, 2)) == torch.empty(2, 0, 3).stride()

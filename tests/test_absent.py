"""Tensors that are not there: every operation keeps their form, and none makes up a value."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from torchrecycle import BatchError, RecycledTensor
from torchrecycle.absent import Absent, AbsentRead


def _absent(*shape: int, dtype: torch.dtype = torch.float32, source: Any = 1) -> Absent:
    return Absent(shape, dtype, torch.device("cpu"), [source])


# -- Absent: operations ------------------------------------------------------------------------------------------------

OPERATIONS = {
    "add": lambda x: x + 1,
    "add real": lambda x: torch.ones(4, 1) + x,
    "matmul": lambda x: x @ torch.randn(6, 3),
    "linear": lambda x: F.linear(x, torch.randn(5, 6), torch.randn(5)),
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "softmax": lambda x: x.softmax(-1),
    "view": lambda x: x.view(2, 2, 6).transpose(0, 2),
    "flatten": lambda x: x.reshape(-1),
    "index": lambda x: x[:, 2:4],
    "gather": lambda x: x[torch.tensor([0, 3, 1])],
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "unbind": lambda x: x.unbind(0)[0],
    "cat": lambda x: torch.cat([x, torch.zeros(1, 6)]),
    "stack": lambda x: torch.stack([torch.zeros(4, 6), x]),
    "where": lambda x: torch.where(torch.ones(4, 6, dtype=torch.bool), x, 0.0),
    "masked fill": lambda x: x.masked_fill(torch.ones(4, 6, dtype=torch.bool), 3.0),
    "topk": lambda x: x.topk(2)[1],
    "max": lambda x: x.max(dim=1)[0],
    "compare": lambda x: x > 0,
    "half": lambda x: x.half(),
    "to": lambda x: x.to(torch.float64),
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, x),
    "sum": lambda x: x.sum(),
    "embedding": lambda x: F.embedding((x > 0).long(), torch.randn(2, 3)),
    "conv": lambda x: F.conv1d(x[None], torch.randn(5, 4, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "dropout": lambda x: F.dropout(x, 0.5),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)),
    "relu in place": lambda x: F.relu(x.clone(), inplace=True),
    "operator in place": lambda x: x.clone().add_(1).mul_(torch.ones(4, 6)),
    "write a real part": lambda x: _with_item(x, torch.ones(6)),
    "contiguous": lambda x: x.t().contiguous(),
    "expand": lambda x: x[:, None].expand(4, 3, 6),
    "detach": lambda x: x.detach(),
    "channels last": lambda x: x[None, None].contiguous(memory_format=torch.channels_last),
}


def _with_item(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0] = part
    return x


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_an_absent_tensor_gives_an_absent_one_of_the_form_that_a_real_one_has(name):
    operation = OPERATIONS[name]
    real, got = operation(torch.randn(4, 6)), operation(_absent(4, 6))
    for _ in range(2):  # the second time the rule is remembered
        assert type(got) is Absent
        assert (got.shape, got.dtype, got.device) == (real.shape, real.dtype, real.device)
        assert got.stride() == real.stride()
        assert got.sources == {1}
        got = operation(_absent(4, 6))


def test_sources_are_joined_also_by_writing_in_place():
    a, b = _absent(4, source=1), _absent(4, source="x")
    assert (a + b).sources == {1, "x"}
    a.add_(b)
    assert a.sources == {1, "x"}


@pytest.mark.parametrize(
    "make", [torch.zeros_like, torch.ones_like, lambda x: torch.full_like(x, 3), lambda x: x.new_ones(2, 3)]
)
def test_a_factory_that_reads_only_the_form_gives_a_real_tensor(make):
    got, want = make(_absent(4, 6)), make(torch.randn(4, 6))
    assert type(got) is torch.Tensor
    assert torch.equal(got, want)


def test_a_random_factory_draws_as_it_would_from_a_real_tensor():
    for make in (torch.rand_like, torch.randn_like):
        torch.manual_seed(1)
        want = make(torch.zeros(4, 6))
        torch.manual_seed(1)
        assert torch.equal(make(_absent(4, 6)), want)


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if any": lambda x: 1 if (x > 0).any() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "data_ptr": lambda x: x.data_ptr(),
    "equal": lambda x: torch.equal(x, torch.zeros(4, 6)),
    "allclose": lambda x: torch.allclose(x, torch.zeros(4, 6)),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: torch.ones(4, 6)[x > 0],
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.arange(4).repeat_interleave((x[:, 0] > 0).long()),
    "into a real tensor": lambda x: torch.zeros(4, 6).add_(x),
    "into a part": lambda x: _with_item(torch.zeros(4, 6), x[0]),
    "copy_": lambda x: torch.zeros(4, 6).copy_(x),
    "out": lambda x: torch.add(x, 1, out=torch.zeros(4, 6)),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
    "save": lambda x: torch.save(x, io.BytesIO()),
    "format": lambda x: f"{x.sum():.3f}",
    "resize_": lambda x: x.resize_(2, 2),
    "iterate": lambda x: [float(v) for v in x[0]],
}


@pytest.mark.parametrize("name", READS)
def test_reading_the_value_or_writing_it_into_a_real_tensor_stops(name):
    with pytest.raises(AbsentRead) as stopped:
        READS[name](_absent(4, 6))
    assert stopped.value.sources == {1}


def test_a_model_cannot_catch_the_stop_by_accident():
    def careful(x: torch.Tensor) -> float:
        try:
            return x.sum().item()
        except Exception:
            return 0.0

    with pytest.raises(AbsentRead):
        careful(_absent(3))


def test_printing_an_absent_tensor_says_where_it_comes_from():
    assert "from ['1']" in repr(_absent(4, 6))


# -- RecycledTensor ----------------------------------------------------------------------------------------------------


def _recycled(
    rows: int = 6, *, value: bool = False, misses: tuple[int, ...] = (), fingerprint: str = "f" * 32, leaf: int = 3
) -> RecycledTensor:
    at = torch.arange(rows)
    real = at.float()[:, None, None, None].expand(rows, 3, 8, 8).clone()
    return RecycledTensor(
        (rows, 3, 8, 8),
        torch.float32,
        locations=torch.tensor([-1 - i if i in misses else i for i in range(rows)]),
        fingerprint=fingerprint,
        leaves=[at[:, None].expand(rows, leaf).clone().float(), at.clone().half()],
        value=real if value else None,
        missing=real[list(misses)] if misses and not value else None,
        witnesses={"mask": at[:, None].clone()},
    )


def _assert_holds(tensor: Any, at: list[int]) -> None:
    """Every part belongs to the objects at these places."""
    assert isinstance(tensor, RecycledTensor)
    assert tensor.shape == (len(at), 3, 8, 8)
    locations = tensor.locations.tolist()
    assert [-1 - i if i < 0 else i for i in locations] == at
    misses = [i for i, location in zip(at, locations, strict=True) if location < 0]
    assert len(tensor.misses) == len(misses)
    if tensor.missing is not None:
        assert tensor.missing.shape == (len(misses), 3, 8, 8)
        assert tensor.missing[:, 0, 0, 0].tolist() == misses
    else:
        assert not misses or tensor.value is not None
    assert tensor.leaves is not None
    assert tensor.leaves[0][:, 0].tolist() == at
    assert tensor.leaves[1].tolist() == at
    assert tensor.witnesses["mask"][:, 0].tolist() == at
    if tensor.value is not None:
        assert tensor.value[:, 0, 0, 0].tolist() == at


ROW_MOVES = {
    "slice": (lambda t: t[1:4], [1, 2, 3]),
    "open slice": (lambda t: t[4:], [4, 5]),
    "beyond": (lambda t: t[4:99], [4, 5]),
    "step": (lambda t: t[::2], [0, 2, 4]),
    "negative": (lambda t: t[-2:], [4, 5]),
    "narrow": (lambda t: t.narrow(0, 2, 3), [2, 3, 4]),
    "list": (lambda t: t[[5, 0, 0]], [5, 0, 0]),
    "negative list": (lambda t: t[[-1, -6]], [5, 0]),
    "tensor": (lambda t: t[torch.tensor([2, 1])], [2, 1]),
    "numpy": (lambda t: t[np.array([2, 1])], [2, 1]),
    "int32": (lambda t: t[torch.tensor([2, 1], dtype=torch.int32)], [2, 1]),
    "bool": (lambda t: t[torch.tensor([True, False, True, False, False, True])], [0, 2, 5]),
    "bool list": (lambda t: t[[True, False, True, False, False, True]], [0, 2, 5]),
    "index_select": (lambda t: t.index_select(0, torch.tensor([3, 3])), [3, 3]),
    "with ellipsis": (lambda t: t[2:3, ...], [2]),
    "flip": (lambda t: t.flip(0), [5, 4, 3, 2, 1, 0]),
    "empty": (lambda t: t[:0], []),
    "cat": (lambda t: torch.cat([t[4:], t[:2]]), [4, 5, 0, 1]),
    "cat by name": (lambda t: torch.cat([t[4:], t[:2]], dim=0), [4, 5, 0, 1]),
    "cat backwards": (lambda t: torch.cat([t[4:], t[:2]], dim=-4), [4, 5, 0, 1]),
    "stack": (lambda t: torch.stack([t[3], t[1]]), [3, 1]),
    "chunk": (lambda t: t.chunk(3)[1], [2, 3]),
    "split": (lambda t: t.split(4)[1], [4, 5]),
    "split sizes": (lambda t: t.split([1, 2, 3])[2], [3, 4, 5]),
    "tensor_split": (lambda t: torch.tensor_split(t, 3)[2], [4, 5]),
    "unbind": (lambda t: torch.stack(list(t.unbind(0))[:2]), [0, 1]),
    "unbind backwards": (lambda t: torch.stack(list(t.unbind(-4))[:2]), [0, 1]),
    "split backwards": (lambda t: t.split(4, dim=-4)[1], [4, 5]),
    "narrow backwards": (lambda t: t.narrow(-4, 2, 3), [2, 3, 4]),
    "stack backwards": (lambda t: torch.stack([t[3], t[1]], dim=-4), [3, 1]),
    "flip backwards": (lambda t: t.flip(-4), [5, 4, 3, 2, 1, 0]),
    "iterate": (lambda t: torch.stack([item for item in t][2:]), [2, 3, 4, 5]),
    "collate": (lambda t: default_collate([t[5], t[2]]), [5, 2]),
    "clone": (lambda t: t.clone(), [0, 1, 2, 3, 4, 5]),
    "detach": (lambda t: t.detach(), [0, 1, 2, 3, 4, 5]),
    "contiguous": (lambda t: t.contiguous(), [0, 1, 2, 3, 4, 5]),
    "channels last": (lambda t: t.to(memory_format=torch.channels_last), [0, 1, 2, 3, 4, 5]),
    "to": (lambda t: t.to("cpu", non_blocking=True), [0, 1, 2, 3, 4, 5]),
    "cpu": (lambda t: t.cpu(), [0, 1, 2, 3, 4, 5]),
    "to copy": (lambda t: t.to("cpu", copy=True), [0, 1, 2, 3, 4, 5]),
    "half": (lambda t: t.half(), [0, 1, 2, 3, 4, 5]),
    "float": (lambda t: t.double().float(), [0, 1, 2, 3, 4, 5]),
    "requires_grad_": (lambda t: t.requires_grad_(False), [0, 1, 2, 3, 4, 5]),
    "deepcopy": (copy.deepcopy, [0, 1, 2, 3, 4, 5]),
    "copy": (copy.copy, [0, 1, 2, 3, 4, 5]),
    "pickle": (lambda t: pickle.loads(pickle.dumps(t)), [0, 1, 2, 3, 4, 5]),
    "deepcopy of a slice": (lambda t: copy.deepcopy(t[2:4]), [2, 3]),
}


@pytest.mark.parametrize("misses", [(), (1, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", ROW_MOVES)
def test_a_move_of_trainers_keeps_rows_and_what_was_read_with_their_objects(name, value, misses):
    move, at = ROW_MOVES[name]
    moved = move(_recycled(value=value, misses=misses))
    _assert_holds(moved, at)
    assert moved.locations.tolist() == [-1 - i if i in misses else i for i in at]


def test_a_move_to_another_dtype_changes_what_it_stands_for_and_no_row():
    tensor = _recycled()
    half = tensor.to(torch.float16)
    assert half.dtype is torch.float16
    assert half.leaves is not None
    assert [leaf.dtype for leaf in half.leaves] == [torch.float32, torch.float16]
    assert half.locations.dtype is torch.int64


def test_a_single_item_has_the_shape_of_one_object_and_stacks_again():
    item = _recycled()[4]
    assert item.shape == (3, 8, 8)
    assert item.rows == 1
    assert item.locations.tolist() == 4
    last = _recycled()[-1]
    assert last.locations.tolist() == 5


@pytest.mark.parametrize("index", [[6], [-7], torch.tensor([0, 6]), 6, -7])
def test_an_index_beyond_the_batch_is_an_error_and_hands_out_no_row(index):
    with pytest.raises(IndexError):
        _recycled()[index]


def test_a_boolean_index_of_another_length_is_an_error():
    with pytest.raises(IndexError):
        _recycled()[torch.tensor([True, False])]


def test_length_and_form_are_those_of_the_input_that_it_stands_for():
    tensor = _recycled()
    assert len(tensor) == tensor.size(0) == 6
    assert tensor.dim() == tensor.ndim == 4
    assert tensor.numel() == 6 * 3 * 64
    assert tensor.dtype is torch.float32
    assert tensor.device == torch.device("cpu")
    assert isinstance(tensor, torch.Tensor)
    assert "6 kept rows" in repr(tensor)
    assert tensor.is_floating_point()


VALUE_READS = {
    "item": lambda t: t[0, 0, 0, 0].item(),
    "sum": lambda t: t.sum(),
    "add": lambda t: t + 1,
    "divide": lambda t: t / 255,
    "compare": lambda t: t == 0,
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "asarray": lambda t: np.asarray(t),
    "channel": lambda t: t[:, 0],
    "crop": lambda t: t[:, :, 2:4],
    "flip width": lambda t: t.flip(3),
    "transpose": lambda t: t.transpose(0, 1),
    "flatten": lambda t: t.flatten(1),
    "view": lambda t: t.view(6, -1),
    "cat channels": lambda t: torch.cat([t, t], dim=1),
    "cat with real": lambda t: torch.cat([t, torch.zeros(1, 3, 8, 8)]),
    "stack batches": lambda t: torch.stack([t, t]),
    "new axis": lambda t: t[None],
    "two indices": lambda t: t[[0, 1], [0, 1]],
    "conv": lambda t: F.conv2d(t, torch.randn(2, 3, 3, 3)),
    "layer": lambda t: nn.Flatten()(t),
    "real by absent": lambda t: torch.ones(6, 3, 8, 8)[t > 0],
    "data_ptr": lambda t: t.data_ptr(),
    "equal": lambda t: torch.equal(t, t),
    "mean": lambda t: t.float().mean(),
}


@pytest.mark.parametrize("misses", [(), (1, 2, 4)])
@pytest.mark.parametrize("name", VALUE_READS)
def test_reading_values_that_were_not_loaded_is_an_error_that_says_what_to_do(name, misses):
    with pytest.raises(BatchError, match=r"paused|not loaded|join"):
        VALUE_READS[name](_recycled(misses=misses))


def test_values_of_objects_that_were_read_since_they_have_no_row_can_be_read():
    tensor = _recycled(misses=(2, 3))
    assert (tensor[2:4] + 1)[:, 0, 0, 0].tolist() == [3, 4]
    assert tensor[3].mean().item() == 3
    assert tensor[2:4].half().numpy().dtype == np.float16
    assert tensor.half()[2:4].missing.dtype is torch.float32  # what the prefix reads


def test_values_that_came_along_can_be_read_and_give_plain_tensors():
    tensor = _recycled(value=True)
    assert type(tensor + 1) is torch.Tensor
    assert (tensor + 1)[3, 0, 0, 0] == 4
    assert tensor[2:].sum().item() == (2 + 3 + 4 + 5) * 192
    assert tensor.tolist()[1][0][0][0] == 1.0
    assert np.asarray(tensor).shape == (6, 3, 8, 8)
    assert bool((tensor == tensor.value).all())


WRITES = {
    "add_": lambda t: t.add_(1),
    "zero_": lambda t: t.zero_(),
    "item": lambda t: t.__setitem__(0, 1.0),
    "row": lambda t: t.__setitem__(0, torch.ones(3, 8, 8)),
    "masked_fill_": lambda t: t.masked_fill_(torch.ones(6, 3, 8, 8, dtype=torch.bool), 0),
    "copy_": lambda t: t.copy_(torch.ones(6, 3, 8, 8)),
    "out": lambda t: torch.add(torch.ones(6, 3, 8, 8), 1, out=t),
    "resize_": lambda t: t.resize_(2, 2),
}


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_writing_into_a_recycled_batch_is_an_error(name, value):
    with pytest.raises(BatchError):
        WRITES[name](_recycled(value=value))


def test_rows_of_different_recyclings_or_lengths_are_not_joined():
    with pytest.raises(BatchError, match="different recyclings"):
        torch.cat([_recycled(), _recycled(fingerprint="0" * 32)])
    with pytest.raises(BatchError, match="lengths"):
        torch.cat([_recycled(), _recycled(leaf=4)])


def test_joining_inputs_of_different_size_is_an_error():
    a = _recycled()
    b = RecycledTensor(
        (6, 3, 9, 9),
        torch.float32,
        locations=a.locations,
        fingerprint=a.fingerprint,
        leaves=a.leaves,
        witnesses=a.witnesses,
    )
    with pytest.raises(RuntimeError, match="size"):
        torch.cat([a, b])


class Items(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {"image": _recycled()[index], "label": index}


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
def test_workers_collate_and_send_recycled_items(context):
    workers = {} if context is None else {"num_workers": 1, "multiprocessing_context": context}
    batches = list(DataLoader(Items(), batch_size=4, **workers))
    _assert_holds(batches[0]["image"], [0, 1, 2, 3])
    _assert_holds(batches[1]["image"], [4, 5])
    assert batches[1]["label"].tolist() == [4, 5]

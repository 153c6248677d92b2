"""The tensors that are not there: `Absent` inside a model, `RecycledTensor` in the user's loop.

When the first half of a ResNet is skipped, the glue of its ``forward`` still runs: it hands what ``conv1`` returned to
``bn1``. Nobody computed that value, so ``conv1`` returns an `Absent` of the right shape, dtype and device. Every
operation on it gives another `Absent` (about 10 microseconds, the shape rule is remembered), and reading its value
stops the run with `AbsentRead`, which names the skipped calls that it came from. A marker value such as NaN would be
unsound: integers have none, and ``where``, ``topk`` or ``masked_fill`` swallow it.

A `RecycledTensor` is what a batch carries across the user's loop in place of 64 photos: a tensor with the shape, dtype
and device of the photos, which holds the 64 kept rows and no pixels. Where 3 of the rows are not kept, it holds 61 rows
and the pixels of 3 photos. It survives what trainers do to a batch (moves, slices, ``cat``, pinning, pickling through
workers); whatever would read its values is an error that says so, unless the real value is small and came along (token
ids).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from torchrecycle.errors import BatchError

__all__ = ["Absent", "AbsentRead", "RecycledTensor"]

aten = torch.ops.aten


class AbsentRead(BaseException):
    """A run read a value that is not there. Not an `Exception`, since models contain ``except Exception``."""

    def __init__(self, reason: str, sources: frozenset[Any]) -> None:
        super().__init__(reason)
        self.reason = reason
        """What tried to read it, in words."""
        self.sources = sources
        """The skipped calls (numbers) and model inputs (names) that the value would have come from."""


# -- Absent ------------------------------------------------------------------------------------------------------------

_BY_SHAPE_ALONE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operations that read no value: on an absent tensor they give a real one."""

_RESHAPE_IN_PLACE = {
    "aten::resize_",
    "aten::set_",
    "aten::squeeze_",
    "aten::unsqueeze_",
    "aten::t_",
    "aten::transpose_",
}

_shape_rules: dict[Any, Any] = {}
_plain_rules: dict[Any, tuple[Any, Any, torch.dtype]] = {}
"""Shape, strides and dtype of what operations give that write nothing and return one tensor, by `_token`."""
_written_arguments: dict[Any, tuple[int, ...]] = {}
_REMEMBERED = 4096


class Absent(torch.Tensor):
    """A tensor without storage: shape, strides, dtype and device of a value that nobody computed.

    Args:
        shape: its shape.
        dtype: its dtype.
        device: its device.
        sources: where the value would have come from: numbers of skipped calls, names of model inputs.
        stride: its strides in elements; contiguous if left out.
    """

    sources: frozenset[Any]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        sources: Iterable[Any] = (),
        stride: Sequence[int] | None = None,
    ) -> Absent:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), strides=stride, dtype=dtype, device=device)
        made.sources = frozenset(sources)
        return made

    @classmethod
    def like(cls, tensor: torch.Tensor, sources: Iterable[Any] = ()) -> Absent:
        """An absent tensor with the form of `tensor`."""
        return cls(tensor.shape, tensor.dtype, tensor.device, sources, tensor.stride())

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: list[Absent] = []
        token = _token(func, args, kwargs, found)
        known = _plain_rules.get(token) if token is not None else None
        if known is not None:
            sources = found[0].sources if len(found) == 1 else frozenset().union(*(value.sources for value in found))
            shape, stride, dtype = known
            return Absent(shape, dtype, kwargs.get("device") or found[0].device, sources, stride)
        return cls._by_rule(func, args, kwargs, token)

    @classmethod
    def _by_rule(cls, func: Any, args: Any, kwargs: Any, token: Any) -> Any:
        """The same for what was not seen before, or gives more than one plain tensor."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        absent = [value for value in flat if isinstance(value, Absent)]
        sources = frozenset().union(*(value.sources for value in absent))
        if func in _BY_SHAPE_ALONE:
            return _real_from_shape(func, flat, spec)
        target = _written_absent(func, args, kwargs, sources)
        rule = _shape_rule(func, flat, spec, sources)
        if target is not None:
            target.sources |= sources
            return target
        if token is not None and isinstance(rule, torch.Tensor) and not _written_arguments[func]:
            if len(_plain_rules) >= _REMEMBERED:
                _plain_rules.clear()
            _plain_rules[token] = (rule.shape, rule.stride(), rule.dtype)
        device = kwargs.get("device") or absent[0].device
        return _absent_like_rule(rule, torch.device(device), sources)

    def _refuse(self, what: str) -> NoReturn:
        raise AbsentRead(f"{what} reads a value that a skipped layer would have computed", self.sources)

    def tolist(self) -> NoReturn:
        self._refuse("tolist()")

    def numpy(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("numpy()")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("NumPy")

    def data_ptr(self) -> NoReturn:
        self._refuse("data_ptr()")

    def __format__(self, spec: str) -> str:
        return self._refuse("formatting") if spec else repr(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("pickling or copying")

    def __repr__(self, **kwargs: Any) -> str:  # pyright: ignore
        return f"Absent({list(self.shape)}, {self.dtype}, {self.device}, from {sorted(map(str, self.sources))})"


def _real_from_shape(func: Any, flat: list[Any], spec: Any) -> Any:
    """Run an operation that reads only a shape, on a real tensor of that shape that occupies one element."""

    def stand_in(value: Any) -> Any:
        if isinstance(value, Absent):
            return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
        return value

    args, kwargs = pytree.tree_unflatten([stand_in(value) for value in flat], spec)
    return func(*args, **kwargs)


def _written_absent(func: Any, args: Any, kwargs: Any, sources: frozenset[Any]) -> Absent | None:
    """The absent tensor that an in-place operation writes, if any; a real one is a value that would be wrong."""
    if func not in _written_arguments:
        written = (i for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write)
        _written_arguments[func] = tuple(written)
    for position in _written_arguments[func]:
        argument = func._schema.arguments[position]
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, Absent):
            if func._schema.name in _RESHAPE_IN_PLACE:
                raise AbsentRead(f"{func._schema.name} changes a tensor that is not there in place", sources)
            return value
        if isinstance(value, torch.Tensor):
            raise AbsentRead(f"{func._schema.name} writes an absent value into a real tensor", sources)
    return None


def _shape_rule(func: Any, flat: list[Any], spec: Any, sources: frozenset[Any]) -> Any:
    """What `func` returns, as meta tensors, remembered by operation and shapes."""
    token = (func, spec, tuple(_form(value) for value in flat))
    try:
        if token in _shape_rules:
            return _shape_rules[token]
    except TypeError:  # an unhashable argument, such as a generator
        token = None
    args, kwargs = pytree.tree_unflatten([_meta(value) for value in flat], spec)
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    try:
        rule = func(*args, **kwargs)
    except Exception as error:
        raise AbsentRead(f"{func} needs a value that is not there ({error})", sources) from error
    if not isinstance(rule, torch.Tensor) and any(
        isinstance(leaf, (bool, int, float)) for leaf in pytree.tree_leaves(rule)
    ):
        raise AbsentRead(f"{func} reads a value that is not there", sources)
    if token is not None:
        if len(_shape_rules) >= _REMEMBERED:
            _shape_rules.clear()
        _shape_rules[token] = rule
    return rule


_HASHED = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


def _token(func: Any, args: Any, kwargs: Any, found: list[Absent]) -> Any:
    """An operation with the forms of its arguments, and the absent ones among them; None where an argument is rare."""
    forms = tuple([_own_token(value, found) for value in args])
    if kwargs:
        forms += tuple([(name, _own_token(value, found)) for name, value in kwargs.items()])
    return None if _RARE in forms else (func, forms)


_RARE = object()


def _own_token(value: Any, found: list[Absent]) -> Any:
    kind = type(value)
    if kind in _HASHED:
        return kind, value
    if isinstance(value, torch.Tensor):
        if isinstance(value, Absent):
            found.append(value)
        return value.shape, value.stride(), value.dtype, value.device.type
    if kind is list or kind is tuple:
        parts = tuple([_own_token(part, found) for part in value])
        return _RARE if _RARE in parts else parts
    return _RARE


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    return (type(value), value)


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _absent_like_rule(rule: Any, device: torch.device, sources: frozenset[Any]) -> Any:
    if isinstance(rule, torch.Tensor):
        return Absent(rule.shape, rule.dtype, device, sources, rule.stride())
    if isinstance(rule, (tuple, list)):
        return type(rule)(_absent_like_rule(part, device, sources) for part in rule)
    return rule


# -- RecycledTensor ----------------------------------------------------------------------------------------------------


class RecycledTensor(torch.Tensor):
    """What a batch carries in place of a model input whose activations are kept.

    It has the shape, dtype and device of the input; memory format is nominal. Slicing and concatenating along the
    batch, moving, pinning, cloning and pickling keep the rows with their objects.

    Args:
        shape: of the model input that it stands for: ``[batch, ...]``, or of one object if `locations` is a scalar.
        dtype: of the model input.
        locations: int64 ``[batch]`` on the CPU: where the store has each row. Negative for an object without a row, and
            then a number that is the object's own, so that objects can be told apart.
        fingerprint: of the recycling that the rows belong to.
        numbering: whose locations these are; where rows have not been gathered, another one's would be other rows.
        input_name: of the model input that it stands for; a forward refuses it in another place.
        leaves: the activation's leaves, each ``[batch, ...]``, with anything at the places of objects without a row;
            None as long as they have not been gathered.
        value: the real input, if it came along.
        missing: if it did not, the real input of the objects without a row, ``[objects without a row, ...]`` in their
            order; None if all have one.
        witnesses: other model inputs that the rows were found under, by name; a forward compares them with what it is
            given, so that rows are never used beside another mask.
        device: of the model input.
        casts: the dtypes that it had before, as it was read first: rows know nothing of a cast, see `lossy_cast`.
    """

    locations: torch.Tensor
    fingerprint: str
    numbering: str
    input_name: str
    leaves: tuple[torch.Tensor, ...] | None
    value: torch.Tensor | None
    missing: torch.Tensor | None
    witnesses: dict[str, torch.Tensor]
    casts: tuple[torch.dtype, ...]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        locations: torch.Tensor,
        fingerprint: str,
        numbering: str = "",
        input_name: str = "",
        leaves: Sequence[torch.Tensor] | None = None,
        value: torch.Tensor | None = None,
        missing: torch.Tensor | None = None,
        witnesses: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
        casts: Sequence[torch.dtype] = (),
    ) -> RecycledTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device(device))
        made.locations = locations
        made.fingerprint = fingerprint
        made.numbering = numbering
        made.input_name = input_name
        made.leaves = None if leaves is None else tuple(leaves)
        made.value = value
        made.missing = missing
        made.witnesses = dict(witnesses or {})
        made.casts = tuple(casts)
        return made

    @property
    def rows(self) -> int:
        """How many objects it stands for."""
        return self.locations.numel()

    @property
    def misses(self) -> torch.Tensor:
        """Which of its objects have no row, by number, ascending: int64 on the CPU."""
        return (self.locations.reshape(-1) < 0).nonzero()[:, 0]

    def at_hand(self) -> torch.Tensor | None:
        """The input itself, if all of it is at hand."""
        if self.value is not None or self.missing is None or len(self.missing) < self.rows:
            return self.value
        missing = self.missing
        for dtype in (*self.casts[1:], self.dtype):
            missing = missing.to(dtype)
        return missing if self.locations.dim() else missing[0]

    def lossy_cast(self) -> tuple[torch.dtype, torch.dtype] | None:
        """The first cast that made another input of it than the rows were computed from, if there was one.

        One to narrower floating point numbers is none, also if it was taken back: trainers do that, and it rounds. To
        eight bits or fewer is one: that quantises.
        """
        for before, after in itertools.pairwise((*self.casts, self.dtype)):
            if _kind(before) != _kind(after) or _loses(before, after):
                return before, after
        return None

    def _moved(
        self,
        move: Callable[[torch.Tensor], torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        value: torch.Tensor | None = None,
        locations: torch.Tensor | None = None,
    ) -> RecycledTensor:
        """The same objects, with `move` applied to all that it holds."""
        missing = None if self.missing is None else move(self.missing)
        return self._with(move, missing, dtype=dtype, device=device, value=value, locations=locations)

    def _chosen(
        self,
        choose: Callable[[torch.Tensor], torch.Tensor],
        *,
        shape: Sequence[int] | None = None,
    ) -> RecycledTensor:
        """Some of its objects: `choose` takes them out of a tensor that has an entry for each."""
        missing = self.missing
        if missing is not None:
            numbers = torch.full_like(self.locations, -1).reshape(-1)
            numbers[self.misses] = torch.arange(len(missing))
            chosen = choose(numbers.reshape(self.locations.shape)).reshape(-1)
            chosen = chosen[chosen >= 0]
            missing = missing.index_select(0, chosen.to(missing.device)) if len(chosen) else None
        return self._with(choose, missing, shape=shape)

    def _with(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        missing: torch.Tensor | None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        value: torch.Tensor | None = None,
        locations: torch.Tensor | None = None,
    ) -> RecycledTensor:
        """The same, with `function` applied to what has an entry for each object."""
        own = self.value
        return RecycledTensor(  # pyright: ignore
            self.shape if shape is None else shape,
            dtype or self.dtype,
            locations=function(self.locations) if locations is None else locations,
            fingerprint=self.fingerprint,
            numbering=self.numbering,
            input_name=self.input_name,
            leaves=None if self.leaves is None else [function(leaf) for leaf in self.leaves],
            value=value if value is not None else None if own is None else function(own),
            missing=missing,
            witnesses={name: function(witness) for name, witness in self.witnesses.items()},
            device=device or self.device,
            casts=self.casts if dtype in (None, self.dtype) else (*self.casts, self.dtype),
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _ROW_WISE.get(func)
        if func.namespace in _COLLECTIVE:
            raise BatchError(_UNSENDABLE.format(func))
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif func not in _ROW_WISE and func.namespace == "aten":
            # Under inference mode composite operations (``aten.to``) arrive whole.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_values(func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (tuple(self.shape), self.dtype, str(self.device), self._parts())

    def __deepcopy__(self, memo: Any) -> RecycledTensor:
        return _rebuild(tuple(self.shape), self.dtype, str(self.device), copy.deepcopy(self._parts(), memo))

    def _parts(self) -> dict[str, Any]:
        return {
            "locations": self.locations,
            "fingerprint": self.fingerprint,
            "numbering": self.numbering,
            "input_name": self.input_name,
            "leaves": self.leaves,
            "value": self.value,
            "missing": self.missing,
            "witnesses": self.witnesses,
            "casts": self.casts,
        }

    def _refuse(self, what: str) -> NoReturn:
        raise BatchError(_unreadable(what, self))

    def _readable(self, what: str) -> torch.Tensor:
        real = self.at_hand()
        return self._refuse(what) if real is None else real

    def tolist(self) -> Any:
        return self._readable("tolist()").tolist()

    def numpy(self, **kwargs: Any) -> Any:
        return self._readable("numpy()").numpy(**kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._readable("NumPy").__array__(*args, **kwargs)

    def data_ptr(self) -> int:
        return self._readable("data_ptr()").data_ptr()

    def __repr__(self, **kwargs: Any) -> str:  # pyright: ignore
        misses = len(self.misses)
        without = f", and {misses} objects without a row" if misses else ""
        return (
            f"RecycledTensor({list(self.shape)}, {self.dtype}, {self.device}: {self.rows - misses} kept rows of "
            f"{self.fingerprint[:12]}{without}{'' if self.value is None else ', with its value'})"
        )


def _loses(before: torch.dtype, after: torch.dtype) -> bool:
    """Of two dtypes of one kind."""
    if before.is_floating_point:  # torch promotes none of eight bits
        return after.itemsize < min(2, before.itemsize)
    return torch.promote_types(before, after) != after


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "floating point" if dtype.is_floating_point else "whole numbers"


def _rebuild(shape: tuple[int, ...], dtype: torch.dtype, device: str, parts: dict[str, Any]) -> RecycledTensor:
    return RecycledTensor(shape, dtype, device=device, **parts)


def _unreadable(what: Any, tensor: RecycledTensor) -> str:
    return (
        f"{what} reads the values of a batch input that was not loaded: this RecycledTensor of shape "
        f"{list(tensor.shape)} holds the kept rows of {tensor.rows} objects in its place. Between loader and model "
        "only moves, slices and concatenations along the batch are possible. To work on the values, do it in the "
        "data set (before the rows are made), or use `with recycling.paused():` around the loop. "
        "A copy of a recycled model takes raw batches."
    )


def _writes_into_rows(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation changes a recycled batch in place, and does not copy one into a buffer."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    written = (given.get(one.name) for one in func._schema.arguments if one.alias_info and one.alias_info.is_write)
    return any(isinstance(leaf, RecycledTensor) for leaf in pytree.tree_leaves(list(written)))


_COLLECTIVE = frozenset({"c10d", "_c10d_functional"})
"""Operations in which processes take part together. One that received into a batch would leave its rows behind."""

_UNSENDABLE = (
    "{} sends a recycled batch to other processes, or takes one from them: each process finds the rows of its own "
    "batches. Let every process read its own, with a DistributedSampler or as Accelerate does unless it is given "
    "DataLoaderConfiguration(dispatch_batches=True) or an iterable data set; give it dispatch_batches=False then."
)


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Any other operation reads values: possible where the real input came along, and the result is plain."""
    if _writes_into_rows(func, args, kwargs):
        raise BatchError(f"{func} changes a recycled batch in place: its kept rows would no longer belong to it")

    def value_of(leaf: Any) -> Any:
        if not isinstance(leaf, RecycledTensor):
            return leaf
        real = leaf.at_hand()
        if real is None:
            raise BatchError(_unreadable(func, leaf))
        return real

    args, kwargs = pytree.tree_map(value_of, (args, kwargs))
    return func(*args, **kwargs)


def _same_rows(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._moved(lambda part: func(part, *args[1:], **kwargs))


def _detach(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._moved(lambda part: part)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    device = torch.device(kwargs.get("device") or tensor.device)
    non_blocking = kwargs.get("non_blocking", False)
    value = None if tensor.value is None else func(tensor.value, *args[1:], **kwargs)
    return tensor._moved(
        lambda part: part.to(device, non_blocking=non_blocking),
        dtype=kwargs.get("dtype"),
        device=device,
        value=value,
        locations=tensor.locations,
    )


def _along_batch(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices, selections and splits along the batch."""
    tensor, *rest = args
    at = _DIM_AT[func]
    dim = kwargs.get("dim", rest[at] if len(rest) > at else 0)
    if dim not in (0, -tensor.dim()) or tensor.locations.dim() == 0:
        return NotImplemented
    rest = [0 if position == at else value for position, value in enumerate(rest)]  # for the leaves, of other rank
    kwargs = {name: 0 if name == "dim" else value for name, value in kwargs.items()}
    nominal = func(_nominal(tensor), *rest, **kwargs)
    if isinstance(nominal, torch.Tensor):
        return tensor._chosen(lambda part: func(part, *_beside(rest, part), **kwargs), shape=nominal.shape)
    pieces = len(nominal)
    return [
        tensor._chosen(lambda part, i=i: func(part, *rest, **kwargs)[i], shape=nominal[i].shape) for i in range(pieces)
    ]


_DIM_AT = {
    aten.slice.Tensor: 0,
    aten.select.int: 0,
    aten.index_select.default: 0,
    aten.unbind.int: 0,
    aten.split.Tensor: 1,
    aten.split_with_sizes.default: 1,
}
"""Where each of these has the dimension among its arguments after the tensor."""


def _beside(rest: list[Any], part: torch.Tensor) -> list[Any]:
    return [r.to(part.device) if isinstance(r, torch.Tensor) else r for r in rest]


def _nominal(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of that shape that occupies one element, to ask what an operation makes of the shape."""
    return torch.zeros(()).expand(tensor.shape)


def _flip(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, dims = args
    if [dim % tensor.dim() for dim in dims] != [0] or tensor.locations.dim() == 0:
        return NotImplemented
    return tensor._chosen(lambda part: part.flip(0))


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, indices = args
    if isinstance(indices, RecycledTensor) or not isinstance(tensor, RecycledTensor):
        return NotImplemented
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1 or tensor.locations.dim() == 0:
        return NotImplemented
    index = indices[0].cpu()
    if index.dtype in (torch.bool, torch.uint8):
        if len(index) != len(tensor):
            raise IndexError(f"a mask of {len(index)} for a recycled batch of {len(tensor)} objects")
        index = index.nonzero()[:, 0]
    index = torch.where(index < 0, index + len(tensor), index)
    return tensor._chosen(
        lambda part: part.index_select(0, index.to(part.device)),
        shape=(len(index), *tensor.shape[1:]),
    )


def _joined(func: Any, args: Any, kwargs: Any) -> Any:
    """`cat` of batches and `stack` of single objects."""
    tensors = list(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    depth = 0 if func is aten.stack.default else 1
    if not all(isinstance(t, RecycledTensor) and t.locations.dim() == depth for t in tensors):
        return NotImplemented
    if dim not in (0, depth - 1 - tensors[0].dim()):
        return NotImplemented
    first = tensors[0]
    if any(t.fingerprint != first.fingerprint for t in tensors):
        raise BatchError("cannot join rows of different recyclings: their fingerprints differ")
    if any(t.input_name != first.input_name for t in tensors):
        raise BatchError(f"cannot join the model inputs {sorted({t.input_name for t in tensors})} with one another")
    if any(
        (t.leaves is None) != (first.leaves is None) or t.witnesses.keys() != first.witnesses.keys() for t in tensors
    ):
        raise BatchError("cannot join recycled batches of which only some have their rows at hand")
    if any((*t.casts, t.dtype) != (*first.casts, first.dtype) for t in tensors):
        raise BatchError(f"cannot join recycled batches of different dtypes: {[t.dtype for t in tensors]}")
    if first.leaves is None and any(t.numbering != first.numbering for t in tensors):
        raise BatchError("cannot join batches of different recyclings whose rows have not been gathered")
    for a, b in itertools.pairwise(tensors):
        ours, theirs = ([leaf.shape[depth:] for leaf in t.leaves or ()] for t in (a, b))
        if ours != theirs:
            raise BatchError(f"cannot join rows padded to different lengths: {ours} and {theirs}")
    shape = func([_nominal(t) for t in tensors], 0).shape

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        return func(parts, 0)

    values = [t.value for t in tensors]
    missing = [t.missing for t in tensors if t.missing is not None]
    return RecycledTensor(
        shape,
        first.dtype,
        locations=join([t.locations for t in tensors]),
        fingerprint=first.fingerprint,
        numbering=first.numbering,
        input_name=first.input_name,
        leaves=None
        if first.leaves is None
        else [join(list(parts)) for parts in zip(*(t.leaves for t in tensors), strict=True)],  # pyright: ignore
        value=None if any(v is None for v in values) else join(values),  # pyright: ignore
        missing=torch.cat(missing) if missing else None,
        witnesses={name: join([t.witnesses[name] for t in tensors]) for name in first.witnesses},
        device=first.device,
        casts=first.casts,
    )


def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    tensor = args[0]
    parts = [*(tensor.leaves or ()), *([] if tensor.missing is None else [tensor.missing])]
    return bool(parts) and all(part.is_pinned() for part in parts)


_ROW_WISE: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.lift_fresh.default: _detach,
    aten.clone.default: lambda func, args, kwargs: args[0]._moved(torch.clone),
    aten._pin_memory.default: _same_rows,
    aten.is_pinned.default: _is_pinned,
    aten._to_copy.default: _to_copy,
    aten.slice.Tensor: _along_batch,
    aten.select.int: _along_batch,
    aten.index_select.default: _along_batch,
    aten.split.Tensor: _along_batch,
    aten.split_with_sizes.default: _along_batch,
    aten.unbind.int: _along_batch,
    aten.index.Tensor: _index,
    aten.flip.default: _flip,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
}


def _collate(batch: list[RecycledTensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    return torch.stack(list[torch.Tensor](batch))


# `default_collate` stacks tensors into shared memory inside a worker, which a tensor without storage does not have.
default_collate_fn_map[RecycledTensor] = _collate

"""The proof that a cut model computes what it computed before: before use, not only at attach.

For one batch, three runs: the full forward with the prefix frozen, the prefix run, and the bypass run. Outputs must be
the same tree with the same bits, in eval mode and in training mode with the generators put back between the runs; the
bypass run is repeated on the same rows, since a suffix that writes into them would show only the second time; in
training mode backward runs too, and finds a checkpoint region that reaches across the cut.

At attach it is also tried whether a row depends on its object alone: the other objects of the batch replaced, more
padding on either side, other values at padded places.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchrecycle.absent import Absent, AbsentRead
from torchrecycle.bypass.bypass import Bypass
from torchrecycle.bypass.inputs import Inputs
from torchrecycle.bypass.plan import fails_without
from torchrecycle.bypass.probes import take_rows
from torchrecycle.codec import Layout, places
from torchrecycle.errors import CutError, RecycleError
from torchrecycle.trace import random_state, set_random_state, undisturbed

__all__ = ["Padding", "first_difference", "noise", "positions", "prove", "prove_rows", "relative_difference"]

DRAWS = 256
"""How many random states are tried on glue that draws random numbers in training mode."""


# -- comparing ---------------------------------------------------------------------------------------------------------


def noise(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """The relative difference that rounding alone may make after some dozens of layers in this dtype.

    On a graphics card single precision is multiplied as TF32 if that is not switched off, and cuDNN's convolutions do
    so by default: with ten bits behind the point, as many as half precision has.
    """
    if dtype is torch.float32 and device is not None and device.type == "cuda" and _has_tf32():
        dtype = torch.float16
    return {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2}.get(dtype, 5e-2)


def _has_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # it was set under its newer name, and cannot be read under this one any more
        return True


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, divided by that of `a`; 0 where both are empty or the same."""
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.double(), b.double()
    return ((a - b).pow(2).mean().sqrt() / a.pow(2).mean().sqrt().clamp_min(1e-30)).item()


def first_difference(
    want: Any, got: Any, path: str = "", masks: Sequence[torch.Tensor] = (), depth: int = 0
) -> str | None:
    """Where two outputs differ first, in words; None if they are the same to the bit.

    With `masks` ``[batch, tokens]``, tensors of shape ``[batch, tokens, ...]`` are compared where theirs is one.
    """
    where = path or "the output"
    if isinstance(want, torch.Tensor) or isinstance(got, torch.Tensor):
        return _tensor_difference(want, got, where, masks)
    if isinstance(want, Mapping) and isinstance(got, Mapping):
        if list(want) != list(got):
            return f"{where} has the entries {list(got)} instead of {list(want)}"
        pairs: Iterator[Any] = ((f"{path}.{name}".lstrip("."), want[name], got[name]) for name in want)
    elif isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(want) != len(got):
            return f"{where} has {len(got)} parts instead of {len(want)}"
        pairs = ((f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(want, got, strict=True)))
    elif type(want) is not type(got):
        return f"{where} is a {type(got).__name__} instead of a {type(want).__name__}"
    elif isinstance(want, np.ndarray):
        if want.shape != got.shape or want.dtype != got.dtype:
            return f"{where} is {list(got.shape)} {got.dtype} instead of {list(want.shape)} {want.dtype}"
        return None if want.tobytes() == got.tobytes() or np.array_equal(want, got) else f"{where} differs"
    elif hasattr(want, "__dict__") and not isinstance(want, type) and depth < 4:
        return first_difference(vars(want), vars(got), path, masks, depth + 1)
    else:
        return (
            None
            if want is got or hasattr(want, "__dict__") or want == got
            else f"{where} is {got!r} instead of {want!r}"
        )
    return next((found for name, a, b in pairs if (found := first_difference(a, b, name, masks, depth))), None)


def _tensor_difference(want: Any, got: Any, where: str, masks: Sequence[torch.Tensor] = ()) -> str | None:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        return f"{where} is a {type(got).__name__} instead of a {type(want).__name__}"
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{where} is {list(got.shape)} {got.dtype} instead of {list(want.shape)} {want.dtype}"
    want, got = want.detach(), got.detach()
    for mask in masks:
        if want.dim() >= 2 and want.shape[:2] == mask.shape:
            want, got = want.clone(), got.clone()
            want[~mask.bool()], got[~mask.bool()] = 0, 0
    if torch.equal(want, got) or (
        torch.equal(want.isnan(), got.isnan()) and torch.equal(want.nan_to_num(), got.nan_to_num())
    ):
        return None
    return f"{where} differs by {relative_difference(want, got):.2g} of its size"


# -- the same function -------------------------------------------------------------------------------------------------


def prove(bypass: Bypass, inputs: Inputs) -> None:
    """Prove one signature, in the model's present mode.

    Raises:
        CutError: the halves do not compute what the whole does, with the flag or output named.
    """
    try:
        with bypass.interceptor.turns.take(lambda: True), _same_kernels():
            try:
                _prove(bypass, inputs)
            except CutError:
                if bypass.quiet or not bypass.model.training:
                    raise
                _prove_quiet(bypass, inputs)
    except AbsentRead as stop:
        raise CutError(f"cannot cut at '{bypass.plan.cut}': {stop.reason}") from stop
    bypass.proven.add(bypass.signature(inputs))


@contextlib.contextmanager
def _same_kernels() -> Iterator[None]:
    """cuDNN sums some gradients in whatever order its threads come, so that a ResNet-18 has others each time that it
    runs, by more than rounding; for a proof it takes the kernels that do not, and tries none out."""
    cudnn = torch.backends.cudnn
    kept = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = kept


def _prove_quiet(bypass: Bypass, inputs: Inputs) -> None:
    """The same with the modules around the cut in eval mode until it is reached; the suffix must not notice.

    A Bart drops some of its embeddings in its own forward, between frozen layers. The prefix is in eval mode, so that
    does not happen. But what a forward decides at its beginning, from its own flag, may concern the suffix.
    """
    bypass.quiet = True
    try:
        _prove(bypass, inputs)
        with undisturbed(bypass.model):
            leaves = bypass.prefix(inputs)
        _compare_quiet(bypass, inputs, leaves)
    except BaseException:
        bypass.quiet = False
        raise


SEEDS = 32
"""Random states under which a suffix is run with the flags before the cut on and off."""


def _compare_quiet(bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
    """What a forward draws at its beginning, for both halves, must not be lost to the suffix."""
    compared, stopped = 0, None
    for seed in range(DRAWS):
        try:
            quiet, loud = (_suffix_from_cut(bypass, inputs, leaves, flag, seed) for flag in (True, False))
        except CutError as stop:  # a layer was dropped before the cut under this seed
            stopped = stop
            continue
        difference = first_difference(quiet, loud)
        if difference:
            raise CutError(_not_the_same(bypass, difference))
        compared += 1
        if compared == SEEDS:
            return
    if not compared:
        raise stopped or AssertionError


def _suffix_from_cut(bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor], quiet: bool, seed: int) -> Any:
    """The suffix under one random state at its beginning, and one from the cut on."""
    bypass.quiet = quiet
    try:
        with undisturbed(bypass.model), torch.no_grad():
            _seed_all(seed)
            return bypass.suffix(_copy(inputs), [leaf.clone() for leaf in leaves], lambda: _seed_all(0))
    finally:
        bypass.quiet = True


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _prove(bypass: Bypass, inputs: Inputs) -> None:
    signature = bypass.signature(inputs)
    model = bypass.model
    with undisturbed(model):
        state = random_state()
        want = bypass.full(_copy(inputs))  # a model may write into its input
        moved = _moved(signature[-1], bypass.flags())
        try:
            want_gradients: dict[str, torch.Tensor] | None = _gradients(bypass, want)
        except RuntimeError:  # the model's own backward fails: it says so itself where it is asked for
            want_gradients = None
    bypass.volatile |= moved
    raw = _copy(inputs)
    with undisturbed(model):
        leaves = bypass.prefix(raw)
    versions = _versions(leaves)
    originals = [leaf.clone() for leaf in leaves]
    with undisturbed(model):
        set_random_state(state)
        got = _suffix_or_explain(bypass, _as_on_a_hit(bypass, _copy(inputs)), leaves)
        got_gradients = {} if want_gradients is None else _gradients(bypass, got)
    # By value too: ``x.data`` and NumPy write without moving a version.
    if _versions(leaves) != versions or any(
        _tensor_difference(a, b, "") for a, b in zip(originals, leaves, strict=True)
    ):
        bypass.clones = True
        leaves = originals
    if _storages(leaves) & _storages(list(_tensors(got))):  # the loop may write into what the model returns
        bypass.clones = True
    with undisturbed(model):
        _run_another(bypass, _copy(inputs))
        set_random_state(state)
        again = _suffix_or_explain(bypass, raw, leaves)
    for output in (got, again):
        difference = first_difference(want, output)
        if difference:
            raise CutError(_not_the_same(bypass, difference))
    bypass.refuse_late_reads(_copy(inputs), originals)
    if want_gradients is not None:
        _compare_gradients(bypass, want_gradients, got_gradients)
        _look_for_lost_gradients(bypass, inputs, leaves, want_gradients)
    if model.training:
        _try_draws(bypass, inputs, originals)


def _copy(inputs: Inputs) -> Inputs:
    return inputs.map_tensors(torch.clone)


def _moved(before: Sequence[tuple[int, str, Any]], after: Sequence[tuple[int, str, Any]]) -> set[tuple[int, str]]:
    """The attributes that a forward has changed, made or removed."""
    old, new = ({(at, name): value for at, name, value in flags} for flags in (before, after))
    return {key for key in old.keys() | new.keys() if key not in old or key not in new or old[key] != new[key]}


def _suffix_or_explain(bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> Any:
    """The suffix, whose full forward has just run: what fails now fails for want of the prefix."""
    try:
        return bypass.suffix(inputs, leaves)
    except RecycleError:
        raise
    except Exception as error:
        raise CutError(fails_without(bypass.plan.cut, error)) from error


def _run_another(bypass: Bypass, inputs: Inputs) -> None:
    """Run the prefix on a batch of other size and order.

    A layer that leaves something in an attribute for a later one (its attention map, the length of the sequence) leaves
    that of the last batch that ran, not of the rows at hand. If it was this batch, nobody would notice.
    """
    other = take_rows(inputs, [*reversed(range(inputs.batch())), 0])
    for which, mask in enumerate(bypass.plan.sequences.masks):
        if mask in other.tensors():
            other = bypass.plan.sequences.padded(other, which, 1, "right", bypass.plan.read_before)
    # The last that runs counts: one place too many for a table of positions, and ids that mean something else, do not.
    for batch in (inputs, other, _with_content(bypass, inputs, "random"), _with_content(bypass, other, "random")):
        with contextlib.suppress(Exception):
            bypass.prefix(batch)


def _storages(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if type(t) is torch.Tensor and t.numel()}


def _versions(leaves: Sequence[torch.Tensor]) -> list[int]:
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def _as_on_a_hit(bypass: Bypass, inputs: Inputs) -> Inputs:
    """The call without what only the prefix reads, which batches from a store leave out."""
    tensors = inputs.tensors()
    gone = [name for name in tensors if name in bypass.plan.read_before - bypass.plan.read_after]
    return inputs.replace({name: Absent.like(tensors[name], [name]) for name in gone})


def _gradients(bypass: Bypass, output: Any) -> dict[str, torch.Tensor]:
    """Run backward from everything in the output that has a gradient."""
    if not torch.is_grad_enabled():
        return {}
    total: Any = 0
    for tensor in _tensors(output):
        if tensor.requires_grad and tensor.is_floating_point():
            weights = torch.cos(torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32))
            total = total + (tensor.float().reshape(-1) * weights).sum()
    if not isinstance(total, torch.Tensor):
        return {}
    named = [(name, p) for name, p in bypass.model.named_parameters() if p.requires_grad]
    if not named:
        return {}
    with _without_users_hooks([p for _, p in named]):
        try:  # accumulates nothing, so that an optimiser that runs in backward does not run
            found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            total.backward()
            found = [p.grad for _, p in named]
    return {name: grad for (name, _), grad in zip(named, found, strict=True) if grad is not None}


@contextlib.contextmanager
def _without_users_hooks(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hooks on parameters do not run for a proof: some of them are optimisers."""
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    kept = [(p, kind, getattr(p, kind, None)) for p in parameters for kind in kinds]
    kept = [(p, kind, dict(hooks), hooks) for p, kind, hooks in kept if hooks]
    for _, _, _, hooks in kept:
        hooks.clear()
    try:
        yield
    finally:
        for _, _, copied, hooks in kept:
            hooks.update(copied)


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, depth)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part, depth)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and depth < 3:
        yield from _tensors(vars(value), depth + 1)


def _compare_gradients(bypass: Bypass, want: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
    """Gradients may differ by rounding (sums over threads have no fixed order), but not by more.

    That of an attention's key bias is zero but for rounding: a millionth of the largest gradient is noise itself.
    """
    largest = max((_rms(gradient) for gradient in want.values()), default=0.0)

    def is_noise(name: str) -> bool:
        difference = relative_difference(want[name], got[name])
        return (
            difference <= noise(want[name].dtype, want[name].device) or difference * _rms(want[name]) <= 1e-6 * largest
        )

    wrong = [name for name in want if name not in got or not is_noise(name)]
    wrong = [n for n in wrong if n not in bypass.prefix_parameters]
    wrong += [n for n in got if n not in want]
    if wrong:
        raise CutError(
            f"cannot cut at '{bypass.plan.cut}': the gradient of '{wrong[0]}' is not what it is without recycling. A "
            "custom backward or a hook reaches across the cut."
        )


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().pow(2).mean().sqrt().item() if tensor.numel() else 0.0


def _look_for_lost_gradients(
    bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor], found: Mapping[str, torch.Tensor]
) -> None:
    """A reentrant checkpoint region gives no gradient to its layers if none of its inputs asks for one."""
    if not torch.is_grad_enabled():
        return
    spared = {*bypass.prefix_parameters, *bypass.untouched, *found}
    without = [name for name, p in bypass.model.named_parameters() if p.requires_grad and name not in spared]
    if not without:
        return
    with undisturbed(bypass.model), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bypass.suffix(inputs, [leaf.clone() for leaf in leaves])
    if any("None of the inputs have requires_grad" in str(one.message) for one in said):  # says torch.utils.checkpoint
        raise CutError(
            f"cannot cut at '{bypass.plan.cut}': '{without[0]}' would get no gradient, since it lies in or behind a "
            "reentrant checkpoint region whose inputs ask for none once the prefix is frozen. Checkpoint with "
            "use_reentrant=False."
        )


def _try_draws(bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
    """In training mode, does what happens between the skipped layers depend on chance (LayerDrop)?

    It runs up to the cut under many random states: milliseconds, since all layers there are skipped.
    """
    with undisturbed(bypass.model), torch.no_grad():
        for draw in range(DRAWS):
            torch.manual_seed(draw)
            before = random_state()
            bypass.glue(inputs, leaves)
            if draw == 0 and _same_state(before, random_state()):
                return


def _same_state(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return bool(torch.equal(a[2], b[2])) and a[0] == b[0] and repr(a[1]) == repr(b[1])


_FLAGS = {
    "output_hidden_states": "hidden_states",
    "output_attentions": "attentions",
    "use_cache": "past_key_values",
    "output_router_logits": "router_logits",
}


def _not_the_same(bypass: Bypass, difference: str) -> str:
    blame = ""
    for flag, output in _FLAGS.items():
        if output in difference or ("instead of" in difference and _is_set(bypass, flag)):
            blame = f" It comes from skipped layers; set {flag}=False to do without."
            break
    if not blame and bypass.model.training:
        blame = (
            " In training mode the model does something between the frozen layers (dropout or LayerDrop in its own "
            "forward) that it does not do in eval mode; switch that off, or cut before it."
        )
    return f"cannot cut at '{bypass.plan.cut}': with the prefix skipped, {difference}.{blame}"


def _is_set(bypass: Bypass, flag: str) -> bool:
    return any(name == flag and value is True for _, name, value in bypass.flags())


# -- a row depends on its object alone ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Padding:
    """What was found out about padding: whether rows can be kept without it."""

    right: bool = True
    """Padding after the tokens changes nothing."""
    left: bool = True
    """Padding before the tokens changes nothing."""
    because: str = ""
    """Why not, in words."""


def positions(mask: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Which places of ``[batch, tokens]`` a row keeps: the tokens, or all where padding matters.

    A mask with holes keeps all places: the distance between its tokens would be lost.
    """
    mask = mask.bool()
    steps = mask[:, 1:].int() - mask[:, :-1].int()
    right = (steps <= 0).all(dim=1)
    left = (steps >= 0).all(dim=1)
    # A row without any token (an empty text) is padding throughout, and what it gives may be read all the same.
    trimmed = mask.any(dim=1) & ((right & padding.right) | (left & ~right & padding.left))
    return mask | ~trimmed[:, None]


def prove_rows(bypass: Bypass) -> Padding:
    """Prove that a row depends on its object alone, and find out about padding.

    Raises:
        CutError: a row depends on chance or on the other objects of its batch.
    """
    try:
        with undisturbed(bypass.model):
            return _prove_rows(bypass)
    except RecycleError:
        raise
    except Exception as error:  # it has run on the example before
        raise CutError(
            f"cannot cut at '{bypass.plan.cut}': the model does not run on the example's objects in another order, or "
            "beside others, so that it cannot be tried whether a row depends on its object alone: "
            f"{type(error).__name__}: {error}"
        ) from error


def _prove_rows(bypass: Bypass) -> Padding:
    example = bypass.plan.example
    rows = _rows(bypass, example)
    torch.manual_seed(torch.initial_seed() % 2**31 + 1)
    again = _rows(bypass, example)
    if any(not torch.equal(a, b) for a, b in zip(rows, again, strict=True)):
        raise CutError(
            f"cannot cut at '{bypass.plan.cut}': the prefix gives other values each time it runs, even in eval "
            "mode, so one kept row would freeze one draw"
        )
    tried = 0
    for kind in CONTENTS:
        others = _rows_if_it_runs(bypass, _others_replaced(bypass, example, kind))
        if others is not None:
            tried += 1
            _refuse_mixing(bypass, [a[:1] for a in rows], [b[:1] for b in others], "are replaced", LAST_BITS)
    if not tried:
        raise CutError(
            f"cannot cut at '{bypass.plan.cut}': the model runs beside no other objects than the example's, so that it "
            "cannot be tried whether a row depends on them"
        )
    _refuse_counting(bypass, rows)
    for listed in example.with_lists_changed():
        found = _rows_if_it_runs(bypass, listed)
        if found is not None:
            _refuse_mixing(bypass, rows, found, "have something else beside them in a list", 0.0)
    _refuse_padding_of_others(bypass, example)
    turned = _rows(bypass, take_rows(example, [1, 0]))
    more = _rows(bypass, take_rows(example, [0, 1, 1, 0]))
    _refuse_mixing(bypass, rows, [leaf.flip(0) for leaf in turned], "change places")
    _refuse_mixing(bypass, rows, [leaf[:2] for leaf in more], "become more")
    return _prove_padding(bypass) if bypass.plan.sequences.masks else Padding()


def _refuse_counting(bypass: Bypass, rows: Sequence[torch.Tensor]) -> None:
    """A frozen layer that counts its calls must not act on the count."""
    modules = {name: module for module, name in bypass.plan.modules.items()}
    for owner, attribute in bypass.written:
        outer = next((n for n in modules if owner == n or owner.startswith(f"{n}.")), None)
        if outer is None:
            continue
        module = bypass.model.get_submodule(owner)
        value = module.__dict__.get(attribute)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            module.__dict__[attribute] = value + 1000  # put back by `undisturbed`
            later = _rows_if_it_runs(bypass, bypass.plan.example)
            if later is None or any(
                relative_difference(a, b) > noise(a.dtype, a.device) for a, b in zip(rows, later, strict=True)
            ):
                raise CutError(
                    f"cannot cut at '{bypass.plan.cut}': '{owner}', which lies before it, counts its calls in "
                    f"'{attribute}' and acts on the count, so that a row depends on when it was made"
                )
            module.__dict__[attribute] = value


def _refuse_padding_of_others(bypass: Bypass, example: Inputs) -> None:
    """An object without padding must not notice that another one has some.

    Aimv2's text tower lets each word see all others as long as no text of the batch is padded, and only those before it
    once one is.
    """
    sequences = bypass.plan.sequences
    plain = sequences.without_padding(example)
    tensors, rows = plain.tensors(), None
    for mask in (*sequences.masks, *sequences.spatial):
        size = tensors[mask].shape[1]
        if mask in bypass.plan.read_before and size > 1:
            rows = rows or [leaf[:1] for leaf in _rows(bypass, plain)]
            for part in (slice(size // 2, None), slice(0, size // 2)):
                padded = tensors[mask].clone()
                padded[1, part] = 0
                others = _rows(bypass, plain.replace({mask: padded}))
                _refuse_mixing(bypass, rows, [leaf[:1] for leaf in others], f"are padded (see '{mask}')")


LAST_BITS = 16
"""How many steps of its dtype a row may move when the other objects are replaced. A mixture of experts multiplies the
tokens of all objects together, expert by expert, so that other objects are another matrix product. What mixes objects
on purpose (their mean, their largest value) moves a row by far more."""


def _refuse_mixing(
    bypass: Bypass, want: Sequence[torch.Tensor], got: Sequence[torch.Tensor], when: str, steps: float | None = None
) -> None:
    """Refuse rows that differ by more than rounding: of some dozens of layers, or of so many steps of their dtype."""
    for a, b in zip(want, got, strict=True):
        difference = relative_difference(a, b)
        allowed = noise(a.dtype, a.device) if steps is None else steps * _step(a.dtype)
        if difference > allowed:
            raise CutError(
                f"cannot cut at '{bypass.plan.cut}': what the prefix gives for an object depends on the other objects "
                f"of the batch (a difference of {difference:.1e} of its size in {a.dtype} when they {when}, where "
                f"{allowed:.1e} is rounding), so it cannot be kept for the object"
            )


def _step(dtype: torch.dtype) -> float:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    step = torch.finfo(dtype).eps
    return step / LAST_BITS if step > 1e-4 else step  # 16 bits: one step, which is much of a row already


def _rows(bypass: Bypass, inputs: Inputs) -> list[torch.Tensor]:
    return [layout.to_rows(leaf) for layout, leaf in zip(bypass.plan.layouts, bypass.prefix(inputs), strict=True)]


CONTENTS = ("halved", "eightfold", "random", "beyond", "constant")
"""What is put in place of the other objects: their numbers made smaller or larger, others drawn, or all the same."""


def _others_replaced(bypass: Bypass, inputs: Inputs, kind: str) -> Inputs:
    """The first object as it is; in place of the others, some with other content and the same mask."""
    first = take_rows(inputs, [0, 0])
    changed = _with_content(bypass, take_rows(inputs, [1, 1]), kind).tensors()

    def other(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or name not in bypass.plan.read_before or not value.dim():
            return value
        mine = first.tensors()[name].clone()
        mine[1] = changed[name][1]
        return mine

    return first.map(other)


def _with_content(bypass: Bypass, inputs: Inputs, kind: str) -> Inputs:
    """The same call with other numbers, of the range that each input has."""
    masks = (*bypass.plan.sequences.masks, *bypass.plan.sequences.spatial)
    generator = torch.Generator().manual_seed(20_220_107)

    def other(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or name in masks or not value.numel() or value.dtype is torch.bool:
            return value
        if value.is_floating_point() or value.is_complex():
            scale = {"halved": 0.5, "eightfold": 8.0}.get(kind)
            if scale is not None:
                return value * scale + 0.1
            if kind == "constant":
                return torch.full_like(value, 0.3)
            return (torch.randn(value.shape, generator=generator) * 1.3).to(value)
        if kind == "constant":
            return torch.full_like(value, int(value.max()))
        if kind in ("random", "beyond"):  # ids over the example's largest may be none
            low, high = int(value.min()), int(value.max())
            low, high = (low, high) if kind == "random" else (0, high + 2)
            return torch.randint(low, high + 1, value.shape, generator=generator).to(value)
        return value.flip(-1)

    return inputs.map(other)


def _prove_padding(bypass: Bypass) -> Padding:
    if any(layout.free for layout in bypass.plan.layouts):
        return Padding(right=False, left=False, because="places of the rows are no places of the mask")
    plan, found = bypass.plan, dict[str, str]()
    concerned = {number for name, number in plan.sequences.followers(plan.example) if name in plan.read_before}
    concerned |= {by for layout in plan.layouts for by in layout.ragged_by}
    for side in ("right", "left"):
        whys = (_padding_matters(bypass, which, side) for which in sorted(concerned))
        found[side] = next((why for why in whys if why), "")
    because = "; ".join(f"{side}: {why}" for side, why in found.items() if why)
    return Padding(right=not found["right"], left=not found["left"], because=because)


def _padding_matters(bypass: Bypass, which: int, side: str) -> str:
    """Why a row needs its padding on that side; empty if it does not."""
    plan, sequences = bypass.plan, bypass.plan.sequences
    example = sequences.without_padding(plan.example)  # its own padding may lie on either side
    lengths = sequences.lengths(example)
    less = sequences.resized(example, [max(1, n - 3 * (at == which)) for at, n in enumerate(lengths)])
    for inputs in (example, less):  # three places more may be too many for its table of positions
        padded = sequences.padded(inputs, which, 3, side, plan.read_before)
        short, long = _rows_if_it_runs(bypass, inputs), _rows_if_it_runs(bypass, padded)
        if short is not None and long is not None:
            break
    else:
        return "the model does not run with more padding"
    kinds: tuple[Any, ...] = ("largest", "first")
    others = [sequences.padded(inputs, which, 3, side, plan.read_before, kind) for kind in kinds]
    filled = [rows for other in others if (rows := _rows_if_it_runs(bypass, other)) is not None]
    if not filled:
        return "the model takes nothing else at padded places, so that it cannot be tried whether they matter"
    why = _hidden_places_matter(bypass, which, side)
    if why:
        return why
    tensors = padded.tensors()
    masks = [tensors[mask].bool() for mask in sequences.masks]
    for layout, a, b, *c in zip(plan.layouts, short, long, *filled, strict=True):
        if layout.ragged:
            kept = places([masks[by] for by in layout.ragged_by])
            a, b, c = a.flatten(0, len(layout.ragged_dims)), b[kept], [other[kept] for other in c]
        difference = relative_difference(a, b)
        if difference > noise(a.dtype, a.device):
            return f"more padding changes a row by {difference:.1%}"
        if not all(torch.equal(b, other) for other in c):
            return "what stands at padded places changes a row"
    return _suffix_reads_padding(bypass, padded, masks)


def _hidden_places_matter(bypass: Bypass, which: int, side: str) -> str:
    """Whether what stands inside of the example at places that the mask hides changes a row."""
    sequences = bypass.plan.sequences
    example = sequences.without_padding(bypass.plan.example)
    name = sequences.masks[which]
    mask = torch.zeros_like(example.tensors()[name])
    mask[:, 0 if side == "right" else -1] = 1
    hidden = example.replace({name: mask})
    following = {n for n, number in sequences.followers(example) if number == which and n != name}

    def refilled(other: str, value: Any) -> Any:
        if other not in following or other not in bypass.plan.read_before:
            return value
        places_hidden = ~mask.bool()
        return torch.where(places_hidden.reshape(*mask.shape, *[1] * (value.dim() - 2)), value.flatten()[0], value)

    one, two = (_rows_if_it_runs(bypass, inputs) for inputs in (hidden, hidden.map(refilled)))
    if one is None or two is None:
        return "the model does not run on texts of one token"
    masks = [mask.bool() if at == which else None for at in range(len(sequences.masks))]
    for layout, a, b in zip(bypass.plan.layouts, one, two, strict=True):
        if layout.ragged_by == (which,):
            a, b = a[masks[which]], b[masks[which]]
        elif which in layout.ragged_by:
            continue  # its places are told apart when padding is appended
        if not torch.equal(a, b):
            return "what stands at places that the mask hides changes a row"
    return ""


def _rows_if_it_runs(bypass: Bypass, inputs: Inputs) -> list[torch.Tensor] | None:
    """None where the model does not take such inputs: too long, or ids that mean something else (images)."""
    try:
        return _rows(bypass, inputs)
    except RecycleError:
        raise
    except Exception:
        return None


def _suffix_reads_padding(bypass: Bypass, inputs: Inputs, masks: Sequence[torch.Tensor]) -> str:
    """Whether the outputs change when the fill stands in place of what the prefix gave at padded places.

    The fill is zero, or what the prefix gives for padded keys of a query that is none (minus infinity, in a bias).
    """
    leaves = bypass.prefix(inputs)
    state = random_state()
    with torch.no_grad():
        want = bypass.suffix(inputs, [leaf.clone() for leaf in leaves])
    layouts = bypass.plan.layouts
    found = [_fill_of(layout, layout.to_rows(leaf), masks) for layout, leaf in zip(layouts, leaves, strict=True)]
    difference: str | None = ""
    for fills in dict.fromkeys([tuple(layout.fill for layout in layouts), tuple(found)]):
        bypass.plan.layouts = tuple(replace(layout, fill=fill) for layout, fill in zip(layouts, fills, strict=True))
        emptied = []
        for layout, leaf in zip(bypass.plan.layouts, leaves, strict=True):
            rows = layout.to_rows(leaf).to(layout.dtype)
            if layout.ragged:
                own = [masks[by] for by in layout.ragged_by]
                rows = layout.pad(*layout.trim(rows, *own), *own)
            emptied.append(layout.to_model(rows.to(layout.dtype)))
        with torch.no_grad():
            set_random_state(state)
            got = bypass.suffix(inputs, emptied)
        difference = first_difference(want, got, masks=masks)
        if not difference:
            return ""
    bypass.plan.layouts = layouts
    return f"what the prefix gives at padded places is used: {difference}"


def _fill_of(layout: Layout, rows: torch.Tensor, masks: Sequence[torch.Tensor]) -> float | None:
    """The one value at padded places of the last ragged dimension, as places of the others see it; None if several."""
    if len(layout.ragged_dims) < 2:
        return layout.fill
    own = [masks[by] for by in layout.ragged_by]
    padded = places([*own[:-1], ~own[-1]])
    values = rows[padded].unique()
    return values.item() if values.numel() == 1 else layout.fill

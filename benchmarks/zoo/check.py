"""One model of the zoo, cut at about a quarter, a half and three quarters, and judged from outside.

For a ResNet-18 these are `layer1`, `layer2` and `layer3`. The plain model's outputs are taken first; then everything
goes through the public API as a user's loop would: a data set, a loader whose batches must be hits, a raw batch, a
second batch of another size (and length, and padding), one training step against a copy that is frozen by hand, and
`detach`. Nothing of torchrecycle's own proof is used, so that both would have to be wrong in the same way.

A cut is `equal`, `refused` (in words, by an error of ours), `wrong`, or `crash` (any other error once the plain model
has run: a defect as well). What a cut refuses only for the second batch stands beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from batches import Padded, arguments, call, collate_of, copy_of, items_of, ragged_items
from cases import Built, Case
from compare import copied, distance, far, first_unequal, leaves
from refusals import SHARED, kind_of
from torch import nn

from torchrecycle import RecycleError, cuts, recycle
from torchrecycle.cost import blocks_of, level_of
from torchrecycle.trace import Trace, trace

OBJECTS, OTHERS = 4, 3
LEVELS = (0.25, 0.5, 0.75)
FURTHER = 6
"""How many more cuts are tried where none of the first is useful."""


class Wrong(Exception):
    """Recycled is not what plain is."""


# -- where to cut ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A cut to try."""

    name: str
    level: float
    flops: float
    """Share of the forward's floating point operations up to there; -1 where they cannot be counted."""

    @property
    def useful(self) -> bool:
        return 0.25 <= self.level <= 0.75 or 0.25 <= self.flops <= 0.75


def places(built: Built, batch: Any, traced: Trace) -> tuple[list[Place], Callable[[], list[Place]]]:
    """Blocks (or what the root calls itself); and every other call, outermost first (`block#2` is a second one)."""
    counted = _counted(built, batch, traced)
    once = [c for c in traced.calls if c.name and len(traced.of(c.name)) == 1]
    total = max(counted.calls[0].flops[1], 1) if counted else 1

    def place(name: str) -> Place:
        number = traced.of(name)[0].number
        share = counted.calls[number].flops[1] / total if counted else -1.0
        return Place(name, level_of(built.model, traced, name), round(share, 4))

    names = {one.name for one in once}
    blocks = [name for name in blocks_of(built.model) if name in names]
    blocks = blocks or [one.name for one in once if one.parent == 0]
    outermost = sorted(traced.calls[1:], key=lambda one: (one.name.count("."), one.number))
    rest = [one.name if one.name in names else f"{one.name}#{one.occurrence + 1}" for one in outermost if one.name]
    return [place(name) for name in blocks], lambda: [place(name) for name in rest if name not in blocks][:60]


def _counted(built: Built, batch: Any, traced: Trace) -> Trace | None:
    args, kwargs = arguments(built, copy_of(batch))
    try:
        counted = trace(built.model, args, kwargs, count_flops=True, keep_outputs=False)
    except Exception:  # the counter knows not every operation
        return None
    return counted if len(counted.calls) == len(traced.calls) else None


def nearest(found: list[Place], levels: Sequence[float]) -> list[Place]:
    """One place around each level, in running order."""
    inner = [place for place in found if 0.1 < place.level < 0.9]
    chosen: list[Place] = []
    for level in levels:
        left = [place for place in inner if place not in chosen]
        if left:
            chosen.append(min(left, key=lambda place: (abs(place.level - level), place.level)))
    return sorted(chosen, key=lambda place: place.level)


def further(first: list[Place], rest: list[Place], tried: list[Place]) -> list[Place]:
    """Useful places that have not been tried: blocks first, each time nearest to a half of the work."""
    left = [[p for p in places if p.useful and p not in tried] for places in (first, rest)]
    return [p for some in left for p in sorted(some, key=lambda p: abs((p.flops if p.flops >= 0 else p.level) - 0.5))]


# -- one case ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Subject:
    """A model under test and what it gives when nobody touches it."""

    built: Built
    first: Any
    """Four objects."""
    second: Any
    """Three others, of another length where there is one."""
    want_first: list[tuple[str, Any]] = field(repr=False)
    want_second: list[tuple[str, Any]] = field(repr=False)
    notes: list[str]
    traced: Trace | None = field(default=None, repr=False)
    """The calls of one forward."""

    def plain(self, batch: Any) -> list[tuple[str, Any]]:
        """The plain model's output in eval mode."""
        with torch.no_grad():
            return copied(call(self.built, self.built.model.eval(), batch))

    def tokens(self) -> int:
        """The length of the second batch; 0 without padding."""
        if not self.built.padded or self.built.mask is None or not isinstance(self.second, Mapping):
            return 0
        return self.second[self.built.padded[0]].shape[1]


def subject_of(built: Built) -> Subject:
    """The plain model run on two batches. Raises what the model raises."""
    built.model.eval()
    notes: list[str] = []
    first = built.batch(OBJECTS)
    subject = Subject(built, first, None, [], [], notes)
    subject.want_first = subject.plain(subject.first)
    if first_unequal(subject.want_first, subject.plain(subject.first)):
        notes.append("the plain model gives other values for the same batch and seed")
    subject.second = built.batch(OTHERS, seed=1)
    subject.want_second = subject.plain(subject.second)
    if built.tokens is not None:
        try:
            other = built.batch(OTHERS, tokens=built.tokens + 5, seed=1)
            subject.want_second = subject.plain(other)
            subject.second = other
        except Exception as error:
            notes.append(f"takes no other length: {_line(error)}")
    return subject


def check_case(
    case: Case, seconds: float = 240.0, levels: Sequence[float] = LEVELS, *, listing: bool = False
) -> dict[str, Any]:
    """Try a model; what is found, ready for JSON.

    Args:
        case: the model.
        seconds: after so long, no further cut is begun.
        levels: around which it is cut first.
        listing: also ask `cuts()` what it thinks, which takes as long as a cut or two.
    """
    began = time.perf_counter()
    report: dict[str, Any] = {"library": case.library, "name": case.name, "module": case.module}
    try:
        built = case.make()
        report["parameters"] = sum(p.numel() for p in built.model.parameters())
        subject = subject_of(built)
    except Exception as error:
        return report | _ended("untested", error, began)
    try:
        args, kwargs = arguments(built, copy_of(subject.first))
        subject.traced = trace(built.model, args, kwargs, keep_outputs=False)
        first, rest = places(built, subject.first, subject.traced)
    except Exception as error:  # the model runs, so this is our fault
        return report | _ended("crash", error, began)
    report["cuts"] = found = []
    if listing:
        report["listed"] = _listed(subject)

    def try_out(place: Place) -> None:
        found.append(check_cut(subject, place))

    tried = nearest(first, levels)
    for place in tried:
        if time.perf_counter() - began < seconds:
            try_out(place)
    if not any(cut["useful"] for cut in found):
        for place in further(first, rest(), tried)[:FURTHER]:
            if time.perf_counter() - began < seconds / 2 and not any(cut["useful"] for cut in found):
                try_out(place)
    states = {cut["state"] for cut in found}
    report["status"] = next((s for s in ("wrong", "crash", "equal", "refused") if s in states), "no cut")
    report["useful"] = any(cut["useful"] for cut in found)
    report["notes"] = subject.notes
    report["seconds"] = round(time.perf_counter() - began, 2)
    return report


def _ended(status: str, error: Exception, began: float) -> dict[str, Any]:
    """What is told of a case in which no cut was tried."""
    seconds = round(time.perf_counter() - began, 2)
    return {"status": status, "reason": _line(error), "where": _where(error), "cuts": [], "seconds": seconds}


def _listed(subject: Subject) -> dict[str, Any]:
    """What `cuts()` says."""
    began = time.perf_counter()
    try:
        found = cuts(subject.built.model, subject.first, inputs=subject.built.inputs, mask=_mask(subject.built))
    except RecycleError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"crash": _line(error), "where": _where(error)}
    return {"valid": [c.name for c in found if c.valid], "seconds": round(time.perf_counter() - began, 2)}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _mask(built: Built) -> str | None:
    """``mask=`` for `recycle`: `attention_mask` is found by its name."""
    named = built.mask if built.mask in built.padded and built.mask != "attention_mask" else None
    return built.mask_input or named


# -- one cut -----------------------------------------------------------------------------------------------------------


def check_cut(subject: Subject, place: Place) -> dict[str, Any]:
    """Cut a copy of the model there and try everything; what is found, ready for JSON."""
    found = _tried(subject, place, "refuse")
    if found.get("kind") != SHARED:
        return found
    return {**_tried(subject, place, "freeze"), "share": "freeze"}  # as the refusal advises


def _tried(subject: Subject, place: Place, share: str) -> dict[str, Any]:
    began = time.perf_counter()
    found: dict[str, Any] = {**dataclasses.asdict(place), "useful": False, "second": [], "hits": 0}
    trial = None
    try:
        trial = Trial(subject, place, share)
        trial.run(found)
        found |= {"state": "equal", "useful": place.useful}
    except Wrong as error:
        found |= {"state": "wrong", "reason": str(error)}
    except RecycleError as error:
        found |= {"state": "refused", "kind": kind_of(str(error)), "reason": str(error)[:600]}
        found["at"] = "attach" if trial is None else "use"
    except Exception as error:
        found |= {"state": "crash", "reason": _line(error), "where": _where(error)}
    if trial is not None:
        found["hits"] = trial.recycling.stats.hits
    found["seconds"] = round(time.perf_counter() - began, 2)
    return found


class Trial:
    """A copy of the model, cut; and another, plain. Raises what `recycle` raises."""

    def __init__(self, subject: Subject, place: Place, share: Any) -> None:
        self.subject, self.built, self.place = subject, subject.built, place
        self.model = copy.deepcopy(subject.built.model).eval()
        self.before = _flags(self.model)
        built = subject.built
        self.recycling = recycle(
            self.model,
            subject.first,
            cut=place.name,
            store="memory://",
            inputs=built.inputs,
            mask=_mask(built),
            share=share,
        )

    def run(self, found: dict[str, Any]) -> None:
        """Everything in order."""
        self.first_batch()
        self.second_batches(found["second"])
        self.training_step(found)
        self.detached()

    # -- in eval mode --------------------------------------------------------------------------------------------------

    def recycled_batch(self, items: list[Any], collate: Callable[..., Any] | None) -> Any:
        """The one batch of a loader over these objects."""
        (batch,) = self.recycling.loader(items, batch_size=len(items), shuffle=False, collate_fn=collate)
        return batch

    def on_hits(self, batch: Any, objects: int) -> Any:
        """The attached model's output for a batch that must consist of hits."""
        hits, misses = self.recycling.stats.hits, self.recycling.stats.misses
        output = call(self.built, self.model, batch)
        more = self.recycling.stats.hits - hits, self.recycling.stats.misses - misses
        if more != (objects, 0):
            raise Wrong(f"a batch of {objects} objects was not recycled: {more[0]} hits, {more[1]} misses")
        return output

    @torch.no_grad()
    def first_batch(self) -> None:
        """The same batch, from rows and raw: to the bit."""
        first = self.subject.first
        batch = self.recycled_batch(items_of(first), collate_of(first))
        self._must_equal(self.subject.want_first, copied(self.on_hits(batch, OBJECTS)), "eval, from rows", first)
        self._must_equal(self.subject.want_first, copied(call(self.built, self.model, first)), "eval, raw", first)

    def _must_equal(self, want: Any, got: Any, where: str, batch: Any) -> None:
        """To the bit, what the plain model gives; or what it gives with the same weights frozen.

        PyTorch takes other kernels for weights that ask for no gradient (a matrix product is folded or not), so that
        freezing alone can change the last bits.
        """
        unequal = first_unequal(want, got)
        if not unequal:
            return
        frozen = copy.deepcopy(self.built.model).eval()
        for name in self.recycling.bypass.prefix_parameters:
            frozen.get_parameter(name).requires_grad_(False)
        off = far(want, got)
        if off or first_unequal(copied(call(self.built, frozen, batch)), got):
            raise Wrong(f"{where}: {unequal}")
        self._note("equal to the bit to the model with the same weights frozen: freezing alone moves the last bits")

    def second_batches(self, refused: list[dict[str, str]]) -> None:
        """Another size; rows that were made in another company; ragged and padded on either side."""
        second, padded = self.subject.second, {}
        with self._second(refused, "another size, raw"):
            got = copied(call(self.built, self.model, second))
            self._must_equal(self.subject.want_second, got, "second batch, raw", second)
        padded["another size, from rows"] = items_of(second), collate_of(second)
        tokens = self.subject.tokens()
        if tokens:
            items = ragged_items(self.built, second, (tokens - 6, tokens, tokens - 1)[: len(items_of(second))])
            padded |= {f"padded {side}": (items, Padded(self.built.padded, side)) for side in ("right", "left")}
        for name, (items, collate) in padded.items():
            with self._second(refused, name):
                self.other_company(name, items, collate)

    @contextmanager
    def _second(self, refused: list[dict[str, str]], name: str) -> Iterator[None]:
        try:
            with torch.no_grad():
                yield
        except RecycleError as error:
            refused.append({"batch": name, "kind": kind_of(str(error)), "reason": str(error)[:400]})

    def other_company(self, name: str, items: list[Any], collate: Callable[..., Any] | None) -> None:
        """Rows filled in pairs, in order; read all together, in reverse order."""
        reverse = items[::-1]
        together = torch.utils.data.default_collate(reverse) if collate is None else collate(reverse)
        if isinstance(self.subject.second, tuple):
            together = tuple(together)
        try:
            want = self.subject.plain(together)
        except Exception as error:
            self._note(f"{name}: the plain model fails: {_line(error)}")
            return
        if collate is not None and not isinstance(together, list):
            self._must_equal(want, copied(call(self.built, self.model, together)), f"{name}, raw", together)
        self.recycling.fill(items, batch_size=2, collate_fn=collate)
        got = copied(self.on_hits(self.recycled_batch(reverse, collate), len(items)))
        mask = together[self.built.mask] if isinstance(collate, Padded) else None
        self._must_be_near(want, got, name, mask, together)

    def _must_be_near(self, want: Any, got: Any, name: str, mask: torch.Tensor | None, batch: Any) -> None:
        off = far(want, got, mask)
        if isinstance(off, str):
            raise Wrong(f"{name}, from rows: {off}")
        for one in off:
            allowed = min(10 * self._own_movement(one.path, want, batch), 0.1)
            if not one.difference <= allowed:
                raise Wrong(f"{name}, from rows: {one} (allowed: {allowed:.2g})")
            self._note(f"{name}: {one}, and the plain model moves by {allowed / 10:.2g} in other company")

    def _own_movement(self, path: str, want: list[tuple[str, Any]], batch: Any) -> float:
        """How far one output of the plain model moves when the same objects come twice in one batch."""
        try:
            twice = dict(self.subject.plain(_twice(batch)))[path]
        except Exception:
            return 0.0
        alone = dict(want)[path]
        if not isinstance(twice, torch.Tensor) or twice.shape[1:] != alone.shape[1:]:
            return 0.0
        return distance(alone, twice[: len(alone)])

    def _note(self, text: str) -> None:
        if text not in self.subject.notes:
            self.subject.notes.append(text)

    # -- in training mode ----------------------------------------------------------------------------------------------

    def training_step(self, found: dict[str, Any]) -> None:
        """Gradients of the suffix, statistics of both halves: against a copy whose prefix is frozen by hand."""
        by_hand = self.frozen_by_hand()
        first = self.subject.first
        try:
            want = _backward(self.built, by_hand, first)
        except Exception as error:
            self._note(f"no training step: {_line(error)}")
            return
        batch = self.recycled_batch(items_of(first), collate_of(first))
        self.model.train()
        hits = self.recycling.stats.hits
        got = _backward(self.built, self.model, batch)
        if self.recycling.stats.hits - hits != OBJECTS:
            raise Wrong("train: the batch was not recycled")
        off = far(want, got)
        if off:
            raise Wrong(f"train, output: {off if isinstance(off, str) else off[0]}")
        found["gradients"] = self._same_gradients(by_hand)
        self._same_buffers(by_hand)
        self.model.eval()

    def frozen_by_hand(self) -> nn.Module:
        """A copy in training mode, with the prefix in eval mode and without gradient."""
        plan = self.recycling.bypass.plan
        by_hand = copy.deepcopy(self.built.model).train()
        for module in plan.prefix_modules:
            by_hand.get_submodule(plan.modules[module]).eval()
        for name in self.recycling.bypass.prefix_parameters:
            by_hand.get_parameter(name).requires_grad_(False)
        for name, times in self._called_on_both_sides():
            _eval_at_first(by_hand.get_submodule(name), times)
        if self.recycling.bypass.quiet:
            self._around_in_eval(by_hand)
        return by_hand

    def _around_in_eval(self, by_hand: nn.Module) -> None:
        """What the modules around the cut drop in their own forward before it is the prefix's: in eval mode.

        Their flags are off until the cut's call has ended. (A Bart drops some of its embeddings, and whole layers.)
        """
        traced = self.subject.traced
        assert traced is not None
        cut = traced.of(self.place.name)[0]
        around = [by_hand.get_submodule(one.name) for one in traced.ancestors(cut)]
        for module in around:
            module.training = False
        calls = itertools.count()

        def reached(*_: Any) -> None:
            if next(calls) == cut.occurrence:
                for module in around:
                    module.training = True

        by_hand.get_submodule(cut.name).register_forward_hook(reached)
        self._note("what the forward around the cut drops before it, in training mode, is off: it is the prefix's")

    def _called_on_both_sides(self) -> Iterator[tuple[str, int]]:
        """Modules of the prefix that the suffix calls too, and how often the prefix does.

        What they do after the cut is the suffix's, in training mode: a shared dropout draws again. (DiT's last layers
        call the embedding inside of the first block, which drops labels.)
        """
        traced, plan = self.subject.traced, self.recycling.bypass.plan
        assert traced is not None
        owned = list(plan.modules.values())
        end = traced.of(self.place.name)[0].end
        for name in {one.name for one in traced.calls if one.begin > end}:
            if any(name == one or name.startswith(f"{one}.") for one in owned):
                yield name, sum(one.end <= end for one in traced.of(name))

    def _same_gradients(self, by_hand: nn.Module) -> int:
        """How many gradients were compared."""
        prefix, count = self.recycling.bypass.prefix_parameters, 0
        theirs = dict(by_hand.named_parameters())
        scale = max((_size(p.grad) for p in theirs.values() if p.grad is not None), default=0.0)
        for name, parameter in self.model.named_parameters():
            want, got = theirs[name].grad, parameter.grad
            if name in prefix and (parameter.requires_grad or got is not None):
                raise Wrong(f"train: '{name}' belongs to the prefix and has a gradient")
            if (want is None) != (got is None):
                raise Wrong(f"train: '{name}' has {'no' if got is None else 'a'} gradient, by hand it is the other way")
            if want is None or got is None:
                continue
            count += 1
            off = distance(want, got)
            if off > 1e-3 and not off * _size(want) <= 1e-6 * scale:
                raise Wrong(f"train: the gradient of '{name}' is off by {off:.2g}")
        return count

    def _same_buffers(self, by_hand: nn.Module) -> None:
        plan = self.recycling.bypass.plan
        mine = [plan.modules[module] for module in plan.prefix_modules]
        theirs, plain = dict(by_hand.named_buffers()), dict(self.built.model.named_buffers())
        for name, buffer in self.model.named_buffers():
            unmoved = any(name == one or name.startswith(f"{one}.") for one in mine)
            want = plain.get(name) if unmoved else theirs.get(name)
            if want is None or want.shape != buffer.shape:
                continue  # made on the way, such as a cache of positions
            off = distance(want, buffer)
            if off > (0.0 if unmoved else 1e-3):
                raise Wrong(
                    f"train: the buffer '{name}' of the {'prefix' if unmoved else 'suffix'} is off by {off:.2g}"
                )

    # -- detached ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detached(self) -> None:
        """As before: output, slots, flags."""
        self.model.eval()
        self.recycling.detach()
        left = [name for name, module in self.model.named_modules() if "_compiled_call_impl" in module.__dict__]
        if left:
            raise Wrong(f"detach left a slot in {left[:3]}")
        if _flags(self.model) != self.before:
            raise Wrong("detach left other training or requires_grad flags")
        self.model.load_state_dict(self.built.model.state_dict())  # the training step has moved batch statistics
        _must_equal(self.subject.want_first, copied(call(self.built, self.model, self.subject.first)), "detached")


def _must_equal(want: list[tuple[str, Any]], got: list[tuple[str, Any]], name: str) -> None:
    difference = first_unequal(want, got)
    if difference:
        raise Wrong(f"{name}: {difference}")


def _flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def _twice(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return torch.cat([batch, batch])
    if isinstance(batch, Mapping):
        return {name: _twice(part) for name, part in batch.items()}
    return batch + batch if isinstance(batch, list) else tuple(_twice(part) for part in batch)


def _size(tensor: torch.Tensor) -> float:
    return tensor.double().pow(2).mean().sqrt().item() if tensor.numel() else 0.0


def _eval_at_first(module: nn.Module, times: int) -> None:
    """Let a module that both halves call be in eval mode for its first calls."""
    counter = itertools.count()
    module.register_forward_pre_hook(lambda m, _: m.train(next(counter) >= times) and None)


def _backward(built: Built, model: nn.Module, batch: Any) -> list[tuple[str, Any]]:
    """One forward and backward with fixed weights on every floating output; the output's leaves."""
    output = call(built, model, batch)
    generator = torch.Generator().manual_seed(13)
    loss = torch.zeros(())
    for _, leaf in leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator)
            loss = loss + (weights * leaf.float().nan_to_num(0.0, 0.0, 0.0)).sum() / max(leaf.numel(), 1)
    if not loss.requires_grad:
        raise ValueError("no output asks for a gradient")
    loss.backward()
    return copied(output)

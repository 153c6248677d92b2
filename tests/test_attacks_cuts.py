"""A second reviewer's attacks, on cuts: what a proof on one example cannot see, and what changes after it.

Every test holds a model built so that the two halves have more to do with each other than the example shows. It must
come out right or be refused in words; a silently wrong number is the one thing that is not allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from torchrecycle import RecycleError, Recycling, cuts, recycle

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def attached(model: nn.Module, example: Any, cut: Any, **options: Any) -> Recycling:
    return recycle(model, example, cut=cut, store="memory://", **options)


def full(recycling: Recycling, *args: Any, **kwargs: Any) -> torch.Tensor:
    with recycling.paused(), torch.no_grad():
        return recycling.model(*args, **kwargs)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class TwoLayers(nn.Module):
    """`first` is the prefix, `last` the suffix."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6) if first is None else first
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


# -- what a kept nest holds besides tensors ----------------------------------------------------------------------------


class GivesMore(nn.Module):
    """Gives, beside the hidden states, something that depends on whether anything is masked."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.mix, self.way = nn.Linear(6, 6), way

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[Any, ...]:
        hidden, whole = self.mix(x) * keep[..., None], bool(keep.all())
        more = {
            "none": None if whole else keep,
            "bool": whole,
            "int": int(whole),
            "float": float(keep.min()),
            "same": hidden if whole else hidden * 2,
        }
        return hidden, more[self.way]


class TakesMore(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last = GivesMore(way), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hidden, more = self.first(x, keep)
        if isinstance(more, torch.Tensor):
            hidden = hidden + (more if more.dim() == 3 else more[..., None])
        elif more is not None:
            hidden = hidden * (1 + more)
        return self.last(hidden).sum(1)


@pytest.mark.parametrize("from_store", [False, True])
@pytest.mark.parametrize("way", ["none", "bool", "int", "float", "same"])
def test_what_a_nest_holds_besides_tensors_is_that_of_the_batch_and_not_of_the_example(way, from_store):
    model = TakesMore(way).eval()
    x, keep = torch.randn(4, 5, 6), (torch.arange(5) < torch.tensor([[2], [5], [3], [4]])).float()
    with torch.no_grad():
        want = model(x, keep)
    with suppress(RecycleError), attached(model, (x[:2], torch.ones(2, 5)), "first") as recycling, torch.no_grad():
        batch = next(iter(recycling.loader(list(zip(x, keep, strict=True)), batch_size=4))) if from_store else (x, keep)
        same(model(*batch), want)


class HandsOn(nn.Module):
    """A skipped layer works out, beside the hidden states, what all later ones read."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.first, self.last = GivesMore(way), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hidden, more = self.embed(x, keep)
        hidden = self.last(self.first(hidden))
        if isinstance(more, torch.Tensor):
            return (hidden * more[..., None]).sum(1)
        return hidden.sum(1) * (1 if more is None else 1 + more)


class TellsThroughADict(nn.Module):
    """A skipped layer writes into a dict that it is given, if there is something to say."""

    class Telling(nn.Linear):
        def forward(self, x: torch.Tensor, keep: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
            if not bool(keep.all()):
                told["keep"] = keep
            return super().forward(x)

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.first, self.last = self.Telling(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        told: dict[str, torch.Tensor] = {}
        hidden = self.last(self.first(self.embed(x, keep, told)))
        return (hidden * told["keep"][..., None] if told else hidden).sum(1)


@pytest.mark.parametrize("from_store", [False, True])
@pytest.mark.parametrize(
    ("kind", "way"), [(HandsOn, "none"), (HandsOn, "bool"), (HandsOn, "float"), (TellsThroughADict, "")]
)
def test_what_a_skipped_layer_tells_besides_tensors_is_that_of_the_batch_and_not_of_the_example(kind, way, from_store):
    model = kind(way).eval()
    x, keep = torch.randn(4, 5, 6), (torch.arange(5) < torch.tensor([[2], [5], [3], [4]])).float()
    with torch.no_grad():
        want = model(x, keep)
    with suppress(RecycleError), attached(model, (x[:2], torch.ones(2, 5)), "first") as recycling, torch.no_grad():
        batch = next(iter(recycling.loader(list(zip(x, keep, strict=True)), batch_size=4))) if from_store else (x, keep)
        same(model(*batch), want)


def _table(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight[: x.shape[1]].cos()


class GivesATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        table = _table(x, self.weight)
        return self.mix(x), table if scale is None else table * scale


class TakesATable(nn.Module):
    def __init__(self, shown: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.shown = GivesATable(), nn.Linear(6, 2), shown

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        hidden, table = self.first(x, scale)
        output = (self.last(hidden * table[None, :, None]) * attention_mask[..., None]).sum(1)
        return (output, table) if self.shown else output


def sequence(objects: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(objects, length, 6),
        "attention_mask": torch.ones(objects, length, dtype=torch.long),
    }


def test_a_table_kept_once_is_that_of_the_weights_of_now_also_for_raw_batches():
    model, batch = TakesATable().eval(), sequence(4, 5)
    other = TakesATable().state_dict()
    with attached(model, sequence(2, 5), "first") as recycling, torch.no_grad():
        model(**batch)
        model.load_state_dict(other)
        with suppress(RecycleError):
            same(model(**batch), full(recycling, **batch))


def test_a_table_kept_once_follows_a_tensor_that_the_example_has_not():
    model, batch = TakesATable().eval(), sequence(4, 8)
    with attached(model, sequence(2, 5), "first") as recycling, torch.no_grad(), suppress(RecycleError):
        model(**batch, scale=torch.tensor(1.0))
        scale = torch.tensor(3.0)
        same(model(**batch, scale=scale), full(recycling, **batch, scale=scale))


def test_writing_into_a_table_that_the_model_returned_changes_no_later_batch():
    model, batch = TakesATable(shown=True).eval(), sequence(4, 5)
    with attached(model, sequence(2, 5), "first"), torch.no_grad():
        want, table = model(**batch)
        table.mul_(5)
        same(model(**batch)[0], want)


def test_a_table_first_made_in_inference_mode_serves_training():
    model = TakesATable()
    with attached(model, sequence(2, 5), "first"):
        batch = sequence(4, 8)
        with torch.inference_mode():
            model(**batch)
        model(**batch).sum().backward()
        assert model.last.weight.grad is not None


class ShowsItsRows(TwoLayers):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x)
        return self.last(hidden), hidden


def test_writing_into_features_that_the_model_returned_does_not_spoil_the_batch():
    model, x = ShowsItsRows().eval(), torch.randn(4, 6)
    with attached(model, x[:2], "first") as recycling, torch.no_grad():
        (batch,) = recycling.loader(list(x), batch_size=4)
        want, features = model(batch)
        features.div_(features.norm(dim=1, keepdim=True))
        same(model(batch)[0], want)


# -- inputs ------------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    def forward(self, x: torch.Tensor, of_each: Sequence[dict[str, torch.Tensor]] | None) -> torch.Tensor:
        return x if of_each is None else x * torch.stack([one["gain"] for one in of_each])[:, None]


class ReadsDicts(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Gain()

    def forward(self, x: torch.Tensor, of_each: Sequence[dict[str, torch.Tensor]] | None = None) -> torch.Tensor:
        return super().forward(self.gain(x, of_each))


def _apart(items: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    return torch.stack([x for x, _ in items]), [more for _, more in items]


def test_dicts_by_object_that_the_prefix_reads_are_seen_also_if_those_of_the_example_are_alike():
    model, x = ReadsDicts().eval(), torch.randn(2, 6)
    gains = [{"gain": torch.tensor(float(g))} for g in (1, 2, 3, 4)]
    data = list(zip(torch.cat([x, x]), gains, strict=True))
    try:
        recycling = attached(model, (x, gains[:1] * 2), "first")
    except RecycleError:
        return
    with recycling, torch.no_grad(), suppress(RecycleError):
        got = [model(*batch) for batch in recycling.loader(data, batch_size=2, collate_fn=_apart)]
        same(torch.cat(got), full(recycling, *_apart(data)))


def test_dicts_by_object_that_come_only_with_the_call_are_not_read_by_the_prefix():
    model, x = ReadsDicts().eval(), torch.randn(4, 6)
    neutral, gains = ([{"gain": torch.tensor(float(g))} for g in values] for values in ([1] * 4, [1, 2, 3, 4]))
    with attached(model, x[:2], "first") as recycling, torch.no_grad(), suppress(RecycleError):
        (batch,) = recycling.loader(list(x), batch_size=4)
        model(batch, neutral)
        same(model(batch, gains), full(recycling, x, gains))


class ReadsFeatures(nn.Module):
    """Tokens, and a vector of features for each text, of which it reads the first four."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(50, 6), self.Mix(), nn.Linear(6, 2)

    class Mix(nn.Module):
        def forward(self, x: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (x + features[:, :4].sum(1)[:, None, None]) * mask[..., None]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(input_ids), features, attention_mask)
        return (self.last(x) * attention_mask[..., None]).sum(1)


def _texts_with_features(lengths: Sequence[int], tokens: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "features": torch.randn(len(lengths), 9)}


def _each(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[row] for name, value in batch.items()} for row in range(len(batch["input_ids"]))]


@pytest.mark.parametrize(
    "tokens",
    [
        7,
        9,
    ],
)
def test_features_that_are_as_many_as_a_batch_has_tokens_count_in_full(tokens):
    model = ReadsFeatures().eval()
    with attached(model, _texts_with_features([tokens, 5], tokens), "first") as recycling, suppress(RecycleError):
        one = _texts_with_features([2, 9], 9)
        other = {name: value.clone() for name, value in one.items()}
        other["features"][0, 2:] += 3
        recycling.fill(_each(one), batch_size=2)
        with torch.no_grad():
            (batch,) = recycling.loader(_each(other), batch_size=2)
            same(model(**batch), full(recycling, **other))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 6), nn.Linear(6, 2)
        self.first = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.embed(input_ids))).mean(1)


def _bare(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": pad_sequence(items, batch_first=True)}


def test_texts_without_a_mask_that_are_padded_further_at_the_next_batch_size_are_other_rows():
    model = Bare().eval()
    items = [torch.randint(1, 50, (n,)) for n in (5, 9, 5, 9, 7, 5)]
    with attached(model, _bare(items[:2]), "first") as recycling, torch.no_grad():
        for size in (2, 1, 3):
            for at, batch in enumerate(recycling.loader(items, batch_size=size, collate_fn=_bare)):
                same(model(**batch), full(recycling, **_bare(items[at * size : (at + 1) * size])))


# -- what the model does to its input ----------------------------------------------------------------------------------


class WritesItsInput(TwoLayers):
    """The first layer is an in-place activation on a view of the input, which the suffix reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.act = nn.Flatten(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.act(self.flat(x))) + x.flatten(1)[:, :2]


class WritesItsInputAfterTheCut(TwoLayers):
    """The cut gives a view of the input, and the suffix writes the input."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        x.mul_(2)
        return self.last(hidden)


@pytest.mark.parametrize("kind", [WritesItsInput, WritesItsInputAfterTheCut])
def test_a_model_that_writes_into_its_input_is_right_or_refused(kind):
    model, x = kind().eval(), torch.randn(4, 2, 3)
    with torch.no_grad():
        want = model(x.clone())
        with suppress(RecycleError), attached(model, x[:2].clone(), "first") as recycling:
            (batch,) = recycling.loader(list(x.clone()), batch_size=4)
            for given in (x.clone(), batch):
                same(model(given), want)


# -- training ----------------------------------------------------------------------------------------------------------


class DropsByPlan(nn.Module):
    """Draws at the beginning which of its layers run: LayerDrop with a small rate, as most use it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layers, self.rate = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        runs = torch.rand(4) >= self.rate if self.training else torch.ones(4, dtype=torch.bool)
        for run, layer in zip(runs.tolist(), self.layers, strict=True):
            x = layer(x).tanh() if run else x
        return x


def _outputs_under_seeds(model: nn.Module, *inputs: torch.Tensor) -> set[float]:
    found = set()
    for seed in range(100):
        torch.manual_seed(seed)
        found.add(round(model(*inputs).flatten()[0].item(), 4))
    return found


@pytest.mark.parametrize(
    "rate",
    [
        0.5,
        0.08,
    ],
)
def test_layers_after_the_cut_are_dropped_also_if_that_is_drawn_at_the_beginning(rate):
    model, x = DropsByPlan(rate).train(), torch.randn(4, 6)
    try:
        recycling = attached(model, x[:2], "layers.1")
    except RecycleError:
        return
    with recycling:
        assert len(_outputs_under_seeds(model, x)) > 1


class TwoTowers(nn.Module):
    """Between the cuts of its towers it now and then doubles what the first gives."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.left, self.more, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last, self.rate = nn.BatchNorm1d(6), nn.Linear(12, 2), rate
        self.before, self.between = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x * self.before
        if self.rate:
            x = F.dropout(x, 0.5, self.training)
        a = self.norm(self.more(self.left(x))) * self.between
        if self.rate and self.training and torch.rand(()) < self.rate:
            a = a * 2
        return self.last(torch.cat([a, self.right(y)], 1))


def test_what_is_drawn_between_the_cuts_of_two_towers_belongs_to_the_suffix():
    model, pair = TwoTowers(0.05).train(), (torch.randn(4, 6), torch.randn(4, 6))
    try:
        recycling = attached(model, pair, ["left", "right"])
    except RecycleError:
        return
    with recycling:
        assert len(_outputs_under_seeds(model, *pair)) > 1


def test_between_the_cuts_of_two_towers_all_trains_and_statistics_move_once():
    model, pair = TwoTowers(0.0).train(), (torch.randn(8, 6), torch.randn(8, 6))
    by_hand = copy.deepcopy(model)
    for frozen in (by_hand.before, *by_hand.left.parameters(), *by_hand.right.parameters()):
        frozen.requires_grad_(False)
    with attached(model, tuple(x[:3] for x in pair), ["left", "right"]) as recycling:
        (batch,) = recycling.loader(list(zip(*pair, strict=True)), batch_size=8)
        model(*batch).sum().backward()
        by_hand(*pair).sum().backward()
        for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        for a, b in zip(model.buffers(), by_hand.buffers(), strict=True):
            assert torch.equal(a, b)


class Scaled(TwoLayers):
    """With a number that the call may bring."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


def _steps_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())


@pytest.mark.parametrize("when", ["at attach", "at a new argument"])
def test_an_optimiser_that_steps_in_backward_takes_no_step_of_the_proofs(when):
    model, x = Scaled().train(), torch.randn(4, 6)
    if when == "at attach":
        _steps_in_backward(model.parameters())
        before = copy.deepcopy(model.state_dict())
        with suppress(RecycleError):
            attached(model, x, "first").detach()
    else:
        with attached(model, x, "first"):
            _steps_in_backward(model.last.parameters())
            before = copy.deepcopy(model.state_dict())
            with suppress(RecycleError):
                model(x, scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class TiedLater(nn.Module):
    """Its head reads the embedding too, but only in training, or only where labels come."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.when = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20), when

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.middle(self.first(ids))
        tied = self.training if self.when == "training" else labels is not None
        return F.linear(hidden, self.first.weight) if tied else self.last(hidden)


@pytest.mark.parametrize("when", ["training", "labels"])
def test_a_weight_that_the_suffix_reads_only_at_times_is_refused_like_any_shared_one(when):
    model, ids = TiedLater(when).train(), torch.randint(0, 20, (4, 5))
    with pytest.raises(RecycleError, match="share"), attached(model, ids, "first"):
        model(ids) if when == "training" else model(ids, ids)


class TiedByStorage(nn.Module):
    """Two parameters over the same memory, as ``nn.Parameter(embedding.weight.data)`` makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.last.weight = nn.Parameter(self.first.weight.data)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(ids))


def test_training_the_suffix_does_not_move_the_prefix_through_shared_memory_in_silence():
    model, ids = TiedByStorage().train(), torch.randint(0, 20, (32, 5))
    before = model.first.weight.clone()
    try:
        recycling = attached(model, ids[:2], "first")
    except RecycleError:
        return
    with recycling:
        optimizer = torch.optim.SGD(recycling.parameters(), lr=0.1)
        for batch in recycling.loader(list(ids), batch_size=4):
            optimizer.zero_grad()
            model(batch).logsumexp(-1).mean().backward()
            optimizer.step()
    assert torch.equal(model.first.weight, before)


class ScalesAtTheEnd(TwoLayers):
    """Works out at its beginning what only its end uses."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.logit_scale.exp()
        return super().forward(x) * scale


@pytest.mark.xfail(strict=True, reason="_Reads counts every read before the cut, also of what only the suffix uses")
def test_a_parameter_of_the_suffix_alone_trains_also_if_it_is_read_early():
    with attached(ScalesAtTheEnd(), torch.randn(4, 6), "first") as recycling:
        assert any(p is recycling.model.logit_scale for p in recycling.parameters())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.block(self.block(x))))


def test_statistics_of_a_block_on_both_sides_of_the_cut_never_make_stale_rows_in_silence():
    model, x = Normed().train(), torch.randn(16, 6)
    with attached(model, x[:4], "block#2", share="freeze") as recycling:
        before = model.block[1].running_mean.clone()
        first, second = recycling.loader(list(x), batch_size=8)
        model(first)
        with pytest.raises(RecycleError, match="has moved"):
            model(second)
        assert not torch.equal(before, model.block[1].running_mean)


def test_a_buffer_that_the_suffix_moves_in_training_moves_as_without_recycling():
    class Centred(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if self.training:
                self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return self.last(x - self.mean)

    model, x = Centred().train(), torch.randn(8, 6)
    by_hand = copy.deepcopy(model)
    with attached(model, x[:3], "first") as recycling:
        for batch, raw in zip(recycling.loader(list(x), batch_size=4), x.split(4), strict=True):
            same(model(batch), by_hand(raw))
    same(model.mean, by_hand.mean)


# -- what layers leave behind ------------------------------------------------------------------------------------------

LEFT: dict[str, torch.Tensor] = {}


class Leaving(nn.Linear):
    """Leaves the largest value of the batch, which is the same for the batch turned round."""

    def __init__(self, in_global: bool) -> None:
        super().__init__(6, 6)
        self.in_global = in_global

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_global:
            LEFT["seen"] = x.abs().max()
        else:
            self.seen = x.abs().max()
        return super().forward(x)


class LooksFor(nn.Module):
    def __init__(self, in_global: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = Leaving(in_global), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.middle(self.first(x)))
        return x * (LEFT["seen"] if self.first.in_global else self.first.seen)


@pytest.mark.parametrize("in_global", [False, True])
def test_a_maximum_that_a_skipped_layer_leaves_for_a_later_one_is_refused(in_global):
    model, x = LooksFor(in_global).eval(), torch.randn(8, 6)
    model(x[:2])
    try:
        recycling = attached(model, x[:2], "middle")
    except RecycleError:
        return
    with recycling, torch.no_grad():
        batches = list(recycling.loader(list(x), batch_size=4))
        for batch, raw in zip(batches, x.split(4), strict=True):
            same(model(batch), full(recycling, raw))


# -- rows that depend on other objects ---------------------------------------------------------------------------------


class OfTheImaginary(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x - x.mean(0))


class Complex(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(torch.cat([hidden.real, hidden.imag], 1))


def test_an_imaginary_part_that_depends_on_the_other_objects_is_refused():
    with pytest.raises(RecycleError, match="depends on the other objects"):
        attached(Complex(OfTheImaginary()).eval(), torch.randn(4, 6), "first")


class ScaledByTheLargestId(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) * (1 + ids.max())


@pytest.mark.parametrize("example", [[[1, 2, 3], [4, 5, 19]], [[0, 0, 0], [0, 0, 0]]])
def test_ids_that_mix_through_their_maximum_are_refused_whatever_the_example(example):
    with pytest.raises(RecycleError):
        attached(TwoLayers(ScaledByTheLargestId()).eval(), torch.tensor(example), "first")


class QuantisedByBatch(nn.Module):
    """Rounds to 255 steps of the largest value in the batch, as dynamic int8 layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 6)
        with torch.no_grad():  # some words are larger than others, as in any trained model
            self.embed.weight *= torch.linspace(0.1, 3, 50)[:, None]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        step = x.abs().max() / 127
        return (x / step).round() * step


def test_rounding_to_steps_of_the_largest_value_in_a_batch_of_texts_is_refused():
    with pytest.raises(RecycleError):
        attached(TwoLayers(QuantisedByBatch()).eval(), torch.randint(0, 50, (2, 7)), "first")


class LeansOnTheOthers(nn.Module):
    """A row holds two hundredths of the batch's mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.02 * x.mean(0)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ],
)
def test_rows_that_lean_a_little_on_the_others_are_refused_in_every_dtype(dtype):
    x = torch.randn(4, 6).to(dtype)
    with pytest.raises(RecycleError, match="depends on the other objects"):
        attached(TwoLayers(LeansOnTheOthers()).to(dtype).eval(), x, "first")


def test_floats_that_mix_are_refused_although_the_objects_of_the_example_are_alike():
    class Centring(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    with pytest.raises(RecycleError, match="depends on the other objects"):
        attached(TwoLayers(Centring()).eval(), torch.zeros(2, 6), "first")


# -- what changes after the proof --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    gain: float = 1.0


class Helper:
    def __init__(self) -> None:
        self.gain = 1.0


class Configured(nn.Module):
    """A layer of the prefix with settings of some kind."""

    def __init__(self, settings: Any, function: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.mix, self.settings, self.function = nn.Linear(6, 6), settings, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings = self.settings[0] if isinstance(self.settings, tuple) else self.settings
        gain = settings["gain"] if isinstance(settings, dict) else settings.gain
        return (self.function or torch.neg)(self.mix(x) * gain)


class ConfiguredRoot(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.helper.gain)


def _times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return multiply


def _another_gain(model: Any) -> None:
    model.first.settings.gain = 3.0


def _another_gain_in_a_tuple(model: Any) -> None:
    model.first.settings[0]["gain"] = 3.0


def _another_gain_of_the_root(model: Any) -> None:
    model.helper.gain = 3.0


def _another_closure(model: Any) -> None:
    model.first.function = _times(3.0)


def _another_partial(model: Any) -> None:
    model.first.function = functools.partial(torch.mul, other=3.0)


def _another_forward(model: Any) -> None:
    model.first.forward = types.MethodType(lambda self, x: self.mix(x) * 3, model.first)


def _hook_for_all(model: Any) -> None:
    model.handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is model.first else None
    )


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "namespace": (lambda: TwoLayers(Configured(SimpleNamespace(gain=1.0))), _another_gain),
    "dataclass": (lambda: TwoLayers(Configured(Settings())), _another_gain),
    "object": (lambda: TwoLayers(Configured(Helper())), _another_gain),
    "dict in a tuple": (lambda: TwoLayers(Configured(({"gain": 1.0},))), _another_gain_in_a_tuple),
    "object of the root": (ConfiguredRoot, _another_gain_of_the_root),
    "closure": (lambda: TwoLayers(Configured(Settings(), _times(2.0))), _another_closure),
    "partial": (
        lambda: TwoLayers(Configured(Settings(), functools.partial(torch.mul, other=2.0))),
        _another_partial,
    ),
    "patched forward": (lambda: TwoLayers(Configured(Settings())), _another_forward),
    "hook for all modules": (TwoLayers, _hook_for_all),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_setting_of_any_kind_that_changes_while_attached_is_noticed_by_the_next_iterator(kind):
    make, change = CHANGES[kind]
    model, x = make().eval(), torch.randn(4, 6)
    with attached(model, x[:2], "first") as recycling, torch.no_grad():
        loader = recycling.loader(list(x), batch_size=4)
        same(torch.cat([model(batch) for batch in loader]), full(recycling, x))
        change(model)
        try:
            with suppress(RecycleError):
                same(torch.cat([model(batch) for batch in loader]), full(recycling, x))
        finally:
            if kind == "hook for all modules":
                model.handle.remove()


class Counting(nn.Module):
    """From its hundredth call on it does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.calls = nn.Linear(6, 6), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.mix(x) * (2 if self.calls > 100 else 1)


def test_a_frozen_layer_that_counts_its_calls_and_acts_on_it_is_right_or_refused():
    model, x = TwoLayers(Counting()).eval(), torch.randn(4, 6)
    try:
        recycling = attached(model, x[:2], "first")
    except RecycleError:
        return
    with recycling, torch.no_grad(), suppress(RecycleError):
        loader = recycling.loader(list(x), batch_size=4)
        for _ in range(120):
            want = full(recycling, x)
            same(torch.cat([model(batch) for batch in loader]), want)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_after_the_cut_has_moved_also_with_workers_that_stay(workers):
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).eval(), torch.randn(8, 6)
    with attached(model, x[:2], "1") as recycling, torch.no_grad():
        loader = recycling.loader(list(x), batch_size=4, num_workers=workers, persistent_workers=bool(workers))
        for cut in ("1", "2", "0"):
            recycling.recut(cut)
            same(torch.cat([model(batch) for batch in loader]), full(recycling, x))


def test_two_recyclings_whose_cuts_move_each_freeze_and_thaw_their_own():
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).eval(), torch.randn(8, 6)
    model[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    want = model(x).detach()
    first, second = attached(model, x[:2], "1"), attached(model, x[:2], "2")
    first.recut("0")
    second.recut("1")
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 4
    with torch.no_grad():
        for recycling in (first, second):
            same(torch.cat([model(batch) for batch in recycling.loader(list(x), batch_size=4)]), want)
    second.detach()
    first.detach()
    assert [p.requires_grad for p in model.parameters()] == before


# -- odd modules, and what is said of them -----------------------------------------------------------------------------


class NotMadeYet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.LazyLinear(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("way", ["recycle", "cuts"])
def test_a_model_with_a_lazy_layer_still_runs_after_it_was_tried(way):
    model, x = NotMadeYet(), torch.randn(4, 6)
    with suppress(RecycleError):
        attached(model, x, "first").detach() if way == "recycle" else cuts(model, x)
    assert model(x).shape == (4, 2)


class OddTensor(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mix, self.kind = nn.Linear(6, 6), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(x)
        if self.kind == "sparse":
            return x.to_sparse()
        return torch.nested.as_nested_tensor(list(x), layout=torch.jagged)


class TakesOddTensor(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = self.first(x)
        return self.last(odd.to_dense() if odd.is_sparse else torch.stack(list(odd.unbind())))


@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_an_activation_that_is_no_plain_tensor_is_refused_in_words(kind):
    with pytest.raises(RecycleError):
        attached(TakesOddTensor(OddTensor(kind)), torch.randn(4, 6), "first")


class ByOne(nn.Module):
    """Its forward is a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        yield self.last(self.first(x))


def test_a_model_whose_forward_is_a_generator_is_refused_as_one():
    with pytest.raises(RecycleError, match="generator"):
        attached(ByOne(), torch.randn(4, 6), "first")


def test_a_joint_cut_that_names_one_cut_twice_is_refused():
    with pytest.raises(RecycleError, match="twice"):
        attached(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(4, 6), ["0", "0"])


# -- PyTorch's own layers ----------------------------------------------------------------------------------------------


class OfTorch(nn.Module):
    """The text model of PyTorch's own tutorials: ids, and a mask that is true where a text is padded."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.embed, self.last = nn.Embedding(50, 8), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)

    def forward(self, ids: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padded)
        return self.last(hidden.masked_fill(padded[..., None], 0.0).sum(1))


@pytest.mark.parametrize(
    "nested",
    [
        False,
        True,
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_encoder_of_torch_with_a_padding_mask_is_right_or_refused_in_words(nested, training):
    model = OfTorch(nested).train(training)
    ids, padded = torch.randint(0, 50, (4, 7)), torch.arange(7) >= torch.tensor([[7], [3], [5], [2]])
    try:
        recycling = attached(model, (ids[:2], padded[:2]), "encoder.layers.0")
    except RecycleError:
        return
    model.eval()
    with recycling:
        for gradient in (False, True):
            (batch,) = recycling.loader(list(zip(ids, padded, strict=True)), batch_size=4)
            with torch.set_grad_enabled(gradient):
                same(model(*batch), full(recycling, ids, padded))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1), nn.Linear(6, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.last((self.encoder(x) - self.encoder(y)).abs())


def test_both_calls_of_a_siamese_encoder_train_as_with_its_first_layer_frozen_by_hand():
    model, pair = Siamese().train(), (torch.randn(8, 6), torch.randn(8, 6))
    by_hand = copy.deepcopy(model)
    by_hand.encoder[0].requires_grad_(False)
    with attached(model, tuple(x[:2] for x in pair), ["encoder.0#1", "encoder.0#2"]) as recycling:
        (batch,) = recycling.loader(list(zip(*pair, strict=True)), batch_size=8)
        for one, given in ((model, batch), (by_hand, pair)):
            torch.manual_seed(1)
            one(*given).sum().backward()
        for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_spectral_norm_moves_its_vectors_after_the_cut_alone():
    spectral = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(spectral(nn.Linear(6, 6)), nn.ReLU(), spectral(nn.Linear(6, 2))).train()
    x = torch.randn(8, 6)
    with attached(model, x[:2], "1") as recycling:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for batch in recycling.loader(list(x), batch_size=4):
            model(batch).sum().backward()
        model(x)
        moved = {name.partition(".")[0] for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert moved == {"2"}


class PadsAtTimes(nn.Module):
    """Its own forward reads a parameter before the cut, but only for texts with padding, which the example has not."""

    def __init__(self) -> None:
        super().__init__()
        self.padding = nn.Parameter(torch.randn(6))
        self.embed, self.first, self.last = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if bool((ids == 0).any()):
            x = torch.where((ids == 0)[..., None], self.padding, x)
        return self.last(self.first(x))


def test_a_parameter_that_is_read_before_the_cut_for_some_objects_only_is_noticed_if_it_changes():
    model, ids = PadsAtTimes().eval(), torch.tensor([[1, 2, 0], [3, 0, 0]])
    with attached(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), "first") as recycling, torch.no_grad():
        loader = recycling.loader(list(ids), batch_size=2)
        same(torch.cat([model(batch) for batch in loader]), full(recycling, ids))
        model.padding.mul_(3)
        with suppress(RecycleError):
            same(torch.cat([model(batch) for batch in loader]), full(recycling, ids))

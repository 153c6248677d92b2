"""Metrics over a whole data set: whatever holds the samples, encoded a batch at a time, all or some of them asked."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler
from torchmetrics import Metric, MetricCollection

from torchrecycle.errors import BatchError
from torchrecycle.similarity import (
    Encoder,
    SimilarityModel,
    SkipConnectionHead,
    evaluate,
    evaluation,
    metrics,
)
from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.evaluation import AttachedMetric, Evaluator, GroupSampler, PairSampler
from torchrecycle.similarity.loaders import GroupSimilarityDataLoader, PairSimilarityDataLoader
from torchrecycle.similarity.metrics import NotFiniteError, NothingToAskError, Pairs
from torchrecycle.similarity.retrieval import (
    RetrievalMAP,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalReciprocalRank,
    RetrievalRPrecision,
)
from torchrecycle.similarity.samples import SimilarityGroupSample, SimilarityPairSample


class Model(nn.Module):
    """A layer over vectors, or over the code points of texts, which remembers what it was asked to encode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 5)
        self.sizes: list[int] = []
        self.objects: list[Any] = []

    def encode(self, inputs: list[Any], batch_size: int = 32, to_numpy: bool = True) -> Any:
        assert not to_numpy
        self.sizes.append(len(inputs))
        self.objects += [one if isinstance(one, str) else None for one in inputs]
        with torch.no_grad():
            return self.layer(torch.stack([_vector(one) for one in inputs]))


def _vector(obj: Any) -> Tensor:
    if isinstance(obj, Tensor):
        return obj
    if isinstance(obj, np.ndarray):
        return torch.from_numpy(obj).float()
    if isinstance(obj, Picture):
        return obj.pixels
    codes = [ord(letter) % 31 / 31 for letter in str(obj)[:8].ljust(8)]
    return torch.tensor(codes) - 0.5


class Picture:
    """An object with no cheap identity."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels


def _vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def _grouped(count: int = 70) -> tuple[list[SimilarityGroupSample], Tensor, Tensor]:
    groups = torch.randint(0, 12, (count,), generator=torch.Generator().manual_seed(1))
    vectors = _vectors(12, 2)[groups] + 0.8 * _vectors(count, 3)
    return [SimilarityGroupSample(v, int(g)) for v, g in zip(vectors, groups, strict=True)], vectors, groups


def _paired(count: int = 30) -> tuple[list[SimilarityPairSample], Tensor]:
    left = _vectors(count, 4)
    right = left + 0.8 * _vectors(count, 5)
    return [SimilarityPairSample(a, b) for a, b in zip(left, right, strict=True)], torch.cat([left, right])


def _embedded(vectors: Tensor) -> Tensor:
    with torch.no_grad():
        return Model().layer(vectors)


FIVE: dict[str, Metric] = {
    "P@1": RetrievalPrecision(1),
    "R@5": RetrievalRecall(5),
    "RR": RetrievalReciprocalRank(),
    "RP": RetrievalRPrecision(),
    "MAP": RetrievalMAP(),
}


def _floats(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


# -- all that holds samples --------------------------------------------------------------------------------------------


def test_groups_are_evaluated_to_the_figures_of_all_embeddings_with_one_ranking(monkeypatch: pytest.MonkeyPatch):
    samples, vectors, groups = _grouped()
    embeddings = _embedded(vectors)
    rankings = []
    rank = metrics._rank_block
    monkeypatch.setattr(metrics, "_rank_block", lambda *a: rankings.append(1) or rank(*a))
    model = Model()
    found = Evaluator(FIVE, batch_size=16).evaluate(samples, model)
    assert len(rankings) == 1
    assert model.sizes == [16, 16, 16, 16, 6]
    assert _floats(found) == pytest.approx(
        {
            "P@1": metrics.precision(embeddings, groups),
            "R@5": metrics.recall(embeddings, groups, 5),
            "RR": metrics.reciprocal_rank(embeddings, groups),
            "RP": metrics.r_precision(embeddings, groups),
            "MAP": metrics.mean_average_precision(embeddings, groups),
        },
        abs=1e-6,
    )
    assert 0.2 < found["RP"] < 0.9


@pytest.mark.parametrize("distinguish", [False, True])
def test_pairs_are_evaluated_to_the_figures_of_all_embeddings(distinguish: bool):
    samples, vectors = _paired()
    found = Evaluator(RetrievalReciprocalRank(distinguish=distinguish), batch_size=7).evaluate(samples, Model())
    pairs = Pairs.side_by_side(30, distinguish=distinguish)
    expected = metrics.reciprocal_rank(_embedded(vectors), pairs)
    assert 0.2 < expected < 0.95
    assert _floats(found) == pytest.approx({"RetrievalReciprocalRank": expected}, abs=1e-6)


class Endless(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Mapped(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def test_whatever_holds_the_samples_gives_the_same_figures():
    samples, _, _ = _grouped()
    expected = _floats(Evaluator(FIVE).evaluate(samples, Model()))
    holders = {
        "tuple": tuple(samples),
        "generator": (sample for sample in samples),
        "map-style": Mapped(samples),
        "iterable": Endless(samples),
        "loader": DataLoader(Mapped(samples), batch_size=9, collate_fn=list),
        "loader of an iterable": DataLoader(Endless(samples), batch_size=9, collate_fn=list),
        "loader without batches": DataLoader(Mapped(samples), batch_size=None),
        "shuffled": GroupSimilarityDataLoader(Mapped(samples), batch_size=9, shuffle=True, drop_last=True),
        "whole groups": GroupSimilarityDataLoader(Mapped(samples), batch_size=8, objects_per_group=4),
        "batch sampler": DataLoader(Mapped(samples), batch_sampler=[[*range(40)], [*range(40, 70)]], collate_fn=list),
    }
    for name, holder in holders.items():
        assert _floats(Evaluator(FIVE).evaluate(holder, Model())) == pytest.approx(expected, abs=1e-6), name


def test_workers_read_the_data_set_and_the_order_of_random_numbers_is_untouched():
    samples, _ = _paired()
    expected = _floats(Evaluator(FIVE).evaluate(samples, Model()))
    model = Model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = Evaluator(FIVE, num_workers=2).evaluate(Mapped(samples), model)
    loader = PairSimilarityDataLoader(Mapped(samples), batch_size=6, shuffle=True, num_workers=1)
    of_loader = Evaluator(FIVE).evaluate(loader, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert _floats(found) == pytest.approx(expected, abs=1e-6)
    assert _floats(of_loader) == pytest.approx(expected, abs=1e-6)


def test_a_sampler_that_takes_some_objects_of_a_loader_is_obeyed():
    samples, vectors, groups = _grouped()
    some = list(range(0, 70, 2))
    loader = DataLoader(Mapped(samples), batch_size=10, sampler=SubsetRandomSampler(some), collate_fn=list)
    model = Model()
    found = Evaluator(RetrievalRPrecision()).evaluate(loader, model)
    assert sum(model.sizes) == 35
    expected = metrics.r_precision(_embedded(vectors[some]), groups[some])
    assert float(found["RetrievalRPrecision"]) == pytest.approx(expected, abs=1e-6)


def test_objects_are_let_go_after_their_batch():
    alive: set[int] = set()
    most = 0

    class OnTheFly(Dataset[Any]):
        def __len__(self) -> int:
            return 200

        def __getitem__(self, index: int) -> SimilarityGroupSample:
            nonlocal most
            picture = Picture(torch.randn(8))
            alive.add(index)
            weakref.finalize(picture, alive.discard, index)
            most = max(most, len(alive))
            return SimilarityGroupSample(picture, index % 10)

    gc.collect()
    Evaluator(FIVE, batch_size=10).evaluate(OnTheFly(), Model())
    assert most <= 20


class Words(Encoder):
    """A bag of hashed letters through a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5))

    @property
    def trainable(self) -> bool:
        return False

    @property
    def embedding_size(self) -> int:
        return 6

    def get_collate_fn(self) -> Any:
        return lambda texts: torch.stack([_vector(text) for text in texts])

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch)


def test_a_similarity_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    model = SimilarityModel(Words(), SkipConnectionHead(6, dropout=0.5)).train()
    texts = [f"{first}{second}" for first in "abcdefg" for second in "nopq"]
    samples = [SimilarityGroupSample(text, ord(text[0])) for text in texts]
    found = evaluate(Evaluator(FIVE, batch_size=5), samples, model)
    expected = metrics.r_precision(model.encode(texts, to_numpy=False), torch.tensor([ord(text[0]) for text in texts]))
    assert float(found["RP"]) == pytest.approx(expected, abs=1e-6)
    assert model.training
    assert model.head.training


# -- objects of several pairs ------------------------------------------------------------------------------------------


def test_a_text_of_several_pairs_is_one_object_encoded_once_with_several_right_answers():
    texts = [("how to stop", "press q"), ("how to stop", "ctrl-c"), ("where", "here"), ("quit?", "press q")]
    samples = [SimilarityPairSample(a, b) for a, b in texts]
    model = Model()
    figures = Evaluator(RetrievalMAP(reduce_func=None), PairSampler(distinguish=True)).evaluate(samples, model)
    assert sorted(model.objects) == sorted({text for pair in texts for text in pair})
    order = ["how to stop", "press q", "ctrl-c", "where", "here", "quit?"]
    embeddings = _embedded(torch.stack([_vector(text) for text in order]))
    pairs = Pairs(torch.tensor([[0, 1], [0, 2], [3, 4], [5, 1]]), distinguish=True)
    each = metrics.average_precision_of_each(embeddings, pairs)
    assert figures["RetrievalMAP"].tolist() == pytest.approx(each[[0, 3, 5]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("same", "count"),
    [
        (lambda: "text", 1),
        (lambda: b"bytes", 1),
        (lambda: 12, 1),
        (lambda: PurePosixPath("a/b.png"), 1),
        (lambda: torch.full((8,), 0.3), 1),
        (lambda: np.full(8, 0.3), 1),
        (lambda: Picture(torch.full((8,), 0.3)), 3),
    ],
)
def test_only_objects_that_a_model_cannot_tell_apart_are_taken_for_one(same: Any, count: int):
    samples = [SimilarityPairSample(same(), _vectors(1, seed)[0]) for seed in range(3)]
    model = Model()
    Evaluator(RetrievalMAP(distinguish=True)).evaluate([*samples, SimilarityPairSample("other", "this")], model)
    assert sum(model.sizes) == count + 3 + 2


def test_objects_of_other_types_and_values_are_never_taken_for_one():
    objects: list[Any] = [1, "1", b"1", "True", torch.tensor([1.0] * 8), torch.tensor([1.0] * 8).double()]
    objects += [np.ones(8), np.ones(8, np.float32), torch.ones(2, 4), PurePosixPath("1"), "a/b", PurePosixPath("a/b")]
    known = [evaluation._identity(one) for one in objects]
    assert None not in known
    assert len(set(known)) == len(objects)
    for one in (True, 1.0, {"a": 1}, ("a",), None, Picture(torch.ones(8)), np.array(["a", None], dtype=object)):
        assert evaluation._identity(one) is None


def test_scores_and_subgroups_of_samples_are_reckoned_with():
    left, right = _vectors(12, 6), _vectors(12, 7)
    scores, subgroups = [1.0, 0.5, 0.0] * 4, [2**60 + n // 4 for n in range(12)]
    samples = [
        SimilarityPairSample(Picture(a), Picture(b), score, subgroup)
        for a, b, score, subgroup in zip(left, right, scores, subgroups, strict=True)
    ]
    found = Evaluator(FIVE).evaluate(samples, Model())
    pairs = Pairs(Pairs.side_by_side(12).pairs, torch.tensor(scores), torch.tensor(subgroups))
    expected = metrics.measure(_embedded(torch.cat([left, right])), pairs, {"MAP": metrics.AveragePrecision()})["MAP"]
    assert expected.isnan().sum() == 8
    assert float(found["MAP"]) == pytest.approx(float(expected.nanmean()), abs=1e-6)


# -- some of the objects -----------------------------------------------------------------------------------------------


def test_a_group_sampler_asks_some_objects_among_all_the_same_for_each_call_and_model():
    samples, vectors, groups = _grouped(300)
    each = metrics.r_precision_of_each(_embedded(vectors), groups)
    metric = RetrievalRPrecision(reduce_func=None)
    found = [
        Evaluator(metric, GroupSampler(40, seed=seed)).evaluate(samples, Model())["RetrievalRPrecision"]
        for seed in (0, 0, 1)
    ]
    drawn = [GroupSampler(40, seed=seed).draw(torch.arange(300)) for seed in (0, 1)]
    assert torch.equal(found[0], found[1])
    for figures, asked in ((found[0], drawn[0]), (found[2], drawn[1])):
        assert asked is not None
        assert len(set(asked.tolist())) == 40
        assert figures.tolist() == pytest.approx(each[asked].tolist(), abs=1e-6)
    assert not torch.equal(found[0], found[2])


def test_a_sample_has_noise_and_no_bias():
    samples, vectors, groups = _grouped(300)
    exact = metrics.r_precision(_embedded(vectors), groups)
    metric = RetrievalRPrecision()
    estimates = [
        float(Evaluator(metric, GroupSampler(60, seed=seed)).evaluate(samples, Model())["RetrievalRPrecision"])
        for seed in range(30)
    ]
    assert sum(estimates) / 30 == pytest.approx(exact, abs=0.015)
    assert 0.005 < max(estimates) - min(estimates) < 0.3


def test_a_sample_is_drawn_of_those_that_have_a_relative():
    alone = [SimilarityGroupSample(vector, 100 + n) for n, vector in enumerate(_vectors(500, 8))]
    samples = [*alone, SimilarityGroupSample(torch.ones(8), 1), SimilarityGroupSample(torch.ones(8), 1)]
    for size in (1, 2, 400, -1):
        found = Evaluator(RetrievalPrecision(reduce_func=None), GroupSampler(size)).evaluate(samples, Model())
        assert found["RetrievalPrecision"].numel() == min(size, 2) if size > 0 else 2


def test_a_sample_larger_than_the_data_takes_all():
    samples, _, _ = _grouped()
    everything = _floats(Evaluator(FIVE).evaluate(samples, Model()))
    for size in (70, 10_000):
        assert _floats(Evaluator(FIVE, GroupSampler(size)).evaluate(samples, Model())) == everything


def test_a_pair_sampler_asks_left_objects_only_if_it_distinguishes_and_leaves_that_to_the_metric_if_not_told():
    samples, vectors = _paired()
    embeddings = _embedded(vectors)
    for told, of_metric, distinguish in (
        (True, False, True),
        (False, True, False),
        (None, True, True),
        (None, False, False),
    ):
        metric = RetrievalReciprocalRank(distinguish=of_metric, reduce_func=None)
        figures = Evaluator(metric, PairSampler(12, told)).evaluate(
            [SimilarityPairSample(Picture(s.obj_a), Picture(s.obj_b)) for s in samples], Model()
        )["RetrievalReciprocalRank"]
        each = metrics.reciprocal_rank_of_each(embeddings, Pairs.side_by_side(30, distinguish=distinguish))
        asked = PairSampler(12).draw(torch.arange(30 if distinguish else 60))
        assert asked is not None
        # the evaluator encodes pair by pair: the right one of pair 3 is its number 7, and 33 of the embeddings above
        where = asked if distinguish else asked // 2 + 30 * (asked % 2)
        assert figures.tolist() == pytest.approx(each[where].tolist(), abs=1e-6)


def test_a_sampler_may_say_how_to_encode_and_where_to_hold_embeddings():
    samples, _, _ = _grouped()
    model = Model()
    Evaluator(FIVE, GroupSampler(5, encode_batch_size=30, device="cpu", log_progress=False)).evaluate(samples, model)
    assert model.sizes == [30, 30, 10]


# -- metrics -----------------------------------------------------------------------------------------------------------


class Spread(Metric):
    """A metric of somebody else: the mean distance of the two sides of pairs, or of objects from their centre."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, embeddings: Tensor, **targets: Tensor) -> None:
        if "pairs" in targets:
            left, right = targets["pairs"].unbind(1)
            apart = embeddings[left] - embeddings[right]
        else:
            apart = embeddings - embeddings.mean(0)
        self.total += apart.norm(dim=1).sum()
        self.count += len(apart)

    def compute(self) -> Tensor:
        return self.total / self.count


def test_metrics_of_others_get_everything_as_one_batch_and_keep_their_state():
    mine = Spread()
    mine.update(torch.ones(3, 2) * torch.tensor([[1.0], [2.0], [3.0]]))
    before = float(mine.compute())
    samples, vectors = _paired()
    found = Evaluator({"spread": mine, "RR": RetrievalReciprocalRank()}).evaluate(samples, Model())
    left, right = _embedded(vectors).chunk(2)
    assert float(found["spread"]) == pytest.approx(float((left - right).norm(dim=1).mean()), abs=1e-5)
    assert list(found) == ["spread", "RR"]
    assert float(mine.compute()) == before
    grouped, vectors, _ = _grouped()
    found = Evaluator([mine]).evaluate(grouped, Model())
    embeddings = _embedded(vectors)
    assert float(found["Spread"]) == pytest.approx(float((embeddings - embeddings.mean(0)).norm(dim=1).mean()), 1e-5)
    with pytest.raises(ValueError, match="'Spread' is a Spread, which cannot ask some objects only"):
        Evaluator([mine], GroupSampler(5)).evaluate(grouped, Model())


def test_evaluating_leaves_the_state_of_the_metrics_alone():
    metric = RetrievalRPrecision()
    metric.update(torch.eye(4)[[0, 0, 1, 1]], groups=torch.tensor([0, 0, 1, 1]))
    samples, _, _ = _grouped()
    assert float(Evaluator(metric).evaluate(samples, Model())["RetrievalRPrecision"]) < 1
    assert float(metric.compute()) == 1.0


def test_metrics_that_rank_by_different_distances_each_get_their_own():
    samples, vectors, groups = _grouped()
    evaluator = Evaluator({name: RetrievalMAP(Distance(name)) for name in ("cosine", "euclidean", "manhattan")})
    found = _floats(evaluator.evaluate(samples, Model()))
    assert len(set(found.values())) == 3
    for name, value in found.items():
        expected = metrics.mean_average_precision(_embedded(vectors), groups, distance=Distance(name))
        assert value == pytest.approx(expected, abs=1e-6)


def test_names_of_metrics_are_those_given_or_those_of_their_classes():
    samples, _, _ = _grouped()
    attached = AttachedMetric("RP", RetrievalRPrecision())
    assert list(Evaluator([attached, RetrievalMAP()]).evaluate(samples, Model())) == ["RP", "RetrievalMAP"]
    with pytest.raises(ValueError, match="two metrics have the name 'RetrievalPrecision': give a dict"):
        Evaluator([RetrievalPrecision(1), RetrievalPrecision(5)])
    with pytest.raises(ValueError, match="no metric to evaluate"):
        Evaluator([])
    with pytest.raises(ValueError, match=r"the metric 'x' is the class RetrievalMAP: give a torchmetrics.Metric"):
        Evaluator({"x": RetrievalMAP})
    with pytest.raises(ValueError, match=r"the metric 'x' is a Precision: give a torchmetrics.Metric"):
        Evaluator({"x": metrics.Precision()})


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_evaluated_is_refused_in_words():
    evaluator, model = Evaluator(RetrievalMAP()), Model()
    one, pair = SimilarityGroupSample(torch.ones(8), 1), SimilarityPairSample(torch.ones(8), torch.ones(8))
    for dataset in ([], iter([]), Mapped([]), DataLoader(Mapped([]), collate_fn=list)):
        with pytest.raises(BatchError, match="the data set is empty"):
            evaluator.evaluate(dataset, model)
    with pytest.raises(BatchError, match="gives SimilarityGroupSample and, as sample 40, a SimilarityPairSample"):
        evaluator.evaluate([*[one] * 40, pair], model)
    with pytest.raises(BatchError, match="sample 1 is a tuple: the data set gives SimilarityGroupSample, or"):
        evaluator.evaluate([one, (torch.ones(8), 1)], model)
    with pytest.raises(BatchError, match="a group is 'cat', a str: groups are whole numbers"):
        evaluator.evaluate([SimilarityGroupSample(torch.ones(8), "cat")], model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NothingToAskError, match="each of the 3 objects is the only one of its group"):
        evaluator.evaluate([SimilarityGroupSample(torch.ones(8), n) for n in range(3)], model)
    with pytest.raises(NothingToAskError, match="all 3 objects are of one group"):
        evaluator.evaluate([one] * 3, model)
    with pytest.raises(NothingToAskError, match="none is a negative of anybody"):
        evaluator.evaluate([SimilarityPairSample("a", "b")], model)
    with pytest.raises(NothingToAskError, match="none is a negative of anybody"):
        Evaluator(RetrievalMAP(distinguish=True)).evaluate([SimilarityPairSample("a", b) for b in "bcd"], model)
    with pytest.raises(NothingToAskError, match="no pair has a score above 0 and two different objects"):
        evaluator.evaluate([SimilarityPairSample("a", "a"), SimilarityPairSample("b", "c", 0.0)], model)
    with pytest.raises(NotFiniteError, match="NaN"):
        evaluator.evaluate([SimilarityGroupSample(torch.full((8,), torch.nan), 1), one, pair][:2], model)
    with pytest.raises(BatchError, match="a generator cannot be read by 2 workers"):
        Evaluator(RetrievalMAP(), num_workers=2).evaluate((x for x in [one]), model)


def test_a_sampler_of_the_other_kind_is_refused():
    samples, pairs = _grouped()[0], _paired()[0]
    with pytest.raises(ValueError, match="holds groups, and PairSampler samples pairs: give a GroupSampler"):
        Evaluator(RetrievalMAP(), PairSampler(5)).evaluate(samples, Model())
    with pytest.raises(ValueError, match="holds pairs, and GroupSampler samples groups: give a PairSampler"):
        Evaluator(RetrievalMAP(), GroupSampler(5)).evaluate(pairs, Model())
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"sample_size={size} asks nobody"):
            GroupSampler(size)
    with pytest.raises(ValueError, match="batch_size=0"):
        Evaluator(RetrievalMAP(), batch_size=0)


def test_a_model_that_gives_no_vectors_is_refused():
    class Flat(Model):
        def encode(self, inputs: list[Any], batch_size: int = 32, to_numpy: bool = True) -> Any:
            return torch.ones(len(inputs), 2, 2)

    with pytest.raises(BatchError, match=r"the model gives \[32, 2, 2\] for 32 objects"):
        Evaluator(RetrievalMAP()).evaluate(_grouped()[0], Flat())


# -- attached ----------------------------------------------------------------------------------------------------------


def test_an_attached_metric_is_the_metric_with_a_name_stages_and_how_it_is_logged():
    attached = AttachedMetric("P@3", RetrievalPrecision(k=3), prog_bar=True, sync_dist=True)
    assert attached.log_options == {"logger": True, "prog_bar": True, "sync_dist": True}
    assert (attached.k, attached.name, attached.on_step, attached.on_epoch) == (3, "P@3", False, True)
    attached.update(torch.eye(4)[[0, 0, 1, 1]], groups=torch.tensor([0, 0, 1, 1]))
    assert attached.update_count == 1
    assert float(attached.compute()) == pytest.approx(1 / 3)
    assert float(attached(torch.eye(4)[[0, 0, 1, 1]], groups=torch.tensor([0, 0, 1, 1]))) == pytest.approx(1 / 3)
    assert [attached.is_for(stage) for stage in ("train", "validation", "test")] == [True, True, False]
    assert AttachedMetric("x", RetrievalMAP(), stages=["test"]).is_for("test")
    assert AttachedMetric("x", RetrievalMAP(), stages="test").stages == ("test",)
    with pytest.raises(ValueError, match="there is no stage 'val': give some of 'train'"):
        AttachedMetric("x", RetrievalMAP(), stages=["val"])
    with pytest.raises(
        AttributeError, match="neither AttachedMetric 'P@3' nor its RetrievalPrecision has an attribute"
    ):
        attached.nothing  # noqa: B018
    with pytest.raises(ValueError, match="neither on_step nor on_epoch"):
        AttachedMetric("x", RetrievalMAP(), on_epoch=False)


def test_an_attached_metric_is_copied_and_pickled_as_what_it_is():
    attached = AttachedMetric("RP", RetrievalRPrecision(), on_step=True)
    attached.update(torch.eye(4)[[0, 0, 1, 1]], groups=torch.tensor([0, 0, 1, 1]))
    for other in (copy.deepcopy(attached), copy.copy(attached), pickle.loads(pickle.dumps(attached))):
        assert type(other) is AttachedMetric
        assert (other.name, other.on_step, float(other.compute())) == ("RP", True, 1.0)
    deep = copy.deepcopy(attached)
    deep.reset()
    assert attached.update_count == 1


def test_a_collection_can_be_attached():
    attached = AttachedMetric("all", MetricCollection({"one": RetrievalPrecision(1)}))  # pyright: ignore
    attached.update(torch.eye(4)[[0, 0, 1, 1]], groups=torch.tensor([0, 0, 1, 1]))
    assert float(attached.compute()["one"]) == 1.0


# -- how much it takes -------------------------------------------------------------------------------------------------

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "evaluation.py"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["groups of 5", "groups of 5,000", "pairs, left asks right", "pairs, all ask all"])
def test_20_000_objects_are_evaluated_within_2_gb_and_a_minute(case: str):
    ran = subprocess.run(
        [sys.executable, str(BENCHMARK), "--case", case], check=True, capture_output=True, text=True, timeout=600
    )
    found = json.loads(ran.stdout)
    assert found["objects"] == (40_000 if case.startswith("pairs") else 20_000)
    assert found["peak_megabytes"] < 1_000
    assert found["seconds"] < 180  # a minute on two cores of its own; here others may be at work
    assert 0.05 < found["figures"]["RR"] <= 1.0

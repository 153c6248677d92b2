"""Retrieval metrics, as functions and as torchmetrics: against plain Python loops, against torchmetrics' own functions,
and under what must not change them: the order of the objects, the size of a block, the number of processes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.functional.retrieval as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrecycle.errors import BatchError, RecycleError, RecycleWarning
from torchrecycle.similarity import metrics
from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.metrics import (
    AveragePrecision,
    Groups,
    Measure,
    NotFiniteError,
    NothingToAskError,
    Pairs,
    Precision,
    Recall,
    ReciprocalRank,
    RPrecision,
    measure,
)
from torchrecycle.similarity.retrieval import (
    RetrievalMAP,
    RetrievalMetric,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalReciprocalRank,
    RetrievalRPrecision,
)

ALL: dict[str, Measure] = {
    "P@1": Precision(1),
    "P@3": Precision(3),
    "R@3": Recall(3),
    "RR": ReciprocalRank(),
    "RP": RPrecision(),
    "AP": AveragePrecision(),
}

CLASSES: dict[str, Callable[..., RetrievalMetric]] = {
    "P@1": RetrievalPrecision,
    "P@3": lambda *a, **k: RetrievalPrecision(3, *a, **k),
    "R@3": lambda *a, **k: RetrievalRecall(3, *a, **k),
    "RR": RetrievalReciprocalRank,
    "RP": RetrievalRPrecision,
    "AP": RetrievalMAP,
}


def _noise(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the same in plain Python ------------------------------------------------------------------------------------------


def _near(distance: Distance, a: list[float], b: list[float]) -> float:
    if distance is Distance.MANHATTAN:
        return -sum(abs(x - y) for x, y in zip(a, b, strict=True))
    if distance is Distance.EUCLIDEAN:
        return -math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if distance is Distance.DOT_PRODUCT:
        return dot
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / lengths if lengths else 0.0


Right = Callable[[int, int], bool | None]
"""Whether an object is right for another; None where it is not ranked."""


def _in_a_loop(
    embeddings: Tensor, right: Right, distance: Distance = Distance.COSINE, tie: float = 1e-9
) -> dict[str, list[float]]:
    rows = embeddings.tolist()
    figures: dict[str, list[float]] = {name: [] for name in ALL}
    for i, one in enumerate(rows):
        ranked = [(j, told) for j in range(len(rows)) if (told := right(i, j)) is not None]
        ranked.sort(key=lambda it: (-_near(distance, one, rows[it[0]]) + (tie if it[1] else -tie), it[1]))
        hits = [told for _, told in ranked]
        if not any(hits) or all(hits):
            for each in figures.values():
                each.append(math.nan)
            continue
        relatives = sum(hits)
        figures["P@1"].append(sum(hits[:1]) / 1)
        figures["P@3"].append(sum(hits[:3]) / 3)
        figures["R@3"].append(sum(hits[:3]) / relatives)
        figures["RR"].append(1 / (hits.index(True) + 1))
        figures["RP"].append(sum(hits[:relatives]) / relatives)
        places = [place for place, hit in enumerate(hits, start=1) if hit]
        figures["AP"].append(sum(n / place for n, place in enumerate(places, start=1)) / relatives)
    return figures


def _by_groups(groups: list[int]) -> Right:
    return lambda i, j: None if i == j else groups[i] == groups[j]


def _by_pairs(
    pairs: list[tuple[int, int]],
    scores: list[float] | None = None,
    subgroups: list[int] | None = None,
    distinguish: bool = False,
) -> Right:
    """What the top of the module says, word by word."""
    scores = scores or [1.0] * len(pairs)
    subgroups = subgroups or [0] * len(pairs)
    left, right = {a for a, _ in pairs}, {b for _, b in pairs}
    asks, ranked = (left, right) if distinguish else (left | right, left | right)
    several = len(set(subgroups)) > 1

    def told(i: int, j: int) -> bool | None:
        if i == j or i not in asks or j not in ranked:
            return None
        shared = [
            score
            for (a, b), score in zip(pairs, scores, strict=True)
            if (a, b) == (i, j) or (not distinguish and (b, a) == (i, j))
        ]
        if shared:
            return max(shared) > 0
        mine = {s for (a, b), s in zip(pairs, subgroups, strict=True) if i == a or (not distinguish and i == b)}
        its = {s for (a, b), s in zip(pairs, subgroups, strict=True) if j == b or (not distinguish and j == a)}
        return None if several and mine & its else False

    return told


def _agree(found: dict[str, Tensor], expected: dict[str, list[float]], within: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert each.tolist() == pytest.approx(expected[name], abs=within, nan_ok=True), name


# -- groups ------------------------------------------------------------------------------------------------------------


def _clumps(objects: int = 60, groups: int = 9, noise: float = 0.8) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, groups, (objects,), generator=torch.Generator().manual_seed(1))
    labels[0] = 77  # has no relative
    return _noise(78, 6, 2)[labels] + noise * _noise(objects, 6, 3), labels


@pytest.mark.parametrize("distance", list(Distance))
@pytest.mark.parametrize("block", [1, 7, None])
def test_all_figures_of_groups_equal_a_loop_for_each_distance_and_any_block(distance: Distance, block: int | None):
    embeddings, labels = _clumps()
    expected = _in_a_loop(embeddings, _by_groups(labels.tolist()), distance)
    assert 0.3 < sum(expected["AP"][1:]) / 59 < 0.9
    found = measure(embeddings, labels, ALL, distance=distance, block=block)
    assert all(each[0].isnan() and not each[1:].isnan().any() for each in found.values())
    _agree(found, expected)


@pytest.mark.parametrize("name", ALL)
def test_each_figure_equals_that_of_torchmetrics(name: str):
    embeddings, labels = _clumps()
    theirs_of = {
        "P@1": lambda p, t: theirs.retrieval_precision(p, t, top_k=1),
        "P@3": lambda p, t: theirs.retrieval_precision(p, t, top_k=3),
        "R@3": lambda p, t: theirs.retrieval_recall(p, t, top_k=3),
        "RR": theirs.retrieval_reciprocal_rank,
        "RP": theirs.retrieval_r_precision,
        "AP": theirs.retrieval_average_precision,
    }
    found = measure(embeddings, labels, {name: ALL[name]})[name]
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    for i in range(1, len(labels)):
        others = torch.arange(len(labels)) != i
        likeness = (1 + cosines[i, others]) / 2  # they leave out what is 0 or less
        expected = theirs_of[name](likeness, labels[others] == labels[i])
        assert float(found[i]) == pytest.approx(float(expected), abs=1e-6)


def test_functions_of_one_figure_are_those_of_the_common_pass():
    embeddings, labels = _clumps()
    found = measure(embeddings, labels, ALL)
    single = {
        "P@1": metrics.precision_of_each(embeddings, labels),
        "P@3": metrics.precision_of_each(embeddings, labels, 3),
        "R@3": metrics.recall_of_each(embeddings, labels, 3),
        "RR": metrics.reciprocal_rank_of_each(embeddings, labels),
        "RP": metrics.r_precision_of_each(embeddings, labels),
        "AP": metrics.average_precision_of_each(embeddings, labels),
    }
    means = {
        "P@1": metrics.precision(embeddings, labels),
        "P@3": metrics.precision(embeddings, labels, 3),
        "R@3": metrics.recall(embeddings, labels, 3),
        "RR": metrics.reciprocal_rank(embeddings, labels),
        "RP": metrics.r_precision(embeddings, labels),
        "AP": metrics.mean_average_precision(embeddings, labels),
    }
    assert len({round(mean, 6) for mean in means.values()}) == 6
    for name, each in found.items():
        assert torch.equal(each[1:], single[name][1:])
        assert means[name] == float(each.nanmean())


def test_the_example_at_the_top_of_the_module():
    at = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 2.0])  # angles: the relatives of the first come first and fourth
    embeddings = torch.stack([at.cos(), at.sin()], dim=1)
    groups = torch.tensor([1, 1, 0, 0, 1, 0])
    measures: dict[str, Measure] = {
        "P@3": Precision(3),
        "R@3": Recall(3),
        "RR": ReciprocalRank(),
        "RP": RPrecision(),
        "AP": AveragePrecision(),
    }
    first = {name: float(each[0]) for name, each in measure(embeddings, groups, measures).items()}
    assert first == pytest.approx({"P@3": 1 / 3, "R@3": 1 / 2, "RR": 1.0, "RP": 1 / 2, "AP": 3 / 4})


def test_a_k_beyond_all_candidates_finds_everything_and_is_no_error():
    embeddings, labels = _clumps(20, 4)
    assert metrics.recall(embeddings, labels, 500) == 1.0
    relatives = torch.tensor([(labels == one).sum() - 1 for one in labels])[1:]
    assert torch.equal(metrics.precision_of_each(embeddings, labels, 500)[1:], relatives.double() / 500)


def test_only_the_queries_given_are_asked_and_among_all_objects():
    embeddings, labels = _clumps()
    everything = measure(embeddings, labels, ALL)
    some = torch.tensor([0, 3, 31])
    for name, each in measure(embeddings, labels, ALL, queries=some).items():
        torch.testing.assert_close(each[some[1:]], everything[name][some[1:]])
        assert each.isnan().sum() == 58
    with pytest.raises(NothingToAskError, match="none of the 1 queries"):
        measure(embeddings, labels, ALL, queries=some[:1])


# -- pairs -------------------------------------------------------------------------------------------------------------

CAKES = [(0, 3), (0, 4), (1, 5), (2, 5), (2, 6), (7, 8)]
SCORES = [1.0, 0.8, 1.0, 0.5, 0.0, 1.0]
SUBGROUPS = [10, 10, 11, 11, 11, 0]


@pytest.mark.parametrize("distinguish", [False, True])
@pytest.mark.parametrize("scores", [None, SCORES])
@pytest.mark.parametrize("subgroups", [None, SUBGROUPS])
@pytest.mark.parametrize("block", [1, None])
def test_all_figures_of_pairs_equal_a_loop(
    distinguish: bool, scores: list[float] | None, subgroups: list[int] | None, block: int | None
):
    embeddings = _noise(9, 4, 4)
    relevance = Pairs(
        torch.tensor(CAKES),
        None if scores is None else torch.tensor(scores),
        None if subgroups is None else torch.tensor(subgroups, dtype=torch.float32),
        distinguish,
    )
    expected = _in_a_loop(embeddings, _by_pairs(CAKES, scores, subgroups, distinguish))
    _agree(measure(embeddings, relevance, ALL, block=block), expected)


def test_subgroups_and_scores_change_what_is_ranked():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4], [0.0, 1.0]])
    pairs = torch.tensor([[0, 3], [1, 4], [2, 5]])  # 1 and 2 lie between 0 and its partner, and 2 is no partner of 1
    apart = metrics.reciprocal_rank_of_each(embeddings, Pairs(pairs))
    alike = metrics.reciprocal_rank_of_each(embeddings, Pairs(pairs, subgroups=torch.tensor([7, 7, 8])))
    wrong = Pairs(torch.cat([pairs, torch.tensor([[0, 1]])]), torch.tensor([1.0, 1, 1, 0]), torch.tensor([7, 7, 8, 7]))
    called = metrics.reciprocal_rank_of_each(embeddings, wrong)
    assert float(apart[0]) == pytest.approx(1 / 3)
    assert float(alike[0]) == pytest.approx(1 / 2)
    assert float(called[0]) == pytest.approx(1 / 3)


def test_with_distinguish_right_objects_neither_ask_nor_compete_with_left_ones():
    questions, answers = torch.eye(3), torch.eye(3) + 0.1
    embeddings = torch.cat([questions, answers])
    pairs = Pairs.side_by_side(3, distinguish=True)
    each = metrics.precision_of_each(embeddings, pairs)
    assert each[:3].tolist() == [1.0, 1.0, 1.0]
    assert each[3:].isnan().all()


def test_pair_ranks_are_those_of_a_question_among_all_answers():
    queries = _noise(40, 5, 5)
    answers = queries + 0.7 * _noise(40, 5, 6)
    expected = _in_a_loop(torch.cat([queries, answers]), _by_pairs([(i, i + 40) for i in range(40)], distinguish=True))
    ranks = metrics.pair_ranks(queries, answers, block=9)
    assert ranks.dtype == torch.long
    assert (1 / ranks.double()).tolist() == pytest.approx(expected["RR"][:40], abs=1e-12)
    assert ranks.max() > 2


# -- Hypothesis: any data, with many ties ------------------------------------------------------------------------------


@st.composite
def _grouped(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    count, dim = draw(st.integers(2, 14)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.integers(-2, 2), min_size=dim, max_size=dim), min_size=count, max_size=count))
    return torch.tensor(rows), draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))


@st.composite
def _paired(draw: st.DrawFn) -> tuple[Tensor, Pairs, Right]:
    objects, count = draw(st.integers(2, 10)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=objects, max_size=objects))
    position = st.integers(0, objects - 1)
    pairs = draw(st.lists(st.tuples(position, position), min_size=count, max_size=count))
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count, max_size=count))
    subgroups = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    distinguish = draw(st.booleans())
    relevance = Pairs(torch.tensor(pairs), torch.tensor(scores), torch.tensor(subgroups), distinguish)
    return torch.tensor(rows), relevance, _by_pairs(pairs, scores, subgroups, distinguish)


@settings(max_examples=150, deadline=None)
@given(_grouped(), st.sampled_from(list(Distance)), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_groups_equal_a_loop_in_which_ties_count_against(
    case: tuple[Tensor, list[int]], distance: Distance, dtype: torch.dtype
):
    rows, groups = case
    expected = _in_a_loop(rows, _by_groups(groups), distance)
    if all(map(math.isnan, expected["RR"])):
        with pytest.raises(NothingToAskError, match="nothing to"):
            measure(rows.to(dtype), torch.tensor(groups), ALL, distance=distance)
        return
    found = measure(rows.to(dtype), torch.tensor(groups), ALL, distance=distance)
    _agree(found, expected)
    assert all(((each >= 0) & (each <= 1) | each.isnan()).all() for each in found.values())


@settings(max_examples=200, deadline=None)
@given(_paired(), st.sampled_from([torch.float32, torch.float64]))
def test_any_pairs_equal_a_loop_in_which_ties_count_against(case: tuple[Tensor, Pairs, Right], dtype: torch.dtype):
    rows, relevance, right = case
    expected = _in_a_loop(rows, right)
    if all(map(math.isnan, expected["RR"])):
        with pytest.raises(NothingToAskError, match="nothing to"):
            measure(rows.to(dtype), relevance, ALL)
        return
    _agree(measure(rows.to(dtype), relevance, ALL), expected)


@settings(max_examples=60, deadline=None)
@given(_grouped(), st.sampled_from(list(Distance)), st.randoms(use_true_random=False))
def test_the_order_of_the_objects_changes_nothing(case: tuple[Tensor, list[int]], distance: Distance, random: Any):
    rows, groups = case
    order = list(range(len(rows)))
    random.shuffle(order)
    labels = torch.tensor(groups)
    try:
        before = measure(rows.float(), labels, ALL, distance=distance)
    except NothingToAskError:
        return
    after = measure(rows.float()[order], labels[order], ALL, distance=distance)
    for name in ALL:
        torch.testing.assert_close(before[name][order], after[name], equal_nan=True)


# -- ties and rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", list(Distance))
@pytest.mark.parametrize("dim", [3, 384])
def test_an_encoder_that_gives_one_embedding_for_everything_scores_as_badly_as_it_is(distance: Distance, dim: int):
    one = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim))
    many = 1_003 if distance in (Distance.COSINE, Distance.DOT_PRODUCT) else 403  # the odd ones come out otherwise
    for objects, block in ((30, None), (many, 7), (many, 64)):
        same = one.expand(objects, dim)
        labels = torch.arange(objects) // 3  # of 1,003 or 403, the last is alone
        found = measure(same, labels, ALL, distance=distance, block=block)
        assert found["P@3"].nanmean() == found["RP"].nanmean() == 0.0
        assert found["RR"].nan_to_num(0).unique().tolist()[-1] == 1 / (objects - 2)
        sides = measure(torch.cat([same, same]), Pairs.side_by_side(objects), ALL, distance=distance, block=block)
        assert sides["RR"].max() == 1 / (2 * objects - 1)
        assert metrics.pair_ranks(same, same, distance=distance, block=block).unique().tolist() == [objects]


def test_cosines_of_equal_rows_differ_by_no_more_than_the_rounding_that_is_reckoned_with():
    one = torch.nn.functional.normalize(torch.randn(1, 384, generator=torch.Generator().manual_seed(384)), dim=1)
    same = one.expand(1_003, 384).contiguous()
    spread = max(float((same[:rows] @ same.T).sub(1).abs().max()) for rows in (1, 7, 64, 1_003))
    assert spread < 384**0.5 * torch.finfo(torch.float32).eps


def test_single_precision_gives_the_figures_of_double_precision_on_data_without_ties():
    labels = torch.randint(0, 300, (1_500,), generator=torch.Generator().manual_seed(7))
    embeddings = _noise(300, 64, 8)[labels] + 1.5 * _noise(1_500, 64, 9)
    exact, found = measure(embeddings, labels, ALL), measure(embeddings.float(), labels, ALL)
    for name in ALL:
        assert float(found[name].nanmean()) == pytest.approx(float(exact[name].nanmean()), abs=2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_cosines_do_not_depend_on_the_length_of_embeddings(scale: float):
    embeddings, labels = _clumps()
    embeddings = embeddings.float()
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(10)) + 0.5
    before, after = (measure(each, labels, ALL) for each in (embeddings, scale * lengths * embeddings))
    for name in ALL:
        assert torch.equal(before[name].nan_to_num(9), after[name].nan_to_num(9))


def test_an_autocast_around_it_changes_nothing_and_neither_does_inference_mode():
    labels = torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(11))
    embeddings = (_noise(60, 32, 12)[labels] + _noise(400, 32, 13)).float().requires_grad_()
    before = metrics.average_precision_of_each(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(metrics.average_precision_of_each(embeddings, labels), before)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert torch.equal(metrics.average_precision_of_each(embeddings + 0, labels), before)
    assert not before.requires_grad


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_asked_it_is_said_why():
    rows = torch.eye(4)
    for relevance, words in (
        (torch.arange(4), "each of the 4 objects is the only one of its group"),
        (torch.zeros(4, dtype=torch.long), "all 4 objects are of one group"),
        (Pairs(torch.empty(0, 2, dtype=torch.long)), "no pair has a score above 0"),
        (Pairs(torch.tensor([[0, 1], [2, 3]]), torch.zeros(2)), "no pair has a score above 0"),
        (Pairs(torch.tensor([[0, 0], [2, 2]])), "two different objects"),
        (Pairs(torch.tensor([[0, 1]])), "none is a negative of anybody"),
        (Pairs(torch.tensor([[0, 1], [0, 2], [0, 3]]), distinguish=True), "none is a negative of anybody"),
    ):
        with pytest.raises(NothingToAskError, match=words) as caught:
            measure(rows, relevance, ALL)
        assert isinstance(caught.value, RecycleError)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(NothingToAskError, match="no objects at all"):
        measure(torch.empty(0, 4), torch.empty(0, dtype=torch.long), ALL)


def test_what_does_not_fit_is_refused_in_words():
    rows = torch.eye(4)
    for relevance, words in (
        (torch.arange(3), r"4 embeddings and groups of the shape \[3\]"),
        (torch.rand(4), "groups are whole numbers, and these are torch.float32"),
        (Pairs(torch.rand(2, 2)), "pairs are whole numbers"),
        (Pairs(torch.arange(4)), r"of the shape \[pairs, 2\], and these of \[4\]"),
        (Pairs(torch.tensor([[0, 4]])), "from 0 to 3 among the embeddings, and these reach from 0 to 4"),
        (Pairs(torch.tensor([[-1, 2]])), "reach from -1 to 2"),
        (Pairs(torch.tensor([[0, 1]]), torch.ones(2)), "each pair needs a score: came 1 pairs"),
        (Pairs(torch.tensor([[0, 1]]), subgroups=torch.ones(3)), "each pair needs a subgroup: came 1 pairs"),
        (Pairs(torch.tensor([[0, 1]]), torch.tensor([math.nan])), "NaN as its score"),
    ):
        with pytest.raises(ValueError, match=words):
            measure(rows, relevance, ALL)
    with pytest.raises(ValueError, match=r"\[objects, dim\], and these of \[4\]"):
        measure(torch.ones(4), torch.tensor([0, 0, 1, 1]), ALL)
    for k in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="1 or more: came"):
            Precision(k)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float):
    rows = torch.eye(4)
    rows[2, 1] = bad
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        measure(rows, torch.tensor([0, 0, 1, 1]), ALL)
    with pytest.raises(NotFiniteError, match="distances overflow"):
        measure(1e30 * torch.eye(4), torch.tensor([0, 0, 1, 1]), ALL, distance=Distance.DOT_PRODUCT)


# -- as torchmetrics ---------------------------------------------------------------------------------------------------


def _batches_of_pairs(
    embeddings: Tensor, sizes: list[int], subgroups: Tensor
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """As a loader gives them: each batch counts its pairs from 0, left objects before right ones."""
    left, right = embeddings.chunk(2)
    batches = []
    for rows in torch.arange(len(left)).split(sizes):
        first = torch.arange(len(rows))
        targets = {
            "pairs": torch.stack([first, first + len(rows)], dim=1),
            "labels": torch.ones(len(rows)),
            "subgroups": subgroups[rows].repeat(2),
        }
        batches.append((torch.cat([left[rows], right[rows]]), targets))
    return batches


@pytest.mark.parametrize("name", CLASSES)
def test_a_metric_over_batches_of_groups_is_the_figure_of_all_objects_together(name: str):
    embeddings, labels = _clumps()
    embeddings = embeddings.float()
    metric = CLASSES[name]()
    for rows in torch.arange(60).split([7, 30, 23]):
        metric.update(embeddings[rows], groups=labels[rows])
    expected = float(measure(embeddings, labels, {name: ALL[name]})[name].nanmean())
    assert metric.compute().shape == ()
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("distinguish", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_a_metric_over_batches_of_pairs_is_the_figure_of_all_pairs_together(name: str, distinguish: bool):
    left = _noise(30, 5, 14).float()
    embeddings = torch.cat([left, left + 0.9 * _noise(30, 5, 15).float()])
    subgroups = torch.arange(30) // 3
    metric = CLASSES[name](distinguish=distinguish)
    for batch, targets in _batches_of_pairs(embeddings, [11, 4, 15], subgroups):
        metric.update(batch, **targets)
    pairs = Pairs(Pairs.side_by_side(30).pairs, subgroups=subgroups, distinguish=distinguish)
    expected = float(measure(embeddings, pairs, {name: ALL[name]})[name].nanmean())
    assert 0.1 < expected < 0.95
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-7)


def test_subgroups_may_be_floats_or_integers_too_large_for_single_precision():
    left = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    pairs = Pairs.side_by_side(3).pairs
    for subgroups in (torch.tensor([2**60, 2**60 + 1, 2**60 + 2]), torch.tensor([0.5, 0.25, 3.0])):
        metric = RetrievalReciprocalRank(reduce_func=None)
        metric.update(torch.cat([left, left]), pairs=pairs, labels=torch.ones(3), subgroups=subgroups)
        assert metric.compute().tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_calling_a_metric_gives_the_figure_of_the_batch_and_keeps_it_for_the_epoch():
    embeddings, labels = _clumps()
    metric = RetrievalMAP()
    for rows in torch.arange(60).split(30):
        of_batch = metric(embeddings[rows], groups=labels[rows])
        assert float(of_batch) == pytest.approx(
            metrics.mean_average_precision(embeddings[rows].float(), labels[rows]), abs=1e-6
        )
    expected = metrics.mean_average_precision(embeddings.float(), labels)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    metric.reset()
    metric.update(embeddings[:30], groups=labels[:30])
    assert float(metric.compute()) == pytest.approx(
        metrics.mean_average_precision(embeddings[:30].float(), labels[:30]), abs=1e-6
    )


def test_a_batch_with_nothing_to_ask_is_nan_with_one_warning_and_the_epoch_still_counts_it():
    metric = RetrievalPrecision()
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    with pytest.warns(RecycleWarning, match="RetrievalPrecision of one batch is NaN: nothing to ask: each of the 2"):
        assert metric(rows[:2], groups=torch.tensor([0, 1])).isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric(rows[2:], groups=torch.tensor([0, 1])).isnan()
    assert float(metric.compute()) == 1.0


def test_an_epoch_with_nothing_to_ask_is_an_error():
    metric = RetrievalRPrecision()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(NothingToAskError, match="no batch"):
        metric.compute()
    metric.update(torch.eye(3), groups=torch.arange(3))
    with pytest.raises(NothingToAskError, match="only one of its group"):
        metric.compute()
    metric.update(torch.eye(3), groups=torch.arange(3))
    assert float(metric.compute()) == 1.0


def test_groups_and_pairs_in_one_metric_are_refused_until_it_is_reset():
    metric = RetrievalRPrecision()
    pairs = {"pairs": Pairs.side_by_side(2).pairs, "labels": torch.ones(2)}
    metric.update(torch.eye(4), groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(BatchError, match="holds groups, and pairs came: take one metric for each"):
        metric.update(torch.eye(4), **pairs)
    metric.reset()
    metric.update(torch.eye(4), **pairs)
    with pytest.raises(BatchError, match="holds pairs, and groups came"):
        metric.update(torch.eye(4), groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(BatchError, match="and both came"):
        metric.update(torch.eye(4), groups=torch.tensor([0, 0, 1, 1]), **pairs)
    with pytest.raises(BatchError, match="and neither came"):
        metric.update(torch.eye(4))


def test_bad_batches_are_refused_when_they_come():
    metric = RetrievalRPrecision()
    with pytest.raises(BatchError, match="each embedding needs a group"):
        metric.update(torch.eye(4), groups=torch.tensor([0, 0, 1]))
    with pytest.raises(BatchError, match="the same twice, and these differ"):
        metric.update(torch.eye(4), pairs=Pairs.side_by_side(2).pairs, subgroups=torch.tensor([1, 2, 2, 1]))
    metric.update(torch.eye(4), groups=torch.tensor([0, 0, 1, 1]))
    metric.update(torch.eye(5), groups=torch.tensor([0, 0, 1, 1, 1]))
    with pytest.raises(BatchError, match=r"embeddings of \[4, 5\] numbers"):
        metric.compute()
    metric.reset()
    metric.update(torch.full((4, 2), math.nan), groups=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(NotFiniteError, match="NaN"):
        metric.compute()


def test_a_metric_holds_no_graph_and_no_view_of_the_embeddings_that_it_saw():
    layer = torch.nn.Linear(4, 3)
    metric = RetrievalRPrecision(compute_on_cpu=True)
    embeddings = layer(torch.eye(4))
    metric(embeddings, groups=torch.tensor([0, 0, 1, 1]))
    assert all(not state.requires_grad and state.device.type == "cpu" for state in metric.embeddings)
    assert float(metric.compute()) == float(metric.compute())
    assert layer.weight.grad is None


def test_metrics_pickle_copy_and_share_states_in_a_collection():
    from torchmetrics import MetricCollection

    embeddings, labels = _clumps()
    both: dict[str, Any] = {"one": RetrievalPrecision(1), "five": RetrievalPrecision(5)}
    collection = MetricCollection(both)
    for rows in torch.arange(60).split(20):
        collection.update(embeddings[rows], groups=labels[rows])
    found = collection.compute()
    for name, k in (("one", 1), ("five", 5)):
        assert float(found[name]) == pytest.approx(metrics.precision(embeddings.float(), labels, k), abs=1e-6)
    metric = pickle.loads(pickle.dumps(copy.deepcopy(both["five"])))
    assert metric.k == 5
    assert metric.distance_metric_name is Distance.COSINE


def test_another_distance_and_another_reduction_are_used():
    embeddings = torch.tensor([[1.0, 0.0], [9.0, 1.0], [1.0, 0.3], [2.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 1])
    for distance in (Distance.COSINE, Distance.EUCLIDEAN, "euclidean"):
        metric = RetrievalPrecision(1, distance, reduce_func=None)  # pyright: ignore[reportArgumentType]
        metric.update(embeddings, groups=labels)
        expected = [1.0, 1.0, 0.0, 1.0] if distance is Distance.COSINE else [0.0, 0.0, 0.0, 1.0]
        assert metric.compute().tolist() == expected
    worst = RetrievalPrecision(reduce_func=torch.min)
    worst.update(embeddings, groups=labels)
    assert float(worst.compute()) == 0.0


def test_double_precision_is_kept_if_it_is_asked_for():
    close = torch.tensor([[1.0, 0.0], [1.0, 1e-5], [1.0, -1.1e-5], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    for dtype, expected in ((torch.float32, 0.0), (torch.float64, 1.0)):
        metric = RetrievalPrecision(reduce_func=None)
        metric.set_dtype(dtype)
        metric.update(close, groups=labels)
        assert float(metric.compute()[0]) == expected  # in single precision, the two cosines are a tie


# -- several processes -------------------------------------------------------------------------------------------------


def _one_process(rank: int, root: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    embeddings, labels = _clumps()
    found: dict[str, Any] = {}
    grouped = RetrievalMAP()
    for rows in (torch.arange(0, 7), torch.arange(7, 20)) if rank == 0 else (torch.arange(20, 60),):
        grouped.update(embeddings[rows], groups=labels[rows])
    found["groups"] = float(grouped.compute())
    grouped.update(embeddings[:0], groups=labels[:0])  # what was gathered is put back: the next figure is the same
    found["again"] = float(grouped.compute())
    paired, subgroups = RetrievalReciprocalRank(), torch.arange(30) // 3
    for batch, targets in _batches_of_pairs(embeddings.float(), [11, 4, 15], subgroups)[rank::2]:
        paired.update(batch, **targets)
    found["pairs"] = float(paired.compute())
    lonely = RetrievalMAP()
    if rank == 1:
        lonely.update(embeddings, groups=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics: compute before update
        found["lonely"] = float(lonely.compute())
    mixed = RetrievalMAP()
    if rank == 1:
        mixed.update(embeddings, groups=labels)
    else:
        mixed.update(embeddings, pairs=Pairs.side_by_side(30).pairs)
    try:
        mixed.compute()
    except BatchError as error:
        found["mixed"] = str(error)
    torch.save(found, Path(root) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_get_the_figure_of_one_also_where_one_of_them_saw_nothing(tmp_path: Path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    embeddings, labels = _clumps()
    grouped = metrics.mean_average_precision(embeddings.float(), labels)
    pairs = Pairs(Pairs.side_by_side(30).pairs, subgroups=torch.arange(30) // 3)
    paired = metrics.reciprocal_rank(embeddings.float(), pairs)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["groups"] == pytest.approx(grouped, abs=1e-6)
        assert found["again"] == found["groups"]
        assert found["pairs"] == pytest.approx(paired, abs=1e-6)
        assert found["lonely"] == pytest.approx(grouped, abs=1e-6)
        assert "one process holds groups and another pairs" in found["mixed"]


def test_the_example_of_measure_runs():
    import doctest

    failed, tried = doctest.testmod(metrics)
    assert (failed, tried > 1) == (0, True)


def test_groups_and_a_tensor_of_group_numbers_are_the_same():
    embeddings, labels = _clumps()
    assert metrics.r_precision(embeddings, Groups(labels)) == metrics.r_precision(embeddings, labels)
    assert metrics.askable(labels, 60).tolist() == list(range(1, 60))

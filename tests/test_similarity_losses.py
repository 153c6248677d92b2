"""Each loss against the same thing in plain Python loops, its gradient too, and against the library it comes from.

The loops take one pair of rows at a time, in float64. Where embeddings are equal, two objects may be equally hard and
the gradient depends on which is taken, so that there it need only be finite and of usual size.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances as library_distances
from pytorch_metric_learning import losses as library_losses
from pytorch_metric_learning import miners as library_miners
from pytorch_metric_learning import reducers as library_reducers
from torch import Tensor, nn

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.distances import Distance, DistanceError, unit
from torchrecycle.similarity.losses import (
    ArcFaceLoss,
    CenterLoss,
    CircleLoss,
    ContrastiveLoss,
    CosFaceLoss,
    CosineSoftmax,
    FastAPLoss,
    GroupLoss,
    LossError,
    LossTargetsError,
    MultipleNegativesRanking,
    MultipleNegativesRankingLoss,
    OnlineContrastiveLoss,
    PairwiseLoss,
    PytorchMetricLearningPairWrapper,
    PytorchMetricLearningWrapper,
    SimilarityLoss,
    SoftmaxLoss,
    TripletLoss,
    XbmError,
    base,
)
from torchrecycle.similarity.losses.mining import masks
from torchrecycle.similarity.losses.triplet import _hard


def _random(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _groups(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# -- distances, one pair of rows at a time -----------------------------------------------------------------------------


def _length(row: Tensor) -> Tensor:
    """The root has no gradient at 0."""
    return row.square().sum().sqrt() if bool(row.any()) else row.sum() * 0


def _direction(row: Tensor) -> Tensor:
    return row / _length(row) if bool(row.any()) else row


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (_direction(a) * _direction(b)).sum()


DISTANCE: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    Distance.EUCLIDEAN: lambda a, b: _length(a - b),
    Distance.MANHATTAN: lambda a, b: (a - b).abs().sum(),
    Distance.COSINE: lambda a, b: (1 - _cosine(a, b)) / 2,
    Distance.DOT_PRODUCT: lambda a, b: -(a * b).sum(),
}
"""Distances as they are in a matrix."""


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).mean() if values else (like * 0).sum()


def _matrix(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([torch.stack([measure(a, b) for b in y]) for a in x])


@pytest.mark.parametrize("distance", list(Distance))
def test_a_distance_matrix_equals_a_loop_with_its_gradient(distance: Distance):
    for others in (None, _random(4, 5, seed=2)):
        x = _random(6, 5, seed=1).requires_grad_()
        again = x.detach().clone().requires_grad_()
        found = distance.distance_matrix(x, others)
        expected = _matrix(DISTANCE[distance], again, again if others is None else others)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        weights = _random(*found.shape, seed=3)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", list(Distance))
def test_row_by_row_is_the_diagonal_and_cosines_are_there_as_they_are(distance: Distance):
    x, y = _random(5, 7, seed=1), _random(5, 7, seed=2)
    apart, alike = distance.distance_matrix(x, y).diagonal(), distance.similarity_matrix(x, y).diagonal()
    if distance is Distance.COSINE:
        apart, alike = 2 * apart, 2 * alike - 1
    torch.testing.assert_close(distance.distance(x, y), apart)
    torch.testing.assert_close(distance.similarity(x, y), alike)
    order = distance.distance_matrix(x, y).flatten().argsort()
    assert torch.equal(order, distance.similarity_matrix(x, y).flatten().argsort(descending=True))


def test_the_table_of_the_module_is_true():
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    table = {"euclidean": (1.414, 0.414), "manhattan": (2, 0.333), "dot_product": (-24, 24), "cosine": (0.04, 0.96)}
    for name, (apart, alike) in table.items():
        measure = Distance.get_by_name(name)
        assert measure.distance(x, y).item() == pytest.approx(apart, abs=1e-3)
        assert measure.similarity(x, y).item() == pytest.approx(alike, abs=1e-3)
    assert Distance.COSINE.distance_matrix(x, y).item() == pytest.approx(0.02)
    assert Distance.COSINE.similarity_matrix(x, y).item() == pytest.approx(0.98)


@pytest.mark.parametrize("distance", list(Distance))
@pytest.mark.parametrize("rows", [3, 40])
def test_equal_vectors_and_vectors_without_length_have_a_usual_gradient(distance: Distance, rows: int):
    for x in (torch.zeros(rows, 4), torch.ones(rows, 4), torch.cat([torch.zeros(1, 4), torch.ones(rows - 1, 4)])):
        x = x.requires_grad_()
        total = distance.distance_matrix(x).sum() + distance.similarity_matrix(x).sum()
        (total + distance.distance(x, x.flip(0)).sum() + distance.similarity(x, x.flip(0)).sum()).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 1000


def test_unit_is_normalize_to_the_bit_but_for_the_gradient_of_zeros():
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 50)[:, None]
    for dim in (0, 1):
        assert torch.equal(unit(x, dim), F.normalize(x, dim=dim))
    zero = torch.zeros(1, 3, requires_grad=True)
    unit(zero).sum().backward()
    assert torch.equal(zero.grad, torch.ones(1, 3))  # pyright: ignore[reportArgumentType]


def test_half_precision_has_distances_too():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for distance in Distance:
        assert distance.distance_matrix(x).dtype == torch.bfloat16


def test_a_distance_is_its_name_and_a_wrong_name_is_told_the_right_ones():
    assert Distance.get_by_name("cosine") is Distance.COSINE
    assert Distance.get_by_name(Distance.MANHATTAN) is Distance.MANHATTAN
    assert json.dumps(Distance.DOT_PRODUCT) == '"dot_product"'
    with pytest.raises(DistanceError, match=r"'cosin'.*'euclidean', 'cosine', 'dot_product', 'manhattan'"):
        Distance.get_by_name("cosin")
    with pytest.raises(ValueError, match="no distance"):
        TripletLoss(distance_metric_name="l2")


def test_vectors_that_do_not_go_together_are_refused_and_not_broadcast():
    with pytest.raises(DistanceError, match=r"\[5, 3\] and \[1, 3\]"):
        Distance.COSINE.distance(torch.ones(5, 3), torch.ones(1, 3))
    for distance in Distance:
        with pytest.raises(DistanceError, match=r"\[5, 3\] and \[5, 4\]"):
            distance.distance_matrix(torch.ones(5, 3), torch.ones(5, 4))
        with pytest.raises(DistanceError, match=r"\[3\]"):
            distance.similarity_matrix(torch.ones(3))


# -- batches -----------------------------------------------------------------------------------------------------------

BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "random": (_random(11, 6, seed=1), _groups(0, 1, 0, 2, 1, 0, 3, 2, 2, 0, 1)),  # 3 is alone in its group
    "balanced": (_random(9, 6, seed=2), _groups(*(i // 3 for i in range(9)))),
    "far from one": (50 * _random(9, 4, seed=3), _groups(0, 1, 2).repeat(3)),
    "all of one group": (_random(5, 3, seed=4), _groups(1, 1, 1, 1, 1)),
    "each group once": (_random(4, 3, seed=5), _groups(3, 2, 0, 1)),
    "two of a group": (_random(2, 3, seed=6), _groups(2, 2)),
    "two of two groups": (_random(2, 3, seed=7), _groups(0, 3)),
    "one object": (_random(1, 3, seed=8), _groups(1)),
    "two without a length": (
        torch.cat([_random(6, 3, seed=9), torch.zeros(2, 3)]).double(),
        _groups(0, 0, 1, 1, 2, 2, 0, 1),
    ),
}
TIES: dict[str, tuple[Tensor, Tensor]] = {
    "all equal": (torch.ones(8, 5).double(), _groups(0, 0, 1, 1, 2, 2, 3, 3)),
    "groups equal": (torch.eye(4).double().repeat_interleave(2, 0), _groups(0, 0, 1, 1, 2, 2, 3, 3)),
    "equal across groups": (torch.eye(4).double().repeat(2, 1), _groups(0, 0, 1, 1, 2, 2, 3, 3)),
    "all without a length": (torch.zeros(6, 4).double(), _groups(0, 0, 1, 1, 2, 2)),
}


# -- the losses, in loops ----------------------------------------------------------------------------------------------


def _rows_of(loss: SimilarityLoss, e: Tensor) -> list[list[Tensor]]:
    measure = DISTANCE[loss.distance_metric]
    return [[measure(a, b) for b in e] for a in e]


def _split(groups: Tensor, anchor: int) -> tuple[list[int], list[int]]:
    """Positives and negatives of an object."""
    own = int(groups[anchor])
    others = [j for j in range(len(groups)) if j != anchor]
    return [j for j in others if int(groups[j]) == own], [j for j in others if int(groups[j]) != own]


def _hard_triplets(far: list[Tensor], near: list[Tensor], loss: TripletLoss, like: Tensor) -> Tensor:
    if not far or loss.soft:
        return _mean([F.softplus(f - n) for f, n in zip(far, near, strict=True)], like)
    size = torch.stack(near).mean()
    if loss.distance_metric is Distance.DOT_PRODUCT or size.item() < 1e-14:
        size = 1.0
    return _mean([F.relu((f - n) / size + loss.margin) for f, n in zip(far, near, strict=True)], like)


def _triplet(loss: TripletLoss, e: Tensor, groups: Tensor) -> Tensor:
    apart = _rows_of(loss, e)
    far, near, violations, semi_hard = [], [], [], []
    for i in range(len(e)):
        positives, negatives = _split(groups, i)
        if not positives or not negatives:
            continue
        far.append(max((apart[i][j] for j in positives), key=Tensor.item))
        near.append(min((apart[i][j] for j in negatives), key=Tensor.item))
        for p in positives:
            violations += [F.relu(apart[i][p] - apart[i][n] + loss.margin) for n in negatives]
            farther = [apart[i][n] for n in negatives if apart[i][n].item() > apart[i][p].item()]
            chosen = (
                min(farther, key=Tensor.item) if farther else max((apart[i][n] for n in negatives), key=Tensor.item)
            )
            semi_hard.append(F.relu(apart[i][p] - chosen + loss.margin))
    if loss.mining == "all":
        return _mean([v for v in violations if v.item() > 0], e)
    return _mean(semi_hard, e) if loss.mining == "semi_hard" else _hard_triplets(far, near, loss, e)


def _online_contrastive(loss: OnlineContrastiveLoss, e: Tensor, groups: Tensor) -> Tensor:
    apart = _rows_of(loss, e)
    together, away = [], []
    for i in range(len(e)):
        positives, negatives = _split(groups, i)
        ours, theirs = [apart[i][j] for j in positives], [apart[i][j] for j in negatives]
        if loss.mining == "hard":
            ours, theirs = ours and [max(ours, key=Tensor.item)], theirs and [min(theirs, key=Tensor.item)]
        together += ours
        away += [F.relu(loss.margin - d) for d in theirs]
    return (_mean(together, e) + _mean(away, e)) / 2


def _margin_softmax(loss: ArcFaceLoss | CosFaceLoss, e: Tensor, groups: Tensor) -> Tensor:
    each = []
    for row, own in zip(e, groups.tolist(), strict=True):
        cosines = [_cosine(row, vector) for vector in loss.kernel.T]
        if isinstance(loss, CosFaceLoss):
            cosines[own] = cosines[own] - loss.margin
        else:
            angle = cosines[own].acos()
            beyond = angle.item() > math.pi - loss.margin
            less = loss.margin * math.sin(loss.margin)
            cosines[own] = cosines[own] - less if beyond else (angle + loss.margin).cos()
        logits = torch.stack(cosines) * loss.scale
        each.append(logits.logsumexp(0) - logits[own])
    return _mean(each, e)


def _softmax(loss: SoftmaxLoss, e: Tensor, groups: Tensor) -> Tensor:
    each = []
    for row, own in zip(e, groups.tolist(), strict=True):
        logits = torch.stack([(row * vector).sum() / loss.temperature for vector in loss.kernel.T])
        each.append(logits.logsumexp(0) - logits[own])
    return _mean(each, e)


def _center(loss: CenterLoss, e: Tensor, groups: Tensor) -> Tensor:
    squares = [(_direction(row) - loss.centers[own]).square().mean() for row, own in zip(e, groups, strict=True)]
    return loss.lambda_c * _mean(squares, e)


def _circle(loss: CircleLoss, e: Tensor, groups: Tensor) -> Tensor:
    each = []
    for i in range(len(e)):
        positives, negatives = _split(groups, i)
        if not positives or not negatives:
            continue
        exponents = []
        for j in positives:
            s = _cosine(e[i], e[j])
            exponents.append((max(1 + loss.margin - s.item(), 0.0), s - (1 - loss.margin), -1))
        for j in negatives:
            s = _cosine(e[i], e[j])
            exponents.append((max(s.item() + loss.margin, 0.0), s - loss.margin, 1))
        pull = [sign * loss.scale_factor * weight * gap for weight, gap, sign in exponents]
        ours, theirs = torch.stack(pull[: len(positives)]), torch.stack(pull[len(positives) :])
        each.append(F.softplus(ours.logsumexp(0) + theirs.logsumexp(0)))
    return _mean([one for one in each if one.item() > 0], e)


def _fast_ap(loss: FastAPLoss, e: Tensor, groups: Tensor) -> Tensor:
    each, width = [], 4 / loss.num_bins
    for i in range(len(e)):
        positives, negatives = _split(groups, i)
        if not positives:
            continue
        square = {j: (_direction(e[i]) - _direction(e[j])).square().sum() for j in positives + negatives}
        ours, everyone, precision = 0.0 * e.sum(), 0.0 * e.sum(), 0.0 * e.sum()
        for edge in range(loss.num_bins + 1):
            here = {j: F.relu(1 - (square[j] - edge * width).abs() / width) for j in square}
            mine = sum(here[j] for j in positives)
            ours, everyone = ours + mine, everyone + sum(here.values())
            if (mine * ours).item() > 0:
                precision = precision + mine * ours / everyone
        each.append(1 - precision / len(positives))
    return _mean(each, e)


def _doubled(loss: SimilarityLoss) -> Any:
    return loss.double()


METRICS = [distance.value for distance in Distance]
CASES: dict[str, tuple[Callable[[int], Any], Callable[[Any, Tensor, Tensor], Tensor]]] = {
    **{f"hard {d}": (lambda dim, d=d: TripletLoss(distance_metric_name=d), _triplet) for d in METRICS},
    **{f"soft {d}": (lambda dim, d=d: TripletLoss(0, d, "hard", True), _triplet) for d in METRICS[:2]},
    **{f"all {d}": (lambda dim, d=d: TripletLoss(0.3, d, "all"), _triplet) for d in METRICS},
    **{f"semi-hard {d}": (lambda dim, d=d: TripletLoss(0.3, d, "semi_hard"), _triplet) for d in METRICS},
    "hard, no margin": (lambda dim: TripletLoss(margin=0.0), _triplet),
    **{f"online {d}": (lambda dim, d=d: OnlineContrastiveLoss(0.6, d), _online_contrastive) for d in METRICS},
    **{
        f"online all {d}": (lambda dim, d=d: OnlineContrastiveLoss(0.6, d, "all"), _online_contrastive) for d in METRICS
    },
    "arcface": (lambda dim: _doubled(ArcFaceLoss(dim, 5)), _margin_softmax),
    "arcface, wide": (lambda dim: _doubled(ArcFaceLoss(dim, 5, scale=7.0, margin=2.5)), _margin_softmax),
    "cosface": (lambda dim: _doubled(CosFaceLoss(dim, 5)), _margin_softmax),
    "softmax": (lambda dim: _doubled(SoftmaxLoss(dim, 5)), _softmax),
    "center": (lambda dim: _doubled(CenterLoss(dim, 5, lambda_c=0.7)), _center),
    "circle": (lambda dim: CircleLoss(), _circle),
    "circle, soft": (lambda dim: CircleLoss(0.4, 8), _circle),
    "fastap": (lambda dim: FastAPLoss(), _fast_ap),
    "fastap, coarse": (lambda dim: FastAPLoss(num_bins=3), _fast_ap),
}


def _gradients(run: Callable[[Tensor], Tensor], embeddings: Tensor, module: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by the embeddings and by what it learns."""
    leaf = embeddings.clone().requires_grad_()
    wanted = [leaf, *module.parameters()]
    value = run(leaf)
    assert value.shape == ()
    assert value.requires_grad
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return value.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_group_loss_equals_a_loop_with_its_gradient(case: str, batch: str):
    make, oracle = CASES[case]
    embeddings, groups = BATCHES[batch]
    loss = make(embeddings.shape[1])
    value, gradients = _gradients(lambda e: loss(e, groups), embeddings, loss)
    expected, wanted = _gradients(lambda e: oracle(loss, e, groups), embeddings, loss)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for found, right in zip(gradients, wanted, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", TIES)
def test_equal_embeddings_give_the_loops_value_and_a_usual_gradient(case: str, batch: str):
    make, oracle = CASES[case]
    embeddings, groups = TIES[batch]
    loss = make(embeddings.shape[1])
    expected = oracle(loss, embeddings, groups)
    loss = loss.float()
    value, gradients = _gradients(lambda e: loss(e, groups), embeddings.float(), loss)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    scale = getattr(loss, "scale_factor", getattr(loss, "scale", 1 / getattr(loss, "temperature", 0.1)))
    for found in gradients:
        assert found.isfinite().all()
        assert found.abs().max() < 100 * max(scale, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_two_of_a_group_has_a_loss_of_zero_or_pushes_apart(case: str):
    loss = CASES[case][0](4)
    embeddings = _random(5, 4, seed=3).requires_grad_()
    value = loss(embeddings, torch.arange(5))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    if not loss.learns_groups and not isinstance(loss, OnlineContrastiveLoss):
        assert value == 0
        assert not embeddings.grad.any()


@pytest.mark.parametrize("case", CASES)
def test_no_objects_at_all_are_no_error_that_hides_in_a_kernel(case: str):
    loss = CASES[case][0](4)
    embeddings = torch.empty(0, 4, dtype=torch.float64, requires_grad=True)
    value = loss(embeddings, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value == 0


@pytest.mark.parametrize("case", CASES)
def test_nan_is_not_hidden(case: str):
    loss = CASES[case][0](4)
    embeddings = _random(6, 4, seed=3)
    embeddings[2, 1] = torch.nan
    assert loss(embeddings, _groups(0, 0, 1, 1, 2, 2)).isnan()


# -- hard triplets, whose gradient is written out ----------------------------------------------------------------------


def _groups_of_many_sizes(rows: int, seed: int) -> Tensor:
    return torch.randint(0, max(rows // 3, 1), (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("margin", [0.0, 0.5, None])
@pytest.mark.parametrize("seed", range(5))
def test_hard_triplets_over_cosines_equal_the_general_form(margin: float | None, seed: int):
    embeddings, groups = _random(40, 16, seed), _groups_of_many_sizes(40, seed)
    loss = TripletLoss(soft=True) if margin is None else TripletLoss(margin)
    memory = (_random(60, 16, seed + 100), _groups_of_many_sizes(60, seed + 100))
    for others, other_groups in ((None, None), memory):

        def general(e: Tensor, others: Any = others, other_groups: Any = other_groups) -> Tensor:
            apart = Distance.COSINE.distance_matrix(e, others)
            return _hard(apart, *masks(groups, other_groups), margin, in_units=True)

        expected, wanted = _gradients(general, embeddings, loss)
        if others is None:
            found, gradients = _gradients(lambda e: 3 * loss(e, groups), embeddings, loss)
        else:
            found, gradients = _gradients(lambda e: 3 * loss.xbm_loss(e, groups, *memory), embeddings, loss)
        torch.testing.assert_close(found, 3 * expected)
        torch.testing.assert_close(gradients[0], 3 * wanted[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_the_written_gradient_of_hard_triplets_is_that_of_small_steps(soft: bool):
    loss, groups = TripletLoss(soft=soft), _groups(0, 0, 1, 1, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda e: loss(e, groups), (_random(7, 4, seed=1).requires_grad_(),))


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_hard_triplets_has_a_gradient_too(soft: bool):
    loss, groups = TripletLoss(soft=soft), _groups(0, 0, 1, 1, 2, 2, 2)
    memory = (_random(5, 4, seed=2), _groups(0, 1, 1, 2, 2))
    inputs = (_random(7, 4, seed=1).requires_grad_(),)
    assert torch.autograd.gradgradcheck(lambda e: loss(e, groups), inputs)
    assert torch.autograd.gradgradcheck(lambda e: loss.xbm_loss(e, groups, *memory), inputs)


def test_hard_triplets_work_without_a_gradient():
    loss, groups = TripletLoss(), _groups(0, 0, 1, 1)
    embeddings = _random(4, 3, seed=1)
    with torch.no_grad():
        plain = loss(embeddings, groups)
    assert not plain.requires_grad
    assert loss(embeddings.requires_grad_(), groups).item() == plain.item()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 256])
def test_hard_triplets_take_no_longer_than_a_plain_vectorised_loss(batch: int):
    """The figures of the module's docstring: run with ``-m slow -s``."""
    embeddings = torch.randn(batch, 384, requires_grad=True)
    groups = torch.arange(batch) // 4
    cosines = library_distances.CosineSimilarity()
    miner = library_miners.BatchHardMiner(distance=cosines)
    library = library_losses.TripletMarginLoss(margin=0.5, distance=cosines)

    def plain(e: Tensor, groups: Tensor) -> Tensor:
        units = F.normalize(e, dim=1)
        apart = (1 - units @ units.T) / 2
        same = groups[:, None] == groups
        far = (apart * same).max(1).values
        near = apart.masked_fill(same, torch.inf).min(1).values
        return F.relu(far - near + 0.5).mean()

    contestants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "this form": TripletLoss(),
        "the general form": lambda e, g: _hard(Distance.COSINE.distance_matrix(e), *masks(g), 0.5, in_units=True),
        "six plain lines": plain,
        "pytorch-metric-learning": lambda e, g: library(e, g, miner(e, g)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    try:
        for _ in range(9):  # in turn, so that whatever else the machine does is shared
            for name, loss in contestants.items():
                begin = time.perf_counter()
                for _ in range(30):
                    embeddings.grad = None
                    loss(embeddings, groups).backward()
                seconds[name].append((time.perf_counter() - begin) / 30)
    finally:
        torch.set_num_threads(threads)
    best = {name: min(each) for name, each in seconds.items()}
    print(batch, {name: f"{1e6 * one:,.0f} us" for name, one in best.items()})
    assert best["this form"] < 1.2 * best["six plain lines"]
    assert best["this form"] < 0.75 * best["pytorch-metric-learning"]


# -- against pytorch-metric-learning -----------------------------------------------------------------------------------

COSINES = library_distances.CosineSimilarity()
MEAN = library_reducers.MeanReducer()


@pytest.mark.parametrize("seed", range(3))
def test_hard_and_all_triplets_equal_pytorch_metric_learning(seed: int):
    embeddings, groups = _random(24, 8, seed), torch.arange(24) // 3
    mined = library_miners.BatchHardMiner(distance=COSINES)(embeddings, groups)
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T
    size = (1 - cosines[mined[0], mined[2]]).mean().item()  # the mean distance to the hardest negatives, twice as ours
    library = library_losses.TripletMarginLoss(margin=0.5 * size, distance=COSINES, reducer=MEAN)
    expected = library(embeddings, groups, mined) / size
    torch.testing.assert_close(TripletLoss()(embeddings, groups), expected)
    library = library_losses.TripletMarginLoss(margin=0.6, distance=COSINES)
    torch.testing.assert_close(TripletLoss(0.3, mining="all")(embeddings, groups), library(embeddings, groups) / 2)


def test_semi_hard_triplets_are_the_nearest_of_those_that_pytorch_metric_learning_mines():
    groups = torch.arange(24) // 3
    embeddings = 3 * _random(8, 4, seed=5)[groups] + _random(24, 4, seed=6)
    miner = library_miners.TripletMarginMiner(margin=4.0, distance=COSINES, type_of_triplets="semihard")
    mined = torch.stack(miner(embeddings, groups)).T.tolist()
    units = F.normalize(embeddings, dim=1)
    cosines = units @ units.T
    nearest: dict[tuple[int, int], int] = {}
    for a, p, n in mined:
        if (a, p) not in nearest or cosines[a, n] > cosines[a, nearest[a, p]]:
            nearest[a, p] = n
    assert len(nearest) == 24 * 2  # there is a farther negative for each
    each = [F.relu((cosines[a, n] - cosines[a, p]) / 2 + 0.3) for (a, p), n in nearest.items()]
    torch.testing.assert_close(TripletLoss(0.3, mining="semi_hard")(embeddings, groups), torch.stack(each).mean())


def test_online_contrastive_over_all_pairs_equals_pytorch_metric_learning():
    embeddings, groups = _random(20, 5, seed=6), torch.arange(20) % 4
    library = library_losses.ContrastiveLoss(
        neg_margin=3, distance=library_distances.LpDistance(normalize_embeddings=False), reducer=MEAN
    )
    found = OnlineContrastiveLoss(3.0, Distance.EUCLIDEAN, "all")(embeddings, groups)
    torch.testing.assert_close(found, library(embeddings, groups) / 2)


def test_what_is_of_the_library_gives_what_the_library_gives():
    embeddings, groups = _random(20, 5, seed=7), torch.arange(20) % 4
    same: list[tuple[Any, Any]] = [
        (CircleLoss(0.4, 80), library_losses.CircleLoss(m=0.4, gamma=80)),
        (FastAPLoss(), library_losses.FastAPLoss()),
        (ArcFaceLoss(5, 4).double(), library_losses.ArcFaceLoss(4, 5, margin=math.degrees(0.5))),
        (CosFaceLoss(5, 4).double(), library_losses.CosFaceLoss(4, 5)),
    ]
    for ours, theirs in same:
        if hasattr(ours, "kernel"):
            theirs.W.data = ours.kernel.data.clone()
        torch.testing.assert_close(ours(embeddings, groups), theirs(embeddings, groups))


def test_arcface_has_a_gradient_where_an_embedding_lies_on_its_vector():
    for dtype in (torch.float32, torch.float64):
        loss = ArcFaceLoss(4, 2).to(dtype)
        loss.kernel.data = torch.eye(4, 2, dtype=dtype)
        embeddings = torch.eye(2, 4, dtype=dtype, requires_grad=True)
        value = loss(embeddings, _groups(0, 1))
        value.backward()
        for gradient in (embeddings.grad, loss.kernel.grad):
            assert gradient is not None
            assert gradient.isfinite().all()
        assert value < loss(embeddings, _groups(1, 0))


# -- against Quaterion 0.1.35 ------------------------------------------------------------------------------------------


def _waves(rows: int, dim: int) -> Tensor:
    return torch.sin(torch.arange(rows * dim, dtype=torch.float64) ** 1.5).view(rows, dim)


PAIRS = torch.stack([torch.arange(6), torch.arange(6) + 6], 1)
SCORES = torch.tensor([1, 1, 0, 0.25, 1, 0], dtype=torch.float64)
SUBGROUPS = torch.tensor([0.0, 0, 1, 1, 2, 2]).repeat(2)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (TripletLoss(), 2.087675612744189),
        (TripletLoss(margin=1.0, distance_metric_name=Distance.EUCLIDEAN), 1.6572294720731662),
        (TripletLoss(soft=True), 0.9134952108043429),
        (TripletLoss(soft=True, distance_metric_name="manhattan"), 2.6430281315642645),
        (TripletLoss(mining="all"), 0.5018044663428193),
        (TripletLoss(mining="all", margin=0.3, distance_metric_name="euclidean"), 0.6958616475640306),
        (TripletLoss(mining="all", distance_metric_name="dot_product"), 1.5259514210102976),
        (FastAPLoss(), 0.6111424017690967),
        (FastAPLoss(num_bins=20), 0.5796111222947229),
    ],
)
def test_a_group_loss_gives_what_it_gave_in_quaterion(loss: GroupLoss, value: float):
    assert loss(_waves(12, 5), torch.arange(12) // 3).item() == pytest.approx(value, abs=1e-6)


def test_losses_with_learned_vectors_give_what_they_gave_in_quaterion():
    embeddings, groups = _waves(12, 5), torch.arange(12) // 3
    softmax = SoftmaxLoss(5, 4).double()
    softmax.kernel.data = 0.3 * _waves(9, 4)[4:]
    assert softmax(embeddings, groups).item() == pytest.approx(6.837764164973791, abs=1e-9)
    for margin, value in ((0.5, 50.63094713924924), (0.2, 34.34403343509303)):
        arcface = ArcFaceLoss(5, 4, margin=margin).double()
        arcface.kernel.data = _waves(9, 4)[4:]
        assert arcface(embeddings, groups).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("distance", "averaged", "summed"),
    [
        ("euclidean", 1.966813742450685, 11.80088245470411),
        ("cosine", 1.2171304755906247, 2.640187377492864),
        ("dot_product", 9.23843265585157, 1.6621984665654417),
        ("manhattan", 7.674640545098079, 46.04784327058847),
    ],
)
def test_contrastive_loss_gives_what_it_gave_in_quaterion(distance: str, averaged: float, summed: float):
    embeddings = _waves(12, 5)
    loss = ContrastiveLoss(distance, margin=0.9)
    assert loss(embeddings, PAIRS, SCORES, SUBGROUPS).item() == pytest.approx(averaged, abs=2e-5)
    loss = ContrastiveLoss(distance, size_average=False)
    assert loss(embeddings, PAIRS, SCORES, 0 * SUBGROUPS).item() == pytest.approx(summed, abs=2e-5)


@pytest.mark.parametrize(
    ("distance", "one_way", "both_ways"),
    [
        ("cosine", 5.544206570537884, 6.056697101451051),
        ("dot_product", 2.4026518059871544, 2.46584361302698),
        ("euclidean", 1.8099291109026312, 1.8101344075632568),
    ],
)
def test_multiple_negatives_ranking_gives_what_it_gave_in_quaterion(distance: str, one_way: float, both_ways: float):
    scale = 20.0 if distance == "cosine" else 1.0
    for symmetric, value in ((False, one_way), (True, both_ways)):
        loss = MultipleNegativesRankingLoss(scale, distance, symmetric)
        found = loss(_waves(12, 5), PAIRS, torch.ones(6), SUBGROUPS).item()
        assert found == pytest.approx(value, abs=1e-9)


# -- pairs -------------------------------------------------------------------------------------------------------------


def _contrastive(loss: ContrastiveLoss, e: Tensor, labels: Tensor, subgroups: Tensor) -> Tensor:
    rows, costs = DISTANCE[loss.distance_metric], []
    half = len(e) // 2
    for i in range(half):
        apart = rows(e[i], e[half + i]) * (2 if loss.distance_metric is Distance.COSINE else 1)
        score = labels[i]
        cost = (score * apart**2 + (1 - score) * F.relu(loss.margin - apart) ** 2) / 2
        for one in (i, half + i):
            others = [rows(e[one], e[j]) for j in range(len(e)) if subgroups[j] != subgroups[one]]
            if others:
                cost = cost + F.relu(loss.margin - min(others, key=Tensor.item)) ** 2
        costs.append(cost)
    return torch.stack(costs).mean() if loss.size_average else torch.stack(costs).sum()


PAIR_BATCHES: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "scores and subgroups": (_random(12, 4, seed=1), SCORES, SUBGROUPS),
    "all together": (_random(10, 4, seed=2), torch.ones(5), torch.zeros(10)),
    "none together": (_random(10, 4, seed=3), torch.zeros(5), torch.zeros(10)),
    "a subgroup each": (_random(10, 4, seed=4), torch.ones(5), torch.arange(5.0).repeat(2)),
    "one pair": (_random(2, 4, seed=5), torch.ones(1), torch.zeros(2)),
    "one without a length": (
        torch.cat([torch.zeros(1, 4).double(), _random(5, 4, seed=6)]),
        torch.ones(3),
        torch.arange(3.0).repeat(2),
    ),
}


def _pairs(count: int) -> Tensor:
    return torch.arange(2 * count).view(2, count).T


@pytest.mark.parametrize("distance", METRICS)
@pytest.mark.parametrize("batch", PAIR_BATCHES)
@pytest.mark.parametrize("size_average", [True, False])
def test_contrastive_loss_equals_a_loop_with_its_gradient(distance: str, batch: str, size_average: bool):
    embeddings, labels, subgroups = PAIR_BATCHES[batch]
    loss = ContrastiveLoss(distance, margin=1.3, size_average=size_average)
    pairs = _pairs(len(labels))
    value, gradients = _gradients(lambda e: loss(e, pairs, labels, subgroups), embeddings, loss)
    expected, wanted = _gradients(lambda e: _contrastive(loss, e, labels, subgroups), embeddings, loss)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-7, atol=1e-8)


def _ranking(e: Tensor, scale: float, similarity: Callable[[Tensor, Tensor], Tensor], symmetric: bool) -> Tensor:
    half = len(e) // 2
    left, right = e[:half], e[half:]
    logits = [[scale * similarity(a, b) for b in right] for a in left]
    each = [torch.stack(row).logsumexp(0) - row[i] for i, row in enumerate(logits)]
    if symmetric:
        each += [torch.stack([row[i] for row in logits]).logsumexp(0) - logits[i][i] for i in range(half)]
    return torch.stack(each).mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch", PAIR_BATCHES)
def test_multiple_negatives_ranking_equals_a_loop_with_its_gradient(batch: str, symmetric: bool):
    embeddings, labels, subgroups = PAIR_BATCHES[batch]
    pairs, ones = _pairs(len(labels)), torch.ones(len(labels))
    similarities: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cosine": lambda a, b: (1 + _cosine(a, b)) / 2,
        "dot_product": lambda a, b: (a * b).sum(),
        "euclidean": lambda a, b: 1 / (1 + _length(a - b)),
    }
    for name, similarity in similarities.items():
        loss = MultipleNegativesRankingLoss(7.0, name, symmetric)
        value, gradients = _gradients(lambda e, loss=loss: loss(e, pairs, ones, subgroups), embeddings, loss)
        expected, wanted = _gradients(lambda e, s=similarity: _ranking(e, 7.0, s, symmetric), embeddings, loss)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-7, atol=1e-8)


def test_both_forms_of_multiple_negatives_ranking_are_one_at_twice_the_scale():
    embeddings = _random(12, 5, seed=1)
    pairs = MultipleNegativesRankingLoss(scale=40, symmetric=True)(embeddings, PAIRS, torch.ones(6), SUBGROUPS)
    torch.testing.assert_close(pairs, MultipleNegativesRanking(scale=20)(embeddings[:6], embeddings[6:]))


def test_pairs_need_not_be_halves_of_the_batch():
    embeddings, order = _random(12, 5, seed=1), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    for loss, labels in ((ContrastiveLoss(), SCORES), (MultipleNegativesRankingLoss(), torch.ones(6))):
        expected = loss(embeddings, PAIRS, labels, SUBGROUPS)
        torch.testing.assert_close(loss(embeddings[order], place[PAIRS], labels, SUBGROUPS[order]), expected)


def test_equal_embeddings_of_pairs_have_a_usual_gradient():
    for embeddings in (torch.zeros(8, 4), torch.ones(8, 4), torch.eye(4).repeat(2, 1)):
        for loss in (*(ContrastiveLoss(d) for d in METRICS), MultipleNegativesRankingLoss(symmetric=True)):
            leaf = embeddings.clone().requires_grad_()
            loss(leaf, _pairs(4), torch.ones(4), torch.arange(4.0).repeat(2)).backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
            assert leaf.grad.abs().max() < 50


def test_no_pairs_at_all_cost_nothing():
    for loss in (ContrastiveLoss(), MultipleNegativesRankingLoss()):
        embeddings = torch.empty(0, 4, requires_grad=True)
        value = loss(embeddings, torch.empty(0, 2, dtype=torch.int64), torch.empty(0), torch.empty(0))
        value.backward()
        assert value == 0


# -- softmax over classes ----------------------------------------------------------------------------------------------


def test_softmax_over_cosines_is_softmax_on_vectors_of_length_one():
    embeddings, groups = _random(8, 5, seed=1), torch.arange(8) % 3
    cosine = CosineSoftmax(3, 5, scale=20.0).double()
    plain = SoftmaxLoss(5, 3, temperature=1 / 20).double()
    plain.kernel.data = F.normalize(cosine.weight.data, dim=1).T
    torch.testing.assert_close(plain(F.normalize(embeddings, dim=1), groups), cosine(embeddings, groups))


# -- any loss and miner of pytorch-metric-learning ---------------------------------------------------------------------

GIVEN = {"num_classes": 4, "embedding_size": 6, "descriptors_dim": 6, "margin": 0.4, "Tn": 1.0}
"""What the constructors of the library's losses ask for."""
NO_LOSSES = {"BaseMetricLossFunction", "GenericPairLoss", "VICRegLoss"}
"""Base classes, and one that compares two views."""


def _make(kind: Any) -> Any:
    needed = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if kind.__name__ in ("CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"):  # these hand all arguments on
        needed = ["num_classes", "embedding_size"]
    if kind.__name__ == "ManifoldLoss":
        return kind(l=6, K=4)  # 50 proxies need 50 objects
    torch.manual_seed(1)
    return kind(**{name: GIVEN[name] for name in needed})


LIBRARY = sorted(
    name
    for name, kind in vars(library_losses).items()
    if isinstance(kind, type) and issubclass(kind, library_losses.BaseMetricLossFunction) and name not in NO_LOSSES
)
MINERS = sorted(
    name
    for name, kind in vars(library_miners).items()
    if isinstance(kind, type) and issubclass(kind, library_miners.BaseMiner) and name != "BaseMiner"
)


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.filterwarnings(
    "ignore:Using a non-tuple sequence", "ignore:__array_wrap__ must accept"
)  # the library's own
def test_any_loss_of_the_library_gives_through_the_wrapper_what_it_gives_alone(name: str):
    embeddings, groups = _random(16, 6, seed=1).float(), torch.arange(16) // 4
    loss = _make(getattr(library_losses, name))
    wrapped = PytorchMetricLearningWrapper(copy.deepcopy(loss))
    assert len(list(wrapped.parameters())) == len(list(loss.parameters()))

    def run(one: Any, e: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # some draw
        value = one(e, *targets)
        return value.reshape(()), torch.autograd.grad(value, e)[0]

    expected = run(loss, embeddings.requires_grad_(), *([] if name == "ManifoldLoss" else [groups]))
    assert all(map(torch.equal, run(wrapped, embeddings, groups), expected))
    assert expected[0].isfinite()


@pytest.mark.parametrize("name", MINERS)
def test_any_miner_of_the_library_chooses_for_the_loss(name: str):
    embeddings, groups = _random(15, 6, seed=1), torch.arange(15) // 3
    miner = getattr(library_miners, name)()
    loss = library_losses.TripletMarginLoss(margin=0.4)
    wrapped = PytorchMetricLearningWrapper(loss, miner)
    torch.manual_seed(3)
    expected = loss(embeddings, groups, miner(embeddings, groups))
    torch.manual_seed(3)
    assert torch.equal(wrapped(embeddings, groups), expected)


def test_the_librarys_own_wrappers_are_taken_too():
    embeddings, groups = _random(8, 6, seed=1).float(), torch.arange(8) // 2
    both = library_losses.MultipleLosses([library_losses.SupConLoss(), library_losses.TripletMarginLoss()])
    assert torch.equal(PytorchMetricLearningWrapper(both)(embeddings, groups), both(embeddings, groups))
    memory = library_losses.CrossBatchMemory(library_losses.NTXentLoss(), embedding_size=6, memory_size=16)
    expected = copy.deepcopy(memory)
    wrapped = PytorchMetricLearningWrapper(memory)
    for _ in range(2):
        assert torch.equal(wrapped(embeddings, groups), expected(embeddings, groups))


def test_a_pair_is_a_group_of_two_to_the_library():
    embeddings, ones = _random(12, 6, seed=1), torch.ones(6)
    for loss, miner in (
        (library_losses.NTXentLoss(), None),
        (library_losses.TripletMarginLoss(), library_miners.BatchHardMiner()),
        (library_losses.SupConLoss(), library_miners.MultiSimilarityMiner()),
    ):
        groups = torch.arange(6).repeat(2)
        expected = loss(embeddings, groups, None if miner is None else miner(embeddings, groups))
        wrapped = PytorchMetricLearningPairWrapper(loss, miner)
        torch.testing.assert_close(wrapped(embeddings, PAIRS, ones, SUBGROUPS), expected)


def test_a_loss_that_compares_two_views_compares_the_two_of_a_pair():
    embeddings, ones = _random(12, 6, seed=1).float(), torch.ones(6)
    left, right = embeddings.chunk(2)
    for loss in (library_losses.VICRegLoss(), library_losses.SelfSupervisedLoss(library_losses.NTXentLoss())):
        wrapped = PytorchMetricLearningPairWrapper(loss)
        assert torch.equal(wrapped(embeddings, PAIRS, ones, SUBGROUPS), loss(left, ref_emb=right))


def test_given_negatives_are_pairs_of_score_0_and_other_subgroups_and_nothing_else():
    embeddings = _random(12, 6, seed=1)
    labels = torch.tensor([1.0, 1, 0, 1, 0, 0])
    library = library_losses.ContrastiveLoss(neg_margin=4, reducer=MEAN)
    wrapped = PytorchMetricLearningPairWrapper(library, negatives="given")
    apart, units = {}, F.normalize(embeddings, dim=1)
    for i, j in itertools.product(range(12), repeat=2):
        apart[i, j] = (units[i] - units[j]).norm()
    for subgroups in (SUBGROUPS, torch.zeros(12)):
        together = [d for (i, j), d in apart.items() if (i - j) % 12 == 6 and labels[i % 6] == 1]
        away = [
            4 - d
            for (i, j), d in apart.items()
            if subgroups[i] != subgroups[j] or ((i - j) % 12 == 6 and labels[i % 6] == 0)
        ]
        assert len(away) == (96 if subgroups.any() else 0) + 6
        expected = torch.stack(together).mean() + torch.stack(away).mean()
        torch.testing.assert_close(wrapped(embeddings, PAIRS, labels, subgroups), expected)


def test_what_the_wrapper_cannot_use_is_refused_in_words():
    wrong: list[tuple[Any, Any, str]] = [
        (nn.TripletMarginLoss(), None, "one of pytorch-metric-learning.*: TripletMarginLoss came"),
        (library_losses.NTXentLoss, None, "type came"),
        (library_losses.NTXentLoss(), "hard", "miner must be one of .*: str came"),
    ]
    for loss, miner, words in wrong:
        for wrapper in (PytorchMetricLearningWrapper, PytorchMetricLearningPairWrapper):
            with pytest.raises(LossError, match=words):
                wrapper(loss, miner)
    for loss in (library_losses.VICRegLoss(), library_losses.SelfSupervisedLoss(library_losses.NTXentLoss())):
        with pytest.raises(LossError, match=r"two views of each object: give it pairs"):
            PytorchMetricLearningWrapper(loss)
        with pytest.raises(LossError, match=r"no miner, and no negatives"):
            PytorchMetricLearningPairWrapper(loss, negatives="given")
    unreduced = library_losses.NTXentLoss(reducer=library_reducers.DoNothingReducer())
    with pytest.raises(LossError, match=r"NTXentLoss gave a dict.*MeanReducer"):
        PytorchMetricLearningWrapper(unreduced)(_random(4, 3, seed=0), _groups(0, 0, 1, 1))


def test_pairs_that_do_not_suit_the_wrapper_are_refused_in_words():
    embeddings = _random(12, 6, seed=1)
    batch = PytorchMetricLearningPairWrapper(library_losses.NTXentLoss())
    given = PytorchMetricLearningPairWrapper(library_losses.ContrastiveLoss(), negatives="given")
    with pytest.raises(LossError, match=r"of score 0 came.*negatives='given'"):
        batch(embeddings, PAIRS, SCORES, SUBGROUPS)
    with pytest.raises(LossError, match=r"none or in several"):
        batch(embeddings, PAIRS[[0, 0, 1, 2, 3, 4]], torch.ones(6), SUBGROUPS)
    with pytest.raises(LossError, match=r"a score of 0.25 came"):
        given(embeddings, PAIRS, SCORES, SUBGROUPS)
    with pytest.raises(LossError, match=r"BatchHardMiner chooses among groups"):
        PytorchMetricLearningPairWrapper(
            library_losses.NTXentLoss(), library_miners.BatchHardMiner(), negatives="given"
        )
    with pytest.raises(LossError, match=r"negatives 'some' is not known: give one of 'batch', 'given'"):
        PytorchMetricLearningPairWrapper(library_losses.NTXentLoss(), negatives="some")
    unsuited = PytorchMetricLearningPairWrapper(library_losses.FastAPLoss(), negatives="given")
    with pytest.raises(LossError, match=r"FastAPLoss cannot be told pair by pair.*labels"):
        unsuited(embeddings, PAIRS, torch.ones(6), SUBGROUPS)


# -- what is refused ---------------------------------------------------------------------------------------------------

GROUP_TARGETS = {"groups": torch.arange(12) // 3}
PAIR_TARGETS = {"pairs": PAIRS, "labels": torch.ones(6), "subgroups": SUBGROUPS}
GROUP_LOSSES: list[Any] = [case(6) for case, _ in CASES.values()]
GROUP_LOSSES.append(PytorchMetricLearningWrapper(library_losses.SupConLoss()))
PAIR_LOSSES: list[Any] = [
    ContrastiveLoss(),
    MultipleNegativesRankingLoss(),
    PytorchMetricLearningPairWrapper(library_losses.SupConLoss()),
]


def test_a_loss_for_groups_that_is_given_pairs_says_what_takes_them():
    for loss in GROUP_LOSSES:
        assert isinstance(loss, GroupLoss)
        with pytest.raises(
            TypeError, match=r"needs groups, and pairs, labels, subgroups came.*ContrastiveLoss"
        ) as caught:
            loss(embeddings=_random(12, 6, seed=1), **PAIR_TARGETS)
        assert type(caught.value) is LossTargetsError
        assert str(caught.value).startswith(type(loss).__name__)


def test_a_loss_for_pairs_that_is_given_groups_says_what_takes_them():
    for loss in PAIR_LOSSES:
        assert isinstance(loss, PairwiseLoss)
        with pytest.raises(TypeError, match=r"needs pairs, and groups came.*TripletLoss") as caught:
            loss(embeddings=_random(12, 6, seed=1), **GROUP_TARGETS)
        assert isinstance(caught.value, RecycleError)
        assert str(caught.value).startswith(type(loss).__name__)


@pytest.mark.parametrize(
    "embeddings",
    [torch.ones(12), torch.ones(12, 6, 7, 7), torch.ones(12, 6, dtype=torch.int64), [[1.0] * 6] * 12],
    ids=["vector", "feature maps", "whole numbers", "list"],
)
def test_embeddings_that_are_no_matrix_are_refused_in_words(embeddings: Any):
    for loss in GROUP_LOSSES + PAIR_LOSSES:
        targets = GROUP_TARGETS if isinstance(loss, GroupLoss) else PAIR_TARGETS
        with pytest.raises(LossError, match=r"\[batch, dim\].*came"):
            loss(embeddings=embeddings, **targets)


@pytest.mark.parametrize(
    "groups",
    [torch.arange(11), torch.arange(12.0), torch.arange(12)[:, None], torch.ones(12).bool(), list(range(12))],
    ids=["one less", "no whole numbers", "a matrix", "bool", "list"],
)
def test_groups_that_are_not_one_whole_number_each_are_refused_in_words(groups: Any):
    for loss in GROUP_LOSSES:
        with pytest.raises(LossError, match=r"one whole number for each of the 12.*came"):
            loss(_random(12, 6, seed=1), groups)


def test_groups_of_any_whole_type_and_number_will_do():
    embeddings, groups = _random(9, 6, seed=1), torch.arange(9) // 3
    for loss in (TripletLoss(), CircleLoss(), FastAPLoss(), OnlineContrastiveLoss()):
        expected = loss(embeddings, groups)
        assert torch.equal(loss(embeddings, groups.int()), expected)
        assert torch.equal(loss(embeddings, groups.to(torch.uint8)), expected)
        assert torch.equal(loss(embeddings, -1000 * groups - 7), expected)


def test_groups_that_a_loss_does_not_know_are_refused_in_words():
    for make in (ArcFaceLoss, CosFaceLoss, SoftmaxLoss, CenterLoss):
        loss = make(embedding_size=6, num_groups=3)
        for groups in (_groups(0, 1, 3), _groups(-1, 0, 1)):
            with pytest.raises(LossError, match=rf"{make.__name__} knows the groups 0 to 2.*num_groups"):
                loss(torch.ones(3, 6), groups)
        with pytest.raises(LossError, match="made for embeddings of 6 numbers, and 5 came"):
            loss(torch.ones(3, 5), _groups(0, 1, 2))
        with pytest.raises(LossError, match="num_groups=0 came"):
            make(embedding_size=6, num_groups=0)


def test_targets_of_pairs_that_do_not_fit_are_refused_in_words():
    embeddings = _random(12, 6, seed=1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pairs": PAIRS[:, 0]}, r"\[pairs, 2\]: int64 of shape \[6\] came"),
        ({"pairs": PAIRS.float()}, r"\[pairs, 2\]: float32"),
        ({"pairs": PAIRS + 1}, "rows 1 to 12, and there are 12 embeddings"),
        ({"pairs": PAIRS - 1}, "rows -1 to 10"),
        ({"labels": torch.ones(5)}, r"labels of shape \[6\]"),
        ({"labels": None}, r"labels of shape \[6\].*NoneType"),
        ({"subgroups": torch.zeros(6)}, r"subgroups of shape \[12\]"),
    ]
    for loss in PAIR_LOSSES:
        for change, words in wrong:
            with pytest.raises(LossError, match=words):
                loss(embeddings, **{**PAIR_TARGETS, **change})


def test_scores_out_of_range_are_refused_in_words():
    embeddings = _random(12, 6, seed=1)
    with pytest.raises(LossError, match=r"from 0 .* to 1 .*1 to 5 came: divide"):
        ContrastiveLoss()(embeddings, PAIRS, torch.tensor([1.0, 2, 3, 4, 5, 5]), SUBGROUPS)
    with pytest.raises(LossError, match=r"one of score 0.25 came.*ContrastiveLoss"):
        MultipleNegativesRankingLoss()(embeddings, PAIRS, torch.tensor([1.0, 0.25, 1, 1, 0, 1]), SUBGROUPS)


def test_arguments_without_sense_are_refused_in_words():
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: TripletLoss(mining="semihard"), "'semihard' is not known: give one of 'hard', 'all', 'semi_hard'"),
        (lambda: OnlineContrastiveLoss(mining="semi_hard"), "give one of 'hard', 'all'"),
        (lambda: ArcFaceLoss(4, 3, margin=28.6), "in radians.*28.6 degrees are margin=0.499"),
        (lambda: CosFaceLoss(4, 3, scale=0), "scale of CosFaceLoss must be above 0"),
        (lambda: SoftmaxLoss(4, 3, temperature=0), "temperature of SoftmaxLoss must be above 0"),
        (lambda: FastAPLoss(num_bins=0), "num_bins=0"),
        (lambda: CircleLoss(distance_metric_name="euclidean"), "defined on cosines, and 'euclidean' came"),
        (lambda: CircleLoss(scale_factor=-1), "scale_factor"),
    ]
    for make, words in wrong:
        with pytest.raises(LossError, match=words):
            make()


def test_without_the_library_a_loss_of_it_names_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for make in (lambda: ArcFaceLoss(4, 3), CircleLoss, lambda: PytorchMetricLearningWrapper(None)):
        with pytest.raises(LossError, match=r'pip install "torchrecycle\[similarity\]"'):
            make()
    assert TripletLoss()(torch.eye(4), _groups(0, 0, 1, 1)) > 0


def test_losses_load_the_library_only_when_one_of_it_is_made():
    code = (
        "import sys; from torchrecycle.similarity.losses import TripletLoss; import torchrecycle.similarity.xbm;"
        "TripletLoss(); print([m for m in sys.modules if m in ('pytorch_metric_learning', 'pytorch_lightning')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- as modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_json_and_makes_a_loss_of_the_same_kind(case: str):
    loss = CASES[case][0](6)
    config = json.loads(json.dumps(loss.get_config_dict()))
    again = type(loss)(**config)
    assert again.get_config_dict() == config
    again = again.double()
    again.load_state_dict(loss.state_dict())
    embeddings, groups = _random(9, 6, seed=1), torch.arange(9) // 3
    assert torch.equal(again(embeddings, groups), loss(embeddings, groups))
    assert torch.equal(copy.deepcopy(loss)(embeddings, groups), loss(embeddings, groups))
    assert torch.equal(pickle.loads(pickle.dumps(loss))(embeddings, groups), loss(embeddings, groups))


def test_pair_losses_have_a_config_too():
    for loss in PAIR_LOSSES[:2]:
        assert type(loss)(**json.loads(json.dumps(loss.get_config_dict()))).get_config_dict() == loss.get_config_dict()
    assert PAIR_LOSSES[2].get_config_dict() == {"loss": "SupConLoss", "miner": None, "negatives": "batch"}


def test_under_autocast_and_from_bfloat16_a_loss_is_float32():
    embeddings = _random(12, 6, seed=1).bfloat16()
    for make, _ in CASES.values():
        loss = make(6).float()
        expected = loss(embeddings.float(), **GROUP_TARGETS)
        leaf = embeddings.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(leaf, **GROUP_TARGETS)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        found.backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in loss.parameters())
    for loss in PAIR_LOSSES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(embeddings, **PAIR_TARGETS), loss(embeddings.float(), **PAIR_TARGETS))


def test_a_loss_of_a_users_own_is_checked_like_ours_and_may_take_more_arguments():
    class Spread(GroupLoss):
        def forward(self, embeddings: Tensor, groups: Tensor, weight: float = 1.0) -> Tensor:
            return weight * self.distance_metric.distance_matrix(embeddings)[groups[:, None] == groups].mean()

    class Widest(PairwiseLoss):
        def forward(
            self, embeddings: Tensor, pairs: Tensor, labels: Tensor, subgroups: Tensor, power: int = 1
        ) -> Tensor:
            left, right = embeddings[pairs[:, 0]], embeddings[pairs[:, 1]]
            return self.distance_metric.distance(left, right).max() ** power

    embeddings = _random(12, 6, seed=1)
    spread, widest = Spread("euclidean"), Widest()
    assert spread(embeddings, weight=2.0, **GROUP_TARGETS) == 2 * spread(embeddings, **GROUP_TARGETS)
    assert widest(embeddings, power=2, **PAIR_TARGETS) == widest(embeddings, **PAIR_TARGETS) ** 2
    with pytest.raises(LossTargetsError, match="Spread needs groups"):
        spread(embeddings, **PAIR_TARGETS)
    with pytest.raises(XbmError, match="Spread cannot be used with cross-batch memory"):
        spread.xbm_loss(embeddings, GROUP_TARGETS["groups"], embeddings, GROUP_TARGETS["groups"])
    assert spread.get_config_dict() == {"distance_metric_name": "euclidean"}
    assert spread.distance_metric_name == "euclidean"
    seen = []
    spread.register_forward_hook(lambda module, args, output: seen.append(output))
    assert spread(embeddings, **GROUP_TARGETS) is seen[0]


@pytest.mark.parametrize("mining", ["hard", "all", "semi_hard"])
def test_triplet_loss_learns_to_tell_groups_apart(mining: str):
    groups = torch.arange(24) // 4
    objects = _random(24, 10, seed=1).float() + 1.3 * _random(6, 10, seed=2).float()[groups]
    apart = Distance.COSINE.distance_matrix(objects).fill_diagonal_(2.0)
    assert not (groups[apart.argmin(1)] == groups).all()
    head, loss = nn.Linear(10, 6), TripletLoss(mining=mining)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(head(objects), groups).backward()
        optimizer.step()
    apart = Distance.COSINE.distance_matrix(head(objects)).fill_diagonal_(2.0)
    assert (groups[apart.argmin(1)] == groups).all()

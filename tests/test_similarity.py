"""Losses and metrics, each against the same thing said in plain Python loops."""

from __future__ import annotations

import math

import pytest
import torch

from torchrecycle.similarity import CosineSoftmax, MultipleNegativesRanking, pair_scores, r_precision


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def _cross_entropy(logits: list[float], own: int) -> float:
    return math.log(sum(math.exp(each) for each in logits)) - logits[own]


def _embeddings(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- R-precision -------------------------------------------------------------------------------------------------------


def _r_precision_in_a_loop(embeddings: list[list[float]], labels: list[int]) -> float:
    shares = []
    for i, label in enumerate(labels):
        relatives = labels.count(label) - 1
        if relatives == 0:
            continue
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j: -_cosine(embeddings[i], embeddings[j]))
        shares.append(sum(labels[j] == label for j in others[:relatives]) / relatives)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_r_precision_equals_a_loop_with_classes_of_many_sizes_and_any_block(block: int):
    labels = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(1))
    labels[0] = 77  # has no relative
    centres = _embeddings(78, 6, 2)
    embeddings = centres[labels] + 0.8 * _embeddings(60, 6, 3)
    expected = _r_precision_in_a_loop(embeddings.tolist(), labels.tolist())
    assert 0.3 < expected < 0.95
    assert r_precision(embeddings, labels, block=block) == pytest.approx(expected, abs=1e-12)


def test_r_precision_of_clumps_is_one_and_needs_relatives():
    labels = torch.tensor([5, 5, -3, -3])
    assert r_precision(torch.eye(4)[[0, 0, 1, 1]], labels) == 1.0
    with pytest.raises(ValueError, match="no"):
        r_precision(torch.eye(3), torch.arange(3))


# -- pairs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 9, 1000])
def test_pair_scores_equal_a_loop(block: int):
    queries = _embeddings(40, 5, 4)
    answers = queries + 0.7 * _embeddings(40, 5, 5)
    first, reciprocal = 0, 0.0
    for i, query in enumerate(queries.tolist()):
        order = sorted(range(40), key=lambda j: -_cosine(query, answers[j].tolist()))
        rank = order.index(i) + 1
        first += rank == 1
        reciprocal += 1 / rank
    scores = pair_scores(queries, answers, block=block)
    assert 0.2 < first / 40 < 0.95
    assert scores.precision_at_1 == first / 40
    assert scores.reciprocal_rank == pytest.approx(reciprocal / 40, abs=1e-12)


def test_a_collapsed_encoder_scores_as_badly_as_it_is():
    same = torch.ones(10, 3)
    assert pair_scores(same, same).precision_at_1 == 0.0
    assert pair_scores(same, same).reciprocal_rank == pytest.approx(0.1)


def test_pair_scores_refuse_sides_of_different_length():
    with pytest.raises(ValueError, match="3 queries and 2 answers"):
        pair_scores(torch.eye(3), torch.eye(3)[:2])


# -- losses ------------------------------------------------------------------------------------------------------------


def test_cosine_softmax_equals_a_loop_and_ignores_length():
    loss = CosineSoftmax(5, 4, scale=3.0, generator=torch.Generator().manual_seed(6)).double()
    embeddings, labels = _embeddings(8, 4, 7), torch.arange(8) % 5
    each = [
        _cross_entropy([3.0 * _cosine(e, w) for w in loss.weight.tolist()], label)
        for e, label in zip(embeddings.tolist(), labels.tolist(), strict=True)
    ]
    assert loss(embeddings, labels).item() == pytest.approx(sum(each) / 8, abs=1e-12)
    assert loss(9 * embeddings, labels).item() == pytest.approx(sum(each) / 8, abs=1e-12)


def test_cosine_softmax_draws_its_class_vectors_from_the_generator():
    weights = [CosineSoftmax(3, 2, generator=torch.Generator().manual_seed(s)).weight for s in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_multiple_negatives_ranking_equals_a_loop_over_both_directions():
    queries, answers = _embeddings(6, 4, 8), _embeddings(6, 4, 9)
    left, right = queries.tolist(), answers.tolist()
    total = 0.0
    for i in range(6):
        total += _cross_entropy([20 * _cosine(left[i], right[j]) for j in range(6)], i)
        total += _cross_entropy([20 * _cosine(left[j], right[i]) for j in range(6)], i)
    assert MultipleNegativesRanking(scale=20)(queries, answers).item() == pytest.approx(total / 12, abs=1e-10)

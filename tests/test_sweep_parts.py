"""The parts of a sweep, each against the same thing said in plain Python, or against the library that it follows."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import small
from torchrecycle.similarity import pair_ranks, r_precision_of_each
from torchrecycle.similarity.heads import ResidualHead, class_head, embedding_head
from torchrecycle.similarity.loaders import GroupBatches
from torchrecycle.similarity.losses import LossError
from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.datasets import (
    PadTexts,
    PairBatches,
    PairTexts,
    TextObjects,
    tokenised,
    two_by_two,
)
from torchrecycle.sweep.encoders import (
    FirstToken,
    ImageEncoder,
    MeanPool,
    PooledOutput,
    TextEncoder,
)
from torchrecycle.sweep.estimates import difference, estimate
from torchrecycle.sweep.halving import FACTORS
from torchrecycle.sweep.journal import Journal, JournalError, trial_from_json
from torchrecycle.sweep.levels import parse_levels
from torchrecycle.sweep.objective_task import Objective
from torchrecycle.sweep.objectives import Classify, Matching, Similar
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.rates import scaled
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint, Found, Trial
from torchrecycle.sweep.splits import (
    MOST_VALIDATION,
    SplitError,
    Splits,
    in_order,
    split_by_class,
    split_pairs,
    split_within_classes,
)
from torchrecycle.sweep.task import Evaluation, Split
from torchrecycle.sweep.trunks import Trunk, _preprocessing

NAN = math.nan


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- estimates ---------------------------------------------------------------------------------------------------------


def _clustered(seed: int, clusters: int = 60) -> tuple[list[float], list[int]]:
    """Objects of which those of a cluster are alike, in clusters of one to eight."""
    chance = random.Random(seed)
    scores, belongs = [], []
    for cluster in range(clusters):
        middle = chance.gauss(0.5, 0.2)
        for _ in range(chance.randint(1, 8)):
            scores.append(middle + chance.gauss(0, 0.1))
            belongs.append(cluster)
    return scores, belongs


def _variance_in_a_loop(scores: Sequence[float], clusters: Sequence[int]) -> float:
    asked = [i for i, score in enumerate(scores) if not math.isnan(score)]
    mean = sum(scores[i] for i in asked) / len(asked)
    total, groups = 0.0, sorted({clusters[i] for i in asked})
    for group in groups:
        inside = sum(scores[i] - mean for i in asked if clusters[i] == group)
        total += inside * inside
    return len(groups) / (len(groups) - 1) * total / len(asked) ** 2


def test_a_standard_error_is_that_of_liang_and_zeger_in_a_plain_loop():
    scores, clusters = _clustered(0)
    found = estimate([scores], clusters)
    assert found.mean == pytest.approx(sum(scores) / len(scores), abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(_variance_in_a_loop(scores, clusters)), rel=1e-12)


def test_a_standard_error_is_that_of_a_bootstrap_by_cluster():
    scores, clusters = _clustered(1)
    chance = np.random.default_rng(0)
    sums = np.bincount(clusters, weights=scores)
    counts = np.bincount(clusters)
    drawn = chance.integers(0, len(sums), (5000, len(sums)))
    bootstrap = float((sums[drawn].sum(1) / counts[drawn].sum(1)).std())
    assert estimate([scores], clusters).error == pytest.approx(bootstrap, rel=0.1)
    alone = estimate([scores], range(len(scores))).error  # as if each object were a draw of its own
    assert alone < 0.7 * bootstrap


def test_objects_that_are_not_asked_count_in_nothing():
    scores, clusters = _clustered(2)
    with_others = [NAN, *scores, NAN, NAN]
    belongs = [3, *clusters, 999, 1000]
    assert estimate([with_others], belongs) == estimate([scores], clusters)
    assert difference([with_others], [[NAN, *([0.1] * len(scores)), NAN, NAN]], belongs).mean == pytest.approx(
        sum(scores) / len(scores) - 0.1
    )


def test_seeds_add_the_variance_of_their_means():
    scores, clusters = _clustered(3)
    seeds = [[score + shift for score in scores] for shift in (-0.1, 0.0, 0.1)]
    found = estimate(seeds, clusters)
    assert found.mean == pytest.approx(sum(scores) / len(scores))
    variance = _variance_in_a_loop(scores, clusters) + 0.01 / 3  # of -0.1, 0, 0.1 the variance is 0.01
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_in_one_cluster_the_objects_are_the_draws_and_one_object_has_no_error_to_tell():
    assert estimate([[1.0, 0.0, 1.0]], [5, 5, 5]) == estimate([[1.0, 0.0, 1.0]], [1, 2, 3])
    assert estimate([[1.0]], [5]).error == 0.0
    assert estimate([[1.0], [0.0]], [5]).error == pytest.approx(math.sqrt(0.5 / 2))  # of the seeds


def test_a_difference_object_by_object_is_far_sharper_than_one_of_means():
    scores, clusters = _clustered(4)
    chance = random.Random(0)
    better = [score + 0.05 + chance.gauss(0, 0.02) for score in scores]
    found = difference([better], [scores], clusters)
    assert found.mean == pytest.approx(0.05, abs=0.01)
    each = [a - b for a, b in zip(better, scores, strict=True)]
    assert found.error == pytest.approx(math.sqrt(_variance_in_a_loop(each, clusters)), rel=1e-9)
    assert found.error < estimate([better], clusters).error / 5
    assert difference([scores], [better], clusters).mean == pytest.approx(-found.mean)


# -- splits ------------------------------------------------------------------------------------------------------------


def _digest(splits: Splits) -> str:
    return hashlib.sha256(json.dumps([splits.train, splits.validation, splits.test]).encode()).hexdigest()[:16]


def _objects(sizes: Sequence[int]) -> tuple[list[str], list[str]]:
    labels = [f"class {c}" for c, size in enumerate(sizes) for _ in range(size)]
    return [f"picture {i}" for i in range(len(labels))], labels


SIZES = (5, 2, 9, 12, 3, 30, 4, 7, 2, 6, 8, 40)


def test_by_class_no_class_is_in_two_splits_and_half_of_them_are_tested():
    names, labels = _objects(SIZES)
    splits = split_by_class(names, labels)
    classes = [{labels[i] for i in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(each) for each in classes] == [4, 2, 6]
    assert len(set.union(*classes)) == 12
    assert sorted(splits.train + splits.validation + splits.test) == list(range(len(names)))


def test_within_classes_each_has_something_to_train_and_to_test_and_nothing_twice():
    names, labels = _objects(SIZES)
    splits = split_within_classes(names, labels)
    parts = (splits.train, splits.validation, splits.test)
    assert sorted(sum(parts, ())) == list(range(len(names)))
    count = [Counter(labels[i] for i in part) for part in parts]
    for c, size in enumerate(SIZES):
        name = f"class {c}"
        held = max(1, round(0.2 * size))
        chosen = max(1, round(0.1 * size)) if size > 2 else 0
        assert [each[name] for each in count] == [size - held - chosen, chosen, held]
        assert count[0][name] >= 1


def test_splits_are_pinned():
    names, labels = _objects(SIZES)
    left, right = [f"q{i % 37}" for i in range(50)], [f"a{i}" for i in range(50)]
    assert in_order("abcdef") == ["f", "d", "a", "c", "b", "e"]
    assert _digest(split_by_class(names, labels)) == "80504af451bff98a"
    assert _digest(split_by_class(names, labels, seed=1)) == "7cf1a956dcaab901"
    assert _digest(split_within_classes(names, labels)) == "416475b6e4261094"
    assert _digest(split_pairs(left, right)) == "f1fa77305a81a68a"


def test_what_comes_in_another_order_is_split_the_same():
    names, labels = _objects(SIZES)
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    for divide in (split_by_class, split_within_classes):
        first = divide(names, labels)
        second = divide([names[i] for i in order], [labels[i] for i in order])
        for part in ("train", "validation", "test"):
            assert {names[i] for i in getattr(first, part)} == {names[order[i]] for i in getattr(second, part)}


@pytest.mark.parametrize("divide", [split_by_class, split_within_classes])
def test_a_fraction_thins_what_is_trained_on_and_nothing_else(divide: Any):
    names, labels = _objects(SIZES)
    whole, part = divide(names, labels), divide(names, labels, fraction=0.5)
    assert (part.validation, part.test) == (whole.validation, whole.test)
    assert set(part.train) < set(whole.train)
    for label, count in Counter(labels[i] for i in whole.train).items():
        least = 2 if divide is split_by_class else 1
        assert sum(labels[i] == label for i in part.train) == max(least, math.ceil(count / 2))
    assert divide(names, labels, fraction=1.0) == whole


def test_a_fraction_thins_the_pairs_that_are_trained_on_and_nothing_else():
    left, right = [f"q{i}" for i in range(100)], [f"a{i}" for i in range(100)]
    whole, part = split_pairs(left, right), split_pairs(left, right, fraction=0.25)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (70, 10, 20)
    assert (part.validation, part.test) == (whole.validation, whole.test)
    assert set(part.train) < set(whole.train)
    assert len(part.train) == math.ceil(0.25 * 70)


def test_no_text_of_pairs_is_in_two_splits_nor_twice_in_one():
    chance = random.Random(0)
    left = [f"q{chance.randrange(150)}" for _ in range(200)]
    right = [f"a{chance.randrange(400)}" for _ in range(200)]
    splits = split_pairs(left, right)
    seen: set[str] = set()
    for part in (splits.train, splits.validation, splits.test):
        texts = [side[i] for i in part for side in (left, right)]
        assert len(texts) == len(set(texts)) > 0
        assert not seen & set(texts)
        seen |= set(texts)


def test_pairs_that_all_hang_together_can_only_be_trained_on_and_are_refused():
    chain = [f"text {i}" for i in range(40)]
    with pytest.raises(SplitError, match=r"40 pairs are too few to test .* the largest of 40 pairs"):
        split_pairs([chain[i // 2] for i in range(40)], [f"{chain[(i + 1) // 2]}'" for i in range(40)])
    with pytest.raises(SplitError, match="3 pairs are too few"):
        split_pairs("abc", "def")


def test_a_class_of_two_has_one_to_train_and_one_to_test():
    splits = split_within_classes(["a", "b", "c", "d", "e"], ["x", "x", "y", "y", "y"])
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 1, 2)
    assert [sum(i < 2 for i in part) for part in (splits.train, splits.validation, splits.test)] == [1, 0, 1]


def test_too_few_classes_or_objects_are_refused_with_what_would_do():
    names, labels = _objects([4] * 6)
    with pytest.raises(SplitError, match=r"takes 7 classes or more, and there are 6: add classes, or .*classify"):
        split_by_class(names, labels)
    splits = split_by_class(*_objects([4] * 7))
    assert len({i // 4 for i in splits.train}) == 2  # of one class alone nothing would be learned
    with pytest.raises(SplitError, match="class 'y' has one member"):
        split_within_classes(["a", "b", "c", "d"], ["x", "x", "x", "y"])
    with pytest.raises(SplitError, match="no class has three members"):
        split_within_classes(["a", "b", "c", "d"], ["x", "x", "y", "y"])
    with pytest.raises(SplitError, match="nothing to tell apart in 1 class"):
        split_within_classes(["a", "b", "c"], ["x", "x", "x"])
    assert issubclass(SplitError, ValueError)


def test_no_more_is_held_out_to_choose_a_rate_than_is_needed():
    assert len(split_within_classes(*_objects([4000, 6000])).validation) == MOST_VALIDATION
    assert len(split_within_classes(*_objects([400, 600])).validation) == 100
    assert len(split_by_class(*_objects([200] * 40)).validation) == 2 * 200  # a third class would be more than enough
    assert len(split_by_class(*_objects([400] * 40)).validation) == 2 * 400  # but one class alone measures nothing
    many = [str(i) for i in range(9000)]
    assert len(split_pairs(many, [f"{i}'" for i in many]).validation) == MOST_VALIDATION


# -- the journal -------------------------------------------------------------------------------------------------------

TRIAL = Trial(
    level="50",
    purpose="final",
    seed=3,
    recipe=Recipe(epochs=2, suffix_rate=0.1 + 0.2, head_rate=1e-3, scale=1 / 3),
    curve=(EpochPoint(1, 1 / 7, 2.3, None), EpochPoint(2, 2 / 7, NAN, 0.1)),
    quality={"R-precision": 1 / 3, "zero": 5e-324},
    scores={"R-precision": (0.1, NAN, 2 / 3), "zero": (math.inf,)},
    found=(Found(4, (7, 2), (True, False), 'say: "so" – ‹é›'), Found(5, (), (), "")),
)


def test_a_trial_comes_back_to_the_bit_not_a_number_included(tmp_path: Path):
    journal = Journal(tmp_path / "new" / "journal")
    assert not journal.folder.parent.exists()  # making one writes nothing
    journal.write("key", {"kind": "trial", "trial": asdict(TRIAL)})
    record = journal.read("key", "trial")
    assert record is not None
    back = trial_from_json(record["trial"])
    assert repr(back) == repr(TRIAL)
    assert repr(back.scores) == repr(TRIAL.scores)
    assert back.found == TRIAL.found
    assert [path.name for path in journal.folder.iterdir()] == ["key.json"]


def test_other_facts_are_another_key_and_their_order_does_not_count():
    facts = {"task": "abc", "seed": 0, "rate": 1e-3, "cut": None, "recipe": {"epochs": 1, "scale": 4.0}}
    known = {Journal.key(facts)}
    for change in (
        {"seed": 1},
        {"rate": 1e-3 * (1 + 1e-15)},
        {"cut": "None"},
        {"recipe": {"epochs": 1, "scale": 4.0000001}},
        {"more": None},
        {"task": "abd"},
    ):
        known.add(Journal.key({**facts, **change}))
    assert len(known) == 7
    assert Journal.key(dict(reversed(facts.items()))) == Journal.key(facts)


def test_what_is_not_there_is_none_and_kinds_are_told_apart(tmp_path: Path):
    journal = Journal(tmp_path)
    assert journal.read("nothing", "trial") is None
    for number in range(3):
        journal.write(f"fill-{number}", {"kind": "fill", "seconds": number})
    journal.write("other", {"kind": "place"})
    assert [record["seconds"] for record in journal.all("fill")] == [0, 1, 2]
    assert (journal.count("fill"), journal.count("place"), journal.count("trial")) == (3, 1, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"kind": "trial", "trial": {"le', b"\xff\xfe\x00", b"[1, 2]", b"{}", b'{"kind": "fill", "seconds": 1}'],
    ids=["empty", "cut off", "no text", "a list", "no kind", "another kind"],
)
def test_a_damaged_record_is_named_with_what_to_do(tmp_path: Path, content: bytes):
    path = tmp_path / "0123.json"
    path.write_bytes(content)
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path).read("0123", "trial")
    assert str(path) in str(caught.value)
    assert "delete it, and it is made anew" in str(caught.value)
    assert path.read_bytes() == content  # reading never writes


def test_a_writer_that_is_killed_amid_a_write_leaves_no_half_record(tmp_path: Path):
    code = (
        "import itertools, sys; from pathlib import Path; from torchrecycle.sweep.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    journal.write('one', {'kind': 'trial', 'number': number, 'much': [number] * 300_000})\n"
        "    print(number, flush=True)\n"
    )
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = int(process.stdout.readline())
        time.sleep(0.02 + 0.03 * attempt)
        process.send_signal(signal.SIGKILL)
        told = max([told, *map(int, process.stdout.read().split())])
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        record = Journal(folder).read("one", "trial")
        assert record is not None
        assert record["number"] in (told, told + 1)
        assert record["much"] == [record["number"]] * 300_000
        assert Journal(folder).count("trial") == 1  # what was half written is no record


def test_a_journal_that_cannot_be_written_says_what_is_kept(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalError, match=r"cannot write to .*file"):
        Journal(tmp_path / "file" / "journal").write("key", {"kind": "trial"})


# -- objectives --------------------------------------------------------------------------------------------------------

NAMES = tuple(f"class {i}" for i in range(6))


def _evaluate(
    objective: Objective,
    outputs: Tensor,
    targets: Tensor,
    queries: Sequence[int] = (),
    *,
    known: tuple[Tensor, Tensor] | None = None,
) -> Evaluation:
    """In batches of seven, as a loader would give them."""
    batches = list(zip(outputs.split(7), targets.split(7), strict=True))
    split = Split(range(len(outputs)), labels=tuple(targets.tolist()))
    return objective.evaluate(lambda batch: batch, batches, split, queries, known=None if known is None else [known])


def _labels(count: int, classes: int, seed: int) -> Tensor:
    weights = torch.arange(1, classes + 1).float()  # classes of many sizes
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def test_accuracy_and_mean_recall_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    labels = _labels(80, 6, 0)
    labels[labels == 2] = 3  # a class that the split does not have
    outputs = _random(80, 6, seed=1) + 2 * F.one_hot(labels, 6)
    outputs[:, 2] = -9.0
    found = _evaluate(Classify(NAMES), outputs, labels)
    said = outputs.argmax(1)
    assert found.quality["accuracy"] == pytest.approx(accuracy_score(labels, said))
    assert found.quality["mean recall"] == pytest.approx(balanced_accuracy_score(labels, said))
    assert 0.3 < found.quality["accuracy"] < 0.95
    assert abs(found.quality["accuracy"] - found.quality["mean recall"]) > 0.01
    for metric, scores in found.scores.items():
        assert len(scores) == 80
        assert sum(scores) / 80 == pytest.approx(found.quality[metric])


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def test_without_training_a_class_is_told_by_the_nearest_mean_of_the_training_split():
    labels, known_labels = _labels(60, 5, 2), _labels(40, 5, 6)
    centres = _random(5, 8, seed=3)
    features = centres[labels] + 0.9 * _random(60, 8, seed=4)
    known = centres[known_labels] + 0.9 * _random(40, 8, seed=7)
    means = {}
    for c in sorted(set(known_labels.tolist())):
        members = [row for row, label in zip(known.tolist(), known_labels.tolist(), strict=True) if label == c]
        means[c] = [sum(column) / len(members) for column in zip(*members, strict=True)]
    right = []
    for row, label in zip(features.tolist(), labels.tolist(), strict=True):
        cosines = {c: _cosine(row, mean) for c, mean in means.items()}
        right.append(float(max(cosines, key=lambda c: cosines[c]) == label))
    found = _evaluate(Classify(NAMES), features, labels, known=(known, known_labels))  # the sixth class has no member
    assert found.scores["accuracy"] == tuple(right)
    assert 0.3 < found.quality["accuracy"] < 0.95
    scaled = _evaluate(Classify(NAMES), 7 * features, labels, known=(7 * known, known_labels))
    assert scaled.scores == found.scores


def test_what_a_classifier_finds_is_the_nearest_of_its_scores_and_what_it_says():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    outputs = 3.0 * F.one_hot(labels, 3) + 0.1 * _random(8, 3, seed=5)
    outputs[3] = torch.tensor([4.0, 0.0, 0.0])  # taken for class 0
    found = _evaluate(Classify(NAMES[:3]), outputs, labels, [0, 3]).found
    assert [each.query for each in found] == [0, 3]
    assert set(found[0].nearest[:3]) == {1, 3, 6}
    assert all((n != 0) and hit == (labels[n] == 0) for n, hit in zip(found[0].nearest, found[0].right, strict=True))
    assert found[1].right[:3] == (False, False, False)
    sure = torch.tensor([4.0, 0.0, 0.0]).softmax(0)[0]
    assert found[1].note == f"told to be class 0 ({sure:.0%} sure)"
    before = _evaluate(Classify(NAMES[:3]), outputs, labels, [0], known=(outputs, labels)).found
    assert "sure" not in before[0].note


def _relatives_in_a_loop(embeddings: list[list[float]], labels: list[int]) -> list[float]:
    shares = []
    for i, label in enumerate(labels):
        relatives = labels.count(label) - 1
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -_cosine(embeddings[i], embeddings[j]))
        hits = sum(labels[j] == label for j in others[:relatives])
        shares.append(hits / relatives if relatives else NAN)
    return shares


def test_r_precision_of_each_object_equals_a_plain_loop_and_is_no_number_where_none_is_asked():
    labels = _labels(50, 6, 6)
    labels[0] = 99
    embeddings = F.normalize(_random(100, 5, seed=7)[labels] + 0.9 * _random(50, 5, seed=8), dim=1)
    expected = _relatives_in_a_loop(embeddings.tolist(), labels.tolist())
    for block in (1, 7, 1024):
        each = r_precision_of_each(embeddings, labels, block=block)
        assert each.isnan().tolist() == [True] + [False] * 49
        assert each[1:].tolist() == pytest.approx(expected[1:], abs=1e-12)
    found = _evaluate(Similar(NAMES), embeddings, labels, [0, 4])
    assert found.scores["R-precision"][1:] == pytest.approx(expected[1:], abs=1e-12)
    assert math.isnan(found.scores["R-precision"][0])
    assert found.quality["R-precision"] == pytest.approx(sum(expected[1:]) / 49)
    for each in found.found:
        order = sorted(
            (j for j in range(50) if j != each.query),
            key=lambda j: -_cosine(embeddings[each.query].tolist(), embeddings[j].tolist()),
        )
        assert each.nearest == tuple(order[:5])
        assert each.right == tuple(bool(labels[j] == labels[each.query]) for j in order[:5])


def test_ranks_of_pairs_equal_a_plain_loop_and_ties_are_lost():
    left, right = _random(30, 6, seed=9), _random(30, 6, seed=9) + 0.8 * _random(30, 6, seed=10)
    right[4] = right[5]
    expected = []
    for i in range(30):
        cosines = [_cosine(left[i].tolist(), row) for row in right.tolist()]
        expected.append(sum(cosine >= cosines[i] for cosine in cosines))
    for block in (1, 7, 1024):
        assert pair_ranks(left, right, block=block).tolist() == expected
    assert 1 < max(expected) <= 30
    assert pair_ranks(torch.ones(3, 2), torch.ones(3, 2)).tolist() == [3, 3, 3]


def test_matching_scores_neighbours_and_notes_equal_a_plain_loop():
    left = F.normalize(_random(40, 6, seed=11), dim=1)
    right = F.normalize(left + 0.5 * _random(40, 6, seed=12), dim=1)
    found = _evaluate(Matching(), torch.cat([left, right]), torch.arange(80) % 40, [0, 17])
    ranks = []
    for i in range(40):
        order = sorted(range(40), key=lambda j: -_cosine(left[i].tolist(), right[j].tolist()))
        ranks.append(order.index(i) + 1)
        for each in found.found:
            if each.query == i:
                assert each.nearest == tuple(40 + j for j in order[:5])
                assert each.right == tuple(j == i for j in order[:5])
                assert each.note == f"its own is ranked {ranks[i]} of 40"
    assert found.scores["reciprocal rank"] == pytest.approx([1 / rank for rank in ranks])
    assert found.scores["precision@1"] == tuple(float(rank == 1) for rank in ranks)
    assert found.quality["reciprocal rank"] == pytest.approx(sum(1 / rank for rank in ranks) / 40)
    assert 0.2 < found.quality["precision@1"] < 0.95
    assert Matching().clusters(Split(range(80))) == tuple(range(40))


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_outputs_that_are_not_finite_have_no_quality(bad: float):
    outputs = _random(8, 4, seed=13)
    outputs[3, 1] = bad
    for objective in (Classify(NAMES[:4]), Similar(NAMES), Matching()):
        with pytest.raises(NotFiniteError, match="NaN or infinity"):
            _evaluate(objective, outputs, torch.arange(8) % 4)
    with pytest.raises(ValueError, match="diverged"):
        r_precision_of_each(outputs, torch.arange(8) % 4)
    with pytest.raises(ValueError, match="diverged"):
        pair_ranks(outputs[:4], outputs[4:])


# -- levels and rates --------------------------------------------------------------------------------------------------


def test_levels_are_distinct_and_from_no_recycling_to_all():
    assert parse_levels([" head", "75 %", "full", "50", "50%", "5", ""]) == ("full", "5", "50", "75", "head")


@pytest.mark.parametrize("level", ["0", "100", "half", "-5", "5.5", "1e1", "FULL"])
def test_what_is_no_level_is_named_with_what_would_be(level: str):
    with pytest.raises(SweepError, match=rf"'{level}' is no level: give full, head, or .* --levels full,50,75,head"):
        parse_levels(["full", level])


def test_no_level_at_all_is_refused():
    with pytest.raises(SweepError, match="no level is given"):
        parse_levels(["", " "])


def test_the_rate_that_is_looked_for_is_the_trunk_s_or_of_the_head_alone_the_head_s():
    recipe = Recipe(epochs=10, suffix_rate=1e-3, head_rate=2e-3)
    assert [scaled(recipe, "50", factor).suffix_rate for factor in FACTORS] == [1e-3, 3e-3, 3.3e-4, 9e-3, 1.1e-4]
    assert [scaled(recipe, "head", factor).head_rate for factor in FACTORS] == [2e-3, 6e-3, 6.7e-4, 1.8e-2, 2.2e-4]
    assert {scaled(recipe, "50", factor).head_rate for factor in FACTORS} == {2e-3}
    assert {scaled(recipe, "head", factor).suffix_rate for factor in FACTORS} == {1e-3}


# -- data sets ---------------------------------------------------------------------------------------------------------


def _flower() -> Any:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg")).resize((161, 107))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "test_resnet", "eva02_base_patch14_448"],
)
def test_a_picture_is_prepared_as_timm_does_it(name: str):
    """EVA-02 squeezes the whole picture into a square; the others take the middle."""
    import timm

    said = timm.get_pretrained_cfg(name)
    assert said is not None
    module = nn.Identity()
    module.pretrained_cfg = said.to_dict()  # pyright: ignore
    config = timm.data.resolve_data_config(pretrained_cfg=said.to_dict())
    trunk = Trunk(name=f"timm/{name}", module=module, pool=nn.Identity(), dim=0, weights="", random=True)
    ours = _preprocessing(trunk, "timm", config["input_size"][-1])
    assert (ours.crop is None) == ("eva02" in name)
    picture = ours.transform()(_flower())
    assert torch.equal(picture, timm.data.create_transform(**config)(_flower()))
    assert picture.shape == config["input_size"]


def test_a_picture_is_prepared_as_torchvision_publishes_it_for_every_classifier():
    from torchvision import models

    flower, seen = _flower(), 0
    for name in models.list_models(module=models):
        best = models.get_model_weights(name).DEFAULT
        published = best.transforms()
        trunk = Trunk(
            name=f"torchvision/{name}", module=nn.Identity(), pool=nn.Identity(), dim=0, weights="", random=True
        )
        ours = _preprocessing(trunk, "torchvision", published.crop_size[0])
        theirs = (published.crop_size[0], published.resize_size[0], published.interpolation.value)
        assert ours.crop is not None
        assert (ours.size, int(ours.size / ours.crop), ours.interpolation) == theirs, name
        assert (ours.mean, ours.std) == (tuple(published.mean), tuple(published.std)), name
        if name in ("resnet18", "resnet50", "efficientnet_b1", "efficientnet_v2_l"):
            assert torch.equal(ours.transform()(flower), published(flower)), name
            seen += 1
    assert seen == 4


def test_texts_are_padded_behind_and_all_else_is_stacked():
    ids = [torch.tensor(each) for each in ([5, 6, 7], [8], [9, 9])]
    data = TextObjects(ids, [2, 0, 1])
    batch = PadTexts(3)([data[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3], [9, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["label"].tolist() == [2, 0, 1]


def test_texts_are_cut_off_after_so_many_tokens():
    ids = tokenised(small.tokenizer(), ["one two three four five", "one"], tokens=4)
    assert [len(each) for each in ids] == [4, 3]
    assert ids[0][0] == ids[1][0]


@pytest.mark.parametrize(
    ("pairs", "size", "steps"), [(64, 32, [32, 32]), (48, 32, [32, 16]), (47, 32, [32]), (5, 32, [5]), (3, 2, [2, 1])]
)
def test_pairs_come_left_and_then_right_and_a_small_rest_is_left_out(pairs: int, size: int, steps: list[int]):
    sampler = PairBatches(pairs, batch_size=size, generator=torch.Generator().manual_seed(0))
    batches = list(sampler)
    assert len(sampler) == len(batches) == 2 * len(steps)
    assert [len(left) for left, _ in two_by_two(batches)] == steps
    seen = [i for left, _ in two_by_two(batches) for i in left]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(pairs))
    assert all(right == [i + pairs for i in left] for left, right in two_by_two(batches))
    again = list(PairBatches(pairs, batch_size=size, generator=torch.Generator().manual_seed(0)))
    assert again == batches
    if pairs > 5:
        assert list(sampler) != batches  # another order in the next epoch


def test_a_text_and_the_one_that_belongs_to_it_have_the_same_number():
    left, right = ([torch.tensor([i + shift]) for i in range(5)] for shift in (0, 50))
    data = PairTexts(left, right)
    loader = DataLoader(data, batch_sampler=PairBatches(5, batch_size=5), collate_fn=PadTexts(0))
    ((first, second),) = two_by_two(loader)
    assert torch.equal(first["pair"], second["pair"])
    assert torch.equal(first["input_ids"] + 50, second["input_ids"])
    assert len(data) == 10


# -- encoders ----------------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A trunk of texts: an embedding, seen as hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


@torch.no_grad()
def test_heads_start_as_no_head():
    x = _random(5, 7, seed=14)
    assert torch.equal(ResidualHead(7)(x), x)
    assert torch.equal(class_head("linear", 7, 3)(x), torch.zeros(5, 3))
    pictures = _random(2, 3, 8, 8, seed=15)
    trunk = nn.Conv2d(3, 6, 3)
    pooled = trunk(pictures).mean((2, 3))
    torch.testing.assert_close(ImageEncoder(trunk, ResidualHead(6))(pictures), F.normalize(pooled, dim=1))
    assert torch.equal(ImageEncoder(trunk, class_head("linear", 6, 4), unit=False)(pictures), torch.zeros(2, 4))


def test_a_head_that_starts_as_none_learns_all_the_same():
    head = ResidualHead(4)
    head(_random(3, 4, seed=16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())


@torch.no_grad()
def test_a_text_is_pooled_without_its_padding():
    trunk, ids = Hidden(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = trunk.embedding.weight
    mean = torch.stack([rows[[1, 2, 3, 4]].mean(0), rows[[5, 6]].mean(0)])
    torch.testing.assert_close(MeanPool()(rows[ids], mask), mean)
    assert torch.equal(FirstToken()(rows[ids], mask), rows[[1, 5]])
    torch.testing.assert_close(TextEncoder(trunk, ResidualHead(6))(ids, mask), F.normalize(mean, dim=1))
    first = TextEncoder(trunk, ResidualHead(6), unit=False, pool=FirstToken())
    assert torch.equal(first(ids, mask), rows[[1, 5]])


def test_one_vector_is_made_of_maps_of_tokens_and_of_a_model_output():
    maps, tokens = _random(2, 6, 3, 4, seed=17), _random(2, 5, 6, seed=18)
    pool = PooledOutput()
    torch.testing.assert_close(pool(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pool(tokens), tokens.mean(1))
    assert torch.equal(pool(tokens[:, 0]), tokens[:, 0])
    output = SimpleNamespace(pooler_output=tokens[:, 1], last_hidden_state=tokens)
    assert torch.equal(pool(output), tokens[:, 1])
    output.pooler_output = None
    torch.testing.assert_close(pool(output), tokens.mean(1))


# -- heads and losses by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_of_one_layer_or_two_begin_as_no_head(kind: Any):
    x = _random(5, 7, seed=1)
    assert torch.equal(embedding_head(kind, 7)(x), x)
    assert torch.equal(class_head(kind, 7, 3)(x), torch.zeros(5, 3))
    assert len(list(class_head(kind, 7, 3).parameters())) == {"linear": 2, "mlp": 4}[kind]


def test_batches_by_class_hold_several_objects_of_each_and_every_object_comes():
    labels = [i // 6 for i in range(60)] + [10]
    batches = GroupBatches(labels, batch_size=16, generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(30):
        drawn = list(batches)
        assert len(drawn) == len(batches) == 4
        for batch in drawn:
            counts = torch.bincount(torch.tensor([labels[i] for i in batch]))
            assert sorted(counts[counts > 0].tolist()) == [4, 4, 4, 4]
            seen |= set(batch)
    assert seen == set(range(61))
    assert list(batches) != list(batches)


@pytest.mark.parametrize("name", ["SupConLoss", "ArcFaceLoss", "MultiSimilarityLoss", "ProxyAnchorLoss", "NTXentLoss"])
def test_a_loss_of_the_library_pulls_what_is_alike_together(name: str):
    labels = torch.arange(12) % 3
    objective = Similar(NAMES[:3], loss=name)
    loss = objective.make_loss(8, Recipe(epochs=1, suffix_rate=0.0, head_rate=0.0), seed=3)
    again = objective.make_loss(8, Recipe(epochs=1, suffix_rate=0.0, head_rate=0.0), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(loss.parameters(), again.parameters(), strict=True))
    apart = F.normalize(_random(12, 8, seed=5), dim=-1)
    together = torch.eye(8)[labels] if name not in ("ArcFaceLoss", "ProxyAnchorLoss") else None
    if together is None:
        vectors = next(iter(loss.parameters()))
        together = F.normalize((vectors.T if name == "ArcFaceLoss" else vectors)[labels], dim=-1)
    assert loss(together, labels) < loss(apart, labels)
    split = Split(range(12), labels=tuple(labels.tolist()))
    arguments = objective.loader_arguments(split, Recipe(1, 0.0, 0.0, batch_size=8), torch.Generator())
    assert ("batch_sampler" in arguments) == (name not in ("ArcFaceLoss", "ProxyAnchorLoss"))


def test_a_loss_that_is_none_or_does_not_suit_is_named_with_some_that_do():
    for wrong in ("NoSuchLoss", "CrossBatchMemory", "BaseMetricLossFunction"):
        with pytest.raises(LossError, match=f"'{wrong}'.*SupConLoss"):
            Similar(NAMES, loss=wrong)
    with pytest.raises(LossError, match="learns a vector for each class"):
        Matching(loss="ArcFaceLoss")
    with pytest.raises(LossError, match="cross-entropy or label-smoothing"):
        Classify(NAMES, loss="SupConLoss")

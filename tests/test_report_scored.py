"""Were two sweeps tested on the same objects, and is their difference more than chance, object by object?"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import report_samples as samples
from test_cli_sweep import shapes, works  # noqa: F401  (a fixture)
from test_report_reading import saved, write
from torchrecycle.cli import app
from torchrecycle.report.compare import compare
from torchrecycle.report.compare_page import html_of_comparison
from torchrecycle.report.reading import read_result
from torchrecycle.sweep import Split, Task, sweep
from torchrecycle.sweep.estimates import difference, estimate
from torchrecycle.sweep.results import Estimate, Sample, SweepResult
from torchrecycle.sweep.scored import OWN, SCORES, Scored, ScoresError, keep_scored, read_scored, scored_of

runner = CliRunner()
METRIC = "R-precision"
A = samples.images()
CLUSTERS = tuple(at // 5 for at in range(60))


def drawn(seed: int, by: float = 0.0) -> tuple[float, ...]:
    """Scores of objects of which some are hard; who does better does so at each of them."""
    hard, own = random.Random(0), random.Random(seed)
    cluster = [0.4 + 0.5 * hard.random() for _ in range(12)]
    return tuple(cluster[at // 5] + by + 0.01 * own.random() for at in range(60))


def scored(by: float = 0.0, *, seeds: tuple[int, ...] = (1,), **changes: Any) -> Scored:
    scores = {"50": {METRIC: tuple(drawn(seed, by) for seed in seeds)}}
    known = Scored("all", "ordered", True, OWN, CLUSTERS, scores)
    return replace(known, **changes)


def result(known: Scored, **ran: Any) -> SweepResult:
    """With the quality that the scores come to."""
    half = A.of("50")
    quality = {METRIC: estimate(known.scores["50"][METRIC], CLUSTERS)}
    levels = tuple(replace(one, quality=quality) if one is half else one for one in A.levels)
    return replace(A, levels=levels, ran=samples.ran(**ran))


# -- object by object --------------------------------------------------------------------------------------------------


def test_object_by_object_a_small_difference_is_no_chance_though_as_two_tests_it_may_be():
    a, b = scored(), scored(0.02, seeds=(2, 3))
    apart, paired = compare(result(a), result(b)), compare(result(a), result(b), scored=(a, b))
    half = next(pair for pair in paired.pairs if pair.level == "50")
    separate, by = apart.difference(half, METRIC), paired.difference(half, METRIC)
    assert separate is not None
    assert by is not None
    assert by == difference(b.scores["50"][METRIC], a.scores["50"][METRIC], CLUSTERS)
    assert by.mean == pytest.approx(separate.mean)
    assert by.error < 0.2 * separate.error
    assert "by no more than chance explains" in apart.sentence
    assert "higher at 50 % recycled (+0.02" in paired.sentence
    assert apart.how_sure.startswith("that of two separate tests")
    assert paired.how_sure.startswith("told object by object at 50 % recycled, else that of two separate tests")
    told = paired.to_json()["levels"][1]["quality"][METRIC]
    assert (told["object_by_object"], told["error"]) == (True, by.error)
    assert "told object by object at 50 % recycled" in html_of_comparison(paired, names=("a", "b"))


def test_objects_that_belong_together_count_as_one():
    a, b = scored(), scored(seeds=(2,))
    shifted = tuple(x + (0.1 if at // 5 % 2 else -0.1) for at, x in enumerate(b.scores["50"][METRIC][0]))
    b = replace(b, scores={"50": {METRIC: (shifted,)}})
    together = b.difference(a, "50", METRIC)
    alone = replace(b, clusters=None).difference(replace(a, clusters=None), "50", METRIC)
    assert together is not None
    assert alone is not None
    assert together.error > 2 * alone.error


@pytest.mark.parametrize(
    "other",
    [
        scored(order="another"),
        scored(order=""),
        scored(is_of_objects=False),
        scored(clusters=None),
        scored(clusters=CLUSTERS[::-1]),
        scored(scores={}),
        scored(scores={"50": {"precision@1": (drawn(2),)}}),
        scored(scores={"50": {METRIC: (drawn(2)[:59],)}}),
        scored(scores={"50": {METRIC: ((math.nan, *drawn(2)[1:]),)}}),
        scored(scores={"50": {METRIC: ((0.5,),)}}),
    ],
)
def test_scores_of_other_objects_or_of_none_are_not_subtracted(other):
    assert other.difference(scored(), "50", METRIC) is None
    assert scored().difference(other, "50", METRIC) is None


# -- the same objects? -------------------------------------------------------------------------------------------------

OTHER_MODEL = {"model": "timm/resnet18"}


def test_the_same_hash_proves_it_for_any_model_and_name_of_the_data():
    a, b = scored(), scored(0.02)
    other = replace(result(b, **OTHER_MODEL, data="photos/"), untrained={METRIC: Estimate(0.6, 0.01)})
    assert compare(result(a), other).is_same_test is None
    proven = compare(result(a), other, scored=(a, b))
    assert proven.is_same_test is True
    assert proven.warnings == ()
    assert not [one for one in proven.differences if "hash" in one.what]


def test_another_hash_is_another_test_whatever_it_is_called():
    a, b = scored(), scored(objects="others", order="others")
    told = compare(result(a), result(b, **OTHER_MODEL), scored=(a, b))
    assert told.is_same_test is False
    assert told.warnings[0].startswith(
        "Not the same task or test objects: by their hash, the objects of the test split are not the same"
    )
    assert ("hash of the test objects", "all", "others") in [(one.what, one.a, one.b) for one in told.differences]
    assert told.how_sure == ""


def test_the_same_objects_in_another_order_are_the_same_test_but_cannot_be_paired():
    a, b = scored(), scored(0.02, order="another")
    told = compare(result(a), result(b), scored=(a, b))
    assert told.is_same_test is True
    assert told.by_object == {}
    assert "not of the same ones in one order" in told.how_sure


def test_of_an_older_version_the_hash_is_said_to_be_not_known():
    old = Scored()
    told = compare(result(scored()), result(scored(), **OTHER_MODEL), scored=(scored(), old))
    assert told.is_same_test is True
    assert told.warnings[0].endswith("there is nothing that proves it; B has no hash of them.")
    assert ("hash of the test objects", "all", "not known") in [(one.what, one.a, one.b) for one in told.differences]


def test_a_users_own_items_that_differ_may_be_the_same_objects_read_in_another_way():
    a, b = (scored(objects=name, order=name, is_of_objects=False) for name in ("144 px", "160 px"))
    told = compare(result(a), result(b, **OTHER_MODEL), scored=(a, b))
    assert told.is_same_test is None
    assert "another way of reading them" in told.warnings[0]


def test_other_items_that_the_pretrained_model_scores_alike_by_chance_are_not_taken_for_the_same():
    """Among 32 objects it takes few tries to find two sets with the same accuracy."""
    a, b = (scored(objects=name, order=name, is_of_objects=False) for name in ("one set", "another"))
    told = compare(result(a), result(b), scored=(a, b))
    assert told.is_same_test is None
    assert "cannot be told" in told.warnings[0]


# -- precision ---------------------------------------------------------------------------------------------------------


def precisions(a: SweepResult, b: SweepResult, known: tuple[Scored, Scored] | None = None) -> list[tuple[str, str]]:
    return [(one.a, one.b) for one in compare(a, b, scored=known).differences if "precision" in one.what]


def test_the_precision_of_kept_rows_is_compared_wherever_it_is_told():
    plain = samples.ran(settings={})
    whole = replace(A, ran=plain)
    half = replace(A, ran=replace(plain, command=f"{plain.command} --precision float16"))
    assert precisions(whole, half) == [(OWN, "float16")]
    assert precisions(half, half) == []
    levels = tuple(replace(one, predicted=samples.prediction(one, precision="int8")) for one in A.levels)
    assert precisions(whole, replace(whole, levels=levels)) == [(OWN, "int8")]
    assert precisions(whole, whole, (Scored(), Scored(precision="bfloat16"))) == [(OWN, "bfloat16")]
    called = replace(A, ran=replace(plain, command="sweep(...)"))
    assert precisions(half, called) == [("float16", "not known")]
    assert precisions(called, called) == []


class Points(Task):
    """Which side of a plane?"""

    def __init__(self) -> None:
        features = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        self.train = TensorDataset(features[:32], (features[:32, 0] > 0).long())
        self.test = TensorDataset(features[32:], (features[32:, 0] > 0).long())

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        optimizer = torch.optim.SGD(trial.parameters, lr=0.1)
        loss = torch.zeros(())
        for epoch in range(1, 3):
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trial.ended(epoch, loss.detach())

    def evaluate(self, model: nn.Module, loader: Any) -> float:
        return sum(float((model(x).argmax(1) == y).sum()) for x, y in loader) / len(self.test)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_sweep_from_python_is_known_by_what_its_rows_were_filled_with(tmp_path):
    folders = {}
    for name, precision in (("own", None), ("half", "float16")):
        folders[name] = tmp_path / name
        sweep(
            small_model, Points(), levels=("50",), store=tmp_path / f"{name}-rows", results=folders[name],
            precision=precision,
        ).result()  # fmt: skip
    read = {name: read_result(folder) for name, folder in folders.items()}
    known = {name: read_scored(folders[name], read[name]).precision for name in folders}
    assert known == {"own": OWN, "half": "float16"}
    for folder in folders.values():  # as an older version left it
        (folder / SCORES).unlink()
    known = {name: read_scored(folders[name], read[name]).precision for name in folders}
    assert known == {"own": OWN, "half": "float16"}
    shutil.rmtree(folders["half"] / "journal")
    assert read_scored(folders["half"], read["half"]).precision == ""


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back_and_is_of_that_sweep_only(tmp_path):
    known = scored(scores={"50": {METRIC: ((math.nan, *drawn(2)[1:]),)}})
    keep_scored(tmp_path, A, known)
    again = read_scored(tmp_path, A)
    assert math.isnan(again.scores["50"][METRIC][0][0])
    assert again.scores["50"][METRIC][0][1:] == drawn(2)[1:]
    assert replace(again, scores={}) == replace(known, scores={})
    assert read_scored(tmp_path, replace(A, ran=samples.ran(date="2026-11-26T09:00:00+00:00"))) == Scored()
    assert read_scored(tmp_path / "none", A) == Scored()


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 1, "ended": "2026-11-25T18:05:12+00:00"}'])
def test_a_damaged_file_is_one_line_and_exit_code_2(tmp_path, damage):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "results.json", saved(A))
    (tmp_path / "b" / SCORES).write_text(damage)
    with pytest.raises(ScoresError, match="is damaged: move it away"):
        read_scored(tmp_path / "b", A)
    done = runner.invoke(app, ["report", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1


class Said(Points):
    """Texts with their class, which the model gets as numbers."""

    kind = "texts"

    def __init__(self, texts: list[str], size: float = 1.0) -> None:
        super().__init__()
        items = [(size * torch.ones(4), len(text) % 2) for text in texts]
        self.test = Split(items, sample=lambda index: Sample("odd" if len(texts[index]) % 2 else "even", texts[index]))


def test_texts_are_known_by_what_they_say_and_in_which_order():
    first = scored_of(Said(["a", "bb", "ccc"]), A)
    assert first.is_of_objects
    other_model = scored_of(Said(["a", "bb", "ccc"], size=2.0), A)
    assert (other_model.objects, other_model.order) == (first.objects, first.order)
    turned = scored_of(Said(["bb", "a", "ccc"]), A)
    assert turned.objects == first.objects
    assert turned.order != first.order
    assert scored_of(Said(["a", "bb", "cc"]), A).objects != first.objects
    assert scored_of(Said(["a", "bb"]), A).objects != first.objects


def test_a_users_own_data_are_known_by_their_items_and_reading_them_draws_nothing():
    state = torch.get_rng_state()
    known, again = scored_of(Points(), A), scored_of(Points(), A, precision="int8")
    assert torch.equal(torch.get_rng_state(), state)
    assert known.objects == again.objects
    assert not known.is_of_objects
    assert (known.precision, again.precision) == (OWN, "int8")
    other = Points()
    other.test = TensorDataset(other.test.tensors[0] + 1, other.test.tensors[1])
    assert scored_of(other, A).objects != known.objects


class Strange(Points):
    def __init__(self) -> None:
        super().__init__()
        self.test = [(object(), 0), (object(), 1)]


def test_items_that_have_no_key_leave_it_unknown():
    assert scored_of(Strange(), A).objects == ""


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_two_sweeps_of_the_command_line_are_compared_object_by_object(shapes, tmp_path):  # noqa: F811
    small = ["--size", 32, "--levels", "50,head", "--epochs", 1, "--no-search", "--batch", 16]
    outs = {name: tmp_path / name for name in ("own", "half", "other")}
    works("images", shapes, "--model", "timm/test_resnet", *small, "--out", outs["own"])
    works("images", shapes, "--model", "timm/test_resnet", *small, "--out", outs["half"], "--precision", "float16")
    works("images", shapes, "--model", "timm/test_resnet", *small[2:], "--size", 64, "--out", outs["other"])

    def compared(name: str) -> Any:
        done = runner.invoke(app, ["report", "compare", str(outs["own"]), str(outs[name]), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    half, other = compared("half"), compared("other")
    assert {"what": "precision of kept rows", "a": OWN, "b": "float16"} in half["differences"]
    assert half["errors"] == other["errors"] == "told object by object: both were tested on the same ones"
    assert other["same_test_objects"] is True  # though the model sees twice as many pixels
    assert not [line for line in other["warnings"] if "same test" in line or "cannot be told" in line]
    kept = json.loads((outs["own"] / SCORES).read_text(encoding="utf-8"))
    known = read_result(outs["own"])
    for level in known.levels:
        (seed,) = kept["scores"][level.level][known.metric]
        assert sum(seed) / len(seed) == pytest.approx(level.quality[known.metric].mean)
        assert len(seed) == known.ran.splits["test"] == len(kept["clusters"])
    (outs["half"] / SCORES).unlink()  # as an older version leaves it
    old = compared("half")
    assert {"what": "precision of kept rows", "a": OWN, "b": "float16"} in old["differences"]
    assert {"what": "hash of the test objects", "a": kept["objects"], "b": "not known"} in old["differences"]
    assert old["errors"].startswith("that of two separate tests")

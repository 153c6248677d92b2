"""The article's model class as its authors wrote it for Quaterion, with other imports, on pictures of OpenMoji.

"Layer Recycling and Fine-tuning Efficiency" (Sarıgöz, 2022) splits a ResNet-34 before ``layer4`` by hand: a frozen
`Encoder` of the first layers, and a `SequentialHead` of the copied blocks with a `SkipConnectionHead` behind them.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Dict, List, Optional, Union  # noqa: UP035  (as the article has it)

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset

import small  # noqa: F401  (one thread)
from torchrecycle.demo.emoji import draw, toned_classes
from torchrecycle.similarity import (
    AttachedMetric,
    CacheConfig,
    CacheType,
    Encoder,
    EncoderHead,
    Evaluator,
    GroupSampler,
    GroupSimilarityDataLoader,
    Quaterion,
    RecycledEncoder,
    RetrievalRPrecision,
    SequentialHead,
    SimilarityGroupSample,
    SimilarityLoss,
    SimilarityModel,
    SkipConnectionHead,
    TrainableModel,
    TripletLoss,
)
from torchrecycle.similarity.stages import EncoderStage

pytestmark = pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum"
)


# -- what the article's authors wrote, but for the imports -------------------------------------------------------------


class CarsEncoder(Encoder):
    def __init__(self, encoder_model: nn.Module):
        super().__init__()
        self._encoder = encoder_model
        self._embedding_size = 512

    @property
    def trainable(self) -> bool:
        return False

    @property
    def embedding_size(self) -> int:
        return self._embedding_size

    def forward(self, images):
        embeddings = self._encoder.forward(images)
        return embeddings

    def save(self, output_path: str):
        os.makedirs(output_path, exist_ok=True)
        torch.save(self._encoder, os.path.join(output_path, "encoder.pth"))

    @classmethod
    def load(cls, input_path):
        encoder_model = torch.load(os.path.join(input_path, "encoder.pth"), weights_only=False)
        return CarsEncoder(encoder_model)


class Model(TrainableModel):
    def __init__(self, lr: float, mining: str):
        self._lr = lr
        self._mining = mining
        super().__init__()

    def configure_encoders(self) -> Union[Encoder, Dict[str, Encoder]]:  # noqa: UP006, UP007
        pre_trained_encoder = torchvision.models.resnet34(pretrained=True)
        self.avgpool = copy.deepcopy(pre_trained_encoder.avgpool)
        self.finetuned_block = copy.deepcopy(pre_trained_encoder.layer4)
        modules = []

        for name, child in pre_trained_encoder.named_children():
            modules.append(child)
            if name == "layer3":
                break

        pre_trained_encoder = nn.Sequential(*modules)
        return CarsEncoder(pre_trained_encoder)

    def configure_head(self, input_embedding_size) -> EncoderHead:
        return SequentialHead(
            self.finetuned_block,
            self.avgpool,
            nn.Flatten(),
            SkipConnectionHead(512, dropout=0.3, skip_dropout=0.2),
            output_size=512,
        )

    def configure_loss(self) -> SimilarityLoss:
        return TripletLoss(mining=self._mining, margin=0.5)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.model.parameters(), self._lr)
        return optimizer

    def configure_caches(self) -> Optional[CacheConfig]:  # noqa: UP045
        return CacheConfig(cache_type=CacheType.AUTO, save_dir="./cache_dir", batch_size=32)

    def configure_metrics(self) -> Union[AttachedMetric, List[AttachedMetric]]:  # noqa: UP006, UP007
        return AttachedMetric("rrp", metric=RetrievalRPrecision(), prog_bar=True, on_epoch=True, on_step=False)


class CarsDataset(Dataset):
    def __init__(self, dataset: Dataset, transform):
        self._dataset = dataset
        self._transform = transform

    def __len__(self) -> int:
        return len(self._dataset)  # pyright: ignore

    def __getitem__(self, index) -> SimilarityGroupSample:
        image, label = self._dataset[index]
        image = self._transform(image)

        return SimilarityGroupSample(obj=image, group=label)


# -- and what they have of it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    names = sorted(toned_classes())[:10]
    return [(picture.image(), names.index(picture.label)) for picture in draw(folder, labels=names)]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Seeded weights where torchvision keeps those that it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoints = tmp_path / "hub" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    url = torchvision.models.ResNet34_Weights.DEFAULT.url
    torch.save(torchvision.models.resnet34().state_dict(), checkpoints / Path(url).name)


def loaders(pictures, batch_size=20):
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize((64, 64)), torchvision.transforms.ToTensor()]
    )
    train, test = CarsDataset(pictures[:30], transform), CarsDataset(pictures[30:], transform)
    generator = torch.Generator().manual_seed(1)
    return (
        GroupSimilarityDataLoader(train, batch_size=batch_size, shuffle=True, generator=generator),
        GroupSimilarityDataLoader(test, batch_size=batch_size, shuffle=False),
    )


def trainer(epochs):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def test_the_articles_class_trains_evaluates_saves_and_loads(pictures, weights, tmp_path):
    torch.manual_seed(0)
    model = Model(lr=1e-3, mining="hard")
    frozen = copy.deepcopy(model.model.encoders["default"].state_dict())
    block = copy.deepcopy(model.finetuned_block.state_dict())
    train, test = loaders(pictures)
    runner = trainer(2)
    Quaterion.fit(model, runner, train, test)

    assert runner.callback_metrics.keys() >= {"train_loss", "validation_loss", "rrp_train", "rrp_validation"}
    assert 0 < float(runner.callback_metrics["rrp_validation"]) <= 1
    for name, value in model.model.encoders["default"].state_dict().items():
        assert torch.equal(value, frozen[name]), f"'{name}' of the frozen encoder has moved"
    assert not all(torch.equal(value, block[name]) for name, value in model.finetuned_block.state_dict().items())

    sampler = GroupSampler(sample_size=30)
    found = Quaterion.evaluate(Evaluator({"rrp": RetrievalRPrecision()}, sampler), test.dataset, model.model)
    assert 0 < float(found["rrp"]) <= 1

    model.save_servable(tmp_path / "servable")
    objects = [test.dataset[index].obj for index in range(3)]
    loaded = SimilarityModel.load(tmp_path / "servable")
    assert torch.equal(loaded.encode(objects, to_numpy=False), model.model.encode(objects, to_numpy=False))


def test_the_second_run_of_the_article_computes_no_row(pictures, weights, monkeypatch):
    train, test = loaders(pictures)
    stages = []
    attach = EncoderStage.attach
    monkeypatch.setattr(
        EncoderStage, "attach", lambda *args, **kwargs: stages.append(attach(*args, **kwargs)) or stages[-1]
    )
    for _ in range(2):
        Quaterion.fit(Model(lr=1e-3, mining="hard"), trainer(2), train, test)
    first, second = (stage.recycling.stats for stage in stages)
    assert (first.misses, second.misses) == (60, 0)
    assert first.hits == second.hits == 2 * 60 + 30, "two epochs of both loaders, and the validation beforehand"


def test_it_learns_what_the_article_without_a_cache_learns(pictures, weights):
    """The same seed, with and without rows: the same weights, but for the last bits of another batch's composition."""

    class Uncached(Model):
        def configure_caches(self):
            return None

    found = []
    for kind in (Model, Uncached):
        torch.manual_seed(0)
        model = kind(lr=1e-3, mining="hard")
        train, _ = loaders(pictures)
        torch.manual_seed(5)
        Quaterion.fit(model, trainer(2), train, None)
        found.append(torch.cat([p.detach().flatten() for p in model.model.head.parameters()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-3


def test_a_recycled_encoder_is_the_articles_class_without_moving_layers(pictures, weights, tmp_path):
    class Recycled(Model):
        def configure_encoders(self):
            model = torchvision.models.resnet34(pretrained=True)
            model.fc = nn.Identity()
            return RecycledEncoder(model, cut="layer3", embedding_size=512)

        def configure_head(self, input_embedding_size):
            return SkipConnectionHead(512, dropout=0.3, skip_dropout=0.2)

    torch.manual_seed(0)
    model = Recycled(lr=1e-3, mining="hard")
    before = copy.deepcopy(model.model.encoders["default"].model.state_dict())
    train, test = loaders(pictures)
    Quaterion.fit(model, trainer(1), train, test)
    after = model.model.encoders["default"].model.state_dict()
    moved = {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"layer4"}
    model.save_servable(tmp_path / "servable")
    objects = [test.dataset[index].obj for index in range(3)]
    assert torch.equal(
        SimilarityModel.load(tmp_path / "servable").encode(objects, to_numpy=False),
        model.model.encode(objects, to_numpy=False),
    )

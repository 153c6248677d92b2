"""Which cars are alike? A model is fine-tuned on photos of half of the classes, and asked about the other half.

    python examples/similar_cars.py images.tar --labels labels.csv --label-column class_id --pretrained

A ResNet-34 is cut at ``layer3``. What its layers give up to there is computed once for each photo and kept in
``--store``; ``layer4`` and a `SkipConnectionHead` are trained on that, through Lightning's `Trainer`. No layer is
moved: the model stays what it was. Another one is ``--model timm/NAME --cut blocks.2``, and ``torchrecycle cuts --model
timm/NAME`` shows where it can be cut. The second run begins with what the first one has kept.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from torchrecycle.cli.words import say_random
from torchrecycle.errors import RecycleError
from torchrecycle.files.pictures import Picture, find_pictures
from torchrecycle.similarity import (
    CacheConfig,
    Evaluator,
    GroupSimilarityDataLoader,
    PytorchMetricLearningWrapper,
    RecycledEncoder,
    RetrievalPrecision,
    RetrievalRPrecision,
    SimilarityGroupSample,
    SkipConnectionHead,
    TrainableModel,
    TripletLoss,
    fit,
)
from torchrecycle.similarity.losses import loss_by_name
from torchrecycle.sweep.splits import halves
from torchrecycle.sweep.trunks import Trunk, load_trunk


class Photos(Dataset[SimilarityGroupSample]):
    """Photos of some classes, whose numbers begin at 0."""

    def __init__(self, pictures: Sequence[Picture], classes: Sequence[str], transform: Any) -> None:
        self.number = {name: number for number, name in enumerate(classes)}
        self.pictures = [picture for picture in pictures if picture.label in self.number]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> SimilarityGroupSample:
        picture = self.pictures[index]
        return SimilarityGroupSample(obj=self.transform(picture.image()), group=self.number[picture.label])


class Cars(TrainableModel):
    """What is trained, and how."""

    def __init__(self, asked: argparse.Namespace, trunk: Trunk, classes: int, data: str) -> None:
        self.asked, self.trunk, self.classes, self.data = asked, trunk, classes, data
        super().__init__()

    def configure_encoders(self) -> RecycledEncoder:
        return RecycledEncoder(self.trunk.module, cut=self.asked.cut, embedding_size=self.trunk.dim)

    def configure_head(self, input_embedding_size: int) -> SkipConnectionHead:
        return SkipConnectionHead(input_embedding_size, dropout=0.3, skip_dropout=0.2)

    def configure_loss(self) -> Any:
        if self.asked.loss in ("hard", "semi_hard", "all"):
            return TripletLoss(mining=self.asked.loss)
        loss = loss_by_name(self.asked.loss, classes=self.classes, dim=self.trunk.dim, seed=0)
        return PytorchMetricLearningWrapper(loss)

    def configure_caches(self) -> CacheConfig:
        # Under a name for photos and preprocessing, the next run finds rows without decoding the photos once more.
        return CacheConfig(save_dir=self.asked.store, name=self.data, precision="bfloat16" if self.asked.half else None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        new = [*self.model.head.parameters(), *self.loss.parameters()]
        layers, rate = self.model.encoders.parameters(), self.asked.rate
        return torch.optim.AdamW([{"params": layers, "lr": rate}, {"params": new, "lr": 10 * rate}])

    def on_train_epoch_start(self) -> None:
        # Batches of a few classes have other means than all photos: batch norm keeps the statistics that it came with.
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def run(asked: argparse.Namespace) -> None:
    """Load, evaluate, train, evaluate, save."""
    torch.manual_seed(0)
    trunk = load_trunk(asked.model, "images", checkpoint=asked.checkpoint, size=asked.size, pretrained=asked.pretrained)
    if trunk.random:
        say_random(published=True)
    found = find_pictures(
        asked.where, labels=asked.labels, label_column=asked.label_column, leave_out=[asked.store, asked.save]
    )
    classes = sorted({picture.label for picture in found.items})[: asked.classes]
    assert trunk.preprocessing is not None
    transform = trunk.preprocessing.transform()
    train, test = (Photos(found.items, half, transform) for half in halves(classes))
    print(f"{found.where}: {len(train):,} to train on, {len(test):,} of other classes to test")
    model = Cars(asked, trunk, len(train.number), f"{found.identity}, {len(classes)} classes, {trunk.preprocessing}")

    metrics = {"R-precision": RetrievalRPrecision(), "precision@1": RetrievalPrecision(k=1)}
    evaluator = Evaluator(metrics, batch_size=asked.batch, num_workers=asked.workers)
    before = evaluator.evaluate(test, model.model)
    timer, start = Timer(), time.perf_counter()
    trainer = pl.Trainer(max_epochs=asked.epochs, callbacks=[timer], logger=False, enable_checkpointing=False)
    fit(model, trainer, GroupSimilarityDataLoader(train, asked.batch, objects_per_group=4, num_workers=asked.workers))
    training = timer.time_elapsed("train")
    filling = time.perf_counter() - start - training
    after = evaluator.evaluate(test, model.model)
    model.save_servable(asked.save)

    kept = sum(file.stat().st_size for file in asked.store.rglob("*") if file.is_file()) / 1e6
    print(f"\n{'':24}{''.join(f'{name:>14}' for name in metrics)}")
    for name, figures in (("weights as they came", before), ("after training", after)):
        print(f"{name:24}{''.join(f'{float(figure):14.3f}' for figure in figures.values())}")
    print(
        f"\nfilling {filling:.1f} s, an epoch {training / asked.epochs:.1f} s, {kept:.1f} MB of rows in {asked.store}"
    )
    print(f"the model is in {asked.save}; it takes photos as {trunk.preprocessing}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("where", type=Path, help="a folder, tar or zip: CLASS/PHOTO, or any with --labels")
    add("--labels", type=Path, help="a table that names photos, in its column 'file', and their classes")
    add("--label-column", default="label", help="that table's column of classes")
    add("--classes", type=int, help="use so many of the classes only, for a first try")
    add("--model", default="torchvision/resnet34", help="timm/NAME or torchvision/NAME")
    add("--checkpoint", type=Path, help="a file of weights for this model")
    add("--pretrained", action="store_true", help="the weights that timm or torchvision publish; may download them")
    add("--cut", default="layer3", help="the module of the model whose output is kept")
    add("--size", type=int, help="height and width of photos, in pixels; the model's own if not given")
    add("--loss", default="hard", help="hard, semi_hard or all triplets, or the name of one of pytorch-metric-learning")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32, help="photos in a step, four of each class in it")
    add("--rate", type=float, default=1e-4, help="learning rate of the model's layers; ten times that for the head")
    add("--store", type=Path, default=Path("activations"), help="folder for what the frozen layers give")
    add("--half", action="store_true", help="keep that as bfloat16, in half the room")
    add("--save", type=Path, default=Path("servable"), help="folder for the model")
    add("--workers", type=int, default=0, help="processes that read photos")
    try:
        run(parser.parse_args(arguments))
    except RecycleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

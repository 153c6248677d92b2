"""timm's training recipe, on kept rows: two lines more than without.

    python examples/timm_recipe.py photos/ --model resnet34 --pretrained          # photos/CLASS/*.jpg

Everything else is timm's public interface as its own scripts use it: its transforms with RandAugment, layer decay,
warm-up and cosine, label smoothing, a moving average of the weights, and its checkpoints. What half of the layers give
is computed once for each of ``--views`` augmented versions of a photo and kept in ``--store``. When training is done,
one more epoch is timed with all layers computed, so that the saving can be judged: it is of the same loop and model.
"""

# timm's packages name what they give to others in no __all__.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from torchrecycle import RecycleError, recycle

HELD_OUT = 5
"""Every fifth photo is not trained on."""


def photos(where: Path, config: dict[str, Any]) -> tuple[Subset[Any], Subset[Any], int]:
    """Photos to train on, under random transforms, and others to test with."""
    sides = []
    for training in (True, False):
        augment = {"auto_augment": "rand-m5-mstd0.5", "interpolation": "bicubic"} if training else {}
        transform: Any = create_transform(**{**config, **augment}, is_training=training)
        folder = ImageFolder(str(where), transform)
        sides.append(Subset(folder, [i for i in range(len(folder)) if (i % HELD_OUT != 0) == training]))
    return sides[0], sides[1], len(folder.classes)


def train_epoch(model: Any, batches: Any, step: Any) -> float:
    """One epoch; how many seconds it took."""
    start = time.perf_counter()
    model.train()
    for images, labels in batches:
        step(images, labels)
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: Any, batches: Any) -> float:
    """The share of photos whose class is found."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(right).mean())


def run(asked: argparse.Namespace) -> None:
    """Train, evaluate, save, and say what was saved."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model: Any = timm.create_model(asked.model, pretrained=asked.pretrained, checkpoint_path=asked.checkpoint)
    config = resolve_data_config({"input_size": (3, asked.size, asked.size)} if asked.size else {}, model=model)
    train, held_out, classes = photos(asked.where, config)
    model.reset_classifier(classes)
    shape, how = config["input_size"], {"batch_size": asked.batch, "num_workers": asked.workers}

    # The two lines. Without them there is `DataLoader` in the place of `loader`.
    recycling = recycle(model, torch.randn(2, *shape), level=asked.level, store=asked.store, views=asked.views)
    loader = recycling.loader

    batches, tests = loader(train, shuffle=True, drop_last=True, **how), loader(held_out, **how)
    filling = time.perf_counter() - start
    optimizer = create_optimizer_v2(model, "adamw", lr=asked.rate, weight_decay=0.05, layer_decay=0.75)
    schedule: Any = create_scheduler_v2(
        optimizer, "cosine", num_epochs=asked.epochs, warmup_epochs=1, warmup_lr=1e-6, updates_per_epoch=len(batches)
    )
    scheduler, epochs = schedule
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    asked.save.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(asked.save), max_history=1)
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)

    def step(images: Any, labels: Any) -> None:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)

    seconds = []
    for epoch in range(epochs):
        seconds.append(train_epoch(model, batches, step))
        scheduler.step(epoch + 1)
        found = accuracy(model, tests)
        saver.save_checkpoint(epoch, metric=found)
        print(f"epoch {epoch}: {found:.3f} of the photos that were held out are right, {seconds[-1]:.2f} s")
    stats = recycling.stats
    kept = sum(file.stat().st_size for file in asked.store.rglob("*") if file.is_file()) / 1e6
    # The moving average is a model of its own, and a plain one: it takes the photos themselves.
    print(f"its moving average: {accuracy(ema.module, DataLoader(held_out, **how)):.3f}")
    print(f"frozen layers ran for {stats.misses:,} photos, and were spared for {stats.hits:,}; {kept:.1f} MB of rows")
    with recycling.paused():
        computed = train_epoch(model, batches, step)
    mean = sum(seconds) / len(seconds)
    print(f"filling and setting up {filling:.2f} s, an epoch {mean:.2f} s; with all layers {computed:.2f} s")
    recycling.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("where", type=Path, help="a folder: CLASS/PHOTO")
    add("--model", default="resnet34", help="a name that timm.create_model takes")
    add("--pretrained", action="store_true", help="the weights that timm publishes; may download them")
    add("--checkpoint", default="", help="a file of weights for this model")
    add("--level", type=float, default=0.5, help="the share of the model's blocks that is frozen and kept")
    add("--views", type=int, default=4, help="in how many augmented versions each photo is kept")
    add("--size", type=int, help="height and width of photos, in pixels; the model's own if not given")
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=5e-4, help="learning rate of the last layer")
    add("--store", type=Path, default=Path("activations"), help="folder for what the frozen layers give")
    add("--save", type=Path, default=Path("checkpoints"), help="folder for timm's checkpoints")
    add("--workers", type=int, default=0, help="processes that read photos")
    try:
        run(parser.parse_args(arguments))
    except RecycleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

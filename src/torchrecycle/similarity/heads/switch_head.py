"""Another head for each kind of object: beside a `SwitchEncoder`, which has another encoder for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError, apply_head

__all__ = ["SwitchHead"]


class SwitchHead(EncoderHead):
    """Each object goes through the head that its meta names: ``{"encoder": "text"}`` through ``options["text"]``.

    Args:
        options: Heads by name, all with the same input and the same output size.
        input_embedding_size: Width of what they all take.
    """

    def __init__(self, options: Mapping[str, EncoderHead], input_embedding_size: int, **kwargs: Any) -> None:
        super().__init__(input_embedding_size, dropout=0.0, **kwargs)
        self.options = nn.ModuleDict(_alike(options, input_embedding_size))

    @property
    def output_size(self) -> int:
        first: Any = next(iter(self.options.values()))
        return first.output_size

    def forward(self, input_vectors: Tensor, meta: Sequence[dict[str, Any]] | None = None) -> Tensor:
        """
        Args:
            input_vectors: ``[batch, input_embedding_size]``
            meta: of each object a dict, whose ``"encoder"`` is the name of its head; `SwitchEncoder` gives these.

        Returns:
            embeddings ``[batch, output_size]``, in the order of the objects.

        Raises:
            HeadError: there is no meta, or for another number of objects, or it names no head.
        """
        self._must_fit(input_vectors)
        rows = self._rows_by_option(input_vectors, meta)
        if not rows:
            return input_vectors.new_zeros(0, self.output_size)
        given = meta or []
        parts = [
            apply_head(self.options[name], input_vectors[where], [given[i] for i in where])
            for name, where in rows.items()
        ]
        order = torch.tensor([i for where in rows.values() for i in where], device=input_vectors.device)
        return torch.cat(parts)[torch.argsort(order)]

    def _rows_by_option(self, vectors: Tensor, meta: Sequence[dict[str, Any]] | None) -> dict[str, list[int]]:
        if meta is None or len(meta) != len(vectors):
            got = "none" if meta is None else f"that of {len(meta)}"
            raise HeadError(
                f"a SwitchHead needs the meta of each of the {len(vectors)} objects, and got {got}: use it behind a "
                "SwitchEncoder, or an encoder whose get_meta_extractor gives {'encoder': name} for each object"
            )
        rows: dict[str, list[int]] = {}
        for i, each in enumerate(meta):
            name: Any = each.get("encoder")
            if name not in self.options:
                raise HeadError(
                    f"the meta of object {i} is {each}, and 'encoder' in it names none of this SwitchHead's heads: "
                    f"{', '.join(self.options)}"
                )
            rows.setdefault(name, []).append(i)
        return rows

    def get_config_dict(self) -> dict[str, Any]:
        """What is plain of the arguments: heads are no plain values, and are saved as the modules that they are."""
        return {"input_embedding_size": self.input_embedding_size}


def _alike(options: Mapping[str, EncoderHead], size: int) -> Mapping[str, EncoderHead]:
    """
    Raises:
        HeadError: there are no heads, they differ, or a name cannot be one of a module.
    """
    if not options:
        raise HeadError("a SwitchHead needs one head or more: SwitchHead({'text': EmptyHead(384)}, 384)")
    for name, head in options.items():
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise HeadError(f"{name!r} cannot be the name of a head, as torch has it: choose another one")
        if head.input_embedding_size not in (None, size):
            raise HeadError(
                f"the heads of a SwitchHead all take what it is given, {size} numbers, and {name!r} takes "
                f"{head.input_embedding_size}"
            )
    sizes = {name: head.output_size for name, head in options.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name!r} gives {out}" for name, out in sizes.items())
        raise HeadError(f"the heads of a SwitchHead must give vectors of one width, to be compared: {said}")
    return options

"""Wide in the middle: two linear layers, the first of which gives four times the width."""

from __future__ import annotations

from typing import Any

from torchrecycle.similarity.heads.stacked_projection_head import StackedProjectionHead

__all__ = ["WideningHead"]


class WideningHead(StackedProjectionHead):
    """384 numbers to 1,536 and back to 384, with an activation in the middle: ``WideningHead(384)``.

    Args:
        input_embedding_size: Width of the embeddings, in and out.
        expansion_factor: How many times as wide the middle is.
        activation_fn: Name of a function in `torch.nn.functional`.
        dropout: As of `EncoderHead`.
    """

    def __init__(
        self,
        input_embedding_size: int,
        expansion_factor: float = 4.0,
        activation_fn: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            input_embedding_size,
            [int(input_embedding_size * expansion_factor), input_embedding_size],
            activation_fn=activation_fn,
            dropout=dropout,
        )
        self._expansion_factor = expansion_factor

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        del config["output_sizes"]
        return {**config, "expansion_factor": self._expansion_factor}

"""Any modules one after another as a head: the last blocks of a network, pooling, and a head behind them.

The head of the article on recycled layers takes what a ResNet-34 gives before ``layer4``, maps of 256 x 14 x 14, and
gives 512 numbers::

    SequentialHead(layer4, avgpool, nn.Flatten(), SkipConnectionHead(512, dropout=0.3, skip_dropout=0.2))

What is known of the widths inside is compared when the head is made: a ``Linear(256, ...)`` after a
``SkipConnectionHead(512)`` is an error there, and not after an hour of filling. What cannot be known, such as what
``layer4`` gives, is compared at the first forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError, apply_head, shown

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SequentialHead"]


class SequentialHead(EncoderHead):
    """Modules in a row, as of `torch.nn.Sequential`. What each gives, the next one gets.

    The first one gets what the encoder gives: vectors, feature maps, token sequences, a nest of tensors. Heads in the
    row get the objects' meta as well.

    Args:
        args: The modules; or, as of `torch.nn.Sequential`, one `OrderedDict` of them.
        output_size: Width of what comes out. May be left out where the last module tells it: a head, a linear layer,
            or one of these followed by activations, dropout or norms.

    Raises:
        HeadError: what comes is no module, two neighbours do not fit, or `output_size` is not known or contradicted.
    """

    def __init__(self, *args: Any, output_size: int | None = None) -> None:
        super().__init__(None)
        given = list(args[0].values()) if len(args) == 1 and isinstance(args[0], OrderedDict) else args
        for position, module in enumerate(given):
            if not isinstance(module, nn.Module):
                raise HeadError(
                    f"a SequentialHead is made of modules, and number {position} is {shown(module)}: wrap a function "
                    "in a module whose forward calls it"
                )
        self._given_size = output_size
        self.input_embedding_size, self._output_size = _sizes(given, output_size)
        self._sequential = nn.Sequential(*args)

    @property
    def output_size(self) -> int:
        return self._output_size

    def forward(self, input_vectors: Any, meta: Sequence[dict[str, Any]] | None = None) -> Tensor:
        """
        Raises:
            HeadError: a module gets vectors of another width than it was made for.
        """
        value = input_vectors
        for name, module in self._sequential.named_children():
            if isinstance(module, nn.Linear):
                _must_fit(name, module, value)
            value = apply_head(module, value, meta)
        return value

    def transform(self, input_vectors: Any) -> Tensor:
        """What `forward` does without meta."""
        return self.forward(input_vectors)

    def get_config_dict(self) -> dict[str, Any]:
        """What is plain of the arguments: modules are no plain values, and are saved as the modules that they are."""
        return {"output_size": self.output_size}

    def append(self, module: nn.Module) -> Self:
        """Put a module behind the last one."""
        self._change([*self, module])
        self._sequential.append(module)
        return self

    def _change(self, modules: Sequence[nn.Module]) -> None:
        self.input_embedding_size, self._output_size = _sizes(modules, self._given_size)

    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...
    def __getitem__(self, idx: int | slice) -> nn.Module:
        return self._sequential[idx]

    def __setitem__(self, idx: int, module: nn.Module) -> None:
        modules = list(self)
        modules[idx] = module
        self._change(modules)
        self._sequential[idx] = module

    def __delitem__(self, idx: int | slice) -> None:
        modules = list(self)
        del modules[idx]
        self._change(modules)
        del self._sequential[idx]

    def __len__(self) -> int:
        return len(self._sequential)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._sequential)


# -- what is known of widths -------------------------------------------------------------------------------------------

_KEEP_THE_WIDTH = (
    nn.Identity,
    nn.Dropout,
    nn.AlphaDropout,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
)


def _sizes(modules: Sequence[nn.Module], told: int | None) -> tuple[int | None, int]:
    """Width of what goes in, if the first module tells it, and of what comes out.

    Raises:
        HeadError: two neighbours do not fit, or the second is not known or contradicted.
    """
    first, size, by = None, None, ""
    for position, (name, module) in enumerate(_flat(modules)):
        takes, gives = _takes(module), _gives(module)
        if size is not None and takes is not None and takes != size:
            raise HeadError(
                f"in this SequentialHead {by} gives vectors of width {size}, and {_named(name, module)}, which comes "
                f"next, takes {takes}: make one of them with the width of the other"
            )
        first = first if position else takes
        if not isinstance(module, _KEEP_THE_WIDTH):
            size, by = gives, _named(name, module)
    if told is None and size is None:
        last = f"the last module, {type(modules[-1]).__name__}," if modules else "an empty SequentialHead"
        raise HeadError(f"{last} does not tell the width of what comes out: give it, as output_size=512")
    if told is not None and size is not None and told != size:
        raise HeadError(f"output_size is {told}, and {by} gives vectors of width {size}: leave output_size out")
    return first, size if told is None else told  # pyright: ignore[reportReturnType] (both None is refused above)


def _flat(modules: Sequence[nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for i, module in enumerate(modules):
        if type(module) is nn.Sequential:
            yield from _flat(list(module), f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", module


def _takes(module: nn.Module) -> int | None:
    if isinstance(module, EncoderHead):
        return module.input_embedding_size
    return module.in_features or None if isinstance(module, nn.Linear) else None  # 0 of a lazy one


def _gives(module: nn.Module) -> int | None:
    if isinstance(module, EncoderHead):
        return module.output_size
    return module.out_features if isinstance(module, nn.Linear) else None


def _named(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} (number {name})"


def _must_fit(name: str, module: nn.Linear, value: Any) -> None:
    width = module.in_features
    if width and isinstance(value, Tensor) and value.dim() and value.shape[-1] != width:
        pool = ". Feature maps are to be pooled and flattened before" if value.dim() == 4 else ""
        raise HeadError(
            f"in this SequentialHead {_named(name, module)} was made for vectors of width {width}, and got "
            f"{list(value.shape)}{pool}"
        )

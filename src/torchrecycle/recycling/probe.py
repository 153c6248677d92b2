"""A few rows beside a fingerprint, of seeded inputs: whoever opens them computes them again.

The fingerprint tells what a prefix consists of, and not what a library makes of it: an upgrade that computes an
interpolation in another way leaves every byte of the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from torchrecycle.bypass import Bypass, Inputs, Sequences, device_of, noise, relative_difference
from torchrecycle.errors import RecycleError, StoreError
from torchrecycle.store import Rows
from torchrecycle.trace import undisturbed

__all__ = ["Probe"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The probe of a prefix."""

    model: nn.Module
    bypass: Bypass
    example: Inputs
    """What seeded inputs are like."""
    sequences: Sequences

    def compare(self, rows: Rows, url: str) -> None:
        """The rows that lie beside the fingerprint, computed again: has the function stayed the same?

        Args:
            rows: whose probe it is, if they have one.
            url: of the store.

        Raises:
            StoreError: it has not.
        """
        found = rows.read_probe()
        if found is None:
            return
        tensors = found[0]
        kept = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
        for number, (layout, leaf) in enumerate(zip(self.bypass.plan.layouts, self._leaves(kept), strict=True)):
            want, got = tensors[f"row.{number}"], layout.to_rows(leaf).cpu()
            difference = relative_difference(want, got) if want.shape == got.shape else float("inf")
            allowed = noise(got.dtype, leaf.device)
            if difference > allowed:
                raise StoreError(
                    f"the store at {url} holds rows of this very prefix, but what it computes has changed: "
                    f"its probe differs by {difference:.2g} where {allowed:.0e} is rounding. A library was "
                    "upgraded, or the forward around the frozen layers changed. Use another folder, or remove this "
                    "one."
                )

    def write(self, rows: Rows, key_inputs: tuple[str, ...]) -> None:
        """
        Args:
            rows: beside which it is written, if none is there.
            key_inputs: what the prefix reads of a call.
        """
        if rows.read_probe() is not None:
            return
        made, leaves = self._made(key_inputs)
        tensors = {f"input.{name}": tensor for name, tensor in made.items()}
        for number, (layout, leaf) in enumerate(zip(self.bypass.plan.layouts, leaves, strict=True)):
            tensors[f"row.{number}"] = layout.to_rows(leaf).cpu().contiguous()
        rows.write_probe(tensors)

    def _made(self, key_inputs: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Seeded inputs and their rows; where a model does not take any ids (some stand for images), the example's."""
        example = {name: self.example.tensors()[name].cpu() for name in key_inputs}
        generator = torch.Generator().manual_seed(20_220_107)
        masks = (*self.sequences.masks, *self.sequences.spatial)
        made = {name: _synthetic(tensor, name in masks, generator) for name, tensor in example.items()}
        own_ids = {name: t if not t.is_floating_point() else made[name] for name, t in example.items()}
        try:
            return made, self._leaves(made)
        except RecycleError:
            raise
        except Exception:
            return own_ids, self._leaves(own_ids)

    def _leaves(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of the example's call with these tensors in it, and other inputs at their length."""
        lengths = self.sequences.lengths(Inputs((), (), {**self.example.tensors(), **tensors}))
        call = self.sequences.resized(self.example, lengths)
        device = device_of(self.model)
        call = call.map(lambda name, given: tensors[name].to(device) if name in tensors else given)
        with undisturbed(self.model):
            return self.bypass.prefix(call)


def _synthetic(tensor: torch.Tensor, is_mask: bool, generator: torch.Generator) -> torch.Tensor:
    """Seeded values of the example's kind."""
    if is_mask or tensor.dtype is torch.bool:
        return torch.ones_like(tensor)
    if tensor.is_floating_point():
        values = torch.randn(tensor.shape, generator=generator)
        return (values * tensor.float().std() + tensor.float().mean()).to(tensor.dtype)
    low, high = int(tensor.min()), int(tensor.max())
    return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.dtype)

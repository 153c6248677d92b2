"""Is the frozen prefix what it was when its rows were made? Else each forward says so, and none uses them.

An optimiser that moves a frozen batch norm by its history, a checkpoint that a trainer loads, a global that a forward
reads: the first two are seen by hashing what the prefix consists of (weights, buffers, constants, settings), the third
by running it again on the example. Counters tell whether there is anything to hash; once in a hundred times as long as
it takes, all is hashed in any case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchrecycle.bypass import Bypass, Inputs, device_of, first_difference, noise, relative_difference
from torchrecycle.errors import StaleActivationError
from torchrecycle.fingerprint import Fingerprint, Watch, reset_statistics, take_fingerprint
from torchrecycle.trace import undisturbed

__all__ = ["Drift", "Example", "stale"]

READ_OUTSIDE = "what the forward of the frozen layers reads outside of their tensors and settings"

SMALL = 0.003
"""Seconds of a prefix run of two objects that is small enough for each iteration."""


@dataclass(slots=True)
class Example:
    """Two objects, and what the prefix gave for them. Both go where the model goes."""

    inputs: Inputs
    reference: list[torch.Tensor] = field(default_factory=list)


class Drift:
    """The prefix of a model as it was when its rows were made, and what has become of it.

    Args:
        model: of which it is the prefix.
        bypass: which divides it.
        example: what it is run on again.
        settings: what a row depends on beside the modules.
        tell_of_hook: told the name of a module of the prefix on which a user's hook was found.
    """

    def __init__(
        self,
        model: nn.Module,
        bypass: Bypass,
        example: Example,
        settings: Mapping[str, Any],
        tell_of_hook: Callable[[str], None],
    ) -> None:
        self._model, self._bypass, self._example = model, bypass, example
        self._settings, self._tell_of_hook = settings, tell_of_hook
        self._described: dict[str, tuple[Any, str]] = {}
        self._loose = self._find_loose()
        self.hash_seconds = 0.0
        """How long it took to hash the prefix."""
        self.fingerprint = self._taken(model, self._described)
        self.watch = Watch(self._modules(model), self._tables(model))
        self._hooks = self.watch.hooks()
        self._look_at_hooks()
        self._hashed_at = self._tried_at = time.monotonic()
        self._tries_after = 0.0
        self.changed: list[str] = []
        """Names of what is not as it was."""

    # -- fingerprint ---------------------------------------------------------------------------------------------------

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in dict.fromkeys(self._bypass.plan.modules.values())}

    def _find_loose(self) -> list[str]:
        """The names of what the prefix reads outside of its modules: class tokens, position buffers, a mean image."""
        model, bypass = self._model, self._bypass
        modules = self._modules(model).values()
        inside = {id(t) for module in modules for t in (*module.parameters(), *module.buffers())}
        loose = [name for name, parameter in bypass.prefix_parameters.items() if id(parameter) not in inside]
        loose += [name for name in bypass.sometimes if id(model.get_parameter(name)) not in inside]
        return loose + [name for name in bypass.buffers if id(model.get_buffer(name)) not in inside]

    def _tables(self, model: nn.Module) -> list[tuple[dict[str, Any], str]]:
        """Where these are kept."""
        found = []
        for name in self._loose:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            found.append((module._parameters if own in module._parameters else module._buffers, own))
        return found

    def _taken(self, model: nn.Module, known: dict[str, tuple[Any, str]] | None = None) -> Fingerprint:
        modules = self._modules(model)
        began = time.monotonic()
        tables = zip(self._loose, self._tables(model), strict=True)
        loose = {name: table[own] for name, (table, own) in tables if table.get(own) is not None}
        bypass = self._bypass
        taken = take_fingerprint(modules, loose, bypass.constants, self._settings, bypass.written, known)
        self.hash_seconds = time.monotonic() - began
        return taken

    def fingerprint_on(self, model: nn.Module) -> str:
        """The fingerprint that this prefix has on another model with the same names; empty where it has not these."""
        try:
            return self._taken(model).hex
        except AttributeError:
            return ""

    # -- looking again -------------------------------------------------------------------------------------------------

    def look_again(self, *, trying: bool = False) -> list[str]:
        """Hash the prefix again, and at times run it again: the names of what has changed."""
        self._hashed_at = time.monotonic()
        now = self._taken(self._model, self._described)
        self.watch.renew()
        self.changed = [] if now.hex == self.fingerprint.hex else now.difference(self.fingerprint)
        if not self.changed:
            self.changed = self._followed()
        if not self.changed and self.watch.hooks() != self._hooks:
            if first_difference(self._example.reference, self._fresh(self._example.inputs)):
                self.changed = ["a forward hook on a frozen layer"]
            else:  # it only looks
                self._hooks = self.watch.hooks()
                self._look_at_hooks()
        if trying and not self.changed and time.monotonic() - self._tried_at > self._tries_after:
            self.try_again()
        return self.changed

    def try_again(self) -> list[str]:
        """Does the prefix give what it gave? A forward may read what no fingerprint sees: a global, a list of tensors.

        Each time for a small prefix, and else for a hundredth of the time.
        """
        began = time.monotonic()
        self.changed = self._followed()
        if self.changed:
            return self.changed
        fresh = self._fresh(self._example.inputs)
        self._tried_at = time.monotonic()
        took = self._tried_at - began
        self._tries_after = 0.0 if took < SMALL else 100 * took
        self.changed = [READ_OUTSIDE] if self._differs(self._example.reference, fresh) else []
        return self.changed

    def is_due(self) -> bool:
        """Whether it is time to look again: something was written, or a while has gone by."""
        due = time.monotonic() - self._hashed_at > max(1.0, 100 * self.hash_seconds)
        return due or self.watch.moved()

    def follow(self) -> None:
        """The example goes where the model has gone.

        Raises:
            StaleActivationError: there the prefix gives something else.
        """
        moved = self._followed()
        if moved:
            raise StaleActivationError(stale(moved))

    def refuse_reset(self) -> None:
        """
        Raises:
            StaleActivationError: what has changed are statistics of a frozen batch norm, which are at their start.
        """
        name = reset_statistics(self._modules(self._model), self.changed)
        if name:
            raise StaleActivationError(_reset(name))

    def _followed(self) -> list[str]:
        """There the prefix must give what it gave, but for rounding."""
        here, example = device_of(self._model), self._example
        if all(tensor.device == here for tensor in example.inputs.tensors().values()):
            return []
        inputs = example.inputs.map_tensors(lambda tensor: tensor.to(here))
        fresh = [leaf.detach().clone() for leaf in self._fresh(inputs)]
        if self._differs([leaf.cpu() for leaf in example.reference], [leaf.cpu() for leaf in fresh]):
            return [READ_OUTSIDE]
        example.inputs = self._bypass.plan.example = inputs
        example.reference = fresh
        return []

    def _fresh(self, inputs: Inputs) -> list[torch.Tensor]:
        with undisturbed(self._model), torch.inference_mode(False):
            return self._bypass.prefix(inputs)

    def _differs(self, kept: Sequence[torch.Tensor], fresh: Sequence[torch.Tensor]) -> bool:
        """Whether what the prefix gives for the example is another thing than it was, computed where the model is."""
        device = device_of(self._model)
        return any(
            a.shape != b.shape or relative_difference(a, b) > noise(layout.dtype, device)
            for layout, a, b in zip(self._bypass.plan.layouts, kept, fresh, strict=True)
        )

    def _look_at_hooks(self) -> None:
        found = next(self.watch.users_hooks(), None)
        if found is not None:
            self._tell_of_hook(found[0])


def stale(changed: Sequence[str]) -> str:
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return (
        f"the frozen prefix has moved: '{changed[0]}'{more} is not what it was when the rows were made. Make a new "
        "iterator of the loader: it fills anew. Without a loader, call fill() again. Where a trainer has loaded a "
        "checkpoint into it, load that before recycle(). If an optimiser moves it by a history from before (LBFGS), "
        "make it again over recycling.parameters()."
    )


def _reset(name: str) -> str:
    return (
        f"the running statistics of the frozen batch norm '{name}' have been reset to 0 and 1, as update_bn and "
        "Lightning's StochasticWeightAveraging do. A frozen layer does not learn them anew, so that the model would go "
        "on without. Put them back (model.load_state_dict), and call update_bn on a copy of the model "
        "(AveragedModel), with the objects themselves, or after detach()."
    )

"""Which model is it? What changes what a model gives or learns makes another one; another process makes none."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import small  # noqa: F401  (one thread)
from torchrecycle.sweep import Classification, SweepError, load_trunk, sweep
from torchrecycle.sweep.build import _content_of
from torchrecycle.sweep.identity import identity_of_model


def data(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


class Scaled(nn.Module):
    """Of the user's own, with settings that no ``repr`` and no state dict shows."""

    def __init__(self, scale: float = 1.0, mask: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
        self.head = nn.Linear(8, 2)
        self.scale = scale
        self.table = {"shift": [0.0]}
        self.register_buffer("mask", torch.tensor(mask), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x) * self.scale * self.mask) + self.table["shift"][0]


def made(kind: Callable[..., nn.Module] = Scaled, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args, **options)


def _other_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.blocks(x).abs())


def _frozen() -> nn.Module:
    model = made()
    model.blocks[0].requires_grad_(False)
    return model


def _with_another_table() -> nn.Module:
    model = made()
    model.table["shift"][0] = 1.0
    return model


def _double(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def _with_a_hook() -> nn.Module:
    model = made()
    model.blocks.register_forward_hook(_double)
    return model


def _tied() -> nn.Module:
    model = made()
    model.blocks[1][0].load_state_dict(model.blocks[0][0].state_dict())
    return model


def _tied_in_one() -> nn.Module:
    model = _tied()
    model.blocks[1][0].weight = model.blocks[0][0].weight  # pyright: ignore
    return model


def _as_if_edited(name: str = "Scaled") -> nn.Module:
    edited = {"forward": _other_forward, "__module__": __name__, "__qualname__": name}
    return made(type(name, (Scaled,), edited))


class Twin(Scaled):
    pass


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a number": lambda: made(Scaled, 50.0),
    "a list in a dict": _with_another_table,
    "a buffer that no state dict has": lambda: made(Scaled, mask=9.0),
    "what is trained": _frozen,
    "the code of forward": _as_if_edited,
    "a hook": _with_a_hook,
    "a forward of one object": lambda: _patched(made()),
    "another class": lambda: made(Twin),
}


def _patched(model: nn.Module) -> nn.Module:
    model.forward = types.MethodType(_other_forward, model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_differs_is_another_model(name: str):
    assert identity_of_model(made()) == identity_of_model(copy.deepcopy(made()))
    assert identity_of_model(OTHERS[name]()) == identity_of_model(OTHERS[name]())
    assert identity_of_model(OTHERS[name]()) != identity_of_model(made())


def test_weights_that_are_one_are_not_two_of_the_same_values():
    assert identity_of_model(_tied()) != identity_of_model(_tied_in_one())


def _with_activation(call: Any) -> nn.Module:
    model = nn.Sequential(made(nn.Linear, 4, 4), nn.Identity())
    model[1].forward = call
    return model


def test_a_function_on_a_librarys_module_counts_by_what_it_calls():
    relu, tanh = (lambda x: torch.relu(x)), (lambda x: torch.tanh(x))
    assert relu.__qualname__ == tanh.__qualname__
    assert relu.__code__.co_code == tanh.__code__.co_code
    assert identity_of_model(_with_activation(relu)) == identity_of_model(_with_activation(relu))
    assert identity_of_model(_with_activation(relu)) != identity_of_model(_with_activation(tanh))
    partial = functools.partial(F.leaky_relu, negative_slope=0.1)
    steeper = functools.partial(F.leaky_relu, negative_slope=0.2)
    assert identity_of_model(_with_activation(partial)) != identity_of_model(_with_activation(steeper))


def test_a_model_is_the_same_after_it_was_run():
    model = made()
    before = identity_of_model(model)
    model(torch.randn(2, 8)).sum().backward()
    assert identity_of_model(model) == before


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_the_same_each_time(whole: bool):
    def compiled(scale: float) -> Any:
        made_one = torch.compile(made(Scaled, scale), backend="eager")
        return made_one if whole else nn.Sequential(made_one)  # pyright: ignore[reportArgumentType, reportCallIssue]

    assert identity_of_model(compiled(1.0)) == identity_of_model(compiled(1.0))
    assert identity_of_model(compiled(1.0)) != identity_of_model(compiled(2.0))


class WithFile(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.rows = (row for row in ())


class WithWord(WithFile):
    def __recycle_state__(self) -> Any:
        return self.scale


def test_what_cannot_be_told_is_refused_and_the_class_may_say_it():
    with pytest.raises(SweepError, match=r"rows of the model \(WithFile\) cannot be told.*__recycle_state__"):
        identity_of_model(made(WithFile))
    model, other = made(WithWord), made(WithWord)
    assert identity_of_model(model) == identity_of_model(other)
    other.scale = 2.0
    assert identity_of_model(model) != identity_of_model(other)


def test_trials_of_another_model_are_not_served(tmp_path: Path):
    """What a sweep said of ``scale=1`` was said again of ``scale=50``, as finished before."""
    told: list[str] = []

    def swept(build: Callable[[], nn.Module]) -> Any:
        task = Classification(data(96, 0), data(32, 1), epochs=2)
        told.clear()
        return sweep(build, task, levels=("50",), store=tmp_path / "rows", tell=told.append).result()

    first = swept(Scaled)
    assert swept(Scaled).levels == first.levels
    assert any("was finished before" in line for line in told)
    swept(lambda: Scaled(50.0))
    assert not any("was finished before" in line for line in told)
    swept(lambda: _frozen_blocks(Scaled()))
    assert not any("was finished before" in line for line in told)


def _frozen_blocks(model: Any) -> nn.Module:
    model.blocks[3].requires_grad_(False)
    return model


def library_models() -> dict[str, nn.Module]:
    import timm
    import torchvision
    from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertModel

    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "own": made(),
        "torchvision": made(torchvision.models.mobilenet_v3_small),
        "timm": made(timm.create_model, "test_resnet"),
        "timm vit": made(timm.create_model, "test_vit"),
        "bert": made(BertForSequenceClassification, BertConfig(vocab_size=20, num_hidden_layers=2, **sizes)),
        "distilbert": made(DistilBertModel, DistilBertConfig(vocab_size=20, dim=16, n_heads=2, hidden_dim=16)),
    }


def test_another_process_tells_the_same_models_of_libraries(tmp_path: Path):
    code = "import test_sweep_identity as t; print({k: t.identity_of_model(m) for k, m in t.library_models().items()})"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    ).stdout.strip()
    assert said == str({name: identity_of_model(model) for name, model in library_models().items()})


def test_a_trunk_is_told_by_all_that_its_module_is():
    trunk = load_trunk("timm/test_resnet", "images", size=32)
    assert _content_of(trunk) == _content_of(replace(trunk, module=copy.deepcopy(trunk.module)))
    other = copy.deepcopy(trunk.module)
    _patched(other)
    assert _content_of(trunk) != _content_of(replace(trunk, module=other))
    frozen = copy.deepcopy(trunk.module)
    next(frozen.parameters()).requires_grad_(False)
    assert _content_of(trunk) != _content_of(replace(trunk, module=frozen))

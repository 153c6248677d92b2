"""Plain PyTorch: what people put into their own loops, on kept rows, equals the same loop with a computed prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from small import CUT, labels, pictures, residual
from torchrecycle import AutocastError, BatchError, RecycledTensor, RecycleWarning, StaleActivationError, recycle

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)
HELD = TensorDataset(pictures(8, seed=2), labels(8))
PREFIX = ("stem", "stages.0", "stages.1")
EPOCHS = 2


class Reference:
    """The same loop without recycling: the prefix frozen by hand, in eval mode, and computed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(PREFIX))

    def train(self) -> None:
        self.model.train()
        for name in PREFIX:
            self.model.get_submodule(name).eval()

    def loader(self, data: Any = DATA, **arguments: Any) -> DataLoader[Any]:
        return DataLoader(data, **{"batch_size": 8, "shuffle": True, **arguments})

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)


class Recycled:
    """A recycling, with the loader's usual arguments."""

    def __init__(self, model: nn.Module, store: Path, **arguments: Any) -> None:
        self.model = model
        self.recycling = recycle(model, X[:2], cut=CUT, store=store, **arguments)
        self.parameters = self.recycling.parameters
        self.train = model.train

    def loader(self, data: Any = DATA, **arguments: Any) -> DataLoader[Any]:
        return self.recycling.loader(data, **{"batch_size": 8, "shuffle": True, **arguments})


Loop = Callable[[Any, nn.Module], list[float]]


def both(loop: Loop, tmp_path: Path, *, to_the_bit: bool = True, **arguments: Any) -> Recycled:
    """Run a loop on kept rows and with a computed prefix: losses and weights must agree, and the checkpoint loads."""
    recycled = Recycled(residual(), tmp_path / "store", **arguments)
    reference = Reference(residual())
    torch.manual_seed(4)
    got = loop(recycled, recycled.model)
    torch.manual_seed(4)
    want = loop(reference, reference.model)
    assert len(got) == len(want) > 0
    assert got == (want if to_the_bit else pytest.approx(want, rel=1e-3))
    torch.save(recycled.model.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    plain = residual(seed=9)
    plain.load_state_dict(saved, strict=True)
    assert recycled.recycling.stats.hits >= len(DATA) * EPOCHS
    assert recycled.recycling.stats.misses == recycled.recycling.source.rows.__len__()
    recycled.recycling.detach()
    for model in (recycled.model, plain):
        same(model, reference.model, to_the_bit=to_the_bit)
    return recycled


def same(a: nn.Module, b: nn.Module, *, to_the_bit: bool = True) -> None:
    near: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if to_the_bit else {"rtol": 1e-3, "atol": 1e-4}
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **near, msg=lambda text, name=name: f"{name}: {text}")


def epochs(side: Any, step: Callable[[torch.Tensor, torch.Tensor, int], float]) -> list[float]:
    losses = []
    batches = side.loader()
    for _ in range(EPOCHS):
        side.train()
        losses += [step(x, y, number) for number, (x, y) in enumerate(batches)]
    return losses


# -- steps -------------------------------------------------------------------------------------------------------------


def test_gradients_are_accumulated_and_clipped(tmp_path):
    def loop(side: Any, model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)  # all parameters
        norms = []

        def step(x: torch.Tensor, y: torch.Tensor, number: int) -> float:
            loss = cross_entropy(model(x), y) / 3
            loss.backward()
            if number % 3 == 2:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                optimizer.zero_grad()
            return loss.item()

        return epochs(side, step) + norms

    recycled = both(loop, tmp_path)
    begun = residual().state_dict()
    assert all(
        torch.equal(value, begun[name]) for name, value in recycled.model.state_dict().items() if PREFIX[2] in name
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_scaler_works_under_declared_autocast(dtype, tmp_path):
    def loop(side: Any, model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        scales = []

        def step(x: torch.Tensor, y: torch.Tensor, number: int) -> float:
            with torch.autocast("cpu", dtype=dtype):
                loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(side.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            return loss.item()

        return epochs(side, step) + scales

    both(loop, tmp_path, autocast=dtype)


def test_autocast_that_was_not_declared_is_an_error_and_so_is_one_that_is_missing(tmp_path):
    recycled = Recycled(residual(), tmp_path / "plain")
    x, _ = next(iter(recycled.loader()))
    with pytest.raises(AutocastError, match=r"autocast=torch.bfloat16"), torch.autocast("cpu", dtype=torch.bfloat16):
        recycled.model(x)
    recycled.model(x)  # and the batch is as good as before
    recycled.recycling.detach()

    declared = Recycled(residual(), tmp_path / "cast", autocast=torch.bfloat16)
    x, _ = next(iter(declared.loader()))
    with pytest.raises(AutocastError, match=r"rows were made under torch.bfloat16"):
        declared.model(x)
    with pytest.raises(AutocastError), torch.autocast("cpu", dtype=torch.float16):
        declared.model(x)


# -- compiled ----------------------------------------------------------------------------------------------------------


def compiled_loop(compile_: Callable[[nn.Module], nn.Module]) -> Loop:
    def loop(side: Any, model: nn.Module) -> list[float]:
        run = compile_(model)
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)

        def step(x: torch.Tensor, y: torch.Tensor, number: int) -> float:
            loss = cross_entropy(run(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return epochs(side, step)

    return loop


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, Any] = {
    "the model": lambda model, backend: torch.compile(model, backend=backend),
    "a module after the cut, in place": lambda model, backend: model.stages[2].compile(backend=backend) or model,
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("what", COMPILED)
def test_what_comes_after_the_cut_may_be_compiled(what, tmp_path):
    both(compiled_loop(lambda model: COMPILED[what](model, "aot_eager")), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("what", COMPILED)
def test_what_comes_after_the_cut_may_be_compiled_to_machine_code(what, tmp_path):
    both(compiled_loop(lambda model: COMPILED[what](model, "inductor")), tmp_path, to_the_bit=False)


class Around(nn.Module):
    """A module of the user's, with the recycled model in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.net(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # says Dynamo, resuming
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
@pytest.mark.parametrize("what", ["raw batches", "rows"])
def test_compiled_code_around_a_recycled_model_does_not_run_past_its_frozen_layers(what, when, tmp_path):
    model, reference = residual(), Reference(residual())
    around = Around(model)
    compiled: Any = torch.compile(around, backend="aot_eager")
    if when == "before attaching":
        compiled.train()(X[:8])
        model.load_state_dict(residual().state_dict())
    with recycle(model, X[:2], cut=CUT, store=tmp_path) as recycling:
        loader = (recycling.loader if what == "rows" else DataLoader)(DATA, batch_size=8)
        run = (compiled, Around(reference.model))
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in run]
        for (x, y), (raw, _) in zip(loader, DataLoader(DATA, batch_size=8), strict=True):
            compiled.train()
            reference.train()
            losses = [cross_entropy(m(one), y) for m, one in zip(run, (x, raw), strict=True)]
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert recycling.stats.misses == len(DATA)
        assert recycling.stats.hits == (len(DATA) if what == "rows" else 0)
    same(model, reference.model, to_the_bit=False)


# -- unfreezing bit by bit ---------------------------------------------------------------------------------------------


def test_layers_before_the_cut_that_a_loop_unfreezes_are_told_not_to_train_and_a_recut_trains_them(tmp_path):
    model = residual()
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path)
    loader = recycling.loader(DATA, batch_size=8)
    model.stages.requires_grad_(True)
    with pytest.warns(RecycleWarning, match=r"'stages.0.conv.weight' and \d+ more before the cut 'stages.1'.*recut"):
        x, y = next(iter(loader))
    assert len(list(loader)) == 3, "it is said once"
    cross_entropy(model(x), y).backward()
    first = model.get_parameter("stages.0.conv.weight")
    assert first.grad is None
    recycling.recut("stem")
    for x, y in loader:
        cross_entropy(model(x), y).backward()
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    recycling.detach()


def test_what_the_loop_has_frozen_as_a_whole_stays_frozen_after_detaching(tmp_path):
    model = residual()
    with recycle(model, X[:2], cut=CUT, store=tmp_path):
        model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with recycle(model, X[:2], cut=CUT, store=tmp_path):
        model.head.requires_grad_(True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


# -- averages of weights -----------------------------------------------------------------------------------------------


def averaged_loop(make: Callable[[nn.Module], Any], update: Callable[[Any, nn.Module], None], seen: list[Any]) -> Loop:
    def loop(side: Any, model: nn.Module) -> list[float]:
        average = make(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def step(x: torch.Tensor, y: torch.Tensor, number: int) -> float:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update(average, model)
            return loss.item()

        losses = epochs(side, step)
        seen.append(average)
        return losses

    return loop


def ema_of_torch(model: nn.Module) -> Any:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def ema_of_timm(model: nn.Module) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model, decay=0.9)


AVERAGES: dict[str, Any] = {
    "torch": (ema_of_torch, lambda average, model: average.update_parameters(model)),
    "timm": (ema_of_timm, lambda average, model: average.update(model)),
}


@pytest.mark.parametrize("library", AVERAGES)
def test_a_moving_average_of_the_weights_is_that_of_the_reference(library, tmp_path):
    seen: list[Any] = []
    recycled = both(averaged_loop(*AVERAGES[library], seen=seen), tmp_path)
    average, expected = seen
    same(average.module, expected.module)
    average.eval()
    expected.eval()
    with torch.no_grad():
        torch.testing.assert_close(average.module(X), expected.module(X), rtol=1e-3, atol=1e-4)

    # The average's prefix is the model's, so that what was kept for one serves the other.
    with recycle(average.module, X[:2], cut=CUT, store=tmp_path / "store") as second:
        assert second.fingerprint == recycled.recycling.fingerprint
        got = second.predict(DATA)
        assert (second.stats.misses, second.stats.hits) == (0, 24)
    with torch.no_grad():
        torch.testing.assert_close(got, expected.module(X), rtol=1e-3, atol=1e-4)


def test_stochastic_weight_averaging_ends_where_the_reference_ends(tmp_path):
    seen: list[Any] = []

    def loop(side: Any, model: nn.Module) -> list[float]:
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=1)

        def step(x: torch.Tensor, y: torch.Tensor, number: int) -> float:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number == 2:
                average.update_parameters(model)
                schedule.step()
            return loss.item()

        losses = epochs(side, step)
        update_bn(
            DataLoader(DATA, batch_size=8), average
        )  # a copy of the model, which is a plain one: with its objects
        seen.append(average)
        return losses

    both(loop, tmp_path)
    average, expected = seen
    same(average, expected)
    begun = residual().state_dict()
    moved = [name for name, value in average.module.state_dict().items() if not torch.equal(value, begun[name])]
    assert "stages.2.norm.running_mean" in moved


def test_statistics_that_are_reset_in_the_frozen_layers_are_an_error_and_not_a_new_prefix(tmp_path):
    recycled = Recycled(residual(), tmp_path)
    with pytest.raises(StaleActivationError, match=r"'stages.0.norm' have been reset.*update_bn.*detach"):
        update_bn(recycled.loader(), recycled.model)
    for name, value in residual().state_dict().items():  # the remedy of who did it nevertheless
        recycled.model.state_dict()[name].copy_(value)
    recycled.recycling.detach()
    reference = residual()
    for model in (recycled.model, reference):
        torch.manual_seed(0)
        update_bn(DataLoader(DATA, batch_size=8), model)
    same(recycled.model, reference)


def test_a_copy_of_the_model_refuses_kept_rows_in_words(tmp_path):
    recycled = Recycled(residual(), tmp_path)
    average = AveragedModel(recycled.model)
    with pytest.raises(BatchError, match="A copy of a recycled model takes raw batches"):
        update_bn(recycled.loader(), average)
    assert isinstance(next(iter(recycled.loader()))[0], RecycledTensor)

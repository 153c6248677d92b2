"""Lightning: any module, any loader, and a callback; losses, weights and checkpoints as if frozen by hand."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler, default_collate

from small import CUT, Counted, labels, pictures, residual
from torchrecycle import (
    AutocastError,
    BatchError,
    CutError,
    RecycledTensor,
    RecycleError,
    RecycleWarning,
    StaleActivationError,
)
from torchrecycle.lightning import RecyclingCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*smaller than the logging interval",
        ".*in eval mode at the start of training",
        ".*treespec, LeafSpec",
        ".*Checkpoint directory .* exists",
        ".*sampler has shuffling enabled",
        ".*GPU available but not used",
        ".*have no `val_dataloader`",
    )
]

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)
EVAL = TensorDataset(pictures(8, seed=2), labels(8))
PREFIX = ("stem", "stages.0", "stages.1")


class Module(pl.LightningModule):
    """A network in an attribute; the optimiser gets all parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = residual(seed)
        self.seen: list[Any] = []
        self.losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        self.seen.append(type(x))
        return cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, number: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, number: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, number: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class Frozen(pl.Callback):
    """The reference: the prefix frozen by hand, in eval mode, and computed."""

    def __init__(self, root: str = "net.") -> None:
        self.prefix = tuple(root + name for name in PREFIX)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(not name.startswith(self.prefix))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for name in self.prefix:
            pl_module.get_submodule(name).eval()


def trainer(*callbacks: Any, **arguments: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def recycler(tmp_path: Path, **changes: Any) -> RecyclingCallback:
    return RecyclingCallback(**{"cut": CUT, "store": tmp_path / "store", **changes})


def loader(data: Any = DATA, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 8, "shuffle": True, **arguments})


def fit(module: Any, callback: Any, *given: Any, more: Any = (), **arguments: Any) -> pl.Trainer:
    """Under one seed, so that batches come in one order."""
    ckpt_path, datamodule = arguments.pop("ckpt_path", None), arguments.pop("datamodule", None)
    made = trainer(callback, *more, **arguments)
    torch.manual_seed(4)
    made.fit(module, *given, ckpt_path=ckpt_path, datamodule=datamodule)
    return made


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def both(tmp_path: Path, make: Any = Module, give: Any = None, root: str = "net.", **arguments: Any) -> Any:
    """A module fitted on kept rows, compared with one whose prefix is frozen by hand."""
    give = give or (lambda: (loader(), loader(EVAL, shuffle=False)))
    callback, module, reference = recycler(tmp_path), make(), make()
    fit(module, callback, *give(), **arguments)
    fit(reference, Frozen(root), *give(), **arguments)
    assert len(module.losses) == len(reference.losses) > 0
    assert module.losses == pytest.approx(reference.losses, rel=1e-3)
    same_weights(module, reference)
    assert set(module.seen) == {RecycledTensor}
    return module, callback


# -- one process: what is trained --------------------------------------------------------------------------------------


def test_a_module_gives_the_losses_and_weights_of_the_frozen_reference(tmp_path):
    data = Counted(DATA)
    before = copy.deepcopy(Module().net.state_dict())
    module, callback = both(tmp_path, give=lambda: (loader(data), loader(EVAL, shuffle=False)))
    assert callback.stats.misses == 24 + 8, "each object is computed once"
    assert callback.stats.hits == 2 * 24 + 3 * 8, "two epochs, two validations and the sanity check"
    moved = {
        name.split(".")[0] for name, value in module.net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"stages", "head"}
    assert torch.equal(module.net.state_dict()["stages.1.norm.running_mean"], before["stages.1.norm.running_mean"])


def test_model_and_trainer_are_as_before_afterwards(tmp_path):
    def state(module: Any) -> Any:
        return [(set(vars(part)), part._forward_pre_hooks, part._forward_hooks) for part in module.net.modules()]

    module, callback = Module(), recycler(tmp_path)
    before, asks = state(module), [parameter.requires_grad for parameter in module.parameters()]
    made = fit(module, callback, loader())
    assert state(module) == before
    assert [parameter.requires_grad for parameter in module.parameters()] == asks
    assert callback.recycling is None
    assert not {"setup", "process_dataloader", "training_step"} & set(vars(made.strategy))


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_options_of_the_trainer_work(arguments, tmp_path):
    both(tmp_path, **arguments)


class Manual(Module):
    """Steps its optimiser itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        self.losses.append(loss.item())


class Itself(Module):
    """No network in an attribute: it is one."""

    def __init__(self) -> None:
        super().__init__()
        net = self.net
        del self.net
        self.stem, self.stages, self.head = net.stem, net.stages, net.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))

    def loss(self, batch: Any) -> torch.Tensor:
        self.seen.append(type(batch[0]))
        return cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # says Dynamo, resuming
@pytest.mark.parametrize("what", ["the network", "the module"])
def test_a_network_or_a_module_that_was_compiled_is_recycled_and_stays_compiled(what, tmp_path):
    torch._dynamo.reset()
    module, reference = Module(), Module()
    whole: Any = module
    if what == "the network":
        setattr(module, "net", torch.compile(module.net, backend="aot_eager"))  # noqa: B010
    else:
        whole = torch.compile(module, backend="eager")
    callback = recycler(tmp_path)
    fit(whole, callback, loader())
    fit(reference, Frozen(), loader())
    assert module.losses == pytest.approx(reference.losses, rel=1e-3)
    same_weights(getattr(module.net, "_orig_mod", module.net), reference.net)
    assert (callback.stats.misses, callback.stats.hits) == (24, 48)
    torch._dynamo.reset()


class Unfreezing(BaseFinetuning):
    """Freezes the stages, and has them trained from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.stages, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.stages, optimizer)


def test_unfreezing_by_a_finetuning_callback_is_told_not_to_reach_what_lies_before_the_cut(tmp_path):
    class Rest(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)

    with pytest.warns(RecycleWarning, match="before the cut 'stages.1' were made to ask for a gradient"):
        fit(Rest(), recycler(tmp_path), loader(), more=[Unfreezing()], max_epochs=3)


def test_rows_may_lie_in_memory(tmp_path):
    module, callback = Module(), recycler(tmp_path, resident="ram")
    found: list[Any] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            assert callback.recycling is not None
            found.append(callback.recycling.resident)
            found.append(trainer.train_dataloader.dataset.resident)

    fit(module, callback, loader(), more=[Look()])
    assert found[0] == "ram"
    assert found[1] is not None
    assert callback.stats.hits == 48
    with pytest.raises(ValueError, match="resident='memory' is none of"):
        recycler(tmp_path, resident="memory")


class Late(Module):
    """Makes its layers when the trainer says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                self.net = residual()


@pytest.mark.parametrize("make", [Manual, Itself])
def test_any_module_can_be_trained(make, tmp_path):
    both(tmp_path, make, root="" if make is Itself else "net.")


def test_layers_that_are_made_by_the_trainer_are_recycled(tmp_path):
    module = Late()
    fit(module, recycler(tmp_path), loader())
    reference = Module()
    fit(reference, Frozen(), loader())
    same_weights(module, reference)
    assert set(module.seen) == {RecycledTensor}


# -- loaders -----------------------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    """Makes its data sets in `setup`, and its loaders when asked."""

    def setup(self, stage: str) -> None:
        self.train, self.val = TensorDataset(X, Y), EVAL

    def train_dataloader(self) -> Any:
        return loader(self.train, drop_last=True)

    def val_dataloader(self) -> Any:
        return [loader(self.val, shuffle=False), loader(self.val, shuffle=False, batch_size=4)]


class OwnLoader(DataLoader[Any]):
    """A class of the user's, with arguments of its own and something on top of each batch."""

    def __init__(self, data: Any, size_of_batches: int) -> None:
        super().__init__(data, batch_size=size_of_batches, shuffle=True)

    def __iter__(self) -> Any:
        return ([x, y.clone()] for x, y in super().__iter__())


def pairs(items: Any) -> Any:
    return default_collate([(x, y) for x, y in items])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


FORMS: dict[str, Any] = {
    "own class": lambda: OwnLoader(DATA, 8),
    "own collate": lambda: loader(collate_fn=pairs),
    "weighted sampler": lambda: loader(shuffle=None, sampler=WeightedRandomSampler([1.0, 2.0] * 12, 24)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=[[0, 5, 7], [3, 2], list(range(8, 24))]),
    "workers": lambda: loader(num_workers=1, persistent_workers=True),
    "generator": lambda: loader(generator=seeded()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_of_any_form_is_filled_and_read(form, tmp_path):
    both(tmp_path, give=lambda: (FORMS[form](),))


class Two(Module):
    """Takes batches of two loaders at once."""

    def loss(self, batch: Any) -> torch.Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        if isinstance(parts[0], torch.Tensor):
            return super().loss(batch)
        return torch.stack([super(Two, self).loss(part) for part in parts]).sum()


@pytest.mark.parametrize("form", ["list", "dict", "combined"])
def test_several_loaders_at_once_are_each_filled_and_read(form, tmp_path):
    def give() -> Any:
        two = {"a": loader(), "b": loader(EVAL)}
        if form == "list":
            return (list(two.values()),)
        return (two,) if form == "dict" else (CombinedLoader(two, "max_size_cycle"), loader(EVAL, shuffle=False))

    _, callback = both(tmp_path, Two, give)
    assert callback.stats.misses == 32


def test_a_data_module_is_asked_as_ever(tmp_path):
    module, callback, reference = Module(), recycler(tmp_path), Module()
    fit(module, callback, datamodule=Data())
    fit(reference, Frozen(), datamodule=Data())
    assert module.losses == pytest.approx(reference.losses, rel=1e-3)
    same_weights(module, reference)
    assert callback.stats.misses == 32


class Growing(Module):
    """Another data set in each epoch."""

    def train_dataloader(self) -> Any:
        count = 8 * (1 + self.current_epoch)
        return loader(TensorDataset(X[:count], Y[:count]))


def test_loaders_that_are_made_anew_in_each_epoch_are_filled_anew(tmp_path):
    _, callback = both(tmp_path, Growing, lambda: (), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert (callback.stats.misses, callback.stats.hits) == (24, 8 + 16 + 24)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


def test_an_iterable_data_set_is_read_in_every_epoch_and_computed_once(tmp_path):
    callback, module, reference = recycler(tmp_path, example=X[:2]), Module(), Module()
    fit(module, callback, DataLoader(Stream(), batch_size=8))
    fit(reference, Frozen(), DataLoader(Stream(), batch_size=8))
    assert module.losses == pytest.approx(reference.losses, rel=1e-3)
    assert (callback.stats.misses, callback.stats.hits) == (24, 24)


def test_what_is_no_data_loader_comes_as_it_is_and_is_told_of(tmp_path):
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    callback, module, reference = recycler(tmp_path, example=X[:2]), Module(), Module()
    with pytest.warns(RecycleWarning, match="a Batches is no DataLoader"):
        fit(module, callback, Batches(batches), max_epochs=1)
    fit(reference, Frozen(), Batches(batches), max_epochs=1)
    same_weights(module, reference)


class Batches:
    """An iterable of batches."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


# -- what a trainer does besides training ------------------------------------------------------------------------------


def test_validate_test_and_predict_give_what_the_plain_model_gives(tmp_path):
    callback, module = recycler(tmp_path), Module()
    held = loader(EVAL, shuffle=False, batch_size=3)
    made = fit(module, callback, loader(), held)
    plain = trainer()
    for _ in range(2):
        for method in ("validate", "test"):
            got = getattr(made, method)(module, held, verbose=False)[0]
            assert set(module.seen[-3:]) == {RecycledTensor}
            assert got == pytest.approx(getattr(plain, method)(module, held, verbose=False)[0], rel=1e-4)
            assert (callback.stats.misses, callback.stats.hits) == (0, 8), "the rows of the fit are found"
        got, want = torch.cat(made.predict(module, held)), torch.cat(plain.predict(module, held))  # pyright: ignore
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.shape == (8, 4)


def test_switched_off_by_the_environment_the_same_code_computes_all(tmp_path, monkeypatch):
    recycled, _ = both(tmp_path)
    monkeypatch.setenv("TORCHRECYCLE", "off")
    callback, module = recycler(tmp_path / "other"), Module()
    fit(module, callback, loader(), loader(EVAL, shuffle=False))
    assert set(module.seen) == {torch.Tensor}
    assert callback.stats.hits == 0
    assert not (tmp_path / "other").exists()
    assert module.losses == pytest.approx(recycled.losses, rel=1e-3)
    same_weights(module, recycled)


class Stop(pl.Callback):
    """Ends a fit with an exception, in the middle of an epoch."""

    def __init__(self, error: BaseException, batches: int) -> None:
        self.error, self.left = error, batches

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_fit_that_ends_by_an_exception_is_detached_and_can_begin_again(error, tmp_path):
    import signal

    callback, module, reference = recycler(tmp_path), Module(), Module()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, callback, loader(), more=[Stop(error, 4)])
    signal.signal(signal.SIGINT, handler)  # which Lightning leaves ignored
    with pytest.raises((RuntimeError, SystemExit)):
        fit(reference, Frozen(), loader(), more=[Stop(error, 4)])
    signal.signal(signal.SIGINT, handler)
    assert callback.recycling is None
    assert not any("_compiled_call_impl" in vars(part) for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    same_weights(module, reference)
    fit(module, callback, loader(), max_epochs=1)
    assert callback.stats.misses == 0


def test_an_error_in_setting_up_leaves_the_trainer_as_it_was(tmp_path):
    callback, module = recycler(tmp_path, cut="stages.9"), Module()
    made = trainer(callback)
    with pytest.raises(CutError, match=r"cannot cut at 'stages.9'"):
        made.fit(module, loader())
    assert "setup" not in vars(made.strategy)
    assert not any("_compiled_call_impl" in vars(part) for part in module.modules())


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", every_n_epochs=1)


def test_a_fit_that_goes_on_from_a_checkpoint_ends_where_the_whole_one_ends(tmp_path):
    whole, begun, ordered = Module(), Module(), loader(shuffle=False)
    keeps = {"enable_checkpointing": True, "max_epochs": 3, "num_sanity_val_steps": 0}
    fit(whole, recycler(tmp_path), ordered, more=[checkpoints(tmp_path / "whole")], **keeps)
    stopped = Stop(RuntimeError("power"), 5)
    with pytest.raises(RuntimeError, match="power"):
        fit(begun, recycler(tmp_path), ordered, more=[checkpoints(tmp_path / "begun"), stopped], **keeps)

    resumed, callback = Module(seed=7), recycler(tmp_path)  # other weights: those of the checkpoint come in their place
    saved = tmp_path / "begun" / "epoch=0.ckpt"
    fit(resumed, callback, ordered, more=[checkpoints(tmp_path / "begun")], ckpt_path=saved, **keeps)
    assert callback.stats.misses == 0, "the rows belong to the weights of the checkpoint"
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-4)
    same_weights(resumed, whole)


PLAIN = """
import sys
sys.modules["torchrecycle"] = None      # any import of it is an error
import pytorch_lightning as pl, torch
sys.path.insert(0, sys.argv[1])
from small import residual

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = residual()
    def training_step(self, batch, number):
        return self.net(batch[0]).square().mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, 16, 16)), batch_size=4)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

module = Module.load_from_checkpoint(sys.argv[2], map_location="cpu", weights_only=True)
print(torch.cat([value.float().flatten() for value in module.net.state_dict().values()]).double().sum().item())
pl.Trainer(max_epochs=3, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False).fit(module, ckpt_path=sys.argv[2])
assert module.trainer.global_step > 6
"""


def test_a_checkpoint_loads_where_this_package_is_not_installed(tmp_path):
    module = Module()
    fit(module, recycler(tmp_path), loader(), more=[checkpoints(tmp_path)], enable_checkpointing=True)
    want = torch.cat([value.float().flatten() for value in module.net.state_dict().values()]).double().sum().item()
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(Path(__file__).parent), str(tmp_path / "epoch=1.ckpt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) == want


# -- what is refused, in words -----------------------------------------------------------------------------------------


class Parts(Module):
    """Two parts, which the steps call one after the other."""

    def __init__(self) -> None:
        super().__init__()
        net = self.net
        del self.net
        self.encoder, self.head = nn.Sequential(net.stem, net.stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), net.head

    def loss(self, batch: Any) -> torch.Tensor:
        self.seen.append(type(batch[0]))
        return cross_entropy(self.head(self.encoder(batch[0])), batch[1])


def test_a_module_of_several_models_is_asked_for_the_name_of_one(tmp_path):
    with pytest.raises(CutError, match=r"which model of the Parts .* \['encoder', 'head'\]: give .*module="):
        fit(Parts(), recycler(tmp_path), loader())
    with pytest.raises(CutError, match="has no module 'trunk'; it has"):
        fit(Parts(), recycler(tmp_path, module="trunk"), loader())
    module = Parts()
    callback = recycler(tmp_path, module="encoder", cut="1.1")
    fit(module, callback, loader())
    assert set(module.seen) == {RecycledTensor}
    assert callback.stats.hits == 48


class PartsWithForward(Parts):
    """Its forward is for serving, and not what its steps call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def test_rows_that_reach_a_module_which_is_not_recycled_are_refused_in_words(tmp_path):
    with pytest.raises(RecycleError, match="module="):
        fit(PartsWithForward(), recycler(tmp_path, cut="encoder.1.1"), loader())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"precision": "bf16-true"}, "converts the model"), ({"precision": "64-true"}, "converts the model")],
    ids=str,
)
def test_trainers_that_change_the_model_afterwards_are_refused(arguments, words, tmp_path):
    with pytest.raises(CutError, match=words):
        fit(Module(), recycler(tmp_path), loader(), **arguments)


def test_without_lightning_the_extra_is_named():
    code = (
        "import sys; sys.modules['pytorch_lightning'] = sys.modules['lightning'] = None\n"
        "try:\n    import torchrecycle.lightning\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == 'RecyclingCallback needs pytorch_lightning: pip install "torchrecycle[lightning]"'


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(CutError, match="two RecyclingCallbacks"):
        fit(Module(), recycler(tmp_path), loader(), more=[recycler(tmp_path)])


def test_a_step_with_an_autocast_of_its_own_is_told_to_declare_it(tmp_path):
    class Cast(Module):
        def loss(self, batch: Any) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().loss(batch).float()

    with pytest.raises(AutocastError, match=r"autocast=torch.bfloat16"):
        fit(Cast(), recycler(tmp_path), loader())
    fit(Cast(), recycler(tmp_path, autocast=torch.bfloat16), loader())


def test_a_batch_that_does_not_tell_the_models_inputs_asks_for_an_example(tmp_path):
    data = [{"photo": x, "kind": y} for x, y in zip(X, Y, strict=True)]

    class Named(Module):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((batch["photo"], batch["kind"]))

    with pytest.raises(BatchError, match=r"a dict of \['photo', 'kind'\].*inputs="):
        fit(Named(), recycler(tmp_path), loader(data))
    module = Named()
    fit(module, recycler(tmp_path, inputs=lambda batch: ((batch["photo"],), {})), loader(data))
    assert set(module.seen) == {RecycledTensor}


def test_the_modules_own_example_is_used(tmp_path):
    class Shown(Module):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = X[:2]

        def train_dataloader(self) -> Any:
            self.asked = getattr(self, "asked", 0) + 1
            return loader()

    module = Shown()
    fit(module, recycler(tmp_path))
    assert module.asked == 1
    assert set(module.seen) == {RecycledTensor}


class Flat(Module):
    """Without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.Tanh(), nn.Linear(16, 4))


class FrozenFlat(Frozen):
    def __init__(self) -> None:
        self.prefix = ("net.1",)


def averaging() -> Any:
    return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)


def test_lightnings_weight_averaging_works_where_it_resets_no_frozen_statistics(tmp_path):
    module, reference = Flat(), Flat()
    fit(module, recycler(tmp_path, cut="2"), loader(), more=[averaging()], max_epochs=3)
    fit(reference, FrozenFlat(), loader(), more=[averaging()], max_epochs=3)
    assert module.losses == pytest.approx(reference.losses, rel=1e-3)
    same_weights(module, reference)
    with pytest.raises(StaleActivationError, match=r"have been reset to 0 and 1.*StochasticWeightAveraging"):
        fit(Module(), recycler(tmp_path), loader(), more=[averaging()], max_epochs=3)


# -- two processes -----------------------------------------------------------------------------------------------------


def test_two_processes_with_ddp_train_as_two_that_compute_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        script = Path(__file__).with_name("loops_lightning_ddp.py")
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path)],
                env={**os.environ, **places},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err[-3000:] for _, err in outputs)
    lines = [next(line for line in out.splitlines() if line.startswith("found ")) for out, _ in outputs]
    ranks = [json.loads(line.removeprefix("found ")) for line in lines]
    for name in ("net", "itself"):
        for rank in ranks:
            one = rank[name]
            assert one["recycled"], name
            assert not one["attached"]
            assert one["losses"] == pytest.approx(one["expected"], rel=1e-3)
            assert len(one["losses"]) == 2 * 3, "each process has half of the 24 objects, four at a time"
            assert one["tested"][0] == pytest.approx(one["tested"][1], rel=1e-3)
            assert one["weights"] < 1e-3
        assert ranks[0][name]["losses"] != ranks[1][name]["losses"]
        assert ranks[0][name]["sum"] == ranks[1][name]["sum"]
        assert sum(rank[name]["computed"] for rank in ranks) == 24 + 8, "each object is computed by one of them"

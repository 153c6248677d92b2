"""Lightning: a callback that recycles the model of any `LightningModule`, for as long as a trainer runs.

    trainer = pl.Trainer(max_epochs=5, callbacks=[RecyclingCallback(level=0.5, store="activations/")])
    trainer.fit(module, train_loader, val_loader)       # both loaders as ever
    trainer.test(module, test_loader)

Module, data module and loaders stay as they are. With 10,000 photos in the training loader and 2,000 in that for
validation, the frozen layers run 12,000 times in all, however many epochs there are. Each loader is filled when the
trainer prepares it: before the sanity check for validation, before the first epoch for training, and anew when
``reload_dataloaders_every_n_epochs`` brings other data.

Why it stands where it stands. The model is divided right before the trainer's strategy sets itself up: weights of a
checkpoint have been loaded by then, ``setup`` and ``configure_model`` have made their layers, and neither DDP nor an
optimiser has seen the parameters. Loaders are exchanged where the strategy may look at each of them
(``process_dataloader``): a list, a dict, a `CombinedLoader` and a data module have come apart by then, and the
`DistributedSampler` is in its place. Both are methods of the strategy that belong to its interface; they are put in
place for one run, and taken away with the recycling when it ends, also by an exception.

Checkpoints hold what they would hold without the callback, and load without this package.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, default_collate

from torchrecycle.bypass import parameter_names
from torchrecycle.data import RecycledDataset, is_stream
from torchrecycle.data.resident import Residency, refuse_residency
from torchrecycle.errors import BatchError, CutError, RecycleWarning
from torchrecycle.recycling import Recycling, Stats, recycle
from torchrecycle.store import Store
from torchrecycle.trace import clear_slot, random_state, set_random_state, set_slot, slot_of

__all__ = ["RecyclingCallback"]


def _lightning() -> Any:
    """Lightning, under whichever of its two names it is installed."""
    try:
        import pytorch_lightning
    except ModuleNotFoundError:
        try:
            return importlib.import_module("lightning.pytorch")
        except ModuleNotFoundError as error:
            message = 'RecyclingCallback needs pytorch_lightning: pip install "torchrecycle[lightning]"'
            raise ModuleNotFoundError(message, name="pytorch_lightning") from error
    return pytorch_lightning


pl = _lightning()

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""What a strategy calls a LightningModule's methods through."""


class RecyclingCallback(pl.Callback):
    """Recycles the model of a `LightningModule` while a trainer fits, validates, tests or predicts.

    Args:
        example: a batch of two objects or more, as for `torchrecycle.recycle`. If None, the module's
            ``example_input_array``, and else two items of the trainer's first loader: for that, ``train_dataloader()``
            is called once more. Of such a batch a tensor at the beginning is the input, or the entries of a dict that
            the model's forward has a name for.
        module: the name of the model within the `LightningModule`, such as ``"net"`` or ``"model.backbone"``; ``""`` is
            the `LightningModule` itself, for one whose steps call ``self(x)``. If None, the only child that has
            parameters, and else the `LightningModule` itself if it has a ``forward``.
        cut: see `torchrecycle.recycle`; names are those within the model.
        level: in place of `cut`, the share of the blocks to recycle.
        store: a folder, ``memory://name``, or a `Store`.
        precision: of kept rows; see `torchrecycle.recycle`.
        autocast: the dtype of an autocast that the steps themselves use around the model. That of
            ``Trainer(precision="bf16-mixed")`` is known.
        inputs: ``batch -> (args, kwargs)``, in place of what the example says.
        mask: the name of the model input that tells padding, or several.
        key: from a data set's item to whatever identifies it; then `name` is needed.
        name: from a data set to the user's name for it, with its transforms and targets: it is then not read again
            while the name stays.
        views: in how many augmented versions each object is kept.
        share: what to do with parameters that both halves read: refuse the cut, or freeze them.
        verify_every: every so many batches, one object is computed afresh and compared; 0 never.
        augment: changes the activations of each batch in training mode.
        resident: where loaders gather rows from: ``"disk"``, ``"ram"`` or ``"cuda"``; see `torchrecycle.recycle`.

    Raises:
        CutError: from the trainer's ``fit``: no model is found, or it cannot be divided there, in words.
        BatchError: from the trainer's ``fit``: there is no example, or the model does not run on it.
    """

    def __init__(
        self,
        example: Any = None,
        *,
        module: str | None = None,
        cut: str | Sequence[str] | None = None,
        level: float | None = None,
        store: str | os.PathLike[str] | Store,
        precision: str | None = None,
        autocast: torch.dtype | None = None,
        inputs: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
        mask: str | Sequence[str] | None = None,
        key: Callable[[Any], Any] | None = None,
        name: Callable[[Any], str] | None = None,
        views: int = 1,
        share: Literal["refuse", "freeze"] = "refuse",
        verify_every: int = 0,
        augment: Callable[[Any], Any] | None = None,
        resident: Residency | None = None,
    ) -> None:
        if (cut is None) == (level is None):
            raise CutError("give either cut='layer2' or level=0.5. See cuts(model, example).")
        refuse_residency(resident)
        self.example, self.module, self.name, self.autocast = example, module, name, autocast
        self._arguments: dict[str, Any] = {
            "cut": cut,
            "level": level,
            "store": store,
            "precision": precision,
            "inputs": inputs,
            "mask": mask,
            "key": key,
            "views": views,
            "share": share,
            "verify_every": verify_every,
            "augment": augment,
            "resident": resident,
        }
        self.recycling: Recycling | None = None
        """While a trainer runs: from ``on_fit_start`` on."""
        self.stats = Stats()
        """Of the present run, and of the last one when it has ended."""
        self._strategy: Any = None
        self._put: list[str] = []

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the strategy sets itself up, divide the model."""
        self._detach()
        _refuse_trainer(trainer, self)
        strategy = self._strategy = trainer.strategy
        own = strategy.setup

        def setup(trainer: Any) -> None:
            self._take_away(["setup"])
            self._attach(trainer, pl_module)
            own(trainer)

        self._put_in("setup", setup)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave model and trainer as they were, plus what was learned."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same, where the run has not come to its end."""
        self._detach()

    # -- attach and detach ---------------------------------------------------------------------------------------------

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        model = _find_model(pl_module, self.module)
        model = getattr(model, "_orig_mod", model)  # of torch.compile, which stops at what is recycled
        pl_module.to(trainer.strategy.root_device)  # where the trainer will have it, and rows are to be computed
        whole = self._arguments["inputs"] is not None
        example = self.example if self.example is not None else _example_of(trainer, pl_module, model, whole=whole)
        recycling = recycle(model, example, autocast=self.autocast or _autocast_of(trainer), **self._arguments)
        self.recycling, self.stats = recycling, recycling.stats
        process = trainer.strategy.process_dataloader

        def process_dataloader(dataloader: object) -> object:
            return self._over_rows(process(dataloader))

        self._put_in("process_dataloader", process_dataloader)
        for step in STEPS:
            self._put_in(step, self._step(pl_module, model, getattr(trainer.strategy, step)))

    def _step(self, pl_module: Any, model: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step that says what is wrong if rows come to a module that is not recycled."""
        begun = _past_the_root(self._strategy, pl_module, step) if model is pl_module else step

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return begun(*args, **kwargs)
            except BatchError as error:
                if self.stats.suffix_seconds:  # the model has been called with rows before
                    raise
                raise BatchError(
                    f"{error} If the step does not call the {type(model).__name__} that is recycled as a whole, give "
                    f"RecyclingCallback(module=) the name of what it calls; the {type(pl_module).__name__} has "
                    f"{_children(pl_module)}."
                ) from error

        return call

    def _detach(self) -> None:
        self._take_away(list(self._put))
        self._strategy = None
        recycling, self.recycling = self.recycling, None
        if recycling is not None:
            recycling.detach()

    def _put_in(self, name: str, method: Callable[..., Any]) -> None:
        """Put a method in the place of the strategy's own, on this object only."""
        self._strategy.__dict__[name] = method
        self._put.append(name)

    def _take_away(self, names: Sequence[str]) -> None:
        for name in names:
            self._strategy.__dict__.pop(name, None)
            self._put.remove(name)

    # -- loaders -------------------------------------------------------------------------------------------------------

    def _over_rows(self, loader: Any) -> Any:
        """The same loader, reading rows. What is missing of its data set is computed now."""
        assert self.recycling is not None
        if not isinstance(loader, DataLoader):
            _warn_of_raw(f"a {type(loader).__name__} is no DataLoader, so that its data set is not known")
            return loader
        if isinstance(loader.dataset, RecycledDataset):
            return loader
        if loader.batch_size is None and loader.batch_sampler is None and not is_stream(loader.dataset):
            _warn_of_raw(
                "a DataLoader with batch_size=None gives the data set's own batches, in which rows have no place"
            )
            return loader
        name = None if self.name is None else self.name(loader.dataset)
        # A validation loader is prepared within inference mode; what is made of it is used in training, too.
        with torch.inference_mode(False), torch.no_grad():
            made = self.recycling.loader(loader.dataset, name=name, **_arguments_of(loader))
        return made if type(loader) is DataLoader else _as_users_class(made, loader)


def _arguments_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a loader was made with."""
    arguments: dict[str, Any] = {
        "collate_fn": None if loader.collate_fn is default_collate else loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "generator": loader.generator,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
    }
    if is_stream(loader.dataset):
        return {**arguments, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if type(loader.batch_sampler) is BatchSampler:
        more = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
        return {**arguments, **more}
    return {**arguments, "batch_sampler": loader.batch_sampler}


def _as_users_class(made: DataLoader[Any], loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of a class of the user's, with the data set and the collate function of another one.

    Its ``__init__`` may take anything, so that it is not called again.
    """
    kind = type(loader)
    both: Any = type(f"Recycled{kind.__name__}", (type(made), kind), {"__module__": kind.__module__})
    mixed = object.__new__(both)
    mixed.__dict__.update(vars(loader))
    # `DataLoader.__setattr__` refuses another data set, since it would not fit the sampler: this one does.
    mixed.__dict__.update({"dataset": made.dataset, "collate_fn": made.collate_fn, "_iterator": None})
    mixed.__dict__.update({name: value for name, value in vars(made).items() if name in ("owner", "tally")})
    return mixed


def _warn_of_raw(reason: str) -> None:
    warnings.warn(
        f"{reason}: its batches come as they are, and the frozen layers run for each of them. Give the trainer a "
        "DataLoader with batch_size=, or leave RecyclingCallback out.",
        RecycleWarning,
        stacklevel=2,
    )


# -- what is recycled --------------------------------------------------------------------------------------------------


def _find_model(pl_module: Any, name: str | None) -> nn.Module:
    if name is not None:
        try:
            return pl_module.get_submodule(name)
        except AttributeError as error:
            raise CutError(
                f"the {type(pl_module).__name__} has no module '{name}'; it has {_children(pl_module)}"
            ) from error
    children = _children(pl_module)
    if len(children) == 1:
        return pl_module.get_submodule(children[0])
    if type(pl_module).forward is not pl.LightningModule.forward:
        return pl_module
    raise CutError(
        f"which model of the {type(pl_module).__name__} is to be recycled? It has {children}: give "
        "RecyclingCallback(module=) the name of the one that its steps call."
    )


def _children(pl_module: Any) -> list[str]:
    return [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]


_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def _autocast_of(trainer: Any) -> torch.dtype | None:
    return _AUTOCAST.get(str(trainer.precision))


def _refuse_trainer(trainer: Any, callback: RecyclingCallback) -> None:
    if any(isinstance(other, RecyclingCallback) and other is not callback for other in trainer.callbacks):
        raise CutError(
            "this trainer has two RecyclingCallbacks, and a batch holds rows of one: for two towers give one callback "
            "a list of cuts, cut=['left.layer2', 'right.layer2']"
        )
    precision = str(trainer.precision)
    if precision not in (*_AUTOCAST, "32-true"):
        raise CutError(
            f"Trainer(precision='{precision}') converts the model, after it was divided: give 'bf16-mixed', "
            "'16-mixed' or '32-true'"
        )
    strategy = trainer.strategy
    if strategy.restore_checkpoint_after_setup:
        raise CutError(
            f"{type(strategy).__name__} divides each layer's weights among processes, so that no process could compute "
            "the frozen layers: give Trainer(strategy='ddp') or one device"
        )


# -- the example -------------------------------------------------------------------------------------------------------


def _example_of(trainer: Any, pl_module: Any, model: nn.Module, *, whole: bool) -> Any:
    """A batch of two: what the module itself gives as one, or two items of the first loader.

    Args:
        trainer: which is about to run.
        pl_module: with its model in it.
        model: for which inputs are wanted.
        whole: whether the batch is wanted as it is, targets and all.
    """
    own = getattr(pl_module, "example_input_array", None)
    if own is not None and not whole:
        return own
    with _generators_as_before():
        loader = _first_loader(trainer)
        if loader is None:
            raise BatchError(
                "RecyclingCallback needs an example, since the trainer has no DataLoader over a map-style data set to "
                "take one from: give RecyclingCallback(example=batch), or set self.example_input_array in the "
                f"{type(pl_module).__name__}"
            )
        dataset: Any = loader.dataset
        batch = loader.collate_fn([dataset[index] for index in (0, min(1, len(dataset) - 1))])
    return batch if whole else _inputs_of(batch, model)


@contextlib.contextmanager
def _generators_as_before() -> Iterator[None]:
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _first_loader(trainer: Any) -> DataLoader[Any] | None:
    loops = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    # Lightning tells nobody what it was given before it has set up its strategy.
    source = getattr(loops[trainer.state.fn], "_data_source", None)
    if source is None or not source.is_defined():
        return None
    given = source.dataloader()
    flat = getattr(given, "flattened", None) or pytree.tree_leaves(given)
    found = (one for one in flat if isinstance(one, DataLoader) and not is_stream(one.dataset))
    return next((one for one in found if one.batch_size is not None or one.batch_sampler is not None), None)


def _inputs_of(batch: Any, model: nn.Module) -> Any:
    """What of a batch the model takes, as far as it can be told: a tensor, or what its forward has a name for."""
    if isinstance(batch, Mapping):
        names = parameter_names(model)
        found = {name: value for name, value in batch.items() if name in names and isinstance(value, torch.Tensor)}
        if found:
            return found
        held = f"a dict of {list(batch)}, none of which is an argument of {type(model).__name__}.forward"
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(first, torch.Tensor):
            return first
        held = f"a {type(batch).__name__} that begins with a {type(first).__name__}"
    raise BatchError(
        f"a batch of the first loader is {held}, so that it does not tell the model's inputs: give "
        "RecyclingCallback(inputs=lambda batch: (args, kwargs)), as the model is called for a batch"
    )


# -- DDP around the very module that is recycled -----------------------------------------------------------------------


def _past_the_root(strategy: Any, pl_module: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that gets through a wrapper's call of the module.

    DDP has one method, forward, and a step must go through it: Lightning hands the batch and its number to a forward
    that it has put in the module for this call. That call is none of the model's, so that the model's slot is empty
    until it has begun.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        slot = slot_of(pl_module)
        if slot is None or strategy.model is pl_module:
            return step(*args, **kwargs)
        clear_slot(pl_module)
        begun = pl_module.register_forward_pre_hook(lambda *_: set_slot(pl_module, slot))
        try:
            return step(*args, **kwargs)
        finally:
            begun.remove()
            set_slot(pl_module, slot)

    return call

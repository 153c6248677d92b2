"""`fit`: a `TrainableModel`, a Lightning trainer and loaders of samples; frozen encoders read from the store.

``fit(model, trainer, train_dataloader)`` attaches a stage to each encoder that is to be recycled, computes the rows
that are missing, and calls ``trainer.fit`` with loaders that read rows. Afterwards everything is as before, plus what
was learned; the rows stay where they are kept, for the next call.
"""

from __future__ import annotations

import contextlib
import secrets
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from torchrecycle.errors import BatchError, RecycleWarning
from torchrecycle.similarity.batches import ModelInputs, SampleBatches, loader_over
from torchrecycle.similarity.cache import CacheConfig, CacheError, CacheType
from torchrecycle.similarity.encoders import Encoder, RecycledEncoder, SwitchEncoder
from torchrecycle.similarity.loaders import (
    GroupBatches,
    GroupSimilarityDataLoader,
    PairSimilarityDataLoader,
    SimilarityDataLoader,
)
from torchrecycle.similarity.losses import GroupLoss, PairwiseLoss
from torchrecycle.similarity.stages import EncoderStage, StageRows
from torchrecycle.similarity.trainable import TrainableModel, TrainStage
from torchrecycle.store import open_store

__all__ = ["EpochEnd", "Quaterion", "evaluate", "fit"]


class EpochEnd(pl.Callback):
    """Logs what is known of an epoch at its end, and refuses a first epoch from which nothing could be learned."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.forget_epochs()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        learned = {id(parameter) for parameter in pl_module.loss.parameters() if parameter.requires_grad}
        moved = {id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]}
        if learned and not learned & moved:
            warnings.warn(
                f"{type(pl_module.loss).__name__} has parameters of its own (a vector for each group), and the "
                "optimiser has none of them, so that they stay as they were drawn. Add self.loss.parameters() in "
                "configure_optimizers().",
                RecycleWarning,
                stacklevel=2,
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log_epoch(TrainStage.TRAIN)
        if trainer.current_epoch == 0:
            pl_module.refuse_empty_epoch()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log_epoch(TrainStage.VALIDATION)
        pl_module.warn_of_empty_validation()

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log_epoch(TrainStage.TEST)


def fit(
    trainable_model: TrainableModel,
    trainer: pl.Trainer | None,
    train_dataloader: SimilarityDataLoader,
    val_dataloader: SimilarityDataLoader | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Train.

    Args:
        trainable_model: what to train, in place.
        trainer: of pytorch-lightning; one with `Quaterion.trainer_defaults` if None.
        train_dataloader: over samples that the loss takes.
        val_dataloader: over samples of the same kind; None for no validation.
        ckpt_path: a checkpoint to go on from.

    Raises:
        BatchError: loader and loss do not fit, or a loader is empty.
        CacheError: an encoder cannot be cached as configured.
        NothingToLearnError: no batch of the first epoch holds what the loss compares.
    """
    loaders = {"train": train_dataloader, "validation": val_dataloader}
    given = {role: loader for role, loader in loaders.items() if loader is not None}
    for role, loader in given.items():
        _refuse_loader(trainable_model, loader, role)
    if trainer is None:
        trainer = pl.Trainer(**Quaterion.trainer_defaults(trainable_model, train_dataloader))
    for role, loader in given.items():
        if trainer.world_size > 1 and isinstance(loader.batch_sampler, GroupBatches):
            raise BatchError(
                f"the {role} loader gives batches of whole groups, which cannot be divided among {trainer.world_size} "
                "processes yet: leave out objects_per_group=, or train in one process (devices=1)"
            )
    callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    own = type(trainable_model).configure_callbacks is not TrainableModel.configure_callbacks
    if own and not any(isinstance(callback, EpochEnd) for callback in callbacks):
        callbacks.append(EpochEnd())  # of a list that does not extend that of `super`
    with _recycled(trainable_model, trainer, given) as made, warnings.catch_warnings():
        for message in _NO_NEWS:
            warnings.filterwarnings("ignore", message=message)
        trainer.fit(trainable_model, made["train"], made.get("validation"), ckpt_path=ckpt_path)


_NO_NEWS = (
    ".*does not have many workers.*",  # rows are read faster than a process hands them over
    ".*have no `val_dataloader`.*",
    ".*in eval mode at the start of training.*",  # so are frozen encoders
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # of Lightning's own code, with torch 2.14
)
"""What Lightning warns of at each training, and nobody here can do anything about."""


def _refuse_loader(model: TrainableModel, loader: Any, role: str) -> None:
    if not isinstance(loader, SimilarityDataLoader):
        raise BatchError(
            f"the {role} loader is a {type(loader).__name__}: give a GroupSimilarityDataLoader for samples in groups, "
            "or a PairSimilarityDataLoader for pairs"
        )
    if len(loader.dataset) == 0:  # pyright: ignore[reportArgumentType]
        rest = ": leave it out to train without validation" if role == "validation" else ""
        raise BatchError(f"the data set of the {role} loader is empty{rest}")
    if len(loader) == 0:
        raise BatchError(
            f"the {role} loader gives no batch: its data set has {len(loader.dataset)} samples, and a last batch of "  # pyright: ignore[reportArgumentType]
            f"less than {loader.batch_size} is dropped (drop_last=True)"
        )
    loss = type(model.loss).__name__
    if isinstance(loader, PairSimilarityDataLoader) and not isinstance(model.loss, PairwiseLoss):
        raise BatchError(
            f"the {role} loader gives pairs, and {loss} needs objects in groups: use a GroupSimilarityDataLoader of "
            "SimilarityGroupSample, or a loss over pairs, such as MultipleNegativesRankingLoss"
        )
    if isinstance(loader, GroupSimilarityDataLoader) and not isinstance(model.loss, GroupLoss):
        raise BatchError(
            f"the {role} loader gives objects in groups, and {loss} needs pairs: use a PairSimilarityDataLoader of "
            "SimilarityPairSample, or a loss over groups, such as TripletLoss"
        )


# -- recycling ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recycled(
    trainable: TrainableModel, trainer: pl.Trainer, loaders: dict[str, SimilarityDataLoader]
) -> Iterator[dict[str, Any]]:
    """Loaders that read rows, for as long as the context lasts."""
    model = trainable.model
    config = trainable.cache_config
    encoders: dict[str, Any] = dict(model.encoders.items())
    kinds = {name: _kind_of(encoder, name, config) for name, encoder in encoders.items()}
    wanted = {name: kind for name, kind in kinds.items() if kind is not None}
    stages: dict[str, EncoderStage] = {}
    try:
        if wanted:
            trainable.to(trainer.strategy.root_device)
            for role, loader in loaders.items():
                _refuse_own_collate(loader, role)
            for name, kind in wanted.items():
                same = next((one for one in stages.values() if one.encoder is encoders[name]), None)
                stages[name] = same or _attach(trainable, name, kind, loaders["train"], _autocast_of(trainer))
        model._stages.update(stages)
        yield {role: _loader(trainable, role, loader, stages, wanted) for role, loader in loaders.items()}
    finally:
        model._stages.clear()
        for stage in stages.values():
            stage.detach()


def _kind_of(encoder: Encoder, name: str, config: CacheConfig | None) -> CacheType | None:
    """Where an encoder's rows are kept; None if it is not recycled at all."""
    if isinstance(encoder, RecycledEncoder):  # its prefix is frozen in any case, by the recycling
        return CacheType.AUTO if config is None else config.type_of(name)
    if config is None or encoder.trainable:
        return None
    kind = config.type_of(name)
    if kind is not CacheType.NONE and isinstance(encoder, SwitchEncoder):
        raise CacheError(
            f"the encoder '{name}' is a SwitchEncoder, whose objects go to one encoder or another: what it gives "
            f"cannot be kept as a whole. Leave it out of the cache, CacheConfig(mapping={{'{name}': CacheType.NONE}}), "
            "or give its encoders by name, each for all objects."
        )
    return None if kind is CacheType.NONE else kind


def _refuse_own_collate(loader: SimilarityDataLoader, role: str) -> None:
    if loader.collates_itself:
        raise CacheError(
            f"the {role} loader has a collate function of its own, whose batches cannot be made of kept rows. Put what "
            "it does into the samples (the data set's __getitem__) or into the encoder's get_collate_fn()."
        )


_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def _autocast_of(trainer: pl.Trainer) -> torch.dtype | None:
    precision = str(trainer.precision)
    if precision not in (*_AUTOCAST, "32-true", "32"):
        raise CacheError(
            f"Trainer(precision='{precision}') converts the encoders after their rows were computed: with a cache give "
            "'bf16-mixed', '16-mixed' or '32-true'"
        )
    return _AUTOCAST.get(precision)


def _attach(
    trainable: TrainableModel, name: str, kind: CacheType, loader: SimilarityDataLoader, autocast: torch.dtype | None
) -> EncoderStage:
    config = trainable.cache_config
    encoder: Any = trainable.model.encoders[name]
    within = {"cut": encoder.module_cut, "level": encoder.level} if isinstance(encoder, RecycledEncoder) else {}
    return EncoderStage.attach(
        name,
        encoder,
        loader.dataset,
        type(loader).sample_kind,
        store=_store_of(trainable, config),
        extractor=None if config is None else config.extractor_of(name),
        autocast=autocast,
        precision=None if config is None else config.precision,
        **within,
    )


def _store_of(trainable: TrainableModel, config: CacheConfig | None) -> Any:
    if config is not None and config.save_dir is not None:
        return config.save_dir
    if trainable.rows_in_memory is None:
        trainable.__dict__["rows_in_memory"] = open_store("memory://")  # ends with the model, as a named one would not
    return trainable.rows_in_memory


def _loader(
    trainable: TrainableModel,
    role: str,
    loader: SimilarityDataLoader,
    stages: dict[str, EncoderStage],
    kinds: dict[str, CacheType],
) -> Any:
    model, config = trainable.model, trainable.cache_config or CacheConfig()
    encoders: dict[str, Any] = dict(model.encoders.items())
    kind = type(loader).sample_kind
    rows: dict[str, StageRows] = {}
    for name, stage in stages.items():
        if kinds[name] is CacheType.NONE:
            continue
        extractor = config.extractor_of(name)
        rows[name] = stage.rows(
            loader.dataset,
            kind,
            collate=encoders[name].get_collate_fn(),
            extractor=extractor,
            name=_name_of(config, role, name, extractor is not None),
            batch_size=config.batch_size or loader.batch_size or 32,
            num_workers=loader.num_workers if config.num_workers is None else config.num_workers,
        )
        if kinds[name] is CacheType.GPU or (kinds[name] is CacheType.CPU and config.save_dir is not None):
            device = trainable.device if kinds[name] is CacheType.GPU else torch.device("cpu")
            rows[name].on_renewal = lambda one, stage=stage, device=device: stage.wait(one, device)
    inputs = ModelInputs(
        {name: encoder.get_collate_fn() for name, encoder in encoders.items()}, model.meta_extractors()
    )
    pre_collate: Any = loader.collate_fn
    return loader_over(SampleBatches(loader.dataset, kind, pre_collate, inputs, rows), loader)


def _name_of(config: CacheConfig, role: str, encoder: str, extracted: bool) -> str | None:
    if config.name is not None:
        return f"{config.name} {role} {encoder}"
    # Rows in memory end with this model: the name need only differ from all others.
    return f"{role} {encoder} {secrets.token_hex(8)}" if extracted else None


# -- the same for those who come from Quaterion ------------------------------------------------------------------------


def evaluate(evaluator: Any, dataset: Any, model: Any) -> dict[str, torch.Tensor]:
    """Metrics over a whole data set.

    Args:
        evaluator: an `Evaluator`.
        dataset: of samples.
        model: a `SimilarityModel`.

    Returns:
        Each metric by its name.
    """
    return evaluator.evaluate(dataset, model)


class Quaterion:
    """`fit` and `evaluate` under the name that users of Quaterion know."""

    fit = staticmethod(fit)
    evaluate = staticmethod(evaluate)

    @staticmethod
    def trainer_defaults(
        trainable_model: TrainableModel | None = None, train_dataloader: SimilarityDataLoader | None = None
    ) -> dict[str, Any]:
        """Arguments for ``pytorch_lightning.Trainer`` that suit short epochs over kept rows.

        Training ends when ``validation_loss`` has not become smaller for three epochs, if there is validation; at the
        latest after 1,000 epochs.

        Args:
            trainable_model: if all its encoders are frozen and cached, no checkpoint is written after each epoch.
            train_dataloader: how often is logged follows its length.
        """
        from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar

        stopping = EarlyStopping(f"{TrainStage.VALIDATION}_loss", check_on_train_epoch_end=False)
        arguments: dict[str, Any] = {
            "callbacks": [stopping, RichProgressBar()],
            "max_epochs": 1000,
            "enable_model_summary": False,
        }
        if train_dataloader is not None and len(train_dataloader):
            arguments["log_every_n_steps"] = min(50, len(train_dataloader))
        if trainable_model is not None and trainable_model.cache_config is not None:
            encoders: Any = trainable_model.model.encoders.values()
            if all(not encoder.trainable for encoder in encoders):
                arguments["enable_checkpointing"] = False
        return arguments

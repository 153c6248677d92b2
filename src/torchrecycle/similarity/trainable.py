"""`TrainableModel`: encoders, a head, a loss and how they are trained, as a `LightningModule`.

A user says what the parts are, in methods that begin with ``configure_``; what is here makes a `SimilarityModel` of
them, and a training step. 40 lines are a whole experiment:

    class Cars(TrainableModel):
        def configure_encoders(self): return CarsEncoder(resnet)
        def configure_head(self, input_embedding_size): return SkipConnectionHead(input_embedding_size)
        def configure_loss(self): return TripletLoss(mining="hard")
        def configure_optimizers(self): return torch.optim.Adam(self.model.parameters(), 1e-3)
        def configure_caches(self): return CacheConfig(save_dir="activations/")

Training itself is Lightning's: `torchrecycle.similarity.fit` puts kept rows in place of the frozen encoders and calls
``trainer.fit``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from torchrecycle.errors import RecycleWarning
from torchrecycle.similarity.cache import CacheConfig, CacheError, CacheType
from torchrecycle.similarity.encoders import Encoder, RecycledEncoder
from torchrecycle.similarity.heads import EncoderHead
from torchrecycle.similarity.losses import GroupLoss, SimilarityLoss, XbmError
from torchrecycle.similarity.model import DEFAULT_ENCODER_KEY, SimilarityModel
from torchrecycle.similarity.teaching import NothingToLearnError, teaches
from torchrecycle.similarity.xbm import XbmBuffer, XbmConfig

__all__ = ["TrainStage", "TrainableModel"]


class TrainStage(str, Enum):
    """What a batch is for. Losses are logged as ``train_loss``, ``validation_loss``, metrics as ``NAME_validation``."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"

    def __str__(self) -> str:
        return self.value


class TrainableModel(pl.LightningModule):
    """Base class of what `fit` trains. Override what begins with ``configure_``; three of them are needed.

    Args:
        *args: of ``LightningModule``.
        **kwargs: of ``LightningModule``.

    Raises:
        CacheError: a cache is configured that cannot work.
        HeadError: the head does not take what the encoders give.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        encoders = self.configure_encoders()
        self.cache_config = self.configure_caches()
        _refuse_impossible_caches(encoders, self.cache_config)
        head = self.configure_head(SimilarityModel.get_encoders_output_size(encoders))
        self._model = SimilarityModel(encoders=encoders, head=head)
        self._loss = self.configure_loss()
        metrics = self.configure_metrics() or []
        self.attached_metrics: list[Any] = list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]
        self._metrics_of = {stage: [copy.deepcopy(one) for one in self.attached_metrics] for stage in TrainStage}
        xbm = self.configure_xbm()
        if xbm is not None:
            _refuse_memory(self._loss)
        measured = (one.metric for metrics in self._metrics_of.values() for one in metrics)
        self._measured = torch.nn.ModuleList(
            one for one in measured if isinstance(one, torch.nn.Module)
        )  # they move along
        self._xbm_config = xbm
        self._xbm_buffer = None if xbm is None else XbmBuffer(xbm, self._model.head.output_size)
        self.rows_in_memory: Any = None
        """The store of rows that are kept nowhere else; made by `fit`."""
        self._train_loss: list[Tensor] = []
        self._taught = self._compared = False

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning writes this word some 40 times at each step, and `nn.Module` looks each time whether it is a
        # parameter: 0.08 ms.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rows_in_memory": None}  # a copy fills anew

    # -- what a user says ----------------------------------------------------------------------------------------------

    def configure_encoders(self) -> Encoder | dict[str, Encoder]:
        """One encoder, or several by name."""
        raise NotImplementedError(f"{type(self).__name__} needs configure_encoders(): return an Encoder, or a dict")

    def configure_head(self, input_embedding_size: int) -> EncoderHead:
        """What turns the encoders' output into an embedding.

        Args:
            input_embedding_size: the sum of the encoders' ``embedding_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} needs configure_head(size): return an EncoderHead")

    def configure_loss(self) -> SimilarityLoss:
        """What is minimised: a `GroupLoss` for samples in groups, a `PairwiseLoss` for pairs."""
        raise NotImplementedError(f"{type(self).__name__} needs configure_loss(): return a loss, such as TripletLoss()")

    def configure_metrics(self) -> Any:
        """An `AttachedMetric` or a list of them, computed over each epoch and logged."""
        return []

    def configure_caches(self) -> CacheConfig | None:
        """Which frozen encoders keep what they give, and where; None for none."""
        return None

    def configure_xbm(self) -> XbmConfig | None:
        """A cross-batch memory, for losses over groups; None for none."""
        return None

    def process_results(
        self, embeddings: Tensor, targets: dict[str, Any], batch_idx: int, stage: TrainStage, **kwargs: Any
    ) -> None:
        """Called after each step, for whatever else is wanted of the embeddings.

        Args:
            embeddings: ``[batch, dim]``; of pairs, all left objects and then all right ones.
            targets: what the loss is given.
            batch_idx: the number of the batch.
            stage: what the batch is for.
            **kwargs: those of the step.
        """

    # -- what it is made of --------------------------------------------------------------------------------------------

    @property
    def model(self) -> SimilarityModel:
        """Encoders and head."""
        return self._model

    @property
    def loss(self) -> SimilarityLoss:
        """What is minimised."""
        return self._loss

    def save_servable(self, path: Any) -> None:
        """Write the model without what trains it: `SimilarityModel.load` reads it, without Lightning."""
        self._model.save(path)

    # -- training ------------------------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches are made on the CPU, where walking through them would cost 0.04 ms at each step."""
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> Tensor:
        """The loss of a batch ``(features, targets)``."""
        return self._common_step(batch, batch_idx, TrainStage.TRAIN, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> None:
        """Logs the loss of a batch."""
        self._common_step(batch, batch_idx, TrainStage.VALIDATION, **kwargs)

    def test_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> None:
        """Logs the loss of a batch."""
        self._common_step(batch, batch_idx, TrainStage.TEST, **kwargs)

    def forward(self, features: Any) -> Tensor:
        """Embeddings of a batch as the model's collate function, or a loader of `fit`, makes it."""
        return self._model(self._collated(features))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Embeddings of a batch ``(features, targets)``."""
        return self(batch[0])

    def _collated(self, features: Any) -> Any:
        if isinstance(features, Mapping):
            return features
        # of a loader that `fit` has not seen
        return self.transfer_batch_to_device(self._model.get_collate_fn()(list(features)), self.device, 0)

    def _common_step(self, batch: Any, batch_idx: int, stage: TrainStage, **kwargs: Any) -> Tensor:
        features, targets = batch
        embeddings = self._model(self._collated(features))
        loss = self._loss(embeddings=embeddings, **targets)
        if stage is TrainStage.TRAIN:
            loss = self._with_memory(loss, embeddings, targets)
            self._log_training(loss, len(embeddings))
            self._taught = self._taught or teaches(self._loss, targets)
        elif teaches(self._loss, targets):  # else it is zero, which means nothing
            options = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": len(embeddings)}
            self.log(f"{stage}_loss", loss.detach(), **options)
            self._compared = True
        for metric in self._metrics_of[stage]:
            self._measure(metric, embeddings.detach(), targets, stage)
        self.process_results(embeddings=embeddings, targets=targets, batch_idx=batch_idx, stage=stage, **kwargs)
        return loss

    def _with_memory(self, loss: Tensor, embeddings: Tensor, targets: dict[str, Any]) -> Tensor:
        config, buffer = self._xbm_config, self._xbm_buffer
        if config is None or buffer is None:
            return loss
        assert isinstance(self._loss, GroupLoss)
        groups = targets["groups"]
        if self.global_step >= config.start_iteration and len(buffer):
            loss = loss + config.weight * self._loss.xbm_loss(embeddings, groups, *buffer.get())
        buffer.queue(embeddings.detach(), groups)
        return loss

    def _log_training(self, loss: Tensor, objects: int) -> None:
        """The mean at the end of an epoch; within it only where somebody looks, since each look costs 0.1 ms."""
        self._train_loss.append(loss.detach())
        trainer: Any = self.trainer
        if trainer.progress_bar_callback is not None or (
            trainer.loggers and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        ):
            self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, batch_size=objects)

    def _measure(self, metric: Any, embeddings: Tensor, targets: dict[str, Any], stage: TrainStage) -> None:
        if not metric.is_for(stage):
            return
        if not (metric.on_step and stage is TrainStage.TRAIN):
            metric.update(embeddings, **targets)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch of strangers asks nothing: its figure is NaN
            figure = metric(embeddings, **targets)
        if bool(torch.as_tensor(figure).isfinite().all()):
            self.log(f"{metric.name}_{stage}_step", figure, **self._options_of(metric))

    def _options_of(self, metric: Any) -> dict[str, Any]:
        options = metric.log_options
        return {**options, "logger": options["logger"] and bool(self.trainer.loggers)}

    def log_epoch(self, stage: TrainStage) -> None:
        """Log what is known of an epoch at its end, and forget it."""
        if stage is TrainStage.TRAIN and self._train_loss:
            mean = torch.stack(self._train_loss).mean()
            self.log("train_loss", mean, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
            self._train_loss.clear()
        for metric in self._metrics_of[stage]:
            if metric.is_for(stage) and metric.on_epoch and metric.update_count and not self.trainer.sanity_checking:
                self.log(f"{metric.name}_{stage}", metric.compute(), **self._options_of(metric))
            metric.reset()

    def forget_epochs(self) -> None:
        """Before a training: what an interrupted one has left belongs to no epoch of this one."""
        self._train_loss.clear()
        for metrics in self._metrics_of.values():
            for metric in metrics:
                metric.reset()

    def warn_of_empty_validation(self) -> None:
        """At the end of a validation: was there any batch in which something can be compared?"""
        if not self._compared and not self.trainer.sanity_checking:
            warnings.warn(
                f"no batch of the validation holds objects that belong together and others, which "
                f"{type(self._loss).__name__} compares: there is no validation_loss. Shuffle them once beforehand, or "
                "give larger batches.",
                RecycleWarning,
                stacklevel=2,
            )
        self._compared = False

    def refuse_empty_epoch(self) -> None:
        """At the end of the first epoch: was there any batch to learn from?

        Raises:
            NothingToLearnError: none had objects that belong together, and others to tell them from.
        """
        if not self._taught:
            raise NothingToLearnError.of(self._loss)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Any:
        """What logs at the end of an epoch. Extend the list of `super` if you have callbacks of your own."""
        from torchrecycle.similarity.fitting import EpochEnd

        return [EpochEnd()]


def _refuse_impossible_caches(encoders: Encoder | dict[str, Encoder], config: CacheConfig | None) -> None:
    if config is None:
        return
    named = encoders if isinstance(encoders, dict) else {DEFAULT_ENCODER_KEY: encoders}
    extracted = [] if callable(config.key_extractors) else list(config.key_extractors)
    for name in (*config.mapping, *extracted):
        if name not in named:
            raise CacheError(
                f"the cache is configured for the encoder '{name}', and the encoders are {sorted(named)}. One encoder "
                f"alone is called '{DEFAULT_ENCODER_KEY}'."
            )
    for name, kind in config.mapping.items():
        if CacheType(kind) is not CacheType.NONE and named[name].trainable and not _is_recycled(named[name]):
            raise CacheError(
                f"the encoder '{name}' is trained (its `trainable` is True), so that what it gives changes with each "
                "step and cannot be kept. Let `trainable` be False, take it out of the cache's mapping, or wrap it: "
                "RecycledEncoder(model, cut='layer2') keeps what its first layers give and trains the rest."
            )
    if not config.mapping and config.cache_type not in (None, CacheType.NONE):
        frozen = [name for name, encoder in named.items() if not encoder.trainable or _is_recycled(encoder)]
        if not frozen:
            raise CacheError(
                f"a cache is configured, and every encoder is trained ({sorted(named)}), so that there is nothing to "
                "keep. Let `trainable` of an encoder be False, or wrap it: RecycledEncoder(model, cut='layer2')."
            )


def _refuse_memory(loss: SimilarityLoss) -> None:
    if not isinstance(loss, GroupLoss):
        raise XbmError(
            f"a cross-batch memory holds objects with their groups, and {type(loss).__name__} takes pairs: leave out "
            "configure_xbm(), or take a loss over groups, such as TripletLoss"
        )
    if not loss.supports_xbm:
        raise XbmError(
            f"{type(loss).__name__} cannot be used with a cross-batch memory: leave out configure_xbm(), or take "
            "TripletLoss, OnlineContrastiveLoss or CircleLoss"
        )


def _is_recycled(encoder: Any) -> bool:
    return isinstance(encoder, RecycledEncoder)

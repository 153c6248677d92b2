"""What came out of a sweep, from what its journal holds: a row for each level, and the whole with a recommendation.

Head only was trained under three seeds, each judged on the same 1,000 objects of 98 classes: its row says 0.21 +/-
0.01, where the error counts the seeds and that objects of one class are easy or hard together. Beside it stand what
filling and an epoch took, with and without a store, and what was predicted of them. Of full training, if there was no
time for it, the whole says what is expected.

Nothing is trained or measured here: who reads the same journal again is told the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrecycle.store.sizes import bytes_in_words, parse_bytes
from torchrecycle.sweep.budget import Plan
from torchrecycle.sweep.environment import machine, now, versions
from torchrecycle.sweep.estimates import estimate
from torchrecycle.sweep.expect import expect_quality, expect_seconds
from torchrecycle.sweep.filling import Filling
from torchrecycle.sweep.identity import digest_of
from torchrecycle.sweep.journal import found_from_json
from torchrecycle.sweep.plan import SweepError, SweepPlan
from torchrecycle.sweep.recommend import ExpectedFull, recommend
from torchrecycle.sweep.records import Place, Records
from torchrecycle.sweep.results import Estimate, LevelResult, Prediction, Ran, Sample, SweepResult, Trial
from torchrecycle.sweep.task import Evaluation, Task

__all__ = ["Outcome", "Work", "scores_of"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a sweep came to do, beside its levels."""

    model: str
    """The model's name."""
    device: torch.device | None
    """Where it was trained."""
    began: float
    """When this run did, as `time.perf_counter` tells it."""
    seeds: tuple[int, ...]
    """Of the final trainings."""
    predictions: tuple[Prediction, ...]
    """What was predicted, if anything was."""
    plan: Plan | None
    """What a budget left time for; None without one."""
    diverged: tuple[str, ...] = ()
    """Of levels that gave no row since a training of theirs came to no finite number, in words."""


class Outcome:
    """The rows and the result of one sweep.

    Args:
        task: what was learned.
        plan: what was asked for.
        records: what was finished.
        filling: which knows what passes cost.
    """

    def __init__(self, task: Task, plan: SweepPlan, records: Records, filling: Filling) -> None:
        self.task, self.plan, self.records, self.filling = task, plan, records, filling

    @property
    def metric(self) -> str:
        """Which figure stands for the quality: the task's, or the first one that it gave.

        Raises:
            MissingRecordError: the pretrained model was not judged yet.
        """
        return self.task.metric or next(iter(self.records.untrained()["quality"]))

    def _clusters(self, scores: int) -> Sequence[int]:
        """
        Raises:
            SweepError: the task has them for another number of scores.
        """
        clusters = self.task.clusters() if scores > 1 else None
        if clusters is not None and len(clusters) != scores:
            raise SweepError(
                f"{type(self.task).__name__}.clusters() gives {len(clusters)} of them for {scores} scores of the test "
                "split: give one for each score"
            )
        return range(scores) if clusters is None else clusters

    # -- a level -------------------------------------------------------------------------------------------------------

    def level(
        self,
        level: str,
        place: Place,
        trials: Sequence[Trial],
        frozen: float | None,
        predicted: Prediction | None,
        *,
        filled_as_predicted: bool = True,
    ) -> LevelResult:
        """A row.

        Args:
            level: which.
            place: where it is cut, and whether its rows are kept.
            trials: all of its trainings in the journal, one or more of them final.
            frozen: seconds of an epoch with the prefix computed again; None for full training.
            predicted: what was predicted of it.
            filled_as_predicted: whether that is of filling the same levels at once.
        """
        final = tuple(trial for trial in trials if trial.purpose == "final")
        epoch = statistics.mean(trial.epoch_seconds for trial in final)
        fill = 0.0 if frozen is None or not place.is_kept else self.filling.seconds(level)
        if fill is None and frozen is not None:  # what an epoch without a store takes longer is the prefix
            fill = max(0.0, frozen - epoch)
        return LevelResult(
            level=level,
            cut=place.cut,
            share=place.share,
            trained_parameters=place.trained_parameters,
            quality={
                name: estimate([trial.scores[name] for trial in final], self._clusters(len(final[0].scores[name])))
                for name in final[0].scores
            },
            trials=final,
            search=tuple(trial for trial in trials if trial.purpose == "search"),
            fill_seconds=fill or 0.0,
            frozen_epoch_seconds=frozen,
            bytes_kept=place.bytes_kept,
            predicted=predicted,
            filled_as_predicted=filled_as_predicted,
        )

    # -- the whole -----------------------------------------------------------------------------------------------------

    def result(self, levels: Sequence[LevelResult], work: Work) -> SweepResult:
        """Of all levels, from no recycling to all.

        Raises:
            MissingRecordError: the pretrained model was not judged yet.
        """
        task, untrained, metric = self.task, self.records.untrained(), self.metric
        scores = scores_of(Evaluation(untrained["quality"], untrained["scores"]))
        clusters = self._clusters(len(scores[metric]))
        before = found_from_json(untrained["found"])
        expected = self._expected(levels, estimate([scores[metric]], clusters), work.predictions)
        shown = [*before, *(found for level in levels for trial in level.trials for found in trial.found)]
        return SweepResult(
            kind=task.kind,
            title=task.title,
            metric=metric,
            metrics={name: task.metrics.get(name, name) for name in scores},
            curve_split="validation" if "validation" in task.splits() else "test",
            untrained={name: estimate([each], self._clusters(len(each))) for name, each in scores.items()},
            untrained_found=before,
            levels=tuple(levels),
            recommendation=recommend(
                levels, scores[metric], metric, clusters, pretrained=task.pretrained, expected=expected
            ),
            seeds=work.seeds,
            samples=self._samples(sorted({i for found in shown for i in (found.query, *found.nearest)})),
            ran=self._ran(levels, work),
            predictions=work.predictions,
            expected_full=None if expected is None else expected.quality,
            expected_full_seconds=None if expected is None else expected.seconds,
        )

    def _expected(
        self, levels: Sequence[LevelResult], untrained: Estimate, predictions: Sequence[Prediction]
    ) -> ExpectedFull | None:
        """Of full training, if it was not run."""
        if any(level.cut is None for level in levels):
            return None
        quality = expect_quality([(level.share, level.quality[self.metric]) for level in levels], untrained)
        if quality is None:
            return None
        frozen = [
            (level.share, level.frozen_epoch_seconds) for level in levels if level.frozen_epoch_seconds is not None
        ]
        full = next((each.epoch_seconds for each in predictions if each.level == "full"), None)
        epochs = self.task.recipe("full", 0.0).epochs
        return ExpectedFull(quality, expect_seconds(epochs, full_epoch=full, frozen_epochs=frozen))

    def _samples(self, indices: Sequence[int]) -> dict[int, Sample]:
        sample = self.task.splits()["test"].sample
        return {} if sample is None else {index: sample(index) for index in indices}

    def _ran(self, levels: Sequence[LevelResult], work: Work) -> Ran:
        task = self.task
        splits, per = task.splits(), 2 if task.kind == "pairs" else 1
        trained = sum(level.search_seconds + sum(t.seconds for t in level.trials) for level in levels)
        return Ran(
            command=self.plan.command,
            model=work.model,
            weights=task.weights,
            random_weights=task.random_weights,
            data=task.data or type(splits["train"].dataset).__name__,
            splits={name: len(split) // per for name, split in splits.items()},
            left_out=tuple(task.left_out),
            loss=task.loss,
            settings={**task.settings, **self._said(work)},
            licences=tuple(task.licences),
            machine=machine(work.device),
            versions=versions(),
            date=now(),
            seconds=max(time.perf_counter() - work.began, trained + max(level.fill_seconds for level in levels)),
            task=digest_of(self.records.facts["task"]),
        )

    def _said(self, work: Work) -> dict[str, str]:
        """What of the plan was not left as usual."""
        said = {}
        if self.plan.views not in (None, 1):
            said["views"] = f"{self.plan.views} of each object that is trained on"
        if self.plan.max_bytes is not None:
            said["most bytes kept"] = bytes_in_words(parse_bytes(self.plan.max_bytes))
        if work.plan is not None:
            said["budget"] = str(work.plan)
        if work.diverged:
            said["diverged"] = " ".join(work.diverged)
        return said


def scores_of(found: Evaluation) -> dict[str, tuple[float, ...]]:
    """Per metric what each object contributes; the figure itself where nothing is known of objects."""
    return {name: tuple(found.scores.get(name, (value,))) for name, value in found.quality.items()}

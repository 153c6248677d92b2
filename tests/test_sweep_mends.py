"""What a sweep must not do silently: drop what others have filled, or show figures of what was asked before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import small  # noqa: F401  (one thread)
from torchrecycle.store import open_store
from torchrecycle.sweep import Classification, SweepResult, sweep


def _made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 2))


def build() -> nn.Module:
    return _made(0)


def other() -> nn.Module:
    """The same with other weights."""
    return _made(5)


def _objects(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def make_task(**options: Any) -> Classification:
    return Classification(_objects(128, 0), _objects(64, 1), **{"epochs": 2, **options})


def _swept(home: Path, *levels: str, task: Any = None, model: Any = build, **options: Any) -> SweepResult:
    return sweep(model, task or make_task(), levels=levels or ("50",), store=home / "rows", **options).result()


def _bytes(store: Path) -> dict[str, int]:
    """Of the files under each fingerprint."""
    return {
        name: sum(path.stat().st_size for path in (store / name).rglob("*"))
        for name in open_store(store).fingerprints()
    }


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_rows_of_other_models_make_no_room_and_are_not_counted(tmp_path: Path):
    _swept(tmp_path, "25", "50", "75", results=tmp_path / "one")
    before = _bytes(tmp_path / "rows")
    told: list[str] = []
    options = {"model": other, "max_bytes": 80_000, "predict": False, "tell": told.append}
    result = _swept(tmp_path, "25", "50", results=tmp_path / "two", **options)
    (line,) = [line for line in told if "3 other models or cuts" in line]
    assert line.endswith("left as they are, and not counted in the bytes that may be taken")
    after = _bytes(tmp_path / "rows")
    assert {name: after[name] for name in before} == before, "that is true"
    own = sum(nbytes for name, nbytes in after.items() if name not in before)
    assert 0 < own <= 80_000, "of its own two levels one has made room for the other"
    assert all(level.bytes_kept for level in result.levels)


def test_what_was_finished_with_other_bytes_allowed_is_not_shown_as_what_is_asked(tmp_path: Path):
    """Whether a level's rows are kept is told from what is asked now, and its bytes and times are of that."""
    kept = _swept(tmp_path).levels[0]
    limited = _swept(tmp_path, max_bytes=1000).levels[0]
    assert kept.bytes_kept > 0
    assert (limited.bytes_kept, limited.fill_seconds) == (0, 0.0)
    assert limited.quality == kept.quality, "which rows change nothing of"
    assert limited.trials[0].seconds != kept.trials[0].seconds
    told: list[str] = []
    again = _swept(tmp_path, tell=told.append).levels[0]
    assert (again, told) == (kept, ["50 % recycled: was finished before"])
    told.clear()
    assert _swept(tmp_path, max_bytes=1000, tell=told.append).levels[0] == limited
    assert told == ["50 % recycled: was finished before"]
    first = _swept(tmp_path / "other", max_bytes=1000).levels[0]
    assert first.bytes_kept == 0
    assert _swept(tmp_path / "other").levels[0].bytes_kept == kept.bytes_kept
    fits = _swept(tmp_path / "other", max_bytes="1 GB", tell=told.append).levels[0]
    assert fits.bytes_kept == kept.bytes_kept
    assert told[1:] == ["50 % recycled: was finished before"]

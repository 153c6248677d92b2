"""How fast a place is: what is measured there, and that nothing is left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import small  # noqa: F401  (one thread)
from torchrecycle.errors import StoreError
from torchrecycle.store import speed
from torchrecycle.store.speed import seconds_per_cold_byte, speed_of, temporary_store


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "WRITTEN_BYTES", 2**20)
    monkeypatch.setattr(speed, "PROBE_BYTES", 2 * 2**20)
    monkeypatch.setattr(speed, "ENOUGH_SECONDS", 0.05)


@pytest.mark.parametrize("place", ["disk", "memory://"])
def test_seconds_of_rows_are_no_more_than_the_measuring_took(tmp_path: Path, place: str):
    began = time.perf_counter()
    found = speed_of(tmp_path / place if place == "disk" else place, 1000)
    took = time.perf_counter() - began
    assert found.row_bytes == 1000
    assert 0 < found.read_seconds * speed.BATCH < took
    assert 0 < found.write_seconds * speed.BATCH < took
    assert not (tmp_path / "disk").exists() or not any((tmp_path / "disk").iterdir())


def test_large_rows_take_longer_than_small_ones(tmp_path: Path):
    small_rows, large_rows = speed_of(tmp_path, 16), speed_of(tmp_path, 400_000)
    assert large_rows.read_seconds > 3 * small_rows.read_seconds
    assert large_rows.write_seconds > 3 * small_rows.write_seconds


def test_a_byte_of_a_disk_takes_longer_where_rows_are_smaller_than_a_page(tmp_path: Path):
    assert seconds_per_cold_byte(tmp_path, 64) > 3 * seconds_per_cold_byte(tmp_path, 2**20) > 0
    assert not any(tmp_path.iterdir())


def test_a_temporary_store_lies_where_it_was_asked_for_and_is_gone_afterwards(tmp_path: Path):
    def fail_within() -> None:
        with temporary_store(tmp_path / "new") as store:
            assert str(store.url).startswith(str(tmp_path / "new"))  # pyright: ignore
            speed_of(store.url, 10)  # pyright: ignore
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_within()
    assert list((tmp_path / "new").iterdir()) == []


def test_where_nothing_can_be_written_is_said_in_words(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"cannot write to .*file, to measure how fast it is"):
        speed_of(tmp_path / "file", 100)
    with pytest.raises(StoreError, match="a row has one byte at least"):
        speed_of(tmp_path, 0)

"""What every store must do, as tests to inherit.

A store of your own is tested by a class of a few lines::

    class TestMyStore(StoreContract):
        def make_store(self, tmp_path):
            return MyStore(tmp_path / "rows")

        def another(self, store):
            return MyStore(store.path)      # as another process would open it

        def flip_bit(self, store, fingerprint):
            ...                             # damage one bit of a kept row's values

Every test uses a fresh store of a few dozen rows of two leaves: pictures ``[3, 4]`` in float32, and ragged
texts ``[length, 5]`` in bfloat16. What row i holds is a formula of i, so that a row in the wrong place is
seen.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrecycle.errors import BatchError, DamagedRowError, StoreError
from torchrecycle.store import Leaf, LeafSpec, Ragged, Rows, Store

FINGERPRINT = "0123456789abcdef0123456789abcdef"
ABOUT = {"cut": "layer2", "model": "a small one"}
PICTURE = LeafSpec((3, 4), ragged=False, dtype=torch.float32)
TEXT = LeafSpec((5,), ragged=True, dtype=torch.bfloat16)
SPECS = (PICTURE, TEXT)


def keys_of(numbers: Sequence[int]) -> np.ndarray:
    """``[n, 16]`` keys. Three of four share their first half, as hashes hardly ever do."""
    keys = np.zeros((len(numbers), 16), dtype=np.uint8)
    for row, number in enumerate(numbers):
        half = 7 if number % 4 else number
        both = (half * 0x9E3779B97F4A7C15 % 2**64, number * 0xD1B54A32D192ED03 % 2**64)
        keys[row] = np.frombuffer(b"".join(part.to_bytes(8, "big") for part in both), dtype=np.uint8)
    return keys


def length_of(number: int) -> int:
    """How long text ``number`` is; some are empty."""
    return number * 7 % 6


def leaves_of(numbers: Sequence[int]) -> list[Leaf]:
    """What rows ``numbers`` hold."""
    pictures = torch.stack([torch.arange(12.0).view(3, 4) + 100 * number for number in numbers])
    texts = [(torch.arange(5.0 * length_of(n)).view(-1, 5) + n).bfloat16() for n in numbers]
    return [pictures, Ragged(torch.cat(texts), torch.tensor([length_of(n) for n in numbers]))]


def assert_same(found: Sequence[Leaf], expected: Sequence[Leaf]) -> None:
    """Assert that leaves are equal to the bit, in shape and in dtype."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Ragged):
            assert isinstance(one, Ragged)
            assert one.lengths.tolist() == other.lengths.tolist()
            one, other = one.values, other.values
        assert isinstance(one, torch.Tensor)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_holds(rows: Rows, numbers: Sequence[int]) -> None:
    """Assert that rows ``numbers`` are there and right, in this order."""
    found = rows.lookup(keys_of(numbers))
    assert (found >= 0).all(), f"missing: {[n for n, at in zip(numbers, found, strict=True) if at < 0]}"
    assert_same(rows.gather(found), leaves_of(numbers))


class StoreContract(ABC):
    """Inherit this under a name that starts with ``Test``."""

    @abstractmethod
    def make_store(self, tmp_path: Path) -> Store:
        """A new, empty store."""

    @abstractmethod
    def another(self, store: Store) -> Store:
        """The same store opened once more, as somebody else would."""

    @abstractmethod
    def flip_bit(self, store: Store, fingerprint: str) -> None:
        """Change one bit of the values of a kept row, behind the store's back."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return self.make_store(tmp_path)

    @pytest.fixture
    def rows(self, store: Store) -> Rows:
        return self.rows_of(store)

    def rows_of(self, store: Store) -> Rows:
        """The rows that the tests use."""
        return store.rows(FINGERPRINT, SPECS, ABOUT)

    def test_what_was_published_is_gathered_to_the_bit_in_any_order(self, rows: Rows) -> None:
        rows.append(keys_of(range(20)), leaves_of(range(20)))
        rows.publish()
        assert len(rows) == 20
        assert_holds(rows, range(20))
        assert_holds(rows, [3, 19, 3, 0, 12, 3])

    def test_a_batch_over_many_segments_comes_in_the_order_that_was_asked_for(self, rows: Rows) -> None:
        for start in range(0, 30, 3):
            rows.append(keys_of(range(start, start + 3)), leaves_of(range(start, start + 3)))
            rows.publish()
        order = np.random.default_rng(0).permutation(30).tolist()
        assert_holds(rows, order)
        assert_holds(rows, [*order, *order[:7]])

    def test_a_missing_key_is_minus_one(self, rows: Rows) -> None:
        assert rows.lookup(keys_of([1, 2])).tolist() == [-1, -1]
        rows.append(keys_of([1]), leaves_of([1]))
        rows.publish()
        found = rows.lookup(keys_of([2, 1, 3, 4]))
        assert found.dtype == np.int64
        assert (found >= 0).tolist() == [False, True, False, False]
        assert rows.lookup(keys_of([])).shape == (0,)

    def test_no_location_is_an_empty_batch(self, rows: Rows) -> None:
        pictures, texts = rows.gather(np.empty(0, dtype=np.int64))
        assert isinstance(pictures, torch.Tensor)
        assert isinstance(texts, Ragged)
        assert pictures.shape == (0, 3, 4)
        assert pictures.dtype == torch.float32
        assert texts.values.shape == (0, 5)
        assert texts.lengths.shape == (0,)

    def test_a_batch_of_empty_ragged_rows_has_no_values(self, rows: Rows) -> None:
        rows.append(keys_of([0, 6, 12]), leaves_of([0, 6, 12]))
        rows.publish()
        assert_holds(rows, [12, 0])

    def test_locations_may_be_a_tensor(self, rows: Rows) -> None:
        rows.append(keys_of(range(4)), leaves_of(range(4)))
        rows.publish()
        found = torch.from_numpy(rows.lookup(keys_of([2, 0])))
        assert_same(rows.gather(found), leaves_of([2, 0]))

    def test_a_location_that_lookup_never_gave_is_an_error(self, rows: Rows) -> None:
        rows.append(keys_of(range(4)), leaves_of(range(4)))
        rows.publish()
        good = int(rows.lookup(keys_of([3]))[0])
        for wrong in [-1, -(2**40), good + 1, good + 2**31, good + 2**32, 2**62]:
            for locations in [[wrong], [good, wrong], [wrong, good]]:
                with pytest.raises(StoreError):
                    rows.gather(np.array(locations, dtype=np.int64))

    def test_the_caller_owns_what_was_gathered(self, rows: Rows) -> None:
        rows.append(keys_of(range(4)), leaves_of(range(4)))
        rows.publish()
        for leaf in rows.gather(rows.lookup(keys_of(range(4)))):
            (leaf.values if isinstance(leaf, Ragged) else leaf).fill_(-1)
        assert_holds(rows, range(4))

    def test_what_is_appended_is_copied(self, rows: Rows) -> None:
        keys, leaves = keys_of(range(4)), leaves_of(range(4))
        rows.append(keys, leaves)
        keys[:] = 255
        for leaf in leaves:
            (leaf.values if isinstance(leaf, Ragged) else leaf).fill_(-1)
        rows.publish()
        assert_holds(rows, range(4))

    def test_any_memory_layout_may_be_appended(self, rows: Rows) -> None:
        pictures, texts = leaves_of(range(4))
        assert isinstance(pictures, torch.Tensor)
        turned = pictures.transpose(1, 2).contiguous().transpose(1, 2)
        rows.append(np.asfortranarray(keys_of(range(4))), [turned.requires_grad_(), texts])
        rows.publish()
        assert_holds(rows, range(4))

    def test_rows_are_invisible_until_they_are_published(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of([1]), leaves_of([1]))
        assert rows.lookup(keys_of([1])).tolist() == [-1]
        assert len(rows) == 0
        assert rows.nbytes == 0
        assert len(self.rows_of(self.another(store))) == 0
        rows.publish()
        assert len(rows) == 1
        assert rows.nbytes > 0
        assert_holds(self.rows_of(self.another(store)), [1])

    def test_another_reader_sees_new_rows_when_it_refreshes(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of([1]), leaves_of([1]))
        rows.publish()
        reader = self.rows_of(self.another(store))
        before = reader.lookup(keys_of([1]))
        rows.append(keys_of([2]), leaves_of([2]))
        rows.publish()
        assert reader.lookup(keys_of([2])).tolist() == [-1]
        reader.refresh()
        assert_holds(reader, [2, 1])
        assert reader.lookup(keys_of([1])).tolist() == before.tolist()

    def test_a_key_that_is_there_already_or_comes_twice_is_kept_once(self, rows: Rows) -> None:
        rows.append(keys_of([1, 2, 1]), leaves_of([1, 2, 1]))
        rows.append(keys_of([2, 3]), leaves_of([2, 3]))
        rows.publish()
        assert rows.verify().rows == len(rows) == 3
        nbytes = rows.nbytes
        rows.append(keys_of([3, 1, 2]), leaves_of([9, 9, 9]))
        rows.publish()
        assert len(rows) == 3
        assert rows.nbytes == nbytes
        assert_holds(rows, [1, 2, 3])

    def test_two_writers_of_the_same_rows_do_no_harm(self, store: Store, rows: Rows) -> None:
        other = self.rows_of(self.another(store))
        rows.append(keys_of([1, 2]), leaves_of([1, 2]))
        other.append(keys_of([2, 3]), leaves_of([2, 3]))
        rows.publish()
        other.publish()
        for each in (rows, other, self.rows_of(self.another(store))):
            each.refresh()
            assert len(each) == 3
            assert_holds(each, [3, 2, 1])

    def test_publishing_nothing_writes_nothing(self, store: Store, rows: Rows) -> None:
        rows.publish()
        no_texts = Ragged(torch.empty(0, 5).bfloat16(), torch.empty(0).long())
        rows.append(keys_of([]), [torch.empty(0, 3, 4), no_texts])
        rows.publish()
        assert rows.bytes_written == 0
        assert store.fingerprints() == []

    def test_leaves_of_another_form_are_refused_whole(self, rows: Rows) -> None:
        pictures, texts = leaves_of(range(2))
        assert isinstance(pictures, torch.Tensor)
        assert isinstance(texts, Ragged)
        longer = Ragged(texts.values, texts.lengths + 1)
        for wrong in [
            [pictures],
            [pictures.double(), texts],
            [pictures[:1], texts],
            [pictures[:, :2], texts],
            [texts, pictures],
            [pictures, texts.values],
            [pictures, longer],
            [pictures, Ragged(texts.values, texts.lengths.int())],
            [pictures, Ragged(texts.values, torch.tensor([-1, len(texts.values) + 1]))],
        ]:
            with pytest.raises(BatchError):
                rows.append(keys_of(range(2)), wrong)
        for keys in [keys_of(range(2))[:, :8], keys_of(range(2)).astype(np.int64)]:
            with pytest.raises(BatchError):
                rows.append(keys, [pictures, texts])
        rows.publish()
        assert len(rows) == 0

    def test_fingerprints_are_apart(self, store: Store, rows: Rows) -> None:
        other = store.rows("f" * 32, [PICTURE], {})
        rows.append(keys_of([1]), leaves_of([1]))
        rows.publish()
        assert other.lookup(keys_of([1])).tolist() == [-1]
        assert store.fingerprints() == [FINGERPRINT]
        other.append(keys_of([1]), leaves_of([2])[:1])
        other.publish()
        assert self.another(store).fingerprints() == [FINGERPRINT, "f" * 32]
        assert_holds(rows, [1])

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "x" * 200, "a.b", "a\n"])
    def test_a_fingerprint_cannot_lead_out_of_the_store(self, store: Store, name: str) -> None:
        with pytest.raises(StoreError):
            store.rows(name, SPECS, {})

    def test_rows_that_are_there_are_opened_without_knowing_their_form(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of([1, 2]), leaves_of([1, 2]))
        rows.publish()
        found = self.another(store).existing(FINGERPRINT)
        assert found.leaves == SPECS
        assert found.about == ABOUT
        assert_holds(found, [1, 2])
        with pytest.raises(StoreError, match="holds no rows"):
            store.existing("0" * 32)

    def test_about_is_kept_as_it_was_first_written(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of([1]), leaves_of([1]))
        rows.publish()
        again = self.another(store).rows(FINGERPRINT, SPECS, {"cut": "another"})
        assert again.about == ABOUT
        assert again.leaves == SPECS

    def test_rows_of_another_form_are_an_error_that_names_both(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of([1]), leaves_of([1]))
        rows.publish()
        for specs in [(PICTURE,), (TEXT, PICTURE), (PICTURE, LeafSpec((5,), True, torch.float16))]:
            with pytest.raises(StoreError, match=r"BF16.*are asked for"):
                self.another(store).rows(FINGERPRINT, specs, ABOUT)

    def test_a_flipped_bit_is_an_error_at_first_touch(self, store: Store, rows: Rows) -> None:
        rows.append(keys_of(range(8)), leaves_of(range(8)))
        rows.publish()
        self.flip_bit(store, FINGERPRINT)
        reader = self.rows_of(self.another(store))
        for _ in range(2):
            with pytest.raises(DamagedRowError, match=r"rows? \d+.* of .* does not match its checksum.*verify"):
                reader.gather(reader.lookup(keys_of(range(8))))

    def test_a_damaged_segment_is_set_aside_and_then_computed_again(self, store: Store, rows: Rows) -> None:
        for numbers in (range(8), range(8, 16)):
            rows.append(keys_of(numbers), leaves_of(numbers))
            rows.publish()
        self.flip_bit(store, FINGERPRINT)
        reader = self.rows_of(self.another(store))
        before = reader.lookup(keys_of(range(16)))
        report = reader.verify()
        assert not report.ok
        assert len(report.damaged) == 1
        assert report.damaged[0] in str(report)
        assert report.segments == 1
        assert report.rows == 8
        found = reader.lookup(keys_of(range(16)))
        assert (found < 0).sum() == 8
        assert_same(reader.gather(found[found >= 0]), leaves_of(np.flatnonzero(found >= 0).tolist()))
        with pytest.raises(StoreError, match="set aside"):
            reader.gather(before[found < 0])
        missing = np.flatnonzero(found < 0).tolist()
        reader.append(keys_of(missing), leaves_of(missing))
        reader.publish()
        assert_holds(reader, range(16))
        assert reader.verify().ok
        rows.refresh()
        assert_holds(rows, range(16))

    def test_a_sound_store_verifies(self, rows: Rows) -> None:
        assert rows.verify().ok
        for numbers in (range(8), range(8, 16)):
            rows.append(keys_of(numbers), leaves_of(numbers))
            rows.publish()
        rows.write_manifest("d" * 32, {"keys": torch.from_numpy(keys_of(range(16)))}, {})
        report = rows.verify()
        assert report.ok
        assert report.segments == 2
        assert report.rows == 16
        assert report.nbytes == rows.nbytes
        assert_holds(rows, range(16))

    def test_a_row_is_verified_once(self, rows: Rows) -> None:
        rows.append(keys_of(range(8)), leaves_of(range(8)))
        rows.publish()
        locations = rows.lookup(keys_of(range(8)))
        rows.gather(locations[:4])
        half = rows.verified_bytes
        assert half > 0
        rows.gather(locations[:4])
        assert rows.verified_bytes == half
        rows.gather(locations)
        rows.gather(locations)
        assert half <= rows.verified_bytes < rows.bytes_read

    def test_a_manifest_comes_back_and_is_replaced(self, store: Store, rows: Rows) -> None:
        assert rows.read_manifest("train") is None
        keys = torch.from_numpy(keys_of(range(5)))
        tensors = {"keys": keys, "targets": torch.arange(5), "odd": torch.ones(3).bool()}
        rows.write_manifest("train", tensors, {"name": "train", "text": 'quotes " and ümlauts'})
        found = self.rows_of(self.another(store)).read_manifest("train")
        assert found is not None
        assert found[1] == {"name": "train", "text": 'quotes " and ümlauts'}
        assert set(found[0]) == set(tensors)
        assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
        found[0]["targets"].fill_(-1)
        rows.write_manifest("train", {"targets": torch.arange(3).t()}, {})
        again = rows.read_manifest("train")
        assert again is not None
        assert again[0]["targets"].tolist() == [0, 1, 2]
        assert again[1] == {}
        with pytest.raises(StoreError):
            rows.write_manifest("../train", {}, {})

    def test_the_first_probe_stays(self, store: Store, rows: Rows) -> None:
        assert rows.read_probe() is None
        rows.write_probe({"input": torch.arange(3.0)}, {"seed": "0"})
        self.rows_of(self.another(store)).write_probe({"input": torch.zeros(3)})
        found = rows.read_probe()
        assert found is not None
        assert found[0]["input"].tolist() == [0, 1, 2]
        assert found[1] == {"seed": "0"}

    def test_a_pickled_copy_has_the_same_locations_and_not_the_waiting_rows(self, rows: Rows) -> None:
        for numbers in (range(4), range(4, 8)):
            rows.append(keys_of(numbers), leaves_of(numbers))
            rows.publish()
        locations = rows.lookup(keys_of(range(8)))
        rows.append(keys_of([9]), leaves_of([9]))
        copy = pickle.loads(pickle.dumps(rows))
        assert_same(copy.gather(locations), leaves_of(range(8)))
        assert copy.lookup(keys_of(range(8))).tolist() == locations.tolist()
        copy.publish()
        assert copy.bytes_written == 0
        assert copy.lookup(keys_of([9])).tolist() == [-1]
        rows.publish()
        assert_holds(rows, range(8))

"""What to keep under a limit: `choose` against trying all sets, and what it says."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrecycle.sweep.materialise import Candidate, MaterialiseError, candidates, choose, saved_by
from torchrecycle.sweep.results import Prediction


def _by_brute_force(cuts: list[Candidate], max_bytes: int) -> tuple[float, int]:
    """Most seconds saved by any set that fits, and the fewest bytes that save as much: the formula in plain loops."""
    best = (0.0, 0)
    for count in range(len(cuts) + 1):
        for kept in combinations(cuts, count):
            used = sum(cut.bytes for cut in kept)
            if used > max_bytes:
                continue
            saved = 0.0
            for cut in cuts:
                most = 0.0
                for other in kept:
                    if other.level == cut.level or other.level in cut.after:
                        most = max(most, other.seconds_saved)
                saved += cut.epochs * most
            if kept:
                saved -= max(cut.fill_seconds for cut in kept)
            if saved > best[0] or (saved == best[0] and used < best[1]):
                best = saved, used
    return best


@st.composite
def _cuts(draw: st.DrawFn) -> list[Candidate]:
    """Whole numbers, so that sums are exact; each cut may be computed from any that come before it."""
    found: list[Candidate] = []
    for number in range(draw(st.integers(0, 7))):
        before = draw(st.lists(st.sampled_from(found), unique=True)) if found else []
        found.append(
            Candidate(
                level=str(number),
                bytes=draw(st.integers(0, 20)),
                seconds_saved=draw(st.integers(-3, 10)),
                epochs=draw(st.integers(0, 9)),
                fill_seconds=draw(st.integers(0, 40)),
                after=tuple(cut.level for cut in before),
            )
        )
    return found


@given(_cuts(), st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_what_is_kept_saves_as_much_as_the_best_of_all_sets(cuts: list[Candidate], max_bytes: int):
    kept = choose(cuts, max_bytes)
    chosen = [cut for cut in cuts if cut.level in kept.levels]
    assert (kept.seconds_saved, kept.bytes) == _by_brute_force(cuts, max_bytes)
    assert kept.bytes == sum(cut.bytes for cut in chosen) <= max_bytes
    assert kept.seconds_saved == saved_by(cuts, chosen)


@given(_cuts(), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_each_level_is_read_from_itself_or_one_before_it_or_from_nothing(cuts: list[Candidate], max_bytes: int):
    kept = choose(cuts, max_bytes)
    by_level = {cut.level: cut for cut in cuts}
    assert list(kept.read_from) == list(by_level)
    saved = 0.0
    for level, source in kept.read_from.items():
        assert source is None or (source in kept.levels and source in (level, *by_level[level].after))
        saved += by_level[level].epochs * (0 if source is None else by_level[source].seconds_saved)
    filled = max((by_level[level].fill_seconds for level in kept.levels), default=0)
    assert saved - filled == kept.seconds_saved


VIT = [
    Candidate("50", 4_900_000_000, 100.0, 30, 200.0),
    Candidate("75", 4_900_000_000, 150.0, 30, 300.0, after=("50",)),
    Candidate("head", 25_000_000, 200.0, 150, 400.0, after=("50", "75")),
]


def test_the_rows_of_a_shallow_cut_serve_the_deeper_ones():
    kept = choose(VIT, 6_000_000_000)
    assert kept.levels == ("50", "head")
    assert kept.read_from == {"50": "50", "75": "50", "head": "head"}
    assert kept.seconds_saved == 60 * 100 + 150 * 200 - 400
    assert str(kept) == "kept: 50, head (4.9 GB), which saves 35600.0 s; 75 is computed from the rows of 50"
    assert choose(VIT, None).levels == ("50", "75", "head")
    assert choose(VIT, 30_000_000).levels == ("head",)


def test_where_no_cut_can_be_computed_from_another_each_stands_for_itself():
    alone = [Candidate(c.level, c.bytes, c.seconds_saved, c.epochs, c.fill_seconds) for c in VIT]
    kept = choose(alone, 6_000_000_000)
    assert kept.levels == ("75", "head")
    assert kept.read_from == {"50": None, "75": "75", "head": "head"}


def test_what_saves_nothing_is_not_kept_however_much_room_there_is():
    slow = Candidate("50", 10, -1.0, 30)
    assert choose([slow], None).levels == ()
    assert str(choose([slow], None)) == "nothing is kept: no cut saves time within the bytes allowed"
    assert choose([Candidate("50", 10, 1.0, 3, fill_seconds=4.0)], None).levels == ()  # filling never pays
    assert choose([Candidate("50", 10, 1.0, 5, fill_seconds=4.0)], None).seconds_saved == 1.0


def test_a_slow_cut_between_does_not_hide_a_better_one_before_it():
    cuts = [Candidate("25", 10, 5.0, 10), Candidate("50", 10, 2.0, 10, after=("25",))]
    assert choose(cuts, None).read_from == {"25": "25", "50": "25"}
    assert choose(cuts, None).bytes == 10


def test_twenty_cuts_are_chosen_from_in_a_moment():
    cuts: list[Candidate] = []
    for number in range(20):
        before = tuple(cut.level for cut in cuts)
        cuts.append(Candidate(str(number), 1000 - 31 * number % 17, 1.0 + number, 5.0 + 7 * number % 11, 9.0, before))
    began = time.process_time()
    kept = choose(cuts, 6_000)
    assert time.process_time() - began < 5
    assert 5 <= len(kept.levels) <= 6


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        ([Candidate("50", 1, 1, 1), Candidate("50", 1, 1, 1)], "two candidates are called '50'"),
        ([Candidate("50", -1, 1, 1)], "only what is saved may be negative"),
        ([Candidate("50", 1, float("nan"), 1)], "finite numbers are expected"),
        ([Candidate("50", 1, 1, 1, after=("25",))], r"computed from \['25'\]"),
        ([Candidate("50", 1, 1, 1, after=("50",))], "computed from itself"),
    ],
)
def test_candidates_that_make_no_sense_are_refused_in_words(cuts: list[Candidate], words: str):
    with pytest.raises(MaterialiseError, match=words):
        choose(cuts, 10)


def test_less_than_no_bytes_is_refused():
    with pytest.raises(MaterialiseError, match="max_bytes=-1 is less than nothing"):
        choose([], -1)


def _prediction(level: str, epoch: float, frozen: float | None, fill: float, kept: int) -> Prediction:
    return Prediction(
        level=level,
        cut=None if frozen is None else f"blocks.{level}",
        precision=None,
        objects=100,
        fill_seconds=fill,
        epoch_seconds=epoch,
        frozen_epoch_seconds=frozen,
        full_epoch_seconds=9.0,
        bytes_kept=kept,
        steps=8,
    )


def test_candidates_come_from_predictions_and_planned_epochs():
    predictions = [
        _prediction("full", 9.0, None, 0.0, 0),
        _prediction("50", 3.0, 6.0, 4.0, 800),
        _prediction("head", 1.0, 5.0, 5.0, 100),
    ]
    assert candidates(predictions, {"50": 20, "head": 150}) == (
        Candidate("50", 800, 3.0, 20, 4.0),
        Candidate("head", 100, 4.0, 150, 5.0, after=("50",)),
    )
    assert candidates(predictions, {"50": 20, "head": 150}, nested=False)[1].after == ()
    with pytest.raises(MaterialiseError, match=r"no epochs are planned for 'head': epochs has \['50'\]"):
        candidates(predictions, {"50": 20})

"""A sweep's results.json is read back as what was written, and what is none is refused in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import report_samples as samples
from torchrecycle.errors import RecycleError
from torchrecycle.files.marker import MARKER_TEXT
from torchrecycle.report.reading import ResultsError, read_result
from torchrecycle.sweep.kept import finite
from torchrecycle.sweep.results import SweepResult

ALL = samples.everything()


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def saved(result: SweepResult) -> Any:
    """As the command line writes it."""
    return json.loads(json.dumps(finite(result.to_json())))


@pytest.mark.parametrize("name", ALL)
def test_every_figure_and_word_comes_back(name, tmp_path):
    written = saved(ALL[name])
    again = read_result(write(tmp_path / "results.json", written))
    assert saved(again) == written
    assert again.samples == {}
    assert {trial.scores == {} for one in again.levels for trial in one.trials} == {True}


def test_a_folder_stands_for_the_file_in_it(tmp_path):
    write(tmp_path / "results.json", saved(ALL["predictions"]))
    assert read_result(tmp_path) == read_result(tmp_path / "results.json")
    assert read_result(tmp_path).of("50").predicted == ALL["predictions"].of("50").predicted


def test_a_null_where_a_number_has_to_be_is_not_a_number(tmp_path):
    again = read_result(write(tmp_path / "results.json", saved(ALL["quality now and then"])))
    losses = [at.loss for at in again.of("75").trials[0].curve]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, True, True]
    assert [at.quality is None for at in again.of("75").trials[0].curve] == [True, False, True, False, True]


def test_a_file_of_an_older_version_has_no_predictions_and_of_a_newer_one_more_than_is_known(tmp_path):
    written = saved(ALL["images"])
    for name in ("predictions", "expected_full", "expected_full_seconds"):
        del written[name]
    for level in written["levels"]:
        del level["predicted"]
    written |= {"moon": "full"}
    written["levels"][0]["tide"] = [1, {"high": True}]
    again = read_result(write(tmp_path / "results.json", written))
    assert again.predictions == ()
    assert again.expected_full is None
    assert again.of("75").quality == ALL["images"].of("75").quality


def _without(*path: Any) -> Any:
    value = saved(ALL["images"])
    held = value
    for step in path[:-1]:
        held = held[step]
    del held[path[-1]]
    return value


def _with(new: Any, *path: Any) -> Any:
    value = saved(ALL["images"])
    held = value
    for step in path[:-1]:
        held = held[step]
    held[path[-1]] = new
    return value


WRONG = {
    "no levels": ({"tasks": {}, "quick": True}, "it holds tasks, quick, and no levels"),
    "no object": ([1, 2], "the file is a list, and should be an object"),
    "null": (None, "the file is null, and should be an object"),
    "no bytes": (_without("levels", 2, "bytes_kept"), r"levels\[2\].bytes_kept is missing"),
    "words for bytes": (
        _with("many", "levels", 2, "bytes_kept"),
        r"levels\[2\].bytes_kept is a text, and should be a w",
    ),
    "half a byte": (
        _with(0.5, "levels", 2, "bytes_kept"),
        r"levels\[2\].bytes_kept is a number, and should be a whole",
    ),
    "yes for seconds": (
        _with(True, "levels", 1, "fill_seconds"),
        r"fill_seconds is a yes or no, and should be a number",
    ),
    "a wrong estimate": (
        _with(0.5, "untrained", "R-precision"),
        r"untrained\['R-precision'\] is a number, and should be",
    ),
    "no level at all": (_with([], "levels"), "it has no level"),
    "no training": (_with([], "levels", 3, "trials"), "level head has no training"),
    "two of a level": (_with("full", "levels", 1, "level"), "a level is there twice: full, full, 75, head"),
    "another metric": (_with("recall", "metric"), "untrained has no recall, which is the metric"),
    "no metric": (_with({}, "levels", 1, "quality"), "level 50 has no R-precision, which is the metric"),
    "a wrong recipe": (
        _with({"epochs": 3}, "levels", 1, "trials", 0, "recipe"),
        r"levels\[1\].trials\[0\].recipe.\w+ is m",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_whole_result_is_refused_with_the_place_that_is_wrong(name, tmp_path):
    value, words = WRONG[name]
    with pytest.raises(ResultsError, match=words) as caught:
        read_result(write(tmp_path / "results.json", value))
    assert str(tmp_path / "results.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (RecycleError, ValueError))


def test_a_file_that_is_not_there_or_no_json_is_told_from_one_that_is(tmp_path):
    with pytest.raises(ResultsError, match=r"there is no .*nowhere: give the folder that torchrecycle sweep"):
        read_result(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"holds no results.json: give the folder"):
        read_result(tmp_path)
    (tmp_path / "sweep.json").write_text(MARKER_TEXT)
    with pytest.raises(
        ResultsError, match=r"holds no results.json: its sweep has not ended, and goes on with the same"
    ):
        read_result(tmp_path)
    for content in (b"", b"<html>", b'{"levels": [', b"\xff\xfe", b"[" * 100_000, b"9" * 5000):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(ResultsError, match="is no JSON"):
            read_result(tmp_path)

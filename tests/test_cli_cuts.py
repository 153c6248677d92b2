"""`torchrecycle cuts --objects N`: what keeping a data set's rows costs and saves at each cut, in each precision."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from torchrecycle import cuts, recycle
from torchrecycle.cli import app
from torchrecycle.cli.cuts import _advice
from torchrecycle.models import load_model
from torchrecycle.report.cut_costs import CutCost, cut_cost_tables, predict_cut_costs, slow_cuts
from torchrecycle.store import leaf_bytes

runner = CliRunner()
MODEL = ("--model", "timm/test_resnet", "--size", "32")


def _ended(*arguments: str) -> Any:
    return runner.invoke(app, ["cuts", *MODEL, *arguments], env={"COLUMNS": "100"})


def _printed(costs: list[CutCost], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in cut_cost_tables(costs, width):
        console.print(table)
    held = console.file
    assert isinstance(held, io.StringIO)
    return held.getvalue()


def test_each_cut_and_precision_has_a_row_with_what_it_keeps():
    done = _ended("--objects", "1000", "--epochs", "30", "--precision", "own", "--precision", "int8", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    valid = {cut["name"]: cut for cut in report["cuts"] if cut["valid"]}
    told = report["predictions"]
    assert [(one["cut"], one["precision"]) for one in told] == [
        (name, precision) for name in valid for precision in ("own", "int8")
    ]
    for own, small in zip(told[::2], told[1::2], strict=True):
        assert own["bytes_kept"] == 1000 * valid[own["cut"]]["bytes_per_object"]
        assert own["bytes_kept"] / 4 < small["bytes_kept"] < own["bytes_kept"] / 2.5
        assert (own["objects"], own["epochs"]) == (1000, 30)
        assert own["computing_seconds"] == small["computing_seconds"] > 0
    assert report["example"] == {"input": [16, 3, 32, 32]}  # of which size the forward is timed


def test_the_table_is_printed_below_the_cuts_and_says_what_was_measured(tmp_path):
    done = _ended("--objects", "1000", "--precision", "float16", "--store", str(tmp_path / "deep" / "rows"))
    assert done.exit_code == 0, done.output
    _, _, below = done.stdout.partition("predicted for 1,000 objects")
    assert "layer2, float16" in below
    for words in ("paid after", "saved in", "10 epochs, s", "computed", "the disk of"):
        assert words in below
    assert list(tmp_path.iterdir()) == []  # nothing is left where it was measured


@pytest.mark.parametrize("option", [("--epochs", "3"), ("--precision", "int8"), ("--store", "rows")])
def test_what_says_nothing_without_the_size_of_the_data_is_refused_in_a_line(option):
    done = _ended(*option)
    assert done.exit_code == 2
    assert (
        done.stderr == f"torchrecycle: {option[0]} says nothing without the size of a data set: give --objects N too\n"
    )


def test_a_store_that_is_a_file_and_an_unknown_precision_are_refused_in_a_line(tmp_path):
    (tmp_path / "rows").write_text("mine")
    for arguments, words in (
        (("--store", str(tmp_path / "rows")), "cannot be a folder"),
        (("--precision", "float8"), "'float8' is not one of 'own', 'float32', 'bfloat16', 'float16', 'int8'"),
        (("--objects", "0"), "invalid value for '--objects'"),
    ):
        done = _ended("--objects", "10", *arguments)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert words in done.stderr


# -- are the figures right ---------------------------------------------------------------------------------------------


def _text_model(folder: Path) -> str:
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["own", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_row_is_as_large_as_the_store_keeps_it(tmp_path, kind, precision):
    name = _text_model(tmp_path / "model") if kind == "texts" else "timm/test_resnet"
    loaded = load_model(name, batch=4, tokens=12, size=None if kind == "texts" else 32)
    found = cuts(loaded.model, loaded.example)
    cut = found.nearest(0.5)
    assert cut is not None
    (cost,) = [
        one
        for one in predict_cut_costs(loaded.model, loaded.example, found, objects=4, precisions=(precision,))
        if one.cut == cut.name
    ]
    example = loaded.example if isinstance(loaded.example, dict) else {"x": loaded.example}
    items = [
        {name: value[at] for name, value in example.items()} if kind == "texts" else (example["x"][at], at)
        for at in range(4)
    ]
    how = None if precision == "own" else precision
    with recycle(loaded.model, loaded.example, cut=cut.name, store=tmp_path / "rows", precision=how) as recycling:
        loader = recycling.loader(items, batch_size=4)
        assert isinstance(loader, DataLoader)
        rows = torch.as_tensor(loader.dataset.locations).flatten()  # pyright: ignore
        kept = sum(leaf_bytes(leaf) for leaf in recycling.source.rows.gather(rows))
    assert cost.prediction is not None
    beside = 4 * 8 if kind == "texts" else 0  # how many tokens each row has
    assert abs(kept - cost.prediction.bytes_kept) <= beside


def test_a_cut_whose_rows_are_read_more_slowly_than_computed_is_said_to_be_one():
    layers = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(3072, 2))
    example = torch.randn(16, 3, 32, 32)
    found = cuts(layers, example)
    costs = predict_cut_costs(layers, example, found, objects=50_000, precisions=("own", "int8"), memory=0)
    assert {("0", "own"), ("0", "int8")} <= {(cost.cut, cost.precision) for cost in slow_cuts(costs)}
    lines = [line for line in _printed(costs).splitlines() if line.split()[:1] in (["0"], ["0,"])]
    assert len(lines) == 2
    assert all("never" in line and "reading is slower than computing again" in line for line in lines)


def test_rows_that_a_precision_has_no_place_for_are_said_to_be_refused():
    layers = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 8), nn.Linear(8, 2))
    with torch.no_grad():
        layers[0].weight.fill_(1e6)  # pyright: ignore
    example = torch.ones(4, 4)
    costs = predict_cut_costs(layers, example, cuts(layers, example), objects=10, precisions=("own", "float16"))
    first = next(one for one in costs if (one.cut, one.precision) == ("0", "float16"))
    assert first.prediction is None
    assert "cannot be kept so: a row holds values up to 4e+06" in " ".join(_printed(costs, 200).split())
    assert first.to_json()["refused"] == first.refused


def test_int8_rows_are_whole_numbers_and_scales_and_computing_again_takes_as_long_as_before():
    layers = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 32 * 32, 2))
    example = torch.randn(8, 3, 32, 32)
    own, small = predict_cut_costs(
        layers, example, cuts(layers, example), objects=1000, precisions=("own", "int8"), store="memory://"
    )[:2]
    assert own.prediction is not None
    assert small.prediction is not None
    assert own.cut == small.cut == "0"
    assert own.prediction.bytes_kept == 1000 * 32 * 32 * 32 * 4
    assert small.prediction.bytes_kept == 1000 * (32 * 32 * 32 + 32 * 2)
    assert own.prediction.computing_seconds == small.prediction.computing_seconds


def test_the_advice_warns_where_the_cut_nearest_to_half_does_not_pay():
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    example = torch.randn(4, 16)
    found = cuts(layers, example)
    nearest = found.nearest(0.5)
    assert nearest is not None
    costs = predict_cut_costs(layers, example, found, objects=100, precisions=("own", "int8"), store="memory://")
    (one,) = [cost for cost in costs if (cost.cut, cost.precision) == (nearest.name, "int8")]
    assert one.prediction is not None
    slow = replace(one, prediction=replace(one.prediction, reading_seconds=9.0, computing_seconds=1.0))
    assert _advice(nearest, [slow]).endswith(
        "Reading kept as int8 is slower there than computing again: freeze it without a store, or cut elsewhere"
    )
    quick = replace(one, prediction=replace(one.prediction, reading_seconds=0.1, computing_seconds=1.0))
    assert "slower" not in _advice(nearest, [quick])


@pytest.mark.parametrize("width", [40, 60, 90, 140])
def test_no_figure_is_cut_off_in_a_narrow_terminal(width):
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    example = torch.randn(4, 16)
    costs = predict_cut_costs(layers, example, cuts(layers, example), objects=1234, precisions=("own", "bfloat16"))
    printed = _printed(costs, width)
    assert all(len(line) <= width for line in printed.splitlines())
    assert "79.0 kB" in printed  # 1,234 rows of 16 numbers
    assert "39.5 kB" in printed

"""The zoo: a sample of it runs clean, and it says so when something is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchrecycle.bypass import Bypass
from torchrecycle.data.source import RowSource

ZOO = Path(__file__).parents[1] / "benchmarks" / "zoo"


@pytest.fixture(scope="module")
def zoo() -> Any:
    """The harness's modules: it is a folder of scripts, no package."""
    sys.path.insert(0, str(ZOO))
    try:
        yield type("zoo", (), {n: importlib.import_module(n) for n in ("cases", "check", "compare", "table", "pool")})
    finally:
        sys.path.remove(str(ZOO))


class Drops(nn.Module):
    """Four layers with dropout and batch statistics: one of each that a cut has to get right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        one = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)) for _ in range(4)]
        self.blocks = nn.ModuleList(one)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _case(zoo: Any, model: Any = Drops) -> Any:
    def batch(objects: int, *, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
        return torch.randn(objects, 8, generator=torch.Generator().manual_seed(seed))

    return zoo.cases.Case("test", "drops", lambda: zoo.cases.Built(model(), batch))


def test_a_sample_of_all_libraries_has_nothing_wrong_and_every_cut_was_made(tmp_path: Path):
    out = tmp_path / "zoo.json"
    command = [sys.executable, str(ZOO / "run.py"), "--sample", "--jobs", "2", "--out", str(out)]
    command += ["--progress", str(tmp_path / "progress.jsonl"), "--table", str(tmp_path / "zoo.md")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    counts = found["summary"]["all"]
    assert (counts["wrong"], counts["crash"], counts["lost"], counts["untested"]) == (0, 0, 0, 0)
    assert counts["useful"] == counts["models"] >= 10
    optional = [name for name in ("sentence_transformers", "diffusers") if importlib.util.find_spec(name)]
    assert len(found["summary"]["libraries"]) == 3 + len(optional)
    for report in found["models"]:
        equal = [cut for cut in report["cuts"] if cut["state"] == "equal"]
        assert equal
        assert all(cut["hits"] >= 4 + 3 + 4 for cut in equal if not cut["second"])
        assert all(cut["gradients"] for cut in equal)
        assert f"`{report['name']}`" in (tmp_path / "zoo.md").read_text(encoding="utf-8")


def test_a_second_run_repeats_nothing(tmp_path: Path):
    command = [sys.executable, str(ZOO / "run.py"), "--library", "torchvision", "--only", "squeezenet1_1"]
    command += ["--jobs", "1", "--out", str(tmp_path / "zoo.json"), "--progress", str(tmp_path / "progress.jsonl")]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=300, check=True) for _ in range(2)]
    assert "[  1/1]" in runs[0].stdout
    assert "1 of 1 models are known" in runs[1].stdout
    assert "[  1/1]" not in runs[1].stdout
    assert len((tmp_path / "progress.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_right_cut_is_called_equal(zoo: Any):
    report = zoo.check.check_case(_case(zoo))
    assert [cut["state"] for cut in report["cuts"]] == ["equal"] * 3, report
    assert report["useful"]
    assert report["status"] == "equal"


def test_a_suffix_that_is_off_by_a_thousandth_is_called_wrong(zoo: Any, monkeypatch: pytest.MonkeyPatch):
    right, init = Bypass.suffix, zoo.check.Trial.__init__
    broken: list[Any] = []

    def suffix(self: Any, *given: Any) -> Any:
        return right(self, *given) + 1e-3 if self in broken else right(self, *given)

    def attach(self: Any, *given: Any) -> None:
        init(self, *given)
        broken.append(self.recycling.bypass)  # after the proof, which would refuse it

    monkeypatch.setattr(Bypass, "suffix", suffix)
    monkeypatch.setattr(zoo.check.Trial, "__init__", attach)
    report = zoo.check.check_case(_case(zoo))
    assert {cut["state"] for cut in report["cuts"]} == {"wrong"}
    assert "eval, from rows: output differs by" in report["cuts"][0]["reason"]
    assert zoo.table.failed(zoo.table.summary([report])["all"])


def test_rows_that_were_tampered_with_are_called_wrong(zoo: Any, monkeypatch: pytest.MonkeyPatch):
    right = RowSource.gather
    monkeypatch.setattr(RowSource, "gather", lambda *given: [leaf * 1.00001 for leaf in right(*given)])
    report = zoo.check.check_case(_case(zoo))
    assert {cut["state"] for cut in report["cuts"]} == {"wrong"}


def test_a_row_of_another_object_is_called_wrong(zoo: Any, monkeypatch: pytest.MonkeyPatch):
    right = RowSource.gather
    monkeypatch.setattr(RowSource, "gather", lambda *given: [leaf.roll(1, 0) for leaf in right(*given)])
    report = zoo.check.check_case(_case(zoo))
    assert {cut["state"] for cut in report["cuts"]} == {"wrong"}


def test_a_prefix_left_in_training_mode_is_called_wrong(zoo: Any, monkeypatch: pytest.MonkeyPatch):
    trial = zoo.check.Trial

    def by_hand(self: Any) -> nn.Module:
        return zoo.check.copy.deepcopy(self.built.model).train()

    monkeypatch.setattr(trial, "frozen_by_hand", by_hand)  # so that the two disagree about the prefix's dropout
    report = zoo.check.check_case(_case(zoo))
    assert {cut["state"] for cut in report["cuts"]} == {"wrong"}
    assert report["cuts"][0]["reason"].startswith("train")


def test_an_error_that_is_none_of_ours_is_a_crash_and_ours_a_refusal(zoo: Any, monkeypatch: pytest.MonkeyPatch):
    def broken(self: Any, *_: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(RowSource, "gather", broken)
    report = zoo.check.check_case(_case(zoo))
    assert {cut["state"] for cut in report["cuts"]} == {"crash"}
    monkeypatch.undo()
    report = zoo.check.check_case(_case(zoo, Mixes))
    assert {cut["state"] for cut in report["cuts"]} == {"refused"}
    assert {cut["kind"] for cut in report["cuts"]} == {"a row depends on the rest of the batch"}


class Mixes(Drops):
    """Takes the mean over the batch away, at the beginning."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0))


def test_a_model_that_does_not_run_is_untested(zoo: Any):
    report = zoo.check.check_case(_case(zoo, lambda: nn.Linear(3, 3)))
    assert report["status"] == "untested"
    assert "mat1 and mat2" in report["reason"]


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_outputs_differ_by_a_bit_and_padded_places_do_not_count(zoo: Any):
    compare = zoo.compare
    a = {"states": torch.randn(2, 3, 4), "n": 3}
    b = {"states": a["states"].clone(), "n": 3}
    assert compare.first_unequal(compare.copied(a), compare.copied(b)) == ""
    b["states"][1, 2, 0] += 1.0
    assert "states differs" in compare.first_unequal(compare.copied(a), compare.copied(b))
    assert [one.path for one in compare.far(compare.copied(a), compare.copied(b))] == ["states"]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert compare.far(compare.copied(a), compare.copied(b), mask) == []
    assert "other entries" in compare.first_unequal(compare.copied(a), compare.copied({"n": 3}))
    assert "n is 4" in compare.first_unequal(compare.copied(a), compare.copied({**a, "n": 4}))


def test_nan_is_nan_and_an_infinity_on_one_side_is_infinitely_far(zoo: Any):
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert zoo.compare.first_unequal(zoo.compare.copied(a), zoo.compare.copied(a.clone())) == ""
    assert zoo.compare.distance(a, torch.tensor([1.0, float("nan"), 5.0])) == float("inf")


def test_padding_on_either_side_is_what_a_tokenizer_does(zoo: Any):
    from batches import Padded

    items = [{"ids": torch.tensor([1, 2, 3]), "y": torch.tensor(0)}, {"ids": torch.tensor([4]), "y": torch.tensor(1)}]
    assert Padded(["ids"], "right")(items)["ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert Padded(["ids"], "left")(items)["ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert Padded(["ids"], "left")(items)["y"].tolist() == [0, 1]


# -- workers -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_costs_only_its_own_case(zoo: Any):
    names = [("torchvision", "vit_l_32"), ("torchvision", "squeezenet1_1")]
    found = list(zoo.pool.run_all(names, 1, 0.01))
    assert [report["status"] for report in found] == ["timeout", "timeout"]
    assert zoo.table.failed(zoo.table.summary(found)["all"])

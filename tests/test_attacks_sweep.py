"""Sweeps under attack: data that leaks, figures that are wrong, records that are of something else.

Each was found by somebody who tried to prove a sweep wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from torchrecycle.cli import app
from torchrecycle.files import DataError, find_texts
from torchrecycle.sweep import Classify, Settings, Split, load_trunk, text_task
from torchrecycle.sweep.estimates import difference, estimate
from torchrecycle.sweep.splits import split_pairs, split_within_classes

QUICK = ["--model", "timm/test_resnet", "--size", "32", "--epochs", "1", "--no-search", "--device", "cpu"]


def _pictures(folder: Path, classes: int = 3, each: int = 40) -> Path:
    draw = np.random.default_rng(0)
    for name in range(classes):
        (folder / f"class{name}").mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{name}" / f"{i}.png")
    return folder


def _sweep(data: Path, *options: str, env: dict[str, str] | None = None) -> str:
    done = CliRunner().invoke(app, ["sweep", "images", str(data), *QUICK, *options], env=env)
    assert done.exit_code == 0, done.output
    return done.output


def _level(out: Path, level: str) -> dict[str, Any]:
    levels = json.loads((out / "results.json").read_text())["levels"]
    return next(each for each in levels if each["level"] == level)


def test_pairs_that_occur_in_both_directions_are_in_one_split():
    one, other = [f"left {i}" for i in range(50)], [f"right {i}" for i in range(50)]
    left, right = one + other, other + one
    splits = split_pairs(left, right)
    trained = {text for i in splits.train for text in (left[i], right[i])}
    tested = {text for i in splits.test for text in (left[i], right[i])}
    assert not trained & tested


def _clusters() -> tuple[int, ...]:
    """Of forty objects in two classes."""
    return Classify(["a", "b"]).clusters(Split(range(40), labels=(0,) * 20 + (1,) * 20))


def test_of_one_draw_the_error_is_not_nought():
    assert estimate([[1.0, 0.0, 1.0, 0.0]], [0, 0, 0, 0]).error > 0.2


def test_two_classes_alike_in_accuracy_do_not_make_a_figure_certain():
    right = [1.0] * 16 + [0.0] * 4
    assert estimate([right + right], _clusters()).error > 0.04


def test_noise_in_two_classes_is_seldom_taken_for_a_gain():
    draw, taken = np.random.default_rng(0), 0
    for _ in range(1000):
        one, other = (draw.random((2, 40)) < 0.8).astype(float)
        gain = difference([one], [other], _clusters())
        taken += gain.mean > 2 * gain.error and gain.mean > 0
    assert taken < 50  # of two standard errors: 23


def test_the_page_of_a_sweep_that_lies_among_the_pictures_is_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(_pictures(tmp_path / "photos"))
    _sweep(Path("."), "--levels", "head")
    assert "120 pictures of 3 classes" in _sweep(Path("."), "--levels", "head")


def test_one_new_picture_does_not_make_filling_dear(tmp_path):
    photos = _pictures(tmp_path / "photos")
    _sweep(photos, "--levels", "50", "--out", str(tmp_path / "out"))
    before = _level(tmp_path / "out", "50")["fill_seconds"]
    Image.new("RGB", (32, 32)).save(photos / "class0" / "new.png")
    _sweep(photos, "--levels", "50", "--out", str(tmp_path / "out"))
    assert _level(tmp_path / "out", "50")["fill_seconds"] < 5 * before


def test_a_sweep_without_recycling_is_refused(tmp_path):
    photos, out = _pictures(tmp_path / "photos"), str(tmp_path / "out")
    asked = ["sweep", "images", str(photos), *QUICK, "--levels", "50", "--out", out]
    done = CliRunner().invoke(app, asked, env={"TORCHRECYCLE": "off"})
    assert done.exit_code == 2
    assert "TORCHRECYCLE=off is set" in done.stderr


def test_an_epoch_without_a_store_is_timed_with_the_batch_of_this_sweep(tmp_path):
    photos, out = _pictures(tmp_path / "photos"), tmp_path / "out"
    _sweep(photos, "--levels", "50", "--out", str(out))
    before = _level(out, "50")["frozen_epoch_seconds"]
    _sweep(photos, "--levels", "50", "--out", str(out), "--batch", "4")
    assert _level(out, "50")["frozen_epoch_seconds"] != before


def test_skip_bad_goes_on_where_equal_pictures_leave_a_class_of_one(tmp_path):
    photos = _pictures(tmp_path / "photos")
    (photos / "rare").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32)).save(photos / "rare" / f"{i}.png")
    _sweep(photos, "--levels", "head", "--out", str(tmp_path / "out"), "--skip-bad")


def test_classes_of_two_can_be_told_apart_where_no_rate_is_looked_for(tmp_path):
    _sweep(_pictures(tmp_path / "photos", classes=8, each=2), "--levels", "head", "--out", str(tmp_path / "out"))


def test_a_third_for_each_class_is_in_each_split():
    """Not an attack that works: classes of three are enough."""
    splits = split_within_classes([str(i) for i in range(30)], [str(i // 3) for i in range(30)])
    assert len(splits.train) == len(splits.validation) == len(splits.test) == 10


def test_one_text_with_two_classes_is_an_error_that_can_be_left_out(tmp_path):
    rows = [(f"w{i}", "ab"[(i + n) % 2]) for n in range(2) for i in range(4)]
    rows += [(f"w{i} w{i}", "ab"[i % 2]) for i in range(40)]
    texts = find_texts(_texts(tmp_path / "t.jsonl", rows), text="text", label="label")
    trunk = load_trunk(str(_text_model(tmp_path / "model")), "texts")
    with pytest.raises(DataError, match=r"'w0' is 'a' and 'w0' is 'b', and so are 3 more.*--skip-bad"):
        text_task(texts, trunk, "classify")
    task = text_task(texts, trunk, "classify", Settings(skip_bad=True))
    assert len(task.train) + len(task.validation or ()) + len(task.test) == 40
    assert "two texts are the same and have different classes" in task.left_out[0]


def _text_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def _texts(path: Path, texts: list[tuple[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in texts))
    return path


def test_texts_that_are_one_to_the_tokenizer_are_in_one_split(tmp_path):
    texts = [(f"W{i} w{i + 1}", "ab"[i % 2]) for i in range(40)]
    table = _texts(tmp_path / "t.jsonl", [(way(text), label) for text, label in texts for way in (str, str.lower)])
    trunk = load_trunk(str(_text_model(tmp_path / "model")), "texts")
    task = text_task(find_texts(table, text="text", label="label"), trunk, "classify")
    trained = {tuple(ids.tolist()) for ids in task.train.dataset.ids}
    assert not trained & {tuple(ids.tolist()) for ids in task.test.dataset.ids}


def test_bytes_kept_are_those_of_this_data_set_also_in_a_shared_store(tmp_path):
    model = str(_text_model(tmp_path / "model"))
    short = _texts(tmp_path / "short.jsonl", [(f"w{i}", "ab"[i % 2]) for i in range(40)])
    long = _texts(tmp_path / "long.jsonl", [(" ".join([f"w{i}"] * 60), "ab"[i % 2]) for i in range(40)])
    asked = ["--model", model, "--levels", "50", "--epochs", "1", "--no-search", "--device", "cpu"]
    for table, out, store in ((short, "a", "shared"), (long, "b", "shared"), (long, "c", "own")):
        where = ["--out", str(tmp_path / out), "--store", str(tmp_path / store)]
        done = CliRunner().invoke(app, ["sweep", "texts", str(table), *asked, *where])
        assert done.exit_code == 0, done.output
    assert _level(tmp_path / "b", "50")["bytes_kept"] == _level(tmp_path / "c", "50")["bytes_kept"]


def test_similar_texts_that_leave_nothing_to_choose_a_rate_on_are_one_line(tmp_path):
    table = _texts(tmp_path / "t.jsonl", [(f"w{c}", f"class {c}") for c in range(10) for _ in range(2)])
    asked = ["--model", str(_text_model(tmp_path / "model")), "--levels", "head", "--task", "similarity"]
    done = CliRunner().invoke(app, ["sweep", "texts", str(table), *asked, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, repr(done.exception)

"""The keys under which finished trainings are kept: pinned, since hours of trainings lie under them.

They were taken before `sweep` took its options as arguments. What they depend on and what is not in our hands (the
machine, versions, what a library's random weights are) is put in its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import small  # noqa: F401  (one thread)
from torchrecycle.files import find_pairs, find_pictures, find_texts
from torchrecycle.sweep import ObjectiveTask, Settings, SweepPlan, build, engine, load_trunk
from torchrecycle.sweep.engine import Engine
from torchrecycle.sweep.records import Place

BESIDE: dict[str, Any] = {"device": "cpu", "workers": 0}


def _pictures(home: Path, what: Any, **more: Any) -> ObjectiveTask:
    for number in range(8):
        (home / "p" / f"c{number}").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (30 * number, 20 * i, 7)).save(home / "p" / f"c{number}" / f"{i}.bmp")
    trunk = load_trunk("timm/test_resnet", "images", size=32)
    return build.picture_task(
        find_pictures(home / "p"), trunk, what, Settings(epochs=2, batch_size=8, **BESIDE, **more)
    )


def _text_trunk(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
    }
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return load_trunk(str(folder), "texts")


def _texts(home: Path) -> ObjectiveTask:
    rows = [{"text": f"w{i} w{i + 1}", "label": "ab"[i % 2]} for i in range(40)]
    (home / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = find_texts(home / "t.jsonl", text="text", label="label")
    return build.text_task(texts, _text_trunk(home / "model"), "classify", Settings(**BESIDE))


def _pairs(home: Path) -> ObjectiveTask:
    rows = [{"question": f"w{i}", "answer": f"w{i} w{49 - i}"} for i in range(20)]
    (home / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = find_pairs(home / "q.jsonl", left="question", right="answer")
    return build.pair_task(pairs, _text_trunk(home / "model"), Settings(**BESIDE, rate=3e-4))


GOLDEN = {
    "pictures, classify": (
        lambda home: _pictures(home, "classify"),
        "de4083266bcf5045d4a3ba56da7a4472",
        "a734089e6619d08090360593552a9789",
        "cedbbe28fc122815abf1f0ec18cb8f2c",
        "1d54b2791c482cb1be15a6bdde6f0e0c",
    ),
    "pictures, similarity": (
        lambda home: _pictures(home, "similarity"),
        "3217ee12e4f1047db86beafe51e053b7",
        "5d8f32eb6a88a94dd06ac9cdc6ec5bc5",
        "f81d4c4ddb1a81668e1c53957104b5ff",
        "1846899656d876a37d78e91e50392f44",
    ),
    "texts": (
        _texts,
        "be7052a5c2bd5424c0200ba432d6983c",
        "6b7f9854e190ccfd41b9ffa8d2eae5f7",
        "b9a4cb17bb99977074c1e9f2ddcb4cfa",
        "d100df0190314f1a87415c4b03dffdda",
    ),
    "pairs": (
        _pairs,
        "531caa98e3c9551661438bb2bc7ad8cb",
        "481e76f890721a2a27d5a4cae24b2d0c",
        "fefb0b9ae2237d212e89b6efebeeedb1",
        "b524050d2a3d3f4b9e393ae769bf53cc",
    ),
}
"""Of each task its identity, and the keys of a final training, a place and the pretrained model."""


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "machine", lambda device: "a machine")
    monkeypatch.setattr(engine, "versions", lambda: {"python": "3", "torch": "2", "numpy": "1"})
    monkeypatch.setattr(build, "_readers", lambda: {"pillow": "1", "torchvision": "2"})
    monkeypatch.setattr(build, "_content_of", lambda trunk: "content")


def _engine(task: ObjectiveTask, home: Path, **options: Any) -> Engine:
    return Engine(task.build_model, task, SweepPlan(store=home / "store", results=home / "results", **options))


def _final_key(made: Engine) -> str:
    return made.records.trial_key("50", Place("cut", 0.5, 1, 1, "x"), made.task.recipe("50", 0.5), 1, "final")


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_finished_is_found_under_the_key_that_it_has_always_had(name: str, tmp_path: Path):
    make, identity, final, place, untrained = GOLDEN[name]
    task = make(tmp_path)
    assert task.identity == identity
    records = (made := _engine(task, tmp_path)).records
    assert _final_key(made) == final
    assert records.key(kind="place", level="50") == place
    assert records.key(kind="untrained", queries=records.queries) == untrained


def test_an_option_is_in_the_key_only_where_it_is_not_as_usual(tmp_path: Path):
    task = _pictures(tmp_path, "classify")
    usual = _final_key(_engine(task, tmp_path))
    same = ({"views": 1}, {"max_bytes": "1 GB"}, {"seeds": (3,)}, {"levels": (0.5,)}, {"search": False})
    assert {_final_key(_engine(task, tmp_path, **options)) for options in same} == {usual}
    others = [_final_key(_engine(task, tmp_path, **options)) for options in ({"views": 2}, {"precision": "bfloat16"})]
    records = _engine(task, tmp_path).records
    unkept = Place("cut", 0.5, 1, 0, "x", is_kept=False)
    others.append(records.trial_key("50", unkept, task.recipe("50", 0.5), 1, "final"))
    augmented = _pictures(tmp_path / "again", "classify", views=2)
    others.append(_final_key(_engine(augmented, tmp_path)))
    assert len({usual, *others}) == 5

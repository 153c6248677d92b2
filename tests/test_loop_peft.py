"""PEFT: adapters after the cut train on kept rows as on full forwards, whichever of the two is put on first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from small import texts, tokenizer
from torchrecycle import CutError, Recycling, StaleActivationError, recycle

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers",  # of transformers, about what PEFT calls
    "ignore:Unsupported layer type:UserWarning",  # of PEFT, about the layer norms that it tunes
)

COUNT = 16
CUT = "bert.encoder.layer.1"
AFTER = [2, 3]
"""The layers after the cut."""
TOKENS = tokenizer()
PADDING = DataCollatorWithPadding(TOKENS)


def bert() -> Any:
    """Four layers of width 32, with dropout in all of them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=30600, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=4))


def sentences() -> Any:
    return datasets.Dataset.from_dict({**TOKENS(texts(COUNT)), "labels": [i * 7 % 3 % 2 for i in range(COUNT)]})


def batch_of(*numbers: int) -> dict[str, torch.Tensor]:
    data = sentences()
    return dict(PADDING([{n: v for n, v in data[i].items() if n != "labels"} for i in numbers]))


def lora(layers: list[int] | None = None, **more: Any) -> peft.PeftConfig:
    usual: dict[str, Any] = dict(target_modules=["query", "value"], layers_to_transform=layers or AFTER, r=4)
    return peft.LoraConfig("SEQ_CLS", lora_dropout=0.1, init_lora_weights=False, **{**usual, **more})


AFTER_BY_NAME = r".*layer\.[23]\..*"
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: peft.IA3Config(
        task_type="SEQ_CLS",
        target_modules=AFTER_BY_NAME + r"(key|value|output\.dense)",
        feedforward_modules=AFTER_BY_NAME + r"[23]\.output\.dense",
        init_ia3_weights=False,
    ),
    "loha": lambda: peft.LoHaConfig(
        task_type="SEQ_CLS", target_modules=AFTER_BY_NAME + "(query|value)", r=2, init_weights=False
    ),
    "layer norms": lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=AFTER_BY_NAME + "LayerNorm"),
    "lora and the head": lambda: lora(modules_to_save=["classifier", "pooler"]),
}


def with_adapter(model: Any, config: peft.PeftConfig) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def frozen(model: Any) -> Any:
    """The reference: the first layers frozen by hand, in eval mode whatever the loop says."""
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]):
        part.requires_grad_(False).eval()
        part.train = lambda mode=True, part=part: part
    return model


def train(model: Any, batches: Any) -> list[float]:
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(3):
        for batch in batches:
            loss = model.train()(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def plain_batches() -> DataLoader[Any]:
    return DataLoader(sentences(), batch_size=8, collate_fn=PADDING)


@dataclass(frozen=True)
class Trained:
    """A PEFT model that has been trained on kept rows, and the reference."""

    model: Any
    reference: Any
    recycling: Recycling


def trained_both(order: str, make: Callable[[], peft.PeftConfig], store: Path) -> Trained:
    reference = with_adapter(frozen(bert()), make())
    want = train(reference, plain_batches())
    base = bert()
    if order == "around an attached model":
        recycling = recycle(base, batch_of(0, 5), cut=CUT, store=store)
        model = with_adapter(base, make())
    elif order == "attached to the PEFT model":
        model = with_adapter(base, make())
        recycling = recycle(model, batch_of(0, 5), cut=f"base_model.model.{CUT}", store=store)
    else:
        model = with_adapter(base, make())
        recycling = recycle(model.get_base_model(), batch_of(0, 5), cut=CUT, store=store)
    got = train(model, recycling.loader(sentences(), batch_size=8, collate_fn=PADDING))
    assert got == pytest.approx(want, rel=1e-3)
    assert want[-1] != pytest.approx(want[0], rel=1e-2), "something was learned"
    assert (recycling.stats.misses, recycling.stats.hits) == (COUNT, 3 * COUNT)
    return Trained(model, reference, recycling)


def same_weights(got: Any, want: Any) -> None:
    want = want.state_dict()
    for name, a in got.state_dict().items():
        torch.testing.assert_close(a, want[name], rtol=1e-2, atol=1e-3, msg=name)


ORDERS = ("around an attached model", "attached to the PEFT model", "attached to its base")


@pytest.mark.parametrize(
    ("order", "adapter"),
    [*((order, "lora") for order in ORDERS), *((ORDERS[0], name) for name in ADAPTERS if name != "lora")],
)
def test_an_adapter_after_the_cut_trains_as_on_the_frozen_reference(order, adapter, tmp_path):
    trained = trained_both(order, ADAPTERS[adapter], tmp_path)
    same_weights(trained.model, trained.reference)
    names = [name for name, p in trained.model.named_parameters() if p.requires_grad]
    assert names == [name for name, p in trained.reference.named_parameters() if p.requires_grad]
    assert not any("layer.0" in name or "layer.1" in name for name in names)


def test_the_adapter_is_saved_and_loads_into_a_plain_model_without_us(tmp_path, monkeypatch):
    trained = trained_both(ORDERS[0], ADAPTERS["lora and the head"], tmp_path / "store")
    trained.model.save_pretrained(tmp_path / "adapter")
    batch = batch_of(*range(COUNT))
    with torch.no_grad():
        want = trained.model.eval()(**batch).logits
        merged = trained.model.merge_and_unload()
        trained.recycling.detach()
        monkeypatch.setitem(sys.modules, "torchrecycle", None)
        loaded = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(**batch).logits, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.eval()(**batch).logits, want, rtol=1e-3, atol=1e-4)
    assert type(merged) is BertForSequenceClassification
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert all("_compiled_call_impl" not in part.__dict__ for part in merged.modules())


def test_merging_leaves_rows_of_the_prefix_as_they_are(tmp_path):
    trained = trained_both(ORDERS[0], lora, tmp_path)
    fingerprint, misses = trained.recycling.fingerprint, trained.recycling.stats.misses
    merged = trained.model.merge_and_unload()
    got = train(merged, trained.recycling.loader(sentences(), batch_size=8, collate_fn=PADDING))
    assert (trained.recycling.fingerprint, trained.recycling.stats.misses) == (fingerprint, misses)
    want = train(trained.reference.merge_and_unload(), plain_batches())
    assert got == pytest.approx(want, rel=1e-2)


@torch.no_grad()
def test_adapters_are_switched_over_the_same_rows(tmp_path):
    base = bert()
    recycling = recycle(base, batch_of(0, 5), cut=CUT, store=tmp_path)
    model = with_adapter(base, lora())
    model.add_adapter("other", lora(r=2))
    (rows,) = recycling.loader(sentences().remove_columns("labels"), batch_size=COUNT, collate_fn=PADDING)
    batch = batch_of(*range(COUNT))
    model.eval()
    found = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        got = model(**rows).logits
        torch.testing.assert_close(found.setdefault(name, got), got)
        with recycling.paused():
            torch.testing.assert_close(got, model(**batch).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        found["none"] = model(**rows).logits
        with recycling.paused():
            torch.testing.assert_close(found["none"], model(**batch).logits, rtol=1e-4, atol=1e-5)
    model.delete_adapter("other")
    torch.testing.assert_close(model(**rows).logits, found["default"])
    assert len({round(float(logits.sum()), 4) for logits in found.values()}) == 3, "each is another function"
    assert recycling.stats.misses == COUNT


def test_an_adapter_in_all_layers_is_refused_before_and_after_with_the_remedy(tmp_path):
    everywhere = with_adapter(bert(), lora(layers=[0, 1, 2, 3]))
    with pytest.raises(CutError, match=r"holds an adapter .*layers_to_transform="):
        recycle(everywhere, batch_of(0, 5), cut=f"base_model.model.{CUT}", store=tmp_path)
    base = bert()
    with recycle(base, batch_of(0, 5), cut=CUT, store=tmp_path) as recycling:
        loader = recycling.loader(sentences(), batch_size=8, collate_fn=PADDING)
        (old, _) = loader
        model = with_adapter(base, lora(layers=[0, 1, 2, 3]))
        with pytest.raises(StaleActivationError, match="the frozen prefix has moved"):
            model(**old)
        with pytest.raises(CutError, match=r"holds an adapter .*layers_to_transform="):
            next(iter(loader))


def test_a_whole_module_that_peft_trains_before_the_cut_is_refused_before_and_after(tmp_path):
    words = r"'(base_model.model.)?bert.embeddings' .*ModulesToSaveWrapper.*modules_to_save= with modules after it"
    with pytest.raises(CutError, match=words):
        recycle(
            with_adapter(bert(), lora(modules_to_save=["embeddings"])),
            batch_of(0, 5),
            cut=f"base_model.model.{CUT}",
            store=tmp_path,
        )
    base = bert()
    with recycle(base, batch_of(0, 5), cut=CUT, store=tmp_path) as recycling:
        with_adapter(base, lora(modules_to_save=["embeddings"]))
        with pytest.raises(CutError, match=words):
            recycling.loader(sentences(), batch_size=8, collate_fn=PADDING)


@pytest.mark.parametrize("order", ORDERS)
def test_after_detaching_the_adapter_trains_as_before_and_nothing_else(order, tmp_path):
    trained = trained_both(order, lora, tmp_path)
    before = [name for name, p in trained.model.named_parameters() if p.requires_grad]
    trained.recycling.detach()
    assert [name for name, p in trained.model.named_parameters() if p.requires_grad] == before
    assert train(trained.model, plain_batches())[0] > 0
    assert [name for name, p in trained.reference.named_parameters() if p.requires_grad] == before


def test_a_finished_adapter_before_the_cut_is_part_of_what_is_frozen(tmp_path):
    torch.manual_seed(5)
    with_adapter(bert(), lora(layers=[0, 1, 2, 3])).save_pretrained(str(tmp_path / "first"))

    def second(model: Any) -> Any:
        first = peft.PeftModel.from_pretrained(model, str(tmp_path / "first"), is_trainable=False)
        for name, parameter in first.named_parameters():
            parameter.requires_grad_("layer.2" in name or "layer.3" in name or "classifier" in name)
        return first

    plain = second(bert())
    frozen(plain.get_base_model())
    want = train(plain, plain_batches())
    model = second(bert())
    recycling = recycle(model, batch_of(0, 5), cut=f"base_model.model.{CUT}", store=tmp_path / "store")
    got = train(model, recycling.loader(sentences(), batch_size=8, collate_fn=PADDING))
    assert got == pytest.approx(want, rel=1e-3)
    assert recycling.stats.misses == COUNT
    plain_fingerprint = recycle(bert(), batch_of(0, 5), cut=CUT, store=tmp_path / "store").fingerprint
    assert recycling.fingerprint != plain_fingerprint, "rows of the adapted layers are other rows"


def test_a_trainer_trains_an_adapter_on_rows_and_saves_it(tmp_path):
    def run(recycled: bool) -> tuple[list[float], Any]:
        base, folder = bert(), tmp_path / str(recycled)
        data: Any = sentences()
        collate = PADDING
        if recycled:
            recycling = recycle(base, batch_of(0, 5), cut=CUT, store=tmp_path / "store")
            data, collate = recycling.dataset(data, collate_fn=PADDING), recycling.collate(PADDING)
        else:
            frozen(base)
        usual: dict[str, Any] = dict(num_train_epochs=2, per_device_train_batch_size=8, learning_rate=5e-3, seed=3)
        quiet: dict[str, Any] = dict(report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
        more: dict[str, Any] = dict(logging_steps=1, save_strategy="epoch", eval_strategy="epoch")
        model = with_adapter(base, lora())
        trainer = Trainer(
            model=model,
            args=TrainingArguments(str(folder), **usual, **quiet, **more),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collate,
        )
        trainer.train()
        log = [entry[k] for entry in trainer.state.log_history for k in ("loss", "eval_loss") if k in entry]
        return log, model

    (got, model), (want, reference) = run(True), run(False)
    assert len(got) == 6
    assert got == pytest.approx(want, rel=1e-3)
    same_weights(model, reference)
    saved = tmp_path / "True" / "checkpoint-4"
    loaded = peft.PeftModel.from_pretrained(bert(), str(saved))
    same_weights(loaded, model)

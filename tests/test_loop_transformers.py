"""An unmodified ``transformers.Trainer`` on recycled data gives what it gives with the prefix frozen by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from small import texts, tokenizer
from torchrecycle import (
    AutocastError,
    CutError,
    RandomInputError,
    RecycledTensor,
    RecycleWarning,
    Recycling,
    recycle,
)

COUNT = 22
EPOCHS = 2
CUT = "bert.encoder.layer.1"


def bert(kind: type[PreTrainedModel] = BertForSequenceClassification, **changes: Any) -> Any:
    """Four layers of width 32, with dropout in all of them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=30600, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    return kind(BertConfig(**{**sizes, "num_hidden_layers": 4, "max_position_embeddings": 64, **changes}))


def freeze(parts: Any) -> None:
    """By hand: no gradient, and eval mode whatever the trainer says."""
    for part in parts:
        part.requires_grad_(False).eval()
        part.train = lambda mode=True, part=part: part


def frozen(model: Any) -> Any:
    freeze([model.bert.embeddings, *model.bert.encoder.layer[:2]])
    return model


TOKENS = tokenizer()
PADDING = DataCollatorWithPadding(TOKENS)
DEFAULT = default_data_collator


def sentences(count: int = COUNT, **columns: Any) -> Any:
    """Texts of 3 to 13 words, tokenised, in two classes."""
    return datasets.Dataset.from_dict(
        {**TOKENS(texts(count)), "labels": [i * 7 % 3 % 2 for i in range(count)], **columns}
    )


def arguments_of(folder: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = dict(
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        seed=3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(str(folder), **{**usual, **changes})


def example_of(dataset: Any, collate: Any) -> dict[str, torch.Tensor]:
    items = [{name: value for name, value in dataset[i].items() if name in TOKENS.model_input_names} for i in (0, 5)]
    return dict(collate(items))


@dataclass
class Run:
    """A trainer that has run, on a recycled model or on the frozen reference."""

    trainer: Any
    recycling: Recycling | None = None
    filled: int = 0
    log: list[tuple[str, float]] = field(default_factory=list)

    def train(self, **more: Any) -> Run:
        self.trainer.train(**more)
        left_out = ("epoch", "step", "learning_rate", "train_", "runtime", "per_second", "total_flos")
        self.log = [
            (name, value)
            for entry in self.trainer.state.log_history
            for name, value in sorted(entry.items())
            if not any(part in name for part in left_out)
        ]
        return self


def with_trainer(
    folder: Path,
    *,
    recycled: bool,
    model: Any = None,
    dataset: Any = None,
    collate: Any = PADDING,
    evaluate: Callable[[Any], Any] | None = None,
    options: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    **more: Any,
) -> Run:
    """The user's script; two lines of it are ours.

    Args:
        evaluate: from a function that recycles a data set to what is evaluated on.
    """
    model = bert() if model is None else model
    dataset = sentences() if dataset is None else dataset
    recycling: Recycling | None = None
    if recycled:
        example = example_of(dataset, collate)
        recycling = recycle(model, example, **{"cut": CUT, "store": folder / "store", **(options or {})})
    else:
        frozen(model)

    def ours(data: Any) -> Any:
        return data if recycling is None else recycling.dataset(data, collate_fn=collate)

    trainer = Trainer(
        model=model,
        args=arguments_of(folder / "out", **(arguments or {})),
        train_dataset=ours(dataset),
        eval_dataset=None if evaluate is None else evaluate(ours),
        data_collator=collate if recycling is None else recycling.collate(collate),
        **more,
    )
    return Run(trainer, recycling, recycling.stats.misses if recycling else 0)


def same_logs(got: Run, want: Run, **tolerance: Any) -> None:
    assert [name for name, _ in got.log] == [name for name, _ in want.log]
    tolerance = tolerance or {"rel": 2e-3, "abs": 1e-4}
    assert [value for _, value in got.log] == pytest.approx([value for _, value in want.log], **tolerance)


def same_weights(got: Any, want: Any, **tolerance: Any) -> None:
    tolerance = tolerance or {"rtol": 1e-2, "atol": 1e-3}
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **tolerance)


def both(tmp_path: Path, **more: Any) -> tuple[Run, Run]:
    """(recycled, reference), trained."""
    want = with_trainer(tmp_path / "reference", recycled=False, **more).train()
    got = with_trainer(tmp_path / "recycled", recycled=True, **more).train()
    return got, want


SLOW = pytest.mark.slow

ARGUMENTS: dict[str, dict[str, Any]] = {
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "label smoothing": {"label_smoothing_factor": 0.2, "eval_strategy": "epoch"},
    "dropped last batch": {"dataloader_drop_last": True},
    "groups by length": {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch"},
    "rebalanced batches": {"train_sampling_strategy": "batch_rebalance"},
    "in order": {"train_sampling_strategy": "sequential"},
    "all columns": {"remove_unused_columns": False, "eval_strategy": "epoch", "include_num_input_tokens_seen": "all"},
    "a seed of its own for data": {"data_seed": 11},
    "steps, schedule, weight decay": {
        "max_steps": 7,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
    },
    "checkpointing": {"activation_checkpointing": True},
}
RARER = ("in order", "a seed of its own for data", "steps, schedule, weight decay", "dropped last batch")


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in RARER else ()) for name in ARGUMENTS])
def test_each_of_the_trainers_arguments_gives_the_losses_and_weights_of_the_frozen_reference(name, tmp_path):
    arguments = ARGUMENTS[name]
    evaluate = (lambda ours: ours(sentences(9))) if "eval_strategy" in arguments else None
    got, want = both(tmp_path, arguments=arguments, evaluate=evaluate)
    assert got.recycling is not None
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.misses == got.filled, "after filling, the prefix did not run"
    assert got.recycling.stats.hits > 0


@pytest.mark.parametrize("persistent", [pytest.param(False, marks=SLOW), True])
def test_workers_that_prefetch_and_persist_bring_the_same_batches(persistent, tmp_path):
    arguments = {
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": persistent,
        "eval_strategy": "epoch",
    }
    got, want = both(tmp_path, arguments=arguments, evaluate=lambda ours: ours(sentences(9)))
    assert got.recycling is not None
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.misses == got.filled


def test_declared_bf16_autocast_trains_as_the_reference_and_undeclared_is_refused(tmp_path):
    arguments = {"bf16": True}
    options: dict[str, Any] = {"options": {"level": 0.5, "cut": None, "autocast": torch.bfloat16}}
    want = with_trainer(tmp_path / "reference", recycled=False, arguments=arguments).train()
    got = with_trainer(tmp_path / "recycled", recycled=True, arguments=arguments, **options).train()
    assert got.recycling is not None
    assert got.recycling.cut == CUT
    same_logs(got, want, rel=0.1, abs=0.02)
    undeclared = with_trainer(tmp_path / "undeclared", recycled=True, arguments=arguments)
    said = r"Declare it: recycle\(\.\.\., autocast=torch\.bfloat16\)"
    with pytest.raises(AutocastError, match=said):
        undeclared.train()
    assert undeclared.recycling is not None
    with pytest.raises(AutocastError, match=said):  # the model's forward casts by itself, once Accelerate prepared it
        undeclared.recycling.fill(sentences(COUNT + 1), collate_fn=PADDING)


def test_a_checkpointed_layer_around_the_cut_gives_what_the_reference_gives(tmp_path):
    arguments = {"activation_checkpointing": True}
    model = bert()
    first, second = model.bert.encoder.layer[:2]
    freeze([model.bert.embeddings, first, second.attention])
    trainer = Trainer(model, arguments_of(tmp_path / "out", **arguments), PADDING, sentences())
    want = Run(trainer).train()
    options = {"cut": "bert.encoder.layer.1.attention"}
    got = with_trainer(tmp_path / "recycled", recycled=True, options=options, arguments=arguments).train()
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)


@pytest.mark.filterwarnings("default:None of the inputs have requires_grad:UserWarning")  # says torch, and goes on
def test_checkpoint_regions_that_would_lose_gradients_are_refused_in_words(tmp_path):
    across = bert()
    plain = across.bert.encoder.forward

    def checkpointed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda given: plain(given, *args, **kwargs), hidden, use_reentrant=False)

    across.bert.encoder.forward = checkpointed
    with pytest.raises(CutError, match="checkpoint region reaches across the cut"):
        with_trainer(tmp_path / "across", recycled=True, model=across).train()
    arguments = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(CutError, match="reentrant checkpoint region"):
        with_trainer(tmp_path / "reentrant", recycled=True, arguments=arguments).train()


class TooLarge(TrainerCallback):
    """Memory that does not do for batches of more than three."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.train_batch_size > 3:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_size_that_the_trainer_finds_by_itself(tmp_path):
    arguments = {"auto_find_batch_size": True}
    want = with_trainer(tmp_path / "reference", recycled=False, arguments=arguments, callbacks=[TooLarge()]).train()
    got = with_trainer(tmp_path / "recycled", recycled=True, arguments=arguments, callbacks=[TooLarge()]).train()
    assert got.recycling is not None
    assert got.trainer.state.train_batch_size <= 3
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.misses == got.filled


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(found.predictions, -1) == found.label_ids))}


def test_early_stopping_and_the_best_model_at_the_end_by_raw_and_recycled_evaluation_sets(tmp_path):
    held_out = sentences(15).select(range(3, 15))
    more: dict[str, Any] = dict(
        arguments={
            "num_train_epochs": 6,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_raw_loss",
            "greater_is_better": False,
            "learning_rate": 3e-3,
        },
        evaluate=lambda ours: {"recycled": ours(held_out), "raw": held_out},
        compute_metrics=accuracy,
    )

    def stopping() -> dict[str, Any]:
        return {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}

    want = with_trainer(tmp_path / "reference", recycled=False, **more, **stopping()).train()
    got = with_trainer(tmp_path / "recycled", recycled=True, **more, **stopping()).train()
    same_logs(got, want)
    measured = dict(got.log)
    assert measured["eval_raw_loss"] == pytest.approx(measured["eval_recycled_loss"], rel=1e-3)
    assert "eval_raw_accuracy" in measured
    best = [run.trainer.state.best_model_checkpoint for run in (got, want)]
    assert best[0] is not None
    assert Path(best[0]).name == Path(str(best[1])).name
    assert got.trainer.state.global_step < 6 * 6, "it stopped early"
    same_weights(got.trainer.model, want.trainer.model)


def test_predictions_are_those_of_the_reference_on_raw_and_on_recycled_data(tmp_path):
    got, want = both(tmp_path)
    assert got.recycling is not None
    data = sentences(COUNT + 13).select(range(COUNT, COUNT + 13))
    raw = got.trainer.predict(data)
    assert got.recycling.stats.misses == got.filled + 13, "raw objects run through the prefix"
    filled = got.recycling.dataset(data, collate_fn=PADDING)
    misses, hits = got.recycling.stats.misses, got.recycling.stats.hits
    recycled = got.trainer.predict(filled)
    assert (got.recycling.stats.misses, got.recycling.stats.hits) == (misses, hits + 13)
    reference = want.trainer.predict(data)
    np.testing.assert_allclose(raw.predictions, recycled.predictions, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(raw.predictions, reference.predictions, rtol=1e-2, atol=1e-2)
    assert (raw.label_ids == recycled.label_ids).all()


@pytest.mark.parametrize(
    "at", [pytest.param(3, marks=SLOW), pytest.param(6, marks=SLOW), 8], ids=["first epoch", "between", "second epoch"]
)
def test_a_resumed_run_equals_the_uninterrupted_one(at, tmp_path):
    saving: dict[str, Any] = {"arguments": {"save_strategy": "steps", "save_steps": at, "save_total_limit": 5}}
    whole = with_trainer(tmp_path, recycled=True, **saving).train()
    again = with_trainer(tmp_path, recycled=True, **saving)
    assert again.filled == 0, "the rows were found"
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
    assert again.log == whole.log
    same_weights(again.trainer.model, whole.trainer.model, rtol=0, atol=0)
    want = with_trainer(tmp_path / "reference", recycled=False, **saving).train()
    same_logs(again, want)


def test_the_saved_model_loads_without_us(tmp_path, monkeypatch):
    run = with_trainer(tmp_path, recycled=True).train()
    assert run.recycling is not None
    run.trainer.save_model(str(tmp_path / "saved"))
    want = run.trainer.predict(sentences(5)).predictions
    run.recycling.detach()
    monkeypatch.setitem(sys.modules, "torchrecycle", None)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    plain: Any = Trainer(model=loaded, args=arguments_of(tmp_path / "plain"), data_collator=PADDING)
    np.testing.assert_allclose(plain.predict(sentences(5)).predictions, want, rtol=1e-4, atol=1e-5)
    same_weights(loaded, run.trainer.model, rtol=0, atol=0)


# -- one trainer, while the recycling changes --------------------------------------------------------------------------


def switched_off(by: str, recycling: Recycling, monkeypatch: Any) -> Any:
    if by == "paused":
        return recycling.paused()
    monkeypatch.setenv("TORCHRECYCLE", "off")
    return nullcontext()


@pytest.mark.parametrize("by", ["paused", "the environment"])
def test_a_trainer_that_was_made_before_computes_all_while_recycling_is_off_and_recycles_after(
    by, tmp_path, monkeypatch
):
    more: dict[str, Any] = {"evaluate": lambda ours: {"recycled": ours(sentences(9)), "raw": sentences(9)}}
    want = with_trainer(tmp_path / "reference", recycled=False, **more).train()
    got = with_trainer(tmp_path / "recycled", recycled=True, **more)
    assert got.recycling is not None
    with switched_off(by, got.recycling, monkeypatch):
        got.train()
        assert got.recycling.stats.hits == 0
        off = got.trainer.evaluate()
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    monkeypatch.delenv("TORCHRECYCLE", raising=False)
    on = got.trainer.evaluate()
    assert got.recycling.stats.hits == 18, "those of the raw set are found by their content"
    assert [on[f"eval_{name}_loss"] for name in ("recycled", "raw")] == pytest.approx(
        [off[f"eval_{name}_loss"] for name in ("recycled", "raw")], rel=1e-4
    )


def test_what_is_made_while_recycling_is_off_recycles_when_it_is_on_again(tmp_path):
    model, data = bert(), sentences()
    recycling = recycle(model, example_of(data, PADDING), cut=CUT, store=tmp_path / "store")
    with recycling.paused():
        train, collate = recycling.dataset(data, collate_fn=PADDING), recycling.collate(PADDING)
    trainer = Trainer(model=model, args=arguments_of(tmp_path), train_dataset=train, data_collator=collate)
    Run(trainer, recycling).train()
    assert (recycling.stats.misses, recycling.stats.hits) == (COUNT, COUNT * EPOCHS)


class EachEpoch(TrainerCallback):
    """Calls a function when the second epoch begins, after the trainer has told its data set of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.epoch >= 1:
            self.function()


@pytest.mark.parametrize("columns", ["the model's", "all"])  # those that the trainer picks come one by one
def test_the_cut_moves_between_two_epochs_of_one_trainer(columns, tmp_path):
    arguments = {"remove_unused_columns": columns != "all"}
    want = with_trainer(tmp_path / "reference", recycled=False, arguments=arguments)
    want.trainer.add_callback(EachEpoch(lambda: freeze([want.trainer.model.bert.encoder.layer[2]])))
    want.train()
    got = with_trainer(tmp_path / "recycled", recycled=True, arguments=arguments)
    recycling = got.recycling
    assert recycling is not None
    got.trainer.add_callback(EachEpoch(lambda: recycling.recut("bert.encoder.layer.2")))
    same_logs(got.train(), want)
    same_weights(got.trainer.model, want.trainer.model)
    assert (recycling.stats.misses, recycling.stats.hits) == (2 * COUNT, 2 * COUNT), "each cut is filled once"


# -- collate functions -------------------------------------------------------------------------------------------------


def test_texts_of_one_length_go_through_the_default_collator(tmp_path):
    padded = TOKENS(texts(COUNT), padding="max_length", max_length=24)
    data = datasets.Dataset.from_dict({**padded, "label": [i % 2 for i in range(COUNT)]})
    got, want = both(tmp_path, dataset=data, collate=DEFAULT)
    assert got.recycling is not None
    same_logs(got, want)
    assert got.recycling.stats.misses == got.filled


def test_labels_of_tokens_are_padded_beside_kept_rows(tmp_path):
    encoded = TOKENS(texts(COUNT))
    tags = [[i % 5 for i in range(len(ids))] for ids in encoded["input_ids"]]
    data = datasets.Dataset.from_dict({**encoded, "labels": tags})
    more = {"dataset": data, "collate": DataCollatorForTokenClassification(TOKENS)}
    want = with_trainer(
        tmp_path / "reference", recycled=False, model=bert(BertForTokenClassification, num_labels=5), **more
    ).train()
    got = with_trainer(
        tmp_path / "recycled", recycled=True, model=bert(BertForTokenClassification, num_labels=5), **more
    ).train()
    assert got.recycling is not None
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.misses == got.filled


def test_a_collator_that_tokenises_needs_no_other_data_set(tmp_path):
    def tokenise(items: Sequence[Any]) -> dict[str, torch.Tensor]:
        found = TOKENS([item["text"] for item in items], padding=True, return_tensors="pt")
        return {**found, "labels": torch.tensor([item["labels"] for item in items])}

    data = datasets.Dataset.from_dict({"text": texts(COUNT), "labels": [i % 2 for i in range(COUNT)]})
    arguments = {"remove_unused_columns": False}

    def run(recycled: bool) -> Run:
        model, folder = bert(), tmp_path / str(recycled)
        recycling = None
        train: Any = data
        if recycled:
            example = {n: t for n, t in tokenise([data[0], data[5]]).items() if n != "labels"}
            recycling = recycle(model, example, cut=CUT, store=folder / "store")
            train = recycling.dataset(data, collate_fn=tokenise)
        else:
            frozen(model)
        collate = tokenise if recycling is None else recycling.collate(tokenise)
        trainer = Trainer(
            model=model, args=arguments_of(folder, **arguments), train_dataset=train, data_collator=collate
        )
        return Run(trainer, recycling, COUNT).train()

    got, want = run(True), run(False)
    assert got.recycling is not None
    same_logs(got, want)
    assert (got.recycling.stats.misses, got.recycling.stats.hits) == (COUNT, COUNT * EPOCHS)


def test_a_collator_that_leads_to_the_model_or_to_the_recycling_is_the_same_one_in_each_epoch(tmp_path):
    model, words = bert(), texts(COUNT)
    model.tokens = TOKENS  # as Sentence-Transformers has it
    example = dict(TOKENS(words[:2], padding=True, return_tensors="pt"))
    with recycle(model, example, cut=CUT, store=tmp_path) as recycling:
        for holder in (model, recycling):

            def tokenise(items: Sequence[str], holder: Any = holder) -> dict[str, torch.Tensor]:
                owner: Any = holder.model if isinstance(holder, Recycling) else holder
                return dict(owner.tokens(list(items), padding=True, return_tensors="pt"))

            loader = recycling.loader(words, batch_size=8, collate_fn=tokenise)
            for batch in [*loader, *loader]:
                assert isinstance(batch["input_ids"], RecycledTensor)
        assert recycling.stats.misses == COUNT


def t5(*, use_cache: bool = False) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=2)
    ids: dict[str, Any] = dict(vocab_size=30600, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    config = T5Config(**sizes, **ids, dropout_rate=0.0, use_cache=use_cache)  # which holds what lies at padded places
    return T5ForConditionalGeneration(config)


def test_a_model_of_sequences_trains_and_generates_by_raw_and_by_recycled_sets(tmp_path):
    encoded = TOKENS(texts(COUNT), return_token_type_ids=False)
    data = datasets.Dataset.from_dict({**encoded, "labels": [ids[:4] for ids in encoded["input_ids"]]})

    def generated(found: Any) -> dict[str, float]:
        return {"sum": float(np.where(found.predictions > 0, found.predictions, 0).sum())}

    def run(recycled: bool) -> Run:
        model, folder, recycling = t5(), tmp_path / str(recycled), None
        collate: Any = DataCollatorForSeq2Seq(TOKENS, model=model)
        train: Any = data
        if recycled:
            example = dict(collate([data[0], data[5]]))
            options: dict[str, Any] = {"cut": "encoder.block.1", "share": "freeze", "store": folder / "store"}
            recycling = recycle(model, example, **options)
            train, collate = recycling.dataset(data, collate_fn=collate), recycling.collate(collate)
        else:
            model.shared.requires_grad_(False)
            freeze(model.encoder.block[:2])
        evaluated: Any = {"ours": train, "raw": data}
        usual = arguments_of(folder, eval_strategy="epoch", num_train_epochs=1).to_dict()
        more = {"predict_with_generate": True, "generation_max_length": 6, "report_to": []}
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**{**usual, **more}),
            train_dataset=train,
            eval_dataset=evaluated,
            data_collator=collate,
            compute_metrics=generated,
        )
        return Run(trainer, recycling).train()

    got, want = run(True), run(False)
    assert got.recycling is not None
    same_logs(got, want)
    assert dict(got.log)["eval_ours_sum"] == dict(got.log)["eval_raw_sum"] > 0
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.hits >= 2 * COUNT


def test_a_model_whose_rows_depend_on_the_padding_says_so_where_batches_of_other_lengths_find_none(tmp_path):
    model = t5(use_cache=True)
    collate: Any = DataCollatorForSeq2Seq(TOKENS, model=model)
    items = [{**TOKENS(text, return_token_type_ids=False), "labels": [5, 6]} for text in texts(6)]
    options: dict[str, Any] = {"cut": "encoder.block.1", "share": "freeze", "store": tmp_path}
    with recycle(model, dict(collate(items[:2])), **options) as recycling:
        for batch in recycling.loader(items, batch_size=6, collate_fn=collate):
            model.train()(**batch)
        assert recycling.stats.hits == 6
        raw = recycling.collate(collate)(items[:2])
        for _ in range(9):
            model(**raw)
        with pytest.warns(RecycleWarning, match=r"depend on the padding \(right: .*cache.*use_cache = False"):
            model(**raw)
        assert recycling.stats.hits == 6


def test_a_collator_that_draws_masks_is_refused_with_the_remedy(tmp_path):
    data = sentences().remove_columns("labels")
    masking = DataCollatorForLanguageModeling(TOKENS, mlm_probability=0.3)
    model = bert(BertForMaskedLM)
    recycling = recycle(model, example_of(data, PADDING), cut=CUT, store=tmp_path / "store", share="freeze")
    with pytest.raises(RandomInputError, match=r"the collate function .* __getitem__"):
        recycling.dataset(data, collate_fn=masking)


# -- pictures ----------------------------------------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    """As a processor gives them."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": index % 3, "file": f"{index}.png"}


def vit() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32)
    more: dict[str, Any] = dict(num_hidden_layers=4, num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.1)
    return ViTForImageClassification(ViTConfig(**sizes, **more))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vision_model_trains_without_its_pictures(workers, tmp_path):
    data = Pictures(COUNT)
    arguments = {"dataloader_num_workers": workers, "eval_strategy": "epoch"}

    def run(recycled: bool) -> Run:
        model, folder = vit(), tmp_path / str(recycled)
        recycling = None
        train: Any = data
        if recycled:
            recycling = recycle(model, {"pixel_values": data.pixels[:2]}, cut="vit.layers.1", store=folder / "store")
            train = recycling.dataset(data, collate_fn=DEFAULT)
        else:
            freeze([model.vit.embeddings, *model.vit.layers[:2]])
        collate = DEFAULT if recycling is None else recycling.collate(DEFAULT)
        trainer = Trainer(
            model=model,
            args=arguments_of(folder, **arguments),
            train_dataset=train,
            eval_dataset={"recycled": train, "raw": Pictures(7, seed=2)},
            data_collator=collate,
        )
        return Run(trainer, recycling, COUNT).train()

    got, want = run(True), run(False)
    assert got.recycling is not None
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert got.recycling.stats.misses == COUNT + 7 * EPOCHS, "only the raw evaluation set ran through the prefix"


# -- without another data set ------------------------------------------------------------------------------------------


@pytest.fixture
def looked_up(tmp_path: Path) -> Iterator[Run]:
    model, data = bert(), sentences()
    with recycle(model, example_of(data, PADDING), cut=CUT, store=tmp_path / "store") as recycling:
        recycling.fill(data, collate_fn=PADDING)
        recycling.looks_up = True
        trainer = Trainer(model=model, args=arguments_of(tmp_path / "out"), train_dataset=data, data_collator=PADDING)
        yield Run(trainer, recycling, COUNT)


def test_a_trainer_that_is_changed_in_nothing_finds_the_rows_of_raw_batches(looked_up, tmp_path):
    got, want = looked_up.train(), with_trainer(tmp_path / "reference", recycled=False).train()
    same_logs(got, want)
    same_weights(got.trainer.model, want.trainer.model)
    assert (got.recycling.stats.misses, got.recycling.stats.hits) == (COUNT, COUNT * EPOCHS)


def test_raw_batches_with_some_unknown_objects_are_looked_up_and_computed_where_needed(looked_up):
    recycling, model = looked_up.recycling, looked_up.trainer.model.eval()
    batch = PADDING([{n: v for n, v in one.items() if n != "labels"} for one in sentences(COUNT + 3)])
    with torch.no_grad():
        got = model(**batch).logits
        assert (recycling.stats.misses, recycling.stats.hits) == (COUNT + 3, COUNT)
        with recycling.paused():
            want = model(**batch).logits
    assert not isinstance(batch["input_ids"], RecycledTensor), "the user's batch stays what it is"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

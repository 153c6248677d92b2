"""Training through Lightning with rows in place of frozen encoders: what is kept, what is run, what is refused."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import small
from torchrecycle.errors import BatchError, CutError, RecycleError, RecycleWarning
from torchrecycle.similarity import (
    ArcFaceLoss,
    AttachedMetric,
    CacheConfig,
    CacheError,
    CacheType,
    ContrastiveLoss,
    Encoder,
    GroupSimilarityDataLoader,
    MultipleNegativesRankingLoss,
    PairSimilarityDataLoader,
    Quaterion,
    RecycledEncoder,
    RetrievalReciprocalRank,
    RetrievalRPrecision,
    SequentialHead,
    SimilarityGroupDataset,
    SimilarityGroupSample,
    SimilarityModel,
    SimilarityPairSample,
    SkipConnectionHead,
    TextInputs,
    TrainableModel,
    TripletLoss,
    XbmConfig,
    XbmError,
    fit,
)
from torchrecycle.similarity.batches import ModelInputs, SampleBatches
from torchrecycle.similarity.stages import EncoderStage
from torchrecycle.similarity.teaching import NothingToLearnError

RAN: Counter[str] = Counter()
"""How many objects each encoder has run for."""


class Vectors(Encoder):
    """A frozen encoder of 16 numbers to 8."""

    def __init__(self, name="vectors", seed=0, trainable=False, scale=1.0):
        super().__init__()
        self.name, self.is_trained, self.scale = name, trainable, scale
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))

    @property
    def trainable(self):
        return self.is_trained

    @property
    def embedding_size(self):
        return 8

    def forward(self, batch):
        RAN[self.name] += len(batch)
        return self.layers(batch)

    def get_collate_fn(self):
        return self.collate

    def collate(self, objects):
        return self.scale * torch.stack([torch.as_tensor(obj) for obj in objects])


class Samples(Dataset):
    """Forty objects in ten groups; counts how often it is read."""

    def __init__(self, count=40, groups=10, reads=None):
        self.values = torch.randn(count, 16, generator=torch.Generator().manual_seed(3))
        self.groups = torch.arange(count) % groups
        self.reads = [0] if reads is None else reads

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        READS[0] += 1
        return SimilarityGroupSample(self.values[index].clone(), int(self.groups[index]))


READS = [0]


@pytest.fixture(autouse=True)
def from_nought():
    RAN.clear()
    READS[0] = 0


def a_model(
    encoders=None, loss=None, cache=None, head=None, metrics=(), xbm=None, rate=1.0, kind=TrainableModel, **methods
):
    """A trainable model of such parts, all made anew by each call."""

    class Made(kind):
        def configure_encoders(self):
            return encoders() if encoders else Vectors()

        def configure_head(self, input_embedding_size):
            torch.manual_seed(1)
            return head(input_embedding_size) if head else SkipConnectionHead(input_embedding_size)

        def configure_loss(self):
            return loss() if loss else TripletLoss(mining="all", margin=0.5)

        def configure_caches(self):
            return cache

        def configure_metrics(self):
            return list(metrics)

        def configure_xbm(self):
            return xbm

        def configure_optimizers(self):
            # With Adam the last bits of a row would decide where a gradient is nearly zero.
            return torch.optim.SGD(self.model.parameters(), rate)

    for name, method in methods.items():
        setattr(Made, name, method)
    made = Made()
    made.__dict__["began"] = weights(made)
    return made


def trainer(epochs=2, **arguments):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_epochs=epochs, **{**quiet, **arguments})


def group_loader(dataset=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    arguments = {"batch_size": 16, "shuffle": True, "generator": generator, **arguments}
    return GroupSimilarityDataLoader(Samples() if dataset is None else dataset, **arguments)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.model.parameters() if p.requires_grad])


def learned(model):
    """How far the weights have moved."""
    moved = weights(model) - model.began
    assert float(moved.norm()) > 1e-5, "nothing was learned, so nothing can be compared"
    return moved


def distance(a, b):
    return float((a - b).norm() / b.norm())


# -- what is kept, and what is run -------------------------------------------------------------------------------------


def test_training_on_rows_is_training_on_objects(tmp_path):
    trained = []
    for cache in (None, CacheConfig(), CacheConfig(save_dir=tmp_path), CacheConfig(CacheType.CPU, save_dir=tmp_path)):
        model = a_model(cache=cache)
        fit(model, trainer(3), group_loader())
        trained.append(learned(model))
    for kept in trained[1:]:
        assert distance(kept, trained[0]) < 1e-3


def test_the_frozen_encoder_runs_once_for_each_object_and_the_data_set_is_read_no_more(tmp_path):
    cache = CacheConfig(save_dir=tmp_path)
    few = 80  # what it is tried on when it is attached
    fit(a_model(cache=cache), trainer(1), group_loader())
    assert RAN["vectors"] <= 40 + few
    RAN.clear()
    fit(a_model(cache=cache), trainer(5), group_loader())
    ran, read = RAN["vectors"], READS[0]
    assert ran <= few
    RAN.clear()
    READS[0] = 0
    fit(a_model(cache=cache), trainer(50), group_loader())
    assert RAN["vectors"] <= ran + 45 * 2, "two objects in each further epoch, to see whether they come out the same"
    assert READS[0] <= read


def test_validation_objects_are_kept_too(tmp_path):
    cache = CacheConfig(save_dir=tmp_path)
    other = Samples(24)
    other.values = other.values + 1
    for _ in range(2):
        RAN.clear()
        fit(a_model(cache=cache), trainer(4), group_loader(), group_loader(other, shuffle=False))
    assert RAN["vectors"] <= 120 < 4 * 64


def test_without_a_folder_rows_last_as_long_as_the_model():
    model = a_model(cache=CacheConfig())
    fit(model, trainer(1), group_loader())
    once = RAN["vectors"]
    RAN.clear()
    fit(model, trainer(1), group_loader())
    assert RAN["vectors"] <= once - 40


def test_rows_in_memory_end_with_the_model_and_stay_out_of_its_copies():
    model = a_model(cache=CacheConfig())
    fit(model, trainer(1), group_loader())
    assert copy.deepcopy(model).rows_in_memory is None
    store = weakref.ref(model.rows_in_memory)
    assert len(store().fingerprints()) == 1
    del model
    gc.collect()
    assert store() is None


def test_data_that_grew_are_computed_where_they_are_new(tmp_path, monkeypatch):
    # Whether two objects are run again at an iteration hangs on how quick that was: here at each.
    monkeypatch.setattr("torchrecycle.recycling.drift.SMALL", float("inf"))
    cache = CacheConfig(save_dir=tmp_path)
    fit(a_model(cache=cache), trainer(1), group_loader(Samples(40)))
    RAN.clear()
    fit(a_model(cache=cache), trainer(1), group_loader(Samples(40)))
    nothing_new = RAN["vectors"]
    RAN.clear()
    fit(a_model(cache=cache), trainer(1), group_loader(Samples(50)))
    # The generator gives the same first numbers for more objects only where it draws them in order.
    new = (~torch.isin(Samples(50).values[:, 0], Samples(40).values[:, 0])).sum()
    assert RAN["vectors"] - nothing_new in range(int(new), int(new) + 3)


def test_another_checkpoint_another_preprocessing_and_an_edited_object_are_other_rows(tmp_path):
    def trained(**changes):
        edit = changes.pop("edit", 0.0)
        dataset = Samples()
        dataset.values[7] += edit
        found = []
        for cache in (None, CacheConfig(save_dir=tmp_path)):
            model = a_model(encoders=lambda: Vectors(**changes), cache=cache)
            fit(model, trainer(2), group_loader(dataset))
            found.append(learned(model))
        return found

    for changes in ({}, {"seed": 1}, {"scale": 2.0}, {"edit": 1.0}):
        plain, kept = trained(**changes)
        assert distance(kept, plain) < 1e-3, changes


def test_an_encoder_that_moves_in_the_middle_of_a_training_is_computed_anew():
    def moving(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.model.encoders["default"].layers[0].weight.mul_(-1.0)

    trained = []
    for cache in (None, CacheConfig()):
        model = a_model(cache=cache, on_train_epoch_start=None)
        type(model).on_train_epoch_end = lambda self: None
        del type(model).on_train_epoch_start

        class Move(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 0:
                    with torch.no_grad():
                        pl_module.model.encoders["default"].layers[0].weight.mul_(-1.0)

        fit(model, trainer(3, callbacks=[Move()]), group_loader())
        trained.append(learned(model))
    assert distance(trained[1], trained[0]) < 1e-3


def _edited(what):
    """A callback that changes something after the first epoch."""

    class Edit(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                what(pl_module)

    return Edit()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_edited_between_two_epochs_is_seen_in_the_next(workers):
    def objects(model, dataset):
        dataset.values.mul_(-0.5)

    def groups(model, dataset):
        dataset.groups.copy_(dataset.groups.flip(0) // 2)

    def preprocessing(model, dataset):
        model.model.encoders["default"].scale = 3.0

    def half(model, dataset):
        dataset.values, dataset.groups = dataset.values[:24], dataset.groups[:24]

    for edit in (objects, groups, preprocessing, half):
        trained = []
        for cache in (None, CacheConfig()):
            model, dataset = a_model(cache=cache), Samples()
            loader = group_loader(dataset, num_workers=workers, shuffle=False)
            fit(model, trainer(3, callbacks=[_edited(lambda m, d=dataset, e=edit: e(m, d))]), loader)
            trained.append(learned(model))
        assert distance(trained[1], trained[0]) < 1e-3, edit.__name__


def test_one_encoder_under_two_names_is_refused_or_right(tmp_path):
    def twice():
        encoder = Vectors()
        return {"one": encoder, "two": encoder}

    plain = a_model(encoders=twice)
    fit(plain, trainer(2), group_loader())
    kept = a_model(encoders=twice, cache=CacheConfig(save_dir=tmp_path))
    fit(kept, trainer(2), group_loader())
    assert distance(learned(kept), learned(plain)) < 1e-3


def test_a_copy_of_the_model_runs_its_encoders_on_objects(tmp_path):
    copies = []
    model = a_model(cache=CacheConfig(save_dir=tmp_path))
    fit(model, trainer(1, callbacks=[_edited(lambda m: copies.append(copy.deepcopy(m.model)))]), group_loader())
    objects = list(Samples().values)
    assert copies[0]._stages == {}
    assert torch.equal(copies[0].encode(objects, to_numpy=False), model.model.encode(objects, to_numpy=False))


def test_after_fit_everything_is_as_before(tmp_path):
    model = a_model(cache=CacheConfig(save_dir=tmp_path))
    encoder = model.model.encoders["default"]
    before = {name: dict(vars(module)) for name, module in encoder.named_modules()}
    loader = group_loader()
    attributes = {name: value for name, value in vars(loader).items() if name != "generator"}
    fit(model, trainer(1), loader)
    assert {name: dict(vars(module)) for name, module in encoder.named_modules()} == before
    assert {name: value for name, value in vars(loader).items() if name != "generator"} == attributes
    assert model.model._stages == {}
    objects, targets = next(iter(loader))
    assert len(objects) == len(targets["groups"]) == 16


def test_an_exception_in_training_leaves_everything_as_before():
    class Boom(Exception):
        pass

    def explode(self, **kwargs):
        raise Boom

    model = a_model(cache=CacheConfig(), process_results=explode)
    encoder = model.model.encoders["default"]
    with pytest.raises(Boom):
        fit(model, trainer(1), group_loader())
    assert model.model._stages == {}
    assert "_compiled_call_impl" not in vars(encoder) or encoder._compiled_call_impl is None


def test_recycling_can_be_switched_off_from_outside(monkeypatch):
    monkeypatch.setenv("TORCHRECYCLE", "off")
    model = a_model(cache=CacheConfig())
    fit(model, trainer(2), group_loader())
    assert RAN["vectors"] >= 80
    monkeypatch.delenv("TORCHRECYCLE")
    other = a_model(cache=CacheConfig())
    fit(other, trainer(2), group_loader())
    assert distance(learned(model), learned(other)) < 1e-3


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_fills_the_same_rows(tmp_path, workers):
    model = a_model(cache=CacheConfig(save_dir=tmp_path, num_workers=workers))
    fit(model, trainer(2), group_loader())
    plain = a_model()
    fit(plain, trainer(2), group_loader(num_workers=workers))
    assert distance(learned(model), learned(plain)) < 1e-3


# -- several encoders --------------------------------------------------------------------------------------------------


def both(objects=None, **changes):
    return {"one": Vectors("one", **changes), "two": Vectors("two", seed=1)}


def test_each_encoder_has_its_own_cache(tmp_path):
    cache = CacheConfig(save_dir=tmp_path)
    fit(a_model(encoders=both, cache=cache), trainer(1), group_loader())
    RAN.clear()
    fit(a_model(encoders=lambda: both(seed=5), cache=cache), trainer(1), group_loader())
    assert RAN["one"] >= 40
    assert RAN["two"] <= 80 < RAN["one"] + 40


def test_a_trained_encoder_beside_a_cached_one_trains(tmp_path):
    def encoders():
        return {"one": Vectors("one"), "two": Vectors("two", seed=1, trainable=True)}

    trained = []
    for cache in (None, CacheConfig(mapping={"one": CacheType.DISK}, cache_type=None, save_dir=tmp_path)):
        RAN.clear()
        model = a_model(encoders=encoders, cache=cache)
        fit(model, trainer(6), group_loader())
        trained.append(learned(model))
        assert RAN["two"] == 6 * 40
    assert RAN["one"] < 6 * 40
    assert distance(trained[1], trained[0]) < 1e-3


def test_an_encoder_that_the_mapping_leaves_out_runs_for_every_batch(tmp_path):
    cache = CacheConfig(mapping={"two": CacheType.NONE}, save_dir=tmp_path)
    fit(a_model(encoders=both, cache=cache), trainer(6), group_loader())
    assert RAN["two"] == 6 * 40
    assert RAN["one"] < 6 * 40


# -- pairs of texts ----------------------------------------------------------------------------------------------------


class Texts(Encoder):
    """A frozen BERT of four layers, with the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.bert = small.bert().bert
        self.__dict__["inputs"] = TextInputs(small.tokenizer(), max_length=24)

    @property
    def trainable(self):
        return False

    @property
    def embedding_size(self):
        return 32

    def forward(self, batch):
        RAN["texts"] += len(batch["input_ids"])
        hidden = self.bert(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def get_collate_fn(self):
        return self.inputs


class Questions(Dataset):
    def __init__(self, count=24):
        self.texts = small.texts(2 * count)

    def __len__(self):
        return len(self.texts) // 2

    def __getitem__(self, index):
        READS[0] += 1
        return SimilarityPairSample(self.texts[index], self.texts[index + len(self)], subgroup=index)


def pair_loader(dataset=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    arguments = {"batch_size": 8, "shuffle": True, "generator": generator, **arguments}
    return PairSimilarityDataLoader(Questions() if dataset is None else dataset, **arguments)


def test_pairs_of_texts_train_on_rows_as_on_texts(tmp_path):
    trained = []
    for cache in (None, CacheConfig(save_dir=tmp_path), CacheConfig(save_dir=tmp_path)):
        RAN.clear()
        READS[0] = 0
        model = a_model(
            encoders=Texts,
            loss=lambda: MultipleNegativesRankingLoss(symmetric=True),
            cache=cache,
            rate=0.02,
            metrics=[AttachedMetric("rr", RetrievalReciprocalRank(), on_epoch=True)],
        )
        runner = trainer(3)
        fit(model, runner, pair_loader(), pair_loader(shuffle=False))
        trained.append((learned(model), float(runner.callback_metrics["rr_validation"]), RAN["texts"]))
    assert distance(trained[1][0], trained[0][0]) < 1e-3
    assert distance(trained[2][0], trained[0][0]) < 1e-3
    assert trained[1][1] == pytest.approx(trained[0][1], abs=1e-6)
    assert trained[0][2] == 3 * 48 * 2 + 32, "without a cache each text runs in each epoch, and two batches beforehand"
    assert trained[2][2] < trained[1][2] - 40, "the second time no text runs but those that it is tried on"


class Tokenising(Texts):
    """The same, given texts, which it tokenises itself."""

    def forward(self, batch):
        assert all(isinstance(text, str) for text in batch)
        return super().forward(self.inputs(batch))

    def get_collate_fn(self):
        return list


def test_an_encoder_that_tokenises_by_itself_is_kept_by_its_texts(tmp_path):
    class Foreign(Questions):
        def __init__(self):
            super().__init__()
            self.texts = [text + " größer 好 \U0001f600"[: number % 12] for number, text in enumerate(self.texts)]

    trained = []
    for cache in (None, CacheConfig(save_dir=tmp_path), CacheConfig(save_dir=tmp_path)):
        RAN.clear()
        model = a_model(encoders=Tokenising, loss=MultipleNegativesRankingLoss, cache=cache, rate=0.02)
        fit(model, trainer(2), pair_loader(Foreign()))
        trained.append((learned(model), RAN["texts"]))
    assert distance(trained[1][0], trained[0][0]) < 1e-3
    assert distance(trained[2][0], trained[0][0]) < 1e-3
    assert trained[2][1] <= trained[1][1] - 48
    with pytest.raises(CacheError, match="let it tokenise"):
        fit(
            a_model(
                encoders=lambda: RecycledEncoder(
                    Pooled(), cut="bert.encoder.layer.1", embedding_size=32, collate_fn=list
                ),
                loss=MultipleNegativesRankingLoss,
            ),
            trainer(1),
            pair_loader(),
        )


class Tokens(Texts):
    """A frozen BERT whose tokens go to the head."""

    def forward(self, batch):
        hidden = self.bert(**batch).last_hidden_state
        return {"hidden": hidden, "attention_mask": batch["attention_mask"]}


class Attend(nn.Module):
    """The mean over tokens, by learned shares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.score = nn.Linear(32, 1)

    def forward(self, tokens):
        scores = self.score(tokens["hidden"]).squeeze(-1)
        share = scores.masked_fill(tokens["attention_mask"] == 0, -1e9).softmax(1)
        return (share.unsqueeze(-1) * tokens["hidden"]).sum(1)


def test_token_sequences_of_a_frozen_encoder_go_to_the_head_as_they_are(tmp_path):
    trained = []
    for cache in (None, CacheConfig(save_dir=tmp_path)):
        model = a_model(
            encoders=Tokens,
            head=lambda size: SequentialHead(Attend(), SkipConnectionHead(32), output_size=32),
            loss=MultipleNegativesRankingLoss,
            cache=cache,
            rate=0.02,
        )
        fit(model, trainer(2), pair_loader())
        trained.append(learned(model))
    assert distance(trained[1], trained[0]) < 1e-3


def test_kept_tokens_are_the_encoders_for_each_batch():
    encoder, dataset, loader = Tokens().eval(), Questions(), pair_loader()
    collate = encoder.get_collate_fn()
    stage = EncoderStage.attach("default", encoder, dataset, SimilarityPairSample, store="memory://tokens")
    rows = stage.rows(
        dataset, SimilarityPairSample, collate=collate, extractor=None, name=None, batch_size=32, num_workers=0
    )
    batches = SampleBatches(
        dataset, SimilarityPairSample, loader.collate_fn, ModelInputs({"default": collate}, {}), {"default": rows}
    )
    for chosen in ([0, 1, 2], [20, 5, 23, 9], [3]):
        features, targets = batches.__getitems__(chosen)
        kept = stage(features["data"]["default"])
        objects, wanted = loader.collate_fn([dataset[index] for index in chosen])
        fresh = encoder(collate(objects))
        real = fresh["attention_mask"].bool()
        assert torch.equal(kept["attention_mask"], fresh["attention_mask"])
        assert float((kept["hidden"] - fresh["hidden"])[real].abs().max()) < 1e-5
        assert all(torch.equal(targets[name], wanted[name]) for name in wanted)
    assert stage.recycling.stats.hits == 16
    stage.detach()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(24, "sample 24, and the data set has 24"), (-1, "sample -1"), ((3, 5), "a tuple"), (1.7, "a float")],
)
def test_a_sampler_over_another_data_set_gets_no_other_samples_objects(wrong, words):
    encoder, dataset, loader = Tokens().eval(), Questions(), pair_loader()
    collate = encoder.get_collate_fn()
    stage = EncoderStage.attach("default", encoder, dataset, SimilarityPairSample, store="memory://other-sampler")
    rows = stage.rows(
        dataset, SimilarityPairSample, collate=collate, extractor=None, name=None, batch_size=32, num_workers=0
    )
    batches = SampleBatches(
        dataset, SimilarityPairSample, loader.collate_fn, ModelInputs({"default": collate}, {}), {"default": rows}
    )
    with pytest.raises(BatchError, match=words):
        batches.__getitems__([0, wrong])
    with pytest.raises(BatchError, match=words):
        list(batches.many([[0, 1], [wrong]]))
    stage.detach()


# -- any model, cut anywhere -------------------------------------------------------------------------------------------


def recycled_pictures(cut="stages.1", **arguments):
    model = small.residual()
    model.head = nn.Identity()
    return RecycledEncoder(model, cut=cut, embedding_size=32, **arguments)


def pictures_dataset(count=24):
    return SimilarityGroupDataset([(picture, n % 6) for n, picture in enumerate(small.pictures(count))])


@pytest.mark.parametrize("level", [None, 0.66])
def test_a_recycled_encoder_trains_what_comes_after_its_cut(tmp_path, level):
    cut = None if level is not None else "stages.1"
    trained = []
    for where in (None, tmp_path):
        model = a_model(
            encoders=lambda: recycled_pictures(cut, level=level),
            cache=None if where is None else CacheConfig(save_dir=where),
            rate=1e-3,
        )
        before = copy.deepcopy(model.model.encoders["default"].state_dict())
        fit(model, trainer(2), group_loader(pictures_dataset(), batch_size=12))
        after = model.model.encoders["default"].state_dict()
        moved = {".".join(name.split(".")[:3]) for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"model.stages.2"}
        trained.append(after)
        assert all(p.requires_grad for p in model.model.encoders["default"].parameters())
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-5), name


class Pooled(nn.Module):
    """A BERT's first token."""

    def __init__(self):
        super().__init__()
        self.bert = small.bert().bert

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


def test_a_recycled_encoder_of_texts_is_saved_with_its_tokenizer(tmp_path):
    inputs = TextInputs(small.tokenizer(), max_length=24)
    model = a_model(
        encoders=lambda: RecycledEncoder(Pooled(), cut="bert.encoder.layer.1", embedding_size=32, collate_fn=inputs),
        loss=MultipleNegativesRankingLoss,
        cache=CacheConfig(save_dir=tmp_path / "rows"),
        rate=1e-3,
    )
    before = copy.deepcopy(model.model.state_dict())
    fit(model, trainer(2), pair_loader())
    moved = {n for n, v in model.model.state_dict().items() if not torch.equal(v, before[n])}
    assert any("layer.2" in name for name in moved)
    assert not any("layer.1." in name or "embeddings" in name for name in moved)
    model.save_servable(tmp_path / "servable")
    loaded = SimilarityModel.load(tmp_path / "servable")
    texts = small.texts(5)
    assert torch.equal(loaded.encode(texts, to_numpy=False), model.model.encode(texts, to_numpy=False))


def test_a_cut_that_is_not_there_is_refused():
    with pytest.raises(CutError, match=r"no module 'stages.9'"):
        recycled_pictures("stages.9")
    with pytest.raises(CutError, match="either cut"):
        RecycledEncoder(small.residual(), embedding_size=32)


# -- keys of one's own -------------------------------------------------------------------------------------------------


class Named(Dataset):
    """Objects that say who they are."""

    def __init__(self, shift=0.0, names=None):
        self.samples, self.shift = Samples(), shift
        self.names = names or [f"object {n}" for n in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        sample = self.samples[index]
        return SimilarityGroupSample({"name": self.names[index], "x": sample.obj + self.shift}, sample.group)


class OfDict(Vectors):
    def collate(self, objects):
        return torch.stack([obj["x"] for obj in objects])  # by itself: its class counts what it runs, which is a change


def _name_of(obj):
    return obj["name"]


def test_key_extractors_find_objects_by_what_they_say(tmp_path):
    cache = CacheConfig(save_dir=tmp_path, key_extractors=_name_of, name="v1")
    model = a_model(encoders=OfDict, cache=cache)
    fit(model, trainer(2), group_loader(Named()))
    plain = a_model(encoders=OfDict)
    fit(plain, trainer(2), group_loader(Named()))
    assert distance(learned(model), learned(plain)) < 1e-3
    RAN.clear()
    READS[0] = 0
    fit(a_model(encoders=OfDict, cache=cache), trainer(8), group_loader(Named()))
    assert RAN["vectors"] <= 120 < 8 * 40
    assert READS[0] < 40, "under its name the data set is not read again, but for a few items"


def test_keys_of_ones_own_in_a_folder_need_a_name(tmp_path):
    model = a_model(encoders=OfDict, cache=CacheConfig(save_dir=tmp_path, key_extractors=_name_of))
    with pytest.raises(CacheError, match="Name data and preprocessing"):
        fit(model, trainer(1), group_loader(Named()))


def test_one_key_for_two_objects_is_refused():
    model = a_model(encoders=OfDict, cache=CacheConfig(key_extractors={"default": _name_of}))
    with pytest.raises(RecycleError, match="same key for two objects"):
        fit(model, trainer(1), group_loader(Named(names=["same"] * 40)))


# -- batches of whole groups -------------------------------------------------------------------------------------------


def test_batches_of_whole_groups_have_several_objects_of_each_group(tmp_path):
    loader = GroupSimilarityDataLoader(Samples(), batch_size=16, objects_per_group=4)
    for _, targets in loader:
        assert targets["groups"].unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]
    READS[0] = 0
    cache = CacheConfig(save_dir=tmp_path)
    fit(a_model(cache=cache), trainer(1), GroupSimilarityDataLoader(Samples(), batch_size=16, objects_per_group=4))
    once = READS[0]
    READS[0] = 0
    fit(a_model(cache=cache), trainer(9), GroupSimilarityDataLoader(Samples(), batch_size=16, objects_per_group=4))
    assert READS[0] <= once, "groups are known from the manifest"


def test_batches_of_one_object_per_group_are_refused():
    with pytest.raises(ValueError, match="2 or more"):
        GroupSimilarityDataLoader(Samples(), batch_size=16, objects_per_group=1)


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_losses_and_metrics_are_those_of_the_whole_epoch():
    metric = AttachedMetric("rp", RetrievalRPrecision(), on_epoch=True)
    model = a_model(cache=CacheConfig(), metrics=[metric], rate=0.0)
    runner = trainer(1)
    fit(model, runner, group_loader(), group_loader(Samples(30), shuffle=False))
    whole = RetrievalRPrecision()
    embeddings = model.model.encode(list(Samples(30).values), to_numpy=False)
    whole.update(embeddings, groups=Samples(30).groups)
    assert float(runner.callback_metrics["rp_validation"]) == pytest.approx(float(whole.compute()), abs=1e-6)
    assert runner.callback_metrics.keys() >= {"train_loss", "validation_loss", "rp_train"}


def test_a_metric_of_each_step_is_that_of_its_batch_and_the_epochs_stays_whole():
    logged = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append(float(trainer.callback_metrics["rp_train_step"]))

    def see(self, embeddings, targets, **kwargs):
        if kwargs["stage"] == "train":
            seen.append((embeddings.detach().clone(), targets["groups"].clone()))

    seen = []
    metric = AttachedMetric("rp", RetrievalRPrecision(), on_step=True, on_epoch=True)
    model = a_model(cache=CacheConfig(), metrics=[metric], process_results=see)
    runner = trainer(1, callbacks=[Look()])
    fit(model, runner, group_loader())
    figures = []
    for embeddings, groups in [*seen, tuple(map(torch.cat, zip(*seen, strict=True)))]:
        one = RetrievalRPrecision()
        one.update(embeddings, groups=groups)
        figures.append(float(one.compute()))
    assert logged == pytest.approx(figures[:-1])
    assert float(runner.callback_metrics["rp_train"]) == pytest.approx(figures[-1])


def test_a_cross_batch_memory_changes_what_is_learned():
    trained = []
    for xbm in (None, XbmConfig(buffer_size=32, start_iteration=0)):
        model = a_model(cache=CacheConfig(), xbm=xbm)
        fit(model, trainer(2), group_loader())
        trained.append(learned(model))
    assert distance(*trained) > 1e-4


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning", "ignore:.*val_dataloader.*", "ignore:.*in eval mode.*")
def test_a_plain_trainer_takes_the_model_and_loader_too():
    model = a_model()
    trainer(1).fit(model, group_loader(num_workers=0))
    other = a_model()
    fit(other, trainer(1), group_loader())
    assert distance(learned(model), learned(other)) < 1e-3


def test_training_goes_on_from_a_checkpoint(tmp_path):
    whole = a_model(cache=CacheConfig())
    fit(whole, trainer(4), group_loader())
    half = a_model(cache=CacheConfig())
    runner = trainer(2)
    loader = group_loader()
    fit(half, runner, loader)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    rest = a_model(encoders=lambda: Vectors(), cache=CacheConfig())
    fit(rest, trainer(4), loader, ckpt_path=str(tmp_path / "half.ckpt"))
    assert distance(learned(rest), learned(whole)) < 1e-3


def test_the_defaults_of_a_trainer_stop_when_validation_no_longer_improves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = a_model(cache=CacheConfig(), rate=0.0)
    arguments = Quaterion.trainer_defaults(model, group_loader())
    runner = pl.Trainer(**{**arguments, "logger": False, "accelerator": "cpu"})
    Quaterion.fit(model, runner, group_loader(), group_loader(shuffle=False))
    assert runner.current_epoch < 10


# -- several processes -------------------------------------------------------------------------------------------------

TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import pytorch_lightning as pl, torch
import test_similarity_fit as t

if __name__ == "__main__":
    model = t.a_model(cache=t.CacheConfig(save_dir=sys.argv[2]))
    runner = t.trainer(2, devices=2, strategy="ddp")
    t.fit(model, runner, t.group_loader(batch_size=8))
    with open(f"{sys.argv[2]}-{runner.global_rank}.json", "w") as file:
        json.dump({"ran": t.RAN["vectors"], "weights": t.weights(model).tolist(), "steps": runner.global_step}, file)
    torch.distributed.destroy_process_group()  # else gloo's threads may outlive the interpreter, which aborts
"""


def test_two_processes_train_on_one_store(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO, encoding="utf-8")
    store = tmp_path / "rows"
    command = [sys.executable, str(script), str(Path(__file__).parent), str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(Path(f"{store}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["steps"] == 2 * 3  # 20 objects each, in batches of 8
    assert found[1]["ran"] <= 80, "the second process finds the rows of the first"


# -- bad input, each in its own words ----------------------------------------------------------------------------------


def test_a_trained_encoder_in_the_cache_is_refused():
    with pytest.raises(CacheError, match="is trained"):
        a_model(encoders=lambda: Vectors(trainable=True), cache=CacheConfig(mapping={"default": CacheType.CPU}))
    with pytest.raises(CacheError, match="every encoder is trained"):
        a_model(encoders=lambda: Vectors(trainable=True), cache=CacheConfig())


def test_a_cache_that_keeps_nothing_is_refused():
    with pytest.raises(CacheError, match="keeps nothing"):
        CacheConfig(cache_type=None)


def test_a_cache_of_an_unknown_encoder_is_refused():
    with pytest.raises(CacheError, match="'pictures', and the encoders are"):
        a_model(cache=CacheConfig(mapping={"pictures": CacheType.CPU}))


def test_a_cache_type_that_is_none_is_refused():
    with pytest.raises(CacheError, match="give one of"):
        CacheConfig("tape")  # pyright: ignore


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cache_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(CacheError, match="torch sees no GPU"):
        fit(a_model(cache=CacheConfig(CacheType.GPU)), trainer(1), group_loader())


def test_a_cache_on_disk_without_a_folder_is_refused():
    with pytest.raises(CacheError, match="save_dir"):
        fit(a_model(cache=CacheConfig(CacheType.DISK)), trainer(1), group_loader())


def test_pairs_for_a_loss_over_groups_and_groups_for_one_over_pairs_are_refused():
    with pytest.raises(BatchError, match="TripletLoss needs objects in groups"):
        fit(a_model(encoders=Texts), trainer(1), pair_loader())
    with pytest.raises(BatchError, match="needs pairs"):
        fit(a_model(loss=MultipleNegativesRankingLoss), trainer(1), group_loader())


def test_an_empty_validation_loader_is_refused_and_none_is_fine():
    with pytest.raises(BatchError, match="data set of the validation loader is empty: leave it out"):
        fit(a_model(), trainer(1), group_loader(), group_loader(Samples(0), shuffle=False))
    with pytest.raises(BatchError, match="drop_last"):
        fit(a_model(), trainer(1), group_loader(), group_loader(Samples(5), shuffle=False, drop_last=True))
    fit(a_model(), trainer(1), group_loader(), None)


def test_groups_of_a_single_member_teach_nothing_which_is_said():
    with pytest.raises(NothingToLearnError, match="single member"):
        fit(a_model(cache=CacheConfig()), trainer(2), group_loader(Samples(40, groups=40)))
    arcface = a_model(loss=lambda: ArcFaceLoss(embedding_size=8, num_groups=40))
    with pytest.warns(RecycleWarning, match=r"Add self.loss.parameters\(\)"):
        fit(arcface, trainer(1), group_loader(Samples(40, groups=40)))
    parameters = [*arcface.model.parameters(), *arcface.loss.parameters()]
    type(arcface).configure_optimizers = lambda self: torch.optim.SGD(parameters, 1.0)
    before = copy.deepcopy(arcface.loss.state_dict())
    fit(arcface, trainer(1), group_loader(Samples(40, groups=40)))
    assert any(not torch.equal(before[name], value) for name, value in arcface.loss.state_dict().items())


def test_pairs_without_negatives_teach_nothing_which_is_said():
    class Alike(Questions):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample.subgroup = 0
            return sample

    with pytest.raises(NothingToLearnError, match="no batch of the epoch had a negative for ContrastiveLoss"):
        fit(a_model(encoders=Texts, loss=ContrastiveLoss), trainer(1), pair_loader(Alike()))


def test_a_memory_for_a_loss_that_cannot_use_it_is_refused():
    with pytest.raises(XbmError, match="takes pairs"):
        a_model(encoders=Texts, loss=MultipleNegativesRankingLoss, xbm=XbmConfig())
    with pytest.raises(XbmError, match="ArcFaceLoss cannot be used with"):
        a_model(loss=lambda: ArcFaceLoss(embedding_size=8, num_groups=40), xbm=XbmConfig())


def test_a_plain_loader_is_refused():
    with pytest.raises(BatchError, match="GroupSimilarityDataLoader"):
        fit(a_model(), trainer(1), DataLoader(Samples(), collate_fn=list))


def test_a_loader_with_its_own_collate_function_is_refused_where_rows_are_to_be_read():
    def own(samples):
        return [s.obj for s in samples], {"groups": torch.tensor([s.group for s in samples])}

    fit(a_model(), trainer(1), group_loader(collate_fn=own))
    with pytest.raises(CacheError, match="collate function of its own"):
        fit(a_model(cache=CacheConfig()), trainer(1), group_loader(collate_fn=own))


def test_samples_of_another_kind_and_groups_that_are_no_numbers_are_refused():
    with pytest.raises(BatchError, match="gives a tuple where a SimilarityGroupSample"):
        next(iter(GroupSimilarityDataLoader([(1, 2)], batch_size=1)))
    with pytest.raises(BatchError, match="groups are whole numbers"):
        next(iter(GroupSimilarityDataLoader([SimilarityGroupSample(1, "cat")], batch_size=1)))  # pyright: ignore


def test_a_collate_function_that_looks_at_the_whole_batch_is_refused_in_a_cache():
    class Centred(Vectors):
        def collate(self, objects):
            whole = super().collate(objects)
            return whole - whole.mean(0)

    with pytest.raises(CacheError, match="alone than among others"):
        fit(a_model(encoders=Centred, cache=CacheConfig()), trainer(1), group_loader())


def test_a_collate_function_without_tensors_is_refused_in_a_cache():
    class Lists(Vectors):
        def collate(self, objects):
            return [obj.tolist() for obj in objects]

        def forward(self, batch):
            return super().forward(torch.tensor(batch))

    with pytest.raises(CacheError, match="neither tensors nor a list of texts"):
        fit(a_model(encoders=Lists, cache=CacheConfig()), trainer(1), group_loader())


def test_half_precision_that_converts_the_encoders_is_refused_with_a_cache():
    with pytest.raises(CacheError, match="bf16-mixed"):
        fit(a_model(cache=CacheConfig()), trainer(1, precision="bf16-true"), group_loader())


def test_mixed_precision_keeps_what_autocast_gives():
    trained = []
    for cache in (None, CacheConfig()):
        model = a_model(cache=cache)
        fit(model, trainer(2, precision="bf16-mixed"), group_loader())
        trained.append(learned(model))
    assert distance(trained[1], trained[0]) < 1e-3

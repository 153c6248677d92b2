"""Attacks on similarity learning: each test shows one finding, and passes once it is mended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset

from test_similarity_fit import Samples, Vectors, a_model, distance, group_loader, learned, trainer
from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.recycling import drift
from torchrecycle.similarity import (
    AttachedMetric,
    CacheConfig,
    EmptyHead,
    Encoder,
    GroupSimilarityDataLoader,
    RetrievalReciprocalRank,
    SearchIndex,
    SequentialHead,
    SimilarityGroupSample,
    SimilarityModel,
    SkipConnectionHead,
    SwitchEncoder,
    fit,
    index,
)
from torchrecycle.similarity.saving import load_module, save_module


def after_the_first_epoch(what):
    class Edit(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                what(pl_module.model.encoders["default"])

    return Edit()


def as_without_a_cache(run):
    """Training with a cache is refused, or gives what it gives without one."""
    plain = run(None)
    try:
        kept = run(CacheConfig())
    except RecycleError:
        return
    assert distance(kept, plain) < 1e-3


def edited(kind, what):
    def run(cache):
        model = a_model(encoders=kind, cache=cache)
        fit(model, trainer(3, callbacks=[after_the_first_epoch(what)]), group_loader(shuffle=False))
        return learned(model)

    return run


# -- rows of another object, model or preprocessing --------------------------------------------------------------------


class Sequences(Dataset):
    """Token sequences of which the first ones have no flag set."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(3, 9, (40,), generator=generator).tolist()
        self.tokens = [torch.randint(1, 20, (n,), generator=generator) for n in lengths]
        self.flags = [(torch.rand(n, generator=generator) > 0.5).long() * (i > 32) for i, n in enumerate(lengths)]

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return SimilarityGroupSample((self.tokens[i], self.flags[i]), i % 10)


class PaddedOnTheLeft(Vectors):
    def __init__(self):
        super().__init__()
        self.tokens, self.flags = nn.Embedding(20, 16), nn.Embedding(2, 16)

    def collate(self, objects):
        longest = max(len(tokens) for tokens, _ in objects)

        def padded(parts):
            return torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.int64), p]) for p in parts])

        return {
            "input_ids": padded([tokens for tokens, _ in objects]),
            "flags": padded([flags for _, flags in objects]),
            "attention_mask": padded([torch.ones_like(tokens) for tokens, _ in objects]),
        }

    def forward(self, batch):
        mask = batch["attention_mask"].float()
        hidden = self.tokens(batch["input_ids"]) * (1 + 3 * self.flags(batch["flags"]))
        return super().forward((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_a_tensor_that_is_all_padding_in_the_first_objects_is_padded_on_the_side_of_the_others():
    def run(cache):
        model = a_model(encoders=PaddedOnTheLeft, cache=cache)
        fit(model, trainer(3), group_loader(Sequences()))
        return learned(model)

    as_without_a_cache(run)


class Settings(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = {"factor": torch.ones(1)}


class CollatesByAPart(Vectors):
    def __init__(self):
        super().__init__()
        self.part = Settings()

    def collate(self, objects):
        return self.part.values["factor"] * torch.stack(list(objects))


def test_a_tensor_in_a_dict_of_a_part_that_the_collate_function_reads_is_noticed():
    as_without_a_cache(edited(CollatesByAPart, lambda e: e.part.values["factor"].fill_(4.0)))


class CollatesAtRandom(Vectors):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()
        self.part.generator = torch.Generator().manual_seed(0)

    def collate(self, objects):
        drawn = torch.rand(1, generator=self.part.generator)
        return super().collate(objects) * (1 + (drawn > 0.9).float())


def test_a_random_collate_function_whose_generator_is_in_a_part_is_not_frozen_unsaid():
    with pytest.raises(RecycleError, match=r"random|alone than among others"):
        fit(a_model(encoders=CollatesAtRandom, cache=CacheConfig()), trainer(1), group_loader())


class ReadsAList(Vectors):
    def __init__(self):
        super().__init__()
        self.factors = [torch.ones(8)]

    def forward(self, batch):
        return super().forward(batch) * self.factors[0]


@pytest.fixture(autouse=True)
def _any_prefix_counts_as_quick(monkeypatch):
    """Quick prefixes are run again at each iteration; on a busy machine a small one may not seem quick."""
    monkeypatch.setattr(drift, "SMALL", math.inf)


def test_a_list_of_tensors_that_the_forward_reads_is_noticed_when_it_is_replaced():
    as_without_a_cache(edited(ReadsAList, lambda e: setattr(e, "factors", [torch.tensor([-2.0] * 4 + [1.0] * 4)])))


FACTOR = 1.0


class ReadsAGlobal(Vectors):
    def forward(self, batch):
        return super().forward(batch) * FACTOR


def test_a_global_that_the_forward_reads_is_noticed_or_refused(monkeypatch):
    module = sys.modules[__name__]

    def run(cache):
        monkeypatch.setattr(module, "FACTOR", 1.0)
        return edited(ReadsAGlobal, lambda e: setattr(module, "FACTOR", -3.0))(cache)

    as_without_a_cache(run)


class ReadsItsClass(Vectors):
    factor = 1.0

    def forward(self, batch):
        return super().forward(batch) * self.factor


def test_a_class_attribute_that_the_forward_reads_is_noticed_or_refused(monkeypatch):
    def run(cache):
        monkeypatch.setattr(ReadsItsClass, "factor", 1.0)
        return edited(ReadsItsClass, lambda e: setattr(type(e), "factor", -3.0))(cache)

    as_without_a_cache(run)


class Numbered(Samples):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return SimilarityGroupSample((index, sample.obj), sample.group)


class OfNumbered(Vectors):
    def collate(self, objects):
        return torch.stack([vector for _, vector in objects])


def test_groups_that_are_edited_between_two_epochs_are_seen_with_keys_of_the_users_own():
    def run(cache):
        dataset = Numbered()

        def edit(encoder):
            dataset.groups[[1, 2, 3, 4, 5, 7, 8, 9, 10]] = 0  # none of the eight items that are looked at

        model = a_model(encoders=OfNumbered, cache=cache)
        fit(model, trainer(3, callbacks=[after_the_first_epoch(edit)]), group_loader(dataset, shuffle=False))
        return learned(model)

    assert distance(run(CacheConfig(key_extractors=lambda obj: obj[0])), run(None)) < 1e-3


class Pooled(Encoder):
    def __init__(self, pool="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 8)
        self._pool, self.sign = pool, 1.0

    trainable = property(lambda self: False)
    embedding_size = property(lambda self: 8)

    def forward(self, batch):
        hidden = self.sign * self.layer(batch.reshape(len(batch), 4, 4))
        return hidden.mean(1) if self._pool == "mean" else hidden[:, 0]


def vectors(count=20):
    return list(torch.randn(count, 16, generator=torch.Generator().manual_seed(0)))


def test_an_index_of_a_model_that_differs_in_a_private_setting_is_not_searched(tmp_path):
    with index(SimilarityModel(Pooled("mean"), EmptyHead(8)).eval(), vectors(), path=tmp_path / "index"):
        pass
    with (
        pytest.raises(RecycleError),
        SearchIndex.load(SimilarityModel(Pooled("first"), EmptyHead(8)).eval(), path=tmp_path / "index") as other,
    ):
        other.search(vectors()[3], k=1)


def test_a_setting_of_the_model_that_changes_after_its_index_was_opened_is_noticed_by_a_search():
    model = SimilarityModel(Pooled(), EmptyHead(8)).eval()
    with index(model, vectors()) as opened:
        model.encoders["default"].sign = -1.0
        with pytest.raises(RecycleError):
            opened.search(vectors()[3], k=1)


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_a_fit_that_was_interrupted_leaves_nothing_in_the_figures_of_the_next():
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("stop")

    def figures(interrupted):
        metrics = [AttachedMetric("rr", RetrievalReciprocalRank())]
        model = a_model(cache=CacheConfig(), metrics=metrics, rate=1e-9)
        if interrupted:
            with pytest.raises(RuntimeError, match="stop"):
                fit(model, trainer(1, callbacks=[Interrupt()]), group_loader(shuffle=False))
        used = trainer(1)
        fit(model, used, group_loader(shuffle=False))
        return {name: float(value) for name, value in used.callback_metrics.items()}

    assert figures(True) == pytest.approx(figures(False), abs=1e-4)


def test_callbacks_of_the_users_own_do_not_switch_off_what_is_logged():
    used = trainer(1)
    metrics = [AttachedMetric("rr", RetrievalReciprocalRank())]
    model = a_model(metrics=metrics, configure_callbacks=lambda self: [pl.Callback()])
    fit(model, used, group_loader())
    assert {"train_loss", "rr_train"} <= used.callback_metrics.keys()


def test_a_validation_in_which_nothing_can_be_compared_is_no_loss_of_nought():
    used = trainer(1)
    strangers = GroupSimilarityDataLoader(Samples(5, 5), batch_size=5)
    with pytest.warns(RecycleWarning, match="there is no validation_loss"):
        fit(a_model(cache=CacheConfig()), used, group_loader(), strangers)
    assert "validation_loss" not in used.callback_metrics


def test_groups_with_a_single_member_are_refused_in_batches_of_whole_groups_too():
    alone = GroupSimilarityDataLoader(Samples(40, 40), batch_size=16, objects_per_group=4)
    with pytest.raises(RecycleError, match=r"member|nothing to learn|two objects"):
        fit(a_model(), trainer(1), alone)


# -- the same batches as without a cache -------------------------------------------------------------------------------


def batches_of(cache, loader=group_loader, head=None, **arguments):
    seen = []

    def note(self, embeddings, targets, batch_idx, stage, **kwargs):
        seen.append(targets["groups"].tolist())

    torch.manual_seed(0)
    fit(a_model(cache=cache, head=head, process_results=note), trainer(3, **arguments), loader())
    return seen


@pytest.mark.parametrize("arguments", [{"limit_train_batches": 1}, {"reload_dataloaders_every_n_epochs": 1}])
def test_shuffled_batches_are_those_without_a_cache_also_if_epochs_are_cut_short_or_loaders_made_anew(arguments):
    assert batches_of(CacheConfig(), **arguments) == batches_of(None, **arguments)


def test_batches_of_whole_groups_are_those_without_a_cache_also_if_the_head_draws_from_the_same_generator():
    def loader():
        return GroupSimilarityDataLoader(Samples(), batch_size=16, objects_per_group=2)

    def head(size):
        return SkipConnectionHead(size, dropout=0.3)

    assert batches_of(CacheConfig(), loader, head) == batches_of(None, loader, head)


# -- several processes -------------------------------------------------------------------------------------------------

DDP = """
    import json, sys, warnings
    warnings.simplefilter("ignore")
    from test_similarity_fit import *
    from torchrecycle.similarity import *

    if __name__ == "__main__":
        metrics = [AttachedMetric("rr", RetrievalReciprocalRank())]
        model = a_model(cache=CacheConfig(), metrics=metrics, rate=1e-9)
        used = trainer(1, devices=int(sys.argv[1]), strategy="ddp" if sys.argv[1] != "1" else "auto")
        whole = {"objects_per_group": 2} if sys.argv[2] == "groups" else {"shuffle": True}
        pl.seed_everything(3)
        train = GroupSimilarityDataLoader(Samples(), batch_size=8, **whole)
        fit(model, used, train, GroupSimilarityDataLoader(Samples(25), batch_size=25))
        found = {name: float(value) for name, value in used.callback_metrics.items()}
        Path(sys.argv[3], f"{sys.argv[1]}-{used.global_rank}.json").write_text(json.dumps(found))
        if torch.distributed.is_initialized():  # else gloo's threads may outlive the interpreter, which aborts
            torch.distributed.destroy_process_group()
"""


def in_processes(count, kind, folder):
    script = folder / "train.py"
    script.write_text(textwrap.dedent(DDP))
    ran = subprocess.run(
        [sys.executable, str(script), str(count), kind, str(folder)],
        env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr[-800:]
    return [json.loads((folder / f"{count}-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
def test_all_processes_know_the_same_validation_loss(tmp_path):
    first, second = in_processes(2, "plain", tmp_path)
    assert first["validation_loss"] == second["validation_loss"]


@pytest.mark.slow
def test_batches_of_whole_groups_are_refused_in_two_processes(tmp_path):
    with pytest.raises(AssertionError, match="cannot be divided among 2"):
        in_processes(2, "groups", tmp_path)


# -- saving ------------------------------------------------------------------------------------------------------------


class Turned(SimilarityModel):
    def forward(self, batch):
        return -super().forward(batch)


def saved_or_refused(model, folder):
    model.eval()
    try:
        model.save(folder)
    except RecycleError:
        return
    again = SimilarityModel.load(folder)
    assert np.allclose(model.encode(vectors()), again.encode(vectors()))


def test_a_derived_similarity_model_does_not_load_as_the_plain_one_with_other_outputs(tmp_path):
    saved_or_refused(Turned(Pooled(), EmptyHead(8)), tmp_path / "model")


def test_a_hook_on_a_similarity_model_is_refused_as_one_on_its_parts(tmp_path):
    model = SimilarityModel(Pooled(), EmptyHead(8))
    model.register_forward_hook(lambda module, inputs, output: -output)
    saved_or_refused(model, tmp_path / "model")


class WithALayerForTheHead(Pooled):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)

    trainable = property(lambda self: True)


def test_weights_that_encoder_and_head_share_are_shared_after_loading_or_refused(tmp_path):
    encoder = WithALayerForTheHead()
    model = SimilarityModel(encoder, SequentialHead(encoder.shared))
    try:
        model.save(tmp_path / "model")
    except RecycleError:
        return
    again = SimilarityModel.load(tmp_path / "model")
    assert again.head[0].weight is again.encoders["default"].shared.weight


CALLED = []


def called(value):
    CALLED.append(value)
    return value


def test_nothing_that_a_file_names_is_called_while_it_is_loaded(tmp_path):
    save_module(nn.Sequential(Settings(), nn.Identity()), tmp_path / "module")
    about = tmp_path / "module" / "module.json"
    said = json.loads(about.read_text())
    said["modules"]["1"] = {
        "class": "torch._dynamo.eval_frame:OptimizedModule",  # whose __setstate__ calls its context
        "training": True,
        "attributes": {"dynamo_ctx": {"$function": f"{__name__}:called"}},
        "children": {"_orig_mod": "0"},
    }
    said["modules"]["0"].setdefault("attributes", {})["__call__"] = "a string of the file's choice"
    about.write_text(json.dumps(said))
    CALLED.clear()
    with contextlib.suppress(RecycleError):
        load_module(tmp_path / "module")
    assert not CALLED


# -- demands -----------------------------------------------------------------------------------------------------------


class BySign(SwitchEncoder):
    @classmethod
    def encoder_selection(cls, record):
        return "plus" if record[0] > 0 else "minus"


def test_a_switch_encoder_is_cached_or_the_message_names_it_and_the_cache():
    model = a_model(encoders=lambda: BySign({"plus": Vectors(), "minus": Vectors(seed=1)}), cache=CacheConfig())
    said = "a cache"
    try:
        fit(model, trainer(1), group_loader())
    except RecycleError as error:
        said = str(error)
    assert "SwitchEncoder" in said or "cache" in said


def test_the_ratio_to_the_loop_by_hand_is_among_the_results():
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    assert list(results.glob("similarity-*.json")), "benchmarks/similarity.py has no committed result"

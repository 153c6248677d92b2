"""The page for those who come from Quaterion: its code runs in order, its imports are there, its words hold."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from torch import nn
from torch.utils.data import IterableDataset

import small
from torchrecycle.demo.emoji import draw, toned_classes
from torchrecycle.errors import RecycleError
from torchrecycle.similarity import (
    ArcFaceLoss,
    CacheConfig,
    CacheType,
    ContrastiveLoss,
    EmptyHead,
    Encoder,
    GroupSimilarityDataLoader,
    MultipleNegativesRankingLoss,
    OnlineContrastiveLoss,
    PairSimilarityDataLoader,
    Quaterion,
    RetrievalRPrecision,
    SequentialHead,
    SimilarityGroupSample,
    SimilarityModel,
    SimilarityPairSample,
    SkipConnectionHead,
    TrainableModel,
    TripletLoss,
    XbmConfig,
    fit,
)
from torchrecycle.similarity.stages import EncoderStage

PAGE = (Path(__file__).parents[1] / "docs" / "quaterion.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum"
)


def table(heading: str) -> list[list[str]]:
    """The rows below the first line of a table, which begins with these words."""
    lines = PAGE[PAGE.index(f"| {heading}") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows
    return rows


# -- imports -----------------------------------------------------------------------------------------------------------


def test_the_one_line_changes_every_import_of_the_table():
    found = re.search(r"sed -i -E 's/(.*?)/(.*?)/'", PAGE)
    assert found
    for left, right in table("`from quaterion"):
        where = left.partition("`")[2].partition("`")[0].removesuffix(" import").replace("…", "some_module")
        names = re.sub("`", "", right)
        line = f"from {where} import {names}"
        changed = re.sub(found[1], found[2], line)
        assert changed == f"from torchrecycle.similarity import {names}", line
        for name in names.split(", "):
            assert hasattr(importlib.import_module("torchrecycle.similarity"), name), name


# -- the blocks --------------------------------------------------------------------------------------------------------


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet34()


def _write_old_checkpoint(path: Path) -> None:
    """A state dict of the article's class under the names that Quaterion 0.1.35 gives them."""
    resnet: Any = _resnet()
    parts = dict(resnet.named_children())
    encoder = nn.Sequential(
        *(parts[name] for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"))
    )
    head = nn.Sequential(resnet.layer4, resnet.avgpool, nn.Flatten(), SkipConnectionHead(512))
    state = {f"_model.default._encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"_model.head._sequential.{name}": value for name, value in head.state_dict().items()}
    state |= {f"finetuned_block.{name}": value for name, value in resnet.layer4.state_dict().items()}
    torch.save({"state_dict": {name: value.clone() for name, value in state.items()}}, path)


class Ran:
    """The page's module after all its blocks, and the recyclings that they made."""

    def __init__(self, names: dict, stages: list):
        self.names, self.stats = names, [stage.recycling.stats for stage in stages]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    where = tmp_path_factory.mktemp("page")
    classes = sorted(toned_classes())[:6]
    pictures = [(picture.image(), classes.index(picture.label)) for picture in draw(where / "emoji", labels=classes)]
    module = types.ModuleType("page_on_quaterion")
    names = vars(module)
    pairs = list(zip(small.texts(24), [f"an answer to {text}" for text in small.texts(24)], strict=True))
    names |= {
        "train_images": [one for one in pictures if one[1] < 4],
        "test_images": [one for one in pictures if one[1] >= 4],
        "bert": small.bert().bert,
        "tokenizer": small.tokenizer(),
        "train_pairs": pairs[:16],
        "test_pairs": pairs[16:],
    }
    stages: list = []
    attach = EncoderStage.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("TORCH_HOME", str(where / "hub"))
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(
            EncoderStage, "attach", lambda *args, **kwargs: stages.append(attach(*args, **kwargs)) or stages[-1]
        )
        (where / "hub" / "hub" / "checkpoints").mkdir(parents=True)
        url = torchvision.models.ResNet34_Weights.DEFAULT.url
        torch.save(_resnet().state_dict(), where / "hub" / "hub" / "checkpoints" / Path(url).name)
        _write_old_checkpoint(where / "quaterion.ckpt")
        names["before"] = torch.load(where / "quaterion.ckpt", weights_only=True)["state_dict"]
        torch.manual_seed(0)
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)):
            exec(compile(block, f"block {number} of docs/quaterion.md", "exec"), names)
        names["loaded"] = {
            folder: SimilarityModel.load(where / folder) for folder in ("servable-recycled", "servable-faq")
        }
        yield Ran(names, stages)


def test_the_articles_class_is_trained_on_rows_of_each_photo(ran):
    article, recycled = ran.stats[:2]
    assert (article.misses, article.hits) == (36, 2 * 36 + 12), "two epochs, and the validation beforehand"
    assert (recycled.misses, recycled.hits) == (24, 2 * 24)


def test_a_metric_is_logged_under_the_name_that_the_page_says(ran):
    assert ran.names["faq"].model.head.output_size == 32
    logged = set(ran.names["trainer"].callback_metrics)
    assert logged >= {"RetrievalPrecision_validation", "RetrievalReciprocalRank_train", "train_loss", "validation_loss"}


def test_the_second_training_under_a_name_computes_no_row(ran):
    first, second = ran.stats[-2:]
    assert (first.misses, second.misses) == (24, 0)
    assert first.hits == second.hits == 24


def test_questions_find_their_answers_and_the_saved_model_tokenises(ran):
    assert set(ran.names["found"]) == {"rrk", "rp@1"}
    assert 0 < float(ran.names["found"]["rrk"]) <= 1
    answers = [answer for _, answer in ran.names["test_pairs"]]
    assert ran.names["answers"].shape == (8, 32)
    assert (ran.names["answers"] == ran.names["faq"].model.encode(answers)).all()


def test_a_recycled_encoder_is_saved_whole(ran):
    objects = [ran.names["test_dataset"][number].obj for number in range(2)]
    expected = ran.names["recycled"].model.encode(objects)
    assert (ran.names["loaded"]["servable-recycled"].encode(objects) == expected).all()


def test_weights_of_quaterion_are_found_under_their_new_names(ran):
    now = ran.names["model"].state_dict()
    moved = ran.names["from_quaterion"](ran.names["before"])
    assert moved.keys() == now.keys()
    assert all(torch.equal(now[name], value) for name, value in moved.items())


# -- what to look at before you compare --------------------------------------------------------------------------------


class Vectors(Encoder):
    """A frozen encoder of 16 numbers to 8."""

    is_trained = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5))

    @property
    def trainable(self):
        return self.is_trained

    @property
    def embedding_size(self):
        return 8

    def forward(self, batch):
        return self.layers(batch)


class Trained(Vectors):
    is_trained = True


def samples(count=32, members=4):
    values = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return [SimilarityGroupSample(value, number // members) for number, value in enumerate(values)]


def pairs(count=8, **fields):
    values = torch.randn(2, count, 16, generator=torch.Generator().manual_seed(1))
    return [SimilarityPairSample(a, b, **fields) for a, b in zip(*values, strict=True)]


def groups_loader(dataset=None, **options):
    return GroupSimilarityDataLoader(samples() if dataset is None else dataset, batch_size=16, shuffle=True, **options)


def trainable(
    encoder: Any = Vectors,
    loss: Any = TripletLoss,
    cache: CacheConfig | None = None,
    xbm: XbmConfig | None = None,
    learns: bool = False,
    head: Any = SkipConnectionHead,
) -> TrainableModel:
    class Made(TrainableModel):
        def configure_encoders(self):
            return encoder()

        def configure_head(self, input_embedding_size):
            return head(input_embedding_size)

        def configure_loss(self):
            return loss()

        def configure_caches(self):
            return cache

        def configure_xbm(self):
            return xbm

        def configure_optimizers(self):
            return torch.optim.SGD([*self.model.parameters(), *(self.loss.parameters() if learns else ())], 0.1)

    return Made()


def trainer(**options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options})


def test_one_object_is_one_vector_and_a_tuple_is_several():
    model = SimilarityModel(Vectors(), EmptyHead(8))
    assert model.encode(torch.zeros(16)).shape == (8,)
    assert model.encode((torch.zeros(16), torch.ones(16))).shape == (2, 8)


def test_r_precision_is_the_mean_over_objects():
    metric = RetrievalRPrecision()
    # The group of three finds itself, that of two does not: 3/3 of three objects, 0/1 of two.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [-1.0, -0.3], [0.1, 1.0], [-1.0, 0.0]])
    metric.update(embeddings, groups=torch.tensor([0, 0, 0, 1, 1, 2, 3]))
    assert float(metric.compute()) == pytest.approx(3 / 5)
    right_answers = (3 * 2 + 0) / (3 * 2 + 2 * 1)  # what Quaterion gives
    assert right_answers == pytest.approx(0.75)


def test_frozen_encoders_stay_in_eval_mode():
    model = trainable()
    assert model.train().training
    assert not model.model.encoders["default"].training
    assert trainable(Trained).train().model.encoders["default"].training


def test_overriding_extract_meta_is_enough():
    class Old(Vectors):
        @classmethod
        def extract_meta(cls, batch):
            return [{"length": len(obj)} for obj in batch]

    batch = SimilarityModel(Old(), EmptyHead(8)).get_collate_fn()([torch.zeros(16)])
    assert batch["meta"] == {"default": [{"length": 16}]}
    assert SimilarityModel(Vectors(), EmptyHead(8)).get_collate_fn()([torch.zeros(16)])["meta"] == {}


@pytest.mark.filterwarnings("ignore:ArcFaceLoss has parameters of its own")
@pytest.mark.parametrize("learns", [False, True])
def test_what_a_loss_learns_is_trained_where_the_optimiser_has_it(learns):
    model = trainable(loss=lambda: ArcFaceLoss(8, 8), learns=learns)
    loss: Any = model.loss
    before = loss.kernel.detach().clone()
    fit(model, trainer(), groups_loader())
    assert torch.equal(loss.kernel, before) is not learns


def test_an_object_is_not_its_own_nearest_negative():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.3], [0.9, 0.4]], requires_grad=True)
    loss = OnlineContrastiveLoss(margin=0.5)
    loss(embeddings, groups=torch.tensor([0, 1, 2, 3])).backward()  # negatives alone
    assert embeddings.grad is not None
    assert bool((embeddings.grad.norm(dim=1) > 0.01).all())


def test_the_heads_of_a_row_can_be_taken_out():
    head = SequentialHead(nn.Linear(8, 8), nn.Linear(8, 4))
    del head[0]
    assert (len(head), head.output_size) == (1, 4)


def test_the_defaults_of_a_trainer_are_what_the_page_says():
    found = Quaterion.trainer_defaults(trainable(cache=CacheConfig()), groups_loader())
    assert found["max_epochs"] == 1000
    assert found["callbacks"][0].patience == 3
    assert found["enable_model_summary"] is False
    assert not {"accelerator", "devices"} & found.keys()
    fit(trainable(), pl.Trainer(**{**found, "max_epochs": 1, "logger": False, "accelerator": "cpu"}), groups_loader())


def test_a_trainer_without_fit_trains_without_rows():
    model = trainable()
    before = copy.deepcopy(model.model.head.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about workers and eval mode
        trainer().fit(model, groups_loader())
    assert any(not torch.equal(value, before[name]) for name, value in model.model.head.state_dict().items())


# -- what is refused ---------------------------------------------------------------------------------------------------


class Noise:
    """A random transform."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return SimilarityGroupSample(torch.randn(16), index // 4)


class Drawn(Vectors):
    def forward(self, batch):
        return nn.functional.dropout(super().forward(batch), 0.5, training=True)


class Together(Vectors):
    def forward(self, batch):
        return nn.functional.batch_norm(super().forward(batch), None, None, training=True)


class Centred(Vectors):
    def get_collate_fn(self):
        return lambda objects: torch.stack(objects) - torch.stack(objects).mean(0)


class Lists(Vectors):
    def get_collate_fn(self):
        return lambda objects: [each.tolist() for each in objects]


class Streamed(IterableDataset):
    def __iter__(self):
        yield from samples()


def own_collate(given):
    return [sample.obj for sample in given], {"groups": torch.tensor([sample.group for sample in given])}


def cached(encoder: Any = Vectors, dataset: Any = None, config: CacheConfig | None = None, **options: Any) -> None:
    made = trainable(encoder, cache=CacheConfig() if config is None else config)
    fit(made, trainer(**options), groups_loader(dataset))


def of_quaterion(where):
    where.mkdir()
    (where / "config.json").write_text(json.dumps({"encoders": [], "head": {}}))
    SimilarityModel.load(where)


REFUSED = {
    "an encoder that is trained, in": lambda _: trainable(
        Trained, cache=CacheConfig(mapping={"default": CacheType.CPU})
    ),
    "a cache, and every": lambda _: trainable(Trained, cache=CacheConfig()),
    "a cache of an encoder": lambda _: trainable(cache=CacheConfig(mapping={"image": CacheType.CPU})),
    "`CacheType.GPU`": lambda _: cached(config=CacheConfig(CacheType.GPU)),
    "`CacheType.DISK`": lambda _: cached(config=CacheConfig(CacheType.DISK)),
    "keys of your own": lambda where: cached(config=CacheConfig(save_dir=where, key_extractors=str)),
    "one key": lambda _: cached(config=CacheConfig(key_extractors=lambda obj: 1)),
    "a random transform": lambda _: cached(dataset=Noise()),
    "an encoder that gives something else": lambda _: cached(Drawn),
    "an encoder in which": lambda _: cached(Together),
    "a collate function that looks": lambda _: cached(Centred),
    "a collate function that gives no": lambda _: cached(Lists),
    "a collate function of the loader": lambda _: fit(
        trainable(cache=CacheConfig()), trainer(), groups_loader(collate_fn=own_collate)
    ),
    "`Trainer(": lambda _: cached(precision="bf16-true"),
    "groups for": lambda _: fit(trainable(loss=MultipleNegativesRankingLoss), trainer(), groups_loader()),
    "pairs for": lambda _: fit(trainable(), trainer(), PairSimilarityDataLoader(pairs(), batch_size=4)),
    "groups of a single": lambda _: fit(trainable(), trainer(), groups_loader(samples(members=1))),
    "pairs without": lambda _: fit(
        trainable(loss=ContrastiveLoss), trainer(), PairSimilarityDataLoader(pairs(), batch_size=4)
    ),
    "an empty": lambda _: fit(trainable(), trainer(), groups_loader(), GroupSimilarityDataLoader([], batch_size=16)),
    "a head of": lambda _: trainable(head=lambda size: SkipConnectionHead(size + 1)),
    "a loss that cannot": lambda _: trainable(loss=MultipleNegativesRankingLoss, xbm=XbmConfig()),
    "a model that Quaterion": of_quaterion,
    "an `IterableDataset`": lambda _: GroupSimilarityDataLoader(Streamed(), batch_size=4),
}


@pytest.mark.parametrize("row", table("what | error"), ids=lambda row: row[0])
def test_it_is_refused_in_the_words_of_the_page(row, tmp_path):
    what, kind, words = (cell for cell in row)
    if "GPU" in what and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (case,) = (refuse for beginning, refuse in REFUSED.items() if what.startswith(beginning))
    with pytest.raises(RecycleError, match=re.escape(words.strip("`"))) as refused:
        case(tmp_path / "folder")
    assert type(refused.value).__name__ == kind.strip("`")


def test_every_case_has_a_row():
    rows = [row[0] for row in table("what | error")]
    assert all(any(row.startswith(beginning) for row in rows) for beginning in REFUSED)

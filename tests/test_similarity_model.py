"""Encoders and a head as one model: what it gives of objects, what is refused, and a folder of it."""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import small  # noqa: F401  (one thread)
from saved_models import Captions, Letters, Numbers, OwnFiles, Pictures, WordsAndNumbers
from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.similarity import DEFAULT_ENCODER_KEY, Encoder, SimilarityModel, SwitchEncoder
from torchrecycle.similarity.description import DescriptionError
from torchrecycle.similarity.encoders import EncoderError
from torchrecycle.similarity.heads import (
    EmptyHead,
    EncoderHead,
    GatedHead,
    HeadError,
    SequentialHead,
    SkipConnectionHead,
    StackedProjectionHead,
    SwitchHead,
)
from torchrecycle.similarity.model import merge_meta
from torchrecycle.similarity.parts import SharedWeightsError
from torchrecycle.similarity.saving import ModelFolderError

HERE = Path(__file__).parent


def objects(count: int, dim: int = 4, seed: int = 0) -> list[list[float]]:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).tolist()


def model_of(encoders: Any = None, head: EncoderHead | None = None) -> SimilarityModel:
    torch.manual_seed(0)
    encoders = Numbers() if encoders is None else encoders
    size = SimilarityModel.get_encoders_output_size(encoders)
    return SimilarityModel(encoders, SkipConnectionHead(size) if head is None else head)


def two(head: EncoderHead | None = None) -> SimilarityModel:
    """Two encoders, which each take their part of a dict; the one that sorts first comes last."""
    torch.manual_seed(0)
    return model_of({"size": Numbers(4, 6, "size"), "colour": Numbers(3, 2, "colour", trained=True)}, head)


def things(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"size": size, "colour": colour}
        for size, colour in zip(objects(count, 4, seed), objects(count, 3, seed + 1), strict=True)
    ]


class Gives(Encoder):
    """Gives what it is told to give for a batch ``[batch, 4]``."""

    give: Any
    size: int

    def __init__(self, give: Any, size: int = 4) -> None:
        super().__init__()
        vars(self).update(give=give, size=size)

    @property
    def trainable(self) -> bool:
        return True

    @property
    def embedding_size(self) -> int:
        return self.size

    def forward(self, batch: Any) -> Any:
        return self.give(batch)

    def get_collate_fn(self) -> Any:
        return torch.tensor


# -- what an encoder is ------------------------------------------------------------------------------------------------


def test_an_encoder_must_say_three_things_and_has_the_rest():
    with pytest.raises(TypeError, match=r"embedding_size.*forward.*trainable"):
        Encoder()  # pyright: ignore
    encoder = Gives(lambda batch: batch)
    assert encoder.get_meta_extractor()([1, 2]) == [{}, {}]
    assert torch.equal(Encoder.get_collate_fn(encoder)([1, 2]), torch.tensor([1, 2]))


def test_arguments_are_those_of_quaterion():
    assert list(inspect.signature(SimilarityModel).parameters) == ["encoders", "head"]
    encode = inspect.signature(SimilarityModel.encode).parameters
    assert (encode["batch_size"].default, encode["to_numpy"].default) == (32, True)
    assert list(inspect.signature(SwitchEncoder).parameters) == ["options"]
    for name in ("encoder_selection", "get_collate_fn", "get_meta_extractor", "trainable", "embedding_size"):
        assert hasattr(SwitchEncoder, name)
    assert DEFAULT_ENCODER_KEY == "default"


# -- from objects to embeddings ----------------------------------------------------------------------------------------


def test_the_embeddings_are_those_of_encoder_and_head_called_by_hand():
    model = two().eval()
    given = things(5)
    size, colour = (torch.tensor([each[name] for each in given]) for name in ("size", "colour"))
    encoders: Any = model.encoders
    head: Any = model.head
    expected = head(torch.cat([encoders["colour"](colour), encoders["size"](size)], 1))
    assert np.array_equal(model.encode(given), expected.detach().numpy())


@settings(deadline=None, max_examples=25)
@given(count=st.integers(0, 20), batch_size=st.integers(1, 7))
def test_objects_in_any_number_come_out_as_one_by_one(count, batch_size):
    model = two()
    given = things(count)
    together = model.encode(given, batch_size=batch_size)
    assert together.shape == (count, 8)
    for obj, row in zip(given, together, strict=True):
        np.testing.assert_allclose(model.encode(obj), row, atol=1e-6)


def test_what_is_many_and_what_is_one():
    class Map(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> str:
            return ["ab", "c", "dab"][index]  # negative numbers and those past the end would not stop

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(["ab", "c", "dab"])

    import datasets

    model = model_of(Letters())
    expected = model.encode(["ab", "c", "dab"])
    assert expected.shape == (3, 6)
    table = datasets.Dataset.from_dict({"word": ["ab", "c", "dab"]})
    for many in (("ab", "c", "dab"), Map(), Stream(), iter(["ab", "c", "dab"]), (w for w in ["ab", "c", "dab"])):
        np.testing.assert_allclose(model.encode(many, batch_size=2), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode(table["word"]), expected, atol=1e-6)
    assert model.encode("ab").shape == (6,)
    np.testing.assert_allclose(model.encode("ab"), expected[0], atol=1e-6)

    rows = model_of(Numbers())
    assert rows.encode(torch.ones(4)).shape == (6,)
    assert rows.encode(np.ones(4)).shape == (6,)
    assert rows.encode(namedtuple("Row", "a b c d")(1, 2, 3, 4)).shape == (6,)
    assert rows.encode([]).shape == (0, 6)
    assert rows.encode((), to_numpy=False).shape == (0, 6)


def test_numpy_or_tensors_and_no_bfloat16_in_numpy():
    model = model_of()
    array, tensor = model.encode(objects(3)), model.encode(objects(3), to_numpy=False)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert np.array_equal(tensor.numpy(), array)
    assert not tensor.requires_grad
    array += 1  # the caller's own
    half = model_of(Gives(lambda batch: batch.bfloat16())).bfloat16()
    assert half.encode(objects(2)).dtype == np.float32
    assert half.encode(objects(2), to_numpy=False).dtype == torch.bfloat16


def test_encoding_puts_training_flags_back_also_after_an_error():
    model = two()
    model.train()
    model.encoders["colour"].drop.eval()  # pyright: ignore
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    model.encode(things(3))
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(KeyError):
        model.encode([{"size": 1}])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


def test_inputs_of_any_nest_are_moved_to_the_model_and_other_things_left():
    seen: list[Any] = []

    class Nest(Gives):
        def get_collate_fn(self) -> Any:
            return lambda some: {
                "a": (torch.tensor(some), [torch.tensor(some)]),
                "row": namedtuple("Row", "x")(torch.tensor(some)),
                "words": "text",
                "none": None,
                "class": torch.Tensor,
            }

    def give(batch: Any) -> Tensor:
        seen.append(batch)
        return torch.zeros(2, 4, device="meta")

    model = model_of(Nest(give)).to("meta")
    assert model.encode(objects(2), to_numpy=False).device.type == "meta"
    (batch,) = seen
    assert batch["a"][0].is_meta
    assert batch["a"][1][0].is_meta
    assert batch["row"].x.is_meta
    assert (batch["words"], batch["none"], batch["class"]) == ("text", None, torch.Tensor)


def test_a_single_encoder_may_give_maps_tokens_and_nests():
    maps = model_of(
        Gives(lambda x: x[:, :, None, None].expand(-1, 4, 3, 3), size=512),
        SequentialHead(nn.AdaptiveAvgPool2d(1), nn.Flatten(), SkipConnectionHead(4)),
    )
    assert maps.encode(objects(2)).shape == (2, 4)

    class Nest(EncoderHead):
        output_size = 4  # pyright: ignore

        def transform(self, input_vectors: Any) -> Tensor:
            return input_vectors["a"] + input_vectors["b"][0]

    nest = model_of(Gives(lambda x: {"a": x, "b": (x,)}), Nest(4))
    np.testing.assert_allclose(nest.encode(objects(2)), 2 * np.array(objects(2)), rtol=1e-6)


def test_a_collate_function_goes_to_workers():
    collate = pickle.loads(pickle.dumps(two().get_collate_fn()))
    batch = collate(things(2))
    assert batch["meta"] == {}
    assert {name: inputs.shape for name, inputs in batch["data"].items()} == {"size": (2, 4), "colour": (2, 3)}
    assert model_of(Letters()).get_collate_fn()(["ab", "c"])["meta"] == {"default": [{"length": 2}, {"length": 1}]}


def test_meta_of_several_encoders_is_one_dict_for_each_object():
    meta = {"a": [{"x": 1}, {"x": 2}], "b": [{"y": 3}, {"y": 4}], "c": [{}, {"x": 5}]}
    before = copy.deepcopy(meta)
    assert merge_meta(meta) == [{"x": 1, "y": 3}, {"x": 5, "y": 4}]
    assert meta == before
    assert merge_meta({}) is None
    with pytest.raises(EncoderError, match="one dict for each object, and gave: 'a' 1, 'b' 0"):
        merge_meta({"a": [{}], "b": []})


def test_a_head_that_takes_no_meta_is_called_without():
    class Old(EncoderHead):
        output_size = 6  # pyright: ignore

        def forward(self, input_vectors: Tensor) -> Tensor:  # pyright: ignore
            return input_vectors * 2

    class Asks(EncoderHead):
        output_size = 6  # pyright: ignore

        def forward(self, input_vectors: Tensor, meta: Any = None) -> Tensor:
            return input_vectors * torch.tensor([[each["length"]] for each in meta])

    encoder = Letters()
    plain = SimilarityModel(encoder, EmptyHead(6)).encode(["ab", "abc"])
    np.testing.assert_allclose(SimilarityModel(encoder, Old(6)).encode(["ab", "abc"]), plain * 2)
    np.testing.assert_allclose(SimilarityModel(encoder, Asks(6)).encode(["ab", "abc"]), plain * [[2], [3]], rtol=1e-6)


# -- frozen and trained ------------------------------------------------------------------------------------------------


def test_encoders_that_are_not_trained_are_frozen_and_stay_in_eval_mode():
    model = two()
    for mode in (True, True, False, True):
        assert model.train(mode) is model
        assert not any(module.training for module in model.encoders["size"].modules())
        assert all(module.training is mode for module in model.encoders["colour"].modules())
        assert model.head.training is mode
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trained} == {"encoders.colour.layer", "head", "head.fc_0"}


def test_the_state_dict_has_the_names_of_encoders_and_head():
    names = set(model_of().state_dict())
    assert names >= {"encoders.default.layer.weight", "encoders.default.layer.bias", "head.gates_0", "head.fc_0.bias"}
    assert model_of().encoders.keys() == {"default"}
    assert SimilarityModel.get_encoders_output_size(two().encoders) == 8  # pyright: ignore


def test_what_stands_for_an_encoder_is_in_no_copy_pickle_or_state_dict(tmp_path):
    model = model_of().eval()
    plain = model.encode(objects(3))
    names = list(model.state_dict())
    model._stages["default"] = nn.Linear(4, 6)
    assert list(model.state_dict()) == names
    assert not np.allclose(model.encode(objects(3)), plain)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.save(tmp_path / "model")
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        SimilarityModel.load(tmp_path / "model"),
    ]
    for other in copies:
        assert other._stages == {}
        assert np.array_equal(other.encode(objects(3)), plain)
    assert model._stages.keys() == {"default"}
    model._stages.clear()
    assert np.array_equal(model.encode(objects(3)), plain)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoders", "head", "words"),
    [
        ({"a": Numbers(), "b": Numbers(4, 3)}, EmptyHead(6), r"EmptyHead.*vectors of 6 numbers, and the encoders 'a'"),
        (Numbers(), GatedHead(5), r"vectors of 5 numbers, and the encoder 'default' gives 6 numbers: make it with 6"),
        (Numbers(), SequentialHead(nn.Linear(5, 3)), "SequentialHead.*vectors of 5 numbers"),
        (Numbers(), nn.Linear(6, 3), r"the head is a Linear, and no EncoderHead: wrap it, SequentialHead"),
        (Numbers(), None, "the head is a NoneType"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_when_the_model_is_made(encoders, head, words):
    with pytest.raises(HeadError, match=words):
        SimilarityModel(encoders, head)


@pytest.mark.parametrize(
    ("encoders", "words"),
    [
        ({}, "there is no encoder: give one or more"),
        (nn.Linear(4, 6), "'default' is a Linear, and no Encoder: derive a class"),
        ({"a": "b"}, "'a' is a str, and no Encoder"),
        ({"a.b": Numbers()}, r"'a\.b' cannot be the name of an encoder"),
        ({"../a": Numbers()}, "cannot be the name of an encoder"),
        ({"keys": Numbers()}, "'keys' cannot be the name"),
        ({"training": Numbers()}, "'training' cannot be the name"),
        ({"": Numbers()}, "'' cannot be the name"),
        ({1: Numbers()}, "1 cannot be the name"),
    ],
)
def test_what_is_no_encoder_and_what_is_no_name_is_refused_in_words(encoders, words):
    with pytest.raises(EncoderError, match=words):
        SimilarityModel(encoders, EmptyHead(6))
    assert issubclass(EncoderError, RecycleError)
    assert issubclass(EncoderError, ValueError)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda x: x[:, :3], r"'default' \(Gives\) gives vectors of 3 numbers, and its embedding_size is 4"),
        (lambda x: x[:-1], "3 objects came out as 2 embeddings"),
        (lambda x: torch.cat([x, x]), "3 objects came out as 6 embeddings"),
    ],
)
def test_an_encoder_that_gives_other_rows_or_widths_than_it_says_is_refused(give, words):
    with pytest.raises(EncoderError, match=words):
        model_of(Gives(give), EmptyHead(4)).encode(objects(3))


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda x: (x, x), r"'b' \(Gives\) gives a tuple of 2, and what several encoders give is joined"),
        (lambda x: x[:, None], r"'b' \(Gives\) gives \[3, 1, 4\], and what several encoders give is joined"),
        (lambda x: x[1:], "other numbers of vectors for the same objects: 'a' 3, 'b' 2"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_words(give, words):
    model = model_of({"b": Gives(give), "a": Numbers()}, EmptyHead(10))
    with pytest.raises(EncoderError, match=words):
        model.encode(objects(3))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda: SequentialHead(nn.Flatten(), output_size=5), r"gives \[2, 4\] of \[2, 4\]: expected .* \[2, 5\]"),
        (lambda: SequentialHead(nn.Unflatten(1, (2, 2)), output_size=2), r"gives \[2, 2, 2\] of \[2, 4\]"),
        (lambda: SequentialHead(nn.Flatten(0), output_size=4), r"gives \[8\] of \[2, 4\]"),
    ],
)
def test_a_head_that_gives_no_embeddings_is_refused_in_words(head, words):
    with pytest.raises(HeadError, match=words):
        model_of(Gives(lambda x: x), head()).encode(objects(2))


def test_a_batch_of_another_form_and_a_batch_size_of_nought_are_refused_in_words():
    model = two()
    for batch in (torch.ones(2, 4), {"size": 1}, {"data": {"size": 1}}, None):
        with pytest.raises(EncoderError, match=r"takes what its get_collate_fn\(\) makes of objects.*use encode"):
            model(batch)
    with pytest.raises(EncoderError, match="batch_size is 0"):
        model.encode(things(2), batch_size=0)


# -- objects of different kinds ----------------------------------------------------------------------------------------


def switched() -> SimilarityModel:
    torch.manual_seed(0)
    encoder = WordsAndNumbers({"words": Letters(6), "numbers": Numbers(4, 6)})
    head = SwitchHead({"words": StackedProjectionHead(6, [3]), "numbers": StackedProjectionHead(6, [5, 3])}, 6)
    return SimilarityModel(encoder, head)


@settings(deadline=None, max_examples=25)
@given(kinds=st.lists(st.booleans(), max_size=9), batch_size=st.integers(1, 4))
def test_each_kind_of_object_goes_through_its_encoder_and_head_and_keeps_its_place(kinds, batch_size):
    model = switched().eval()
    numbers = objects(len(kinds))
    given = [f"word{'abc'[i % 3]}" if word else numbers[i] for i, word in enumerate(kinds)]
    found = model.encode(given, batch_size=batch_size)
    options: Any = model.encoders["default"].options  # pyright: ignore
    heads: Any = model.head.options
    for obj, row in zip(given, found, strict=True):
        name = "words" if isinstance(obj, str) else "numbers"
        vector = options[name](options[name].get_collate_fn()([obj]))
        np.testing.assert_allclose(row, heads[name](vector)[0].detach().numpy(), atol=1e-6)


def test_meta_of_a_switch_names_the_encoder_and_keeps_what_that_says():
    batch = switched().get_collate_fn()(["ab", [1, 2, 3, 4], "abc"])
    assert batch["meta"]["default"] == [
        {"length": 2, "encoder": "words"},
        {"encoder": "numbers"},
        {"length": 3, "encoder": "words"},
    ]
    assert batch["data"]["default"]["ordering"] == {"words": [0, 2], "numbers": [1]}
    assert pickle.loads(pickle.dumps(switched().get_collate_fn()))(["ab"])["meta"] == {
        "default": [{"length": 2, "encoder": "words"}]
    }


def test_a_switch_trains_those_that_are_trained():
    model = switched().train()
    options: Any = model.encoders["default"].options  # pyright: ignore
    assert model.encoders["default"].trainable
    assert not any(module.training for module in options["numbers"].modules())
    assert all(module.training for module in options["words"].modules())
    assert {p.requires_grad for p in options["numbers"].parameters()} == {False}
    assert {p.requires_grad for p in options["words"].parameters()} == {True}


def test_a_switch_of_what_does_not_fit_is_refused_in_words():
    with pytest.raises(EncoderError, match="share a space: 'words' gives 6 numbers, 'numbers' gives 5 numbers"):
        WordsAndNumbers({"words": Letters(6), "numbers": Numbers(4, 5)})
    with pytest.raises(EncoderError, match="there is no encoder"):
        WordsAndNumbers({})
    with pytest.raises(EncoderError, match="'words' is a Linear, and a SwitchEncoder is made of Encoders"):
        WordsAndNumbers({"words": nn.Linear(2, 2)})  # pyright: ignore
    with pytest.raises(EncoderError, match="gives 'words' for object 1, a str, and the encoders are 'numbers'"):
        SimilarityModel(WordsAndNumbers({"numbers": Numbers()}), EmptyHead(6)).encode([[1, 2, 3, 4], "a"])
    wrong = WordsAndNumbers({"numbers": Gives(lambda x: x[1:]), "words": Letters(4)})
    with pytest.raises(EncoderError, match=r"'numbers' of a SwitchEncoder \(Gives\) gives \[1, 4\] for 2 objects"):
        SimilarityModel(wrong, EmptyHead(4)).encode(objects(2))
    with pytest.raises(TypeError, match="encoder_selection"):
        SwitchEncoder({"a": Letters()})  # pyright: ignore


# -- in a folder -------------------------------------------------------------------------------------------------------

LOAD = """
import sys
import numpy as np
from torchrecycle.similarity import SimilarityModel
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
model = SimilarityModel.load({folder!r})
given = torch.load({given!r}, weights_only=True)
np.save({out!r}, model.encode(given, batch_size=2))
assert not any(module.training for module in model.modules())
heavy = {{"pytorch_lightning", "pytorch_metric_learning", "torchmetrics", "qdrant_client"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def elsewhere(model: SimilarityModel, given: Any, tmp_path: Path) -> None:
    """Another process loads the model and gives the same to the bit."""
    folder, out = tmp_path / "model", tmp_path / "out.npy"
    model.save(folder)
    torch.save(given, tmp_path / "given.pt")
    words = {"here": str(HERE), "folder": str(folder), "given": str(tmp_path / "given.pt"), "out": str(out)}
    program = LOAD.format(**words)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert np.array_equal(np.load(out), model.encode(given, batch_size=2))


def test_pictures_and_texts_by_real_encoders_come_back_in_another_process(tmp_path):
    from torchrecycle.demo.weights import image_trunk, text_tokenizer, text_trunk

    torch.manual_seed(0)
    encoders = {"picture": Pictures(image_trunk()), "text": Captions(text_trunk(), text_tokenizer())}
    head = SequentialHead(nn.Linear(1664, 64), nn.ReLU(), SkipConnectionHead(64, dropout=0.3, skip_dropout=0.2))
    model = SimilarityModel(encoders, head)
    given = [(torch.rand(3, 64, 64), text) for text in ("a red car", "a cat that sleeps on a sofa", "a boat")]
    alone = [model.encode([each])[0] for each in given]
    np.testing.assert_allclose(model.encode(given), alone, atol=1e-4, rtol=1e-4)
    elsewhere(model, given, tmp_path)
    assert {path.name for path in (tmp_path / "model").rglob("*.json")} >= {"model.json", "module.json"}
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth")]


def test_words_and_numbers_of_a_switch_come_back_in_another_process(tmp_path):
    elsewhere(switched(), ["ab", [1.0, 2.0, 3.0, 4.0], "abc", "x"], tmp_path)


def test_what_is_in_the_folder(tmp_path):
    two().save(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "model.json").read_text(encoding="utf-8"))
    assert about["format"] == 1
    assert about["kind"] == "similarity model"
    assert about["encoders"] == {"size": "saved_models:Numbers", "colour": "saved_models:Numbers"}
    assert about["head"] == "torchrecycle.similarity.heads.skip_connection_head:SkipConnectionHead"
    assert about["torch"] == torch.__version__
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.json", "encoders", "head"}


def test_a_model_comes_back_with_its_flags_and_in_eval_mode(tmp_path):
    model = two().train()
    model.head.requires_grad_(False)
    model.save(tmp_path / "model")
    loaded = SimilarityModel.load(tmp_path / "model")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == flags
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(module.training for module in loaded.modules())
    assert all(module.training for module in loaded.train().head.modules())
    assert SimilarityModel.load(tmp_path / "model", device="meta").encode(things(2), to_numpy=False).is_meta


def test_classes_with_a_save_and_load_of_their_own_are_asked(tmp_path):
    torch.manual_seed(0)
    for name, encoder in (
        ("alone", OwnFiles()),
        ("switched", WordsAndNumbers({"numbers": OwnFiles(), "words": Letters()})),
    ):
        model = SimilarityModel(encoder, EmptyHead(6))
        model.save(tmp_path / name)
        assert len(list((tmp_path / name).rglob("own.safetensors"))) == 1
        loaded = SimilarityModel.load(tmp_path / name)
        assert type(loaded.encoders["default"]) is type(encoder)
        assert np.array_equal(loaded.encode(objects(2)), model.encode(objects(2)))
        assert [m.training for m in loaded.modules()] == [False] * len(list(loaded.modules()))


def test_a_switch_with_more_than_its_encoders_is_saved_whole_or_not_at_all(tmp_path):
    encoder: Any = WordsAndNumbers({"numbers": Numbers(), "words": Letters()})
    encoder.extra = nn.Linear(2, 2)
    encoder.note = 5
    encoder.save(tmp_path / "whole")
    loaded: Any = WordsAndNumbers.load(tmp_path / "whole")
    assert torch.equal(loaded.extra.weight, encoder.extra.weight)
    assert loaded.note == 5
    encoder.options["numbers"] = OwnFiles()
    with pytest.raises(EncoderError, match=r"WordsAndNumbers has extra, note beside its encoders"):
        encoder.save(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_class_that_another_process_would_not_find_is_said_when_saving_and_when_loading(tmp_path):
    class Here(OwnFiles):
        pass

    class HereToo(Numbers):
        pass

    for kind in (Here, HereToo):
        folder = tmp_path / kind.__name__
        with pytest.warns(RecycleWarning, match=r"in this process only: .* is defined in a function\. Move it") as said:
            SimilarityModel(kind(), EmptyHead(6)).save(folder)
        assert len(said) == 1
        with pytest.raises(ModelFolderError, match=r"class .*<locals>.* which is not here: .*at the top of a module"):
            SimilarityModel.load(folder)
    about = json.loads((folder / "model.json").read_text())
    about["encoders"]["default"] = "__main__:Gone"
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(ModelFolderError, match=r"defined in the script or notebook that saved it\. Move it to the top"):
        SimilarityModel.load(folder)


@pytest.mark.parametrize("name", ["os:system", "torch.nn:Linear", "saved_models:stacked", "subprocess:Popen"])
def test_a_class_that_is_no_encoder_is_not_asked_to_load(name, tmp_path):
    model_of().save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    about = json.loads(file.read_text())
    for changed in ({"encoders": {"default": name}}, {"head": name}):
        file.write_text(json.dumps({**about, **changed}))
        with pytest.raises(ModelFolderError, match=rf"is to be loaded by {name}, which is no Encoder"):
            SimilarityModel.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 7}, r"similarity model of format 7.*reads format 1: install a newer"),
        ({"kind": "module"}, "is that of a module, and not of a similarity model"),
        ({"encoders": None}, "does not say what its encoders is"),
        ({"encoders": {"default": 5}}, "does not say what its encoders is"),
        ({"encoders": {}}, "is damaged: there is no encoder"),
        ({"encoders": {"../../x": "saved_models:Numbers"}}, "is damaged: '../../x' cannot be the name"),
        ({"encoders": {"other": "saved_models:Numbers"}}, "there is no folder"),
        ({"head": None}, "does not say what its head is"),
        ({"head": "torchrecycle.similarity.heads:EmptyHead"}, "is loaded as a EmptyHead"),
    ],
)
def test_another_format_kind_or_content_is_refused_in_words(change, words, tmp_path):
    model_of().save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelFolderError, match=words):
        SimilarityModel.load(tmp_path / "model")


def test_a_folder_of_a_part_or_of_nothing_is_refused_in_words(tmp_path):
    model_of().save(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"head holds no model\.json \(module\.json, weights\.safetensors\)"):
        SimilarityModel.load(tmp_path / "model" / "head")
    with pytest.raises(ModelFolderError, match="there is no folder"):
        SimilarityModel.load(tmp_path / "nothing")
    shutil.rmtree(tmp_path / "model" / "head")
    with pytest.raises(ModelFolderError, match=r"there is no folder .*head"):
        SimilarityModel.load(tmp_path / "model")


def test_a_model_that_cannot_be_saved_leaves_the_one_that_was(tmp_path):
    model = model_of()
    model.save(tmp_path / "model")
    before = model.encode(objects(2))
    other: Any = two()
    other.encoders["size"].broken = iter([])
    with pytest.raises(DescriptionError, match=r"cannot save broken of a Numbers, a list_iterator"):
        other.save(tmp_path / "model")
    assert np.array_equal(SimilarityModel.load(tmp_path / "model").encode(objects(2)), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    two().save(tmp_path / "model")
    assert SimilarityModel.load(tmp_path / "model").encoders.keys() == {"size", "colour"}
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ModelFolderError, match=r"holds notes\.txt beside a saved similarity model"):
        model.save(tmp_path / "model")


class More(SimilarityModel):
    pass


def test_a_class_derived_from_the_model_says_that_its_own_layers_would_be_lost(tmp_path):
    model = More(Numbers(), EmptyHead(6))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(EncoderError, match="More has extra besides encoders and head"):
        model.save(tmp_path / "model")
    del model.extra
    model.save(tmp_path / "model")
    assert type(More.load(tmp_path / "model")) is More


class Scaled(SimilarityModel):
    """Has a constructor of its own, and an output of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__(Numbers(), EmptyHead(6))
        self.factor = factor
        self.sizes = (1, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.factor * super().forward(batch)


def test_a_derived_class_with_a_constructor_of_its_own_is_loaded_as_what_it_was(tmp_path):
    model = Scaled(3.0)
    model.save(tmp_path / "model")
    for kind in (SimilarityModel, Scaled):
        again = kind.load(tmp_path / "model")
        assert type(again) is Scaled
        assert (again.factor, again.sizes) == (3.0, (1, 2))
        assert not again.training
        assert np.array_equal(again.encode(objects(3)), model.encode(objects(3)))
    with pytest.raises(ModelFolderError, match=r"holds a Scaled, and is loaded as a More: use Scaled\.load or"):
        More.load(tmp_path / "model")


class WithALoadOfItsOwn(More):
    @classmethod
    def load(cls, input_path, device="cpu"):
        model: Any = super().load(input_path, device)
        model.loaded = getattr(model, "loaded", 0) + 1
        return model


def test_a_derived_class_with_a_load_of_its_own_is_loaded_by_it_once(tmp_path):
    WithALoadOfItsOwn(Numbers(), EmptyHead(6)).save(tmp_path / "model")
    for kind in (SimilarityModel, WithALoadOfItsOwn):
        assert kind.load(tmp_path / "model").loaded == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("factor", object(), "cannot save factor of a Scaled, a object"),
        ("factor", torch.ones(2), "cannot save factor of a Scaled, .* only plain values are written"),
        ("forward", len, r"cannot save forward of a Scaled, .* it stands before Scaled\.forward"),
    ],
)
def test_an_attribute_of_a_derived_class_that_is_no_plain_value_is_refused(name, value, words, tmp_path):
    model = Scaled(3.0)
    setattr(model, name, value)
    with pytest.raises(DescriptionError, match=words):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class": None}, "does not say what its class is"),
        ({"class": "torch.nn:Linear"}, "is no SimilarityModel"),
        ({"class": "gone:Model"}, "which is not here"),
        ({"attributes": {"encode": 1}}, "encode of .* is no attribute that a file may set"),
        ({"attributes": {"_forward_hooks": {}}}, "_forward_hooks of .* is no attribute that a file may set"),
        ({"attributes": {"head": 1}}, "head is no attribute that a file may set"),
        ({"attributes": {"factor": {"$function": "os:system"}}}, "os:system is no function"),
        ({"attributes": {"factor": {"$tensor": "x"}}}, "is damaged, or does not fit Scaled"),
    ],
)
def test_what_a_stranger_writes_of_a_derived_class_is_refused(change, words, tmp_path):
    Scaled(3.0).save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelFolderError, match=words):
        SimilarityModel.load(tmp_path / "model")


def test_hooks_of_the_model_itself_are_refused(tmp_path):
    model = model_of()
    handle = model.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(DescriptionError, match=r"the module \(SimilarityModel\) has a forward pre hook, .*not saved"):
        model.save(tmp_path / "model")
    handle.remove()
    handle = model.register_state_dict_post_hook(lambda *args: None)
    with pytest.raises(EncoderError, match="has state dict hooks, and hooks of the model itself are not saved"):
        model.save(tmp_path / "model")
    handle.remove()
    model.save(tmp_path / "model")


def test_weights_in_two_parts_are_refused_if_they_are_trained_and_warned_of_if_not(tmp_path):
    encoder: Any = Numbers(trained=True)
    with pytest.raises(SharedWeightsError, match=r"the encoder 'b' and the encoder 'a' share weights, .* train apart"):
        SimilarityModel({"a": encoder, "b": encoder}, EmptyHead(12)).save(tmp_path / "model")
    frozen = SimilarityModel({"a": (encoder := Numbers()), "b": encoder}, EmptyHead(12))
    with pytest.warns(RecycleWarning, match="are the same numbers, and each part is saved by itself"):
        frozen.save(tmp_path / "model")
    again = SimilarityModel.load(tmp_path / "model")
    assert np.array_equal(again.encode(objects(2)), frozen.encode(objects(2)))

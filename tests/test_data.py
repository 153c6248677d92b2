"""A recycled loader's batches are the plain loader's: type, keys, order, dtypes and targets, for every form of data
set."""

from __future__ import annotations

import collections
import logging
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from small import CUT, Counted, bert, labels, pictures, residual, texts, tokenizer, write_pictures
from torchrecycle import BatchError, RecycledTensor, Recycling, recycle
from torchrecycle.data import Manifest, Template, identity_of, make_column, state_of

N = 23


class Pair(typing.NamedTuple):
    image: torch.Tensor
    label: int


class Items(Dataset[Any]):
    """A map-style data set whose items a function makes."""

    def __init__(self, make: typing.Callable[[int], Any], count: int = N) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.make(index)


X, Y = pictures(N), labels(N)

FORMS: dict[str, Any] = {
    "list of tensors": [X[i] for i in range(N)],
    "list of tensor and int": [(X[i], int(Y[i])) for i in range(N)],
    "list of dicts": [{"x": X[i], "label": int(Y[i])} for i in range(N)],
    "TensorDataset": TensorDataset(X, Y),
    "TensorDataset of inputs only": TensorDataset(X),
    "namedtuples": Items(lambda i: Pair(X[i], i)),
    "nested": Items(lambda i: (X[i], {"a": [i, float(i)], "b": (f"name {i}", np.float32(i))})),
    "a list item": Items(lambda i: [X[i], i]),
    "strings, floats, bools": Items(lambda i: (X[i], f"text {i}", i / 7, i % 2 == 0)),
    "NumPy targets": Items(lambda i: (X[i], np.arange(3, dtype=np.int16) + i, np.int64(i), np.float64(i) / 3)),
    "NumPy inputs": Items(lambda i: (X[i].numpy(), i)),
    "tensor targets": Items(lambda i: (X[i], torch.full((2, 2), i, dtype=torch.int32), torch.tensor(i / 3))),
    "bytes": Items(lambda i: (X[i], b"ab%d" % i)),
    "ordered dict": Items(lambda i: collections.OrderedDict(z=i, x=X[i])),
    "defaultdict": Items(lambda i: collections.defaultdict(list, x=X[i], y=i)),
    "ConcatDataset": ConcatDataset([TensorDataset(X[:10], Y[:10]), TensorDataset(X[10:], Y[10:])]),
    "Subset": Subset(TensorDataset(pictures(30, 1), labels(30)), list(range(N))),
}


def example_of(form: str) -> Any:
    keyed = isinstance(FORMS[form][0], Mapping)
    return {"x": X[:2]} if keyed else X[:2]


def same(plain: Any, recycled: Any, inputs: torch.Tensor | None = None, at: str = "batch") -> int:
    """Compare element by element; how many stand-ins there are."""
    if isinstance(recycled, RecycledTensor):
        assert isinstance(plain, torch.Tensor), at
        assert (plain.shape, plain.dtype, plain.device) == (
            recycled.shape,
            recycled.dtype,
            recycled.device,
        ), at
        return 1
    assert type(plain) is type(recycled), f"{at}: {type(plain)} {type(recycled)}"
    if isinstance(plain, torch.Tensor):
        assert plain.dtype == recycled.dtype, at
        assert plain.shape == recycled.shape, at
        assert torch.equal(plain, recycled), at
        return 0
    if isinstance(plain, Mapping):
        assert list(plain) == list(recycled), at
        return sum(same(plain[k], recycled[k], inputs, f"{at}[{k!r}]") for k in plain)
    if isinstance(plain, (list, tuple)):
        assert len(plain) == len(recycled), at
        return sum(same(a, b, inputs, f"{at}[{i}]") for i, (a, b) in enumerate(zip(plain, recycled, strict=True)))
    assert plain == recycled, at
    return 0


def compare_loaders(recycling: Recycling, dataset: Any, seed: int = 3, **arguments: Any) -> None:
    """Same order, same targets, same outputs, for the same seed."""
    torch.manual_seed(seed)
    plain = list(DataLoader(dataset, **arguments))
    torch.manual_seed(seed)
    loader = recycling.loader(dataset, **arguments)
    torch.manual_seed(seed)
    recycled = list(loader)
    assert len(plain) == len(recycled) == len(loader)
    for a, b in zip(plain, recycled, strict=True):
        assert same(a, b) == 1
        with torch.no_grad():
            want = run(recycling, a)
            got = run(recycling, b)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def run(recycling: Recycling, batch: Any) -> torch.Tensor:
    inputs = recycling.source.rule(batch)
    return recycling.model(*inputs.args, **inputs.kwargs)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


# -- forms of data sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_has_the_form_and_the_targets_of_the_plain_one(form, tmp_path):
    recycling = recycle(residual(), example_of(form), cut=CUT, store=tmp_path / "store")
    compare_loaders(recycling, FORMS[form], batch_size=5, shuffle=True)
    assert recycling.stats.hits >= N


def test_image_folders_give_the_plain_batches(tmp_path, made):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    compare_loaders(made, ImageFolder(write_pictures(tmp_path / "files"), transform), batch_size=5, shuffle=True)


@pytest.mark.parametrize("shape", ["torch", "numpy", "with transform"])
def test_hugging_face_data_sets_give_the_plain_batches(shape, tmp_path):
    import datasets

    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    dataset = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist(), "name": [f"n{i}" for i in range(N)]})
    if shape == "with transform":
        dataset = dataset.with_transform(lambda b: {"x": [torch.tensor(x) for x in b["x"]], "label": b["label"]})
    else:
        dataset = dataset.with_format(shape)
    compare_loaders(recycling, dataset, batch_size=5, shuffle=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 4},
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_size": 5, "shuffle": True, "num_workers": 2},
        {"batch_size": 1},
        {"batch_size": 4, "sampler": [3, 3, 1, 20, 3]},
        {"batch_size": 4, "sampler": [-1, -N, 0]},
        {"batch_sampler": [[0, 1], [5, 5, 5], [22]]},
        {"batch_size": 4, "sampler": lambda: WeightedRandomSampler([float(i) for i in range(N)], 12)},
        {"batch_sampler": lambda: BatchSampler(RandomSampler(range(N)), 6, False)},
        {"batch_size": 4, "shuffle": True, "generator": lambda: torch.Generator().manual_seed(9)},
    ],
    ids=lambda case: str(case).partition(" at 0x")[0],
)
def test_every_way_of_drawing_batches_gives_the_plain_ones(arguments, made):
    def fresh() -> dict[str, Any]:
        return {n: v() if callable(v) else v for n, v in arguments.items()}

    torch.manual_seed(3)
    plain = list(DataLoader(FORMS["list of tensor and int"], **fresh()))
    loader = made.loader(FORMS["list of tensor and int"], **fresh())
    torch.manual_seed(3)
    for a, b in zip(plain, loader, strict=True):
        assert same(a, b) == 1
        torch.testing.assert_close(made.model(b[0]), made.model(a[0]), rtol=1e-4, atol=1e-5)


def test_the_random_state_after_an_epoch_is_that_after_a_plain_one(made):
    torch.manual_seed(5)
    list(DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
    want = torch.rand(3)
    loader = made.loader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    torch.manual_seed(5)
    list(loader)
    assert torch.equal(torch.rand(3), want)


# -- collate functions -------------------------------------------------------------------------------------------------


def by_length(items: Any) -> Any:
    """Orders texts by length, as some collate functions do."""
    items = sorted(items, key=lambda item: len(item["input_ids"]))
    return PAD(items)


TOKENIZER = None
PAD: Any = None


def text_data(count: int = 20) -> Any:
    global TOKENIZER, PAD
    import datasets
    from transformers import DataCollatorWithPadding

    TOKENIZER = TOKENIZER or tokenizer()
    PAD = DataCollatorWithPadding(TOKENIZER)
    return datasets.Dataset.from_dict({**TOKENIZER(texts(count)), "labels": [i % 2 for i in range(count)]})


def text_example(dataset: Any) -> Any:
    batch = PAD([dataset[0], dataset[5]])
    return {name: batch[name] for name in batch if name != "labels"}


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_in_any_order_have_their_own_rows(workers, tmp_path):
    dataset = text_data()
    recycling = recycle(bert(), text_example(dataset), level=0.5, store=tmp_path / "store")
    torch.manual_seed(1)
    plain = list(DataLoader(dataset, batch_size=6, shuffle=True, collate_fn=by_length))
    loader = recycling.loader(dataset, batch_size=6, shuffle=True, collate_fn=by_length, num_workers=workers)
    torch.manual_seed(1)
    before = recycling.stats.hits
    for a, b in zip(plain, loader, strict=True):
        assert type(a) is type(b)
        assert list(a) == list(b)
        carriers = [name for name in b if isinstance(b[name], RecycledTensor)]
        assert carriers == ["input_ids"]
        assert all(torch.equal(a[n], b[n].value if n in carriers else b[n]) for n in a)
        with torch.no_grad():
            got = recycling.model(**b).logits
            with recycling.paused():
                want = recycling.model(**a).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert recycling.stats.hits - before == 20


def test_text_rows_are_kept_without_padding(tmp_path):
    dataset = text_data()
    recycling = recycle(bert(), text_example(dataset), level=0.5, store=tmp_path / "store")
    recycling.fill(dataset, batch_size=8, collate_fn=PAD)
    manifest = recycling._manifests._known[-1].manifest
    leaf = recycling.source.rows.gather(recycling.source.rows.lookup(manifest.keys))[0]
    assert leaf.lengths.tolist() == [len(ids) for ids in dataset["input_ids"]]
    assert leaf.values.shape == (sum(map(len, dataset["input_ids"])), 32)


def reads_pixels(items: Any) -> Any:
    return torch.stack([item[0] * 2 for item in items]), torch.tensor([item[1] for item in items])


def to_model_arguments(items: Any) -> Any:
    return {
        "labels": torch.tensor([item[1] for item in items]),
        "x": torch.stack([item[0] for item in items]),
    }


def test_a_collate_that_reads_pixels_is_named(made):
    with pytest.raises(BatchError, match="reads_pixels computes the model input 'x'"):
        made.loader(TensorDataset(X, Y), batch_size=4, collate_fn=reads_pixels)


def looks(items: Any) -> Any:
    assert float(items[0][0].mean()) < 100
    return torch.utils.data.default_collate(items)


def test_a_collate_that_only_looks_at_pixels_is_named_when_they_are_gone(made):
    with pytest.raises(BatchError, match=r"looks did not run.*'x'.*__getitem__"):
        list(made.loader(TensorDataset(X, Y), batch_size=4, collate_fn=looks))


def test_a_collate_that_builds_another_nest_keeps_no_pixels(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    loader = recycling.loader(TensorDataset(X, Y), batch_size=4, collate_fn=to_model_arguments)
    batches = list(loader)
    assert list(batches[0]) == ["labels", "x"]
    assert isinstance(batches[0]["x"], RecycledTensor)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), Y)
    manifest = recycling._manifests._known[-1].manifest
    assert sum(column.values.nbytes for column in manifest.columns) < 100 * N
    with torch.no_grad():
        torch.testing.assert_close(recycling.model(batches[1]["x"]), recycling.model(X[4:8]), rtol=1e-4, atol=1e-5)


def writes_targets(items: Any) -> Any:
    for _, target in items:
        target += 1
    return torch.utils.data.default_collate(items)


def test_a_collate_that_writes_into_targets_does_not_change_the_next_epoch(made):
    dataset = Items(lambda i: (X[i], torch.full((3,), i)))
    loader = made.loader(dataset, batch_size=4, collate_fn=writes_targets)
    first, second = (torch.cat([y for _, y in loader]) for _ in range(2))
    assert torch.equal(first, second)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.0), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_precision_is_what_rows_lose(precision, tolerance, tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", precision=precision)
    (x, _), *_ = list(recycling.loader(TensorDataset(X, Y), batch_size=N))
    assert x.leaves[0].dtype is getattr(torch, precision)
    with torch.no_grad():
        got, want = recycling.model(x), recycling.model(X)
    assert ((got - want).norm() / want.norm()).item() <= tolerance


# -- keys of the user --------------------------------------------------------------------------------------------------


class Named(Dataset[Any]):
    def __init__(self, order: list[int], shift: float = 0.0) -> None:
        self.order, self.shift = order, shift

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return {"x": X[self.order[index]] + self.shift, "id": self.order[index]}


def id_of(item: Any) -> int:
    return item["id"]


def test_user_keys_find_rows_by_their_identity(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store", key=id_of)
    recycling.fill(Named(list(range(10))), name="v1")
    report = recycling.fill(Named([9, 3, 11]), name="v1")
    assert (report.found, report.computed) == (2, 1)
    batch = next(iter(recycling.loader(Named([9, 3, 11]), batch_size=3, name="v1")))
    with torch.no_grad():
        torch.testing.assert_close(recycling.model(batch["x"]), recycling.model(X[[9, 3, 11]]), rtol=1e-4, atol=1e-5)


def test_another_name_of_the_preprocessing_gives_other_user_keys(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store", key=id_of)
    recycling.fill(Named(list(range(4))), name="v1")
    assert recycling.fill(Named(list(range(4)), shift=1.0), name="v2").computed == 4


def test_user_keys_without_a_name_are_refused(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store", key=id_of)
    for call in (recycling.fill, recycling.loader, recycling.dataset):
        with pytest.raises(BatchError, match=r"another resize .* would not be noticed.*name="):
            call(Named([1, 2]))


def test_two_data_sets_of_one_length_under_one_name_do_not_share_a_manifest(tmp_path):
    store = tmp_path / "store"
    with recycle(residual(), {"x": X[:2]}, cut=CUT, store=store, key=id_of) as first:
        first.fill(Named([0, 1, 2]), name="resize 16")
    second = recycle(residual(), {"x": X[:2]}, cut=CUT, store=store, key=id_of)
    batch = next(iter(second.loader(Named([5, 6, 7]), batch_size=3, name="resize 16")))
    assert batch["id"].tolist() == [5, 6, 7]
    with torch.no_grad():
        torch.testing.assert_close(second.model(batch["x"]), second.model(X[5:8]), rtol=1e-4, atol=1e-5)


# -- the data set is not read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": 0},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "multiprocessing_context": "spawn"},
    ],
    ids=str,
)
def test_on_hits_the_data_set_is_not_read(arguments, made):
    dataset = Counted(FORMS["list of tensor and int"])
    made.fill(dataset)
    dataset.count()
    loader = made.loader(dataset, batch_size=4, shuffle=True, **arguments)
    assert dataset.count() <= 8
    for _ in range(2):
        assert sum(len(x) for x, _ in loader) == N
        assert dataset.count() == 0
    made.loader(dataset, batch_size=4, **arguments)
    assert dataset.count() <= 8


class Remembering(Dataset[Any]):
    """Counts and caches in its own attributes, so that reading changes it."""

    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}
        self.reads = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.cache.setdefault(index, (X[index].clone(), index))


def test_a_data_set_that_counts_and_caches_is_not_read_again(made):
    dataset = Remembering()
    loader = made.loader(dataset, batch_size=4)
    list(loader)
    reads = dataset.reads
    for _ in range(3):
        list(loader)
    assert dataset.reads == reads
    list(made.loader(dataset, batch_size=4))
    assert dataset.reads <= reads + 8


def test_two_collate_functions_on_one_data_set_do_not_drive_each_other_out(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    dataset = Counted([{"x": X[i], "y": i} for i in range(N)])
    loaders = [
        recycling.loader(dataset, batch_size=4),
        recycling.loader(dataset, batch_size=4, collate_fn=with_extra),
    ]
    dataset.count()
    for _ in range(2):
        for loader in loaders:
            assert len(list(loader)) == 6
    assert dataset.count() == 0


def with_extra(items: Any) -> Any:
    return {**torch.utils.data.default_collate(items), "extra": len(items)}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "the data set is empty"),
        (TensorDataset(X[:0], Y[:0]), "the data set is empty"),
        ({0: 1}.keys(), "no map-style data set"),
        ([("text", 1)] * 3, "begins with a tuple where the example is a tensor"),
        ([{"image": X[0]}] * 3, "where the example"),
        ([(torch.zeros(3, 24, 24), 1)] * 3, "another size than those of the example"),
        ([(X[0], object())] * 3, "found <class 'object'>"),
        ([(X[0], 1), (X[1], 1, 2)], "items must be alike|equal size"),
    ],
    ids=range(8),
)
def test_a_data_set_that_does_not_fit_is_refused_in_words(dataset, words, made):
    for call in (made.fill, lambda d: list(made.loader(d, batch_size=2))):
        with pytest.raises((BatchError, TypeError, RuntimeError), match=words):
            call(dataset)


def test_missing_keys_and_wrong_types_are_named(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    with pytest.raises(BatchError, match=r"has no \['x'\].*it has \['image', 'label'\]"):
        recycling.fill([{"image": X[0], "label": 1}] * 3)
    with pytest.raises(BatchError, match=r"list where the example is a dict with the keys \['x'\]"):
        recycling.fill([(X[0], 1)] * 3)


def test_targets_of_an_unknown_type_are_refused_by_place_and_type(made):
    def collate(items: Any) -> Any:
        return torch.stack([image for image, _ in items]), [target for _, target in items]

    with pytest.raises(BatchError, match=r"item\[1\] of the items is of type complex, which cannot be kept"):
        made.fill([(X[0], 1j)] * 3, collate_fn=collate)


def test_batches_that_the_data_set_makes_itself_are_refused(made):
    with pytest.raises(BatchError, match="batch_size=None gives single items"):
        made.loader(TensorDataset(X, Y), batch_size=None)


def test_a_recycled_data_set_is_not_recycled_twice(made):
    with pytest.raises(BatchError, match="recycled already"):
        made.loader(made.dataset(TensorDataset(X, Y)), batch_size=4)


def test_an_index_beyond_the_data_set_is_an_index_error(made):
    wrapped = made.dataset(TensorDataset(X, Y))
    for index in (N, -N - 1):
        with pytest.raises(IndexError):
            wrapped[index]


# -- columns and manifests ---------------------------------------------------------------------------------------------

LEAVES: list[list[Any]] = [
    [1, 2, -3],
    [1.5, float("inf"), 2.0],
    [True, False, True],
    ["a", "", "ä€"],
    [b"a", b"", b"\xff"],
    [None, None, None],
    [None, 1, "x"],
    [[1, 2], [], [3]],
    [[0.1], [1e300], [2.0]],
    [["a", None], ["b"], []],
    [np.int32(1), np.int32(2), np.int32(3)],
    [np.arange(2), np.arange(2), np.arange(2)],
    [np.zeros((1, 2)), np.ones((3, 2)), np.zeros((0, 2))],
    [torch.arange(2), torch.arange(3), torch.arange(0)],
    [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
]


@pytest.mark.parametrize("leaves", LEAVES, ids=str)
def test_a_column_gives_back_what_went_in_also_through_a_file(leaves):
    manifest = Manifest(np.zeros((3, 16), np.uint8), Template("leaf"), (make_column(leaves, "item"),), {})
    again = Manifest.from_tensors(*manifest.to_tensors())
    for column in (manifest.columns[0], again.columns[0]):
        for i, leaf in enumerate(leaves):
            assert type(column[i]) is type(leaf)
            if isinstance(leaf, (torch.Tensor, np.ndarray)):
                assert column[i].dtype == leaf.dtype
                assert column[i].shape == leaf.shape
            assert np.array_equal(column[i], leaf) if isinstance(leaf, np.ndarray) else repr(column[i]) == repr(leaf)


@pytest.mark.parametrize(
    "leaves",
    [[[np.float64(1)]], [1, [torch.zeros(1)]], [object()], [{1}], [torch.zeros(1), 1]],
    ids=lambda case: str(case).partition(" at 0x")[0],
)
def test_what_would_come_back_otherwise_is_refused(leaves):
    with pytest.raises(BatchError, match="cannot be kept beside the rows"):
        make_column(leaves, "item")


def test_the_identity_of_a_data_set_covers_objects_and_targets(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Lambda, Resize, ToTensor

    folder = write_pictures(tmp_path / "files")
    relabelled = ImageFolder(folder, ToTensor())
    relabelled.samples[0] = (relabelled.samples[0][0], 2)
    known = [
        TensorDataset(X, Y),
        TensorDataset(X, Y + 1),
        TensorDataset(X + 1, Y),
        Subset(TensorDataset(X, Y), [0, 1]),
        Subset(TensorDataset(X, Y), [1, 0]),
        [(X[0], 1)],
        [(X[0], 2)],
        ImageFolder(folder, ToTensor()),
        ImageFolder(folder, Compose([Resize(8), ToTensor()])),
        ImageFolder(folder, Compose([Resize(12), ToTensor()])),
        relabelled,
    ]
    identities = [identity_of(dataset) for dataset in known]
    assert None not in identities
    assert len(set(identities)) == len(known)
    unknown = [
        ImageFolder(folder, Lambda(lambda x: x)),
        ImageFolder(folder, ToTensor(), target_transform=lambda y: y + 1),
        ImageFolder(folder, ToTensor(), loader=lambda path: None),
        Items(lambda i: i),
        Subset(Items(lambda i: i), [0]),
    ]
    assert [identity_of(dataset) for dataset in unknown] == [None] * len(unknown)


def test_the_identity_of_hugging_face_data_covers_format_and_leaves_out_what_it_cannot_see(tmp_path):
    import datasets

    plain = datasets.Dataset.from_dict({"x": [1, 2], "y": [3, 4]})
    variants = [
        plain,
        plain.with_format("torch"),
        plain.with_format("torch", columns=["x"]),
        plain.select([1]),
    ]
    assert len({identity_of(one) for one in variants}) == 4
    assert identity_of(plain.with_transform(lambda batch: batch)) is None
    paths = sorted(map(str, write_pictures(tmp_path, 3).rglob("*.png")))
    by_path = datasets.Dataset.from_dict({"x": paths}).cast_column("x", datasets.Image())
    assert identity_of(by_path) is None
    inside = datasets.Dataset.from_dict({"x": [{"bytes": Path(p).read_bytes(), "path": None} for p in paths]})
    assert identity_of(inside.cast_column("x", datasets.Image())) is not None


SIZE = 3


class Configured:
    scale = 1

    def __init__(self) -> None:
        self.nested = {"a": [[1, 2], {"b": (3, 4)}], "c": {5}}
        self.array = np.zeros(3)
        self.tensor = torch.zeros(3)

    def __getitem__(self, index: int) -> Any:
        return index * SIZE


class Slotted:
    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 1


def test_the_state_of_a_data_set_shows_every_change(monkeypatch):
    import functools

    dataset: Any = Configured()
    dataset.slotted = Slotted()
    size = 1

    def transform(value: Any) -> Any:
        return [inner * size for inner in [value]]

    dataset.transform = transform
    dataset.partial = functools.partial(transform, value=1)
    states = [state_of(dataset)]

    def changed() -> None:
        assert state_of(dataset) == state_of(dataset)
        assert state_of(dataset) not in states
        states.append(state_of(dataset))

    dataset.nested["a"][1]["b"] = (3, 5)
    changed()
    dataset.nested["c"].add(6)
    changed()
    dataset.array[1] = 1
    changed()
    dataset.tensor.data[0] = 1
    changed()
    dataset.tensor.numpy()[1] = 1
    changed()
    dataset.slotted.size = 2
    changed()
    size = 2
    changed()
    dataset.partial = functools.partial(transform, value=2)
    changed()
    monkeypatch.setattr(Configured, "scale", 2)
    changed()
    monkeypatch.setitem(globals(), "SIZE", 4)
    changed()
    monkeypatch.setattr(Configured, "__getitem__", lambda self, index: index)
    changed()
    dataset.transform = lambda value: [inner + size for inner in [value]]
    changed()
    dataset.transform = lambda value: [inner - size for inner in [value]]
    changed()


def test_a_number_at_the_address_of_an_older_one_is_a_change():
    dataset = [(X[0], 0.5)]
    before = state_of(dataset)
    for value in np.linspace(0.6, 0.9, 50).tolist():
        dataset[0] = (X[0], value)
        assert state_of(dataset) != before


LOGGER = logging.getLogger(__name__)


def noisy(item: Any) -> Any:
    LOGGER.debug("reading")
    return item


def test_a_logger_in_a_data_sets_code_is_no_part_of_its_state():
    dataset = Counted([(X[0], 1)], noisy)
    before = state_of(dataset)
    assert dataset[0][1] == 1
    logging.getLogger("another one of a library").info("imported later")
    assert state_of(dataset) == before

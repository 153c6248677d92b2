"""Data sets over Hugging Face tables, NumPy arrays, pandas frames, Arrow and polars tables: plain batches, and no stale
row or label after any of them was edited."""

from __future__ import annotations

import array
import collections
import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from small import CUT, labels, pictures, residual
from test_data import same
from test_mix import close, full
from torchrecycle import BatchError, KeyTypeError, Recycling, recycle
from torchrecycle.data import identity_of, state_of

N = 12
X, Y = pictures(N), labels(N)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


@pytest.fixture
def keyed(tmp_path) -> Recycling:
    return recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")


def input_of(batch: Any) -> Any:
    return batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (list, tuple)) else batch


def compare(recycling: Recycling, dataset: Any, loader: Any = None, **arguments: Any) -> None:
    """The plain batches, their inputs aside, and what the whole model gives."""
    arguments = {"batch_size": 5, **arguments}
    loader = recycling.loader(dataset, **arguments) if loader is None else loader
    for plain, recycled in zip(DataLoader(dataset, **arguments), loader, strict=True):
        assert same(plain, recycled) == 1
        with torch.no_grad():
            close(recycling.model(input_of(recycled)), full(recycling, input_of(plain)))


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": X.numpy(), "label": Y.tolist(), "name": [f"number {i}" for i in range(N)]})


def doubled(batch: Any) -> Any:
    return {"x": [2 * torch.tensor(x) for x in batch["x"]], "label": batch["label"]}


def halved(batch: Any) -> Any:
    return {"x": [torch.tensor(x) / 2 for x in batch["x"]], "label": batch["label"]}


def in_place(dataset: datasets.Dataset) -> datasets.Dataset:
    dataset.set_format("torch", columns=["x", "label"])
    return dataset


HUGGING_FACE: dict[str, Callable[[datasets.Dataset], Any]] = {
    "torch": lambda d: d.with_format("torch"),
    "numpy": lambda d: d.with_format("numpy"),
    "set_format, some columns": in_place,
    "with_transform": lambda d: d.with_transform(doubled),
    "select": lambda d: d.with_format("torch").select([7, 3, 3, 0, 11]),
    "shuffle": lambda d: d.with_format("torch").shuffle(seed=5),
    "sort": lambda d: d.with_format("torch").sort("label"),
    "filter": lambda d: d.filter(lambda row: row["label"] != 2).with_format("torch"),
    "map": lambda d: d.map(lambda row: {"x": (2 * np.array(row["x"])).tolist()}).with_format("torch"),
    "concatenated": lambda d: datasets.concatenate_datasets([d, d.select(range(3))]).with_format("torch"),
    "split": lambda d: d.train_test_split(0.5, seed=1)["train"].with_format("torch"),
    "column renamed": lambda d: d.rename_column("name", "text").with_format("torch"),
}


@pytest.fixture(autouse=True)
def quiet_bars() -> Any:
    datasets.disable_progress_bars()


sorting = pytest.mark.filterwarnings("ignore:Specifying null_placement in SortOptions:FutureWarning")


@sorting
@pytest.mark.parametrize("form", HUGGING_FACE)
def test_hugging_face_data_sets_give_the_plain_batches(form, keyed):
    dataset = HUGGING_FACE[form](table())
    compare(keyed, dataset)
    compare(keyed, dataset, shuffle=False, drop_last=True)


@sorting
def test_each_form_of_a_hugging_face_data_set_has_its_own_rows_and_targets(keyed):
    """All of one length, under one recycling: no manifest is taken for another."""
    forms = ["torch", "shuffle", "sort", "map", "with_transform", "numpy"]
    for _ in range(2):
        for form in forms:
            compare(keyed, HUGGING_FACE[form](table()))
    found = {identity_of(HUGGING_FACE[form](table())) for form in forms if form != "with_transform"}
    assert len(found - {None}) == len(found)


def test_a_hugging_face_data_set_whose_format_is_set_in_place_is_read_anew(keyed):
    dataset = table().with_format("torch")
    loader = keyed.loader(dataset, batch_size=5)
    compare(keyed, dataset, loader)
    dataset.set_transform(doubled)
    compare(keyed, dataset, loader)
    dataset.set_transform(halved)
    compare(keyed, dataset, loader)
    dataset.reset_format()
    dataset.set_format("torch", columns=["x"])
    compare(keyed, dataset, loader)


def test_lists_of_numbers_and_splits_are_refused_with_the_way_out(keyed):
    with pytest.raises(BatchError, match=r"no tensor for the model input \['x'\].*with_format\('torch'\)"):
        keyed.loader(table())
    splits = datasets.DatasetDict(train=table(), test=table())
    with pytest.raises(BatchError, match=r"a DatasetDict is no data set: it has 'train', 'test'.*splits\['train'\]"):
        keyed.loader(splits)


# -- files that the data set knows by their paths ----------------------------------------------------------------------


@dataclasses.dataclass
class Photo:
    path: str
    label: int


class Pair(NamedTuple):
    path: str
    label: int


HOLDERS: dict[str, tuple[Callable[[list[str]], Any], Callable[[Any], str]]] = {
    "texts": (list, str),
    "tuples": (lambda paths: [(path, 1) for path in paths], lambda item: item[0]),
    "tuples with tensors": (lambda paths: [(path, torch.tensor(1)) for path in paths], lambda item: item[0]),
    "lists": (lambda paths: [[path, 1] for path in paths], lambda item: item[0]),
    "dicts": (lambda paths: [{"path": path, "label": 1} for path in paths], lambda item: item["path"]),
    "dict by number": (lambda paths: dict(enumerate(paths)), str),
    "dataclasses": (lambda paths: [Photo(path, 1) for path in paths], lambda item: item.path),
    "named tuples": (lambda paths: [Pair(path, 1) for path in paths], lambda item: item.path),
    "NumPy texts": (np.array, str),
    "NumPy objects": (lambda paths: np.array(paths, dtype=object), str),
    "Hugging Face texts": (lambda paths: datasets.Dataset.from_dict({"path": paths}), lambda item: item["path"]),
    "Hugging Face pictures": (
        lambda paths: datasets.Dataset.from_dict({"path": paths}).cast_column("path", datasets.Image(decode=False)),
        lambda item: item["path"]["path"],
    ),
}


class OfFiles(Dataset[Any]):
    def __init__(self, held: Any, path_of: Callable[[Any], str]) -> None:
        self.held, self.path_of = held, path_of

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(np.load(self.path_of(self.held[index]))), index


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_file_edited_under_its_path_is_read_anew(holder, made, tmp_path):
    paths = [str(tmp_path / f"{i}.npy") for i in range(N)]
    for path, x in zip(paths, X, strict=True):
        np.save(path, x.numpy())
    hold, path_of = HOLDERS[holder]
    dataset = OfFiles(hold(paths), path_of)
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    np.save(paths[4], 3 * X[4].numpy())
    compare(made, dataset, loader)


def test_a_list_of_several_things_of_which_the_first_is_a_file_has_a_state(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    kinds = ([str(path), 3], (str(path), None), [(str(path), 1), ()], [(str(path), 1), ("short",)])
    before = [state_of(held) for held in kinds]
    path.write_text("other")
    assert not any(state_of(held) == one for held, one in zip(kinds, before, strict=True))


# -- what else a data set may hold -------------------------------------------------------------------------------------

EDITS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "deque": (collections.deque([1.0, 5.0]), lambda held: held.__setitem__(0, 2.0)),
    "array": (array.array("d", [1.0, 5.0]), lambda held: held.__setitem__(0, 2.0)),
    "memory": (memoryview(bytearray(b"\x01\x05")), lambda held: held.__setitem__(0, 2)),
}


class Times(Dataset[Any]):
    def __init__(self, held: Any) -> None:
        self.held = held

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return X[index] * float(self.held[0]), index


@pytest.mark.parametrize("held", EDITS)
def test_what_is_edited_in_a_container_is_seen_at_the_next_iteration(held, made):
    dataset, edit = Times(EDITS[held][0]), EDITS[held][1]
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    edit(dataset.held)
    compare(made, dataset, loader)


class ImportsWhenRead(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        import settings_of_a_user  # pyright: ignore

        return X[index] * settings_of_a_user.factor, index


def test_a_setting_of_a_module_that_is_imported_when_an_item_is_read_is_seen(made, monkeypatch):
    module: Any = types.ModuleType("settings_of_a_user")
    module.factor = 1.0
    monkeypatch.setitem(sys.modules, "settings_of_a_user", module)
    dataset = ImportsWhenRead()
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    module.factor = 2.0
    compare(made, dataset, loader)


# -- arrays given as data sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "tensor", "list of arrays", "list of tensors", "memory map"])
def test_arrays_may_be_data_sets_themselves_and_an_edit_is_seen(kind, made, tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    dataset: Any = {
        "array": lambda: X.numpy().copy(),
        "tensor": X.clone,
        "list of arrays": lambda: list(X.numpy().copy()),
        "list of tensors": lambda: list(X.clone()),
        "memory map": lambda: np.load(tmp_path / "x.npy", mmap_mode="r+"),
    }[kind]()
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    dataset[3][:] = 0.5
    dataset[N - 1][0, 0, 0] += 1e-3
    compare(made, dataset, loader)
    compare(made, dataset)


# -- data sets over frames and tables ----------------------------------------------------------------------------------


class OfFrame(Dataset[Any]):
    """As people write them: a column of paths or numbers of objects, and one of labels."""

    def __init__(self, frame: pd.DataFrame, images: np.ndarray) -> None:
        self.frame, self.images = frame, images

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> Any:
        row = self.frame.iloc[index]
        return torch.from_numpy(self.images[row["image"]]), row["label"], row["name"], row["weight"]


def frame() -> pd.DataFrame:
    names = [f"number {i}" for i in range(N)]
    return pd.DataFrame({"image": range(N), "label": Y.numpy(), "name": names, "weight": np.linspace(0, 1, N)})


def relabel(dataset: OfFrame) -> None:
    dataset.frame.loc[3, "label"] = 3 - dataset.frame.loc[3, "label"]


def change_images(dataset: OfFrame) -> None:
    dataset.frame["image"] = dataset.frame["image"].to_numpy()[::-1].copy()


def change_name(dataset: OfFrame) -> None:
    dataset.frame.iloc[5, dataset.frame.columns.get_loc("name")] = "another"


def reorder(dataset: OfFrame) -> None:
    dataset.frame = dataset.frame.iloc[::-1]


def change_pixels(dataset: OfFrame) -> None:
    dataset.images[4] *= 2


@pytest.mark.parametrize("edit", [relabel, change_images, change_name, reorder, change_pixels])
@pytest.mark.parametrize("new_loader", [False, True])
def test_an_edited_frame_is_seen(edit, new_loader, made):
    dataset = OfFrame(frame(), X.numpy().copy())
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    reads = state_of(dataset)
    compare(made, dataset, loader)
    assert state_of(dataset) == reads
    edit(dataset)
    compare(made, dataset, None if new_loader else loader)
    subset = Subset(dataset, [3, 4, 5, 5])
    compare(made, subset)


class OfTable(Dataset[Any]):
    def __init__(self, held: Any, item: Callable[[Any, int], Any]) -> None:
        self.held, self.item = held, item

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.item(self.held, index)


def of_arrow(held: Any, index: int) -> Any:
    return (
        torch.tensor(held["x"][index].as_py()).reshape(X.shape[1:]),
        held["label"][index].as_py(),
        held["name"][index].as_py(),
    )


def arrow_table(images: torch.Tensor = X, targets: torch.Tensor = Y) -> pa.Table:
    names = [f"number {i}" for i in range(N)]
    return pa.table({"x": images.reshape(N, -1).tolist(), "label": targets.tolist(), "name": names})


def test_a_data_set_over_an_arrow_table_is_read_anew_when_its_table_is_another(made):
    dataset = OfTable(arrow_table(), of_arrow)
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    dataset.held = arrow_table(targets=3 - Y)
    compare(made, dataset, loader)
    dataset.held = arrow_table(images=X.flip(0))
    compare(made, dataset, loader)


def test_a_data_set_over_a_polars_frame_is_read_anew_when_a_cell_was_set(made):
    pl = pytest.importorskip("polars")
    held = pl.DataFrame({"image": list(range(N)), "label": Y.tolist()})
    dataset = OfTable(held, lambda held, index: (X[held["image"][index]], held["label"][index]))
    loader = made.loader(dataset, batch_size=5)
    compare(made, dataset, loader)
    held[4, "label"] = 9
    compare(made, dataset, loader)
    held[4, "image"] = 0
    compare(made, dataset, loader)
    with pytest.raises(BatchError, match="a polars DataFrame gives no items by number"):
        made.loader(held)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (frame(), r"a pandas DataFrame gives no items by number: write a torch\.utils\.data\.Dataset around it"),
        (pa.table({"x": [1, 2]}), "a pyarrow Table gives no items by number"),
        (pa.record_batch({"x": [1, 2]}), "a pyarrow RecordBatch gives no items by number"),
    ],
    ids=["frame", "table", "record batch"],
)
def test_a_frame_itself_is_refused_in_words(held, words, made):
    for call in (made.fill, made.loader, made.dataset, made.predict):
        with pytest.raises(BatchError, match=words):
            call(held)


# -- keys and targets from frames --------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[OfFrame, int], Any]] = {
    "row": lambda d, index: d.frame.iloc[index],
    "frame of one row": lambda d, index: d.frame.iloc[[index]],
    "NumPy scalar": lambda d, index: d.frame["image"].iloc[index],
    "Arrow scalar": lambda d, index: pa.scalar(int(d.frame["image"].iloc[index])),
    "Arrow array": lambda d, index: pa.array([index, None]),
    "Arrow table": lambda d, index: pa.table({"image": [index]}),
    "moment": lambda d, index: pd.Timestamp("2020-01-01") + pd.Timedelta(index, "ns"),
    "struct": lambda d, index: pa.scalar({"image": index, "name": "a"}),
}


class ByPlace(OfFrame):
    """Items keep nothing but what can be kept: the key is taken from the frame."""

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.from_numpy(self.images[index]), "label": int(Y[index]), "at": index}


@pytest.mark.parametrize("which", KEYS)
def test_what_frames_and_tables_give_may_be_the_users_keys(which, tmp_path):
    dataset = ByPlace(frame(), X.numpy().copy())
    recycling = recycle(
        residual(),
        {"x": X[:2]},
        cut=CUT,
        store=tmp_path / "store",
        key=lambda item: KEYS[which](dataset, item["at"]),
    )
    for batch, plain in zip(
        recycling.loader(dataset, batch_size=5, name="v1"), DataLoader(dataset, batch_size=5), strict=True
    ):
        with torch.no_grad():
            close(recycling.model(batch["x"]), full(recycling, plain["x"]))
    assert len(recycling.source.rows) == N
    assert recycling.stats.hits == N


def test_a_key_of_a_kind_that_has_no_content_is_refused_by_name(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", key=lambda item: frame().groupby("label"))
    with pytest.raises(KeyTypeError, match=r"no key for key\(item\)\[1\], a pandas.*DataFrameGroupBy"):
        recycling.fill([(x, 1) for x in X], name="v1")


@pytest.mark.parametrize("target", [pa.scalar(1), pa.array([1]), pd.Timestamp("2020-01-01"), frame().iloc[0]], ids=str)
def test_targets_that_cannot_be_kept_are_refused_by_place_and_type(target, made):
    def collate(items: Any) -> Any:
        return torch.stack([item[0] for item in items]), [item[1] for item in items]

    name = type(target).__name__
    with pytest.raises(BatchError, match=rf"item\[1\] of the items is of type {name}.*Convert it in the data set"):
        made.fill([(x, target) for x in X], collate_fn=collate)

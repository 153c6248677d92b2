"""Views: each row is what the model computes for that very view, an epoch draws one, and only what is new is computed.

The data sets here give what they made of an object as a target too, so that each recycled batch tells what the model
should have seen.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from small import CUT, SIDE, Counted, bert, pictures, residual, write_pictures
from torchrecycle import (
    BatchError,
    RandomInputError,
    RecycledTensor,
    RecycleWarning,
    Recycling,
    StaleActivationError,
    fill_many,
    recycle,
)
from torchrecycle.data import BlockShuffleSampler, Views, draws
from torchrecycle.data.generators import Generators, mix
from torchrecycle.data.order import ReadAhead
from torchrecycle.data.views import Draws
from torchrecycle.store import FolderStore

N = 12
X = pictures(N)
BYTES = (X * 40 + 128).clamp(0, 255).to(torch.uint8)

forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")


# -- transforms that people use ----------------------------------------------------------------------------------------


def torchvision() -> Callable[[int], torch.Tensor]:
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)]
    )
    return lambda i: transform(X[i].sigmoid())


def albumentations() -> Callable[[int], torch.Tensor]:
    import albumentations as A

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
        transform = A.Compose([A.HorizontalFlip(), A.RandomBrightnessContrast(p=0.8), A.CoarseDropout(p=0.7)])
    return lambda i: (
        torch.from_numpy(transform(image=BYTES[i].permute(1, 2, 0).numpy())["image"] / 255.0)
        .permute(2, 0, 1)
        .float()
        .contiguous()
    )


def drawn_by(draw: Callable[[], float]) -> Callable[[int], torch.Tensor]:
    return lambda i: X[i] * (0.5 + draw())


def with_numpy_held() -> Callable[[int], torch.Tensor]:
    held = np.random.default_rng()
    return lambda i: X[i] + torch.from_numpy(held.normal(size=X[i].shape).astype(np.float32))


def with_older_numpy_held() -> Callable[[int], torch.Tensor]:
    return drawn_by(np.random.RandomState(np.random.SFC64(3)).rand)


def with_torch_held() -> Callable[[int], torch.Tensor]:
    held = torch.Generator()
    return lambda i: X[i] + torch.randn(X[i].shape, generator=held)


def seeded_by_torch() -> Callable[[int], torch.Tensor]:
    """No generator moves, and each seed of torch gives another one."""
    return lambda i: X[i] * float(np.random.default_rng(torch.initial_seed() % 2**63 + i).random())


class Lazy:
    """Makes its generator when it is first needed, as in each worker anew."""

    def __init__(self) -> None:
        self.held: Any = None

    def __call__(self, i: int) -> torch.Tensor:
        if self.held is None:
            self.held = random.Random()
        return X[i] * self.held.random()


TRANSFORMS: dict[str, Callable[[], Callable[[int], torch.Tensor]]] = {
    "torchvision v2": torchvision,
    "albumentations": albumentations,
    "Python's random": lambda: drawn_by(random.random),
    "NumPy's random": lambda: drawn_by(lambda: float(np.random.rand())),
    "torch's random": lambda: drawn_by(lambda: float(torch.rand(()))),
    "a random.Random": lambda: drawn_by(random.Random().random),
    "a NumPy generator": with_numpy_held,
    "an older NumPy generator": with_older_numpy_held,
    "a torch generator": with_torch_held,
    "a generator made at first use": Lazy,
    "a generator seeded by torch": seeded_by_torch,
}


class Seen(Dataset[Any]):
    """Augmented objects, with a copy of each that is kept as a target."""

    def __init__(self, make: Callable[[int], torch.Tensor], count: int = N) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        made = self.make(index)
        return made, made.clone(), index


class Shifted(Dataset[Any]):
    """The same of a class that travels to workers, with a count of what was read."""

    def __init__(self, count: int = N, most: int = 5) -> None:
        self.images, self.most = pictures(count), most
        self.generator = np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        across = int(torch.randint(self.most + 1, ()))
        made = self.images[index].roll(across, -1) * float(self.generator.uniform(0.5, 1.5))
        return made, made.clone(), index


def made(folder: Any, **arguments: Any) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=folder, **arguments)


def full(recycling: Recycling, *args: Any, **kwargs: Any) -> Any:
    with recycling.paused(), torch.no_grad():
        return recycling.model(*args, **kwargs)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def compare(recycling: Recycling, batch: Any) -> None:
    """What the model gives for a recycled batch is what it gives for what was seen at fill."""
    x, seen, _ = batch
    assert isinstance(x, RecycledTensor)
    with torch.no_grad():
        close(recycling.model(x), full(recycling, seen))


def views_in(batches: Any, dataset: Any, views: int) -> list[int]:
    """Which view of its object each item of an epoch is, in the order of the objects."""
    each = [[Views(dataset, views)[view * len(dataset) + i][0] for view in range(views)] for i in range(len(dataset))]
    found: dict[int, int] = {}
    for _, seen, index in batches:
        for i, one in zip(index.tolist(), seen, strict=True):
            assert i not in found
            found[i] = next(view for view in range(views) if torch.equal(each[i][view], one))
    return [found[i] for i in sorted(found)]


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_each_row_is_what_the_model_computes_for_that_very_view(kind, tmp_path):
    dataset = Seen(TRANSFORMS[kind]())
    recycling = made(tmp_path, views=3, verify_every=1)
    loader = recycling.loader(dataset, batch_size=5, shuffle=True)
    assert len(recycling.source.rows) > N
    drawn = []
    for _ in range(2):
        batches = list(loader)
        for batch in batches:
            compare(recycling, batch)
        drawn.append(views_in(batches, dataset, 3))
    assert recycling.stats.hits == 2 * N
    assert drawn[0] != drawn[1]
    assert set(drawn[0] + drawn[1]) == {0, 1, 2}


def test_tokens_that_are_dropped_in_the_data_set_give_other_rows_in_each_view(tmp_path):
    class Dropped(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            ids = torch.arange(9) * 7 + index
            ids[torch.rand(9) < 0.3] = 103
            return {"input_ids": ids, "seen": ids.clone(), "labels": index % 2}

    example = {"input_ids": torch.arange(18).view(2, 9)}
    recycling = recycle(bert(), example, cut="bert.encoder.layer.1", store=tmp_path, views=4)
    for _ in range(2):
        for batch in recycling.loader(Dropped(), batch_size=4, shuffle=True):
            seen = batch.pop("seen")
            with torch.no_grad():
                got = recycling.model(**batch)
            close(got.logits, full(recycling, input_ids=seen).logits)
    assert recycling.stats.hits == 2 * N


def test_files_under_real_transforms_are_kept_in_views(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.ToImage(), v2.RandomCrop(SIDE), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    folder = ImageFolder(write_pictures(tmp_path / "files", side=SIDE + 4), transform)
    recycling = recycle(residual(), torch.zeros(2, 3, SIDE, SIDE), cut=CUT, store=tmp_path / "rows", views=2)
    report = recycling.fill(folder)
    assert (report.objects, report.views) == (24, 2)
    assert 20 <= report.computed <= 24  # two views may be alike by chance
    assert str(report).startswith(f"filled {report.computed} of 24 views of 12 objects")
    views = Views(folder, 2)
    loader = recycling.loader(folder, batch_size=1)
    recycled: Any = loader.dataset
    for number, (x, y) in enumerate(loader):
        place = int((recycled.locations == x.locations).nonzero()[0])
        assert place % 12 == number
        image, label = views[place]
        assert int(y) == label
        with torch.no_grad():
            close(recycling.model(x), full(recycling, torch.as_tensor(image)[None]))


# -- which view comes --------------------------------------------------------------------------------------------------


ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "own generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(2)},
    "sampler": lambda: {"sampler": RandomSampler(range(N), num_samples=7)},
    "drop_last": lambda: {"shuffle": True, "drop_last": True},
}


@pytest.mark.parametrize("order", ORDERS)
def test_batches_come_in_the_order_that_they_have_without_us(order, tmp_path):
    recycling = made(tmp_path, views=3)
    dataset = Shifted()
    torch.manual_seed(4)
    plain = DataLoader(TensorDataset(torch.arange(N)), batch_size=5, **ORDERS[order]())
    want = [[index.tolist() for (index,) in plain] for _ in range(3)]
    state = torch.get_rng_state()
    torch.manual_seed(4)
    loader = recycling.loader(dataset, batch_size=5, **ORDERS[order]())
    torch.manual_seed(4)
    assert [[index.tolist() for _, _, index in loader] for _ in range(3)] == want
    assert torch.equal(torch.get_rng_state(), state)


def test_filling_and_reading_leave_all_generators_as_they_were(tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=2)
    own, state = dataset.generator.bit_generator.state, (random.getstate(), torch.get_rng_state())
    recycling.fill(dataset)
    Views(dataset, 5)[31]
    assert (dataset.generator.bit_generator.state, random.getstate()) == (own, state[0])
    assert torch.equal(torch.get_rng_state(), state[1])


@pytest.mark.parametrize("workers", [0, 1])
@forks
def test_a_seed_gives_the_same_views_again_and_another_one_others(workers, tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=4)

    def epochs(seed: int) -> list[list[int]]:
        loader = recycling.loader(dataset, batch_size=4, shuffle=True, num_workers=workers)
        torch.manual_seed(seed)
        return [views_in(loader, dataset, 4) for _ in range(2)]

    first = epochs(1)
    assert epochs(1) == first
    assert first[0] != first[1]
    assert epochs(2) != first


def test_every_view_is_used_about_equally_often_and_independently_of_the_others():
    torch.manual_seed(0)
    drawing, index = Draws(4000, 4), torch.arange(4000)
    epochs = [drawing.take(index) // 4000 for _ in range(8)]
    counts = torch.stack([torch.bincount(views, minlength=4) for views in epochs])
    assert ((counts - 1000).abs() < 140).all()  # 5 standard deviations
    pairs = torch.bincount(epochs[0] * 4 + epochs[1], minlength=16)
    assert ((pairs - 250).abs() < 80).all()
    each = torch.stack(epochs).T
    assert 3.4 < sum(len(row.unique()) for row in each[:500]) / 500 < 3.8  # 4 * (1 - (3/4)**8) = 3.6


def test_an_object_that_comes_twice_in_a_batch_is_drawn_twice(tmp_path):
    torch.manual_seed(0)
    drawing = Draws(3, 64)
    places = drawing.take(torch.tensor([1, 0, 1, 1, 0]))
    assert (places % 3).tolist() == [1, 0, 1, 1, 0]
    assert len(places.unique()) == 5
    torch.manual_seed(0)
    one_by_one = Draws(3, 64)
    assert [int(one_by_one.take(torch.tensor([i]))) for i in (1, 0, 1, 1, 0)] == places.tolist()
    recycling = made(tmp_path, views=3)
    sampler = WeightedRandomSampler([1.0] * N, num_samples=40)
    for batch in recycling.loader(Shifted(), batch_size=8, sampler=sampler):
        compare(recycling, batch)


def test_ranks_draw_other_views_of_the_same_object(monkeypatch):
    torch.manual_seed(0)
    index = torch.arange(300)
    monkeypatch.setenv("RANK", "0")
    first = Draws(300, 4).take(index)
    monkeypatch.setenv("RANK", "1")
    assert 40 < int((Draws(300, 4).take(index) == first).sum()) < 110  # one of four by chance


def test_seeds_are_the_same_in_every_version():
    """Rows of a store that is filled already are found by them."""
    assert mix(0).tolist() == [16294208416658607535]
    assert mix(1, 17, [0, 1, 2]).tolist() == GOLDEN
    assert mix(2**64 + 5).tolist() == mix(5).tolist()
    held = np.random.default_rng(0), random.Random(0), torch.Generator()
    generators = Generators(held)
    generators.seed(1, 17, 3)
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    drawn += [held[0].random(), held[1].random(), float(torch.rand((), generator=held[2]))]
    assert drawn == pytest.approx(DRAWN, abs=1e-6)


GOLDEN = [2959034258224010568, 9629667614236097755, 13166668593678675677]
DRAWN = [0.88686499, 0.13808154, 0.43415016, 0.43348610, 0.61178326, 0.63213414]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        pytest.param({"num_workers": 2, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
        pytest.param(
            {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda a: " ".join(map(str, a.values())),
)
@forks
def test_workers_draw_other_views_in_each_epoch_and_give_their_rows(arguments, tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=4)
    loader = recycling.loader(dataset, batch_size=5, shuffle=True, **arguments)
    drawn = []
    for _ in range(3):
        batches = list(loader)
        for batch in batches:
            compare(recycling, batch)
        drawn.append(tuple(views_in(batches, dataset, 4)))
    assert len(set(drawn)) == 3
    assert recycling.stats.hits == 3 * N


def test_what_is_read_ahead_is_what_will_be_drawn(tmp_path, monkeypatch):
    recycling = made(tmp_path, views=4)
    loader = recycling.loader(Shifted(), batch_size=4, shuffle=True)
    recycled: Any = loader.dataset
    asked: list[int] = []
    monkeypatch.setattr(
        type(recycling.source.rows), "prefetch", lambda self, locations: asked.extend(locations.tolist())
    )
    assert isinstance(loader._index_sampler, ReadAhead)
    came = [location for x, _, _ in loader for location in x.locations.tolist()]
    assert asked
    assert came[: len(asked)] == asked
    index = torch.arange(N)
    assert recycled.peek(index).tolist() == recycled.peek(index).tolist() == recycled._drawn(index.tolist()).tolist()
    workers = recycling.loader(Shifted(), batch_size=4, shuffle=True, num_workers=1)
    assert not isinstance(workers._index_sampler, ReadAhead)


@pytest.mark.parametrize("workers", [0, 1])
@forks
def test_blocks_give_each_object_once_in_one_of_its_views(workers, tmp_path):
    recycling = made(tmp_path, views=3)
    loader = recycling.loader(Shifted(), batch_size=4, shuffle="blocks", num_workers=workers)
    assert isinstance(loader.sampler, BlockShuffleSampler)
    for _ in range(2):
        batches = list(loader)
        assert sorted(i for _, _, index in batches for i in index.tolist()) == list(range(N))
        for batch in batches:
            compare(recycling, batch)


# -- only what is new --------------------------------------------------------------------------------------------------


def test_of_more_views_only_the_new_ones_are_computed(tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=2)
    first = recycling.fill(dataset)
    assert (first.objects, first.computed) == (2 * N, 2 * N)
    grown = recycling.fill(dataset, views=4)
    assert (grown.objects, grown.found, grown.computed) == (4 * N, 2 * N, 2 * N)
    assert recycling.fill(dataset, views=3).computed == 0
    misses = recycling.stats.misses
    loader = recycling.loader(dataset, batch_size=4, views=4)
    drawn = {view for _ in range(6) for view in views_in(loader, dataset, 4)}
    assert drawn == {0, 1, 2, 3}
    assert recycling.stats.misses == misses


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_views import Seen, Shifted, albumentations, made
dataset = {dataset}
if __name__ == "__main__":
    report = made({store!r}).fill(dataset, views=int(sys.argv[1]))
    print(json.dumps([report.objects, report.found, report.computed]))
"""


@pytest.mark.parametrize("dataset", ["Shifted()", pytest.param("Seen(albumentations())", marks=pytest.mark.slow)])
def test_another_process_finds_the_views_of_the_first_and_computes_the_others(dataset, tmp_path):
    recycling = made(tmp_path / "rows")
    assert recycling.fill(eval(dataset), views=2).computed == 2 * N
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, dataset=dataset, store=str(tmp_path / "rows")), encoding="utf-8")
    ran = subprocess.run([sys.executable, str(script), "3"], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1]) == [3 * N, 2 * N, N]


def test_a_manifest_of_views_serves_the_next_process_under_a_name(tmp_path):
    """A recycling made anew knows nothing but what lies in the folder."""

    class Moved(Counted):
        def __getitem__(self, index: int) -> Any:
            image, _ = super().__getitem__(index)
            return image * random.random(), index

    dataset = Moved([(x, 0) for x in X])
    made(tmp_path).fill(dataset, views=4, name="moved")
    dataset.count()
    later = made(tmp_path)
    for batch, _ in later.loader(dataset, views=4, name="moved", batch_size=4):
        assert isinstance(batch, RecycledTensor)
    assert dataset.count() == 1 + 8  # to find its generators, and to compare some
    assert later.stats.misses == 0
    later.fill(dataset, views=2, name="moved")
    assert dataset.count() > 2 * N


def test_another_index_of_an_object_is_another_seed(tmp_path):
    recycling = made(tmp_path, views=2)
    dataset = Shifted()
    recycling.fill(dataset)
    assert recycling.fill(Subset(dataset, list(range(N)))).computed == 0
    assert recycling.fill(Subset(dataset, list(range(1, N)))).computed > 0


# -- what draws nothing ------------------------------------------------------------------------------------------------


def test_a_data_set_that_draws_nothing_has_one_view(tmp_path):
    recycling = made(tmp_path, views=4)
    still = Counted([(x, x.clone(), i) for i, x in enumerate(X)])
    report = recycling.fill(still)
    assert (report.objects, report.computed, report.views) == (N, N, 1)
    loader = recycling.loader(still, batch_size=5)
    for _ in range(2):
        for batch in loader:
            compare(recycling, batch)
    still.count()
    assert isinstance(recycling.predict(still), torch.Tensor)
    assert still.count() <= 8
    assert (recycling.stats.hits, recycling.stats.misses) == (3 * N, N)


def test_a_kept_manifest_of_a_data_set_that_draws_nothing_serves_however_many_views_are_asked_for(tmp_path):
    still = Counted([(x, i) for i, x in enumerate(X)])
    made(tmp_path).fill(still, name="still")
    still.count()
    for _ in made(tmp_path, views=4).loader(still, name="still", batch_size=4):
        pass
    assert still.count() == 1 + 2 * 8 + 8  # does it draw, and is it what it was?


class Rarely(Dataset[Any]):
    """Draws for one item only, which is none of those that are tried."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        image = X[index % N] + index
        made = image * random.random() if index == 3 else image
        return made, made.clone(), index


def test_what_draws_for_few_items_only_is_kept_in_views_all_the_same(tmp_path):
    recycling = made(tmp_path)
    assert not draws(Rarely())
    with pytest.raises(RandomInputError, match=r"Python's random generator.*\(Rarely.__getitem__\).*views=4"):
        recycling.fill(Rarely(), batch_size=4)
    report = recycling.fill(Rarely(), views=3)
    assert (report.objects, report.computed) == (120, 42)  # 39 objects that are alike in all views, and one in three
    for batch in recycling.loader(Rarely(), batch_size=8, views=3):
        compare(recycling, batch)


# -- refused -----------------------------------------------------------------------------------------------------------


def drawing_function(image: torch.Tensor) -> torch.Tensor:
    return image * float(torch.rand(()))


NAMES = {
    "torchvision v2": "RandomResizedCrop, RandomHorizontalFlip, ColorJitter",
    "albumentations": "HorizontalFlip, RandomBrightnessContrast",
    "Python's random": "<lambda>",
    "a generator made at first use": "Lazy",
}


@pytest.mark.parametrize("kind", NAMES)
def test_without_views_a_random_transform_is_named_with_the_remedy(kind, tmp_path):
    recycling = made(tmp_path)
    dataset = Seen(TRANSFORMS[kind]())
    dataset[0]
    with pytest.raises(RandomInputError) as error:
        recycling.fill(dataset)
    assert NAMES[kind] in str(error.value)
    assert "views=4" in str(error.value)
    assert len(recycling.source.rows) == 0


def test_predict_wants_one_view_of_each_object(tmp_path):
    recycling = made(tmp_path, views=4)
    recycling.fill(Shifted())
    with pytest.raises(RandomInputError, match="torch's generator"):
        recycling.predict(Shifted())


class FromTheSystem(Dataset[Any]):
    def __init__(self) -> None:
        self.generator = random.SystemRandom()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return X[index] * self.generator.random(), index


class Hidden(Dataset[Any]):
    """Its generator is where nobody finds it: in a C function."""

    def __init__(self, *, target: bool = False) -> None:
        self.draw = map(np.random.default_rng(0).random, [1] * 10_000).__next__
        self.target = target

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        drawn = float(self.draw()[0])
        return (X[index], drawn) if self.target else (X[index] * drawn, index)


class Inner:
    """A transform of whose generator Python sees nothing."""

    def __init__(self) -> None:
        self.draw = map(np.random.default_rng(0).random, [1] * 10_000).__next__

    def __call__(self, index: int) -> torch.Tensor:
        return X[index] * float(self.draw()[0])


_UNSEEDED = r"\), gives other model inputs each time it is asked for the same item under the same seed"


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (FromTheSystem(), f"FromTheSystem.__getitem__{_UNSEEDED}"),
        (Hidden(), f"Hidden.__getitem__{_UNSEEDED}"),
        (Seen(Inner()), f"Inner{_UNSEEDED}"),
        (Hidden(target=True), "other targets each time"),
    ],
    ids=["system", "hidden", "hidden in a transform", "targets"],
)
def test_what_nobody_can_seed_is_refused_by_name(dataset, words, tmp_path):
    recycling = made(tmp_path, views=4)
    with pytest.raises(RandomInputError, match=words):
        recycling.fill(dataset)
    assert len(recycling.source.rows) == 0


@pytest.mark.parametrize("transform", [Inner(), Lazy()], ids=["hidden", "made at first use"])
def test_without_views_what_leaves_no_trace_is_named_too(transform, tmp_path):
    with pytest.raises(RandomInputError, match=type(transform).__name__):
        made(tmp_path).fill(Seen(transform))


def collate_with_noise(items: Sequence[Any]) -> Any:
    x, y = default_collate(list(items))
    return x, y + torch.rand(len(y))


@pytest.mark.parametrize("views", [1, 4])
def test_a_collate_function_that_draws_is_refused_and_told_where_to_draw(views, tmp_path):
    recycling = made(tmp_path)
    with pytest.raises(RandomInputError, match=r"collate function collate_with_noise drew from torch's.*__getitem__"):
        recycling.fill(TensorDataset(X, torch.arange(N)), collate_fn=collate_with_noise, views=views)


@pytest.mark.parametrize("views", [0, -1, True, 2.0, "4"])
def test_no_number_of_views_is_refused_wherever_it_is_given(views, tmp_path):
    with pytest.raises(ValueError, match="views="):
        made(tmp_path, views=views)
    recycling = made(tmp_path)
    for call in (recycling.fill, recycling.loader, recycling.dataset):
        with pytest.raises(ValueError, match="views="):
            call(Shifted(), views=views)


def test_cuts_filled_in_one_pass_have_the_same_number_of_views(tmp_path):
    one, other = (
        recycle(residual(), X[:2], cut=cut, store=tmp_path, views=views) for cut, views in (("stages.0", 2), (CUT, 3))
    )
    with pytest.raises(BatchError, match="different views="):
        fill_many([one, other], Shifted())
    reports = fill_many([one, other], Shifted(), views=2)
    assert [report.computed for report in reports] == [2 * N, 2 * N]
    for batch in other.loader(Shifted(), batch_size=4, views=2):
        compare(other, batch)
    assert other.stats.misses == 2 * N


# -- misses ------------------------------------------------------------------------------------------------------------


@contextmanager
def no_room() -> Iterator[None]:
    """Within this context no file can be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def looks(items: Sequence[Any]) -> Any:
    """Does not run on stand-ins."""
    x, seen, index = default_collate(list(items))
    if isinstance(items[0][0], RecycledTensor):
        raise TypeError("no pixels")
    return x, seen, index


@pytest.mark.parametrize("collate_fn", [None, default_collate, looks])
@pytest.mark.parametrize("workers", [0, 1])
@forks
def test_views_without_a_row_are_read_under_their_seed(collate_fn, workers, tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=4, verify_every=1)
    arguments = {"collate_fn": collate_fn}
    recycling.fill(dataset, views=2, **arguments)
    with no_room(), pytest.warns(RecycleWarning, match="filling has ended"):
        assert recycling.fill(dataset, **arguments).missing == 2 * N
    drawn, kinds = [], set()
    loader = recycling.loader(dataset, batch_size=6, num_workers=workers, **arguments)
    for _ in range(2):
        batches = list(loader)
        for x, seen, _ in batches:
            kinds.add(len(x.misses) if isinstance(x, RecycledTensor) else -1)
            with torch.no_grad():
                close(recycling.model(x), full(recycling, seen))
        drawn += views_in(batches, dataset, 4)
    assert set(drawn) == {0, 1, 2, 3}
    assert any(0 < misses < 6 for misses in kinds)


def drop(folder: Path, every: int) -> None:
    for path in sorted(folder.glob("*-*.safetensors"))[::every]:
        path.unlink()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fills_in_its_own_order_has_each_view_at_its_place(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = Shifted()
    recycling = made(tmp_path, views=3, verify_every=1)
    assert recycling.fill(dataset, batch_size=5).computed == 3 * N
    recycled: Any = recycling.dataset(dataset)
    views, manifest = Views(dataset, 3), recycled.manifest
    for place in range(3 * N):
        assert torch.equal(manifest.columns[1][place], views[place][1])
        assert manifest.columns[2][place] == place % N
    for batch in recycling.loader(dataset, batch_size=4, shuffle=True):
        compare(recycling, batch)


@pytest.mark.parametrize("every", [1, 2])
def test_rows_of_views_that_leave_meanwhile_are_computed_under_their_seed(every, tmp_path, monkeypatch):
    monkeypatch.setattr("torchrecycle.store.looking.IN_MEMORY", 0)
    dataset = Shifted()

    def in_small_segments() -> Recycling:
        return made(FolderStore(tmp_path, segment_bytes=4 * 1024), views=2)

    in_small_segments().fill(dataset, batch_size=4)
    recycling = in_small_segments()
    loader = recycling.loader(dataset, batch_size=6)
    drop(tmp_path / recycling.fingerprint, every)
    for x, seen, _ in loader:
        with torch.no_grad():
            close(recycling.model(x), full(recycling, seen))
    assert recycling.stats.misses > 0
    for batch in loader:  # they were made again
        assert not len(batch[0].misses)
        compare(recycling, batch)


def test_the_canary_reads_each_place_under_its_seed_and_sees_a_data_set_that_has_changed(tmp_path):
    dataset = Shifted(most=5)
    recycling = made(tmp_path, views=3, verify_every=1)
    loader = recycling.loader(dataset, batch_size=1)
    for _ in loader:
        pass
    batches = iter(loader)
    next(batches)
    dataset.images = dataset.images + 1
    with pytest.raises(StaleActivationError, match=r"item \d+ in view \d of the data set"):
        for _ in batches:
            pass


# -- targets, changes, pauses ------------------------------------------------------------------------------------------


def boxes_of(items: Sequence[Any]) -> Any:
    images, boxes = zip(*items, strict=True)
    return torch.utils.data.default_collate(list(images)), list(boxes)


class Boxes(Dataset[Any]):
    """A bright square on a dark ground, with its box, or none where it was cropped away: real transforms of both."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        image = torch.zeros(3, SIDE, SIDE)
        image[:, 2:5, index % 8 : index % 8 + 4] = 1.0
        box = torch.tensor([[index % 8, 2, index % 8 + 4, 5]], dtype=torch.float32)
        given = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(SIDE, SIDE)),  # pyright: ignore
            "labels": torch.tensor([index]),
        }
        transform = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomCrop(8), v2.SanitizeBoundingBoxes()]
        )
        made = transform(given)
        return made["image"].as_subclass(torch.Tensor), made["boxes"].as_subclass(torch.Tensor)


def test_targets_that_differ_by_view_come_with_their_own_view(tmp_path):
    dataset = Boxes()
    recycling = recycle(residual(), torch.zeros(2, 3, 8, 8), cut=CUT, store=tmp_path, views=4)
    loader = recycling.loader(dataset, batch_size=4, collate_fn=boxes_of)
    recycled: Any = loader.dataset
    views = Views(dataset, 4)
    found = set()
    for _ in range(3):
        for batch, (x, boxes) in enumerate(loader):
            for row, one in enumerate(boxes):
                places = (recycled.locations == x.locations[row]).nonzero()[:, 0].tolist()
                place = next(place for place in places if place % N == 4 * batch + row)
                image, want = views[place]
                assert torch.equal(one, want)
                # The box bounds what is bright: what the row was computed of.
                bright = image[0].nonzero().flip(1)
                assert len(want) == 0 or torch.equal(want[0, :2], bright.min(0).values.float())
                found.add((place, len(one)))
            want = torch.stack([views[int((recycled.locations == at).nonzero()[0])][0] for at in x.locations])
            with torch.no_grad():
                close(recycling.model(x), full(recycling, want))
    assert {count for _, count in found} == {0, 1}


def test_a_transform_that_is_changed_between_epochs_is_read_anew(tmp_path):
    dataset = Shifted(most=0)
    recycling = made(tmp_path, views=2)
    loader = recycling.loader(dataset, batch_size=4)
    list(loader)
    assert recycling.stats.misses == 2 * N
    dataset.most = 9
    for batch in loader:
        compare(recycling, batch)
    assert recycling.stats.misses > 3 * N
    assert len(set(views_in(loader, dataset, 2))) == 2


def test_augmentation_that_is_switched_off_and_on_changes_the_number_of_views(tmp_path):
    class Switched(Dataset[Any]):
        on = True

        def __init__(self) -> None:
            self.on = True

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            made = X[index] * random.random() if self.on else X[index]
            return made, made.clone(), index

    dataset = Switched()
    recycling = made(tmp_path, views=3)
    loader = recycling.loader(dataset, batch_size=4)
    recycled: Any = loader.dataset
    for on in (True, False, True):
        dataset.on = on
        for batch in loader:
            compare(recycling, batch)
        assert recycled.views == (3 if on else 1)
    assert recycling.stats.misses == 4 * N


def test_while_paused_objects_are_read_as_they_come(tmp_path):
    dataset = Shifted()
    recycling = made(tmp_path, views=2)
    with recycling.paused():
        loader = recycling.loader(dataset, batch_size=N)
        first, second = (next(iter(loader))[1] for _ in range(2))
        assert not torch.equal(first, second)
    assert len(recycling.source.rows) == 0
    x, seen, _ = next(iter(loader))
    assert isinstance(x, RecycledTensor)
    compare(recycling, (x, seen, None))


def test_a_data_set_and_a_collate_function_go_into_any_loader(tmp_path):
    recycling = made(tmp_path, views=3)
    dataset = Shifted()
    recycled = recycling.dataset(dataset)
    loader = DataLoader(recycled, batch_size=5, shuffle=True, collate_fn=recycling.collate())
    drawn = []
    for _ in range(2):
        batches = list(loader)
        for batch in batches:
            compare(recycling, batch)
        drawn.append(views_in(batches, dataset, 3))
    assert drawn[0] != drawn[1]
    assert len(recycled) == N
    assert isinstance(recycled[3][0], RecycledTensor)


def test_keys_of_the_users_tell_views_and_indices_apart(tmp_path):
    class Named(Shifted):
        def __getitem__(self, index: int) -> Any:
            return *super().__getitem__(index)[:2], f"file {index}"

    recycling = made(tmp_path, views=3, key=lambda item: item[2])
    with pytest.raises(BatchError, match="name"):
        recycling.fill(Named())
    assert recycling.fill(Named(), name="shifted v1").computed == 3 * N
    loader = recycling.loader(Named(), name="shifted v1", batch_size=4, shuffle=True)
    for _ in range(2):
        for batch in loader:
            compare(recycling, batch)
    assert recycling.fill(Subset(Named(), list(range(1, N))), name="shifted v1").computed == 3 * (N - 1)


# -- what counts as a change -------------------------------------------------------------------------------------------


NOTEBOOK = """
import torch
from small import CUT, pictures, residual
from torchrecycle import recycle

class Own(torch.utils.data.Dataset):
    def __init__(self): self.images = pictures(12)
    def __len__(self): return len(self.images)
    def __getitem__(self, index): return self.images[index] * torch.rand(()), index

recycling = recycle(residual(), pictures(2), cut=CUT, store="memory://notebook", views=2)
loader = recycling.loader(Own(), batch_size=4)
generation = loader.dataset.generation
for _ in range(2):
    for images, index in loader:
        recycling.model(images)
"""


def test_a_loop_s_variable_with_the_name_of_an_attribute_is_no_part_of_a_data_set():
    """In a script or a notebook, `for images, labels in loader` makes globals, and a data set reads `self.images`."""
    cells: dict[str, Any] = {"__name__": "notebook"}
    exec(NOTEBOOK, cells)
    assert cells["recycling"].stats.hits == 24
    assert cells["loader"].dataset.generation == cells["generation"]


def test_what_the_page_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "augmentation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert names["recycling"].stats.hits == 3 * 24

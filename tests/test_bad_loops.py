"""Loops that are not as they should be: each gets a message with what came, what was expected and the next step."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from small import CUT, labels, pictures, residual
from test_mix import close, full, no_room
from torchrecycle import BatchError, RecycledTensor, RecycleWarning, Recycling, StaleActivationError, recycle

N = 24
X, Y = pictures(N), labels(N)
DATA = TensorDataset(X, Y)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


# -- raw batches by mistake --------------------------------------------------------------------------------------------


def loop(model: nn.Module, loader: Any, epochs: int = 1) -> None:
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            step(model, x, y)


def test_a_loop_that_feeds_raw_batches_works_and_is_told_once_with_the_remedy(made):
    raw = DataLoader(DATA, batch_size=2)
    words = (
        r"10 training batches came with their objects and none with kept rows: nothing is recycled.*'stages\.1' run "
        r"for every batch.*recycling\.loader\(dataset, \.\.\.\).*recycling\.dataset\(dataset\) and recycling\.collate"
    )
    with pytest.warns(RecycleWarning, match=words):
        loop(made.model, raw)
    loop(made.model, raw, 3)  # warnings are errors here: it is said once
    assert made.stats.misses == 4 * N


def test_a_loop_that_forgot_to_take_the_loader_that_it_has_made_is_told(made):
    made.loader(DATA, batch_size=2)
    with pytest.warns(RecycleWarning, match="nothing is recycled"):
        loop(made.model, DataLoader(DATA, batch_size=2))


def test_raw_batches_that_are_meant_are_no_mistake(made):
    raw = DataLoader(DATA, batch_size=1)
    loader = made.loader(DATA, batch_size=12)
    made.model.eval()
    for x, _ in raw:  # an evaluation, with gradients as in adversarial examples
        made.model(x)
    with torch.no_grad():
        made.model.train()
        for x, _ in raw:
            made.model(x)
    made.model.eval()
    made.predict(DATA, batch_size=1)
    for x, y in raw:
        made.check((torch.cat([x, x]), y))
    with made.paused():
        loop(made.model, raw)
    loop(made.model, loader)  # a loop that takes both, as in training with a second, augmented set
    loop(made.model, raw)


def test_raw_batches_of_our_own_loader_whose_store_is_full_are_not_called_a_mistake(made):
    with no_room(), pytest.warns(RecycleWarning, match="filling has ended"):
        made.fill(DATA)
    loop(made.model, made.loader(DATA, batch_size=2))
    assert made.stats.misses == N


# -- collate functions -------------------------------------------------------------------------------------------------


def stacks_in_numpy(items: Any) -> Any:
    return torch.from_numpy(np.stack([x for x, _ in items])), default_collate([y for _, y in items])


def asks_for_numpy(items: Any) -> Any:
    return torch.stack([torch.from_numpy(x.numpy()) for x, _ in items]), default_collate([y for _, y in items])


def fills_a_buffer(items: Any) -> Any:
    batch = torch.empty(len(items), *items[0][0].shape)
    for at, (x, _) in enumerate(items):
        batch[at] = x
    return batch, default_collate([y for _, y in items])


def goes_through_lists(items: Any) -> Any:
    return torch.tensor([x.tolist() for x, _ in items]), default_collate([y for _, y in items])


def clips(items: Any) -> Any:
    return torch.stack([x for x, _ in items]).clamp(-100, 100), default_collate([y for _, y in items])


@pytest.mark.parametrize("collate", [stacks_in_numpy, asks_for_numpy, fills_a_buffer, goes_through_lists, clips])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_collate_function_that_reads_what_is_not_there_is_named(collate, workers, made):
    loader = made.loader(DATA, batch_size=4, collate_fn=collate, num_workers=workers)
    with pytest.raises((BatchError, RuntimeError)) as caught:
        list(loader)
    words = str(caught.value)
    assert (
        f"the collate function {collate.__name__} did not run on items whose model inputs ['x'] are stand-ins" in words
    )
    assert "do this work in the data set's __getitem__" in words
    assert "changes a recycled batch in place" not in words


@pytest.mark.parametrize("collate", [stacks_in_numpy, asks_for_numpy, fills_a_buffer, goes_through_lists, clips])
def test_the_same_collate_functions_are_no_mistake_where_all_is_at_hand(collate, made):
    """With recycling off, and on the stream of objects that no row is known of."""
    loader = DataLoader(DATA, batch_size=4, collate_fn=made.collate(collate))
    with made.paused():
        for (x, _), (want, _) in zip(made.loader(DATA, batch_size=4), DataLoader(DATA, batch_size=4), strict=True):
            assert torch.equal(x, want)
    for (x, _), (want, _) in zip(loader, DataLoader(DATA, batch_size=4), strict=True):
        close(made.model(x), full(made, want))


def halves(items: Any) -> Any:
    return torch.stack([x for x, _ in items]).half(), default_collate([y for _, y in items])


def scales(items: Any) -> Any:
    return torch.stack([x for x, _ in items]) / 2, default_collate([y for _, y in items])


def normalises_over_the_batch(items: Any) -> Any:
    batch = torch.stack([x for x, _ in items])
    return batch - batch.mean(), default_collate([y for _, y in items])


@pytest.mark.parametrize("collate", [halves, scales, normalises_over_the_batch])
def test_a_collate_function_that_computes_the_input_is_named_before_anything_is_kept(collate, made):
    with pytest.raises(BatchError, match=f"{collate.__name__} computes the model input 'x'.*__getitem__"):
        made.loader(DATA, batch_size=4, collate_fn=collate)
    assert len(made.source.rows) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x / 255,
        lambda x: x.half() * 1,
        lambda x: x.mean(),
        lambda x: x.flip(3),
        lambda x: x[:, :, 2:],
        lambda x: torch.where(x > 0, x, 0),
        lambda x: x + torch.randn(x.shape),
        lambda x: x.numpy(),
        lambda x: x.view(len(x), -1),
        lambda x: nn.functional.interpolate(x, scale_factor=2.0),
    ],
    ids=range(10),
)
def test_a_loop_that_computes_with_a_recycled_batch_is_refused_with_the_way_out(change, made):
    x, _ = next(iter(made.loader(DATA, batch_size=4)))
    with pytest.raises(BatchError) as caught:
        change(x)
    words = str(caught.value)
    assert "reads the values of a batch input that was not loaded" in words
    assert "holds the kept rows of 4 objects" in words
    assert "do it in the data set" in words
    assert "recycling.paused()" in words


def test_a_cast_of_the_input_leaves_each_object_its_row(made):
    """`.float()` of a batch of floats, `.to(dtype)`, `.contiguous()`: what loops do in passing."""
    x, _ = next(iter(made.loader(DATA, batch_size=4)))
    for same in (x.float(), x.contiguous(), x.clone(), x.to("cpu"), x.to(memory_format=torch.channels_last)):
        close(made.model(same), full(made, X[:4]))


CASTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "to a mask and back": lambda x: x.bool().float(),
    "truncated": lambda x: x.long().float(),
    "truncated, in pieces": lambda x: torch.cat([part.int().float() for part in x.split(2)]),
    "whole numbers": lambda x: x.to(torch.int16),
    "eight bits and back": lambda x: x.to(torch.float8_e4m3fn).float(),
    "truncated, then sliced": lambda x: x.long()[:3].double(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("came", ["rows", "objects"])
def test_a_cast_that_makes_another_input_is_refused(cast, came, made, monkeypatch):
    """The kept rows know nothing of it: they would be served for `x.bool()` as they are for `x`."""
    if came == "objects":  # none of them has a row, so that they came along
        made._take_stream(None, None)
        x, _ = next(iter(DataLoader(DATA, batch_size=4, collate_fn=made.collate())))
        assert len(x.misses) == 4
    else:
        x, _ = next(iter(made.loader(DATA, batch_size=4)))
    assert isinstance(x, RecycledTensor)
    with pytest.raises(BatchError, match=r"'x' was cast from torch.float32 to torch.\w+ between.*Cast in the data set"):
        made.model(CASTS[cast](x))


def test_what_is_read_of_a_cast_batch_is_what_the_casts_make_of_it(made):
    made._take_stream(None, None)
    x, _ = next(iter(DataLoader(DATA, batch_size=4, collate_fn=made.collate())))
    assert torch.equal(x.long().float() + 0, X[:4].long().float())


@pytest.mark.parametrize(
    ("example", "items"),
    [(X, (X * 10).long()), (X, (X * 10).to(torch.uint8)), ((X * 10).to(torch.uint8), X)],
    ids=range(3),
)
def test_a_data_set_of_another_kind_of_numbers_than_the_example_is_refused(example, items, tmp_path):
    """A loop that says `images.float()`, with an example as the loop has it: the frozen layers get no such images."""

    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x if x.is_floating_point() else x.float() / 255)

    recycling = recycle(Converts().eval(), example[:2], cut=f"inner.{CUT}", store=tmp_path / "store")
    with pytest.raises(
        BatchError, match=r"'x' is torch.\w+ in a batch of the data set, and torch.\w+ in the example.*do"
    ):
        recycling.fill(TensorDataset(items, Y))
    assert len(recycling.source.rows) == 0


# -- samplers over another data set ------------------------------------------------------------------------------------

OTHER = TensorDataset(pictures(N, 5), labels(N))
LONGER = TensorDataset(pictures(30, 5), labels(30))


class Wrapped(Dataset[Any]):
    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        return self.base[index]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"sampler": RandomSampler(LONGER)},
            "RandomSampler draws from a TensorDataset of 30 items.*TensorDataset, has 24",
        ),
        ({"sampler": DistributedSampler(LONGER, 2, 0)}, "DistributedSampler draws from a TensorDataset of 30 items"),
        (
            {"batch_sampler": BatchSampler(RandomSampler(LONGER), 4, False)},
            "RandomSampler draws from a TensorDataset of 30",
        ),
        ({"sampler": RandomSampler(range(30))}, "RandomSampler draws from a range of 30 items.*TensorDataset, has 24"),
        ({"sampler": SequentialSampler([0] * 25)}, "SequentialSampler draws from a list of 25 items"),
        ({"sampler": WeightedRandomSampler([1.0] * 30, 10)}, "has 30 weights, and the data set has 24 items"),
        ({"sampler": SubsetRandomSampler([0, 5, 24])}, "has the index 24, and the data set has 24 items"),
        ({"sampler": SubsetRandomSampler(np.array([0, 29]))}, "has the index 29"),
    ],
    ids=range(8),
)
def test_a_sampler_that_counts_further_than_the_data_set_goes_is_refused_before_filling(arguments, words, made):
    with pytest.raises(BatchError, match=words):
        made.loader(DATA, **arguments)
    assert len(made.source.rows) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": RandomSampler(OTHER), "batch_size": 4},
        {"sampler": DistributedSampler(OTHER, 2, 0), "batch_size": 4},
        {"sampler": SequentialSampler(Subset(OTHER, range(9)))},
        {"batch_sampler": BatchSampler(RandomSampler(OTHER), 4, False)},
    ],
    ids=range(4),
)
def test_a_sampler_over_another_data_set_is_told_and_gives_the_plain_batches(arguments, made):
    with pytest.warns(
        RecycleWarning, match=r"was made over another data set, a \w+ of \d+ items.*make the sampler over it"
    ):
        loader = made.loader(DATA, **arguments)
    torch.manual_seed(3)
    plain = list(DataLoader(DATA, **arguments))
    torch.manual_seed(3)
    for (x, y), (want, other) in zip(loader, plain, strict=True):
        assert torch.equal(y, other)
        close(made.model(x), full(made, want))


def test_samplers_over_what_the_data_set_is_made_of_are_no_mistake(made):
    wrapped = Wrapped(Wrapped(DATA))
    for sampler in (
        RandomSampler(DATA),
        RandomSampler(range(10)),
        RandomSampler([0] * N),
        WeightedRandomSampler([1.0] * N + [0.0] * 6, 10),
        SubsetRandomSampler([0, N - 1]),
        DistributedSampler(wrapped, 2, 1),
        RandomSampler(made.dataset(wrapped)),
    ):
        assert list(made.loader(wrapped, sampler=sampler))


@pytest.mark.parametrize("late", [False, True])
def test_a_number_that_no_item_has_is_an_error_where_the_sampler_does_not_tell(late, made):
    """Also where rows are read ahead, for a sampler of torch's own over what is longer by now."""
    numbers = list(range(N))
    loader = made.loader(DATA, sampler=SequentialSampler(numbers) if late else [0, 1, 24], batch_size=4)
    numbers += range(6)
    with pytest.raises(
        IndexError, match="item 24 was asked of a data set of 24: the sampler counts the items of another"
    ):
        list(loader)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ((3, 5), r"\(3, 5\), a tuple"),
        (1.7, "1.7, a float"),
        (np.float32(2), "a float32"),
        ("3", "'3', a str"),
        (torch.tensor([1, 2]), "a Tensor"),
        ([1, 2], r"\[1, 2\], a list"),
        (np.array([True, False]), "a ndarray"),
        (None, "a NoneType"),
    ],
    ids=range(8),
)
def test_what_is_no_number_of_an_item_is_refused_and_gives_no_other_item(index, words, made):
    """NumPy would make two items of a pair (multi-scale samplers give index and size), and item 1 of 1.7."""
    dataset = made.dataset(DATA)
    for batches in ([[index]], [[0, index]]):
        with pytest.raises(BatchError, match=f"the sampler gives .*{words}, where the number of an item was expected"):
            list(made.loader(DATA, batch_sampler=batches))
    with pytest.raises(BatchError, match="the number of an item was expected"):
        dataset[index]


def test_numbers_of_any_integer_type_are_numbers_of_items(made):
    batches = [[np.int32(3), torch.tensor(5), -1, np.uint8(2)], torch.tensor([1, 0]), np.array([4]), range(2)]
    found = [y.tolist() for _, y in made.loader(TensorDataset(X, torch.arange(N)), batch_sampler=batches)]
    assert found == [[3, 5, N - 1, 2], [1, 0], [4], [0, 1]]


# -- transforms that change between epochs -----------------------------------------------------------------------------


class Scaled(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.transform(X[index]), int(Y[index])


class Scale:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def replace(dataset: Scaled) -> None:
    dataset.transform = Scale(2.0)


def set_attribute(dataset: Scaled) -> None:
    dataset.transform.by = 2.0


def swap_class(dataset: Scaled) -> None:
    dataset.transform = lambda x: x * 2.0


@pytest.mark.parametrize("change", [replace, set_attribute, swap_class])
@pytest.mark.parametrize(
    "workers",
    [{}, pytest.param({"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}, id="workers")],
)
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
def test_a_transform_that_changes_between_epochs_is_read_anew(change, workers, made):
    dataset = Scaled(Scale(1.0))
    loader = made.loader(dataset, batch_size=6, **workers)
    for scale in (1.0, 2.0, 2.0):
        for at, (x, _) in enumerate(loader):
            assert isinstance(x, RecycledTensor)
            with torch.no_grad():
                close(made.model(x), full(made, scale * X[6 * at : 6 * at + 6]))
        change(dataset)
    assert made.stats.misses == 2 * N


def test_a_transform_that_changes_within_an_epoch_is_seen_at_the_next(made):
    """The rows of this epoch are those of the objects as they were when it began, as batches read ahead would be."""
    dataset = Scaled(Scale(1.0))
    loader = made.loader(dataset, batch_size=6)
    for at, (x, _) in enumerate(loader):
        dataset.transform.by = 2.0
        with torch.no_grad():
            close(made.model(x), full(made, X[6 * at : 6 * at + 6]))
    with torch.no_grad():
        close(made.model(next(iter(loader))[0]), full(made, 2 * X[:6]))


# -- optimisers made before attaching ----------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "Adam, capturable": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
}


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, to_none: bool = True) -> None:
    for x, y in batches:

        def closure(x: Any = x, y: Any = y) -> float:
            optimizer.zero_grad(set_to_none=to_none)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.item()

        optimizer.step(closure)


def prefix_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(("stem", "stages.0", "stages.1"))
    }


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_made_before_attaching_leaves_the_prefix_alone_and_trains_the_rest(name, tmp_path):
    model = residual().train()
    optimizer = OPTIMISERS[name](model.parameters())
    raw = list(DataLoader(DATA, batch_size=8))
    take_steps(model, optimizer, raw)  # so that it holds momentum of the prefix, and gradients
    assert any(p.grad is not None and p.grad.any() for p in model.stem.parameters())
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    before, head = prefix_of(model), model.head.weight.detach().clone()
    loader = recycling.loader(DATA, batch_size=8)
    from_checkpoint = OPTIMISERS[name](model.parameters())
    from_checkpoint.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, from_checkpoint):
        for to_none in (False, True):
            take_steps(model.train(), one, loader, to_none)
            take_steps(model.train(), one, raw, to_none)
    for parameter, want in prefix_of(model).items():
        assert torch.equal(want, before[parameter]), parameter
    assert not torch.equal(model.head.weight, head)
    assert recycling.stats.hits == 4 * N
    recycling.detach()
    take_steps(model.train(), optimizer, raw)  # and after detaching it trains all of it again
    assert not torch.equal(model.stem.weight, before["stem.weight"])


def test_an_optimiser_whose_history_moves_the_prefix_is_found_out_and_one_made_after_is_not(tmp_path):
    """LBFGS steps along directions that it remembers, whatever the gradient is now."""
    model = residual().train()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    take_steps(model, optimizer, DataLoader(DATA, batch_size=8))
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    loader = recycling.loader(DATA, batch_size=8)
    with pytest.raises(StaleActivationError, match=r"\(LBFGS\), make it again over recycling.parameters\(\)"):
        take_steps(model, optimizer, loader)
    before = prefix_of(model)
    take_steps(model, torch.optim.LBFGS(recycling.parameters(), lr=0.1, max_iter=2), loader)
    assert all(torch.equal(want, before[name]) for name, want in prefix_of(model).items())


def test_an_optimiser_that_moves_the_prefix_after_all_is_found_out_at_once(made):
    """One that takes gradients of its own making: the next forward says what has moved, and the next epoch is right."""
    loader = made.loader(DATA, batch_size=8)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    batches = iter(loader)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(
        StaleActivationError, match=r"the frozen prefix has moved: 'stem\.weight' and \d+ more.*fills anew"
    ):
        made.model(next(batches)[0])
    for (x, _), (want, _) in zip(loader, DataLoader(DATA, batch_size=8), strict=True):
        with torch.no_grad():
            close(made.model(x), full(made, want))


# -- never the row of another ------------------------------------------------------------------------------------------


def swaps(items: Any) -> Any:
    return default_collate(list(items)[::-1])


def doubles(items: Any) -> Any:
    return default_collate([item for item in items for _ in range(2)])


def drops(items: Any) -> Any:
    return default_collate(list(items)[1:])


def pairs_up(items: Any) -> Any:
    return torch.stack([items[0][0]] * len(items)), default_collate([y for _, y in items])


@pytest.mark.parametrize("collate", [swaps, doubles, drops])
def test_a_collate_function_that_orders_objects_anew_gives_each_its_own_row(collate, made):
    try:
        loader = made.loader(DATA, batch_size=4, collate_fn=collate)
    except BatchError as refused:
        assert re.search("must count the objects of the batch|computes the model input", str(refused))  # noqa: PT017
        return
    for (x, y), (want, other) in zip(loader, DataLoader(DATA, batch_size=4, collate_fn=collate), strict=True):
        assert torch.equal(y, other)
        with torch.no_grad():
            close(made.model(x), full(made, want))


def test_a_collate_function_that_gives_one_object_for_all_is_refused_or_right(made):
    try:
        loader = made.loader(DATA, batch_size=4, collate_fn=pairs_up)
        got = [made.model(x) for x, _ in loader]
    except BatchError:
        return
    for output, (want, _) in zip(got, DataLoader(DATA, batch_size=4, collate_fn=pairs_up), strict=True):
        close(output, full(made, want))


def test_warnings_are_not_said_for_what_is_right(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(made.model, made.loader(DATA, batch_size=1, shuffle=True), 2)

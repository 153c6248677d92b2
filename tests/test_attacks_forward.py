"""Forwards written to break the bypass: whatever they do, what comes out is what the plain model gives, or a refusal.

Each model is cut, filled and run on rows and on objects, in eval and in training mode, in batches of three sizes. A
`RecycleError` at any point is allowed; another output than the plain model's is not, and neither is any other error.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from torchrecycle import CutError, RecycleError, recycle

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
STASH: dict[str, Any] = {}


class Attack(nn.Module):
    """Four layers, cut after the second."""

    in_eval_mode = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three, self.four = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class StashesInAGlobal(Attack):
    def forward(self, x):
        STASH["one"] = self.one(x)
        y = self.three(self.two(STASH["one"]))
        return self.four(y + STASH["one"])


class _Leaves(nn.Linear):
    def forward(self, x):  # pyright: ignore
        STASH["left"] = super().forward(x)
        return STASH["left"]


class LayerStashesInAGlobal(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.one = _Leaves(6, 6)

    def forward(self, x):
        return self.four(self.three(self.two(self.one(x))) + STASH["left"])


class LayerCountsItsCalls(Attack):
    """An attribute that moves with each call, read by a later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.four(self.three(self.two(self.one(x))))


class BranchesOnTraining(Attack):
    def forward(self, x):
        y = self.two(self.one(x))
        return self.four(self.three(y) if self.training else y)


class BranchesOnTrainingBeforeTheCut(Attack):
    """What the plain model with a prefix in eval mode gives is what it gives in eval mode."""

    in_eval_mode = True

    def forward(self, x):
        y = self.one(x) if self.training else self.one(x * 2)
        return self.four(self.three(self.two(y)))


class BranchesOnTheBatch(Attack):
    def forward(self, x):
        y = self.one(x) if len(x) > 4 else self.one(x).relu()
        return self.four(self.three(self.two(y)))


class LayersByTheBatch(Attack):
    def forward(self, x):
        y = self.two(self.one(x)) if len(x) > 4 else self.two(x)
        return self.four(self.three(y))


class BranchesOnTheBatchAfterTheCut(Attack):
    def forward(self, x):
        y = self.two(self.one(x))
        return self.four(self.three(y)) if len(y) > 4 else self.four(y)


class BranchesOnTheValue(Attack):
    def forward(self, x):
        y = self.one(x)
        return self.four(self.three(self.two(y if bool(y.sum() > 0) else -y)))


class BranchesOnTheKeptValue(Attack):
    def forward(self, x):
        y = self.two(self.one(x))
        return self.four(self.three(y if bool(y[0, 0] > 0) else -y))


class ByGenerator(Attack):
    def _layers(self) -> Iterator[nn.Module]:
        yield from (self.one, self.two, self.three, self.four)

    def forward(self, x):
        for layer in self._layers():
            x = layer(x)
        return x


class MadeLazily(Attack):
    """A layer that is made at the first call, and one that takes its width from it."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.LazyLinear(6)
        self.made: nn.Module | None = None

    def forward(self, x):
        y = self.two(self.one(x))
        if self.made is None:
            torch.manual_seed(1)
            self.made = nn.Linear(y.shape[-1], 6)
        return self.four(self.three(self.made(y)))


class MadeLazilyBeforeTheCut(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.made: nn.Module | None = None

    def forward(self, x):
        if self.made is None:
            torch.manual_seed(1)
            self.made = nn.Linear(6, 6)
        return self.four(self.three(self.two(self.made(self.one(x)))))


class MadeEachTime(Attack):
    def forward(self, x):
        layer = nn.Linear(6, 6)
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.bias.zero_()
        return self.four(self.three(self.two(layer(self.one(x)))))


class _Same(nn.Module):
    def forward(self, x):
        return x


class _View(nn.Module):
    def forward(self, x):
        return x.view(len(x), 2, 3)[:, :, 1:]


class ReturnsItsInput(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.two = _Same()  # pyright: ignore

    def forward(self, x):
        y = self.two(x)
        y = y.mul(2)
        return self.four(self.three(y) + x)


class ReturnsItsInputAndItIsWritten(ReturnsItsInput):
    def forward(self, x):
        x = x.clone()
        y = self.two(x)
        x += 1  # the cut's output is this very tensor
        return self.four(self.three(y))


class ReturnsAViewThatIsWrittenLater(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.two = _View()  # pyright: ignore
        self.three = nn.Linear(2, 6)

    def forward(self, x):
        y = self.one(x)
        z = self.two(y)
        y.zero_()
        return self.four(self.three(z).sum(1))


class WritesTheCut(Attack):
    def forward(self, x):
        y = self.two(self.one(x))
        z = self.three(y)
        y.add_(z)
        return self.four(y)


class ReadsTheRawInputAgain(Attack):
    def forward(self, x):
        return self.four(self.three(self.two(self.one(x))) + x.flip(-1) * x.mean())


class ReadsTheClock(Attack):
    def forward(self, x):
        y = self.two(self.one(x if time.perf_counter_ns() % 2 else -x))
        return self.four(self.three(y))


class SwallowsErrors(Attack):
    def forward(self, x):
        y = self.one(x)
        try:
            y = y * float(y.detach().abs().max())
        except Exception:
            y = y * 0
        return self.four(self.three(self.two(y)))


class ThroughNumpy(Attack):
    def forward(self, x):
        y = self.one(x)
        y = y + torch.from_numpy(y.detach().numpy().copy())
        return self.four(self.three(self.two(y)))


class SortsAndPicks(Attack):
    def forward(self, x):
        y = self.one(x)
        order = y.detach().sum(1).argsort()
        return self.four(self.three(self.two(y[order])))[order.argsort()]


STEADY = [
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, Attack) and kind not in (Attack, ReadsTheClock)
]


def _made(kind: Callable[[], nn.Module]) -> nn.Module:
    model = kind().eval()
    model(X)  # whatever is made at the first call is there
    return model


def _in_words(error: RecycleError) -> str:
    assert len(str(error)) > 40
    return "refused"


def _outcomes(model: nn.Module, plain: nn.Module, given: Any, count: int) -> str:
    """Compare one call with the plain model's; a refusal is fine."""
    try:
        got = model(given)
    except RecycleError as error:
        return _in_words(error)
    assert torch.allclose(got, plain(X[:count].clone()), atol=1e-5), "another output than the plain model's"
    return "right"


@pytest.mark.parametrize("kind", STEADY, ids=lambda kind: kind.__name__)
def test_what_comes_out_is_right_or_refused(kind):
    model = _made(kind)
    plain = copy.deepcopy(model)
    try:
        recycling = recycle(model, X[:2], cut="two", store="memory://", verify_every=1)
    except RecycleError as error:
        _in_words(error)
        return
    seen = set()
    with recycling:
        for count in (8, 3, 5):
            for training in (False, True, False):
                model.train(training)
                plain.train(training and not model.in_eval_mode)
                try:
                    (batch,) = recycling.loader(list(X[:count]), batch_size=count)
                except RecycleError:
                    continue
                seen.add(_outcomes(model, plain, batch, count))
                seen.add(_outcomes(model, plain, X[:count].clone(), count))
    assert seen
    model.eval()
    plain.eval()
    assert torch.equal(model(X), plain(X))


def test_a_forward_that_reads_the_clock_before_the_cut_is_refused():
    def attached() -> None:
        for _ in range(20):  # by chance the clock may stand well once
            recycle(_made(ReadsTheClock), X[:2], cut="two", store="memory://").detach()

    with pytest.raises(CutError, match=r"other values each time|differs|depends"):
        attached()


def test_which_of_them_work_and_which_are_refused_at_attach():
    refused = set()
    for kind in STEADY:
        try:
            recycle(_made(kind), X[:2], cut="two", store="memory://").detach()
        except RecycleError:
            refused.add(kind.__name__)
    works = {kind.__name__ for kind in STEADY} - refused
    assert {"ByGenerator", "MadeLazily", "ReadsTheRawInputAgain", "WritesTheCut", "BranchesOnTraining"} <= works
    assert "LayerStashesInAGlobal" in refused
    assert "SortsAndPicks" in refused


def test_threads_with_two_recycled_models_and_with_one_get_their_own_results():
    models = [_made(ByGenerator), _made(ReadsTheRawInputAgain)]
    want = [model(X) for model in models]
    recyclings = [recycle(model, X[:2], cut="two", store="memory://") for model in models]
    batches = [next(iter(recycling.loader(list(X), batch_size=8))) for recycling in recyclings]
    wrong: list[str] = []

    def use(which: int, given: Any) -> None:
        for _ in range(100):
            if not torch.allclose(models[which](given), want[which], atol=1e-5):
                wrong.append(f"model {which}")

    work = [(0, batches[0]), (1, batches[1]), (0, X), (0, batches[0])]
    threads = [threading.Thread(target=use, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recyclings[0].stats.hits == 1600

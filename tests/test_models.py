"""Recycled against a prefix frozen by hand, to the bit, on real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import nn

from small_models import SAMPLES, Sample
from torchrecycle import RecycleWarning, recycle

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05),
}
LABELS = torch.arange(8) % 5


def _first_two(batch: Any) -> Any:
    return {name: part[:2] for name, part in batch.items()} if isinstance(batch, dict) else batch[:2]


def _train(
    sample: Sample, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: Any = None
) -> list[str]:
    """Digests of the outputs and of the gradients of each step."""
    torch.manual_seed(11)
    seen = []
    for _ in range(steps):
        logits = sample.call(model, batch)
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS).backward()
        seen.append(_digest(logits))
        seen += [_digest(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return seen


def _digest(tensor: torch.Tensor) -> str:
    return blake3(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    different = [n for n, t in ours.state_dict().items() if not torch.equal(t, theirs.state_dict()[n])]
    assert not different


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_from_raw_batches_equal_a_prefix_frozen_by_hand_to_the_bit(sample: Sample, kind: str):
    by_hand, model = sample.model(), sample.model()
    by_hand.train()
    sample.freeze_by_hand(by_hand)
    want = _train(sample, by_hand, OPTIMIZERS[kind](p for p in by_hand.parameters() if p.requires_grad), 20)
    with recycle(model.train(), _first_two(sample.batch), cut=sample.cut, store="memory://") as recycling:
        got = _train(sample, model, OPTIMIZERS[kind](recycling.parameters()), 20)
    assert got == want
    _assert_same_weights(model, by_hand)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_twenty_steps_from_kept_rows_equal_a_prefix_frozen_by_hand_to_the_bit_and_the_prefix_does_not_run(
    sample: Sample,
):
    by_hand, model = sample.model(), sample.model()
    by_hand.train()
    sample.freeze_by_hand(by_hand)
    want = _train(sample, by_hand, OPTIMIZERS["adamw"](p for p in by_hand.parameters() if p.requires_grad), 20)
    items = [
        {n: t[i] for n, t in sample.batch.items()} if isinstance(sample.batch, dict) else sample.batch[i]
        for i in range(8)
    ]
    with recycle(model.train(), _first_two(sample.batch), cut=sample.cut, store="memory://") as recycling:
        loader = recycling.loader(items, batch_size=8)
        (batch,) = list(loader)
        _train(
            sample, model.eval(), torch.optim.SGD([next(recycling.parameters())], 0.0), 1, batch
        )  # proves the signature
        _train(sample, model.train(), torch.optim.SGD([next(recycling.parameters())], 0.0), 1, batch)
        model.load_state_dict(sample.model().state_dict())
        model.zero_grad()
        called: list[str] = []
        handle = model.get_submodule(sample.leaf).register_forward_pre_hook(lambda *_: called.append(sample.leaf))
        with pytest.warns(RecycleWarning, match="does not fire"):
            recycling.renew(loader.dataset)  # a new hook is tried once, on the example: it might change the rows
        called.clear()
        got = _train(sample, model, OPTIMIZERS["adamw"](recycling.parameters()), 20, batch)
        assert not called
        with torch.no_grad():
            sample.call(model.eval())
        assert called == [sample.leaf]  # so it would have been seen
        handle.remove()
    assert recycling.stats.hits >= 160
    assert got == want
    _assert_same_weights(model, by_hand)

"""Unmodified training loops on recycled batches give what they give with the prefix frozen by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import CUT, bert, labels, pictures, residual, texts, tokenizer
from torchrecycle import RecycledTensor, recycle

X, Y = pictures(24), labels(24)
N = 20


def frozen(model: nn.Module, prefix: tuple[str, ...]) -> nn.Module:
    """The reference: the prefix frozen by hand, in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))
    return model


def train(model: nn.Module, batches: Any, parameters: Any, epochs: int, settle: Any = lambda: None) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            model.train()
            settle()
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["loader", "dataset and collate"])
def test_a_plain_loop_gives_the_losses_and_weights_of_the_frozen_reference(how, tmp_path):
    model = residual()
    reference = frozen(copy.deepcopy(model), ("stem", "stages.0", "stages.1"))
    data = TensorDataset(X, Y)
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    recycling.fill(data, batch_size=8)
    if how == "loader":
        batches: Any = recycling.loader(data, batch_size=8, shuffle=True)
    else:
        batches = DataLoader(
            recycling.dataset(data), batch_size=8, shuffle=True, collate_fn=recycling.collate(), num_workers=1
        )
    torch.manual_seed(4)
    got = train(model, batches, recycling.parameters(), 3)

    def settle() -> None:
        for part in (reference.stem, reference.stages[0], reference.stages[1]):
            part.eval()

    torch.manual_seed(4)
    plain = DataLoader(data, batch_size=8, shuffle=True)
    want = train(reference, plain, [p for p in reference.parameters() if p.requires_grad], 3, settle)
    assert got == pytest.approx(want, rel=1e-4)
    recycling.detach()
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def text() -> Any:
    import datasets
    from transformers import DataCollatorWithPadding

    tokens = tokenizer()
    dataset = datasets.Dataset.from_dict({**tokens(texts(N)), "labels": [i % 2 for i in range(N)]})
    return dataset, DataCollatorWithPadding(tokens)


def test_a_data_set_and_a_collate_go_into_any_loader(text, tmp_path):
    dataset, collate = text
    example = dict(collate([{k: v for k, v in dataset[i].items() if k != "labels"} for i in (0, 5)]))
    recycling = recycle(bert(), example, level=0.5, store=tmp_path / "store")
    loader = DataLoader(
        recycling.dataset(dataset, collate_fn=collate),
        batch_size=6,
        sampler=list(range(N - 1, -1, -1)),
        collate_fn=recycling.collate(collate),
    )
    plain = DataLoader(dataset, batch_size=6, sampler=list(range(N - 1, -1, -1)), collate_fn=collate)
    for a, b in zip(plain, loader, strict=True):
        assert isinstance(b["input_ids"], RecycledTensor)
        assert torch.equal(a["labels"], b["labels"])
        with torch.no_grad():
            got = recycling.model(**b).logits
            with recycling.paused():
                want = recycling.model(**a).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

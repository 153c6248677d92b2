"""Started by torchrun: two ranks of Accelerate train a recycled BERT on texts of any length.

``torchrun --nproc-per-node 2 accelerated.py FOLDER``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from small import bert
from torchrecycle import recycle

CUT = "bert.encoder.layer.1"
PREFIX = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")
TEXTS, BATCH = 24, 4


def texts(count: int = TEXTS) -> list[dict[str, Any]]:
    """Ids of 3 to 9 tokens."""
    numbers = torch.Generator().manual_seed(5)
    return [
        {"input_ids": torch.randint(5, 30_000, (3 + 5 * n % 7,), generator=numbers), "labels": n % 2}
        for n in range(count)
    ]


def padded(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As long as the longest."""
    ids = [item["input_ids"] for item in items]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def all_as_long(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Ten tokens, so that batches can be joined."""
    batch = padded([{"input_ids": torch.ones(10, dtype=torch.int64), "labels": 0}, *items])
    return {name: tensor[1:] for name, tensor in batch.items()}


def example() -> dict[str, torch.Tensor]:
    batch = padded(texts(3)[1:])
    del batch["labels"]
    return batch


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def shuffled(size: int, **loader: Any) -> dict[str, Any]:
    return {"batch_size": size, "shuffle": True, "generator": torch.Generator().manual_seed(3), "collate_fn": padded}


def trained_alone(*, shuffle: bool = True, accumulate: int = 1) -> dict[str, torch.Tensor]:
    """What one process makes of batches as large as those of both ranks."""
    model = bert()
    for name in PREFIX:
        model.get_submodule(name).requires_grad_(False)
    arguments = {**shuffled(2 * BATCH), "shuffle": shuffle}
    optimizer, loader = optimizer_of(model), DataLoader(texts(), **arguments)  # pyright: ignore
    for _ in range(2):
        for number, batch in enumerate(loader):
            (model.train()(**batch).loss / accumulate).backward()
            if (number + 1) % accumulate == 0 or number + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
    return model.state_dict()


def predicted_alone(count: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([bert()(**padded([item])).logits for item in texts(count)])


# -- what ranks do -----------------------------------------------------------------------------------------------------


def epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model.train()(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


def fresh(**options: Any) -> Any:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accumulate = options.pop("gradient_accumulation_steps", 1)
    return Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=DataLoaderConfiguration(**options)
    )


def trained(folder: Path, *, size: int = BATCH, **options: Any) -> dict[str, Any]:
    accelerator = fresh(**options)
    model = bert()
    with recycle(model, example(), cut=CUT, store=folder) as recycling:
        loader = recycling.loader(texts(), **shuffled(size))
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        for _ in range(2):
            epoch(accelerator, wrapped, optimizer, loader)
        hits, misses = recycling.stats.hits, recycling.stats.misses
    kind = type(wrapped).__name__
    return {"weights": accelerator.get_state_dict(wrapped), "hits": hits, "misses": misses, "kind": kind}


def in_shards(folder: Path) -> dict[str, Any]:
    return trained(folder)


def split(folder: Path) -> dict[str, Any]:
    return trained(folder, size=2 * BATCH, split_batches=True)


def accumulated(folder: Path) -> dict[str, Any]:
    return trained(folder, gradient_accumulation_steps=2)


def evaluated(folder: Path) -> dict[str, Any]:
    """21 texts: ranks get equally many, and what came twice is left out when predictions are gathered."""
    found: dict[str, Any] = {}
    for even in (True, False):
        accelerator = fresh(even_batches=even)
        model = bert()
        with recycle(model, example(), cut=CUT, store=folder) as recycling, torch.no_grad():
            data = texts(21)
            loaders = {
                "rows": recycling.loader(data, batch_size=BATCH, collate_fn=padded),
                "raw": DataLoader(data, BATCH, collate_fn=padded),  # pyright: ignore
            }
            wrapped, *prepared = accelerator.prepare(model.eval(), *loaders.values())
            for name, loader in zip(loaders, prepared, strict=True):
                own = [wrapped(**batch).logits for batch in loader]
                if even:
                    # Again, as `gather_for_metrics` asks the loader that is in use for how many are too many.
                    logits = [accelerator.gather_for_metrics(wrapped(**batch).logits) for batch in loader]
                    found[name] = torch.cat(logits)
                else:
                    found[f"own {name}"] = torch.cat(own)
            found["hits"] = recycling.stats.hits
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """Saved after an epoch, trained on, loaded, and trained on once more."""
    from accelerate import skip_first_batches

    accelerator = fresh(use_seedable_sampler=True)
    model = bert()
    with recycle(model, example(), cut=CUT, store=folder / "store") as recycling:
        loader = recycling.loader(texts(), **shuffled(BATCH))
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        epoch(accelerator, wrapped, optimizer, loader)
        accelerator.save_state(str(folder / "state"))
        loader.set_epoch(1)
        epoch(accelerator, wrapped, optimizer, loader)
        want = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(wrapped).items()}
        accelerator.load_state(str(folder / "state"))
        loader.set_epoch(1)
        epoch(accelerator, wrapped, optimizer, skip_first_batches(loader, 0))
        got = accelerator.get_state_dict(wrapped)
        return {"want": want, "got": got, "misses": recycling.stats.misses, "hits": recycling.stats.hits}


def other_weights_loaded(folder: Path) -> dict[str, Any]:
    """A checkpoint with another prefix is loaded between two epochs."""
    accelerator = fresh()
    model = bert()
    with recycle(model, example(), cut=CUT, store=folder) as recycling:
        loader = recycling.loader(texts(), **shuffled(BATCH))
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        epoch(accelerator, wrapped, optimizer, loader)
        before, hits = recycling.fingerprint, recycling.stats.hits
        accelerator.unwrap_model(wrapped).load_state_dict(bert(seed=9).state_dict())
        epoch(accelerator, wrapped, optimizer, loader)
        return {"moved": recycling.fingerprint != before, "hits": recycling.stats.hits - hits}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts())


def stream(folder: Path) -> dict[str, Any]:
    """An iterable data set, of which each rank takes its share."""
    accelerator = fresh(dispatch_batches=False)
    model = bert()
    with recycle(model, example(), cut=CUT, store=folder) as recycling:
        loader = recycling.loader(Stream(), batch_size=BATCH, collate_fn=padded)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        hits = []
        for _ in range(2):
            epoch(accelerator, wrapped, optimizer, loader)
            hits.append(recycling.stats.hits)
        return {"weights": accelerator.get_state_dict(wrapped), "hits": hits, "misses": recycling.stats.misses}


def dispatched(folder: Path) -> dict[str, Any]:
    """Rank 0 reads for all. What it raises ends the other, too."""
    accelerator = fresh(dispatch_batches=True)
    model = bert()
    recycling = recycle(model, example(), cut=CUT, store=folder)
    loader = accelerator.prepare(recycling.loader(texts(), batch_size=BATCH, collate_fn=all_as_long))
    try:
        next(iter(loader))
    except Exception as error:
        return {"refused": (type(error).__name__, str(error))}
    return {"refused": ("nothing", "")}


SCENARIOS = (in_shards, split, accumulated, evaluated, resumed, other_weights_loaded, stream, dispatched)


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    found = {}
    for scenario in SCENARIOS:
        if not names or scenario.__name__ in names:
            found[scenario.__name__] = scenario(folder / scenario.__name__)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    sys.stdout.flush()
    os._exit(0)  # the last one has left a collective in the middle, and the other rank is told by that


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

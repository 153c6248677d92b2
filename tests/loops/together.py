"""Started by torchrun, twice: what ranks do with one recycled model. Each writes down what it has seen.

``torchrun --nproc-per-node 2 together.py FOLDER filled_at_once ddp``
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from loops.shared import (
    BATCH,
    CUT,
    PICTURES,
    PREFIX,
    Slow,
    columns,
    freeze_by_hand,
    pictures,
    resnet,
    train,
    training_mode,
    weights,
)
from torchrecycle import RecycledTensor, recycle

DATA = pictures()
EXAMPLE = torch.stack([picture for picture, _ in DATA[:2]])


def attached(store: Path | str, model: nn.Module | None = None, **options: Any) -> Any:
    """A recycling, whose looks at the whole prefix are counted."""
    recycling = recycle(resnet() if model is None else model, EXAMPLE, cut=CUT, store=store, **options)
    look, recycling.looks = recycling._look_again, 0

    def counted(**arguments: Any) -> list[str]:
        recycling.looks += 1
        return look(**arguments)

    recycling._look_again = counted
    return recycling


def sampled(recycling: Any, data: Any = DATA, **options: Any) -> tuple[Any, DistributedSampler[Any]]:
    """A loader over this rank's share of each epoch."""
    sampler = DistributedSampler(data)
    return recycling.loader(data, batch_size=BATCH, sampler=sampler, **options), sampler


# -- filling -----------------------------------------------------------------------------------------------------------


def filled_at_once(folder: Path) -> dict[str, Any]:
    """Both begin at the same moment."""
    data = Slow(pictures(48))
    with attached(folder) as recycling:
        dist.barrier()
        data.read.clear()
        report = recycling.fill(data, batch_size=2)
        read = list(data.read)
        manifest = recycling.dataset(data, batch_size=2).manifest
        misses = recycling.stats.misses
    return {
        "report": (report.objects, report.computed, report.found, report.missing),
        "misses": misses,
        "read": read,
        "keys": torch.from_numpy(manifest.keys),
        "columns": list(columns(manifest)),
    }


def filled_alone(folder: Path) -> dict[str, Any]:
    """Rank 1 comes when rank 0 has long been done."""
    with attached(folder) as recycling:
        if dist.get_rank() == 1:
            dist.barrier()
        computed = recycling.fill(DATA, batch_size=BATCH).computed
        if dist.get_rank() == 0:
            dist.barrier()
    return {"computed": computed}


def folders_of_their_own(folder: Path) -> dict[str, Any]:
    """As on two machines without a common disk."""
    with attached(folder / str(dist.get_rank())) as recycling:
        dist.barrier()
        return {"computed": recycling.fill(DATA, batch_size=BATCH).computed}


def other_data_in_each_rank(folder: Path) -> dict[str, Any]:
    """Each has pictures of its own, in other number, of which some are the same."""
    rank = dist.get_rank()
    data = [*DATA[:6], *pictures(5 + 4 * rank, seed=20 + rank)]
    plain = resnet()
    with attached(folder) as recycling, torch.no_grad():
        dist.barrier()
        computed = recycling.fill(data, batch_size=BATCH).computed
        got = torch.cat([recycling.model(x) for x, _ in recycling.loader(data, batch_size=BATCH)])
        want = plain(torch.stack([picture for picture, _ in data]))
        manifest = recycling.dataset(data).manifest
        targets = [manifest.columns[1][index] for index in range(len(data))]
        return {
            "computed": computed,
            "objects": len(data),
            "difference": (got - want).abs().max().item(),
            "targets": targets == [label for _, label in data],
            "misses": recycling.stats.misses - computed,
        }


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


def ddp(folder: Path, *, accumulate: int = 1, workers: int = 0, **options: Any) -> dict[str, Any]:
    with attached(folder) as recycling:
        loader, sampler = sampled(recycling, num_workers=workers)
        wrapped = DistributedDataParallel(recycling.model, **options)
        recycling.looks = 0
        train(wrapped, recycling.model, loader, sampler, accumulate=accumulate, unsynchronised=wrapped.no_sync)
        stats, looks = copy.copy(recycling.stats), recycling.looks
    return {"weights": weights(recycling.model), "hits": stats.hits, "misses": stats.misses, "looks": looks}


def ddp_accumulated(folder: Path) -> dict[str, Any]:
    return ddp(folder, accumulate=2)


def ddp_with_options(folder: Path) -> dict[str, Any]:
    return ddp(folder, workers=1, gradient_as_bucket_view=True, static_graph=True)


def ddp_statistics(folder: Path) -> dict[str, Any]:
    """Batch norm behind the cut moves in each rank, and DDP sends rank 0's buffers around, those before the cut too."""
    with attached(folder) as recycling:
        loader, sampler = sampled(recycling)
        recycling.looks = 0
        train(DistributedDataParallel(recycling.model), recycling.model, loader, sampler, statistics=True)
        looks = recycling.looks
        again = recycling.fill(DATA).computed
    model = freeze_by_hand(resnet())
    sampler = DistributedSampler(DATA)  # pyright: ignore
    plain = DataLoader(DATA, BATCH, sampler=sampler)  # pyright: ignore
    train(DistributedDataParallel(model), model, plain, sampler, statistics=True)
    return {"weights": weights(recycling.model), "by hand": weights(model), "looks": looks, "again": again}


def ddp_checkpointed(folder: Path) -> dict[str, Any]:
    """The last stage is computed again in backward; what proves the cut runs this backward, too."""
    model = resnet()
    last = model.get_submodule("layer4")
    forward = last.forward
    last.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    with attached(folder, model) as recycling:
        loader, sampler = sampled(recycling)
        train(DistributedDataParallel(recycling.model), recycling.model, loader, sampler)
    return {"weights": weights(recycling.model)}


def ddp_from_other_weights(folder: Path) -> dict[str, Any]:
    """Each rank begins with weights of its own, which DDP replaces by rank 0's when the rows are there already."""
    with attached(folder, resnet(seed=dist.get_rank())) as recycling:
        before = recycling.fingerprint
        loader, sampler = sampled(recycling)
        wrapped = DistributedDataParallel(recycling.model)
        train(wrapped, recycling.model, loader, sampler)
        return {
            "before": before,
            "after": recycling.fingerprint,
            "weights": weights(recycling.model),
            "hits": recycling.stats.hits,
        }


def ddp_of_uneven_ranks(folder: Path) -> dict[str, Any]:
    """Rank 1 has one batch more, which ``join`` allows for."""
    rank = dist.get_rank()
    data = pictures(8 + 4 * rank, seed=7 + rank)
    with attached(folder) as recycling:
        wrapped = DistributedDataParallel(recycling.model)
        batches = 0
        with wrapped.join():
            for x, y in recycling.loader(data, batch_size=BATCH):
                training_mode(recycling.model, statistics=False)
                nn.functional.cross_entropy(wrapped(x), y).backward()
                batches += 1
        gradient = recycling.model.get_parameter("fc.weight").grad
        assert gradient is not None
        return {"batches": batches, "gradient": gradient.clone()}


def evaluated(folder: Path) -> dict[str, Any]:
    """On rows and on raw batches, by all ranks and by one of them alone."""
    raw = torch.stack([picture for picture, _ in DATA])
    with attached(folder) as recycling, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = recycling.loader(DATA, batch_size=PICTURES)
        wrapped = DistributedDataParallel(recycling.model).eval()
        want = freeze_by_hand(resnet())(raw)
        found = {"rows": torch.cat([wrapped(x) for x, _ in loader]), "raw": wrapped(raw)}
        found["many raw"] = torch.cat([wrapped(x) for x in raw.split(2)])
        if dist.get_rank() == 0:
            found["alone, rows"] = torch.cat([wrapped.module(x) for x, _ in loader])
            found["alone, raw"] = wrapped.module(raw)
        dist.barrier()
    return {name: (output - want).abs().max().item() for name, output in found.items()}


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def shard_suffix(model: nn.Module, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name in ("layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc"):
        fully_shard(model.get_submodule(name), mesh=mesh, **options)


def fsdp2(folder: Path) -> dict[str, Any]:
    with attached(folder) as recycling:
        loader, sampler = sampled(recycling)
        shard_suffix(recycling.model)
        recycling.looks = 0
        train(recycling.model, recycling.model, loader, sampler)
        hits, looks = recycling.stats.hits, recycling.looks
        sharded = recycling.model.get_parameter("layer4.0.conv1.weight")
        prefix = recycling.model.get_parameter("conv1.weight")
        logits = [recycling.model.eval()(x) for x, _ in sampled(recycling)[0]]
        whole = get_model_state_dict(recycling.model, options=StateDictOptions(full_state_dict=True))
        save({"model": get_model_state_dict(recycling.model)}, checkpoint_id=folder / "checkpoint", no_dist=False)
    return {
        "weights": weights(recycling.model),
        "whole": whole,
        "hits": hits,
        "looks": looks,
        "kinds": [type(sharded.data).__name__, type(prefix.data).__name__],
        "finite": all(bool(one.isfinite().all()) for one in logits),
    }


def fsdp2_accumulated(folder: Path) -> dict[str, Any]:
    """Parameters are given back after each forward, and gradients are sent around before a step only."""
    with attached(folder) as recycling:
        loader, sampler = sampled(recycling)
        shard_suffix(recycling.model, reshard_after_forward=True)
        sharded = [module for module in recycling.model.modules() if isinstance(module, FSDPModule)]

        @contextmanager
        def unsynchronised() -> Iterator[None]:
            for module in sharded:
                module.set_requires_gradient_sync(False)
            yield
            for module in sharded:
                module.set_requires_gradient_sync(True)

        train(recycling.model, recycling.model, loader, sampler, accumulate=2, unsynchronised=unsynchronised)
        logits = [recycling.model.eval()(x) for x, _ in sampled(recycling)[0]]
    return {"weights": weights(recycling.model), "finite": all(bool(one.isfinite().all()) for one in logits)}


def _shard(part: str, model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    if part == "the root but the prefix":
        frozen = {parameter for name in PREFIX for parameter in model.get_submodule(name).parameters()}
        fully_shard(model, mesh=mesh, ignored_params=frozen)
    else:
        fully_shard(model.get_submodule({"the root": "", "the prefix": "layer1"}[part]), mesh=mesh)


def fsdp2_refused(folder: Path) -> dict[str, Any]:
    """Sharding what holds the prefix: what each way to use the model says then."""
    found: dict[str, Any] = {}
    for part in ("the root", "the root but the prefix", "the prefix"):
        with attached(folder) as recycling:
            loader = recycling.loader(DATA, batch_size=BATCH)
            batch = next(iter(loader))[0]
            _shard(part, recycling.model)
            ways: dict[str, Callable[[], Any]] = {
                "a batch of rows": lambda: recycling.model(batch),  # noqa: B023
                "a raw batch": lambda: recycling.model(EXAMPLE),
                "an epoch": lambda: next(iter(loader)),  # noqa: B023
                "fill": lambda: recycling.fill(pictures(4, seed=9)),
            }
            for way, call in ways.items():
                try:
                    call()
                    found[f"{part}: {way}"] = ("nothing", "")
                except Exception as error:
                    found[f"{part}: {way}"] = (type(error).__name__, str(error))
    return found


# -- what cannot be sent -----------------------------------------------------------------------------------------------


def sent_to_another_rank(folder: Path) -> dict[str, Any]:
    """A recycled batch in a collective: its rows are found by each process for itself."""
    with attached(folder) as recycling:
        batch = next(iter(recycling.loader(DATA, batch_size=BATCH)))[0]
        assert isinstance(batch, RecycledTensor)
        found = {}
        for name, call in {
            "broadcast": lambda: dist.broadcast(batch, 0),
            "all_gather": lambda: dist.all_gather([torch.empty(batch.shape) for _ in range(2)], batch),
            "all_reduce": lambda: dist.all_reduce(batch),
        }.items():
            try:
                call()
                found[name] = ("nothing", "")
            except Exception as error:
                found[name] = (type(error).__name__, str(error))
    return found


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        found[name] = globals()[name](folder / name)
        dist.barrier()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""One of two processes that train with Lightning's DDP; started by `test_loop_lightning`.

It trains a module on kept rows and another one whose prefix is frozen by hand, and prints losses and counts as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from test_loop_lightning import DATA, EVAL, Frozen, Itself, Module, loader, recycler, trainer
from torchrecycle import RecycledTensor
from torchrecycle.recycling import Stats

EPOCHS = 2


def run(make: Any, callback: pl.Callback) -> Any:
    torch.manual_seed(4)
    module = make()
    made = trainer(callback, strategy="ddp", devices=2, max_epochs=EPOCHS)
    made.fit(module, loader(DATA, batch_size=4), loader(EVAL, batch_size=4, shuffle=False))
    computed = getattr(callback, "stats", Stats()).misses
    tested = made.validate(module, loader(EVAL, batch_size=4, shuffle=False), verbose=False)
    return module, tested[0]["val_loss"], computed


def main() -> None:
    warnings.simplefilter("ignore")
    folder, found = Path(sys.argv[1]), {}
    for name, make, root in (("net", Module, "net."), ("itself", Itself, "")):
        callback = recycler(folder / name)
        module, tested, computed = run(make, callback)
        reference, expected, _ = run(make, Frozen(root))
        differ = [
            float((a.double() - b.double()).abs().max())
            for a, b in zip(module.state_dict().values(), reference.state_dict().values(), strict=True)
        ]
        found[name] = {
            "losses": module.losses,
            "expected": reference.losses,
            "tested": [tested, expected],
            "weights": max(differ),
            "recycled": all(kind is RecycledTensor for kind in module.seen),
            "computed": computed,
            "sum": float(sum(value.double().sum() for value in module.parameters())),
            "attached": any("_compiled_call_impl" in vars(part) for part in module.modules()),
        }
    print("found " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

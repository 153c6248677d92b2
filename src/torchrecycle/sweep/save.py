"""A trained model of a sweep -> a folder that anybody can use who has torch, and not us.

EfficientNet-Lite0, trained at 50 % on 98 car models, becomes 20 MB in five files:

    model.safetensors   the state dict of trunk and head
    config.json         what the model is, what it takes, what it tells, how it was trained
    load.py             reads the two; a script and a module, of which nothing imports torchrecycle
    README.md           what it is and how to use it, for people
    trunk/              config and tokenizer; of transformers models only

``load.py`` is a file of `torchrecycle.sweep.servable`, copied as it is: what is linted and tested here is what is run
there. Before the folder is made, the copy has loaded the model and given the same outputs as the trained one, so a
model that cannot be made again by its name is an error here and not a surprise there.
"""

from __future__ import annotations

import copy
import errno
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.heads import ResidualHead, ResidualMlpHead
from torchrecycle.similarity.saving import force_to_disk
from torchrecycle.sweep.encoders import FirstToken, MeanPool, PooledOutput
from torchrecycle.sweep.environment import now, versions
from torchrecycle.sweep.objective_task import ObjectiveTask
from torchrecycle.sweep.objectives import Classify
from torchrecycle.sweep.trunks import Trunk

if TYPE_CHECKING:
    from torchrecycle.sweep.run import BestWeights

__all__ = ["SaveError", "save_servable"]

FORMAT = 1
"""Of config.json; the scripts in `servable` say which one they read."""
SCRIPTS = Path(__file__).parent / "servable"
CONFIG, MODEL, SCRIPT, ABOUT, TRUNK = "config.json", "model.safetensors", "load.py", "README.md", "trunk"
MARK = "saved by torchrecycle"
"""In the first line of each script: tells a saved model from another folder with a load.py."""
STAGING = ".saving-"


class SaveError(RecycleError, OSError):
    """The model cannot be kept in that folder, or not in a form that can be loaded without torchrecycle."""


def save_servable(folder: Path, task: ObjectiveTask, trunk: Trunk, best: BestWeights) -> None:
    """Keep a trained model with what is needed to load it without torchrecycle.

    A model that was saved there before is replaced; other files in the folder stay, but not those in ``trunk``. Until
    the new one is whole, the old one is: in between, for the time of a few renames, there is no ``config.json``, and
    ``load.py`` says so. Only one process may save into a folder at once.

    Args:
        folder: new, empty, or one that was made here before.
        task: as it was swept.
        trunk: what the task was made with.
        best: as `Sweep.best_weights` gives them.

    Raises:
        SaveError: the folder holds something else or cannot be written, the weights are gone or of another task, or
            what was written gives other outputs than the trained model.
    """
    folder = Path(folder)
    config = _config(task, trunk, best)
    try:
        with _staging(folder, _script(task)) as staging:
            _write(staging, config, task, trunk, best)
            _must_be_alike(staging, task, trunk, best)
            _publish(staging, folder)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(_why_not_written(folder, error, best)) from error


def _why_not_written(folder: Path, error: OSError, best: BestWeights) -> str:
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and best.file.is_file():
        why = f"{why}: it takes {best.file.stat().st_size / 1e6:,.0f} MB"
    return (
        f"cannot save the model in {folder}: {why}. The trained weights are kept in {best.file}: make room, or give "
        "another folder, and run the same again"
    )


# -- what the model is -------------------------------------------------------------------------------------------------


def _config(task: ObjectiveTask, trunk: Trunk, best: BestWeights) -> dict[str, Any]:
    """All that ``load.py`` reads, and how the model came about."""
    classes = list(task.objective.names) if isinstance(task.objective, Classify) else []
    return {
        "format": FORMAT,
        "library": _library(trunk),
        "model": _name(trunk),
        "architecture": type(trunk.module).__name__,
        "options": _options(trunk),
        "kind": task.kind,
        "what": "classify" if classes else "pairs" if task.kind == "pairs" else "similarity",
        "classes": classes,
        "features": task.dim,
        "head": _head(task),
        "pooling": _pooling(trunk),
        "unit": task.objective.unit,
        **(_of_texts(task, trunk) if task.kind != "images" else _of_pictures(trunk)),
        "trained": _trained(task, best),
        "licences": _licences(task, trunk),
        "versions": versions(),
        "date": now(),
    }


def _library(trunk: Trunk) -> str:
    return "transformers" if trunk.folder is not None else trunk.name.partition("/")[0]


def _name(trunk: Trunk) -> str:
    """Of a folder its last part: where it lay says nothing to others."""
    return trunk.folder.resolve().name if trunk.folder is not None else trunk.name.partition("/")[2]


def _options(trunk: Trunk) -> dict[str, Any]:
    """What the library is told beside the name, to make the same model again."""
    library = _library(trunk)
    if library == "timm":
        return _timm_options(trunk)
    if library == "torchvision":
        return _torchvision_options(trunk.module)
    return {}


def _timm_options(trunk: Trunk) -> dict[str, Any]:
    """A model of one fixed size is made for the size that it was trained with."""
    import timm

    config = timm.get_pretrained_cfg(_name(trunk))
    assert trunk.preprocessing is not None
    size = trunk.preprocessing.size
    other = config is not None and config.fixed_input_size and size != config.input_size[1]
    return {"img_size": size} if other else {}


def _torchvision_options(module: nn.Module) -> dict[str, Any]:
    """What torchvision sets by itself where it takes its published weights: a size of 518, channels scaled again."""
    known = ("image_size", "transform_input", "aux_logits")
    options = {name: getattr(module, name) for name in known if hasattr(module, name)}
    # Without it, GoogLeNet and Inception draw weights for ten seconds, which are then replaced.
    return {**options, "init_weights": False} if "aux_logits" in options else options


def _head(task: ObjectiveTask) -> str:
    head = task.objective.make_head(task.dim)
    if isinstance(head, ResidualHead):
        return "residual"
    if isinstance(head, ResidualMlpHead):
        return "residual mlp"
    if isinstance(head, nn.Sequential) and isinstance(task.objective, Classify):
        return "mlp"
    if isinstance(head, nn.Linear) and isinstance(task.objective, Classify):
        return "linear"
    raise SaveError(
        f"a {type(head).__name__} of {type(task.objective).__name__} cannot be saved so that it loads without "
        "torchrecycle: only the heads of Classify, Similar and Matching can. Save its state dict yourself"
    )


_POOLS = {MeanPool: "mean", FirstToken: "first token", PooledOutput: "pooled output"}


def _pooling(trunk: Trunk) -> str:
    kind = type(trunk.pool)
    if kind not in _POOLS:
        names = ", ".join(each.__name__ for each in _POOLS)
        raise SaveError(f"load.py knows no pooling by {kind.__name__}, only {names}: save the state dict yourself")
    return _POOLS[kind]


def _of_pictures(trunk: Trunk) -> dict[str, Any]:
    assert trunk.preprocessing is not None
    return {"preprocessing": asdict(trunk.preprocessing)}


def _of_texts(task: ObjectiveTask, trunk: Trunk) -> dict[str, Any]:
    return {"tokens": _tokens(task), "padding": trunk.tokenizer.pad_token_id}


def _tokens(task: ObjectiveTask) -> int:
    # The task says it in words only.
    found = re.match(r"\d+", task.settings.get("tokens of a text", ""))
    if found is None:
        raise SaveError("the task does not say how many tokens of a text it takes: make it with text_task or pair_task")
    return int(found[0])


def _trained(task: ObjectiveTask, best: BestWeights) -> dict[str, Any]:
    """How the weights came about."""
    level, trial = best.level, best.trial
    return {
        "level": level.level,
        "cut": level.cut,
        "share": level.share,
        "seed": trial.seed,
        "quality": {name: _finite(value) for name, value in trial.quality.items()},
        "quality over all seeds": {
            name: {"mean": _finite(each.mean), "error": _finite(each.error)} for name, each in level.quality.items()
        },
        "seeds": len(level.trials),
        "recipe": asdict(trial.recipe),
        "loss": task.objective.loss,
        "data": task.data,
        "weights before": task.weights,
        "random weights before": task.random_weights,
        "settings": task.settings,
    }


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _licences(task: ObjectiveTask, trunk: Trunk) -> list[str]:
    known = list(task.licences)
    if _library(trunk) == "timm" and trunk.weights.startswith("published"):
        said: Any = getattr(trunk.module, "pretrained_cfg", {}).get("license")
        known += [f"{trunk.name}: its published weights are {said}, as timm says"] if said else []
    return known


# -- what is written ---------------------------------------------------------------------------------------------------


def _script(task: ObjectiveTask) -> Path:
    return SCRIPTS / ("load_images.py" if task.kind == "images" else "load_texts.py")


@contextmanager
def _staging(folder: Path, script: Path) -> Iterator[Path]:
    """A new folder inside of the folder, so that a rename is enough wherever that lies.

    A script is there from the start: should this process be killed, the folder still tells that it is ours.
    """
    new, found = not folder.exists(), _held(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in found:
        if name.startswith(STAGING):  # of a save that was killed
            shutil.rmtree(folder / name, ignore_errors=True)
    whole = False
    try:
        if not found:
            shutil.copyfile(script, folder / SCRIPT)
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder) as staging:
            yield Path(staging)
        whole = True
    finally:
        if not whole and not found and _names(folder) in ([], [SCRIPT]):
            (folder / SCRIPT).unlink(missing_ok=True)
            if new:
                folder.rmdir()


def _held(folder: Path) -> list[str]:
    """What lies in the folder: nothing, or a saved model.

    Raises:
        SaveError: it is something else.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise SaveError(f"{folder} is a file, and a model is saved as a folder: give another one")
    names = _names(folder)
    if names and not _is_ours(folder / SCRIPT):
        held = f"{', '.join(names[:3])}{' and more' * (len(names) > 3)}"
        raise SaveError(f"{folder} holds {held}, and no model that was saved here before: give a new or empty folder")
    return names


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_ours(script: Path) -> bool:
    if not script.is_file():
        return False
    with script.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.readline()


def _write(staging: Path, config: Mapping[str, Any], task: ObjectiveTask, trunk: Trunk, best: BestWeights) -> None:
    if not best.file.is_file():
        raise SaveError(f"the trained weights {best.file} are gone: run the sweep again with a folder for weights")
    shutil.copyfile(best.file, staging / MODEL)
    if trunk.folder is not None:
        _write_trunk(staging / TRUNK, trunk)
    shutil.copyfile(_script(task), staging / SCRIPT)
    (staging / ABOUT).write_text(_about(task, trunk, config), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    (staging / CONFIG).write_text(text + "\n", encoding="utf-8")


def _write_trunk(folder: Path, trunk: Trunk) -> None:
    """Config and tokenizer, with which transformers makes the trunk again."""
    config: Any = copy.deepcopy(trunk.module.config)
    config.dtype = next(trunk.module.parameters()).dtype
    try:
        config.save_pretrained(folder)
        if trunk.tokenizer is not None:
            trunk.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception, also where the disk is full
        raise SaveError(f"transformers cannot save config and tokenizer of {trunk.name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _publish(staging: Path, folder: Path) -> None:
    """Move the files to where they belong. The config goes first and comes last: whoever loads amid is told so."""
    for path in staging.rglob("*"):
        if path.is_file():
            force_to_disk(path)
    (folder / CONFIG).unlink(missing_ok=True)
    if (folder / TRUNK).exists():
        shutil.rmtree(folder / TRUNK)
    for name in (MODEL, TRUNK, ABOUT, SCRIPT, CONFIG):
        if (staging / name).exists():
            (staging / name).replace(folder / name)


# -- proof -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _must_be_alike(staging: Path, task: ObjectiveTask, trunk: Trunk, best: BestWeights) -> None:
    """Load what was written as its reader will, and compare.

    Raises:
        SaveError: it cannot be loaded, or it gives other tokens or outputs than the trained model.
    """
    ours = _trained_model(task, best)
    try:
        with torch.random.fork_rng(devices=[]):
            theirs = _load(staging, task)
    except Exception as error:
        raise SaveError(f"{trunk.name} cannot be made again by its name: {_one_line(error)}") from error
    if task.kind != "images":
        _must_read_alike(task, trunk, theirs)
    example = task.example()
    first, second = (_outputs(model, example) for model in (ours, theirs))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise SaveError(
            f"{trunk.name} made again by its name gives other outputs than the trained model, which differ by "
            f"{float((first - second).abs().max()):.2g}: save its state dict yourself"
        )


def _trained_model(task: ObjectiveTask, best: BestWeights) -> nn.Module:
    from safetensors.torch import load_model

    model = task.build_model().cpu()
    try:
        load_model(model, str(best.file))
    except Exception as error:
        raise SaveError(f"{best.file} does not hold the weights of this task: {_one_line(error)}") from error
    return model.eval()


def _load(folder: Path, task: ObjectiveTask) -> nn.Module:
    if task.kind == "images":
        from torchrecycle.sweep.servable import load_images as script
    else:
        from torchrecycle.sweep.servable import load_texts as script
    return script.load(folder)


def _outputs(model: nn.Module, example: Any) -> Tensor:
    if isinstance(example, Mapping):
        return model(**{name: tensor.cpu() for name, tensor in example.items()})
    return model(example.cpu())


def _must_read_alike(task: ObjectiveTask, trunk: Trunk, theirs: nn.Module) -> None:
    """The saved tokenizer gives the tokens of the one that was trained with, for some texts of the test split."""
    texts = ["a short text"]
    if task.test.sample is not None:
        texts += [task.test.sample(i).text for i in range(min(8, len(task.test)))]
    saved: Any = theirs.tokenizer
    for text in texts:
        first, second = (each(text, truncation=True, max_length=_tokens(task)) for each in (trunk.tokenizer, saved))
        if first["input_ids"] != second["input_ids"]:
            raise SaveError(f"the tokenizer of {trunk.name} does not come back as it was saved: keep its own files")


# -- in words ----------------------------------------------------------------------------------------------------------


def _about(task: ObjectiveTask, trunk: Trunk, config: Mapping[str, Any]) -> str:
    """README.md."""
    trained = config["trained"]
    random = ["", "**It started from random weights: it is good for trying out, and for nothing else.**"]
    return "\n".join(
        [
            f"# {task.title}",
            "",
            f"{_does(task, config)} It was trained with torchrecycle, from {_before(trunk, config)}, and is used "
            "without it.",
            *(random if trunk.random else []),
            "",
            f"- Trained on: {task.data}",
            f"- Level: {_level(trained)}, seed {trained['seed']}, {_epochs(trained)}",
            f"- Loss: {trained['loss']}",
            "- Quality, on objects that it was not trained on:",
            *_qualities(task, trained),
            f"- {_taken(config)}",
            f"- Saved: {config['date']}, with {_versions(config)}",
            "",
            "## How to use it",
            "",
            "```",
            f"pip install {' '.join(_packages(config))}",
            *_shell(config),
            "```",
            "",
            "In Python, in this folder:",
            "",
            "```python",
            *_python(config),
            "```",
            "",
            f"The weights are `{MODEL}`; what the model is and how it was trained is in `{CONFIG}`.",
            "",
            "## Licences",
            "",
            *_licence_lines(config),
            "",
        ]
    )


def _does(task: ObjectiveTask, config: Mapping[str, Any]) -> str:
    one = "a picture" if task.kind == "images" else "a text"
    if config["what"] == "classify":
        return f"A model that tells {len(config['classes'])} classes apart, given {one}."
    near = "texts that belong together" if config["what"] == "pairs" else f"{one[2:]}s of one class"
    return f"A model that makes {config['features']} numbers of {one}, so that {near} have similar ones."


def _before(trunk: Trunk, config: Mapping[str, Any]) -> str:
    """The pretrained model."""
    weights = "random weights" if trunk.random else f"weights {config['trained']['weights before']}"
    if trunk.folder is not None:
        return f"a {config['architecture']} of transformers (`{config['model']}`, {weights})"
    return f"{trunk.name} ({weights})"


def _epochs(trained: Mapping[str, Any]) -> str:
    epochs = trained["recipe"]["epochs"]
    return f"{epochs} epoch{'' if epochs == 1 else 's'}"


def _level(trained: Mapping[str, Any]) -> str:
    from torchrecycle.sweep.results import in_words

    cut = f", cut at `{trained['cut']}`" if trained["cut"] else ""
    return in_words(trained["level"]) + cut


def _qualities(task: ObjectiveTask, trained: Mapping[str, Any]) -> Iterator[str]:
    """On the test split; where there were several seeds, the best of them was chosen on it too."""
    for name, value in trained["quality"].items():
        over = trained["quality over all seeds"][name]
        figure = "unknown" if value is None else f"{value:.3f}"
        several = trained["seeds"] > 1 and over["mean"] is not None
        best = f"; the best of {trained['seeds']} seeds, whose mean is {over['mean']:.3f}" if several else ""
        yield f"  - {name} {figure}: {task.objective.metrics[name]}{best}"


def _taken(config: Mapping[str, Any]) -> str:
    if config["kind"] != "images":
        return f"Takes: texts, cut off after {config['tokens']} tokens"
    said = config["preprocessing"]
    size = said["size"]
    if said["crop"] is None:
        return f"Takes: pictures, each squeezed whole into a square of {size} px ({said['interpolation']})"
    resized = int(size / said["crop"])
    return f"Takes: pictures, resized to {resized} px ({said['interpolation']}), of which the middle {size} px are seen"


def _versions(config: Mapping[str, Any]) -> str:
    used = ("torch", config["library"], *(["torchvision"] if config["kind"] == "images" else []))
    return ", ".join(f"{name} {config['versions'][name]}" for name in dict.fromkeys(used) if name in config["versions"])


def _packages(config: Mapping[str, Any]) -> list[str]:
    pictures = ["torchvision", "pillow", "numpy"] if config["kind"] == "images" else []
    return list(dict.fromkeys(["torch", "safetensors", config["library"], *pictures]))


def _shell(config: Mapping[str, Any]) -> Iterator[str]:
    one, other = ("photo.jpg", "other.jpg") if config["kind"] == "images" else ('"a text"', '"another"')
    yield f"python {SCRIPT} {one}"
    if config["what"] != "classify":
        yield f"python {SCRIPT} {one} {other}"


def _python(config: Mapping[str, Any]) -> Iterator[str]:
    one, other = ("photo.jpg", "other.jpg") if config["kind"] == "images" else ("a text", "another")
    name = "classify" if config["what"] == "classify" else "embed"
    yield f"from load import {name}, load"
    yield ""
    yield "model = load()"
    if name == "classify":
        yield f'classify(model, ["{one}"])[0]  # each class with its probability, the likeliest first'
        return
    yield f'first, second = embed(model, ["{one}", "{other}"])'
    yield "first @ second  # how alike they are, from -1 to 1"


def _licence_lines(config: Mapping[str, Any]) -> list[str]:
    return [f"- {line}" for line in config["licences"]] or [
        "torchrecycle was not told the licences of the data and of the pretrained weights: they are to be looked up "
        "where each came from. `load.py` is Apache-2.0."
    ]

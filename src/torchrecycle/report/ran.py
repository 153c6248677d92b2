"""What was run, so that a reader can run it again: command, model, data, recipes, rates that were tried, versions."""

from __future__ import annotations

from torchrecycle.report.columns import epochs_run
from torchrecycle.report.levels import level_name
from torchrecycle.report.markup import definitions, scrolling, slot, text
from torchrecycle.report.words import count, duration, figure, percent, rate, seconds
from torchrecycle.sweep.rates import diverged
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import LevelResult, Ran, SweepResult, Trial

__all__ = ["ran_section", "recipe_in_words"]


def ran_section(result: SweepResult, ident: str) -> str:
    """The command, then everything else by name, then how each level was trained."""
    ran = result.ran
    return (
        f'<section aria-labelledby="{ident}-ran"><h3 id="{ident}-ran">What was run</h3>'
        f"{_command(ran)}{definitions(_facts(result), 'facts')}"
        f'<h4 id="{ident}-recipes">How each level was trained</h4>{_own_fit(result)}{_recipes(result)}'
        f"{_recipes_explained(result)}{_search(result)}</section>"
    )


def _command(ran: Ran) -> str:
    return f'<pre class="command" tabindex="0" aria-label="The command"><code>{text(ran.command)}</code></pre>'


def _facts(result: SweepResult) -> list[tuple[str, str]]:
    ran = result.ran
    splits = ", ".join(f"{number:,} {name}" for name, number in ran.splits.items())
    facts = [
        ("model", slot(ran.model)),
        ("weights", slot(ran.weights)),
        ("data", slot(ran.data)),
        ("splits", slot(splits)),
        ("left out", _lines(ran.left_out)),
        ("loss", slot(ran.loss)),
        ("seeds", text(", ".join(map(str, result.seeds)))),
        *((name, slot(value)) for name, value in ran.settings.items()),
        ("licences", _lines(ran.licences)),
        ("machine", slot(ran.machine)),
        ("versions", slot(", ".join(f"{name} {version}" for name, version in ran.versions.items()))),
        ("date", slot(ran.date.replace("T", " ", 1))),
        ("took", f"{duration(ran.seconds)}, all trainings and filling together"),
    ]
    return [(name, value) for name, value in facts if value]


def _lines(lines: tuple[str, ...]) -> str:
    return f"<ul>{''.join(f'<li>{slot(line)}</li>' for line in lines)}</ul>" if lines else ""


def _own_fit(result: SweepResult) -> str:
    """Of a task that may be the user's own nothing is claimed but what its `fit` was given."""
    if result.kind != "objects":
        return ""
    return (
        "<p>These are the recipes that the task's <code>fit</code> was given. What it takes of them, and which "
        "optimizer and loss it has, is in its code.</p>"
    )


def _recipes_explained(result: SweepResult) -> str:
    is_own = result.kind == "objects"
    whose = "" if is_own else " of AdamW"
    warm_up = "are meant to rise from zero." if is_own else "rise from zero; then they fall along a cosine."
    pairs = [
        ("epochs", "Passes over the training data; “3 of 30” if a training ended after fewer than it was given."),
        ("rate", f"Learning rates{whose}: of the pretrained layers that are trained, of the head (the new last layer), "
         "and of the class vectors, if the loss learns such."),
        ("warm-up", f"Share of the steps in which the rates {warm_up}"),
        ("scale", "What the loss multiplies cosines by, if it goes by cosines."),
    ]  # fmt: skip
    return (
        f'<details class="legend"><summary>What these columns mean</summary>{definitions(pairs, "meanings")}</details>'
    )


def _epochs(trial: Trial) -> str:
    """With those that it was to have, if it had fewer."""
    ran, planned = epochs_run(trial), trial.recipe.epochs
    if ran is None:
        return f"of {planned:,}"
    return f"{ran:,}" if ran == planned else f"{ran:,} of {planned:,}"


def _recipes(result: SweepResult) -> str:
    head = ("level", "blocks recycled", "parameters trained", "epochs", "batch", "rate, pretrained", "rate, head")
    head += ("rate, classes", "weight decay", "warm-up", "scale")
    rows = [(level_name(result, one.level), *_recipe_cells(one)) for one in result.levels]
    return _table("What each level was trained with", head, rows)


def _recipe_cells(one: LevelResult) -> tuple[str, ...]:
    used = one.trials[0].recipe
    return (
        percent(one.share),
        f"{one.trained_parameters:,}",
        _epochs(one.trials[0]),
        f"{used.batch_size:,}",
        rate(used.suffix_rate) if used.suffix_rate else "",
        rate(used.head_rate),
        rate(used.class_rate),
        rate(used.weight_decay),
        percent(used.warm_up),
        rate(used.scale),
    )


def _search(result: SweepResult) -> str:
    """The rates that were tried; empty if they were given."""
    tried = [(one, trial) for one in result.levels for trial in one.search]
    if not tried:
        return "<p>The learning rates were given; none were looked for.</p>"
    head = ("level", "rate, pretrained", "rate, head", "epochs", "seconds", *result.untrained, "chosen")
    rows = [(level_name(result, one.level), *_search_cells(result, one, trial)) for one, trial in tried]
    took = sum(one.search_seconds for one in result.levels)
    return (
        f"<p>{count(len(tried), 'training')} looked for a learning rate, {duration(took)} in all."
        f"{_ended(result, [trial for _, trial in tried])} Their quality is that on the validation split, when they "
        "ended.</p>"
        '<details class="legend"><summary>Rates that were tried</summary>'
        f"{_table('Rates that were tried', head, rows)}</details>"
    )


def _ended(result: SweepResult, tried: list[Trial]) -> str:
    """In words, how many had fewer epochs than they were to have, and why."""
    lost = sum(map(diverged, tried))
    early = sum((epochs_run(one) or one.recipe.epochs) < one.recipe.epochs for one in tried if not diverged(one))
    own = ", or by their own <code>fit</code>" if result.kind == "objects" else ""
    said = f" {early:,} of them ended early, since other rates did better by then{own}." if early else ""
    return said + (f" {lost:,} of them diverged: the loss was no finite number any more." if lost else "")


def _search_cells(result: SweepResult, one: LevelResult, trial: Trial) -> tuple[str, ...]:
    tried = trial.recipe
    return (
        rate(tried.suffix_rate) if tried.suffix_rate else "",
        rate(tried.head_rate),
        _epochs(trial),
        seconds(trial.seconds),
        *("diverged" if diverged(trial) else figure(trial.quality.get(metric)) for metric in result.untrained),
        "chosen" if _rates(tried) == _rates(one.trials[0].recipe) else "",
    )


def _rates(recipe: Recipe) -> tuple[float, float, float]:
    return recipe.suffix_rate, recipe.head_rate, recipe.class_rate


def _table(caption: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """First cells are HTML already."""
    names = f'<th scope="col" class="words">{head[0]}</th>'
    names += "".join(f'<th scope="col">{text(name)}</th>' for name in head[1:])
    body = "".join(map(_row, rows))
    table = f"<table><caption>{text(caption)}</caption><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
    return scrolling(table, caption)


def _row(row: tuple[str, ...]) -> str:
    first, *others = row
    cells = "".join(f"<td>{text(cell)}</td>" for cell in others)
    return f'<tr{_CHOSEN if others[-1] == "chosen" else ""}><th scope="row">{first}</th>{cells}</tr>'


_CHOSEN = ' class="taken"'


def recipe_in_words(recipe: Recipe, *, is_own: bool = False) -> str:
    """
    Args:
        recipe: of a training.
        is_own: whether the training may be a user's own, of which only is known what it was given.

    >>> recipe_in_words(Recipe(epochs=4, suffix_rate=1e-3, head_rate=2e-3))
    '4 epochs, batch 64, AdamW, rate 0.001, head 0.002, weight decay 0.01, scale 4'
    """
    how = "" if is_own else "AdamW, "
    trunk = f"rate {rate(recipe.suffix_rate)}, " if recipe.suffix_rate else ""
    return (
        f"{count(recipe.epochs, 'epoch')}, batch {recipe.batch_size}, {how}{trunk}head {rate(recipe.head_rate)}, "
        f"weight decay {rate(recipe.weight_decay)}, scale {rate(recipe.scale)}"
    )

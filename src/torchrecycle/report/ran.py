"""What was run, so that a reader can run it again: command, model, data, recipes, rates that were tried, versions."""

from __future__ import annotations

from torchrecycle.report.levels import level_name
from torchrecycle.report.markup import definitions, scrolling, slot, text
from torchrecycle.report.words import count, duration, figure, percent, rate, seconds
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import LevelResult, Ran, SweepResult, Trial

__all__ = ["ran_section", "recipe_in_words"]


def ran_section(result: SweepResult, ident: str) -> str:
    """The command, then everything else by name, then how each level was trained."""
    ran = result.ran
    return (
        f'<section aria-labelledby="{ident}-ran"><h3 id="{ident}-ran">What was run</h3>'
        f"{_command(ran)}{definitions(_facts(result), 'facts')}"
        f'<h4 id="{ident}-recipes">How each level was trained</h4>{_recipes(result)}{_search(result)}</section>'
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
        ("took", f"{duration(ran.seconds)}, all trials and fills together"),
    ]
    return [(name, value) for name, value in facts if value]


def _lines(lines: tuple[str, ...]) -> str:
    return f"<ul>{''.join(f'<li>{slot(line)}</li>' for line in lines)}</ul>" if lines else ""


def _recipes(result: SweepResult) -> str:
    head = ("level", "blocks recycled", "numbers trained", "epochs", "batch", "rate of the trunk", "rate of the head")
    head += ("rate of the classes", "weight decay", "warm-up", "scale")
    rows = [(level_name(result, one.level), *_recipe_cells(one)) for one in result.levels]
    return _table("What each level was trained with", head, rows)


def _recipe_cells(one: LevelResult) -> tuple[str, ...]:
    used = one.trials[0].recipe
    return (
        percent(one.share),
        f"{one.trained_parameters:,}",
        f"{used.epochs:,}",
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
        return "<p>The rates were given; none were looked for.</p>"
    head = ("level", "rate of the trunk", "rate of the head", "epochs", "seconds", *result.untrained, "chosen")
    rows = [(level_name(result, one.level), *_search_cells(result, one, trial)) for one, trial in tried]
    took = sum(one.search_seconds for one in result.levels)
    return (
        f"<p>{count(len(tried), 'short training')} looked for a rate, {duration(took)} in all; "
        "their quality is that on the validation split.</p>"
        '<details class="legend"><summary>Rates that were tried</summary>'
        f"{_table('Rates that were tried', head, rows)}</details>"
    )


def _search_cells(result: SweepResult, one: LevelResult, trial: Trial) -> tuple[str, ...]:
    tried = trial.recipe
    return (
        rate(tried.suffix_rate) if tried.suffix_rate else "",
        rate(tried.head_rate),
        f"{tried.epochs:,}",
        seconds(trial.seconds),
        *(figure(trial.quality.get(metric)) for metric in result.untrained),
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


def recipe_in_words(recipe: Recipe) -> str:
    """
    >>> recipe_in_words(Recipe(epochs=4, suffix_rate=1e-3, head_rate=2e-3))
    '4 epochs, batch 64, AdamW, rate 0.001, head 0.002, weight decay 0.01, scale 4'
    """
    trunk = f"rate {rate(recipe.suffix_rate)}, " if recipe.suffix_rate else ""
    return (
        f"{count(recipe.epochs, 'epoch')}, batch {recipe.batch_size}, AdamW, {trunk}head {rate(recipe.head_rate)}, "
        f"weight decay {rate(recipe.weight_decay)}, scale {rate(recipe.scale)}"
    )

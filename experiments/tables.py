"""Tables and plots of what the experiments have measured, written into a page.

    python experiments/tables.py docs/experiments.md

Each part of the page between ``<!-- levels -->`` and ``<!-- /levels -->`` is written anew from the files in
``experiments/results/``; what was not measured yet is left as it is. Plots are SVG files beside the page.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import RESULTS  # pyright: ignore[reportMissingImports]

Figures = dict[str, Any]
PUBLISHED = {
    "levels": {"untrained": 0.11, "head": 0.22, "75": 0.28, "50": 0.31, "full": 0.32},
    "half": {"head": 0.21, "75": 0.25, "50": 0.26, "full": 0.27},
    "questions": {"head": 0.67, "75": 0.69, "50": 0.75, "full": 0.76},
}
"""What others measured with a ResNet-152 and other photos of cars, and with another encoder and other questions."""
KEPT = {
    "levels": {"head": 52, "75": 81, "50": 95},
    "questions": {"head": 25, "75": 42, "50": 92},
}
"""The share of full training's gain that a level kept there, per cent."""
WORDS = {"full": "full training", "head": "head only"}
COLOURS = {"full": "#444444", "25": "#7a5195", "50": "#1f6fb2", "75": "#c4561b", "head": "#2a9d57"}


def read(name: str) -> Figures | None:
    path = next((each for each in (RESULTS / name / "results.json", RESULTS / f"{name}.json") if each.exists()), None)
    return json.loads(path.read_text(encoding="utf-8")) if path is not None else None


def words(level: str) -> str:
    return WORDS.get(level, f"{level} % recycled")


def shown(figure: Figures) -> str:
    return f"{figure['mean']:.3f} ± {figure['error']:.3f}"


def spread(level: Figures, metric: str) -> str:
    """Over the seeds: from the lowest to the highest."""
    found = [trial["quality"][metric] for trial in level["trials"]]
    return f"{min(found):.3f} to {max(found):.3f}" if len(found) > 1 else ""


def gain_kept(result: Figures, level: Figures) -> float | None:
    """The share of full training's gain over the untrained model, per cent."""
    full = next((each for each in result["levels"] if each["level"] == "full"), None)
    if full is None:
        return None
    metric = result["metric"]
    before = result["untrained"][metric]["mean"]
    return 100 * (level["quality"][metric]["mean"] - before) / (full["quality"][metric]["mean"] - before)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB" if count else ""


# -- one sweep ---------------------------------------------------------------------------------------------------------


def sweep_table(result: Figures, published: dict[str, float], kept: dict[str, int]) -> str:
    """Quality, what of the gain is kept, how it was trained, time and bytes; a row for each level."""
    metrics = list(result["untrained"])
    heads = ["", *metrics, "over the seeds", "gain kept"]
    heads += ["published", "their gain kept"] if published else []
    heads += ["cut", "epochs, rate", "s per epoch", "kept"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    before = [shown(result["untrained"][metric]) for metric in metrics]
    blank = [f"{published.get('untrained', '')}", ""] if published else []
    lines.append(f"| {' | '.join(['untrained', *before, '', '', *blank, '', '', '', ''])} |")
    for level in sorted(result["levels"], key=lambda each: -each["share"]):
        share = gain_kept(result, level)
        recipe = level["trials"][0]["recipe"]
        rate = recipe["head_rate"] if level["level"] == "head" else recipe["suffix_rate"]
        cells = [words(level["level"]), *(shown(level["quality"][metric]) for metric in metrics)]
        cells += [spread(level, result["metric"]), "" if share is None else f"{share:.0f} %"]
        if published:
            theirs = kept.get(level["level"])
            cells += [f"{published.get(level['level'], '')}", "" if theirs is None else f"{theirs} %"]
        cells += [f"`{level['cut']}`" if level["cut"] else "", f"{recipe['epochs']}, {rate:g}"]
        cells += [f"{level['epoch_seconds']:.1f}", size(level["bytes_kept"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def about(result: Figures) -> str:
    """Whose figures these are."""
    ran = result["ran"]
    splits = ", ".join(f"{count:,} {name}" for name, count in ran["splits"].items())
    seeds = len(result["seeds"])
    return (
        f"{ran['model']}, {ran['data']}: {splits}; {seeds} seed{'s' if seeds > 1 else ''}. {ran['machine']}, torch "
        f"{ran['versions']['torch']}, {ran['date'][:10]}. ± is the standard error over objects and seeds.\n"
    )


def levels() -> str | None:
    result = read("levels")
    return result and f"{about(result)}\n{sweep_table(result, PUBLISHED['levels'], KEPT['levels'])}"


def questions() -> str | None:
    """With all pairs to train on, or with half of them if only that was run."""
    result = read("questions") or read("questions-50")
    return result and f"{about(result)}\n{sweep_table(result, PUBLISHED['questions'], KEPT['questions'])}"


def classification() -> str | None:
    result = read("classification")
    return result and f"{about(result)}\n{sweep_table(result, {}, {})}"


# -- amount of data ----------------------------------------------------------------------------------------------------

FRACTIONS = (100, 50, 25, 10)


def of_fractions() -> dict[int, Figures]:
    """The sweeps that were run, by the per cent of the data that they train on."""
    found = {each: read("levels" if each == 100 else f"amount-{each}") for each in FRACTIONS}
    return {each: result for each, result in found.items() if result is not None}


def amount() -> str | None:
    results = of_fractions()
    if len(results) < 2:
        return None
    metric = next(iter(results.values()))["metric"]
    names = ["head", "75", "50", "full"]
    lines = [f"| photos to train on | untrained | {' | '.join(map(words, names))} |", "| --- | --- |" + " --- |" * 4]
    for fraction, result in results.items():
        by_name = {level["level"]: level for level in result["levels"]}
        cells = [shown(by_name[name]["quality"][metric]) if name in by_name else "" for name in names]
        count = result["ran"]["splits"]["train"]
        lines.append(f"| {count:,} ({fraction} %) | {shown(result['untrained'][metric])} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- time --------------------------------------------------------------------------------------------------------------


def seconds() -> str | None:
    found = read("seconds")
    if found is None:
        return None
    share, parts = 100 * found["settings"]["fraction"], []
    for machine in dict.fromkeys(each["machine"] for each in found["measured"].values()):
        mine = [each for each in found["measured"].values() if each["machine"] == machine]
        told = f"{machine}, torch {mine[0]['versions']['torch']}, {mine[0]['date']}; with {share:.0f} % of the data."
        parts.append(f"{told}\n\n{seconds_table(mine)}")
    return "\n\n".join(parts)


def seconds_table(measured: Sequence[Figures]) -> str:
    lines = [
        "| task | level | fill | epoch, recycled | frozen, no store | full, plain loader "
        "| all epochs with the fill | all epochs, full | filling has paid after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in measured:
        for name, level in each["levels"].items():
            saved = level["frozen"] - level["recycled"]
            paid = f"{level['fill'] / saved:.1f} epochs" if saved > 0 else "never"
            whole = level["fill"] + level["epochs"] * level["recycled"]
            lines.append(
                f"| {each['task']} | {words(name)} | {level['fill']:.1f} s | {level['recycled']:.2f} s | "
                f"{level['frozen']:.2f} s | {each['full']:.2f} s | {minutes(whole)} | "
                f"{minutes(each['epochs'] * each['full'])} | {paid} |"
            )
    return "\n".join(lines)


# -- speed -------------------------------------------------------------------------------------------------------------


def speeds() -> list[Figures]:
    """One for each model and machine, of the processors and of the graphics cards."""
    found = [read("speed"), read("speed-gpu")]
    return [one for each in found if each is not None for one in each["measured"].values()]


def machine_of(one: Figures) -> str:
    """Its threads, or its card."""
    threads = f"{one['threads']} thread{'s' if one['threads'] > 1 else ''}"
    return one["machine"].rpartition(", ")[2] if one["device"] == "cuda" else threads


def speed() -> str | None:
    """A row for each model and level; training and inference on each machine."""
    found = speeds()
    if not found:
        return None
    machines = list(dict.fromkeys(machine_of(one) for one in found))
    heads = ["model", "recycled", "FLOPs alone give", *(f"training, {each}" for each in machines)]
    heads += [*(f"inference, {each}" for each in machines), "bytes per object"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for model in dict.fromkeys(one["model"] for one in found):
        mine = {machine_of(one): one for one in found if one["model"] == model}
        first = next(iter(mine.values()))
        for name, level in first["levels"].items():
            cells = [f"{model}, {first['parameters'] / 1e6:.0f} M", f"{name.replace('%', ' %')} at `{level['cut']}`"]
            cells.append(f"{1 / (1 - level['flops_share']):.2f}")
            for purpose in ("training", "inference"):
                for each in machines:
                    one = mine.get(each)
                    ratio = None if one is None else one["full"][purpose] / one["levels"][name][purpose]
                    cells.append("" if ratio is None else f"{ratio:.2f}")
            cells.append(f"{level['bytes_per_object'] / 1e3:,.0f} kB")
            lines.append(f"| {' | '.join(cells)} |")
    told = "; ".join(dict.fromkeys(f"{one['machine']}, torch {one['versions']['torch']}" for one in found))
    return f"Times faster than in full. {told}.\n\n" + "\n".join(lines)


# -- what may close the gap --------------------------------------------------------------------------------------------


def levers() -> str | None:
    found = read("levers")
    if found is None:
        return None
    by_level: dict[str, dict[str, list[Figures]]] = {}
    for one in found["measured"].values():
        by_level.setdefault(one["level"], {}).setdefault(one["name"], []).append(one)
    lines = [
        "| recycled | what is tried | R-precision | against as usual |",
        "| --- | --- | --- | --- |",
    ]
    for level, names in by_level.items():
        usual = names.get("as usual")
        for name, each in names.items():
            mean = statistics.mean(one["quality"] for one in each)
            against = "" if usual is None or name == "as usual" else compared(each, usual)
            lines.append(f"| {level} % | {name} | {mean:.3f} | {against} |")
    ran = "; ".join(sorted({one["machine"] for one in found["measured"].values()}))
    share = 100 * found["settings"]["fraction"]
    told = f"{share:.0f} % of the training photos, seeds {', '.join(seeds_of(found))}, rate {rate_of()}. {ran}."
    return f"{told}\n\n" + "\n".join(lines)


def seeds_of(found: Figures) -> list[str]:
    return sorted({str(one["seed"]) for one in found["measured"].values()})


def rate_of() -> str:
    from levels import RECIPES  # pyright: ignore[reportMissingImports]

    return ", ".join(dict.fromkeys(f"{RECIPES[level].suffix_rate:g}" for level in ("75", "50")))


def compared(each: Sequence[Figures], usual: Sequence[Figures]) -> str:
    from torchrecycle.sweep.estimates import difference

    counts = each[0]["counts"]
    clusters = [number for number, count in enumerate(counts) for _ in range(count)]

    def expanded(one: Figures) -> list[float]:
        return [score for score, count in zip(one["by_model"], counts, strict=True) for _ in range(count)]

    found = difference([expanded(one) for one in each], [expanded(one) for one in usual], clusters)
    return f"{100 * found.mean:+.1f} ± {100 * found.error:.1f} points"


# -- plots -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    colour: str
    x: list[float]
    y: list[float]
    error: list[float] | None = None


def draw(path: Path, panels: Sequence[tuple[str, str, str, Sequence[Line]]], *, log: bool = False) -> None:
    """A plot with a panel for each ``(title, x label, y label, lines)``."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "torchrecycle", "font.size": 9}
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (title, x, y, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in lines:
            axes.errorbar(line.x, line.y, line.error, label=line.label, color=line.colour, marker="o", ms=4, capsize=2)
        axes.set(title=title, xlabel=x, ylabel=y)
        if log:
            axes.set_xscale("log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def plot_levels(page: Path) -> None:
    panels = []
    titles = {"levels": "Similar cars", "questions": "Questions and answers", "classification": "Questions by service"}
    for name, title in titles.items():
        result = read(name) or read(f"{name}-50")
        if result is None:
            continue
        metric = result["metric"]
        ordered = sorted(result["levels"], key=lambda each: each["share"])
        share = [100 * level["share"] for level in ordered]
        quality = [level["quality"][metric] for level in ordered]
        ours = Line("trained", "#1f6fb2", share, [q["mean"] for q in quality], [q["error"] for q in quality])
        before = result["untrained"][metric]["mean"]
        panels.append(
            (title, "blocks recycled, %", metric, [ours, Line("untrained", "#888888", [0, 100], [before] * 2)])
        )
    if panels:
        draw(page.parent / "experiments-levels.svg", panels)


def plot_seconds(page: Path) -> None:
    """An epoch in each way, by level."""
    found = read("seconds")
    if found is None:
        return
    panels = []
    for each in found["measured"].values():
        names = list(each["levels"])
        share = [{"50": 50.0, "75": 75.0, "head": 100.0}[name] for name in names]
        ways = (("frozen", "frozen, no store", "#c4561b"), ("recycled", "recycled", "#1f6fb2"))
        lines = [Line(label, colour, share, [each["levels"][n][way] for n in names]) for way, label, colour in ways]
        full = Line("full training", "#444444", [0.0, 100.0], [each["full"]] * 2)
        panels.append((each["task"], "blocks recycled, %", "seconds per epoch", [full, *lines]))
    draw(page.parent / "experiments-seconds.svg", panels)


def plot_amount(page: Path) -> None:
    results = of_fractions()
    if len(results) < 2:
        return
    metric = next(iter(results.values()))["metric"]
    lines = []
    for name in ("head", "75", "50", "full"):
        points = [
            (result["ran"]["splits"]["train"], level["quality"][metric])
            for result in results.values()
            for level in result["levels"]
            if level["level"] == name
        ]
        lines.append(
            Line(
                words(name),
                COLOURS[name],
                [x for x, _ in points],
                [q["mean"] for _, q in points],
                [q["error"] for _, q in points],
            )
        )
    draw(page.parent / "experiments-amount.svg", [("Similar cars", "photos to train on", metric, lines)], log=True)


def plot_speed(page: Path) -> None:
    found = speeds()
    if not found:
        return
    panels = [
        (f"50 % recycled, {purpose}", "parameters, millions", "times faster", list(speed_lines(found, purpose)))
        for purpose in ("training", "inference")
    ]
    draw(page.parent / "experiments-speed.svg", panels, log=True)


def speed_lines(found: Sequence[Figures], purpose: str) -> Iterator[Line]:
    colours = iter(["#1f6fb2", "#7fb2dd", "#0b3c68", "#c4561b", "#e8a87c", "#7a2f05"])
    for family in ("ResNet", "BERT"):
        mine = [one for one in found if (family == "ResNet") == one["model"].startswith("ResNet")]
        for machine in dict.fromkeys(machine_of(one) for one in mine):
            points = sorted(
                (one["parameters"] / 1e6, one["full"][purpose] / one["levels"]["50%"][purpose])
                for one in mine
                if machine_of(one) == machine
            )
            yield Line(f"{family}, {machine}", next(colours), [x for x, _ in points], [y for _, y in points])


# -- the page ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str | None]] = {
    "levels": levels,
    "amount": amount,
    "questions": questions,
    "classification": classification,
    "seconds": seconds,
    "speed": speed,
    "levers": levers,
}


PLOTS = {
    "levels": "Quality against the share of blocks recycled",
    "amount": "Quality against the number of photos to train on",
    "seconds": "Seconds of an epoch in full, frozen and recycled",
    "speed": "Times faster against the number of parameters",
}


def put(text: str, name: str, part: str) -> str:
    if name in PLOTS:
        part += f"\n\n![{PLOTS[name]}](experiments-{name}.svg)"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"the page has no place for '{name}': put {begin} and {end} on lines of their own")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{part}\n\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page: Path = parser.parse_args().page
    text = page.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        part = make()
        if part:
            text = put(text, name, part)
    page.write_text(text, encoding="utf-8")
    for plot in (plot_levels, plot_amount, plot_seconds, plot_speed):
        plot(page)


if __name__ == "__main__":
    main()

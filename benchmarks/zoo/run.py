"""Hundreds of models, each cut in three places and judged: ``make zoo``.

``python benchmarks/zoo/run.py --library timm`` cuts the smallest model of each of timm's 98 modules. Two processes with
one torch thread each; every finished model is written down at once and not repeated by the next run, unless the
versions or the commit of torchrecycle have changed or ``--fresh`` is given. At the end the whole is kept under
``benchmarks/results/zoo-*.json`` and, with ``--table docs/zoo.md``, written as a page. ``--sample`` takes a dozen cheap
models of all libraries in under three minutes. Exit code 1 if anything is wrong, crashed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent
sys.path[:0] = [str(ZOO), str(ZOO.parent)]

import torch  # noqa: E402
from check import LEVELS  # noqa: E402
from libraries import LIBRARIES, cases_of  # noqa: E402
from pool import run_all  # noqa: E402
from table import failed, page, summary  # noqa: E402

from bench import RESULTS, machine  # noqa: E402

SAMPLE = {
    "torchvision": ["resnet18", "squeezenet1_1", "vit_l_32"],
    "timm": ["test_convnext2", "test_efficientnet", "test_vit3"],
    "transformers": ["bert", "gpt2", "llama", "t5"],
    "sentence-transformers": ["mean pooling"],
    "diffusers": ["AutoencoderKL, encoder", "DiTTransformer2DModel"],
}
"""Cheap models of all kinds."""


def installed() -> list[str]:
    """The libraries that are there: `make test` does without two of them."""
    return [library for library in LIBRARIES if versions()[library] != "none"]


def sample() -> list[tuple[str, str]]:
    """The cheap models as (library, name)."""
    return [(library, name) for library, names in SAMPLE.items() if library in installed() for name in names]


# -- remembering -------------------------------------------------------------------------------------------------------


def commit() -> str:
    """Which torchrecycle this is: its commit, with a plus where files under src are changed."""
    head = _git("rev-parse", "--short=10", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--", "src") else "")


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ZOO.parents[1], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """The packages that results depend on."""
    names = ["torch", *LIBRARIES]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


class Progress:
    """Finished models, a line of JSON each, written at once.

    Args:
        path: the file.
        stamp: what a result depends on; lines with another one do not count.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path, self.stamp = path, stamp

    def load(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The results that still count. A line that was cut off by a kill does not."""
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                report = json.loads(line)
            except json.JSONDecodeError:
                continue
            if report.pop("stamp", None) == self.stamp:
                found[report["library"], report["name"]] = report
        return found

    def add(self, report: dict[str, Any]) -> None:
        """Write one down."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**report, "stamp": self.stamp}) + "\n")


# -- running -----------------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The models that were asked for."""
    if options.sample:
        return sample()
    names = [(library, name) for library in options.library or installed() for name in cases_of(library)]
    return [pair for pair in names if any(part in "/".join(pair) for part in options.only or [""])]


def told(report: dict[str, Any], done: int, of: int) -> str:
    """One line for the terminal."""
    marks = {"equal": "=", "refused": "-", "wrong": "WRONG", "crash": "CRASH"}
    cuts = " ".join(f"{marks[cut['state']]}{cut['level']:.2f}" for cut in report["cuts"]) or report.get("reason", "")
    useful = "" if report.get("useful") or report["status"] == "untested" else "  (no useful cut)"
    name = f"{report['library']}/{report['name']}"
    return f"[{done:>3}/{of}] {report['seconds']:6.1f} s  {name:<58} {report['status']:<8} {cuts[:90]}{useful}"


def run(
    names: Sequence[tuple[str, str]], progress: Progress | None, jobs: int, limit: float, **options: Any
) -> list[dict[str, Any]]:
    """What is found for all of them, in their order; what is known already is not done again."""
    known = progress.load() if progress else {}
    found = {pair: known[pair] for pair in names if pair in known}
    if found:
        print(f"{len(found)} of {len(names)} models are known from before ({progress.path if progress else ''})")
    for report in run_all([pair for pair in names if pair not in found], jobs, limit, **options):
        found[report["library"], report["name"]] = report
        if progress:
            progress.add(report)
        print(told(report, len(found), len(names)), flush=True)
    return [found[pair] for pair in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=list(LIBRARIES), help="only this one; may be repeated")
    parser.add_argument("--only", action="append", metavar="SUBSTRING", help="only models whose library/name has it")
    parser.add_argument("--sample", action="store_true", help="a dozen cheap models, in under three minutes")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--stale", action="store_true", help="keep what was found at other commits of torchrecycle")
    parser.add_argument("--around", action="append", type=float, metavar="LEVEL", help="instead of 0.25, 0.5 and 0.75")
    parser.add_argument("--list", action="store_true", help="also keep what cuts() says of each model (takes longer)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per model")
    parser.add_argument("--progress", type=Path, default=ZOO / ".progress.jsonl", help="what is finished, line by line")
    parser.add_argument("--out", type=Path, help="the JSON file; without it, one under benchmarks/results")
    parser.add_argument("--table", type=Path, help="also write a page, such as docs/zoo.md")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    about: dict[str, Any] = {"command": "make zoo", "arguments": list(sys.argv[1:] if arguments is None else arguments)}
    about |= {
        "levels": list(options.around or LEVELS),
        "stale": options.stale,
        "date": date.today().isoformat(),
        "machine": machine(),
        "commit": commit(),
    }
    about |= {"python": platform.python_version(), "torch": torch.__version__, "versions": versions()}
    stamp = {"versions": about["versions"], "commit": "any" if options.stale else about["commit"]}
    stamp["levels"] = about["levels"]
    if options.fresh:
        options.progress.unlink(missing_ok=True)
    progress = Progress(options.progress, stamp)
    how = {"levels": tuple(about["levels"]), "listing": options.list}
    reports = run(chosen(options), progress, options.jobs, options.limit, **how)
    found = summary(reports)
    about["seconds"] = round(time.perf_counter() - began)
    tell(found)
    slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
    out = options.out or RESULTS / f"zoo-{slug}-{about['date']}.json"
    if options.out or not (options.sample or options.only or options.library):
        out.write_text(json.dumps({"about": about, "summary": found, "models": reports}, indent=1) + "\n")
        print(f"kept as {out}")
    if options.table:
        options.table.write_text(page(about, found, reports), encoding="utf-8")
    return int(failed(found["all"]))


def tell(found: dict[str, Any]) -> None:
    """The counts, and whatever should not be."""
    for library, counts in [*found["libraries"].items(), ("all", found["all"])]:
        print(
            f"{library:<22} {counts['models']:>4} models, {counts['useful']:>4} cut usefully "
            f"({counts['useful_share']:.0%}); {counts['cuts']} cuts: {counts['equal']} equal, {counts['refused']} "
            f"refused, {counts['wrong']} wrong, {counts['crash']} crashed; {counts['lost']} out of time, "
            f"{counts['untested']} untested"
        )
    for kind, row in found["refusals"].items():
        print(f"  refused: {row['count']:>4} ({row['share']:.1%}) {kind}")


if __name__ == "__main__":
    sys.exit(main())

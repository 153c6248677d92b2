"""What the zoo found, as numbers and as a page.

`summary` counts per library; `page` writes the same as Markdown, with the refusals by kind and a line per model:
``| `vit_tiny_patch16_224` | vision_transformer | 3/3 equal | 0.25 `blocks.2`, ... |``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

STATES = ("equal", "refused", "wrong", "crash")


def summary(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts per library, and refusals by kind over all."""
    libraries = list(dict.fromkeys(report["library"] for report in reports))
    every = [cut for report in reports for cut in report["cuts"]]
    refused = Counter(cut["kind"] for cut in every if cut["state"] == "refused")
    later = Counter(kind for cut in every for kind in {one["kind"] for one in cut["second"]})
    return {
        "libraries": {library: _counts([r for r in reports if r["library"] == library]) for library in libraries},
        "all": _counts(reports),
        "refusals": _shares(refused, len(every)),
        "refusals_of_a_second_batch": _shares(later, sum(cut["state"] == "equal" for cut in every)),
    }


def _counts(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tested = [r for r in reports if r["status"] != "untested"]
    cuts = [cut for report in reports for cut in report["cuts"]]
    states = Counter(cut["state"] for cut in cuts)
    lost = sum(r["status"] in ("crash", "timeout") and not r["cuts"] for r in reports)
    useful = sum(bool(r.get("useful")) for r in tested)
    return {
        "models": len(reports),
        "useful": useful,
        "useful_share": round(useful / max(len(tested), 1), 4),
        "cuts": len(cuts),
        **{state: states[state] for state in STATES},
        "lost": lost,
        "untested": len(reports) - len(tested),
        "hits": sum(cut["hits"] for cut in cuts),
        "gradients": sum(cut.get("gradients", 0) for cut in cuts),
        "seconds": round(sum(r["seconds"] for r in reports)),
    }


def _shares(kinds: Counter[str], of: int) -> dict[str, dict[str, Any]]:
    return {kind: {"count": n, "share": round(n / max(of, 1), 4)} for kind, n in kinds.most_common()}


def failed(counts: dict[str, Any]) -> bool:
    """Whether anything is wrong, crashed, or ran out of time."""
    return bool(counts["wrong"] or counts["crash"] or counts["lost"])


def page(about: dict[str, Any], found: dict[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    """The Markdown page."""
    return "\n".join([*_head(about, found), *_refusals(found), *_models(reports)]) + "\n"


def _head(about: dict[str, Any], found: dict[str, Any]) -> list[str]:
    rows = [*found["libraries"].items(), ("all", found["all"])]
    return [
        "# The zoo: which models can be cut",
        "",
        f"Made by `make zoo`: {about['date']}, {about['machine']}, torch {about['torch']}; torchrecycle at "
        f"`{about['commit']}`{' and before' if about['stale'] else ''}. Each model has random weights and is cut after "
        f"about {', '.join(f'{level:.0%}' for level in about['levels'])} of its blocks. *Equal*: "
        "outputs to the bit for the same batch, from kept rows and raw; gradients of the "
        "suffix within rounding of a prefix frozen by hand; a second batch of another size (and length, and padding) "
        "within rounding; and as before after `detach`. *Useful*: such a cut between 25 % and 75 % of the blocks or of "
        "the operations. Where both halves read a parameter, the cut is tried again with `share='freeze'`, as the "
        "refusal advises. *Untested*: the model does not run without us either.",
        "",
        "| library | models | cut usefully | cuts tried | equal | refused | wrong | crashed | out of time | untested |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {c['models']} | {c['useful']} ({c['useful_share']:.0%}) | {c['cuts']} | {c['equal']} | "
            f"{c['refused']} | {c['wrong']} | {c['crash']} | {c['lost']} | {c['untested']} |"
            for name, c in rows
        ),
        "",
    ]


def _refusals(found: dict[str, Any]) -> list[str]:
    lines = []
    for title, name in (
        ("Why cuts are refused (share of the cuts tried)", "refusals"),
        ("What working cuts refuse for a second batch (share of the working cuts)", "refusals_of_a_second_batch"),
    ):
        lines += [f"## {title}", "", "| reason | count | share |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {row['count']} | {row['share']:.1%} |" for kind, row in found[name].items()]
        lines += [""] if found[name] else ["| none | 0 | 0 % |", ""]
    return lines


def _models(reports: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## Model by model", ""]
    for library in dict.fromkeys(report["library"] for report in reports):
        lines += [
            f"### {library}",
            "",
            "| model | kind | parameters | result | cuts |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_model(report) for report in reports if report["library"] == library]
        lines.append("")
    return lines[:-1]


def _model(report: dict[str, Any]) -> str:
    size = f"{report['parameters'] / 1e6:.1f} M" if "parameters" in report else ""
    states = Counter(cut["state"] for cut in report["cuts"])
    result = ", ".join(f"{states[s]} {s}" for s in STATES if states[s]) or f"{report['status']}"
    what = "; ".join(_cut(cut) for cut in report["cuts"]) or str(report.get("reason", ""))[:160].replace("|", "/")
    return f"| `{report['name']}` | {report.get('module', '')} | {size} | {result} | {what} |"


def _cut(cut: dict[str, Any]) -> str:
    text = f"{cut['level']:.2f} `{cut['name']}`"
    if cut["state"] == "refused":
        return f"{text} refused: {cut['kind']}"
    if cut["state"] != "equal":
        return f"{text} **{cut['state']}**"
    later = sorted({one["kind"] for one in cut["second"]})
    notes = ["with share='freeze'"] * ("share" in cut) + [f"but for a second batch: {kind}" for kind in later]
    return f"{text} ({'; '.join(notes)})" if notes else text

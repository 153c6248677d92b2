"""A sweep in a notebook: the recommendation, the table and the plots as one fragment of HTML.

It is a light card whatever the notebook's theme is, with plots as PNG, since notebooks on the web drop SVG and know no
variables of ours. Without matplotlib it is the same without plots: to show a value must not fail.
"""

from __future__ import annotations

from torchrecycle.report.colours import LIGHT
from torchrecycle.report.levels import levels_table
from torchrecycle.report.markup import data_uri, sentence, text
from torchrecycle.report.plots import ReportError, plots_of, to_png
from torchrecycle.sweep.results import SweepResult

__all__ = ["html_of"]

_CSS = """
.torchrecycle{color-scheme:light;background:var(--card);color:var(--ink);padding:1rem;border:1px solid var(--line);
border-radius:6px;max-width:75rem;font-family:system-ui,sans-serif;line-height:1.45}
.torchrecycle .sentence{font-size:1.25rem;max-width:60ch;margin:0 0 1rem;color:var(--ink)}
.torchrecycle .loud{background:var(--loud);color:var(--loud-ink);border:2px solid var(--loud-line);padding:.5rem .75rem}
.torchrecycle .scroll{overflow-x:auto}
.torchrecycle table.levels{border-collapse:collapse;font-size:.85rem;color:var(--ink);background:var(--card)}
.torchrecycle caption{text-align:left;font-weight:600;padding:.25rem 0}
.torchrecycle .levels th,.torchrecycle .levels td{padding:.35rem .6rem;text-align:right;vertical-align:top;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums;color:var(--ink);background:var(--card);
white-space:nowrap}
.torchrecycle .levels thead th,.torchrecycle .levels .verdict{white-space:normal}
.torchrecycle .levels small,.torchrecycle .levels .tag{display:block;width:fit-content}
.torchrecycle .levels tbody th,.torchrecycle .levels .words{text-align:left}
.torchrecycle .levels .taken>*{background:var(--tint)}
.torchrecycle .mark{width:.8em;height:.8em;margin-right:.4em}
.torchrecycle .tag{border:1px solid;border-radius:3px;padding:0 .3em;font-size:.8em}
.torchrecycle .verdict{min-width:16ch}
.torchrecycle .plots{display:flex;flex-wrap:wrap;gap:1rem;margin-top:1rem}
.torchrecycle .plots img{width:360px;max-width:100%;height:auto}
"""


def html_of(result: SweepResult) -> str:
    """A fragment for ``_repr_html_``; its style touches nothing outside of it."""
    colours = "".join(f"--{name}:{value};" for name, value in LIGHT.items())
    loud = (
        '<p class="loud"><strong>The weights are random, because none were given: the figures say nothing about a '
        "pretrained model.</strong></p>"
        if result.ran.random_weights
        else ""
    )
    return (
        f'<div class="torchrecycle"><style>.torchrecycle{{{colours}}}{_CSS}</style>{loud}'
        f'<p class="sentence">{sentence(result.recommendation.sentence)}</p>'
        f"{levels_table(result)}{_plots(result)}</div>"
    )


def _plots(result: SweepResult) -> str:
    try:
        drawn = [(plot, data_uri("image/png", to_png(plot))) for plot in plots_of(result)]
    except ReportError as error:
        return f"<p>{text(error)}</p>"
    images = "".join(f'<img src="{uri}" alt="{text(f"{plot.title}. {plot.description}")}">' for plot, uri in drawn)
    return f'<div class="plots">{images}</div>'

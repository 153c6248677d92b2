"""Figures as a reader wants them: ``63.1`` seconds, ``2.7×``, ``73.5`` MB, ``4 min 23 s``.

One place, so that the page, the terminal and a notebook say the same of the same run. What is not known is an empty
string, never a nought.
"""

from __future__ import annotations

import math
import re

from torchrecycle.sweep.results import Estimate

__all__ = [
    "clean",
    "count",
    "duration",
    "estimate",
    "figure",
    "megabytes",
    "percent",
    "rate",
    "seconds",
    "shortened",
    "signed",
    "times",
]

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def clean(text: object) -> str:
    """A text without what no file can hold (half surrogates, as in names of files that are not UTF-8) and what no
    page or SVG may (control characters): each becomes a replacement character.

    >>> clean("a\\x00b"), clean("caf\\udce9")
    ('a\ufffdb', 'caf?')
    """
    return _CONTROLS.sub("\ufffd", str(text).encode("utf-8", "replace").decode("utf-8"))


def shortened(text: str, length: int) -> str:
    """
    >>> shortened("How long does a stone need to dry?", 20)
    'How long does a…'
    """
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    cut = text[:length]
    at_a_word = cut.rsplit(" ", 1)[0]
    return (at_a_word if len(at_a_word) > length // 2 else cut).rstrip(" ,;:") + "…"


def count(number: int, what: str) -> str:
    """
    >>> count(1, "epoch"), count(1200, "epoch")
    ('1 epoch', '1,200 epochs')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def figure(value: float | None, digits: int = 3) -> str:
    """
    >>> figure(0.93551), figure(None), figure(float("nan"))
    ('0.936', '', 'not a number')
    """
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not a number"


def estimate(value: Estimate) -> str:
    """With its error if one is known.

    >>> estimate(Estimate(0.93551, 0.00211)), estimate(Estimate(0.5, 0.0))
    ('0.936 ± 0.002', '0.500')
    """
    return figure(value.mean) + (f" ± {figure(value.error)}" if value.error else "")


def signed(value: Estimate) -> str:
    """A difference, with its error if one is known.

    >>> signed(Estimate(0.0193, 0.0083)), signed(Estimate(-0.5, 0.0))
    ('+0.019 ± 0.008', '−0.500')
    """
    if not math.isfinite(value.mean):
        return figure(value.mean)
    sign = "−" if value.mean < 0 else "+"
    return sign + estimate(Estimate(abs(value.mean), value.error))


def seconds(value: float | None) -> str:
    """With as many digits as can be trusted.

    >>> seconds(0.1357), seconds(63.14), seconds(1234.5)
    ('0.14', '63.1', '1,234')
    """
    if value is None:
        return ""
    return figure(value, 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0)


def duration(value: float) -> str:
    """
    >>> duration(5.25), duration(263.1), duration(7505)
    ('5.2 s', '4 min 23 s', '2 h 5 min')
    """
    if not math.isfinite(value) or value < 60:
        return f"{figure(value, 1)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours:,} h {minutes} min"


def times(value: float | None) -> str:
    """
    >>> times(2.695), times(463.2), times(None)
    ('2.7×', '463×', '')
    """
    return "" if value is None else f"{figure(value, 1 if abs(value) < 100 else 0)}×"


def megabytes(value: int) -> str:
    """
    >>> megabytes(73_525_296), megabytes(4_096)
    ('73.5', '0.004')
    """
    return figure(value / 1e6, 1 if value == 0 or value >= 1e5 else 3)


def percent(share: float) -> str:
    """
    >>> percent(0.4286)
    '43 %'
    """
    return f"{share * 100:.0f} %"


def rate(value: float) -> str:
    """
    >>> rate(3e-3), rate(0.0), rate(1e-05)
    ('0.003', '0', '1e-05')
    """
    return f"{value:g}"

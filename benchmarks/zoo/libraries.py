"""Which file lists the models of which library; loaded when that library is asked for."""

from __future__ import annotations

import functools
import importlib

from cases import Case

LIBRARIES = {
    "torchvision": "torchvision_cases",
    "timm": "timm_cases",
    "transformers": "transformers_cases",
    "sentence-transformers": "other_cases",
    "diffusers": "other_cases",
}


@functools.cache
def cases_of(library: str) -> dict[str, Case]:
    """A library's cases, by name."""
    listed = importlib.import_module(LIBRARIES[library]).cases()
    return {case.name: case for case in listed if case.library == library}


def find_case(library: str, name: str) -> Case:
    """One case."""
    return cases_of(library)[name]

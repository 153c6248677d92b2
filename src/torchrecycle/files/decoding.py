"""The bytes of a picture file -> the picture in RGB, upright, whatever the file holds; or why it cannot be had.

A folder from the web holds JPEGs in CMYK, GIFs with a palette, PNGs with alpha or 16 bits of grey, and photos that a
phone has turned only by an Exif tag. All come out as a person sees them: turned, on white where they are transparent.
Of a moving picture the first frame counts. Grey of 16 bits keeps its upper eight: the scale is that of the format and
not of the one picture, so that dark pictures stay dark. Decoding is safe in threads.
"""

from __future__ import annotations

import io
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrecycle.files.errors import DataError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decode", "quiet"]


class _Undecodable(Exception):
    """Why the bytes are no picture, in words."""


def decode(data: bytes) -> Image:
    """The picture that is in ``data``, in mode RGB, fully read: it does not need ``data`` any longer.

    Raises:
        ValueError: if there is none; the message is why, without a name.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise DataError("reading pictures needs pillow: pip install pillow") from None
    try:
        with quiet(), Image.open(io.BytesIO(data)) as image:
            _check_size(image, Image.MAX_IMAGE_PIXELS)
            image.load()
            _turn(image, ImageOps)
            return _to_rgb(image, Image)
    except _Undecodable as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError as error:
        raise ValueError(_huge(str(error), Image.MAX_IMAGE_PIXELS)) from None
    except UnidentifiedImageError:
        raise ValueError(_what_it_is(data)) from None
    # Decoders raise whatever broken bytes lead them to: struct.error, SyntaxError, IndexError and others.
    except Exception as error:
        raise ValueError(_one_line(error)) from None


def _check_size(image: Image, most: int | None) -> None:
    width, height = image.size
    if most and width * height > most:
        raise _Undecodable(f"it has {width:,} x {height:,} pixels, more than the {most:,} that PIL takes for safe")


def _huge(said: str, most: int | None) -> str:
    """Of a picture that PIL does not even open, only its words tell the size."""
    found = re.search(r"\d+", said)
    count = f"{int(found[0]):,} pixels, " if found else ""
    return f"it has {count}more than the {most or 0:,} that PIL takes for safe"


def _turn(image: Image, operations: Any) -> None:
    try:
        operations.exif_transpose(image, in_place=True)
    except Exception:
        # Broken Exif data say nothing about how to turn; the pixels are whole.
        return


def _to_rgb(image: Image, pillow: Any) -> Image:
    if image.mode.startswith("I") or image.mode == "F":
        return pillow.fromarray(_to_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", clear.size, "white"), clear).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _to_eight_bits(image: Image) -> np.ndarray:
    """Grey of 16 or 32 bits, or in floats."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F" and values.max() <= 1.0:
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    full = 255.0 if image.mode == "F" and values.max() <= 255.0 else max(65535.0, float(values.max()))
    return (values.clip(0) * (255.0 / full)).round().astype(np.uint8)


def _what_it_is(data: bytes) -> str:
    if not data:
        return "it is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: run `git lfs pull`"
    if data.lstrip()[:1] == b"<":
        return "it holds HTML or XML"
    return "it is of no format that PIL knows"


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


# ---------------------------------------------------------------------------------------------------- warnings

_lock = threading.Lock()
_inside = 0
_filters: Any = None


@contextmanager
def quiet() -> Iterator[None]:
    """PIL's warnings about metadata, which nobody can act on, are not shown. Safe in threads, and can be nested."""
    global _inside, _filters
    if getattr(sys.flags, "context_aware_warnings", False):
        with warnings.catch_warnings():
            _ignore()
            yield
        return
    # catch_warnings() restores a list of the whole process: in threads, the first in and the last out must do it.
    with _lock:
        if _inside == 0:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            _ignore()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _filters.__exit__(None, None, None)


def _ignore() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\b")

"""Images of samples: read with a reason where that fails, and made small enough to stand inside a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from .samples import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 256  # pixels of the longer side of a thumbnail


def read_image(sample: Sample, side: int = SIDE) -> Image | str:
    """The image of a sample, at most `side` pixels in each direction, RGB or RGBA; or why there is none, in words."""
    from ..recipes.image_files import open_layered

    if sample.path is None:
        return "no image recorded"
    name = sample.path.name
    if sample.folder is not None and not sample.path.resolve().is_relative_to(sample.folder.resolve()):
        return f"{name} lies outside the folder of the records"
    if not sample.path.is_file():
        return f"no file {name}"
    try:
        picture = open_layered(sample.path)
    except ValueError:
        return f"{name} is no whole image"
    picture.thumbnail((side, side))
    return picture


def data_uri(picture: Image) -> str:
    """An image as the address of itself: PNG where it is small or transparent, else JPEG."""
    buffer = io.BytesIO()
    if picture.mode == "RGBA" or max(picture.size) <= 64:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

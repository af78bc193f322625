"""Images of the user: which files count as images, and the one way to open them, as 8-bit RGB or RGBA.

Where PIL's own conversion would give a wrong image in silence, this module scales or refuses:

- Grey images of 10 to 16 bits (PIL's modes I;16 and I) are scaled from the range of their type; PIL clips
  them at 255.
- Floating-point images (mode F) run from 0 to 1, which becomes 0 to 255. Other values, NaN and infinity are refused,
  since a range read off each image would make images of one data set incomparable.
- Whole numbers of 32 bits or with a sign have no usual range of brightness and are refused.
- A TIFF with several pages is refused. Of an animation (GIF, WebP, PNG) the first frame is read.

All images are turned upright as their EXIF entry says. What is transparent becomes white in RGB.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ...messages import first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHECKED = 2000  # images that are decoded before training
DARK = 16  # of 255: the brightest value of 12 bits in a file of 16

_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_TO_65535 = ("PNG", "PPM")  # formats that PIL before 11 gives as mode I, brought to 16 bits
_BITS, _PHOTOMETRIC, _SUBFILE = 258, 262, 254  # tags of TIFF
_WHITE = (255, 255, 255, 255)

File = str | PathLike[str]


class _Unusable(ValueError):
    """An image that can be decoded, but not turned into brightness without a guess."""


def open_image(file: File | bytes, size: int | None = None, *, name: object = None) -> Image.Image:
    """An image file as 8-bit RGB, upright as its EXIF entry says, transparent parts white.

    Args:
        file: the file, or its bytes.
        size: the size that is wanted in the end, if known: a much larger JPEG is decoded at a half, a quarter or an
            eighth of its size then, which is faster.
        name: what messages call it; None for the file's name.

    Raises:
        ValueError: if it cannot be read as an image, or its values have no known range; names the file.
    """
    return _on_white(open_layered(file, size, name=name))


def open_layered(file: File | bytes, size: int | None = None, *, name: object = None) -> Image.Image:
    """Open an image as `open_image`, but as RGBA where it has transparent parts."""
    named = file if name is None and not isinstance(file, bytes) else name
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))
            return layered(image)
    except _Unusable as error:
        raise ValueError(f"{named}: {error}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{named}: expected an image, but {_reason(error)}; replace or remove it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    kind = "of no kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return f"cannot be read ({kind})"


def opaque(image: Image.Image) -> Image.Image:
    """An opened image of any mode as 8-bit RGB, upright, with white behind what is transparent.

    Raises:
        ValueError: if its values have no known range.
    """
    return _on_white(layered(image))


def layered(image: Image.Image) -> Image.Image:
    """An opened image of any mode, upright, as 8-bit RGBA where it has transparent parts, else RGB.

    Raises:
        ValueError: if its values have no known range, or it is a TIFF with several pages.
    """
    _check_pages(image)
    upright = _eight_bits(image)
    return upright.convert("RGBA" if upright.has_transparency_data else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image upright, with 8 bits a channel."""
    if image.mode not in (*_GREY_16, "I", "F"):
        return ImageOps.exif_transpose(image)
    tags: Any = getattr(image, "tag_v2", {})
    most, inverted = _range_of(image, tags), tags.get(_PHOTOMETRIC) == 0  # PIL leaves "white is 0" to the reader here
    values = np.asarray(ImageOps.exif_transpose(image))
    if image.mode == "F":
        _check_floats(values)
    shares = np.clip(values.astype(np.float32) / most, 0, 1)
    grey = Image.fromarray(np.rint(255 * (1 - shares if inverted else shares)).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _range_of(image: Image.Image, tags: Any) -> int:
    """The value that stands for white."""
    if image.mode == "F":
        return 1
    if image.mode == "I" and image.format not in _TO_65535:
        raise _Unusable(
            "its values are whole numbers of 32 bits or with a sign, of which nothing says which is white; save all "
            "images as 8 or 16 bits without a sign"
        )
    bits = tags.get(_BITS, (16,))[0]
    return int(2**bits - 1)


def _check_floats(values: NDArray[np.float32]) -> None:
    strange = int(np.count_nonzero(~np.isfinite(values)))
    if strange:
        raise _Unusable(f"{strange} of its {values.size} values are NaN or infinite; replace them")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise _Unusable(
            f"its floating-point values run from {low:.4g} to {high:.4g}, expected 0 (black) to 1 (white); scale all "
            "images by the same rule, or save them as 8 or 16 bits"
        )


def _check_pages(image: Image.Image) -> None:
    """Refuse a TIFF of several pages; smaller copies of the first one and masks do not count."""
    frames = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or frames == 1:
        return
    tiff: Any = image
    pages = 0
    for frame in range(frames):
        tiff.seek(frame)
        pages += not tiff.tag_v2.get(_SUBFILE, 0) & 0b101
    tiff.seek(0)
    if pages > 1:
        raise _Unusable(f"it has {pages} pages, expected one; save the page that counts, or each as a file of its own")


def is_dark(image: Image.Image) -> bool:
    """Return whether nothing in an RGB image is brighter than `DARK` of 255."""
    return max(high for _, high in image.getextrema()) <= DARK  # type: ignore[misc,union-attr]


def dark_warning(where: object, dark: Sequence[object], count: int) -> str | None:
    """Return a warning where at least half of the images are almost black; None where they are not.

    Args:
        where: the data.
        dark: the images for which `is_dark` holds.
        count: how many were looked at.
    """
    if 2 * len(dark) < count or not dark:
        return None
    return (
        f"{where}: {len(dark)} of {count} images are almost black (nothing is brighter than {DARK} of 255), such as "
        f"{dark[0]}; values of 10 or 12 bits in a file of 16 have to be scaled to its full range: times 64 or 16"
    )


def left_out(place: object, count: int, example: object) -> str:
    """Return a warning for files that are no images by their names."""
    if count == 1:
        return f"{place}: 1 file is no image by its name and left out, {example}"
    return f"{place}: {count} files are no images by their name and left out, such as {example}"

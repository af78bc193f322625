"""Picture files of the user: which count as pictures, and how one is opened."""

from __future__ import annotations

from os import PathLike

from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHECKED = 2000  # pictures that are decoded before training


def open_picture(path: str | PathLike[str], size: int | None = None) -> Image.Image:
    """A picture file as RGB, upright as its EXIF entry says, transparent parts white.

    Args:
        path: the file.
        size: the size that is wanted in the end, if known: a much larger JPEG is decoded at a half, a quarter or an
            eighth of its size then, which is faster.

    Raises:
        ValueError: if it cannot be read as a picture; names the file.
    """
    try:
        with Image.open(path) as image:
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))
            return opaque(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        missing = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"{path}: expected a picture, but {missing}; replace or remove it") from error


def left_out(place: object, count: int, example: object) -> str:
    """What is said of files that are no pictures by their names."""
    if count == 1:
        return f"{place}: 1 file is no picture by its name and left out, {example}"
    return f"{place}: {count} files are no pictures by their name and left out, such as {example}"


def opaque(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")

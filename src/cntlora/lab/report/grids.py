"""Samples by method and step as files for documents: a grid of images, and texts beside the image they are about."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from .formats import DASH
from .sample_images import read_image
from .samples import Gallery, Sample, gallery_of
from .study import Study
from .tables import slug

NAMES, STEPS = 3, 5  # as many as are legible beside each other
LINES, LETTERS = 5, 34  # of a text, and of a line of it
# inches: the methods' names, an image of the grid, what parts two of them, what parts two samples
_LEFT, _CELL, _GAP, _PART = 1.3, 0.95, 0.03, 0.15
_WIDTH, _LINE, _SUBJECT = 2.0, 0.125, 1.35  # inches: a text, a line of it, the image it is about
_PIXELS = 192  # of an image
_SOFT = "#555555"


class _Sheet:
    """A figure to write and draw on, measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.size = (width, height)
        self.figure = Figure(figsize=self.size)

    def write(self, x: float, y: float, text: str, letters: int = 10**6, **look: Any) -> None:
        """A text whose upper left corner is at (x, y); one of more letters is cut."""
        text = text if len(text) <= letters else f"{text[: letters - 1].rstrip()}…"
        place = (x / self.size[0], 1 - y / self.size[1])
        usual: dict[str, Any] = {"fontsize": 7, "va": "top", "parse_math": False}
        self.figure.text(*place, text, **{**usual, **look})

    def draw(self, x: float, y: float, side: float, sample: Sample | None) -> None:
        """A sample's image in a square, or the reason why there is none."""
        found = DASH if sample is None else read_image(sample, _PIXELS)
        if isinstance(found, str):
            self.write(x + side / 2, y + side / 2, found, 26, fontsize=5, ha="center", va="center", color=_SOFT)
            return
        width, height = self.size
        axes = self.figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
        axes.set_axis_off()
        axes.imshow(found, interpolation="antialiased" if max(found.size) > 64 else "bicubic")

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=180)
        write_atomically(path, buffer.getvalue())


def save_grids(study: Study, folder: Path) -> list[Path]:
    """Write NAME-gallery.png, images by method and step (figures 2, 11 to 13), and NAME-captions.png (8, 14).

    Of the samples of each kind the first 3, with at most 5 steps. The same samples give the same bytes.

    Returns:
        The files; none for a kind without samples.
    """
    gallery = gallery_of(study, names=10**6, steps=STEPS, pictures=10**9)
    kinds: tuple[tuple[str, str, Callable[[Study, Gallery, list[str]], _Sheet]], ...]
    kinds = (("image", "gallery", _images), ("text", "captions", _captions))
    made = []
    for kind, name, sheet in kinds:
        names = gallery.of_kind(kind)[:NAMES] if gallery else []
        if gallery and names:
            made.append(Path(folder) / f"{slug(study.name)}-{name}.png")
            sheet(study, gallery, names).save(made[-1])
    return made


def _images(study: Study, gallery: Gallery, names: list[str]) -> _Sheet:
    """One row a method; side by side a block of columns for each name, one column a step."""
    block = (_CELL + _GAP) * len(gallery.steps) + _PART
    sheet = _Sheet(_LEFT + block * len(names) - _PART, 0.45 + (_CELL + _GAP) * len(gallery.methods))
    for i, method in enumerate(gallery.methods):
        y = 0.45 + (_CELL + _GAP) * i
        sheet.write(_LEFT - 0.08, y + _CELL / 2, study.labels[method], 20, ha="right", va="center", fontsize=8)
        for n, name in enumerate(names):
            for j, step in enumerate(gallery.steps):
                x = _LEFT + block * n + (_CELL + _GAP) * j
                sheet.draw(x, y, _CELL, gallery.cells.get((name, method, step)))
    for n, name in enumerate(names):
        sheet.write(_LEFT + block * n, 0.06, name, round(13 * block), fontsize=8, fontweight="bold")
        for j, step in enumerate(gallery.steps):
            x = _LEFT + block * n + (_CELL + _GAP) * j
            sheet.write(x + _CELL / 2, 0.28, f"step {step}", ha="center", color=_SOFT)
    return sheet


def _captions(study: Study, gallery: Gallery, names: list[str]) -> _Sheet:
    """One below the other a block for each name: its image at the left, texts by method (rows) and step (columns)."""
    blocks = {name: [_lines(gallery, name, method) for method in gallery.methods] for name in names}
    heights = {name: [max(map(len, row)) * _LINE + 0.1 for row in rows] for name, rows in blocks.items()}
    tall = {name: max(sum(heights[name]) + 0.2, _SUBJECT) + 0.45 for name in names}
    edge = 0.1 + (_SUBJECT + 0.15 if any(map(gallery.subject, names)) else 0.0)
    sheet, top = _Sheet(edge + _LEFT + _WIDTH * len(gallery.steps), sum(tall.values())), 0.0
    for name, rows in blocks.items():
        sheet.write(0.1, top + 0.08, name, 90, fontsize=8, fontweight="bold")
        if subject := gallery.subject(name):
            sheet.draw(0.1, top + 0.32, _SUBJECT, subject)
        for j, step in enumerate(gallery.steps):
            sheet.write(edge + _LEFT + _WIDTH * j, top + 0.32, f"step {step}", color=_SOFT)
        y = top + 0.52
        for method, row, height in zip(gallery.methods, rows, heights[name], strict=True):
            sheet.write(edge, y, study.labels[method], 20, fontweight="bold")
            for j, lines in enumerate(row):
                sheet.write(edge + _LEFT + _WIDTH * j, y, "\n".join(lines), linespacing=1.15)
            y += height
        top += tall[name]
    return sheet


def _lines(gallery: Gallery, name: str, method: str) -> list[list[str]]:
    """The lines of each step's text."""
    found = [gallery.cells.get((name, method, step)) for step in gallery.steps]
    texts = [DASH if sample is None else sample.text or "(empty)" for sample in found]
    return [textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" …") or [DASH] for text in texts]

"""Labelled images read from folders, tables and published data sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ....messages import first_line, warn_caller
from ..image_files import CHECKED, SUFFIXES, dark_warning, is_dark, left_out, opaque, open_image
from ..labels import class_column, known_classes, listed, warn_alike
from ..text.tables import read_table
from ..values import check_held_out

TABLES = (".csv", ".tsv", ".jsonl")
_HELD_OUT = ("test", "validation", "val")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def _open_file(source: Any, size: int) -> Image.Image:
    return open_image(source, size)


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes; an image is opened when it is needed.

    Attributes:
        sources: n files, or whatever `load` opens.
        labels: n class indices.
        names: of the classes.
        where: the folder, file or data set, for messages.
        load: (source, size that is wanted in the end) → RGB image of any size.
    """

    sources: Sequence[Any]
    labels: Sequence[int]
    names: tuple[str, ...]
    where: str
    load: Callable[[Any, int], Image.Image] = _open_file

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            found = f"only {self.names[0]!r}" if self.names else "none"
            raise ValueError(f"{self.where}: expected at least two classes, got {found}; add images of another class")

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: Sequence[int]) -> LabelledImages:
        """The given rows, in the given order."""
        sources, labels = [self.sources[i] for i in rows], [self.labels[i] for i in rows]
        return LabelledImages(sources, labels, self.names, self.where, self.load)

    def split(self, eval_size: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """Training and held-out images in random order, with the same shares of the classes.

        Args:
            eval_size: held-out images: a number from 1, or a share below 1.
            seed: the same seed gives the same split; no global generator is used.

        Raises:
            ValueError: if a class has one image only, or the images do not suffice.
        """
        counts = np.bincount(np.asarray(self.labels), minlength=len(self.names))
        few = [f"{self.names[i]!r} has {count}" for i, count in enumerate(counts) if count < 2]
        if few:
            raise ValueError(
                f"{self.where}: expected at least two images of each class, one to train on and one to hold out, but "
                f"class {few[0]}" + (f" (and {len(few) - 1} more classes)" if len(few) > 1 else "")
            )
        check_held_out(self.where, len(self), "images", eval_size, len(self.names))
        from sklearn.model_selection import train_test_split  # which takes seconds to import

        size = eval_size if eval_size < 1 else int(eval_size)
        train, held_out = train_test_split(
            range(len(self)), test_size=size, random_state=seed, stratify=list(self.labels)
        )
        return self.take(train), self.take(held_out)

    def limited(self, size: int | None, seed: int) -> LabelledImages:
        """Return at most `size` of the images, of each class in proportion and at least one; all of them for None."""
        if size is None or size >= len(self):
            return self
        if size < len(self.names):
            raise ValueError(f"{self.where}: train_size={size} is less than one for each of {len(self.names)} classes")
        order = np.random.default_rng(seed).permutation(len(self))
        labels = np.asarray(self.labels)[order]
        place = np.empty(len(self))  # of an image within its class, from 0 to 1
        for label in range(len(self.names)):
            rows = np.flatnonzero(labels == label)
            place[rows] = np.arange(len(rows)) / max(1, len(rows))
        return self.take(order[np.argsort(place, kind="stable")[:size]].tolist())

    def check(self, limit: int = CHECKED) -> None:
        """Decode the images, or `limit` of them evenly spread where there are more; warn if they are almost black.

        Raises:
            ValueError: at the first one that cannot be read; names it.
        """
        rows = range(len(self)) if len(self) <= limit else np.linspace(0, len(self) - 1, limit, dtype=int).tolist()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = list(pool.map(lambda row: is_dark(self.load(self.sources[row], 64)), rows))
        dark = [self.sources[row] for row, is_so in zip(rows, found, strict=True) if is_so]
        if said := dark_warning(self.where, dark, len(found)):
            warn_caller(said)


def read_images(
    data: str, *, image: str = "image", label: str = "label", split: str = "train", eval_split: str | None = None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Labelled images, and the held-out ones if the data set has them apart.

    Args:
        data: a folder with a subfolder of images for each class, or with `train` and `test` (or `validation`) that
            hold such subfolders; a .csv, .tsv or .jsonl file with image files (relative to the file) and classes; or
            the name of a published data set, `owner/name` or `owner/name:configuration`, that `datasets` loads.
        image, label: columns of a table or data set.
        split, eval_split: of a published data set.

    Raises:
        ValueError: if there is no such data, a class or column is missing, or there is no image; names the place.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _folders(path)
    if path.suffix.lower() in TABLES and path.is_file():
        return _table(path, image, label), None
    if path.exists():
        raise ValueError(f"{data}: expected a folder, or a file that ends in {', '.join(TABLES)}")
    if path.suffix.lower() not in TABLES and _HUB_NAME.fullmatch(data):
        return _published(data, image, label, split, eval_split)
    raise ValueError(
        f"{data}: there is no such folder or file; expected a folder with a subfolder for each class, a table "
        f"({', '.join(TABLES)}), or a published data set, owner/name"
    )


def _folders(root: Path) -> tuple[LabelledImages, LabelledImages | None]:
    """Images of class folders, or of a `train` and a held-out folder of them."""
    held_out = [name for name in _HELD_OUT if (root / name).is_dir()]
    if not ((root / "train").is_dir() and held_out):
        return class_folders(root), None
    train = class_folders(root / "train")
    other = class_folders(root / held_out[0])
    if set(other.names) - set(train.names):
        strange = sorted(set(other.names) - set(train.names))[0]
        raise ValueError(f"{other.where}: class {strange!r} is not among the classes of {train.where}")
    labels = [train.names.index(other.names[i]) for i in other.labels]
    return train, LabelledImages(other.sources, labels, train.names, other.where)


def class_folders(root: Path) -> LabelledImages:
    """The images under each subfolder, however deep; its name is the class. Other files are left out, with a warning.

    Hidden files and folders are ignored, and `__MACOSX`, which macOS puts into archives.

    Raises:
        ValueError: if there is no subfolder, or one without images.
    """
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    if not names:
        raise ValueError(f"{root}: expected a subfolder of images for each class, got none")
    sources: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for index, name in enumerate(names):
        files = sorted(p for p in (root / name).rglob("*") if p.is_file() and not _hidden(p, root))
        pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
        others += [p for p in files if p.suffix.lower() not in SUFFIXES]
        if not pictures:
            raise ValueError(f"{root / name}: no image is in it ({', '.join(SUFFIXES)}); add some or remove it")
        sources += pictures
        labels += [index] * len(pictures)
    warn_alike(Counter(names[i] for i in labels), str(root), "images")
    if others:
        warn_caller(left_out(root, len(others), others[0]))
    return LabelledImages(sources, labels, tuple(names), str(root))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _table(path: Path, image: str, label: str) -> LabelledImages:
    table = read_table(path, text=image, label=label, instead=None, settings=("task.image", "task.label", ""))
    files = [path.parent / Path(name).expanduser() for name in table.texts]
    for row, file in enumerate(files, start=1):
        if not file.is_file():
            raise ValueError(f"{path}: row {row}: there is no file {file}; names are relative to the table's folder")
    return LabelledImages(files, table.labels, tuple(table.names), str(path))


def _published(
    data: str, image: str, label: str, split: str, eval_split: str | None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Splits of a data set that `datasets` loads."""
    import datasets  # type: ignore[import-untyped]

    name, _, configuration = data.partition(":")
    try:
        parts = [datasets.load_dataset(name, configuration or None, split=s) for s in (split, eval_split) if s]
    except Exception as error:  # whatever it raises: there are many kinds, of the hub, the network and the format
        raise ValueError(
            f"{data}: there is no such folder, and no data set of that name loads ({first_line(error)})"
        ) from error
    for part in parts:
        for column in (image, label):
            if column not in part.column_names:
                existing = ", ".join(part.column_names)
                raise ValueError(f"{data}: there is no column {column!r}; its columns are: {existing}")
    names, values = _published_labels(parts, label, [f"{data}#{s}" for s in (split, eval_split) if s])
    train, *held_out = [
        LabelledImages(range(len(part)), labels, tuple(names), data, partial(_open_row, part, image, data))
        for part, labels in zip(parts, values, strict=True)
    ]
    return train, held_out[0] if held_out else None


def _published_labels(parts: Sequence[Any], label: str, where: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, and the class indices of each split."""
    found: list[tuple[list[int], list[str]]] = []
    for part, at in zip(parts, where, strict=True):
        values, given = list(part[label]), getattr(part.features[label], "names", None)
        if given is not None:
            found.append((known_classes(values, given, label, at), list(given)))
        else:
            found.append(class_column(values, label, at, regression=None, held_out=bool(found)))
    names = found[0][1]
    for (labels, others), at in zip(found, where, strict=True):
        strange = [row for row, i in enumerate(labels, start=1) if others[i] not in names]
        if strange:
            name = others[labels[strange[0] - 1]]
            raise ValueError(
                f"{at}: row {strange[0]}: class {name!r} is not in {where[0]}, whose classes are: {listed(names)}"
            )
    return names, [[names.index(others[i]) for i in labels] for labels, others in found]


def _open_row(part: Any, column: str, data: str, row: int, size: int) -> Image.Image:
    """The image of a row of a published data set; `size` is not needed, the image comes decoded."""
    value = part[row][column]
    if not isinstance(value, Image.Image):
        raise ValueError(f"{data}: row {row + 1}: expected an image in column {column!r}, got {type(value).__name__}")
    try:
        return opaque(value)
    except ValueError as error:
        raise ValueError(f"{data}: row {row + 1}: {error}") from error

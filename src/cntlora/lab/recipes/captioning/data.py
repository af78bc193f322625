"""Images with captions, of the user's own files or of scenes made here: read, checked and split before training."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ....messages import warn_caller
from ..frames import column, raw_column, read_frame
from ..image_files import CHECKED, SUFFIXES, dark_warning, is_dark, open_image
from ..values import check_held_out, one_of
from .scenes import Scene


@dataclass(frozen=True)
class CaptionRow:
    """An image, what is asked about it, and its caption.

    Attributes:
        where: file and row, for messages.
        image: file, the bytes of a file, or a scene.
        prompt: what is asked, with the row's values in the template's places.
        caption: the answer to learn.
        concept: what Recall looks for in a caption, such as "<*>" or a name; "" if there is none.
    """

    where: str
    image: Path | bytes | Scene
    prompt: str
    caption: str
    concept: str = ""

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            ValueError: if it is missing or no image; names file or row.
        """
        if isinstance(self.image, Scene):
            return self.image.draw()
        if isinstance(self.image, bytes):
            return open_image(self.image, name=self.where)
        try:
            return open_image(self.image)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Columns:
    """Names of columns: of the image, the caption, and, if there is one, the concept; `prompt` is a template."""

    image: str
    caption: str
    concept: str | None
    prompt: str
    identifier: str | None = None


def read_captions(source: str, columns: Columns) -> list[CaptionRow]:
    """Rows of a file (.jsonl, .csv, .tsv, .parquet), of a folder of images with .txt files, or of the hub.

    Paths of images are relative to the file. A field {name} of the prompt is filled from the column of that name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a missing column, an empty caption, a prompt field without a column, or a concept that no
            caption names; the message names the file and the row.
    """
    rows = _read_folder(Path(source), columns) if Path(source).is_dir() else _read_table(source, columns)
    check_concepts(rows, source)
    return rows


def _read_table(source: str, columns: Columns) -> list[CaptionRow]:
    frame = read_frame(source)
    images = raw_column(frame, columns.image, source, "task.image")
    captions = column(frame, columns.caption, source, "task.caption")
    named = columns.concept
    concepts = raw_column(frame, named, source, "task.concept") if named else [""] * len(captions)
    values = {name: column(frame, name, source, "task.prompt") for name in prompt_fields(columns.prompt)}
    base = Path(source).parent
    rows = []
    for i, caption in enumerate(captions):
        where = f"{source}: row {i + 1}"
        prompt = columns.prompt.format_map({name: of[i] for name, of in values.items()})
        concept = _concept(concepts[i], caption, columns.identifier)
        rows.append(CaptionRow(where, _image_of(images[i], base, where), prompt, caption.strip(), concept))
    return rows


def _concept(value: object, caption: str, identifier: str | None) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    return identifier if identifier and identifier in caption else ""


def _image_of(value: object, base: Path, where: str) -> Path | bytes:
    """An image's file or bytes; data sets of the hub hold {"bytes": …, "path": …}."""
    if isinstance(value, dict):
        content = value.get("bytes")
        if isinstance(content, bytes):
            return content
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected the file of an image, got {value!r}; fill or remove the row")
    file = base / value.strip()
    if not file.is_file():
        raise ValueError(f"{where}: {file}: expected an image, but there is no such file; replace or remove it")
    return file


def _read_folder(folder: Path, columns: Columns) -> list[CaptionRow]:
    fields = prompt_fields(columns.prompt)
    if fields:
        raise ValueError(
            f"task.prompt: {{{fields[0]}}} needs a column, and the folder {folder} has none; use a .jsonl or .csv file"
        )
    if columns.concept:
        raise ValueError(f"task.concept: the folder {folder} has no columns; name the concept with task.identifier")
    rows = []
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{file}: has no caption; expected it in {text.name} beside it")
        caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        if not caption:
            raise ValueError(f"{text}: the caption is empty; fill it, or remove it and {file.name}")
        rows.append(CaptionRow(str(text), file, columns.prompt, caption, _concept("", caption, columns.identifier)))
    if not rows:
        raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}) with a .txt of the same name, got none")
    return rows


def prompt_fields(prompt: str) -> list[str]:
    """The columns that a prompt names in braces.

    Raises:
        ValueError: if braces do not close.
    """
    try:
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None))
    except ValueError as error:
        raise ValueError(f"task.prompt: {error} in {prompt!r}; write {{{{ and }}}} for braces that stay") from error


def check_concepts(rows: Sequence[CaptionRow], source: str) -> None:
    """Check that each concept is named by a caption of its own.

    Raises:
        ValueError: names the concept and its first row.
    """
    first: dict[str, CaptionRow] = {}
    for row in rows:
        if row.concept:
            first.setdefault(row.concept, row)
    named = {row.concept for row in rows if row.concept and row.concept in row.caption}
    missing = [concept for concept in first if concept not in named]
    if missing:
        row = first[missing[0]]
        raise ValueError(
            f"{row.where}: the concept {missing[0]!r} is in none of its captions, so that it cannot be learnt; got "
            f"{row.caption!r}; write it into the captions of {source}"
        )


def check_pictures(rows: Sequence[CaptionRow]) -> None:
    """Decode the images, the first 2,000 at most, and warn if they are almost black.

    Raises:
        ValueError: for the first that is missing or broken.
    """
    dark = [row.where for row in rows[:CHECKED] if is_dark(row.open())]
    if said := dark_warning("the images of the captions", dark, len(rows[:CHECKED])):
        warn_caller(said)


def split_rows(
    rows: Sequence[CaptionRow], eval_size: int, seed: int, source: str
) -> tuple[list[CaptionRow], list[CaptionRow]]:
    """Training and held-out rows of `source`; each concept keeps its share in both where it has rows enough.

    Raises:
        ValueError: if the rows do not suffice; says what to set.
    """
    check_held_out(
        source, len(rows), "rows", eval_size, apart=None if source.startswith("sample:") else "task.eval_data"
    )
    from sklearn.model_selection import train_test_split  # which takes seconds to import

    concepts = [row.concept for row in rows]
    fewest = min(concepts.count(concept) for concept in set(concepts))
    groups = len(set(concepts))
    fits = groups > 1 and fewest > 1 and groups <= min(eval_size, len(rows) - eval_size)
    train, held_out = train_test_split(
        range(len(rows)), test_size=eval_size, random_state=seed, stratify=concepts if fits else None
    )
    return [rows[i] for i in train], [rows[i] for i in held_out]


def sample_rows(name: str, prompt: str, eval_size: int, seed: int) -> tuple[list[CaptionRow], list[CaptionRow]]:
    """Training and held-out rows of "concepts" or "stamps", see `scenes`.

    "concepts": 56 training and 48 held-out scenes of eight personal concepts and of eight other images. "stamps": the
    stamps that the small vision-language model was not trained on, split by `eval_size` and `seed`.

    Raises:
        ValueError: for an unknown name, or a prompt with fields.
        RuntimeError: if the images cannot be downloaded.
    """
    from .scenes import concept_scenes, held_out_stamps

    one_of("task.data", name, ("concepts", "stamps"))
    if prompt_fields(prompt):
        raise ValueError(f"task.prompt: {prompt!r} has fields in braces, and sample:{name} has no columns to fill them")
    if name == "concepts":
        train, held_out = concept_scenes()
        return _scene_rows(train, name, prompt), _scene_rows(held_out, name, prompt)
    return split_rows(_scene_rows(held_out_stamps(), name, prompt), eval_size, seed, f"sample:{name}")


def _scene_rows(scenes: Sequence[Scene], name: str, prompt: str) -> list[CaptionRow]:
    return [
        CaptionRow(f"sample:{name}: row {i}", scene, prompt, scene.caption, scene.concept)
        for i, scene in enumerate(scenes, start=1)
    ]


def concepts_of(rows: Sequence[CaptionRow]) -> tuple[str, ...]:
    """All concepts, sorted."""
    return tuple(sorted({row.concept for row in rows if row.concept}))


def column_names(settings: Any) -> Columns:
    """The columns that the settings of the task name."""
    return Columns(settings.image, settings.caption, settings.concept, settings.prompt, settings.identifier)

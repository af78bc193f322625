"""Samples by method and step: a part of the page, and tables of captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .formats import DASH, Cell, Column, Row, Table
from .methods import group_of
from .sample_images import data_uri, read_image
from .samples import Gallery, Sample, gallery_of, seed_words
from .study import Study
from .tables import slug

TABLES, LETTERS = 4, 160  # caption tables of a study in documents, and letters of a caption there


def gallery_part(study: Study, colours: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the study's samples for the page's template; None without any. Images are inside, as data URIs.

    Args:
        colours: method → CSS colour of the patch before its name.
    """
    gallery = gallery_of(study)
    if gallery is None:
        return None
    samples = [_shown(study, gallery, name, colours) for name in gallery.names]
    silent = [study.labels[method] for method in study.best if method not in gallery.methods]
    without = f"Without samples: {', '.join(silent)}." if silent else ""
    note = " ".join(filter(None, (seed_words(gallery), gallery.note, without)))
    return {"slug": f"{slug(study.name)}-samples", "steps": gallery.steps, "samples": samples, "note": note}


def caption_tables(study: Study) -> list[Table]:
    """The texts by method and step, a table for each of the first samples (figures 8 and 14)."""
    gallery = gallery_of(study)
    names = gallery.of_kind("text") if gallery else []
    return [_captions(study, gallery, name, len(names), i) for i, name in enumerate(names[:TABLES]) if gallery]


def _shown(study: Study, gallery: Gallery, name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    subject = gallery.subject(name)
    rows = [
        {
            "method": method,
            "label": study.labels[method],
            "colour": colours[method],
            "cells": [_cell(gallery.cells.get((name, method, step))) for step in gallery.steps],
        }
        for method in gallery.methods
    ]
    return {"name": name, "picture": None if subject is None else _picture(subject), "rows": rows}


def _cell(sample: Sample | None) -> dict[str, str | None]:
    """Return what a cell of the page shows: an image, a text, or the reason why there is none ("missing")."""
    if sample is None:
        return {"missing": DASH}
    if sample.kind == "text":
        return {"text": sample.text} if sample.text else {"missing": "empty text"}
    return {**_picture(sample), "text": sample.text}


def _picture(sample: Sample) -> dict[str, str | None]:
    found = read_image(sample)
    return {"missing": found} if isinstance(found, str) else {"image": data_uri(found)}


def _captions(study: Study, gallery: Gallery, name: str, count: int, place: int) -> Table:
    steps = [step for step in gallery.steps if any((name, m, step) in gallery.cells for m in gallery.methods)]
    texts = {
        (method, step): sample.text or "(empty)" if (sample := gallery.cells.get((name, method, step))) else DASH
        for method in gallery.methods
        for step in steps
    }
    rows = [
        Row(
            method,
            (Cell(study.labels[method]), *(Cell(_cut(texts[method, step])) for step in steps)),
            group_of(method),
        )
        for method in gallery.methods
    ]
    columns = (Column("Method"), *(Column(f"step {step}", words=True) for step in steps))
    caption = seed_words(gallery)
    caption += f" Texts are cut at {LETTERS} letters." if any(len(text) > LETTERS for text in texts.values()) else ""
    if count > TABLES and place == TABLES - 1:
        caption += f" These are {TABLES} of {count} samples."
    title = f"Generated text by step: {_cut(name)}"
    return Table(f"{slug(study.name)}-text-{place + 1}", title, columns, tuple(rows), caption)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1].rstrip() + "…"

"""The samples of a study: which images and captions its runs left at which step, and which of them are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..record import RunRecord
from .study import Group, Study

NAMES, STEPS, PICTURES = 12, 8, 240  # at most that many samples, steps, and images of a study are shown


@dataclass(frozen=True)
class Sample:
    """A sample that a run left: an image ("image"), or a text with or without the image that it is about ("text").

    `path` is None where the record names no file; `folder` is the record's, which the file has to lie in.
    """

    kind: str
    path: Path | None
    text: str | None
    folder: Path | None = None


@dataclass(frozen=True)
class Gallery:
    """The samples of a study, each method at its best learning rate.

    Attributes:
        names: of the samples shown, such as prompts; methods: in the study's order; steps: rising.
        cells: (name, method, step) → sample.
        seeds: method → whose run it is.
        note: how many were left out, "" if none.
    """

    names: tuple[str, ...]
    methods: tuple[str, ...]
    steps: tuple[int, ...]
    cells: Mapping[tuple[str, str, int], Sample]
    seeds: Mapping[str, int]
    note: str = ""

    def kind(self, name: str) -> str:
        """ "image" or "text": the kind of the first sample of a name."""
        return next(sample.kind for place, sample in self.cells.items() if place[0] == name)

    def subject(self, name: str) -> Sample | None:
        """The first of the texts of a name that has an image: what the texts are about."""
        found = (s for place, s in self.cells.items() if place[0] == name and s.kind == "text" and s.path)
        return next(found, None)

    def of_kind(self, kind: str) -> list[str]:
        """The names of the samples of a kind."""
        return [name for name in self.names if self.kind(name) == kind]


def gallery_of(study: Study, names: int = NAMES, steps: int = STEPS, pictures: int = PICTURES) -> Gallery | None:
    """The samples of the study; None if its runs left none.

    Of each method's best learning rate, the finished run with samples of the smallest seed is shown.

    Args:
        names, steps, pictures: at most that many samples, steps (spread over all, with the first and last) and
            images in all; the note says what is left out.
    """
    runs = {method: run for method, group in study.best.items() if (run := _run(group)) is not None}
    cells: dict[tuple[str, str, int], Sample] = {}
    for method, run in runs.items():
        for name, step, sample in _samples(run):
            cells[name, method, step] = sample
    if not cells:
        return None
    every_step = sorted({step for _, _, step in cells})
    every_name = list(dict.fromkeys(name for name, _, _ in cells))
    shown_steps = spread_over(every_step, steps)
    most = max(1, min(names, pictures // (len(shown_steps) * len(runs))))
    shown = set(every_name[:most])
    kept = {place: sample for place, sample in cells.items() if place[0] in shown and place[2] in shown_steps}
    note = _left_out("samples", len(shown), len(every_name)) + _left_out("steps", len(shown_steps), len(every_step))
    methods = tuple(method for method in runs if any(place[1] == method for place in kept))
    names_shown = tuple(name for name in every_name[:most] if any(place[0] == name for place in kept))
    seeds = {method: int(run["seed"]) for method, run in runs.items()}
    return Gallery(names_shown, methods, tuple(shown_steps), kept, seeds, note.strip())


def spread_over(values: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the values, evenly spread by place, with the first and the last."""
    if len(values) <= most:
        return list(values)
    places = {round(i * (len(values) - 1) / max(1, most - 1)) for i in range(most)} if most > 1 else {len(values) - 1}
    return [values[place] for place in sorted(places)]


def seed_words(gallery: Gallery) -> str:
    """Whose runs are shown, in words."""
    seeds = sorted(set(gallery.seeds.values()))
    return f"Seed {', '.join(map(str, seeds))}, each method at its best learning rate."


def _left_out(what: str, shown: int, every: int) -> str:
    return "" if shown == every else f" Shown are {shown} of {every} {what}; the others lie beside the records."


def _run(group: Group) -> RunRecord | None:
    """The finished run with samples of the smallest seed."""
    return min((run for run in group.finished if run.get("samples")), key=lambda run: run["seed"], default=None)


def _samples(run: RunRecord) -> Iterable[tuple[str, int, Sample]]:
    """(name, step, sample); the second of a name at a step is called "name (2)"."""
    seen: dict[tuple[str, int], int] = {}
    folder = Path(run["folder"]) if run.get("folder") else None
    for entry in run["samples"]:
        if not _valid(entry) or (entry["kind"] == "image" and folder is None):  # a table without its files
            continue
        name, step = _line(entry.get("name")) or "sample", int(entry["step"])
        seen[name, step] = count = seen.get((name, step), 0) + 1
        file, text = entry.get("file"), entry.get("text")
        path = folder / file if folder is not None and file else None
        text = None if text is None else _line(text)
        yield name if count == 1 else f"{name} ({count})", step, Sample(str(entry["kind"]), path, text, folder)


def _line(text: Any) -> str:
    """Put a text in one line."""
    return " ".join(str(text or "").split())


def _valid(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("step"), int) and entry.get("kind") in ("image", "text")

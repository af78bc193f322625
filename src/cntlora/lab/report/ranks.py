"""Places of the sites of a model: its parts (UNet and text encoder), their layers, and the mean rank at each place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from statistics import mean

from .study import Group, finite, kind_of, sites_of


@dataclass(frozen=True)
class RankMap:
    """Mean ranks over the sites of a place and over seeds; `part` is "" where the model has one only.

    Attributes:
        layers: in the order of the model.
        cells: (layer, kind of projection) → rank; a place without a site is missing.
    """

    part: str
    layers: tuple[str, ...]
    cells: Mapping[tuple[str, str], float]


def adaptive(group: Group) -> bool:
    """Return whether the ranks differ between the sites of any run."""
    return any(len({site.get("rank") for site in sites_of(run)} - {None}) > 1 for run in group.finished)


def rank_maps(group: Group) -> list[RankMap]:
    """The ranks of a group, a map for each part of the model (figures 10 and 15 of the paper)."""
    ranks: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for run in group.finished:
        for name, site in (run.get("sites") or {}).items():
            rank = finite(site.get("rank"))
            if rank is not None:
                ranks.setdefault(name, []).append(rank)
                kinds[name] = kind_of(site)
    places = places_of(kinds)
    maps = []
    for part in dict.fromkeys(part for part, _ in places.values()):
        cells: dict[tuple[str, str], list[float]] = {}
        for name, (own, layer) in places.items():
            if own == part:
                cells.setdefault((layer, kinds[name]), []).append(mean(ranks[name]))
        layers = tuple(dict.fromkeys(layer for layer, _ in cells))
        maps.append(RankMap(part, layers, {place: mean(values) for place, values in cells.items()}))
    return maps


def places_of(kinds: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Site → (part, layer), from the names of all sites of a model and their kinds.

    A part is what the names first differ by, unless that is a number: "unet" and "text_encoder". A layer is the numbers
    of a name with the words that come before them ("down_blocks.0.1.0"), and with what comes between them and the
    projection ("attn1") where several attentions have the same numbers.
    """
    split = {name: name.split(".") for name in kinds}
    same = len(_common(split.values()))
    parts = {name: words[same] if len(words) > same else "" for name, words in split.items()}
    if any(part.isdecimal() for part in parts.values()) or len(set(parts.values())) == 1:
        parts = dict.fromkeys(parts, "")
    found: dict[str, tuple[str, str]] = {}
    for part in dict.fromkeys(parts.values()):
        own = {name: words for name, words in split.items() if parts[name] == part}
        found |= {name: (part, layer) for name, layer in _layers(own, kinds).items()}
    return {name: found[name] for name in kinds}


def _layers(split: Mapping[str, list[str]], kinds: Mapping[str, str]) -> dict[str, str]:
    """Site → layer, within a part."""
    same = len(_common(split.values()))
    short, inner = {}, {}
    for name, words in split.items():
        last = max((i for i, word in enumerate(words[:-1]) if word.isdecimal()), default=-1)
        numbers = [word for word in words[same : last + 1] if word.isdecimal()]
        head = list(takewhile(lambda word: not word.isdecimal(), words[same : last + 1]))
        short[name] = ".".join([*head, *numbers])
        inner[name] = next((word for word in words[last + 1 : -1] if not word.isdecimal()), "")
    if not all(short.values()) and any(short.values()):
        short = {name: layer or ".".join(split[name][same:-1]) for name, layer in short.items()}
    at: dict[tuple[str, str], set[str]] = {}
    for name, layer in short.items():
        at.setdefault((layer, kinds[name]), set()).add(inner[name])
    return {
        name: f"{layer}.{inner[name]}".strip(".") if len(at[layer, kinds[name]]) > 1 else layer
        for name, layer in short.items()
    }


def _common(names: Iterable[list[str]]) -> list[str]:
    """The words that all names begin with."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False))]

"""The order of methods in tables and legends, and one colour, dash and marker a method, the same in every figure."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable
from dataclasses import dataclass

PEERS = (
    *("full", "lora", "adalora", "pissa", "olora", "eva", "corda", "lora_ga", "lora_one"),
    *("lora_da", "gora"),
    *("dora", "rslora", "eva+dora"),
)
OURS = ("cross", "self", "shift", "descent", "whitened", "whitened_descent")
GROUNDS = ("#ffffff", "#14161a")  # of the page, light and dark
LEGIBLE = 2.2  # least contrast of a colour with both
BANDS = 8  # with more methods than this, bands of spread would hide the lines
GROUPS = ("peers", "peft", "ours", "other")

# Hue a family: none darker or lighter than both a white and a near-black page can carry. Ours have the three hues of
# Okabe and Ito that stay apart for every kind of colour vision; the peers share what is left and differ by marker too.
_HUES = {
    "cross": "#d55e00",
    "self": "#1f7fc4",
    "shift": "#009e73",
    "full": "#6d7f94",
    "lora": "#8a8a8a",
    "adalora": "#a37b54",
    "pissa": "#c972ab",
    "olora": "#9273c9",
    "eva": "#c99a0a",
    "corda": "#4aa3d8",
    "lora_ga": "#92922e",
    "lora_one": "#7c6f5a",
    "dora": "#3fa396",
    "rslora": "#cc6677",
    "descent": "#b5179e",  # last, so that the others keep their markers
    "whitened": "#e4572e",
    "whitened_descent": "#2f8f4e",
}
_MARKERS = (
    *("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon", "hexagon"),
    *("star", "triangle-left", "triangle-right"),
)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# (lightness, hue) added for the 1st, 2nd, … method of a family
_SHADES = (
    *((0.0, 0.0), (0.10, 0.02), (-0.08, -0.02), (0.05, -0.03), (-0.04, 0.03), (0.13, -0.01), (-0.10, 0.015)),
    *((0.07, 0.045), (-0.05, -0.045), (0.02, 0.06), (-0.02, -0.06), (0.09, -0.05)),
)


@dataclass(frozen=True)
class Style:
    """Style in which a method is drawn: a CSS colour, and a dash and marker by plotly's names."""

    colour: str
    dash: str
    marker: str


def group_of(method: str) -> str:
    """ "ours" (those of `OURS` and their variants), "peers" (of the paper), "peft" (peft:…) or "other"."""
    if method.startswith("peft:"):
        return "peft"
    if method.startswith(OURS):
        return "ours"
    return "peers" if family_of(method) in PEERS else "other"


def family_of(method: str) -> str:
    """The start that a method varies: "self" of "self+vas", "eva" of "peft:eva"."""
    own = next((name for name in OURS if method.startswith(name)), None)
    return own or re.split(r"[+:]", method.removeprefix("peft:"))[0]


def order_key(method: str) -> tuple[int, int, str, int, str]:
    """Sort as the paper's tables do: peers, PEFT's own code, ours (plain, then variant by variant), the unknown."""
    group = group_of(method)
    family = family_of(method)
    place = PEERS.index(method if method in PEERS else family) if group == "peers" else 0
    if group == "ours":
        return GROUPS.index(group), place, method.removeprefix(family), OURS.index(family), method
    if group == "peft" and family in PEERS:
        place = PEERS.index(family) - len(PEERS)  # known ones first, in the paper's order
    return GROUPS.index(group), place, "", 0, method


def ordered(methods: Iterable[str]) -> list[str]:
    """The distinct `methods` in the order of `order_key`."""
    return sorted(set(methods), key=order_key)


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """One style a method. A family shares its hue; its members differ in shade, dash and marker."""
    found: dict[str, Style] = {}
    members: dict[str, int] = {}
    families = list(_HUES)
    for method in ordered(methods):
        family = family_of(method)
        if family not in families:
            families.append(family)
        place, member = families.index(family), members.get(family, 0)
        members[family] = member + 1
        lighter, turn = _SHADES[member % len(_SHADES)]
        hue = _HUES.get(family) or list(_HUES.values())[place % len(_HUES)]
        found[method] = Style(
            _shade(hue, lighter, turn + (0.0 if family in _HUES else 0.05)),
            _DASHES[member % len(_DASHES)],
            _MARKERS[(place + 5 * (member // len(_DASHES)) + 3 * member) % len(_MARKERS)],
        )
    return found


def contrast(colour: str, ground: str) -> float:
    """The contrast ratio of two #rrggbb colours, 1 to 21 (WCAG 2.2, "contrast ratio")."""
    light, dark = sorted((_luminance(colour), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in _rgb(colour))
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _shade(colour: str, lighter: float, turn: float) -> str:
    """Lighter and turned in hue; of what both grounds carry, the nearest to that."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*_rgb(colour))
    wanted = lightness + lighter
    for away in sorted((step / 50 for step in range(-25, 26)), key=abs):
        shaded = colorsys.hls_to_rgb((hue + turn) % 1, min(1.0, max(0.0, wanted + away)), saturation)
        found = "#" + "".join(f"{round(255 * channel):02x}" for channel in shaded)
        if min(contrast(found, ground) for ground in GROUNDS) >= LEGIBLE:
            return found
    raise AssertionError("every hue has a legible lightness")

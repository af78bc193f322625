"""The README.md of an adapter folder: how the adapter was initialised, and what is in its file.

Only what stands between the marks is ours. A text that is there already keeps every other byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..messages import counted
from ..model.kinds import kind_of
from .public_names import hub_name

if TYPE_CHECKING:
    from ..model.provenance import Start

_SHOWN = 50  # classes that the card names
BEGIN = "<!-- cntlora: written with the adapter; what stands between the two marks is replaced at the next save -->"
END = "<!-- /cntlora -->"
_SECTION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_BASES = {
    "offset": "offset: starts as the base model; the second half of the rank is frozen and cancels the first",
    "paired": "paired: starts as the base model; the second half of the rank cancels the first",
    "subtract": "subtract: started on a changed base; the file holds the change too and is for the unchanged base",
    "zero": "none: starts as the base model, with B = 0",
    "keep": "keep: the function moves by scaling · B · A at the start",
}


@dataclass(frozen=True)
class SavedSites:
    """Contents of the file.

    Attributes:
        shapes: site → (rank, alpha).
        use_rslora: whether the scaling is alpha/√rank instead of alpha/rank.
        names: of the classes of a head that is saved with the adapter, in the order of the logits.
    """

    shapes: Mapping[str, tuple[int, float]]
    use_rslora: bool = False
    names: Sequence[str] = ()


def updated_card(old: str | None, section: str, base_model: str | None) -> str:
    """The text of a README with our section: in the place of an earlier one, else at the end, else a new README.

    Args:
        old: the text that is there, or None.
        base_model: what the model was loaded from, a path or a name on the hub; a local folder is not named.
    """
    marked = f"{BEGIN}\n{section}\n{END}"
    if old is None or not old.strip():
        return f"{_front_matter(base_model)}\n# LoRA adapter\n\n{marked}\n"
    if _SECTION.search(old):
        return _SECTION.sub(lambda _: marked, old, count=1)
    gap = "\n" if old.endswith("\n") else "\n\n"
    return f"{old}{gap}{marked}\n"


def _front_matter(base_model: str | None) -> str:
    """Return what the hub reads: the library, the tags, and the base model if it is on the hub."""
    name = hub_name(base_model)
    named = name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    tags = [*([f"base_model:adapter:{name}"] if named else []), "lora", "cntlora"]
    lines = ["---", *([f"base_model: {name}"] if named else []), "library_name: peft", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---", ""])


def card_section(start: Start | None, saved: SavedSites, versions: Mapping[str, str]) -> str:
    """The section between the marks.

    Args:
        start: what is known of the initialisation; None where the adapter was not initialised in this process.
        saved: ranks and alphas of the file.
        versions: of the libraries that wrote the file.
    """
    rows = [("Method", "not known: not initialised by the process that saved it")] if start is None else _start(start)
    rows += _file(saved, versions)
    lines = ["## Initialisation", "", "| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows)]
    lines += ["", "| projection | sites | ranks in the file |", "|---|---|---|"]
    lines += [f"| {_cell(kind)} | {len(ranks)} | {spread(ranks)} |" for kind, ranks in _by_kind(saved).items()]
    return "\n".join(lines)


def _start(start: Start) -> list[tuple[str, str]]:
    options = ", ".join(f"`{key}={value!r}`" for key, value in start.options.items())
    rows = [
        ("Method", f"{start.method}, by cntlora {start.versions.get('cntlora', '?')}, without training"),
        ("Base", _BASES[start.base]),
        ("Options that differ from the defaults", options or "none"),
        ("Data", _data(start)),
    ]
    if start.moved is not None:
        low, middle, high = start.moved
        rows.append(("‖ΔW‖/‖W‖ of the estimate", f"{low:.2e} to {high:.2e}, median {middle:.2e}"))
    if start.skipped:
        rows.append(("Sites left as plain LoRA", str(start.skipped)))
    return rows


def _data(start: Start) -> str:
    if start.fingerprint is None:
        return "none: the method reads the weights alone"
    least, most = start.tokens
    tokens = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    what = "losses and gradients" if start.reads == "gradients" else "inputs"
    digest = f"fingerprint of the statistics `sha256:{start.fingerprint[:16]}`"
    return f"{what} of {counted(start.batches, 'batch')}, {tokens} tokens a site; {digest}"


def _file(saved: SavedSites, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    ranks = [rank for rank, _ in saved.shapes.values()]
    scalings = {round(a / (r**0.5 if saved.use_rslora else r), 6) for r, a in saved.shapes.values()}
    scaling = f"{min(scalings, default=1):g}" + (f" to {max(scalings):g}" if len(scalings) > 1 else "")
    classes = [("Classes", _classes(saved.names))] if saved.names else []
    return [
        *classes,
        ("Sites in the file", f"{len(ranks)}, ranks {spread(ranks)}, {sum(ranks)} in all, scaling {scaling}"),
        ("Written with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:_SHOWN]))
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more}; also in `id2label.json`"


def _by_kind(saved: SavedSites) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, (rank, _) in saved.shapes.items():
        found.setdefault(kind_of(name), []).append(rank)
    return dict(sorted(found.items()))


def spread(ranks: Sequence[int]) -> str:
    """ "8", or "4 to 16"."""
    if not ranks:
        return "–"
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _cell(value: Any) -> str:
    """One line that cannot end a cell."""
    return " ".join(str(value).split()).replace("|", "\\|")

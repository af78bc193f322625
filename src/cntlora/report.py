"""`InitReport`: the outcome at every site, as a table to read and a dict to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from .messages import counted
from .methods.method import option_names
from .site_plan import FAR

if TYPE_CHECKING:
    from .config import InitConfig
    from .plan import InitPlan

NAMES_SHOWN = 5
"""Sites that a note under the table names; those that it is of are marked in the table."""

_UNREACHED = "the loss of the first row does not depend on it, so that it would not train; leave it out"


@dataclass(frozen=True)
class InitReport:
    """Report of `initialize`; `print(report)` shows it as a table, and a notebook shows `report` as one of HTML.

    Attributes:
        config: the configuration in force.
        sites: per site rank (that trains), file_rank, scaling, tokens, batches, masked, mask (the stream of tokens, and
            where their mask comes from), unmasked (why a mask that was given was not applied), effective_rank, rtol,
            delta_norm, weight_norm, start_norm, captured (share of the squared spectrum that the rank covers), seconds.
        skipped: sites left as plain LoRA → the reason.
        batches: number of batches read.
        seconds, forward_seconds: of the whole computation, and of the data pass with its statistics.
        memory: passes over the batches, and the most bytes of statistics on the "device", the "cpu" and the "disk".
        step: for descent, see `InitPlan`; else empty.
        shared: sites that have the factors of another site → the name of that site.
        unreached: sites on which the loss of the first row does not depend, see `InitPlan`.
        choice: why the method was chosen, see `InitPlan`.
        head: of the new head that was fitted, see `FittedHead`, without its values; None without one.
        head_line: the same in words, or why none was fitted; else empty.
        far: sites whose start is far beyond what trained adapters reach, see `InitPlan.far_starts`.
    """

    config: InitConfig
    sites: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    batches: int
    seconds: float
    forward_seconds: float
    memory: Mapping[str, int]
    step: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    unreached: Sequence[str] = field(default_factory=list)
    far: Mapping[str, float] = field(default_factory=dict)
    choice: str = ""
    head: Mapping[str, Any] | None = None
    head_line: str = ""

    @classmethod
    def of(cls, plan: InitPlan) -> InitReport:
        """Make the report of a plan."""
        sites = {name: site.to_dict() for name, site in plan.sites.items()}
        rest = (plan.batches, plan.seconds, plan.forward_seconds, dict(plan.memory), dict(plan.step))
        return cls(
            plan.config, sites, dict(plan.skipped), *rest, dict(plan.shared), list(plan.unreached), plan.far_starts(),
            plan.choice, None if plan.head is None else plan.head.to_dict(), _head_line(plan),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, ready for JSON."""
        return {
            "config": self.config.to_dict(),
            "sites": {name: dict(site) for name, site in self.sites.items()},
            "skipped": dict(self.skipped),
            "batches": self.batches,
            "seconds": self.seconds,
            "forward_seconds": self.forward_seconds,
            "memory": dict(self.memory),
            "step": dict(self.step),
            "shared": dict(self.shared),
            "unreached": list(self.unreached),
            "far": dict(self.far),
            "choice": self.choice,
            "head": None if self.head is None else dict(self.head),
            "head_line": self.head_line,
        }

    def __str__(self) -> str:
        heads, rows = self._table()
        return "\n".join([text_table(self._title(), heads, rows), *self._notes()])

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Return what Jupyter, VS Code and Colab show where a cell ends with a report."""
        heads, rows = self._table()
        notes = "".join(f"<div>{escape(line)}</div>" for line in self._notes())
        return {"text/html": html_table(self._title(), heads, rows) + notes, "text/plain": str(self)}

    def _title(self) -> str:
        c = self.config
        start = f"base {c.effective_base}" if c.effective_base == c.stated_base else "B = 0"
        total = sum(site["rank"] for name, site in self.sites.items() if name not in self.shared)
        sites, read = counted(len(self.sites), "site"), counted(self.batches, "batch")
        return (
            f"{c.chosen.name} · {start} · {sites} · total rank {total} · {read} · "
            f"{self.seconds:.2f} s ({self.forward_seconds:.2f} s reading data)"
        )

    def _table(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """The heads and the rows of the sites, without the columns that say nothing at any site."""
        cells = {name: _cells(site, name in self.far) for name, site in self.sites.items()}
        told = {head for row in cells.values() for head in _HEADS if row[head] != "–"}
        if all(site["file_rank"] == site["rank"] for site in self.sites.values()):
            told.discard("file rank")
        if not any(site["tokens"] for site in self.sites.values()):  # a method that reads the weights alone
            told.discard("tokens")
        if not any(site["start_norm"] for site in self.sites.values()):  # B = 0, as the title says
            told.discard("‖s·B·A‖/‖W‖")
        heads = [head for head in _HEADS if head in told]
        return heads, [(name, *(row[head] for head in heads)) for name, row in cells.items()]

    def _notes(self) -> list[str]:
        """The lines below the table: what needs attention, and what to do."""
        c = self.config
        lines = [f"method {c.chosen.name}: {self.choice}"] if self.choice else []
        if any(_rank_poor(s) for s in self.sites.values()):
            lines.append("* the data determine fewer directions than the rank has; read more or longer batches")
        lines += [_far_line(self.far, c)] if self.far else []
        lines += _unmasked_lines(self.sites)
        lines += [_step_line(self.step)] if self.step else []
        lines += [self.head_line] if self.head_line else []
        lines += [_rate_line(c)] if c.chosen.rate is not None else []
        lines += _memory_lines(self.memory)
        lines += [f"{name}: shares the factors of {leader}, made there" for name, leader in self.shared.items()]
        lines += [f"{name}: {_UNREACHED}" for name in self.unreached]
        lines += [f"{name}: left as plain LoRA, {reason}" for name, reason in self.skipped.items()]
        return lines


def _far_line(far: Mapping[str, float], config: InitConfig) -> str:
    """The sites that start far out, the furthest first, and the cure."""
    names = ", ".join(list(far)[:NAMES_SHOWN]) + (
        f" and {len(far) - NAMES_SHOWN} more" if len(far) > NAMES_SHOWN else ""
    )
    return f"! further out than {FAR:g}·‖W‖, which trained adapters never reach: {names}; {far_cure(config)}"


def _step_line(step: Mapping[str, float]) -> str:
    """The step that the start takes, and what it does to the loss."""
    losses = ""
    if "loss_before" in step:
        losses = (
            f"; loss {step['loss_before']:.4f} → {step['loss_after']:.4f} on {counted(int(step['batches']), 'batch')}"
        )
    if losses and step["size"] == 0.0:
        return f"step: none (B = 0), since it would lower the loss of {step['loss_before']:.4f} by too little"
    return f"step: ‖s·B·A‖/‖W‖ is {step['size']:.3g} at the site where it is largest{losses}"


def _head_line(plan: InitPlan) -> str:
    """The head that was fitted, or why none was."""
    if plan.head is not None:
        return str(plan.head)
    return f"head: not fitted, {plan.unfitted}" if plan.unfitted else ""


def _rate_line(config: InitConfig) -> str:
    """The learning rate that the start is made for, and how it was brought to another."""
    made = f"learning rate: made for AdamW with a peak of {config.chosen.rate:g}"
    if config.learning_rate is None:
        return f"{made}; InitConfig(learning_rate=…) makes it for yours"
    return (
        f"{made}, brought to {config.learning_rate:g}: scaling times {config.pace**2:.4g}, A and B divided by its root"
    )


def _unmasked_lines(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each reason why a mask was not applied, with the sites that saw all tokens for it."""
    by_reason: dict[str, list[str]] = {}
    for name, site in sites.items():
        if site["unmasked"]:
            by_reason.setdefault(site["unmasked"], []).append(name)
    lines = []
    for reason, names in by_reason.items():
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        lines.append(f"† every token counts at {len(names)} site{'s' * (len(names) > 1)} ({some}): {reason}")
    return lines


def _memory_lines(memory: Mapping[str, int]) -> list[str]:
    """Tell where the statistics were held, if that was not simply beside the model."""
    elsewhere = [f"{memory[place] / 2**20:.0f} MiB on the {place}" for place in ("cpu", "disk") if memory[place]]
    if memory["passes"] > 1:
        elsewhere.insert(0, f"{memory['passes']} passes over the batches")
    free = memory.get("free", 0)  # plans of version 0.2 have none
    bound = f"the {free / 2**30:.3g} GiB that were free (max_memory sets another limit)" if free else "max_memory"
    return [f"within {bound}: {', '.join(elsewhere)}"] if elsewhere else []


def text_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of sites as plain text: the first column to the left, the numbers under `heads` to the right."""
    lines = [("site", *heads), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = [_aligned(line, widths) for line in lines]
    printed.insert(1, " " + "─" * (sum(widths) + 3 * len(widths) - 1))
    return "\n".join([title, *printed])


def html_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML, for a notebook; wider than the page, it scrolls and does not wrap."""

    def line(cells: Sequence[str], tag: str) -> str:
        aligned = (f' style="text-align: {"right" if i else "left"}"' for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{a}>{escape(c)}</{tag}>" for a, c in zip(aligned, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    table = f"<table><thead>{line(['site', *heads], 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div>{escape(title)}</div><div style="overflow-x: auto; white-space: nowrap">{table}</div>'


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))
    return "  " + "   ".join([cells[0].ljust(widths[0]), *numbers])


def _rank_poor(s: Mapping[str, Any]) -> bool:
    """Return whether the data determine fewer directions than the rank has."""
    return s["effective_rank"] is not None and s["effective_rank"] < s["rank"]


_HEADS = (
    "rank", "file rank", "tokens", "mask", "eff. rank", "rtol", "‖ΔW‖/‖W‖", "‖s·B·A‖/‖W‖", "captured", "ms",
)  # fmt: skip


def _cells(s: Mapping[str, Any], far: bool) -> dict[str, str]:
    """The cells of a site by their head; "–" where there is nothing to say."""

    def cell(value: Any, form: str, mark: str = "") -> str:
        return "–" if value is None else f"{value:{form}}{mark}"

    weight = s["weight_norm"]
    cells = (
        str(s["rank"]),
        str(s["file_rank"]),
        f"{s['tokens']:,}",
        (s["mask"] or "–") + "†" * bool(s["unmasked"]),
        cell(s["effective_rank"], "d", "*" if _rank_poor(s) else ""),
        cell(s["rtol"], ".0e"),
        "–" if s["delta_norm"] is None or not weight else f"{s['delta_norm'] / weight:.3f}",
        "–" if not weight else f"{s['start_norm'] / weight:.3f}{'!' if far else ''}",
        cell(s["captured"], ".1%"),
        f"{1e3 * s['seconds']:.0f}",
    )
    return dict(zip(_HEADS, cells, strict=True))


def far_cure(config: InitConfig) -> str:
    """Return what makes a start smaller."""
    if "rtol" not in option_names(config.chosen):
        return "lower strength"
    if (getattr(config.chosen, "rtol", None) or 0) >= 1e-3:
        return "read more or larger batches, lower strength, or raise rtol further"
    return "raise rtol (1e-3 cuts off what the data hardly determine), read more or larger batches, or lower strength"

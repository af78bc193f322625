"""`Table`: rows of numbers with spreads, as plain text, Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby
from typing import Literal

from .study import Estimate

Direction = Literal["min", "max"] | None
BEST, SECOND = "best", "second"
DASH = "–"  # where there is no value
_ARROWS = {"min": " ↓", "max": " ↑", None: ""}
_LATEX = {
    **{c: "\\" + c for c in "%_&#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"–": "--", "±": r"$\pm$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "‖": r"$\|$", "·": r"$\cdot$"},
    **{"Δ": r"$\Delta$", "∂": r"$\partial$", "σ": r"$\sigma$", "≤": r"$\le$", "×": r"$\times$", "†": r"$^\dagger$"},
    **{"‡": r"$^\ddagger$", "<": r"$<$", ">": r"$>$", "−": "$-$", "|": r"\textbar{}", "…": r"\ldots{}"},
}
_LATEX_ESCAPES = str.maketrans(_LATEX)
_MARKDOWN_ESCAPES = str.maketrans({c: "\\" + c for c in "\\|*`[]"} | {"<": "&lt;", ">": "&gt;", "\n": " "})


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: what is above it; `above`: what spans it and its neighbours of the same group.
        direction: whether less ("min") or more ("max") is better; None: nothing is the best here.
        spec: the format of its numbers; "d" rounds, and a "g" gives a spread as many decimals as its mean.
        arrow: whether the head shows the direction. words: whether it holds words, which go to the left.
    """

    head: str
    direction: Direction = None
    spec: str = ".3f"
    above: str = ""
    arrow: bool = True
    words: bool = False

    @property
    def full_head(self) -> str:
        """The head with the arrow of its direction."""
        return self.head + (_ARROWS[self.direction] if self.arrow else "")

    @property
    def one_head(self) -> str:
        """The head with what is above it, for formats without spans."""
        return f"{self.above}: {self.full_head}" if self.above else self.full_head

    def number(self, value: float) -> str:
        """A number as it is printed."""
        printed = format(round(value) if self.spec.endswith("d") else value, self.spec)
        if printed.startswith("-") and not set(printed) & set("123456789"):
            printed = format(0.0, self.spec)  # no minus before what rounds to zero
        return "−" + printed[1:] if printed.startswith("-") else printed

    def spread(self, mean: float, spread: float) -> str:
        """A spread as it is printed beside its mean."""
        if not self.spec.endswith("g"):
            return format(round(spread) if self.spec.endswith("d") else spread, self.spec.lstrip("+"))
        digits, _, power = self.number(mean).partition("e")
        return format(spread, ".1e") if power else format(spread, f".{len(digits.partition('.')[2])}f")


@dataclass(frozen=True)
class Cell:
    """A word, or a mean with its spread; `note` is a mark behind it; one that does not compete is never the best."""

    text: str = DASH
    mean: float | None = None
    spread: float | None = None
    note: str = ""
    competes: bool = True

    @classmethod
    def of(cls, estimate: Estimate, note: str = "", competes: bool = True) -> Cell:
        """A mean ± spread, or a dash where no run has a value."""
        return cls(DASH, estimate.mean, estimate.spread, note, competes)


@dataclass(frozen=True)
class Row:
    """The cells of a method; a rule separates rows of different `group`."""

    method: str
    cells: tuple[Cell, ...]
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table that knows its best values.

    Attributes:
        slug: its name in links and labels.
        title, columns, rows: what it shows.
        caption: how it was made.
        ranked: whether the best of a column is marked; not where every difference may be chance.
    """

    slug: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    ranked: bool = True

    @cached_property
    def marks(self) -> dict[tuple[int, int], str]:
        """(row, column) → "best" or "second", by what is printed: values that print alike share the mark."""
        found: dict[tuple[int, int], str] = {}
        for j, column in enumerate(self.columns):
            if not self.ranked or column.direction is None:
                continue
            values = {i: c.mean for i, c in ((i, r.cells[j]) for i, r in enumerate(self.rows)) if c.competes}
            known = {i: (column.number(v), v) for i, v in values.items() if v is not None}
            ranked = sorted(known.values(), key=lambda pair: pair[1], reverse=column.direction == "max")
            places = list(dict.fromkeys(printed for printed, _ in ranked))
            for mark, place in zip((BEST, SECOND), places, strict=False):
                found |= {(i, j): mark for i, (printed, _) in known.items() if printed == place}
        return found

    def body(self, i: int, j: int) -> tuple[str, str]:
        """Return what is printed in a cell: the number or word, and the spread ("" without one)."""
        cell, column = self.rows[i].cells[j], self.columns[j]
        if cell.mean is None:
            return cell.text, ""
        return column.number(cell.mean), "" if cell.spread is None else column.spread(cell.mean, cell.spread)

    def to_text(self) -> str:
        """Plain text; * is behind the best value of a column, _ behind the second."""
        rows = [[self._plain(i, j) for j in range(len(self.columns))] for i in range(len(self.rows))]
        heads = [column.full_head for column in self.columns]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        signs = {BEST: "*", SECOND: "_"}
        rule = " ".join("-" * width + " " for width in widths).rstrip()
        lines = [*self._text_above(widths), self._text_line(heads, widths, [" "] * len(heads)), rule]
        for i, row in enumerate(rows):
            if i and self.rows[i].group != self.rows[i - 1].group:
                lines.append(rule)
            marks = [signs.get(self.marks.get((i, j), ""), " ") for j in range(len(row))]
            lines.append(self._text_line(row, widths, marks))
        legend = "* best of a column, _ second best." if self.marks else ""
        notes = [*filter(None, (self.caption, legend))]
        return "\n".join([self.title, "=" * len(self.title), "", *lines, *([""] if notes else []), *notes]) + "\n"

    def to_markdown(self) -> str:
        """GitHub Markdown: **best**, <u>second</u>."""
        heads = [_for_markdown(column.one_head) for column in self.columns]
        rows = [[self._markdown(i, j) for j in range(len(heads))] for i in range(len(self.rows))]
        aligned = [":---" if j == 0 or column.words else "---:" for j, column in enumerate(self.columns)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [heads, aligned, *rows])
        return f"### {_for_markdown(self.title)}\n\n{table}\n" + (
            f"\n{_for_markdown(self.caption)}\n" if self.caption else ""
        )

    def to_latex(self) -> str:
        """A table environment for booktabs and graphicx: \\textbf{best}, \\underline{second}, narrowed to the line."""
        name = "table*" if len(self.columns) > 7 else "table"  # over both columns of a paper
        lines = [rf"\begin{{{name}}}[t]", r"\centering\setlength{\tabcolsep}{4pt}"]
        lines += [rf"\caption{{{_for_latex(f'{self.title}. {self.caption}')}}}"]
        lines += [rf"\label{{tab:{self.slug}}}", r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        letters = "".join(self._latex_letter(j) for j in range(len(self.columns)))
        lines += [rf"\begin{{tabular}}{{{letters}}}", r"\toprule", *self._latex_above()]
        lines += [_latex_row([_latex_head(column.full_head) for column in self.columns]), r"\midrule"]
        for i, row in enumerate(self.rows):
            if i and row.group != self.rows[i - 1].group:
                lines.append(r"\midrule")
            lines.append(_latex_row([self._latex(i, j) for j in range(len(self.columns))]))
        lines += [r"\bottomrule", r"\end{tabular}}", rf"\end{{{name}}}"]
        return "\n".join(lines) + "\n"

    def to_html(self, colours: Mapping[str, str] | None = None) -> str:
        """A <table>: heads are buttons to sort by, rows carry `data-method`, cells their number in `data-value`.

        Args:
            colours: method → CSS colour of the patch before its name.
        """
        heads = "".join(
            f'<th scope="col"{_class("words" if column.words else "" if j else "first")}><button type="button">'
            f'{_kept(escape(column.full_head))}<span aria-hidden="true" class="arrow"></span></button></th>'
            for j, column in enumerate(self.columns)
        )
        rows = []
        for i, row in enumerate(self.rows):
            edge = ' class="edge"' if i and row.group != self.rows[i - 1].group else ""
            patch = _patch((colours or {}).get(row.method))
            cells = "".join(self._html(i, j, patch) for j in range(len(self.columns)))
            rows.append(f'<tr data-method="{escape(row.method)}"{edge}>{cells}</tr>')
        head = f'<thead>{self._html_above()}<tr class="heads">{heads}</tr></thead>'
        body = "\n".join(["<tbody>", *rows, "</tbody>"])
        return f'<table id="{escape(self.slug)}" class="sortable">{head}{body}</table>'

    def _text_line(self, cells: list[str], widths: list[int], marks: list[str]) -> str:
        left = [j == 0 or column.words for j, column in enumerate(self.columns)]
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True))
        return " ".join(cell + mark for cell, mark in zip(padded, marks, strict=True)).rstrip()

    def _text_above(self, widths: list[int]) -> list[str]:
        cells, column = [], 0
        for above, span in self._above():
            cells.append(above.ljust(sum(widths[column : column + span]) + 2 * span))
            column += span
        return ["".join(cells).rstrip()] if cells else []

    def _plain(self, i: int, j: int) -> str:
        number, spread = self.body(i, j)
        return number + (f" ± {spread}" if spread else "") + self.rows[i].cells[j].note

    def _markdown(self, i: int, j: int) -> str:
        before, after = {BEST: ("**", "**"), SECOND: ("<u>", "</u>")}.get(self.marks.get((i, j), ""), ("", ""))
        return f"{before}{_for_markdown(self._plain(i, j))}{after}"

    def _latex(self, i: int, j: int) -> str:
        number, spread = self.body(i, j)
        command = {BEST: r"\textbf{%s}", SECOND: r"\underline{%s}"}.get(self.marks.get((i, j), ""), "%s")
        note = _for_latex(self.rows[i].cells[j].note)
        return command % _for_latex(number) + (rf"{{\scriptsize$\pm${_for_latex(spread)}}}" if spread else "") + note

    def _html(self, i: int, j: int, patch: str) -> str:
        number, spread = self.body(i, j)
        cell, mark = self.rows[i].cells[j], self.marks.get((i, j), "")
        body = {BEST: "<strong>%s</strong>", SECOND: "<u>%s</u>"}.get(mark, "%s") % escape(number)
        body += f"<small> ± {escape(spread)}</small>" if spread else ""
        body += f"<sup>{escape(cell.note)}</sup>" if cell.note else ""
        if j == 0:
            return f'<th scope="row" class="first">{patch}{body}</th>'
        value = "" if cell.mean is None else f' data-value="{cell.mean:.10g}"'
        kind = " ".join(filter(None, (mark, "words" if self.columns[j].words else "")))
        return f"<td{value}{_class(kind)}>{body}</td>"

    def _above(self) -> list[tuple[str, int]]:
        """The heads above the heads, with how many columns each spans; empty if there are none."""
        spans = [(above, len(list(same))) for above, same in groupby(column.above for column in self.columns)]
        return spans if any(above for above, _ in spans) else []

    def _latex_letter(self, j: int) -> str:
        if j and not self.columns[j].words:
            return "r"
        return "p{8cm}" if max((len(row.cells[j].text) for row in self.rows), default=0) > 50 else "l"

    def _latex_above(self) -> list[str]:
        cells, rules, column = [], [], 1
        for above, span in self._above():
            cells.append(rf"\multicolumn{{{span}}}{{c}}{{{_for_latex(above)}}}")
            if above:
                rules.append(rf"\cmidrule(lr){{{column}-{column + span - 1}}}")
            column += span
        return [_latex_row(cells), " ".join(rules)] if cells else []

    def _html_above(self) -> str:
        cells = "".join(
            f'<th colspan="{n}" scope="colgroup">{escape(a)}</th>' if a else f'<td colspan="{n}"></td>'
            for a, n in self._above()
        )
        return f'<tr class="above">{cells}</tr>' if cells else ""


def _patch(colour: str | None) -> str:
    return f'<i class="patch" style="background:{escape(colour)}"></i>' if colour else ""


def _kept(head: str) -> str:
    """Keep the arrow, and what a step count is up to, on the line of the word before."""
    return head.replace(" ↓", "&nbsp;↓").replace(" ↑", "&nbsp;↑").replace(" to ", " to&nbsp;")


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _for_markdown(text: str) -> str:
    return text.translate(_MARKDOWN_ESCAPES)


def _for_latex(text: str) -> str:
    return " ".join(text.split()).translate(_LATEX_ESCAPES)


def _latex_head(head: str) -> str:
    """A long head in two lines, cut at the space nearest to its middle."""
    cuts = [i for i, letter in enumerate(head[:-2]) if letter == " "]
    if len(head) < 12 or not cuts:
        return _for_latex(head)
    cut = min(cuts, key=lambda i: abs(2 * i - len(head)))
    return rf"\shortstack[r]{{{_for_latex(head[:cut])}\\{_for_latex(head[cut:])}}}"


def _latex_row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"

"""The report of an initialisation: the same table as text and as HTML, without columns that say nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from tests.tiny import adapted, text_batches

import cntlora
from cntlora.report import InitReport, html_table


class Tables(HTMLParser):
    """The cells of a table, row by row, and all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.rest: list[str] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside = self.inside or tag == "table"
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"

    def handle_data(self, data: str) -> None:
        (self.rows[-1] if self.inside else self.rest).append(data)


def report_of(**options: object) -> InitReport:
    torch.manual_seed(0)
    return cntlora.initialize(adapted("bert"), text_batches(), cntlora.InitConfig(num_batches=2, **options))


def columns(text: str) -> list[str]:
    return re.split(r"  +", text.splitlines()[1].strip())


@pytest.mark.parametrize("options", [{}, {"method": "self"}, {"method": "pissa"}, {"method": "self", "base": "offset"}])
def test_a_notebook_shows_the_table_that_is_printed(options: dict[str, str]) -> None:
    report = report_of(**options)
    bundle = report._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/plain"] == str(report)
    lines, shown = str(report).splitlines(), Tables(bundle["text/html"])
    table = [re.split(r"  +", line.strip()) for line in [lines[1], *lines[3 : 3 + len(report.sites)]]]
    assert shown.rows == table and len(table) == len(report.sites) + 1
    assert shown.rest == [lines[0], *lines[3 + len(report.sites) :]]


def test_columns_that_say_nothing_are_left_out() -> None:
    keep, offset = ({"method": "self", "base": base} for base in ("keep", "offset"))
    cases = {"self": keep, "offset": offset, "pissa": {"method": "pissa"}}
    heads = {name: columns(str(report_of(**options))) for name, options in cases.items()}
    assert "file rank" in heads["offset"] and "file rank" not in heads["self"]
    assert {"rtol", "mask", "‖ΔW‖/‖W‖"} <= set(heads["self"]) and not {"rtol", "mask"} & set(heads["pissa"])
    assert "tokens" in heads["self"] and "tokens" not in heads["pissa"]  # which reads none
    assert all({"site", "rank", "‖s·B·A‖/‖W‖", "ms"} <= set(found) for found in heads.values())


def test_names_are_text_in_html() -> None:
    shown = html_table("a < b", ("rank",), [("layer.<1>", "8 & 9")])
    assert "<1>" not in shown and Tables(shown).rows == [["site", "rank"], ["layer.<1>", "8 & 9"]]
    assert Tables(shown).rest == ["a < b"]

"""Tables over a setting: which columns there are, what is in them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the page needs the extra `report`")

from tests import report_cases as cases

from cntlora.lab.report import write_into, write_report
from cntlora.lab.report.by_setting import tables_by
from cntlora.lab.report.formats import BEST, Table
from cntlora.lab.report.study import studies


def record(experiment: str, rank: Any, method: str, score: float, **changes: Any) -> dict[str, Any]:
    evaluations = [{"step": 200, "seconds": 1.0, "loss": 1.0, "accuracy": 0.5, "macro_f1": score}]
    run = cases.record(method, changes.pop("rate", 0.001), changes.pop("seed", 0), evaluations=evaluations)
    return run | {"experiment": experiment, "config": {"lora": {"rank": rank}, "init": None}} | changes


def table7(*seeds: int) -> list[dict[str, Any]]:
    """Two methods at ranks 128, 64 and 32, as in table 7 of the paper; seed 0, or several that are alike."""
    found = {128: (62.74, 64.63), 64: (59.07, 62.98), 32: (56.62, 59.09)}
    scores = [(rank, m, s) for rank, pair in found.items() for m, s in zip(("lora", "cross"), pair, strict=True)]
    return [
        record(f"rank{rank}", rank, method, score, seed=seed)
        for rank, method, score in scores
        for seed in seeds or (0,)
    ]


def numbers(table: Table, method: str) -> list[str]:
    i = next(i for i, row in enumerate(table.rows) if row.method == method)
    return [table.body(i, j)[0] for j in range(1, len(table.columns))]


def test_columns_are_the_values_by_size_and_cells_the_main_metric() -> None:
    main, loss = tables_by(studies(table7(0, 1)), "lora.rank")
    assert [column.head for column in main.columns] == ["Method", "32", "64", "128"]
    assert numbers(main, "cross") == ["59.090", "62.980", "64.630"]
    assert {j for (i, j), mark in main.marks.items() if mark == BEST and main.rows[i].method == "cross"} == {1, 2, 3}
    assert not tables_by(studies(table7()), "lora.rank")[0].marks  # of one seed
    assert (main.title, loss.title) == ("Macro F1 by lora.rank", "Mean training loss by lora.rank")


def test_a_metric_that_is_better_low_is_marked_low() -> None:
    runs = [run | {"metrics": {"macro_f1": "min"}} for run in table7(0, 1)]
    main = tables_by(studies(runs), "lora.rank")[0]
    assert {main.rows[i].method for (i, _), mark in main.marks.items() if mark == BEST} == {"lora"}


def test_each_method_is_at_its_best_learning_rate_there() -> None:
    better = record("rank32", 32, "lora", 99.0, rate=0.003) | {"mean_loss": 0.01}
    assert numbers(tables_by(studies([*table7(), better]), "lora.rank")[0], "lora")[0] == "99.000"
    worse = better | {"mean_loss": 9.0}
    assert numbers(tables_by(studies([*table7(), worse]), "lora.rank")[0], "lora")[0] == "56.620"


def test_tasks_have_their_own_metric_and_a_mean_for_methods_that_have_them_all() -> None:
    def of(task: str, metric: str, method: str, value: float) -> dict[str, Any]:
        evaluations = [{"step": 200, "seconds": 1.0, metric: value}]
        return record("glue", 8, method, 0.0, task=task, metrics={metric: "max"}, main_metric=metric) | {
            "evaluations": evaluations
        }

    runs = [of("cola", "matthews", "lora", 0.6), of("rte", "accuracy", "lora", 0.8), of("rte", "accuracy", "eva", 0.9)]
    main = tables_by(studies(runs), "task")[0]
    assert [column.head for column in main.columns] == ["Method", "cola, matthews", "rte, accuracy", "mean"]
    assert numbers(main, "lora") == ["0.600", "0.800", "0.700"] and numbers(main, "eva") == ["–", "0.900", "–"]
    one_low = [run | {"metrics": {"accuracy": "min"}} if run["task"] == "rte" else run for run in runs]
    assert tables_by(studies(one_low), "task")[0].columns[-1].head != "mean"


def test_experiments_of_one_value_are_averaged_if_all_have_the_method() -> None:
    runs = [*table7(), record("dog", 32, "lora", 58.62)]
    main = tables_by(studies(runs), "lora.rank")[0]
    assert numbers(main, "lora")[0] == "57.620" and numbers(main, "cross")[0] == "–"
    assert "2 at 32" in main.caption and "2 at" not in tables_by(studies(table7()), "lora.rank")[0].caption


def test_a_broken_seed_is_marked_and_not_ranked() -> None:
    broken = record("rank32", 32, "cross", 0.0, seed=1) | {"status": "diverged", "evaluations": []}
    main = tables_by(studies([*table7(), broken]), "lora.rank")[0]
    assert "59.090†" in main.to_text() and "†" not in tables_by(studies(table7()), "lora.rank")[0].to_text()
    assert {main.rows[i].method for (i, j), mark in main.marks.items() if mark == BEST and j == 1} == {"lora"}


def test_a_setting_that_nobody_has_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"lora\.rnk.*no such setting.*lora\.rank"):
        tables_by(studies(table7()), "lora.rnk")


def test_one_value_for_all_or_two_in_a_study_are_refused() -> None:
    with pytest.raises(ValueError, match="all of them have tweets"):
        tables_by(studies(table7()), "task")
    mixed = [*table7(), record("rank32", 16, "eva", 1.0)]
    with pytest.raises(ValueError, match=r"rank32 differ by it \(16, 32\)"):
        tables_by(studies(mixed), "lora.rank")


def test_full_fine_tuning_without_the_setting_does_not_matter() -> None:
    full = record("rank32", 32, "full", 70.0) | {"config": {"lora": None}}
    assert numbers(tables_by(studies([*table7(), full]), "lora.rank")[0], "full") == ["70.000", "–", "–"]


def test_it_is_on_the_page_in_the_tables_and_between_its_marks(tmp_path: Path) -> None:
    for run in table7(0, 1):
        cases.write([run], tmp_path / "table7" / run["experiment"])
    write_report(tmp_path / "table7", tmp_path / "out", figures=None, by="lora.rank")
    page = (tmp_path / "out" / "page.html").read_text()
    assert "<h2>By lora.rank</h2>" in page and 'id="by-lora-rank-main"' in page
    assert "## By lora.rank" in (tmp_path / "out" / "tables.md").read_text()
    document = tmp_path / "doc.md"
    document.write_text("a\n<!-- table7 by lora.rank: begin -->\nold\n<!-- table7 by lora.rank: end -->\nb\n")
    write_into(document, tmp_path / "table7", by="lora.rank")
    text = document.read_text()
    assert re.search(r"\| CNTLoRA-X \| \*\*59\.090", text) and "old" not in text and text.endswith("b\n")
    with pytest.raises(ValueError, match="rank128: begin"):
        write_into(document, tmp_path / "table7")


def test_a_mark_that_says_brief_gets_the_best_and_the_learning_rates_alone(tmp_path: Path) -> None:
    cases.write([record("rank32", 32, method, 1.0) for method in ("lora", "eva")], tmp_path / "records")
    texts = {}
    for kind in ("begin", "begin brief"):
        document = tmp_path / "doc.md"
        document.write_text(f"a\n<!-- rank32: {kind} -->\nold\n<!-- rank32: end -->\nb\n")
        for _ in range(2):  # the mark stays, so that the second time gives the same
            write_into(document, tmp_path / "records")
        texts[kind] = re.findall(r"^### .*", document.read_text(), re.MULTILINE)
        assert f"<!-- rank32: {kind} -->" in document.read_text() and "old" not in document.read_text()
    heads = ["### Methods at their best learning rate", "### Mean training loss at every learning rate"]
    assert texts["begin brief"] == heads and texts["begin"][:2] == heads and len(texts["begin"]) > 2

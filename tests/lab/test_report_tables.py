"""Records and tables of the report: what is read, which learning rate is best, what is marked, how it is escaped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from tests import report_cases as cases
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.lab.record import write_record
from cntlora.lab.report import load_records, studies
from cntlora.lab.report.batches_read import steps_on_read_batches
from cntlora.lab.report.curves import loss_curve, metric_curve, smooth, steps_to_reach
from cntlora.lab.report.formats import BEST, SECOND, Cell, Column, Row, Table
from cntlora.lab.report.methods import GROUNDS, LEGIBLE, PEERS, contrast, ordered, styles
from cntlora.lab.report.sentences import glance, summary
from cntlora.lab.report.study import Estimate, Study
from cntlora.lab.report.tables import (
    all_tables,
    brief_tables,
    drift_table,
    failures_table,
    main_table,
    metric_name,
    number_spec,
    sensitivity_table,
    start_table,
)


def table_of(values: list[float | None], direction: str | None = "min", **column: object) -> Table:
    """A table of one column of numbers."""
    rows = tuple(Row(f"m{i}", (Cell(f"m{i}"), Cell(mean=value))) for i, value in enumerate(values))
    return Table("t", "T", (Column("Method"), Column("value", direction, **column)), rows)  # type: ignore[arg-type]


def marked(table: Table, column: int = 1) -> dict[str, list[int]]:
    """Mark → rows."""
    found: dict[str, list[int]] = {BEST: [], SECOND: []}
    for (i, j), mark in sorted(table.marks.items()):
        if j == column:
            found[mark].append(i)
    return found


def column_of(table: Table, head: str) -> int:
    return next(j for j, column in enumerate(table.columns) if column.head == head)


def row_of(table: Table, method: str) -> tuple[Cell, ...]:
    return next(row.cells for row in table.rows if row.method == method)


@pytest.fixture(scope="module")
def study() -> Study:
    return studies(cases.many())[0]


class TestRecords:
    def test_finds_records_in_any_depth_in_a_fixed_order_and_nothing_else(self, tmp_path: Path) -> None:
        records = cases.few()
        cases.write(records[::2], tmp_path / "b" / "c")
        cases.write(records[1::2], tmp_path / "a")
        (tmp_path / "other.json").write_text('{"method": "no run record"}')
        (tmp_path / "list.json").write_text("[1, 2]")
        loaded = load_records(tmp_path)
        assert len(loaded) == len(records)
        places = [(r["method"], r["learning_rate"], r["seed"]) for r in loaded]
        assert places == sorted(places, key=lambda p: (["lora", "eva", "self", "self+vas"].index(p[0]), *p[1:]))

    def test_a_cut_file_is_named(self, tmp_path: Path) -> None:
        cases.write(cases.few(), tmp_path)
        cut = tmp_path / "lora-lr0.001-seed0.json"
        cut.write_text(cut.read_text()[:-20])
        with pytest.raises(ValueError, match=re.escape(str(cut))):
            load_records(tmp_path)

    @pytest.mark.parametrize("seed", [None, "one"])
    def test_a_record_without_a_seed_is_named(self, tmp_path: Path, seed: object) -> None:
        cases.write([cases.record("lora", 0.001, 0)], tmp_path)
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(cases.record("eva", 0.001, 0) | {"seed": seed}))
        with pytest.raises(ValueError, match=r"bad\.json.*seed"):
            load_records(tmp_path)

    def test_two_records_of_one_run_are_refused(self, tmp_path: Path) -> None:
        one = cases.record("lora", 0.001, 0)
        cases.write([one], tmp_path / "a")
        cases.write([one], tmp_path / "b")
        with pytest.raises(ValueError, match="same run"):
            load_records(tmp_path)

    @pytest.mark.parametrize("make", [False, True])
    def test_no_records_names_the_folder(self, tmp_path: Path, make: bool) -> None:
        folder = tmp_path / "nothing"
        if make:
            folder.mkdir()
        with pytest.raises(ValueError, match="nothing"):
            load_records(folder)

    def test_experiments_and_tasks_are_not_mixed(self) -> None:
        one, other = cases.record("lora", 0.001, 0), cases.record("lora", 0.001, 1)
        assert len(studies([one, other])) == 1
        assert len(studies([one, other | {"experiment": "glue"}])) == 2
        assert [s.name for s in studies([one | {"task": "a"}, other | {"task": "b"}])] == ["tweets · a", "tweets · b"]

    def test_methods_of_one_label_are_told_apart(self) -> None:
        runs = [cases.record("lora", 0.001, 0), cases.record("eva", 0.001, 0), cases.record("self", 0.001, 0)]
        labels = studies([runs[0], runs[1] | {"label": "LoRA"}, runs[2]])[0].labels
        assert labels == {"lora": "LoRA (lora)", "eva": "LoRA (eva)", "self": "CNTLoRA-S"}


class TestBestLearningRate:
    def rates(self, **changes: object) -> list[dict[str, object]]:
        """Make records: at 0.001 a loss of 0.9, at 0.003 one of 0.5; `changes` go to one seed at 0.003."""
        low = [cases.record("lora", 0.001, seed, mean_loss=0.9) for seed in (0, 1)]
        high = [cases.record("lora", 0.003, seed, mean_loss=0.5) for seed in (0, 1)]
        return [*low, high[0], high[1] | changes]

    def test_the_lowest_mean_over_seeds_wins(self) -> None:
        assert studies(self.rates())[0].best["lora"].learning_rate == 0.003
        assert studies(self.rates(mean_loss=1.4))[0].best["lora"].learning_rate == 0.001

    def test_a_rate_with_fewer_seeds_does_not_compete(self) -> None:
        lucky = cases.record("lora", 0.006, 0, mean_loss=0.1)
        assert studies([*self.rates(), lucky])[0].best["lora"].learning_rate == 0.003
        assert studies([*self.rates(), lucky, cases.record("lora", 0.006, 1, mean_loss=0.1)])[0].best[
            "lora"
        ].learning_rate == pytest.approx(0.006)  # the control

    @pytest.mark.parametrize("status", ["diverged", "failed"])
    def test_a_broken_seed_never_beats_a_whole_learning_rate(self, status: str) -> None:
        assert studies(self.rates(status=status, mean_loss=None))[0].best["lora"].learning_rate == 0.001

    def test_a_method_that_is_broken_everywhere_still_has_a_best_but_is_not_ranked(self) -> None:
        runs = [r | {"status": "diverged", "mean_loss": None} if r["seed"] == 1 else r for r in self.rates()]
        eva = [cases.record("eva", 0.001, seed, mean_loss=0.8) for seed in (0, 1)]
        found = studies([*runs, *eva])[0]
        assert found.best["lora"].learning_rate == 0.003
        table = main_table(found)
        loss = column_of(table, "mean training loss")
        assert row_of(table, "lora")[loss].mean == 0.5 < row_of(table, "eva")[loss].mean
        assert marked(table, loss) == {BEST: [1], SECOND: []}
        assert "LoRA†" in table.to_text() and "1/2" in table.to_text()

    def test_the_criterion_follows_the_direction_of_a_metric(self) -> None:
        def with_final(rate: float, **values: float) -> dict[str, object]:
            return cases.record("lora", rate, 0, evaluations=[{"step": 200, "seconds": 1.0, **values}])

        runs = [with_final(0.001, loss=0.4, accuracy=0.6), with_final(0.003, loss=0.7, accuracy=0.9)]
        assert studies(runs, "accuracy")[0].best["lora"].learning_rate == 0.003
        assert studies(runs, "loss")[0].best["lora"].learning_rate == 0.001

    def test_main_is_the_main_metric_of_each_study_in_its_direction(self) -> None:
        def with_final(task: str, way: str, rate: float, value: float) -> dict[str, object]:
            changes = {"task": task, "metrics": {task: way}, "main_metric": task}
            evaluations = [{"step": 200, "seconds": 1.0, task: value}]
            return cases.record("lora", rate, 0, evaluations=evaluations) | changes

        runs = [with_final("dino", "max", 0.001, 60.0), with_final("dino", "max", 0.003, 62.0)]
        runs += [with_final("perplexity", "min", 0.001, 8.0), with_final("perplexity", "min", 0.003, 9.0)]
        rates = {study.criterion: study.best["lora"].learning_rate for study in studies(runs, "main")}
        assert rates == {"dino": 0.003, "perplexity": 0.001}
        with pytest.raises(ValueError, match="no 'dino'"):
            studies(runs, "dino")

    def test_an_unknown_criterion_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="f2.*mean_loss, main, loss, accuracy, macro_f1"):
            studies(cases.few(), "f2")


class TestNumbers:
    def test_spread_is_the_sample_standard_deviation(self, study: Study) -> None:
        runs = study.best["self"].finished
        loss = study.best["self"].estimate("mean_loss")
        assert loss.mean == pytest.approx(mean(r["mean_loss"] for r in runs))
        assert loss.spread == pytest.approx(stdev(r["mean_loss"] for r in runs))

    def test_one_seed_has_no_spread_and_none_has_no_number(self) -> None:
        assert Estimate.of([2.0]) == Estimate(2.0, None, 1)
        assert Estimate.of([None, math.nan, math.inf]) == Estimate(None, None, 0)
        one = studies([cases.record("lora", 0.001, 0)])[0]
        assert "±" not in main_table(one).to_text().split("\n\n")[1]
        two = studies([cases.record("lora", 0.001, seed) for seed in (0, 1)])[0]
        assert "±" in main_table(two).to_text().split("\n\n")[1]

    def test_smoothing_is_a_trailing_mean_of_full_windows(self) -> None:
        losses = [float(i) for i in range(40)]  # window of 2
        assert smooth(losses) == [None, *(i - 0.5 for i in range(1, 40))]
        assert smooth([1.0, math.nan, 3.0]) == [1.0, None, 3.0]

    def test_steps_to_reach_is_the_first_step_at_or_below(self) -> None:
        runs = [cases.record("lora", 0.001, 0, losses=[5.0, 4.0, 3.0, 2.0]), cases.record("eva", 0.001, 0)]
        group = studies(runs)[0].best["lora"]
        assert [steps_to_reach(group, loss) for loss in (5.0, 3.0, 2.5, 1.9)] == [1, 3, 4, None]

    def test_plain_lora_reaches_its_own_final_loss_and_a_slower_method_does_not(self) -> None:
        slow = cases.record("eva", 0.001, 0, losses=[9.0] * 200)
        table = main_table(studies([cases.record("lora", 0.001, 0), slow])[0])
        steps = next(j for j, column in enumerate(table.columns) if column.head.startswith("steps to"))
        assert 0 < row_of(table, "lora")[steps].mean <= 200  # type: ignore[operator]
        assert row_of(table, "eva")[steps].mean is None
        without = main_table(studies([slow])[0])
        assert not any(column.head.startswith("steps to") for column in without.columns)

    def test_the_wall_clock_starts_with_the_initialisation(self) -> None:
        run = cases.record("self", 0.001, 0, init_seconds=7.0)
        plain, clock = (metric_curve(studies([run])[0].best["self"], "accuracy", clock=c) for c in (False, True))
        assert plain.x == (0, 25, 50, 100, 150, 200) and plain.mean == clock.mean
        assert clock.x == pytest.approx([7.0 + e["seconds"] for e in run["evaluations"]])

    def test_the_training_loss_has_the_same_values_against_steps_and_seconds(self) -> None:
        runs = [cases.record("self", 0.001, seed, init_seconds=7.0) for seed in (0, 1)]
        group = studies(runs)[0].best["self"]
        plain, clock = loss_curve(group), loss_curve(group, clock=True)
        assert plain.mean == clock.mean and plain.x[-1] == 200
        assert clock.x[-1] == pytest.approx(7.0 + mean(run["seconds"][-1] for run in runs))

    def test_evaluations_without_seconds_take_those_of_the_steps(self) -> None:
        run = cases.record("self", 0.001, 0, init_seconds=0.0)
        bare = run | {"evaluations": [e | {"seconds": None} for e in run["evaluations"]]}
        one, other = (metric_curve(studies([r])[0].best["self"], "loss", clock=True) for r in (run, bare))
        assert one.x == other.x

    def test_curves_have_only_points_that_every_seed_has(self) -> None:
        runs = [cases.record("lora", 0.001, 0), cases.record("lora", 0.001, 1, losses=[1.0] * 100)]
        assert len(loss_curve(studies(runs)[0].best["lora"]).x) < 101

    def test_values_over_sites_are_averaged_over_sites_then_seeds(self) -> None:
        def run(seed: int, *cosines: float | None) -> dict[str, object]:
            sites = {str(i): {"kind": "key", "cosine": cosine} for i, cosine in enumerate(cosines)}
            return cases.record("self", 0.001, seed, sites=sites | {"q": {"kind": "query", "cosine": 9.0}})

        group = studies([run(0, 0.2, 0.4, None), run(1, 0.7)])[0].best["self"]
        assert group.over_sites("cosine", kind="key").mean == pytest.approx((0.3 + 0.7) / 2)
        assert group.over_sites("cosine").mean != pytest.approx((0.3 + 0.7) / 2)

    def test_small_numbers_get_more_decimals(self) -> None:
        assert [number_spec([Estimate.of([v])]) for v in (62.7, 0.1, 0.09, 0.0123, 0.004, 1e-12)] == [
            *(".3f", ".3f", ".4f", ".4f", ".5f", ".8f")
        ]
        assert number_spec([Estimate.of([]), Estimate.of([0.0])]) == ".3f"
        losses = (("lora", 0.0312), ("self", 0.0309))
        small = [cases.record(m, 0.001, seed, mean_loss=loss) for m, loss in losses for seed in (0, 1)]
        table = main_table(studies(small)[0])
        assert marked(table, column_of(table, "mean training loss")) == {BEST: [1], SECOND: [0]}
        assert table.body(1, column_of(table, "against LoRA"))[0] == "−0.0003"

    def test_metrics_in_words(self) -> None:
        names = ("loss", "macro_f1", "clip_i", "image_similarity", "mean_loss")
        assert [*map(metric_name, names)] == [
            *("held-out loss", "macro F1", "CLIP-I", "image similarity", "mean training loss")
        ]


class TestMarks:
    def test_best_and_second_follow_the_direction(self) -> None:
        assert marked(table_of([3.0, 1.0, 2.0], "min")) == {BEST: [1], SECOND: [2]}
        assert marked(table_of([3.0, 1.0, 2.0], "max")) == {BEST: [0], SECOND: [2]}
        assert marked(table_of([3.0, 1.0, 2.0], None)) == {BEST: [], SECOND: []}

    def test_values_that_print_alike_share_the_mark(self) -> None:
        values = [0.50004, 0.50001, 0.6, 0.6001]
        assert marked(table_of(list(values), spec=".3f")) == {BEST: [0, 1], SECOND: [2, 3]}
        assert marked(table_of(list(values), spec=".5f")) == {BEST: [1], SECOND: [0]}

    def test_a_missing_value_is_a_dash_and_never_the_best(self) -> None:
        table = table_of([None, 2.0, None])
        assert marked(table) == {BEST: [1], SECOND: []}
        assert table.body(0, 1) == ("–", "")

    def test_one_seed_has_no_best(self) -> None:
        """A difference between single runs may be chance: nothing is bold, on the page no method is named as best."""
        one = [run for run in cases.few() if run["seed"] == 0]
        single, several = studies(one)[0], studies(cases.few())[0]
        for table in all_tables(single):
            assert not table.marks and "±" not in table.caption, table.slug
        assert "so no best is marked" in main_table(single).to_text() and "*" not in main_table(single).to_markdown()
        assert glance(single, main_table(single)) == [] and "chance" in summary(single)
        assert main_table(several).marks and "chance" not in main_table(several).caption  # the control
        assert glance(several, main_table(several)) and "chance" not in summary(several)

    def test_marks_in_every_format(self) -> None:
        table = table_of([1.0, 2.0, 3.0])
        assert re.search(r"m0 +1\.000\*\n", table.to_text()) and re.search(r"m1 +2\.000_\n", table.to_text())
        assert "| **1.000** |" in table.to_markdown() and "| <u>2.000</u> |" in table.to_markdown()
        assert r"\textbf{1.000}" in table.to_latex() and r"\underline{2.000}" in table.to_latex()
        assert 'class="best"><strong>1.000</strong>' in table.to_html() and "<u>2.000</u>" in table.to_html()
        for text in (table.to_text(), table.to_markdown(), table.to_latex(), table.to_html()):
            assert not re.search(r"(\*|_|\{|>|\*\*)3\.000(\*|_|\}|</(u|strong))", text)

    def test_a_spread_has_the_decimals_of_its_mean(self) -> None:
        column = Column("x", spec="#.3g")
        assert (column.number(0.07481), column.spread(0.07481, 0.000714)) == ("0.0748", "0.0007")
        signed = Column("x", spec="+.3f")
        assert signed.number(-0.0001) == signed.number(0.0) == "+0.000"
        assert (signed.number(-0.0104), signed.spread(-1, 0.2)) == ("−0.010", "0.200")


NASTY = r"<script>alert(1)</script> 50% of_a & b # $x$ {y} | ~z^ \w *s* – ‖Δ‖"


class TestFormats:
    @pytest.fixture
    def nasty(self) -> Table:
        """A name of nothing but special characters in the title, the caption, a head and a cell."""
        rows = (Row('"><b>', (Cell(NASTY), Cell(mean=1.0, spread=0.1))), Row("b", (Cell("b"), Cell(NASTY)), "2"))
        return Table("slug", NASTY, (Column("Method"), Column(NASTY, "min", above=NASTY)), rows, NASTY)

    def test_html_has_no_markup_of_a_name(self, nasty: Table) -> None:
        html = nasty.to_html({'"><b>': "#123456"})
        assert "<script>" not in html and "<b>" not in html
        assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
        assert "<script>" in NASTY  # the control

    def test_markdown_rows_have_as_many_cells_as_the_head(self, nasty: Table, study: Study) -> None:
        for table in [nasty, *all_tables(study)]:
            lines = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert counts == {len(table.columns) + 1} and len(lines) == len(table.rows) + 2
            assert re.fullmatch(r"\|( :?-+:? \|)+", lines[1])
        assert "<script>" not in nasty.to_markdown()

    def test_latex_is_balanced_and_has_no_bare_special_characters(self, nasty: Table, study: Study) -> None:
        for table in [nasty, *all_tables(study)]:
            latex = table.to_latex()
            bare = re.sub(r"\\[\\{}%&#_$]", " ", latex)  # without the escaped ones
            assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
            assert re.findall(r"\\begin{(\w+\*?)}", latex) == re.findall(r"\\end{(\w+\*?)}", latex)[::-1]
            body = [line for line in latex.split(r"\midrule", 1)[1].splitlines() if line.endswith(r" \\")]
            assert len(body) == len(table.rows)
            assert {line.replace(r"\&", "").count("&") for line in body} == {len(table.columns) - 1}
            assert not re.search(r"(?<!\\)[#_]", latex.replace(rf"\label{{tab:{table.slug}}}", ""))
            assert re.findall(r"(?<!\\)%.*", latex) == ["%"]
            assert latex.isascii(), set(re.findall(r"[^\x00-\x7f]", latex))

    def test_text_columns_line_up(self, study: Study) -> None:
        for table in all_tables(study):
            lines = table.to_text().split("\n\n")[1].splitlines()
            rule = next(line for line in lines if set(line) == {"-", " "})
            assert sum(line == rule for line in lines) >= 1
            ends = [m.end() for m in re.finditer(r"-+", rule)]
            for line in lines[lines.index(rule) + 1 :]:
                assert all(line[end : end + 1] in ("", " ", "*", "_", "-") for end in ends)
                assert len(line) <= len(rule) + 1

    def test_a_group_of_columns_is_spanned(self, study: Study) -> None:
        table = drift_table(study)
        assert r"\multicolumn{5}{c}{cosine similarity} & \multicolumn{5}{c}{spectral norm}" in table.to_latex()
        assert r"\cmidrule(lr){2-6} \cmidrule(lr){7-11}" in table.to_latex()
        assert '<th colspan="5" scope="colgroup">cosine similarity</th>' in table.to_html()
        assert "cosine similarity: query ↑" in table.to_markdown()


class TestTables:
    def test_rows_follow_the_paper_and_the_unknown_comes_last(self) -> None:
        names = ["zeta", "shift+vas", "self+vas", "cross", "shift", "self", "peft:eva", "alpha", *reversed(PEERS)]
        order = ordered(names)
        ours = ["cross", "self", "shift", "self+vas", "shift+vas"]
        assert order == [*PEERS, "peft:eva", *ours, "alpha", "zeta"]

    def test_every_method_has_a_row_in_the_main_table(self, study: Study) -> None:
        assert [row.method for row in main_table(study).rows] == ordered(cases.METHODS)

    def test_metrics_go_by_their_own_direction(self, study: Study) -> None:
        table = main_table(study)
        for head, choose in (("held-out loss", min), ("accuracy", max)):
            j = column_of(table, head)
            values = [row.cells[j].mean for row in table.rows]
            assert values[marked(table, j)[BEST][0]] == choose(values)  # type: ignore[type-var]

    def test_sensitivity_has_a_column_a_learning_rate_and_says_what_broke(self, study: Study) -> None:
        table = sensitivity_table(study, "mean_loss")
        assert [column.head for column in table.columns[1:]] == ["0.0003", "0.001", "0.003", "0.01"]
        assert row_of(table, "rslora")[4].text == "diverged"
        assert all(sum("‡" in cell.note for cell in row.cells) == 1 for row in table.rows)

    def test_sensitivity_of_a_partly_broken_rate_counts_its_seeds_and_does_not_rank(self) -> None:
        runs = [cases.record(m, 0.001, seed) for m in ("lora", "eva") for seed in (0, 1)]
        runs[0] |= {"status": "failed", "mean_loss": None}
        table = sensitivity_table(studies(runs)[0], "mean_loss")
        assert "(1/2)" in row_of(table, "lora")[1].note and not row_of(table, "lora")[1].competes

    def test_methods_without_sites_are_left_out_of_the_tables_of_sites(self, study: Study) -> None:
        methods = {row.method for row in drift_table(study).rows}
        assert "full" not in methods and "adalora" not in methods and "lora" in methods
        assert "lora" not in {row.method for row in drift_table(study, "cosine_product").rows}

    def test_lora_has_no_gradient_of_a_at_the_start_and_ours_have(self, study: Study) -> None:
        table = start_table(study)
        assert row_of(table, "lora")[1].mean == 0.0
        assert row_of(table, "self")[1].mean > 0.0  # type: ignore[operator]
        assert row_of(table, "olora")[4].mean is None  # its record has no `start`

    def test_every_broken_run_is_listed_with_its_reason(self, study: Study) -> None:
        table = failures_table(study)
        assert len(table.rows) == sum(run["status"] != "finished" for run in study.runs) == 12
        assert "out of memory" in table.to_text() and "not finite after step 61" in table.to_text()

    def test_runs_of_another_model_are_listed_beside_the_loss_of_most(self) -> None:
        runs = cases.few()
        assert not {"tweets-strangers"} & {t.slug for t in all_tables(studies(runs)[0])}  # control
        for run in runs[:3]:  # three of LoRA's: two of seed 0 and one of seed 1
            run["start"] = {"loss_before": 1.12, "loss_after": 1.12}
        runs[5]["start"] = {"loss_before": 1.0901, "loss_after": 1.0}  # rounding
        runs[6]["start"] = None
        for tables in (all_tables(studies(runs)[0]), brief_tables(studies(runs)[0])):
            (table,) = (t for t in tables if t.slug == "tweets-strangers")
            places = [(row.method, row.cells[1].mean, row.cells[2].mean) for row in table.rows]
            assert places == [("lora", 0.001, 0), ("lora", 0.003, 0), ("lora", 0.001, 1)]
            assert [[cell.mean for cell in row.cells[3:]] for row in table.rows] == [[1.12, 1.09]] * 3
            assert "make these runs again" in table.caption.lower()

    def test_records_of_nulls_make_whole_tables(self) -> None:
        bare = cases.failed("lora", 0.001, 0) | {"status": "finished", "label": None, "machine": None}
        tables = all_tables(studies([bare, cases.failed("eva", 0.001, 0)])[0])
        assert {table.slug for table in tables} >= {"tweets-best", "tweets-failures"}
        assert all(text and "None" not in text for t in tables for text in (t.to_text(), t.to_latex(), t.to_markdown()))


def test_styles_of_35_methods_are_legible_on_both_grounds_and_all_different() -> None:
    variants = [f"{mode}+{v}" for mode in ("cross", "self", "shift") for v in ("a", "b", "c", "d")]
    found = styles([*cases.METHODS, *variants, "unknown"])
    assert len(found) >= 35 and len(set(found.values())) == len(found)
    assert len({style.colour for style in found.values()}) == len(found)
    assert all(contrast(style.colour, ground) >= LEGIBLE for style in found.values() for ground in GROUNDS)
    assert contrast("#ffff00", GROUNDS[0]) < LEGIBLE  # the control


def test_against_lora_what_the_seeds_share_drops_out() -> None:
    """Seeds that differ by far more than the methods: the means overlap, the paired difference does not."""
    records = [
        cases.record(
            method, 0.003, seed, mean_loss=1.0 + 0.2 * seed + (0.0 if method == "lora" else -0.01 - 0.001 * seed)
        )
        for method in ("lora", "eva")
        for seed in (0, 1, 2)
    ]
    table = main_table(studies(records)[0])
    paired, alone = column_of(table, "against LoRA"), column_of(table, "mean training loss")
    eva = row_of(table, "eva")
    assert eva[paired].mean == pytest.approx(-0.011) and eva[paired].spread == pytest.approx(0.001)
    assert eva[alone].spread is not None and eva[alone].spread > 0.19  # the control: unpaired, nothing can be told
    assert row_of(table, "lora")[paired].mean == 0.0
    without = main_table(studies([r for r in records if r["method"] != "lora"])[0])
    assert "against LoRA" not in [column.head for column in without.columns]


def test_later_leaves_out_the_batches_that_the_initialisation_had_seen() -> None:
    """0.5 ahead on the three batches that it read, 0.1 behind on all others."""
    config: dict[str, Any] = {"init": {"num_batches": 3}, "num_batches": None, "train": {"gradient_accumulation": 1}}
    plain = cases.record("lora", 0.003, 0, losses=[1.0] * 10, mean_loss=1.0)
    ahead = {"losses": [0.5] * 3 + [1.1] * 7, "mean_loss": 0.92}
    records = [plain, cases.record("eva", 0.003, 0, **ahead) | {"config": config}]
    table = main_table(studies(records)[0])
    whole, later = (row_of(table, "eva")[column_of(table, head)].mean for head in ("against LoRA", "later"))
    assert whole == pytest.approx(-0.08) and later == pytest.approx(0.1)
    for method, read in (("eva", 3), ("eva+dora", 3), ("eva+unseen", 0), ("eva+foreign", 0), ("pissa", 0), ("lora", 0)):
        assert steps_on_read_batches({"method": method, "config": config}) == read, method
    fitted = {"init": None, "num_batches": 3}
    assert [steps_on_read_batches({"method": m, "config": fitted}) for m in ("lora+fitted", "lora+head", "lora")] == [
        3,
        3,
        0,
    ]
    of_peft = {"init": None, "num_batches": 8, "train": {"gradient_accumulation": 3}}
    assert steps_on_read_batches({"method": "peft:eva", "config": of_peft}) == 3  # 8 batches are two updates and a part
    assert steps_on_read_batches({"method": "peft:pissa", "config": of_peft}) == 0
    assert steps_on_read_batches({"method": "of another code", "config": {}}) == 0


def test_a_record_that_was_edited_is_no_record(tmp_path: Path) -> None:
    """By its digest; those of before there was one are read."""
    write_record(tmp_path / "run.json", cases.few()[0])
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(load_records(tmp_path)) == 1
    record["mean_loss"] += 1.0
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json: the record is not what was saved"):
        load_records(tmp_path)
    del record["digest"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert len(load_records(tmp_path)) == 1


def test_the_command_looks_for_the_folder_first(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "nosuch", "nosuch is no folder"), (tmp_path, "nothing to write: give --out")):
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert result.exit_code == 1 and says in result.stderr

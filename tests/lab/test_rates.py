"""Learning rates in the records: interpolation, ranges, common rates, predictions; and the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="tables of runs need the extra `lab`")
import pandas as pd
from benchmarks import rates
from benchmarks.overview import RUNS

from cntlora.analysis.learning_rate import rate_of

CURVE = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}


def test_a_loss_between_two_rates_is_interpolated_in_the_logarithm() -> None:
    assert rates.loss_at(CURVE, 1e-3) == 1.0 and rates.loss_at(CURVE, 10**-3.5) == pytest.approx(1.5)
    assert rates.loss_at(CURVE, 10**-3.5) != pytest.approx(rates.loss_at(CURVE, 10**-3.25))  # control
    assert rates.loss_at(CURVE, 1e-5) is None and rates.loss_at(CURVE, 2e-2) is None


def test_the_good_range_ends_where_the_loss_is_too_high_or_the_rates_end() -> None:
    low, high, cut = rates.good_range(CURVE, 0.5)
    assert not cut and rates.loss_at(CURVE, low) == pytest.approx(1.5) == rates.loss_at(CURVE, high)
    assert low < 1e-3 < high
    assert rates.good_range(CURVE, 0.1)[0] > low  # control: less is good for a smaller share
    assert rates.good_range(CURVE, 1.0) == (1e-4, pytest.approx(1e-2 * 10**-0.5), True)


def test_the_range_is_the_one_around_the_best_rate() -> None:
    """Another valley beyond a bad rate does not count."""
    assert rates.good_range({1e-4: 1.02, 1e-3: 2.0, 1e-2: 1.0}, 0.05)[0] > 1e-3


def test_the_common_rate_loses_least_on_average() -> None:
    one = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 2.0}
    rate, average, worst = rates.best_common_rate([one, one])
    assert rate == pytest.approx(1e-3, rel=0.05) and (average, worst) == (pytest.approx(0, abs=0.02),) * 2
    other = {1e-3: 1.0, 1e-2: 0.1}
    rate, average, worst = rates.best_common_rate([one, other])
    assert rate == pytest.approx(1e-2) and (average, worst) == (pytest.approx(0.5), pytest.approx(1.0))


def test_a_quantity_that_the_rate_follows_predicts_it() -> None:
    known = [
        rates.Known(task, method, quantity, factor * quantity**0.5)
        for task, quantity in (("a", 1.0), ("b", 4.0), ("c", 25.0))
        for method, factor in (("lora", 1e-3), ("eva", 3e-4))
    ]
    assert rates.prediction_error(known) == pytest.approx(1.0)
    assert rates.prediction_error(known, exponent=False) > 2  # control
    shuffled = [rates.Known(one.task, one.method, 1 / one.quantity**2, one.rate) for one in known[:4]] + known[4:]
    assert rates.prediction_error(shuffled) > 1.5


def test_beyond_the_rates_that_were_run_the_nearest_one_counts() -> None:
    assert (rates.nearest_loss(CURVE, 1e-5), rates.nearest_loss(CURVE, 1.0)) == (2.0, 3.0)
    assert rates.nearest_loss(CURVE, 10**-3.5) == rates.loss_at(CURVE, 10**-3.5)


def test_percentages_have_signs_and_no_minus_before_zero() -> None:
    assert [rates._percent(value) for value in (0.123, -0.02, -0.001, 0.0)] == ["+12 %", "−2 %", "0 %", "0 %"]
    assert [rates._percent(value, 1) for value in (-0.0021, -0.0001)] == ["−0.2 %", "0.0 %"]


@pytest.mark.published
def test_the_numbers_are_those_of_the_runs() -> None:
    """By pandas alone, which knows nothing of our tables."""
    frame = pd.read_parquet(RUNS / "vision_emoji.parquet")
    first = frame[(frame["seed"] == 0) & (frame["method"] == "eva")]
    ends = dict(zip(first["learning_rate"], first["evaluations.loss"].map(lambda losses: losses[-1]), strict=True))
    assert rates.curves(RUNS, "vision_emoji")["eva"] == pytest.approx(ends)
    assert rates.best(ends) == 3e-4 != rates.best(rates.curves(RUNS, "tweets")["eva"])
    row = next(line for line in rates.best_rates().splitlines() if line.startswith("| EVA"))
    assert row.split(" | ")[2] == "0.0003"


@pytest.mark.published
def test_every_task_has_every_method_and_known_errors_are_finite() -> None:
    assert all(len(rates.curves(RUNS, task)[method]) >= 3 for task in rates.tasks() for method in rates.METHODS)
    for _, key, relative in rates.QUANTITIES:
        assert math.isfinite(rates.prediction_error(rates.at_step_0(RUNS, key, relative)))


@pytest.mark.published
def test_the_proposals_are_those_of_their_record(tmp_path: Path) -> None:
    found = {(p.task, p.method): p for p in rates.proposals()}
    assert {task for task, _ in found} == {*rates.FITTED, *rates.DECIDED}
    record = json.loads(rates.PROPOSED.read_text())
    for (task, method), one in found.items():
        facts = record["tasks"][task][method]
        assert one.proposed == facts["learning_rate"] == pytest.approx(rate_of(facts["motion"]))
        assert one.swept == rates.best(rates.curves(RUNS, task)[method]) and one.excess >= 0
    record["tasks"]["pairs"]["eva"]["learning_rate"] = 3e-4
    (tmp_path / "other.json").write_text(json.dumps(record))
    assert rates.proposed(record=tmp_path / "other.json") != rates.proposed()  # control

"""Variable adapter structure: one budget shared out by the top-K rule of eq. 19."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests import reference
from tests.cases import array, draw

from cntlora.linalg.allocation import allocate
from cntlora.linalg.spectrum import spectrum

SHAPES = {"enc.q": (8, 12), "enc.k": (8, 12), "enc.up": (16, 8), "enc.down": (8, 16), "head": (3, 8), "zz": (12, 12)}
DELTAS = {name: draw(i, *shape) * (0.3 + i) for i, (name, shape) in enumerate(SHAPES.items())}
VARIANCES = {name: spectrum(M, 1).relative_variance().tolist() for name, M in DELTAS.items()}
MOST = sum(min(shape) for shape in SHAPES.values())


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 24, 40, MOST])
@pytest.mark.parametrize("low", [0, 1, 2])
@pytest.mark.parametrize("high", [None, 4, 8])
def test_eq_19_top_k_of_the_relative_variances(budget: int, low: int, high: int | None) -> None:
    most = sum(min(len(v), high or 99) for v in VARIANCES.values())
    if not low * len(SHAPES) <= budget <= most:
        with pytest.raises(
            ValueError, match=f"expected between {max(low * len(SHAPES), 1)} .* and {most} .*got {budget}"
        ):
            allocate(VARIANCES, budget, low, high)
        return
    ranks = allocate(VARIANCES, budget, low, high)
    assert ranks == reference.allocate({n: array(M) for n, M in DELTAS.items()}, budget, low, high)
    assert sum(ranks.values()) == budget
    for name, rank in ranks.items():
        assert min(low, len(VARIANCES[name])) <= rank <= min(len(VARIANCES[name]), high or 99)


def test_the_winners_are_the_largest_of_the_one_list() -> None:
    for budget in (3, 11, 30):
        ranks = allocate(VARIANCES, budget)
        won = [v for name, values in VARIANCES.items() for v in values[: ranks[name]]]
        lost = [v for name, values in VARIANCES.items() for v in values[ranks[name] :]]
        assert min(won) >= max(lost)
    uniform = dict.fromkeys(VARIANCES, 3)
    won = [v for name, values in VARIANCES.items() for v in values[: uniform[name]]]
    lost = [v for name, values in VARIANCES.items() for v in values[uniform[name] :]]
    assert min(won) < max(lost)  # control: equal ranks do not have that property


def test_the_order_of_the_sites_does_not_matter() -> None:
    names = list(VARIANCES)
    expected = allocate(VARIANCES, 17)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert allocate({name: VARIANCES[name] for name in names}, 17) == expected
    swapped = {**VARIANCES, "zz": VARIANCES["head"], "head": VARIANCES["zz"]}
    assert allocate(swapped, 17) != expected  # control: whose variances they are does


def test_a_larger_budget_takes_nothing_away() -> None:
    for low, high in ((0, None), (1, 6)):
        start = max(1, low * len(VARIANCES))
        most = sum(min(len(v), high or 99) for v in VARIANCES.values())
        before = allocate(VARIANCES, start, low, high)
        for budget in range(start + 1, most + 1):
            after = allocate(VARIANCES, budget, low, high)
            assert sum(after[n] - before[n] for n in after) == 1
            assert all(after[n] >= before[n] for n in after)
            before = after


def test_scale_does_not_matter_but_shape_of_the_spectrum_does() -> None:
    flat, steep = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]
    assert allocate({"flat": flat, "steep": steep}, 4) == {"flat": 3, "steep": 1}
    scaled = {name: spectrum(1000 * M, 1).relative_variance().tolist() for name, M in DELTAS.items()}
    assert allocate(scaled, 20) == allocate(VARIANCES, 20)


def test_ties_go_to_the_lower_index_then_to_the_first_name() -> None:
    equal = {name: [0.25] * 4 for name in ("c", "a", "b")}
    assert allocate(equal, 4) == {"c": 1, "a": 2, "b": 1}
    assert allocate(equal, 5) == {"c": 1, "a": 2, "b": 2}
    assert allocate(equal, 2) == {"c": 0, "a": 1, "b": 1}
    assert allocate({"a": [0.5, 0.5], "b": [0.5000001, 0.4999999]}, 1) == {"a": 0, "b": 1}  # control: no tie, no rule


def test_a_site_may_end_with_rank_zero_unless_there_is_a_floor() -> None:
    variances = {"rich": [0.4, 0.3, 0.3], "poor": [0.2] * 5}
    assert allocate(variances, 3) == {"rich": 3, "poor": 0}
    assert allocate(variances, 3, min_rank=1) == {"rich": 2, "poor": 1}
    assert allocate(variances, 3, max_rank=2) == {"rich": 2, "poor": 1}


def test_floors_and_caps_stop_at_what_a_site_has() -> None:
    variances = {"thin": [1.0], "wide": [0.3, 0.3, 0.2, 0.2]}
    assert allocate(variances, 4, min_rank=3) == {"thin": 1, "wide": 3}
    assert allocate(variances, 5, max_rank=100) == {"thin": 1, "wide": 4}
    assert allocate(variances, 3, min_rank=2, max_rank=2) == {"thin": 1, "wide": 2}


@pytest.mark.parametrize(
    ("budget", "low", "high"), [(0, 0, None), (-3, 0, None), (MOST + 1, 0, None), (5, 1, None), (20, 0, 3)]
)
def test_a_budget_that_cannot_be_met_is_an_error_that_says_what_can(budget: int, low: int, high: int | None) -> None:
    with pytest.raises(ValueError, match=f"rank_budget: expected between .* got {budget}.*change rank_budget"):
        allocate(VARIANCES, budget, low, high)


def test_zero_deltas_share_by_name_and_do_not_divide_by_zero() -> None:
    zeros = {name: spectrum(0 * M, 1).relative_variance().tolist() for name, M in DELTAS.items()}
    assert allocate(zeros, 7) == reference.allocate({n: np.zeros(M.shape) for n, M in DELTAS.items()}, 7)
    assert sum(allocate({**VARIANCES, "zz": zeros["zz"]}, 10).values()) == 10
    assert allocate({**VARIANCES, "zz": zeros["zz"]}, 10)["zz"] == 0

"""ΔW over several batches against the reference: every mode, shape, gram, tolerance, W_0 and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import (
    CASES,
    MODES,
    TOLERANCE,
    Case,
    Mode,
    absorb,
    array,
    delta,
    draw,
    gaussian_constant,
    moments,
    precision_of,
    reference_delta,
    relative_error,
)
from torch import Tensor

from cntlora import InitConfig
from cntlora.linalg.moments import Moments
from cntlora.linalg.sums import SharedSums
from cntlora.methods import shift
from cntlora.methods.cross import cross_map
from cntlora.methods.factors import site_generator
from cntlora.methods.shift import ShiftEstimator, shift_resolvent
from cntlora.methods.statistics import MapEstimator

case = pytest.mark.parametrize("case", CASES, ids=repr)
mode = pytest.mark.parametrize("mode", MODES, ids=repr)
RTOLS = {"cross": (None, 0.03), "self": (None, 0.2), "shift": (None, 0.05)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@mode
@case
def test_delta_equals_the_reference(case: Case, mode: Mode, dtype: torch.dtype, record_property: Callable) -> None:
    case = case.to(dtype)
    W, batches = case.arrays
    weights = tuple(np.linspace(0.5, 2.0, len(batches)).tolist())
    options = product(("sum", "mean"), RTOLS[mode.options["method"]], ("pretrained", "zero"), (None, weights))
    errors = {}
    for gram, rtol, initial, w in options:
        config = InitConfig.from_dict(
            {
                **mode.options,
                "gram": gram,
                "rtol": rtol or mode.options.get("rtol"),
                "initial_weight": initial,
                "batch_weights": w,
            }
        )
        got = delta(config, case.W, case.batches)
        arguments = {"gram_kind": gram, "rtol": rtol, "initial": initial, "weights": w}
        expected = reference_delta(mode, W, batches, precision=precision_of(dtype), **arguments)
        errors[gram, rtol, initial, w] = relative_error(got, expected)
    worst = max(errors, key=lambda key: errors[key])
    record_property("worst", errors[worst])
    assert errors[worst] <= TOLERANCE[dtype], worst


@mode
@case
def test_every_option_matters(case: Case, mode: Mode) -> None:
    """Control for the test above: with an option of cntlora changed alone, the two part."""
    if len(case.batches) == 1:
        return
    W, batches = case.arrays
    expected = reference_delta(mode, W, batches)
    plain = InitConfig.from_dict(mode.options)
    uneven = (2.0,) + (1.0,) * (len(batches) - 1)
    for change in ({"gram": "mean"}, {"initial_weight": "zero"}, {"batch_weights": uneven}):
        assert relative_error(delta(replace(plain, **change), case.W, case.batches), expected) > 1e-5, change
    if mode.name == "shift gaussian":
        assert relative_error(delta(replace(plain, seed=4), case.W, case.batches), expected) > 1e-2


# --- eq. 18 -------------------------------------------------------------------------------------------------


@mode
def test_eq_18_is_linear_in_the_targets(mode: Mode) -> None:
    case = next(c for c in CASES if c.name == "k>d,b<=>d")
    config = InitConfig.from_dict(mode.options)
    alone = [delta(config, case.W, [X]) for X in case.batches]  # (W + W_tar,j) / 2 − W
    targets = [2 * (d + case.W) - case.W for d in alone]
    weights = (0.5, 1.0, -2.0, 3.0)
    expected = (case.W + sum(w * t for w, t in zip(weights, targets, strict=True))) / 5 - case.W
    assert relative_error(delta(replace(config, batch_weights=weights), case.W, case.batches), expected) < 1e-9
    assert relative_error(delta(config, case.W, case.batches), expected) > 1e-2  # control


@mode
@case
def test_the_order_of_the_batches_does_not_matter(case: Case, mode: Mode) -> None:
    config = InitConfig.from_dict(mode.options)
    there, back = delta(config, case.W, case.batches), delta(config, case.W, case.batches[::-1])
    assert relative_error(back, there) < 1e-9
    if len(case.batches) > 1:
        assert relative_error(delta(config, case.W, case.batches[:1]), there) > 1e-6  # control: which they are does


@mode
def test_splitting_rows_inside_a_batch_changes_nothing_and_splitting_the_batch_does(mode: Mode) -> None:
    """The estimate is per batch: that is the paper's definition (eq. 18), and so it depends on the batch size."""
    W, X = draw(0, 9, 6), draw(1, 6, 40)
    config = InitConfig.from_dict(mode.options)
    whole = delta(config, W, [X])
    estimator = config.method.estimator(lambda name: W, config)
    absorb(estimator, ["site"], moments(X, pieces=13), 1.0)
    assert relative_error(estimator.target("site", 1).M, whole) < 1e-10
    halves = delta(config, W, [X[:, :20], X[:, 20:]])
    assert relative_error(halves, whole) > 1e-2


# --- sharing ------------------------------------------------------------------------------------------------


def test_shared_sums_hold_one_tensor_while_histories_agree() -> None:
    sums = SharedSums()
    one, two = draw(0, 3, 3), draw(1, 3, 3)
    sums.add(["q", "k", "v"], one.clone())  # it becomes the sum
    sums.add(["q", "k", "v"], two)
    assert sums.get("q") is sums.get("k") is sums.get("v")
    sums.add(["q"], one)
    assert sums.get("q") is not sums.get("k") and sums.get("k") is sums.get("v")
    assert relative_error(sums.get("q"), 2 * one + two) < 1e-15  # type: ignore[arg-type]
    assert relative_error(sums.get("v"), one + two) < 1e-15  # type: ignore[arg-type]
    sums.add(["k", "q", "new"], two)
    assert relative_error(sums.get("new"), two) == 0.0  # type: ignore[arg-type]
    assert relative_error(sums.get("k"), one + 2 * two) < 1e-15  # type: ignore[arg-type]
    assert relative_error(sums.get("q"), 2 * one + 2 * two) < 1e-15  # type: ignore[arg-type]
    assert torch.equal(one, draw(0, 3, 3)) and torch.equal(two, draw(1, 3, 3))  # no later term is edited
    assert sums.get("nobody") is None


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_sum_is_contiguous_however_its_terms_lie(weight: float) -> None:
    """LAPACK gives inverses by columns; a copy elsewhere lies by rows, and products of the two round differently."""
    by_columns = draw(0, 3, 5).mT
    sums = SharedSums()
    sums.add(["alone"], by_columns.clone(), weight)
    sums.add(["q", "k"], draw(1, 5, 3))
    sums.add(["q", "new"], by_columns.clone(), weight)  # one that was shared, and one that is new
    sums.put(["put"], by_columns)
    assert not by_columns.clone().is_contiguous()  # control: a copy keeps the layout
    assert all(total.is_contiguous() for _, total in sums.groups())
    assert torch.equal(sums.get("alone"), weight * by_columns)  # type: ignore[arg-type]
    assert torch.equal(sums.get("new"), weight * by_columns)  # type: ignore[arg-type]
    assert torch.equal(sums.get("put"), by_columns)  # type: ignore[arg-type]


@mode
def test_sites_fed_together_get_what_they_get_alone(mode: Mode) -> None:
    weights = {"tall": draw(0, 12, 7), "wide": draw(1, 4, 7), "square": draw(2, 7, 7), "again": draw(3, 12, 7)}
    batches = [draw(10 + i, 7, b) for i, b in enumerate((5, 20, 9))]
    config = InitConfig.from_dict(mode.options)
    together = config.method.estimator(weights.__getitem__, config)
    for X in batches:
        absorb(together, list(weights), moments(X), 1.0)
    for name, W in weights.items():
        got = together.target(name, 3).M
        assert relative_error(got, reference_delta(mode, array(W), [array(X) for X in batches], name)) < 1e-8
    swapped = reference_delta(mode, array(weights["again"]), [array(X) for X in batches], "tall")
    assert relative_error(together.target("tall", 3).M, swapped) > 0.1  # control


@mode
def test_sites_that_miss_a_batch_have_their_own_sum_and_divisor(mode: Mode) -> None:
    W = {"always": draw(0, 9, 6), "once": draw(1, 9, 6)}
    X = [draw(5, 6, 20), draw(6, 6, 4)]
    config = InitConfig.from_dict(mode.options)
    estimator = config.method.estimator(W.__getitem__, config)
    absorb(estimator, ["always", "once"], moments(X[0]), 1.0)
    absorb(estimator, ["always"], moments(X[1]), 1.0)
    both, first = [array(x) for x in X], [array(X[0])]
    assert (
        relative_error(estimator.target("always", 2).M, reference_delta(mode, array(W["always"]), both, "always"))
        < 1e-8
    )
    assert relative_error(estimator.target("once", 1).M, reference_delta(mode, array(W["once"]), first, "once")) < 1e-8


def test_the_inverse_is_made_once_for_all_sites_of_a_group() -> None:
    calls = []
    estimator = MapEstimator(lambda name: draw(0, 5, 4), lambda X: calls.append(X) or cross_map(X))  # type: ignore[func-returns-value]
    absorb(estimator, ["q", "k", "v"], moments(draw(1, 4, 9)), 1.0)
    assert len(calls) == 1


# --- shift: the shared way and the other --------------------------------------------------------------------


def shift_case(k: int, d: int, seed: int = 0) -> tuple[Tensor, Moments]:
    return draw(seed, k, d), moments(draw(seed + 1, d, 3 * d))


def test_shift_shares_one_resolvent_where_w_has_full_column_rank() -> None:
    weights = {
        "tall": draw(0, 9, 6),
        "square": draw(1, 6, 6),
        "wide": draw(2, 4, 6),
        "low": draw(3, 9, 2) @ draw(4, 2, 6),
    }
    estimator = ShiftEstimator(weights.__getitem__)
    X = draw(5, 6, 20)
    absorb(estimator, list(weights), moments(X), 1.0)
    assert [name for name in weights if estimator.shared.get(name) is not None] == ["tall", "square"]
    assert [name for name in weights if estimator.own.get(name) is not None] == ["wide", "low"]
    for name, W in weights.items():
        expected = reference.delta(array(W), [array(X)], "shift")
        assert relative_error(estimator.target(name, 1).M, expected) < 1e-8
    # control: the shared formula is wrong where W lacks rank
    wide = torch.linalg.pinv(weights["wide"]).mT @ torch.linalg.inv(torch.eye(6) - X @ X.mT)
    expected = reference.shift_target(array(weights["wide"]), array(X))
    assert relative_error(wide, expected) > 1e-2


def test_shift_with_a_singular_resolvent_falls_back() -> None:
    """An eigenvalue of G that is exactly 1 makes I − G singular, though W has full column rank."""
    Q = torch.linalg.qr(draw(0, 6, 6))[0]
    X = Q * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    W = draw(1, 9, 6)
    estimator = ShiftEstimator(lambda name: W)
    absorb(estimator, ["site"], moments(X), 1.0)
    assert estimator.shared.get("site") is None
    assert relative_error(estimator.target("site", 1).M, reference.delta(array(W), [array(X)], "shift")) < 1e-8
    other = ShiftEstimator(lambda name: W)
    absorb(other, ["site"], moments(0.9 * X), 1.0)
    assert other.shared.get("site") is not None  # control


def test_shift_may_change_way_between_batches() -> None:
    Q = torch.linalg.qr(draw(0, 6, 6))[0]
    singular = Q * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    X, W = [draw(3, 6, 20), singular, draw(4, 6, 20)], draw(1, 9, 6)
    estimator = ShiftEstimator(lambda name: W, 0.5)
    for batch in X:
        absorb(estimator, ["site"], moments(batch), 1.0)
    assert estimator.shared.get("site") is not None and estimator.own.get("site") is not None
    expected = reference.delta(array(W), [array(batch) for batch in X], "shift", C=0.5)
    assert relative_error(estimator.target("site", 3).M, expected) < 1e-8


def test_the_shared_way_is_not_taken_where_the_tolerance_drops_something(monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = draw(0, 13, 6) * torch.logspace(0, -3, 6, dtype=torch.float64), draw(1, 6, 18)
    expected = reference.delta(array(W), [array(X)], "shift", rtol=0.05)
    config = InitConfig.from_dict({"method": "shift", "rtol": 0.05})
    assert relative_error(delta(config, W, [X]), expected) < 1e-8

    def always(inverse: Tensor, holds: Tensor, condition: Tensor, S: Tensor) -> tuple[Tensor, ...]:
        return inverse, torch.tensor(True), torch.tensor(1.0), S

    monkeypatch.setattr(ShiftEstimator, "_may_share", lambda *_: True)  # control
    monkeypatch.setattr(shift, "shift_resolvent", lambda X, rtol: always(*shift_resolvent(X, 0.0)))
    assert relative_error(delta(config, W, [X]), expected) > 1e-3


# --- the Gaussian C -----------------------------------------------------------------------------------------


def test_the_gaussian_constant_depends_on_seed_and_site_name_only() -> None:
    case = next(c for c in CASES if c.name == "k<d,b>d")
    k = len(case.W)

    def constant(seed: int, site: str, X: Tensor, before: int = 0) -> np.ndarray:
        """C, recovered from eq. 16: W_tar (Wᵀ − G Wᵀ) = C where k ≤ d."""
        config = InitConfig.from_dict({"method": "shift", "shift_constant": "gaussian", "seed": seed})
        with torch.random.fork_rng(devices=[]):
            torch.randn(before)  # moves the global generator, which must not matter
            W_tar = array(2 * (delta(config, case.W, [X], site) + case.W) - case.W)
        return W_tar @ array(case.W.mT - X @ X.mT @ case.W.mT)

    first = constant(0, "a.q", case.batches[0])
    assert relative_error(first, gaussian_constant(k, "a.q", 0)) < 1e-8
    assert relative_error(constant(0, "a.q", case.batches[1], before=5), first) < 1e-7
    for seed, site in ((1, "a.q"), (0, "a.k"), (2**31, "a.q"), (2**32, "a.q")):
        assert relative_error(constant(seed, site, case.batches[0]), first) > 0.5


def test_seeds_and_names_give_distinct_streams() -> None:
    """torch's CPU generator reads 32 bits of the seed: what does not reach those bits is lost."""
    draws = {
        (seed, name): float(torch.randn((), generator=site_generator(seed, name)))
        for seed in (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63)
        for name in ("a", "b", "layers.0.q", "layers.1.q")
    }
    assert len(set(draws.values())) == len(draws)
    lost = {float(torch.randn((), generator=torch.Generator().manual_seed(s * 2**32))) for s in range(3)}
    assert len(lost) == 1  # control: the high bits alone change nothing


# --- conditioning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [20, 80], ids=["b<d", "b>d"])
@pytest.mark.parametrize("decades", [1, 3, 5])
@pytest.mark.parametrize("mode", MODES[:3], ids=repr)
def test_the_error_grows_no_faster_than_the_condition_of_g(mode: Mode, decades: int, tokens: int) -> None:
    """G squares the condition of X, so 1e-8 holds while cond(X) is under about 1e4; beyond it is cond(G)·eps."""
    d = 32
    X = torch.linalg.qr(draw(3, d, d))[0] * torch.logspace(0, -decades, d, dtype=torch.float64) @ draw(0, d, tokens)
    W = draw(1, 24, d)
    values = torch.linalg.svdvals(X)
    condition = float(values[0] / values[min(d, tokens) - 1]) ** 2
    error = relative_error(
        delta(InitConfig.from_dict(mode.options), W, [X]), reference_delta(mode, array(W), [array(X)])
    )
    eps = float(np.finfo(np.float64).eps)
    assert error < 100 * eps * condition
    assert decades < 5 or tokens < d or error > 1e-2 * eps * condition**0.5  # control: there is something to bound

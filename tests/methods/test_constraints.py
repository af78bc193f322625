"""The three closed forms: they equal the reference, and they solve the constraints that the paper states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import CASES, Case, array, draw, moments, relative_error
from torch import Tensor

from cntlora.methods.cross import cross_map, cross_quick
from cntlora.methods.self_mode import self_map, self_quick
from cntlora.methods.shift import shift_constant, shift_inverse, shift_resolvent, shift_rtol
from cntlora.methods.statistics import combine

case = pytest.mark.parametrize("case", CASES, ids=repr)
full_case = pytest.mark.parametrize("case", [c for c in CASES if c.full], ids=repr)
gram = pytest.mark.parametrize("gram", ["sum", "mean"])
root = pytest.mark.parametrize("root", ["paper", "symmetric", "cholesky"])
TOL = 1e-8


def rotation(n: int, seed: int = 77) -> Tensor:
    return torch.linalg.qr(draw(seed, n, n))[0]


def targets(case: Case, root: str = "symmetric") -> dict[str, Tensor]:
    """W_tar (k, d) of the first batch by every mode."""
    m, W = moments(case.batches[0]), case.W
    return {
        "cross": W @ cross_map(m)[0],
        "self": W @ self_map(m, root)[0],
        "shift": shift_inverse(W, m.gram()),
    }


# --- equation by equation -----------------------------------------------------------------------------------


@case
@gram
@pytest.mark.parametrize("rtol", [None, 0.03])
def test_eq_4_cross_target_is_w_times_the_pseudo_inverse_of_the_gram_matrix(
    case: Case, gram: str, rtol: float | None
) -> None:
    for X in case.batches:
        T, rank = cross_map(moments(X, gram), rtol)
        expected = reference.cross_target(array(case.W), array(X), rtol, gram)
        assert relative_error(case.W @ T, expected) < TOL
        assert rank == int(torch.linalg.matrix_rank(moments(X).gram(), rtol=1e-12 if rtol is None else rtol))
    other = reference.cross_target(array(case.W), array(X), rtol, "mean" if gram == "sum" else "sum")
    assert X.shape[1] == 1 or relative_error(case.W @ T, other) > 0.1  # control


@case
@gram
@root
@pytest.mark.parametrize("rtol", [None, 0.2])
def test_eq_12_self_target_is_w_times_the_pseudo_inverse_of_the_root(
    case: Case, gram: str, root: str, rtol: float | None
) -> None:
    for X in case.batches:
        T, rank = self_map(moments(X, gram), root, rtol)
        expected = reference.self_target(array(case.W), array(X), root, rtol, gram)
        assert relative_error(case.W @ T, expected) < TOL
        assert rank == int(torch.linalg.matrix_rank(X, rtol=1e-7 if rtol is None else rtol))
    other = reference.self_target(array(case.W), array(X), "paper" if root == "symmetric" else "symmetric", rtol, gram)
    assert relative_error(case.W @ T, other) > 0.03  # control: the two roots are different members of the family


@case
@gram
@pytest.mark.parametrize("rtol", [None, 0.05])
def test_eq_17_shift_target_is_the_pseudo_inverse_of_the_difference(case: Case, gram: str, rtol: float | None) -> None:
    for X in case.batches:
        inverse = shift_inverse(case.W, moments(X, gram).gram(), rtol)
        assert relative_error(inverse, reference.shift_target(array(case.W), array(X), None, rtol, gram)) < TOL
        for c in (0.1, 10.0):
            assert relative_error(c * inverse, reference.shift_target(array(case.W), array(X), c, rtol, gram)) < TOL
    assert relative_error(inverse, reference.shift_target(array(case.W), array(X), 2.0, rtol, gram)) > 0.4  # control


def test_a_tolerance_that_drops_something_matters() -> None:
    """Control for the parametrisation above: the values of rtol given there do drop something, in several cases."""
    differs: dict[str, int] = {"cross": 0, "self": 0, "shift": 0}
    for c in CASES:
        W, X = array(c.W), array(c.batches[-1])
        for name, rtol in (("cross", 0.03), ("self", 0.2), ("shift", 0.05)):
            given, default = (reference.delta(W, [X], name, rtol=t) for t in (rtol, None))
            differs[name] += relative_error(given, default) > 1e-3
    assert min(differs.values()) >= 4, differs


def test_eq_18_the_average_counts_the_initial_weight_as_one_batch() -> None:
    W, total = draw(0, 4, 6), draw(1, 4, 6)
    for batches in (1, 3):
        for initial, W_0 in (("pretrained", W), ("zero", torch.zeros_like(W))):
            estimate = (W_0 + total) / (batches + 1)
            assert relative_error(combine(W, total, batches, initial), estimate - W) < 1e-15
    # controls: the divisor is not B, the sign is that of W_tar = W + ΔW, and W_0 matters
    assert relative_error(combine(W, total, 3), (W + total) / 3 - W) > 0.1
    assert relative_error(combine(W, total, 3), W - (W + total) / 4) > 1.0
    assert relative_error(combine(W, total, 3), combine(W, total, 3, "zero")) > 0.1


def test_eq_18_leaves_its_arguments_alone() -> None:
    W, total = draw(0, 4, 6), draw(1, 4, 6)
    kept = W.clone(), total.clone()
    combine(W, total, 2)
    assert torch.equal(W, kept[0]) and torch.equal(total, kept[1])


# --- the constraints of the paper ---------------------------------------------------------------------------


@full_case
def test_cross_solves_equal_outputs_with_correlated_inputs(case: Case) -> None:
    X = case.batches[0]
    G = X @ X.mT
    W_tar = targets(case)["cross"]
    X_src = torch.linalg.solve(G, X)
    assert relative_error(X_src @ X.mT, torch.eye(X.shape[0])) < TOL  # eq. 2
    assert relative_error(W_tar @ X, case.W @ X_src) < TOL  # eq. 1
    assert relative_error(W_tar @ G, case.W) < TOL  # eq. 3
    assert relative_error(targets(case)["self"] @ G, case.W) > 0.1  # control: self solves another set


@full_case
@root
def test_self_solves_equal_output_covariances_with_a_whitened_source(case: Case, root: str) -> None:
    G = case.batches[0] @ case.batches[0].mT
    W_tar = targets(case, root)["self"]
    assert relative_error(W_tar @ G @ W_tar.mT, case.W @ case.W.mT) < TOL  # eq. 8
    wrong = targets(case)["cross"]
    assert relative_error(wrong @ G @ wrong.mT, case.W @ case.W.mT) > 0.1  # control


@case
def test_where_the_data_lack_rank_self_matches_covariances_on_what_they_span(case: Case) -> None:
    X = case.batches[0]
    W_tar = targets(case)["self"]
    P = X @ torch.linalg.pinv(X, rtol=1e-10)  # projector onto the span of the data
    assert relative_error(W_tar @ X @ X.mT @ W_tar.mT, case.W @ P @ case.W.mT) < 1e-7
    # control: W Wᵀ itself is out of reach then
    gap = relative_error(W_tar @ X @ X.mT @ W_tar.mT, case.W @ case.W.mT)
    assert gap < 1e-8 if int(torch.linalg.matrix_rank(X)) == X.shape[0] else gap > 1e-2


@pytest.mark.parametrize("case", [c for c in CASES if c.W.shape[0] <= c.W.shape[1]], ids=repr)
def test_shift_solves_the_difference_of_covariances(case: Case) -> None:
    G = case.batches[0] @ case.batches[0].mT
    C = draw(3, case.W.shape[0], case.W.shape[0])
    W_tar = C @ targets(case)["shift"]
    assert relative_error(W_tar @ case.W.mT - W_tar @ G @ case.W.mT, C) < TOL  # eq. 16
    wrong = C @ targets(case)["cross"]
    assert relative_error(wrong @ case.W.mT - wrong @ G @ case.W.mT, C) > 0.1  # control


def test_shift_is_the_least_squares_solution_where_no_exact_one_exists() -> None:
    """k > d: k² equations for k·d unknowns; † minimises ‖W_tar M − C‖ and, among those, ‖W_tar‖."""
    case = next(c for c in CASES if c.name == "k>d,b>d")
    M = case.W.mT - case.batches[0] @ case.batches[0].mT @ case.W.mT
    W_tar = targets(case)["shift"].clone().requires_grad_()
    loss = (W_tar @ M - torch.eye(M.shape[1], dtype=M.dtype)).square().sum()
    loss.backward()
    assert W_tar.grad is not None
    assert float(loss.detach()) > 1.0  # no exact solution
    assert float(W_tar.grad.norm()) < 1e-9 * float(M.norm())
    moved = (W_tar.detach() * 1.01).requires_grad_()
    (moved @ M - torch.eye(M.shape[1], dtype=M.dtype)).square().sum().backward()
    assert moved.grad is not None and float(moved.grad.norm()) > 1e-4 * float(M.norm())  # control


def test_cross_is_the_least_squares_solution_of_least_norm() -> None:
    case = next(c for c in CASES if c.name == "rank-deficient,b>d")
    G = case.batches[0] @ case.batches[0].mT
    W_tar = targets(case)["cross"]
    best = (W_tar @ G - case.W).norm()
    null = torch.linalg.eigh(G)[1][:, :1]  # a direction that no input has
    other = W_tar + draw(5, W_tar.shape[0], 1) @ null.mT
    assert float((other @ G - case.W).norm() - best) == pytest.approx(0.0, abs=1e-9)  # as good
    assert float(other.norm()) > float(W_tar.norm()) + 1e-3  # but longer
    assert float(((W_tar * 1.01) @ G - case.W).norm()) > float(best) + 1e-6  # control: and worse elsewhere


# --- invariances --------------------------------------------------------------------------------------------


@case
@root
def test_the_order_and_any_rotation_of_the_tokens_change_nothing(case: Case, root: str) -> None:
    X = case.batches[0]
    tokens = X.shape[1]
    rotated = X @ rotation(tokens)
    shuffled = X[:, torch.randperm(tokens, generator=torch.Generator().manual_seed(0))]
    for Y in (rotated, shuffled):
        assert relative_error(cross_map(moments(Y))[0], cross_map(moments(X))[0]) < 1e-7
        assert relative_error(self_map(moments(Y), root)[0], self_map(moments(X), root)[0]) < 1e-7
    scaled = X * torch.linspace(1, 2, X.shape[0], dtype=X.dtype)[:, None]
    assert relative_error(cross_map(moments(scaled))[0], cross_map(moments(X))[0]) > 0.1  # control


@case
def test_cross_and_symmetric_self_turn_with_the_features_and_the_printed_root_does_not(case: Case) -> None:
    X = case.batches[0]
    Q = rotation(X.shape[0])
    for map in (cross_map, lambda m: self_map(m, "symmetric")):
        assert relative_error(map(moments(Q @ X))[0], Q @ map(moments(X))[0] @ Q.mT) < 1e-7
    turned = self_map(moments(Q @ X), "paper")[0]
    assert relative_error(turned, Q @ self_map(moments(X), "paper")[0] @ Q.mT) > 0.1  # control


@case
def test_scaling_the_inputs_scales_the_targets(case: Case) -> None:
    X, c = case.batches[0], 3.0
    assert relative_error(cross_map(moments(c * X))[0], cross_map(moments(X))[0] / c**2) < 1e-7
    for root in ("paper", "symmetric", "cholesky"):
        assert relative_error(self_map(moments(c * X), root)[0], self_map(moments(X), root)[0] / c) < 1e-7
    # control: shift has an absolute scale, I − G
    G = (X @ X.mT).clone()
    ratio = shift_inverse(case.W, c**2 * G).norm() / shift_inverse(case.W, G).norm()
    assert abs(float(ratio) - 1 / c**2) > 1e-4


@case
def test_the_symmetric_root_is_symmetric_and_squares_to_the_pseudo_inverse(case: Case) -> None:
    m = moments(case.batches[0])
    T = self_map(m, "symmetric")[0]
    assert relative_error(T.mT, T) < 1e-12
    assert relative_error(T @ T, cross_map(m)[0]) < TOL
    assert float(torch.linalg.eigvalsh(T).min()) > -1e-12 * float(T.norm())
    paper = self_map(m, "paper")[0]
    assert relative_error(paper.mT @ paper, cross_map(m)[0]) < TOL
    assert relative_error(paper @ paper, cross_map(m)[0]) > 0.1  # control: the printed root is no square root of G†


@case
@gram
def test_the_cholesky_root_is_lower_triangular_and_quick_where_nothing_is_dropped(case: Case, gram: str) -> None:
    for X in case.batches:
        m = moments(X, gram)
        slow, rank = self_map(m, "cholesky")
        quick, holds, quick_rank = self_quick(m)
        full = int(torch.linalg.matrix_rank(X, rtol=1e-7)) == min(X.shape)
        assert bool(holds) == full
        assert relative_error(slow.mT @ slow, cross_map(m)[0]) < TOL  # as of every root in this family
        assert relative_error(self_map(m, "paper")[0], slow) > 0.03  # control: it is another one
        if full:
            assert relative_error(quick, slow) < TOL and rank == quick_rank
        if full and X.shape[0] <= X.shape[1]:
            assert relative_error(quick.tril(), quick) < TOL and bool((quick.diagonal() > 0).all())
            assert relative_error(self_map(m, "symmetric")[0].tril(), self_map(m, "symmetric")[0]) > 0.01  # control


def test_the_cholesky_root_does_not_hold_where_the_tolerance_drops_something() -> None:
    X = draw(0, 8, 30) * torch.logspace(0, -3, 8, dtype=torch.float64)[:, None]
    assert bool(self_quick(moments(X), 1e-6)[1])
    assert not bool(self_quick(moments(X), 1e-2)[1])
    assert not bool(self_quick(moments(X[:, :6]), 1e-1)[1])


@pytest.mark.parametrize("tokens", [7, 8, 9, 20])
def test_the_dual_gives_what_the_plain_form_gives(tokens: int) -> None:
    """At b = d the rows are kept, one token later only G: there is no step in the result."""
    X = draw(4, 8, tokens)
    for map in (cross_map, self_map, lambda m: self_map(m, "cholesky")):
        forced = moments(X)
        forced._gram, forced._rows = X @ X.mT, []
        assert relative_error(map(moments(X))[0], map(forced)[0]) < 1e-6
    assert relative_error(cross_map(moments(X))[0], cross_map(moments(X[:, 1:]))[0]) > 1e-3  # control


def test_a_tolerance_under_the_noise_keeps_no_noise_in_self_mode() -> None:
    """The root is taken of D, which carries noise of max(d, b)·eps: rtol² under that cannot be honoured."""
    X = next(c for c in CASES if c.name == "rank-deficient,b>d").batches[0]
    W = draw(9, 6, 8)
    for rtol in (1e-9, 1e-12):
        T, rank = self_map(moments(X), "paper", rtol)
        assert rank == 3
        assert relative_error(W @ T, reference.self_target(array(W), array(X), "paper", rtol)) < TOL
    values = torch.linalg.eigvalsh(X @ X.mT)
    assert float(values[-4].abs()) > (1e-12**2) * float(values[-1])  # control: there is noise above rtol²


# --- C of shift mode ----------------------------------------------------------------------------------------


def test_the_constant_is_a_number_or_standard_normal() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert shift_constant(10, 4, generator, like) == 10.0
    C = shift_constant("gaussian", 60, generator, like)
    assert isinstance(C, Tensor)
    assert C.shape == (60, 60) and C.dtype == torch.float64
    assert abs(float(C.mean())) < 0.1 and abs(float(C.std()) - 1) < 0.1
    assert np.abs(array(C) - array(C).T).max() > 1  # neither symmetric nor diagonal
    again = shift_constant("gaussian", 60, torch.Generator().manual_seed(0), like)
    other = shift_constant("gaussian", 60, torch.Generator().manual_seed(1), like)
    assert torch.equal(C, torch.as_tensor(again)) and not torch.equal(C, torch.as_tensor(other))
    low = shift_constant("gaussian", 60, torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.float32))
    assert torch.equal(torch.as_tensor(low), C.float())  # the dtype does not change the draws


def test_the_tolerance_of_shift_mode_is_that_of_its_own_matrix() -> None:
    assert shift_rtol(3, 7, torch.float64, None) == 7 * torch.finfo(torch.float64).eps
    assert shift_rtol(9, 7, torch.float64, None) == 9 * torch.finfo(torch.float64).eps
    assert shift_rtol(9, 7, torch.float64, 0.5) == 0.5


# --- what shift mode shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 4, 9, 10, 30])
@pytest.mark.parametrize("gram", ["sum", "mean"])
def test_the_resolvent_is_the_inverse_in_both_forms(b: int, gram: str) -> None:
    X = draw(0, 10, b)
    M = torch.eye(10, dtype=torch.float64) - torch.from_numpy(reference.gram(array(X), gram))
    inverse, holds, condition, small = shift_resolvent(moments(X, gram), 1e-13)
    assert bool(holds)
    assert small.shape[0] == min(b, 10) and torch.linalg.matrix_rank(small) == min(b, 10)
    assert relative_error(inverse, torch.linalg.inv(M)) < 1e-11
    expected = torch.linalg.matrix_norm(M) * torch.linalg.matrix_norm(torch.linalg.inv(M))
    assert float(condition) == pytest.approx(float(expected), rel=1e-9)
    assert float(torch.linalg.cond(M)) <= float(condition) <= 10 * float(torch.linalg.cond(M))
    assert not bool(shift_resolvent(moments(X, gram), 1.01 / float(condition))[1])  # control: † would drop something


@pytest.mark.parametrize("b", [4, 10])
def test_a_singular_resolvent_does_not_hold(b: int) -> None:
    X = torch.linalg.qr(draw(0, 10, b)).Q * torch.linspace(0.2, 1.0, b, dtype=torch.float64)  # one eigenvalue is 1
    assert not bool(shift_resolvent(moments(X), 1e-13)[1])
    assert bool(shift_resolvent(moments(0.9 * X), 1e-13)[1])  # control


@pytest.mark.parametrize("b", [4, 10, 30])
def test_the_quick_cross_map_is_the_other_where_it_holds(b: int) -> None:
    X = draw(0, 10, b)
    T, holds, rank = cross_quick(moments(X))
    assert bool(holds) and rank == min(b, 10)
    assert relative_error(T, cross_map(moments(X))[0]) < 1e-8
    twice = torch.cat([X[:, :3], X[:, :3]], dim=1)  # control: † has to drop what the repeated tokens leave
    assert not bool(cross_quick(moments(twice))[1])

"""Second moments: streaming equals two passes, in either of the two forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests import reference
from tests.cases import CASES, Case, array, draw, moments, relative_error
from torch import Tensor

from cntlora.linalg.low_rank import HALF, LowRank, root_rows
from cntlora.linalg.moments import Moments
from cntlora.linalg.pseudo_inverse import default_rtol

case = pytest.mark.parametrize("case", CASES, ids=repr)
gram = pytest.mark.parametrize("gram", ["sum", "mean"])


@case
@gram
def test_streaming_equals_two_pass(case: Case, gram: str) -> None:
    for X in case.batches:
        expected = reference.gram(array(X), gram)
        for pieces in (1, 2, X.shape[1]):
            assert relative_error(moments(X, gram, pieces).gram(), expected) < 1e-13
        if X.shape[1] > 1:  # control: every token counts
            assert relative_error(moments(X[:, 1:], gram).gram(), expected) > 1e-3


@case
@gram
def test_the_rows_kept_give_the_same_gram_matrix(case: Case, gram: str) -> None:
    for X in case.batches:
        m = moments(X, gram, 3)
        rows = m.rows()
        assert (rows is None) == (X.shape[1] > X.shape[0])  # the dual exactly while b ≤ d
        if rows is not None:
            assert relative_error(rows.mT @ rows, m.gram()) < 1e-14


@pytest.mark.parametrize("mine", [0, 3, 8, 9, 20])
@pytest.mark.parametrize("others", [0, 2, 8, 9, 25])
@gram
def test_merging_equals_seeing_both(mine: int, others: int, gram: str) -> None:
    X = draw(0, 8, mine + others)
    total, other = moments(X[:, :mine], gram), moments(X[:, mine:], gram)
    before = array(other.gram()) if others else None
    total.merge(other)
    assert total.tokens == mine + others
    if mine + others:
        assert relative_error(total.gram(), reference.gram(array(X), gram)) < 1e-14
    total.update(draw(1, 4, 8))
    if before is not None:
        assert relative_error(other.gram(), before) == 0.0  # what was merged is not edited


def test_mean_divides_by_the_tokens() -> None:
    X = draw(0, 4, 10)
    assert relative_error(moments(X, "mean").gram() * 10, moments(X, "sum").gram()) < 1e-15
    twice = torch.cat([X, X], dim=1)
    assert relative_error(moments(twice, "mean").gram(), moments(X, "mean").gram()) < 1e-15
    assert relative_error(moments(twice, "sum").gram(), moments(X, "sum").gram()) > 0.9  # control


@case
@gram
def test_eigenpairs_rebuild_g_in_falling_order_with_fixed_signs(case: Case, gram: str) -> None:
    for X in case.batches:
        m = moments(X, gram)
        pairs = m.eigenpairs(m.rtol)
        assert relative_error(pairs.P * pairs.D @ pairs.P.mT, m.gram()) < 1e-12
        assert relative_error(pairs.P.mT @ pairs.P, torch.eye(pairs.D.numel())) < 1e-9
        assert all(a >= b > 0 for a, b in pairwise([*pairs.D.tolist(), 1e-300]))
        P, half = reference._eigen_root(array(X), gram)
        n = int(torch.linalg.matrix_rank(X))
        assert pairs.D.numel() == n
        assert relative_error(pairs.D.sqrt(), half[:n]) < 1e-10
        assert relative_error(pairs.P, P[:, :n]) < 1e-8
        assert relative_error(pairs.P, -P[:, :n]) > 1.0  # control: signs are part of the answer


@case
def test_the_numerical_rank_is_the_number_of_directions_that_the_data_determine(case: Case) -> None:
    for X in case.batches:
        m = moments(X)
        assert m.numerical_rank(m.rtol) == int(torch.linalg.matrix_rank(X))
        values = torch.linalg.svdvals(X).square()
        assert m.numerical_rank(0.1) == int((values > 0.1 * values[0]).sum())


def test_the_numerical_rank_sees_a_repeated_row() -> None:
    X = draw(0, 6, 6)
    assert moments(X).numerical_rank(moments(X).rtol) == 6
    X[5] = X[0]
    assert moments(X).numerical_rank(moments(X).rtol) == 5


def test_eigenvalues_at_the_tolerance_are_dropped() -> None:
    X = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    assert moments(X).eigenpairs(0.25).D.tolist() == [4.0]
    assert moments(X).eigenpairs(0.2499).D.tolist() == [4.0, 1.0]
    assert moments(X.repeat(1, 4)).eigenpairs(0.25).D.tolist() == [16.0]  # not the dual but G itself


def test_the_default_tolerance_is_that_of_the_whole_batch() -> None:
    assert moments(draw(0, 5, 40)).rtol == default_rtol(5, 40, torch.float64)
    assert moments(draw(0, 5, 3)).rtol == default_rtol(5, 3, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    rows = (100 * draw(0, 400, 6)).to(dtype)
    m = Moments(6)
    for part in rows.split(7):
        m.update(part)
    assert m.gram().dtype == torch.float32
    assert m.rtol == default_rtol(6, 400, torch.float32)
    assert relative_error(m.gram(), reference.gram(array(rows).T)) < 1e-6
    assert relative_error(rows.mT @ rows, m.gram()) > 1e-5  # control: the inputs' own dtype would lose that


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("part", [3, 40], ids=["by rows", "by sums"])
def test_tokens_of_unit_size_count_alike_also_the_largest_and_those_of_zeros(dtype: torch.dtype, part: int) -> None:
    rows = (draw(0, 40, 6) * torch.logspace(-2, 4, 40, dtype=torch.float64)[:, None]).to(dtype)
    rows[5] = 0
    m, merged, raw = Moments(6, unit=True), Moments(6, unit=True), Moments(6)
    for piece in rows.split(part):
        one = m.empty()
        one.update(piece)
        m.update(piece)
        merged.merge(one)
        raw.update(piece)
    assert one.unit and m.gram().trace().item() == pytest.approx(39 * 6, rel=2e-2)
    assert relative_error(m.gram(), merged.gram()) < 1e-2
    assert raw.gram().trace() > 1e6  # control: the largest are all


def test_float32_inputs_are_accumulated_in_float64() -> None:
    rows = draw(0, 400, 6).float()
    m = Moments(6)
    for part in rows.split(7):
        m.update(part)
    assert m.gram().dtype == torch.float64
    assert relative_error(m.gram(), reference.gram(array(rows).T)) < 1e-14
    assert relative_error(rows.mT @ rows, m.gram()) > 1e-9  # control: float32 would lose that


def test_the_dtype_of_accumulation_can_be_chosen() -> None:
    X = draw(0, 6, 40).float()
    m = Moments(6, dtype=torch.float32)
    m.update(X.mT)
    assert m.gram().dtype == m.eigenpairs(m.rtol).P.dtype == torch.float32
    assert m.rtol == default_rtol(6, 40, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
@pytest.mark.parametrize("tokens", [3, 30])
def test_what_is_not_finite_is_noticed(bad: float, tokens: int) -> None:
    X = draw(0, 5, tokens)
    assert moments(X).finite()
    X[2, tokens - 1] = bad
    assert not moments(X, pieces=3).finite()


def test_no_token_is_an_error_and_not_a_zero_matrix() -> None:
    m = Moments(4)
    for _ in range(2):
        with pytest.raises(ValueError, match="no token seen"):
            m.gram()
        assert m.rows() is None
        m.update(torch.zeros(0, 4))
    m.update(torch.ones(1, 4))
    assert float(m.gram().sum()) == 16.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_edit_of_the_callers_tensor_changes_nothing(dtype: torch.dtype) -> None:
    rows = draw(0, 3, 8).to(dtype)
    m = Moments(8)
    m.update(rows)
    before = m.gram()
    rows.zero_()
    assert relative_error(m.gram(), before) == 0.0
    assert float(before.abs().max()) > 0


def test_memory_never_exceeds_d_by_d() -> None:
    m = Moments(6)
    for _ in range(10):
        m.update(draw(0, 4, 6))
        held = sum(r.numel() for r in m._rows) + (0 if m._gram is None else m._gram.numel())
        assert held <= 36


def test_eigenvectors_of_half_precision_are_those_of_its_values_when_solved_in_float64() -> None:
    """Of whole numbers, whose sums are exact in float32. Control: solved in float32, close eigenvectors mix."""
    X = 40.0 + torch.randint(-1, 2, (192, 500), generator=torch.Generator().manual_seed(0)).double()  # one giant
    assert torch.equal(X.bfloat16().double(), X) and float((X @ X.mT).max()) < 2**24
    exact = moments(X).eigenpairs(1e-8)
    found, mixed = (moments(X.bfloat16()).eigenpairs(1e-8, solved_in=dtype) for dtype in (torch.float64, None))
    assert found.rows.dtype == mixed.rows.dtype == torch.float32
    assert relative_error(found.D, exact.D) < 1e-6
    assert relative_error(found.rows, exact.rows) < 1e-4
    assert relative_error(mixed.rows, exact.rows) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_units_take_half_precision_as_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep half precision where small eigenvalues do not count; products of such numbers are exact in float32."""
    multiplied: list[torch.dtype] = []

    def product(left: Tensor, right: Tensor) -> Tensor:
        multiplied.append(left.dtype)
        return left.float() @ right.float()

    X = draw(0, 20, 50).to(dtype)
    plain = {single: _gram_of(X, single) for single in (False, True)}
    for module in ("moments", "low_rank"):
        monkeypatch.setattr(f"cntlora.linalg.{module}.sums_in_float32", lambda dtype, device: dtype in HALF)
        monkeypatch.setattr(f"cntlora.linalg.{module}.product_of_halves", product)
    assert relative_error(_gram_of(X, True), plain[True]) < 1e-6
    assert multiplied == [dtype]
    assert torch.equal(_gram_of(X, False), plain[False]) and multiplied == [dtype]  # control: self and shift do not
    _gram_of(X.float(), True)
    assert multiplied == [dtype]  # nor do inputs of float32
    few = X[:, :7]  # fewer tokens than features, held as they are
    monkeypatch.setattr("cntlora.linalg.low_rank.LARGE", 8)
    total = Moments(20, single=True)
    total.update(few.mT)
    held = total.second_moment()
    assert isinstance(held, LowRank) and held.terms[0].rows.dtype == dtype
    assert relative_error(held.scaled(0.3).dense(), 0.3 * few.float() @ few.float().mT) < 1e-6
    assert relative_error(held.dense(), 0.3 * few.float() @ few.float().mT) > 0.5  # control
    assert held.scaled(0.3).dense().dtype == torch.float32 and multiplied == 4 * [dtype]
    Y = root_rows(held.scaled(0.3).to(torch.float64))
    assert relative_error(Y.mT @ Y, 0.3 * few.double() @ few.double().mT) < 1e-6


def _gram_of(X: Tensor, single: bool) -> Tensor:
    total = Moments(X.shape[0], single=single)
    total.update(X.mT)
    return total.gram()

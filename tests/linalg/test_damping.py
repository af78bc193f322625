"""Damped second moments of few tokens: by their rows the same inverses, targets and factors as when they are formed."""

from __future__ import annotations

import pytest
import torch
from tests.cases import draw, relative_error
from torch import Tensor

from cntlora.linalg import low_rank as module
from cntlora.linalg.damping import damped, damped_inverse, damped_rows, whitening
from cntlora.linalg.factors import svd_factors
from cntlora.linalg.low_rank import LowRank, Shifted, Updated, formed, has_root, low_rank, root_rows, times
from cntlora.linalg.moments import Moments
from cntlora.linalg.pseudo_inverse import full_rank, numerical_rank
from cntlora.linalg.spectrum import spectrum
from cntlora.methods.corda import Corda
from cntlora.methods.descent import Descent, descent_target
from cntlora.methods.estimator import absorb_batch
from cntlora.methods.eva import Eva
from cntlora.methods.target import Target
from cntlora.methods.whitened import Whitened

D, K, R = 40, 24, 3
DAMPING = 0.01


@pytest.fixture(autouse=True)
def small_layers_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 8)


def dense(right: Shifted) -> Tensor:
    return times(torch.eye(D, dtype=torch.float64), right)


@pytest.mark.parametrize("rank", [1, 7])
def test_powers_are_those_of_the_formed_matrix(rank: int) -> None:
    Y = draw(0, 7, D)
    Y[rank:] = Y[0]  # rows that say the same once more
    C = Y.mT @ Y
    regular, inverse = damped_inverse(C, DAMPING)
    rows = damped_rows(Y, DAMPING)
    assert rows.s.numel() == rank
    assert relative_error(dense(rows.power(1.0)), regular) < 1e-12
    assert relative_error(dense(rows.power(-1.0)), inverse) < 1e-10
    half = dense(rows.power(-0.5))
    assert relative_error(half @ half, inverse) < 1e-10
    assert relative_error(dense(damped_rows(Y, 2 * DAMPING).power(-1.0)), inverse) > 0.1  # control
    L = whitening(C, DAMPING)
    assert relative_error(L.mT @ L, inverse) < 1e-10 and relative_error(regular, damped(C, DAMPING)) == 0


def test_no_damping_and_too_few_rows_is_the_error_of_a_singular_matrix() -> None:
    with pytest.raises(ValueError, match="damping: .* singular"):
        damped_rows(draw(0, 7, D), 0.0)


def test_rows_carry_the_weights_of_their_batches() -> None:
    one, two = low_rank(draw(0, 3, D), torch.ones(3).double()), low_rank(draw(1, 4, D), torch.ones(4).double())
    assert isinstance(one, LowRank) and isinstance(two, LowRank)
    both = one.scaled(2.0).plus(two.scaled(0.5))
    Y = root_rows(both)
    assert has_root(both) and relative_error(Y.mT @ Y, both.dense()) < 1e-12
    assert not has_root(one.plus(two.scaled(-0.5)))
    mean = draw(2, 1, D)[0]
    shifted = root_rows(both, mean)
    expected = 2.0 * (draw(0, 3, D) - mean).mT @ (draw(0, 3, D) - mean) + 0.5 * (draw(1, 4, D) - mean).mT @ (
        draw(1, 4, D) - mean
    )
    assert relative_error(shifted.mT @ shifted, expected) < 1e-12


# --- methods ------------------------------------------------------------------------------------------------

METHODS = {
    "corda": Corda(),
    "descent": Descent(),
    "whitened": Whitened(),
    "eva": Eva(),
    "eva, not centred": Eva(center=False),
}


def target_of(method: str, dtype: torch.dtype, weights: tuple[float, ...] = (1.0, 0.5)) -> Target:
    """Return the target of one site that saw two batches of nine tokens."""

    class Settings:
        exact_svd, seed = False, 0

    W = draw(9, K, D).to(dtype)
    made = METHODS[method].estimator(lambda name: W.clone(), Settings())
    for seed, weight in enumerate(weights):
        X = Moments(D, totals=getattr(made, "totals", False), unit=getattr(made, "unit", False))
        X.update((draw(seed, 9, D) * torch.logspace(0, -2, D, dtype=torch.float64)).to(dtype))
        absorb_batch(made, [(("site",), X)], weight)  # type: ignore[arg-type]
        if method in ("descent", "whitened"):
            made.add_gradient("site", draw(seed + 20, K, D).to(dtype), weight)  # type: ignore[attr-defined]
    return made.target("site", 2)


def product(target: Target) -> Tensor:
    """B·A (k, d) of rank R, or what A spans."""
    if target.known is not None:
        Vh = target.known(R).Vh[:R]
        return Vh.mT @ Vh
    assert target.M is not None and target.right is not None
    B, A = svd_factors(spectrum(target.M, R), R, 0.5)
    A = times(A, target.right)
    return B.to(A) @ A


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_few_tokens_give_the_factors_of_the_formed_matrix(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = target_of(method, dtype)
    by_rows = product(held)
    if held.right is not None:
        assert isinstance(held.right, Shifted) and isinstance(held.M, Updated)
        assert formed(held.M).shape == (K, D)
    other = product(target_of(method, dtype, (1.0, 0.25)))
    monkeypatch.setattr(module, "LARGE", 10**9)
    whole = target_of(method, dtype)
    assert whole.right is None or isinstance(whole.right, Tensor)  # control: the other way was taken
    bound = 1e-8 if dtype == torch.float64 else 1e-3
    assert relative_error(by_rows, product(whole)) < bound
    assert relative_error(other, product(whole)) > 10 * bound  # control: another weight of the second batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_in_the_span_of_the_tokens_is_factored_there(dtype: torch.dtype) -> None:
    Y = (draw(1, 9, D) * torch.logspace(0, -2, D, dtype=torch.float64)).to(dtype)
    C = damped_rows(Y.double(), DAMPING)
    G = draw(2, K, 9).to(dtype) @ Y
    small = descent_target(G, C, 2.0)
    assert isinstance(small.M, Tensor) and small.M.shape == (K, 9) and isinstance(small.right, Tensor)
    whole = descent_target(G, whitening(Y.double().mT @ Y.double(), DAMPING), 2.0)
    bound = 1e-8 if dtype == torch.float64 else 1e-3
    assert relative_error(product(small), product(whole)) < bound
    outside = G + 0.1 * draw(3, K, D).to(dtype)  # control: not all of it is there
    other = descent_target(outside, C, 2.0)
    assert isinstance(other.M, Updated) and isinstance(other.right, Shifted)
    assert relative_error(product(other), product(whole)) > 10 * bound


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_below_zero_is_summed_in_the_formed_matrix(method: str) -> None:
    held = target_of(method, torch.float64, (1.0, -1e-4))
    assert held.right is None or isinstance(held.right, Tensor)
    assert bool(torch.isfinite(product(held)).all())


def test_what_is_damped_or_counted_is_left_as_it_is() -> None:
    X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = X @ X.mT  # of rank 8
    before = C.clone()
    regular, rank = damped(C, 0.1), numerical_rank(C, 1e-9)
    assert torch.equal(C, before) and rank == 8 and not bool(full_rank(C, 1e-9))
    assert torch.allclose(regular, C + 0.1 * C.diagonal().mean() * torch.eye(12, dtype=torch.float64), rtol=1e-14)
    assert bool(full_rank(regular, 1e-9)) and not torch.equal(regular, before)  # the control

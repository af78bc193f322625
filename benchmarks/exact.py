"""ΔW of the three modes in float64 from the inputs themselves: slow and direct, without any of cntlora's code.

Notation of docs/math.md: W (k, d), X (d, b) one batch, G = X Xᵀ. All comes from the SVD of X, so that no digit is
lost by squaring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float64).eps


def kept(values: Tensor, rtol: float) -> Tensor:
    """Tell which of some descending values are above rtol·max."""
    return values > rtol * values[0]


def cross_target(W: Tensor, X: Tensor, rtol: float = 0.0) -> Tensor:
    """W G† (eq. 4), eigenvalues of G at or under the larger of rtol and max(d, b)·eps, times λ_max, dropped."""
    P, s, _ = torch.linalg.svd(X, full_matrices=False)
    keep = kept(s.square(), max(rtol, max(X.shape) * EPS))
    return W @ (P[:, keep] / s[keep].square()) @ P[:, keep].mT


def self_target(W: Tensor, X: Tensor, rtol: float = 0.0) -> Tensor:
    """W (P D^½)† (eq. 12), eigenvalues falling, the largest entry of every eigenvector positive; rtol of D^½."""
    P, s, _ = torch.linalg.svd(X, full_matrices=False)
    keep = kept(s.square(), max(rtol**2, max(X.shape) * EPS))
    P, s = P[:, keep], s[keep]
    P = P * P.gather(0, P.abs().argmax(dim=0, keepdim=True)).sign()
    return W[:, : s.numel()] @ (P / s).mT


def shift_target(W: Tensor, X: Tensor, rtol: float = 0.0) -> Tensor:
    """(Wᵀ − G Wᵀ)† (eq. 17, C = I), singular values at or under the larger of rtol and max(d, k)·eps, times σ_max,
    dropped."""
    U, s, Vh = torch.linalg.svd(W.mT - X @ (X.mT @ W.mT), full_matrices=False)
    keep = kept(s, max(rtol, max(W.shape) * EPS))
    return (Vh[keep].mT / s[keep]) @ U[:, keep].mT


TARGETS = {"cross": cross_target, "self": self_target, "shift": shift_target}


def delta(method: str, W: Tensor, batches: Sequence[Tensor], rtol: float = 0.0) -> Tensor:
    """ΔW = (W + Σ_j W_tar,j) / (B + 1) − W (eq. 18), (k, d) in float64."""
    total = W + sum(TARGETS[method](W, X, rtol) for X in batches)
    return total / (len(batches) + 1) - W


def errors(D: Tensor, product: Tensor, r: int) -> tuple[float, float]:
    """‖P − [D]_r‖_F / ‖D‖_F, and by how much ‖D − P‖_F / ‖D‖_F is above its least value, the tail of the spectrum."""
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    norm = torch.linalg.matrix_norm(D)
    best = (U[:, :r] * s[:r]) @ Vh[:r]
    tail = torch.linalg.vector_norm(s[r:])
    distance = torch.linalg.matrix_norm(product - best) / norm
    excess = (torch.linalg.matrix_norm(D - product) - tail) / norm
    return float(distance), float(excess)


def margin(batches: Sequence[Tensor]) -> float:
    """Return the smallest kept eigenvalue of any G, in units of max(d, b)·eps·λ_max, under which † drops them.

    Near 1 the estimate is ill-posed: G itself carries rounding noise of that size, and what is kept depends on it.
    """
    least = []
    for X in batches:
        D, cut = torch.linalg.svdvals(X).square(), max(X.shape) * EPS
        least.append(float(D[kept(D, cut)].min() / (cut * D[0])))
    return min(least)


@contextmanager
def caught_inputs(layers: Mapping[str, nn.Module], mask: Tensor | None) -> Iterator[dict[str, Tensor]]:
    """X (d, b) in float64 of each layer in the forward passes inside; `mask` (rows, tokens) is 0 where none counts."""
    found: dict[str, Tensor] = {}

    def catch(name: str) -> object:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().double()
            rows = x.flatten(0, -2) if mask is None else x[mask.bool()]
            found[name] = rows.mT

        return layers[name].register_forward_pre_hook(hook)

    handles = [catch(name) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]

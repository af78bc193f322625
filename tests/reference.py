"""Float64 textbook reference of ConsNoTrainLoRA, written from the paper: numpy only, slow and obvious.

The project's own code is tested against this file, so nothing here imports it. One function is one formula.
Symbols: W (k, d) = (out, in), the frozen weight; X (d, b), its inputs, one column a token; G = X X^T (d, d);
B (k, r) and A (r, d), the LoRA factors. A sign convention is fixed wherever the paper leaves signs free.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np

EPS = float(np.finfo(np.float64).eps)


def _f64(array: object) -> np.ndarray:
    """Convert any array-like to a float64 array."""
    return np.asarray(array, dtype=np.float64)


def _inverse(values: np.ndarray, rtol: float) -> np.ndarray:
    """1/v for non-negative values above rtol * max, 0 for the others; (n,) -> (n,)."""
    keep = values > rtol * values.max(initial=0.0)
    return np.where(keep, 1.0 / np.where(keep, values, 1.0), 0.0)


def _row_signs(rows: np.ndarray) -> np.ndarray:
    """The +1/-1 per row that makes its largest-magnitude entry (the first such) positive; (n, m) -> (n,)."""
    largest = rows[np.arange(len(rows)), np.argmax(np.abs(rows), axis=1)]
    return np.where(largest < 0, -1.0, 1.0)


def _check_rank(r: int, limit: int) -> None:
    """Refuse a rank for which there are not enough directions."""
    if not 0 <= r <= limit:
        raise ValueError(f"rank {r} is not between 0 and {limit}")


def pinv(M: np.ndarray, rtol: float) -> np.ndarray:
    """Moore-Penrose inverse M^+ by SVD, singular values <= rtol * max dropped; (m, n) -> (n, m)."""
    U, s, Vt = np.linalg.svd(_f64(M), full_matrices=False)
    return (Vt.T * _inverse(s, rtol)) @ U.T


def gram(X: np.ndarray, kind: str = "sum") -> np.ndarray:
    """G = X X^T (left side of eq. 9), divided by the number of tokens b for "mean"; (d, b) -> (d, d)."""
    X = _f64(X)
    if kind == "sum":
        return X @ X.T
    if kind == "mean":
        return X @ X.T / X.shape[1]
    raise ValueError(f"unknown gram kind {kind!r}")


def default_rtol(d: int, b: int) -> float:
    """max(d, b) * eps, the relative tolerance on the singular values of G, X being (d, b)."""
    return max(d, b) * EPS


UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def rounding_share(d: int, b: int, precision: str) -> float:
    """The share of ||X||_F up to which a singular value of X (d, b) is rounding, its entries being of that precision.

    8 u (1/sqrt(d) + 1/sqrt(b)) for entries that are rounded independently, and 32 u' for the sums behind them, which
    are in float32 or better.
    """
    u = UNIT_ROUNDOFF[precision]
    return float(8 * u * (1 / np.sqrt(d) + 1 / np.sqrt(b)) + 32 * min(u, UNIT_ROUNDOFF["float32"]))


def cross_target(
    W: np.ndarray,
    X: np.ndarray,
    rtol: float | None = None,
    gram_kind: str = "sum",
) -> np.ndarray:
    """Eq. 4, W_tar = W (X X^T)^+; W (k, d), X (d, b) -> (k, d). rtol is on the singular values of G."""
    W, X = _f64(W), _f64(X)
    if rtol is None:
        rtol = default_rtol(*X.shape)
    return W @ pinv(gram(X, gram_kind), rtol)


def _eigen_root(X: np.ndarray, gram_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """P (d, m) and the diagonal of D^1/2 (m,), descending, of G = P D P^T, from the SVD of X; m = min(d, b).

    Eq. 9. Eigenvalues beyond the m-th are exactly 0 and are left out. Column signs: largest entry positive.
    """
    if gram_kind not in ("sum", "mean"):
        raise ValueError(f"unknown gram kind {gram_kind!r}")
    P, s, _ = np.linalg.svd(X, full_matrices=False)
    return P * _row_signs(P.T), s / np.sqrt(X.shape[1]) if gram_kind == "mean" else s


def self_target(
    W: np.ndarray,
    X: np.ndarray,
    root: str = "paper",
    rtol: float | None = None,
    gram_kind: str = "sum",
    precision: str | None = "float64",
) -> np.ndarray:
    """Eq. 9-12; W (k, d), X (d, b) -> (k, d).

    root "paper": W_tar = W (P D^1/2)^+ = W (D^1/2)^+ P^T, eq. 12.
    root "symmetric": W_tar = W P (D^1/2)^+ P^T, another solution of eq. 8.
    root "cholesky": W_tar = W (R^T)^+ with R of the QR of D^1/2 P^T, its diagonal positive, so that G = R^T R and R^T
    is the Cholesky factor of a G of full rank; another solution of eq. 8.
    rtol is on the singular values D^1/2 of P D^1/2, those of X. The default keeps the eigenvalues D above
    default_rtol(d, b) * max D, which is its square root on D^1/2, if D^1/2 is also above rounding_share * ||X||_F,
    X having come in that precision (None: exact).
    """
    W, X = _f64(W), _f64(X)
    d, b = X.shape
    P, half = _eigen_root(X, gram_kind)
    if rtol is None:
        rtol = float(np.sqrt(default_rtol(d, b)))
        if precision is not None and half.max(initial=0.0) > 0:
            rtol = max(rtol, rounding_share(d, b, precision) * float(np.linalg.norm(half) / half.max()))
    inverse_half = _inverse(half, rtol)
    if root == "symmetric":
        return W @ ((P * inverse_half) @ P.T)
    if root == "cholesky":
        kept = inverse_half > 0
        R = np.linalg.qr((P * half)[:, kept].T, mode="r")
        R *= np.where(np.diag(R) < 0, -1.0, 1.0)[:, None]
        inverse = np.zeros((d, d))
        inverse[: len(R)] = np.linalg.pinv(R.T)
        return W @ inverse
    if root != "paper":
        raise ValueError(f"unknown root {root!r}")
    inverse = np.zeros((d, d))  # (P D^1/2)^+ of the whole d x d matrix: its rows past min(d, b) are 0
    inverse[: len(half)] = (P * inverse_half).T
    return W @ inverse


def shift_target(
    W: np.ndarray,
    X: np.ndarray,
    C: np.ndarray | float | None = None,
    rtol: float | None = None,
    gram_kind: str = "sum",
) -> np.ndarray:
    """Eq. 17, W_tar = C M^+ with M = W^T - G W^T (d, k); W (k, d), X (d, b), C (k, k) -> (k, d).

    C None is the identity, a number c is c * identity. rtol is on the singular values of M.
    """
    W, X = _f64(W), _f64(X)
    C = _f64(1.0 if C is None else C)
    if C.ndim == 0:
        C = C * np.eye(len(W))
    M = W.T - gram(X, gram_kind) @ W.T
    if rtol is None:
        rtol = max(M.shape) * EPS
    return C @ pinv(M, rtol)


def estimate(
    W: np.ndarray,
    targets: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    initial: str = "pretrained",
) -> np.ndarray:
    """Eq. 18, W_est = (W_0 + sum_j w_j W_tar,j) / (B + 1), B = len(targets); all (k, d) -> (k, d).

    initial "pretrained": W_0 = W; "zero": W_0 = 0. The divisor is B + 1 whatever the weights and W_0 are.
    """
    if initial not in ("pretrained", "zero"):
        raise ValueError(f"unknown initial {initial!r}")
    total = _f64(W).copy() if initial == "pretrained" else np.zeros_like(_f64(W))
    for w, target in zip([1.0] * len(targets) if weights is None else weights, targets, strict=True):
        total = total + w * _f64(target)
    return total / (len(targets) + 1)


def delta(
    W: np.ndarray,
    batches: Sequence[np.ndarray],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    initial: str = "pretrained",
    root: str = "paper",
    C: np.ndarray | float | None = None,
    rtol: float | None = None,
    gram_kind: str = "sum",
    precision: str | None = "float64",
) -> np.ndarray:
    """Delta W = W_est - W (section 3.2: W_tar = W + Delta W); W (k, d), each batch (d, b_j) -> (k, d)."""
    if method == "cross":
        targets = [cross_target(W, X, rtol, gram_kind) for X in batches]
    elif method == "self":
        targets = [self_target(W, X, root, rtol, gram_kind, precision) for X in batches]
    elif method == "shift":
        targets = [shift_target(W, X, C, rtol, gram_kind) for X in batches]
    else:
        raise ValueError(f"unknown method {method!r}")
    return estimate(W, targets, weights, initial) - _f64(W)


def svd_factors(M: np.ndarray, r: int, p: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """After eq. 18: B = U S^(1-p) (k, r), A = S^p V^T (r, d), top r triplets of M (k, d).

    Each pair (column of U, row of V^T) is signed so that the row's largest-magnitude entry is positive.
    """
    M = _f64(M)
    _check_rank(r, min(M.shape))
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    signs = _row_signs(Vt)
    return (U * signs * s ** (1.0 - p))[:, :r], (Vt.T * signs * s**p).T[:r]


def _householder_qr(M: np.ndarray, pivot: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Q (k, m), R (m, d), order with Q R = M[:, order]; m = min(k, d), the diagonal of R >= 0.

    With pivot, each step first brings forward the column of largest remaining norm, ties to the lowest index.
    """
    k, d = M.shape
    m = min(k, d)
    Q, R, order = np.eye(k), M.copy(), list(range(d))
    for i in range(m):
        if pivot:
            j = i + int(np.argmax(np.linalg.norm(R[i:, i:], axis=0)))
            R[:, [i, j]] = R[:, [j, i]]
            order[i], order[j] = order[j], order[i]
        v = R[i:, i].copy()
        v[0] += np.copysign(np.linalg.norm(v), v[0])
        if np.linalg.norm(v) > 0:
            v /= np.linalg.norm(v)
            R[i:] -= 2.0 * np.outer(v, v @ R[i:])
            Q[:, i:] -= 2.0 * np.outer(Q[:, i:] @ v, v)
    signs = np.where(np.diag(R) < 0, -1.0, 1.0)
    return Q[:, :m] * signs, np.triu((R[:m].T * signs).T), order


def qr_factors(M: np.ndarray, r: int, pivot: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """After eq. 18: M = Q R, B = Q[:, :r] (k, r), A = R[:r] (r, d), the diagonal of R >= 0; M (k, d).

    pivot: column-pivoted QR; the columns of A are put back in the order of M's.
    """
    M = _f64(M)
    _check_rank(r, min(M.shape))
    Q, R, order = _householder_qr(M, pivot)
    A = np.empty_like(R)
    A[:, order] = R
    return Q[:, :r], A[:r]


def relative_variances(M: np.ndarray) -> np.ndarray:
    """Eq. 19, v_m = s_m^2 / sum s^2, descending; M (k, d) -> (min(k, d),). A zero matrix gives zeros."""
    s = np.linalg.svd(_f64(M), compute_uv=False)
    total = np.sum(s**2)
    return s**2 / total if total > 0 else np.zeros_like(s)


def allocate(
    deltas: Mapping[str, np.ndarray], budget: int, min_rank: int = 0, max_rank: int | None = None
) -> dict[str, int]:
    """Section 3.3, VAS: a rank for each site from its Delta W (k, d).

    Every site gets min_rank (or its cap, if smaller); then the largest remaining relative variances of all
    sites together get one each until the budget is spent, ties to the lower m, then to the lower name.
    A site's cap is min(k, d), or max_rank where that is smaller.
    """
    caps = {name: min(np.shape(M)) for name, M in deltas.items()}
    if max_rank is not None:
        caps = {name: min(cap, max_rank) for name, cap in caps.items()}
    ranks = {name: min(min_rank, cap) for name, cap in caps.items()}
    left = budget - sum(ranks.values())
    if left < 0:
        raise ValueError(f"budget {budget} is below the {sum(ranks.values())} that min_rank takes")
    entries = []
    for name, M in deltas.items():
        variances = relative_variances(M)
        entries += [(-variances[m], m, name) for m in range(ranks[name], caps[name])]
    for _, _, name in sorted(entries)[:left]:
        ranks[name] += 1
    return ranks


def offset(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """method.md point 1: ([B, -B] (k, 2r), [A; A] (2r, d)) from B (k, r), A (r, d); their product is 0."""
    B, A = _f64(B), _f64(A)
    return np.hstack([B, -B]), np.vstack([A, A])


def paired(B: np.ndarray, A: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """method.md point 1: (k, r) and (r, d) with product 0 from the first ceil(r/2) directions of B and A.

    ([B_h, -B_h], [A_h; A_h]), h = r // 2; an odd r appends direction h as a row of A with a zero column in B.
    """
    B, A = _f64(B), _f64(A)
    _check_rank(ceil(r / 2), len(A))
    h = r // 2
    B_full, A_full = offset(B[:, :h], A[:h])
    if r % 2:
        B_full, A_full = np.hstack([B_full, np.zeros((len(B), 1))]), np.vstack([A_full, A[h : h + 1]])
    return B_full, A_full


def pissa_factors(W: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 24-26, Delta W = W: B = U S^1/2 (k, r), A = S^1/2 V^T (r, d); W (k, d)."""
    return svd_factors(W, r, 0.5)


def olora_factors(W: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 28-30, Delta W = W = Q R: B = Q[:, :r] (k, r), A = R[:r] (r, d); W (k, d)."""
    return qr_factors(W, r)


def corda_factors(W: np.ndarray, X: np.ndarray, r: int, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 34-36, U S V^T = SVD(W C): B = U S^1/2 (k, r), A = S^1/2 V^T C^-1 (r, d); W (k, d), X (d, n) all tokens.

    C = X X^T / n, plus damping times the mean of its diagonal on the diagonal.
    """
    W, X = _f64(W), _f64(X)
    C = gram(X, "mean")
    C = C + damping * np.mean(np.diag(C)) * np.eye(len(C))
    B, A = svd_factors(W @ C, r, 0.5)
    return B, A @ np.linalg.inv(C)


def eva_directions(X: np.ndarray, r: int, center: bool = True) -> np.ndarray:
    """Eq. 38-39: the top r left singular vectors of X (d, n) as rows, largest entry positive -> (r, d).

    center: of X minus its mean column, which is what EVA's incremental PCA computes.
    """
    X = _f64(X)
    if center:
        X = X - X.mean(axis=1, keepdims=True)
    _check_rank(r, min(X.shape))
    U, _, _ = np.linalg.svd(X, full_matrices=False)
    return (U * _row_signs(U.T)).T[:r]


def lora_ga_factors(G: np.ndarray, r: int, gamma: float = 16.0) -> tuple[np.ndarray, np.ndarray]:
    """LoRA-GA, theorems 3.1 and 3.2: B = c U[:, r:2r] (k, r), A = c V[:, :r]^T (r, d), c = k^1/4 / gamma^1/2.

    G = U S V^T (k, d) is the gradient of the loss by W, or a positive multiple of it.
    """
    G = _f64(G)
    _check_rank(2 * r, min(G.shape))
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    signs = _row_signs(Vt)
    c = len(G) ** 0.25 / gamma**0.5
    return c * (U * signs)[:, r : 2 * r], c * (Vt.T * signs).T[:r]


def descent_delta(W: np.ndarray, X: np.ndarray, G: np.ndarray, r: int, damping: float) -> np.ndarray:
    """ΔW (k, d) of rank r, up to the number that all sites share: targets W X − η ∂L/∂Y, least squares, by hand.

    η is the mean square of the outputs; the rank is cut where ‖(ΔW − D) S‖_F is least, S the symmetric root of C.
    """
    W, X, G = _f64(W), _f64(X), _f64(G)
    C = X @ X.T / X.shape[1]
    C = C + damping * np.trace(C) / len(C) * np.eye(len(C))
    full = -np.mean((W @ X) ** 2) * np.linalg.solve(C, G.T).T
    values, vectors = np.linalg.eigh(C)
    root = (vectors * np.sqrt(values)) @ vectors.T
    U, S, Vt = np.linalg.svd(full @ root, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r] @ np.linalg.inv(root)


def whitened_factor(W: np.ndarray, X: np.ndarray, G: np.ndarray, r: int, s: float, layers: int) -> np.ndarray:
    """A (r, d) of whitened mode: V_rᵀ S⁻¹, S the symmetric root of C + mean(diag C) I, G S⁻¹ = U Σ Vᵀ.

    Of the size at which ‖A X‖_F/√n is 20·σ/(s √layers), with σ² = mean (WX)²; all tokens are of mean square 1. The rows
    are defined up to their signs.
    """
    W, X, G = _f64(W), _f64(X), _f64(G)
    X = X / np.sqrt(np.mean(X**2, axis=0))
    C = X @ X.T / X.shape[1]
    values, vectors = np.linalg.eigh(C + np.trace(C) / len(C) * np.eye(len(C)))
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    A = np.linalg.svd(G @ inverse, full_matrices=False)[2][:r] @ inverse
    size = 20 / np.sqrt(layers) * np.sqrt(np.mean((W @ X) ** 2))
    return size / s / np.sqrt(np.sum((A @ X) ** 2) / X.shape[1]) * A


def first_update_motion(W: np.ndarray, A: np.ndarray, X: np.ndarray, scaling: float) -> float:
    """‖Δy‖/(lr ‖y‖) of one layer with B = 0 and the loss mean(y²), after AdamW's first update B = −lr sign(∂L/∂B)."""
    W, A, X = _f64(W), _f64(A), _f64(X)
    Y = W @ X
    gradient = scaling * (2 * Y / Y.size) @ (A @ X).T
    return float(np.linalg.norm(scaling * np.sign(gradient) @ A @ X) / np.linalg.norm(Y))


def proposed_rate(motions: list[float]) -> float:
    """min(0.027 m^(-2/3), 3e-3), m the median motion."""
    return min(0.027 * float(np.median(motions)) ** (-2 / 3), 3e-3)


def lora_one_delta(G: np.ndarray, gamma: float = 128.0) -> np.ndarray:
    """LoRA-One, algorithm 1: Delta W = -G / (gamma s_1), s_1 the largest singular value of the gradient G (k, d)."""
    G = _f64(G)
    return -G / (gamma * np.linalg.norm(G, 2))


def lora_da_factors(
    G: np.ndarray,
    X: np.ndarray,
    f: np.ndarray,
    r: int,
    damping: float = 0.01,
    variance: float = 0.03,
    samples: int = 100_000,
    gamma: float = 1024.0,
) -> tuple[np.ndarray, np.ndarray]:
    """LoRA-DA (Zhang et al. 2025): B (k, r) and A (r, d), with damping relative to the means.

    G (k, d) is the gradient by W, X (d, b) the inputs, f (k,) the mean over tokens of the squared gradient of one
    sample's loss by the outputs.
    """
    G, X, f = _f64(G), _f64(X), _f64(f)
    C = X @ X.T / X.shape[1]
    inverse = np.linalg.inv(C + damping * np.trace(C) / len(C) * np.eye(len(C)))
    fisher = f + damping * np.mean(f)
    step = -np.diag(1 / fisher) @ G @ inverse
    size = np.linalg.norm(step, 2)
    guidance = variance * np.sum(1 / fisher) / (samples * size**2) * inverse - step.T @ step / size**2
    directions = np.linalg.eigh(guidance)[1][:, :r]
    return step @ directions / size / np.sqrt(gamma), directions.T / np.sqrt(gamma)


def gora_factor(G: np.ndarray, A: np.ndarray, gamma: float = 0.05) -> np.ndarray:
    """GoRA (He et al. 2025): B (k, r) for A (r, d) with B·A = -gamma sqrt(d/r) G P, P the projector on A's rows."""
    G, A = _f64(G), _f64(A)
    r, d = A.shape
    return -gamma * np.sqrt(d / r) * G @ A.T @ np.linalg.inv(A @ A.T)


def gora_ranks(
    importance: dict[str, float], shapes: dict[str, tuple[int, int]], reference: float, low: int, high: int
) -> dict[str, int]:
    """GoRA: rank of each site, of a budget of reference * sum sqrt(k + d) shared out by importance, then bounded."""
    cost = {name: float(np.sqrt(k + d)) for name, (k, d) in shapes.items()}
    budget, total = reference * sum(cost.values()), sum(importance.values())
    wanted = {name: round(budget * importance[name] / total / cost[name]) for name in shapes}
    return {name: int(min(max(rank, low), high, *shapes[name])) for name, rank in wanted.items()}


def head_objective(
    D: np.ndarray,
    e: np.ndarray,
    X: np.ndarray,
    z: np.ndarray,
    y: np.ndarray,
    w: np.ndarray,
    loss: str,
    ridge: float,
    bias: bool,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Σ w ℓ(z + D x + e, y)/Σ w + ½ ridge·v·‖D‖² and its gradients by D (c, d) and e (c,); X (n, d), z and y (n, c).

    v is the mean over features of the weighted variance of x, or of its square where there is no bias.
    """
    share = w / w.sum()
    centred = X - share @ X if bias else X
    v = float((share @ centred**2).mean())
    out = z + X @ D.T + e
    if loss == "cross-entropy":
        shifted = np.exp(out - out.max(axis=1, keepdims=True))
        p = shifted / shifted.sum(axis=1, keepdims=True)
        values = -(y * np.log(p)).sum(axis=1)
    elif loss == "binary cross-entropy":
        p = 1 / (1 + np.exp(-out))
        values = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1)
    else:
        p, values = out, 0.5 * ((out - y) ** 2).sum(axis=1)
    by_out = share[:, None] * (p - y)
    value = float(share @ values) + 0.5 * ridge * v * float((D**2).sum())
    return value, by_out.T @ X + ridge * v * D, by_out.sum(axis=0)

"""Second moments of the inputs of one batch, streamed, in the smaller of the two forms X Xᵀ and Xᵀ X.

Tensor layout: tokens arrive as rows (n, d); X of the paper is their transpose (d, b). While b ≤ d the rows are kept,
in their own dtype, and the b×b dual Xᵀ X serves; beyond that only G = X Xᵀ (d×d) is held, so memory never exceeds d×d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import HALF, LowRank, low_rank, product_of_halves, sums_in_float32, symmetric_product
from .parallel import read_back
from .pseudo_inverse import (
    coarser,
    default_rtol,
    eigh_descending,
    fix_signs,
    kept,
    numerical_rank,
    rounding_noise,
)


@dataclass(frozen=True)
class Eigenpairs:
    """The part of G = P D Pᵀ that the tolerance keeps: `rows` (n, d) = Pᵀ, `D` (n,) descending, signs fixed."""

    rows: Tensor
    D: Tensor

    @property
    def P(self) -> Tensor:
        """P (d, n)."""
        return self.rows.mT


SINGLE_BELOW = 1e6
"""Largest condition of G at which P = X V D^(-½) comes as precisely in float32, whose rounding enters √condition-fold:
1e-4 of the last direction at most."""


def accumulation_dtype(dtype: torch.dtype, single: bool = False) -> torch.dtype:
    """float64 for inputs of float32 or float64, float32 for those of half precision, whose products it holds exactly.

    G of a network's inputs has condition numbers of 1e5 and more, and float32 sums would lose its small eigenvalues.

    Args:
        single: whether those are dropped anyway, so that float32 will do for inputs of float32.
    """
    return torch.float32 if dtype in HALF or (single and dtype == torch.float32) else torch.float64


def of_unit_size(rows: Tensor) -> Tensor:
    """Tokens (n, d) in their own dtype, each scaled to a mean square of 1; a token of zeros stays one."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    size = torch.linalg.vector_norm(wide, dim=1, keepdim=True) / rows.shape[1] ** 0.5
    return (wide / torch.where(size > 0, size, torch.ones_like(size))).to(rows.dtype)


STACKED = 2**26
"""Entries of a stack that is decomposed by one call: 512 MiB in float64."""


class Moments:
    """Accumulates the tokens that one input sees in one batch.

    Args:
        dim: number of input features d.
        gram: "sum" for G = X Xᵀ as printed in the paper, "mean" for G / b.
        dtype: dtype of accumulation and of everything returned; None for `accumulation_dtype` of the first tokens.
        totals: whether Σ x is wanted besides.
        single: see `accumulation_dtype`.
        unit: whether every token is scaled to a mean square of 1 first, so that all count alike however large they are.

    Attributes:
        seen_dtype: of the tokens, float32 at least: the precision that a result is worth.
        precision: the coarsest dtype that the tokens came in or are multiplied in; None before the first.
    """

    def __init__(
        self,
        dim: int,
        gram: str = "sum",
        dtype: torch.dtype | None = None,
        totals: bool = False,
        single: bool = False,
        unit: bool = False,
    ) -> None:
        self.dim, self.kind, self.totals, self.single, self.unit = dim, gram, totals, single, unit
        self._dtype = dtype
        self.seen_dtype = torch.float64
        self.precision: torch.dtype | None = None
        self.tokens = 0
        self._rows: list[Tensor] = []  # as they came, until there are more than d
        self._gram: Tensor | None = None
        self._total: Tensor | None = None
        self._share: Tensor | None = None  # ‖X‖_F²/σ_max², once eigenvalues are known
        self._decomposed: tuple[Tensor, Tensor, list[float]] | None = None  # D, P or V, and D as numbers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of accumulation and of everything returned."""
        return self._dtype or torch.float64

    @property
    def device(self) -> torch.device:
        """The device of the tokens, on which all is computed."""
        held = self._gram if self._gram is not None else next(iter(self._rows), None)
        return torch.device("cpu") if held is None else held.device

    def empty(self) -> Moments:
        """A new one of the same kind."""
        return Moments(self.dim, self.kind, self._dtype, self.totals, self.single, self.unit)

    def update(self, rows: Tensor, precision: torch.dtype | None = None) -> None:
        """Add `rows` (n, d), one row a token; any floating dtype, n may be 0. `rows` may be edited afterwards.

        Args:
            precision: that the layer casts them to, where it is another than theirs (autocast).
        """
        self._dtype = self._dtype or accumulation_dtype(rows.dtype, self.single)
        if rows.shape[0]:
            self.precision = coarser(coarser(self.precision, rows.dtype), precision or rows.dtype)
        self.seen_dtype = torch.promote_types(rows.dtype, torch.float32)
        self.tokens += rows.shape[0]
        rows = of_unit_size(rows) if self.unit else rows
        if self.totals:
            self._add_total(rows.sum(dim=0, dtype=self.dtype))
        if self._gram is not None:
            self._add_gram([rows])
        elif self.tokens > self.dim:
            self._add_gram([*self._rows, rows])
            self._rows = []
        elif rows.shape[0]:
            self._rows.append(rows.clone())

    def _add_gram(self, parts: list[Tensor]) -> None:
        """X Xᵀ of all parts, converted d tokens at a time, 1,024 at least: a small copy, and few products.

        Not converted where matrix units take them as they are, and small eigenvalues do not count.
        """
        for rows in (block for part in parts for block in part.split(max(self.dim, 1024))):
            if self._on_matrix_units(rows):
                product = product_of_halves(rows.mT, rows)
            else:
                product = symmetric_product(rows.to(self.dtype))
            self._gram = product if self._gram is None else self._gram.add_(product)

    def _on_matrix_units(self, rows: Tensor) -> bool:
        """Return whether tokens are multiplied as they are: in half precision, where small eigenvalues do not count."""
        if not self.single or self.dtype != torch.float32:
            return False
        return sums_in_float32(rows.dtype, rows.device)

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen (a module called several times in one forward pass)."""
        if other._gram is None:
            for rows in other._rows:  # where they are of unit size, they stay so
                self.update(rows, other.precision)
            return
        mine = self.gram_sum()
        self._dtype, self.seen_dtype = self._dtype or other.dtype, other.seen_dtype
        self.precision = coarser(self.precision, other.precision or other.seen_dtype)
        self._gram = other._gram.clone() if mine is None else mine + other._gram
        self._rows = []
        self.tokens += other.tokens
        if self.totals:
            self._add_total(other.total())

    def _add_total(self, total: Tensor) -> None:
        self._total = total if self._total is None else self._total + total

    def total(self) -> Tensor:
        """Σ x (d,) over all tokens, where `totals` asks for it."""
        assert self.totals, "not asked for"
        return torch.zeros(self.dim, dtype=self.dtype) if self._total is None else self._total

    def _kept(self) -> Tensor:
        return (self._rows[0] if len(self._rows) == 1 else torch.cat(self._rows)).to(self.dtype)

    def finite(self) -> Tensor:
        """Return whether every token seen so far is free of NaN and Inf (and small enough to square); boolean ()."""
        if self._gram is not None:
            return torch.isfinite(self._gram.diagonal().sum())
        if not self._rows:
            return torch.tensor(True)
        norms = [torch.linalg.vector_norm(rows, dtype=self.dtype) for rows in self._rows]
        return torch.isfinite(sum(norms[1:], start=norms[0]).square())

    @property
    def scale(self) -> float:
        """The factor of X Xᵀ: 1, or 1/b for the mean."""
        return 1.0 / max(self.tokens, 1) if self.kind == "mean" else 1.0

    @property
    def rtol(self) -> float:
        """The default tolerance on the eigenvalues of G: max(d, b)·eps."""
        return default_rtol(self.dim, self.tokens, self.dtype)

    @property
    def noise(self) -> float:
        """Singular values of X that may be rounding of its entries, over ‖X‖_F: see `linalg.rounding_noise`."""
        return rounding_noise(self.precision or self.seen_dtype, self.dim, self.tokens)

    def gram_sum(self) -> Tensor | None:
        """X Xᵀ (d, d), whatever `gram` is; None before the first token."""
        if self._gram is not None or not self._rows:
            return self._gram
        return symmetric_product(self._kept())

    def second_moment(self) -> Tensor | LowRank:
        """X Xᵀ (d, d), whatever `gram` is, by the tokens themselves where that pays; after the first token."""
        if self._gram is not None:
            return self._gram
        as_they_are = self._on_matrix_units(self._rows[0])
        rows = torch.cat(self._rows) if as_they_are else self._kept()
        return low_rank(rows, torch.ones(len(rows), dtype=self.dtype, device=rows.device))

    def gram(self) -> Tensor:
        """G (d, d) = X Xᵀ, times 1/b if `gram="mean"`. Not to be edited."""
        total = self.gram_sum()
        if total is None:
            raise ValueError("no token seen: G is undefined; check the attention mask of this batch")
        return total if self.scale == 1.0 else total * self.scale

    def rows(self) -> Tensor | None:
        """√scale·Xᵀ (b, d) while b ≤ d, else None. `rowsᵀ·rows` is G."""
        if self._gram is not None or not self._rows:
            return None
        return self._kept() if self.scale == 1.0 else self._kept() * self.scale**0.5

    def eigenpairs(
        self, rtol: float, noise: float = 0.0, dtype: torch.dtype | None = None, solved_in: torch.dtype | None = None
    ) -> Eigenpairs:
        """P and D of G = P D Pᵀ with D > rtol·max D and D > noise²·Σ D (`linalg.kept`), by the b×b dual where b ≤ d
        (P = X V D^(-½)).

        Args:
            dtype: that P is wanted in; None for that of the sums.
            solved_in: the `dtype` of `decompose`, where that was not called before.
        """
        if self._decomposed is None:
            self.decompose(dtype=solved_in)
        assert self._decomposed is not None
        (D, V, values), self._decomposed = self._decomposed, None
        rows, count = self.rows(), kept(values, rtol, noise)
        self._share = D.new_tensor(math.fsum(values) / values[0] if values[0] > 0 else 1.0)
        D, P = D[:count], V[:, :count].mT
        if rows is not None:
            single = dtype is not None and count > 0 and values[0] <= SINGLE_BELOW * values[count - 1]
            precise = dtype if single else self.dtype
            P = (P / D.sqrt()[:, None]).to(precise) @ rows.to(precise)
        P = P.to(dtype or self.dtype)
        return Eigenpairs(P * fix_signs(P.mT)[:, None], D)

    def decompose(self, others: Sequence[Moments] = (), dtype: torch.dtype | None = None) -> None:
        """Find the eigenpairs of this G and of others, which `eigenpairs` of each then takes.

        Equal shapes are one call of the solver, which on a GPU is several times as fast for matrices of some hundred
        rows as one by one; all eigenvalues are read back together.

        Args:
            dtype: that the solver works in; None for that of the sums.
        """
        stacks: dict[tuple[torch.Size, torch.dtype], list[tuple[Moments, Tensor]]] = {}
        for X in (self, *others):
            S = X._smaller()
            S = S.to(dtype or S.dtype)
            stacks.setdefault((S.shape, S.dtype), []).append((X, S))
        found: list[tuple[Moments, Tensor, Tensor]] = []
        for (shape, _), alike in stacks.items():
            most = max(1, STACKED // shape.numel())
            for same in (alike[i : i + most] for i in range(0, len(alike), most)):
                D, V = eigh_descending(torch.stack([S for _, S in same]) if len(same) > 1 else same[0][1][None])
                found += [(X, D[i], V[i]) for i, (X, _) in enumerate(same)]
        for (X, D, V), values in zip(found, read_back([D for _, D, _ in found]), strict=True):
            X._decomposed = D, V, values

    def noise_rtol(self) -> Tensor:
        """`noise` over σ_max(X) and not over ‖X‖_F, at least the tolerance of the sums, as a tolerance on singular
        values of X; ()."""
        share = self._power_iteration() if self._share is None else self._share
        return (self.noise**2 * share).clamp_min(self.rtol).sqrt()

    def _power_iteration(self) -> Tensor:
        """‖X‖_F²/σ_max² () where no eigenvalues are known: from above, within a few percent on real inputs."""
        rows = self.rows()
        S = self.gram() if rows is None else rows
        energy = S.diagonal().sum() if rows is None else S.square().sum()
        v = S.diagonal() if rows is None else S.square().sum(dim=0)  # most weight where the features are large
        largest = energy.new_zeros(())
        for _ in range(8):
            v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
            image = S @ v
            largest = torch.maximum(largest, v @ image if rows is None else image @ image)
            v = image if rows is None else S.mT @ image
        return torch.where(largest > 0, energy / largest, torch.ones_like(energy))

    def numerical_rank(self, rtol: float) -> int:
        """Number of eigenvalues of G above rtol·λ_max: the directions that the data determine."""
        return numerical_rank(self._smaller(), rtol)

    def _smaller(self) -> Tensor:
        """G (d, d), or while b ≤ d its dual Xᵀ X (b, b), which has the same eigenvalues above zero."""
        rows = self.rows()
        return self.gram() if rows is None else rows @ rows.mT


class TokenCount:
    """Stands in for `Moments` where only the number of tokens is wanted (methods that read gradients)."""

    def __init__(self) -> None:
        self.tokens = 0
        self._finite: Tensor | None = None

    @classmethod
    def of(cls, moments: Moments) -> TokenCount:
        """The count of the tokens that these moments are of."""
        made = cls()
        made.tokens, made._finite = moments.tokens, moments.finite()
        return made

    @property
    def device(self) -> torch.device:
        """The device of the tokens."""
        return torch.device("cpu") if self._finite is None else self._finite.device

    def empty(self) -> TokenCount:
        """A new one."""
        return TokenCount()

    def update(self, rows: Tensor, precision: torch.dtype | None = None) -> None:
        """Count `rows` (n, d)."""
        self.tokens += rows.shape[0]
        self._note(torch.isfinite(rows).all())

    def merge(self, other: TokenCount) -> None:
        """Add what `other` has counted."""
        self.tokens += other.tokens
        if other._finite is not None:
            self._note(other._finite)

    def _note(self, finite: Tensor) -> None:
        self._finite = finite if self._finite is None else finite & self._finite.to(finite.device)

    def finite(self) -> Tensor:
        """Return whether every token was free of NaN and Inf; boolean ()."""
        return torch.tensor(True) if self._finite is None else self._finite

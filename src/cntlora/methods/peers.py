"""The published peers in the notation of the paper's appendix C, each one function with its paper and equation.

Layout: W (k, d), C = X Xᵀ / n (d, d) over all tokens of all batches, G = ∂L/∂W (k, d). What an initialisation writes
follows from a `Target`: B·A = scale·[M]_r·right, unless the method has factors of its own (EVA, LoRA, LoRA-GA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..linalg.factors import Spectrum, input_spectrum
from ..linalg.parallel import once


@dataclass(frozen=True)
class Target:
    """What the factors of one site are made from.

    Attributes:
        M: matrix (k, d) to be factored: ΔW, or what stands for it; None where `known` gives all that is needed.
        right: (d, d) that A is multiplied with after the factorisation of M; None for the identity.
        known: the first q singular triplets, where the method has its own way to them.
        is_delta: whether M is ΔW itself, so that its norm may be compared with that of W.
    """

    M: Tensor | None = None
    right: Tensor | None = None
    known: Callable[[int], Spectrum] | None = None
    is_delta: bool = False


def pissa_target(W: Tensor) -> Target:
    """ΔW = W (PiSSA, Meng et al. 2024; eq. 24–26): factored by SVD, B = U S^½ and A = S^½ Vᵀ at rank r.

    OLoRA (Büyükakyüz 2024; eq. 28–30) has the same ΔW and factors it by QR.
    """
    return Target(M=W, is_delta=True)


def damped(C: Tensor, damping: float) -> Tensor:
    """C̃ = C + damping·mean(diag C)·I."""
    return C + damping * C.diagonal().mean() * torch.eye(C.shape[0], dtype=C.dtype, device=C.device)


def damped_inverse(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C̃ = C + damping·mean(diag C)·I and its inverse, for `corda_target`.

    The paper's C⁻¹ does not exist for a rank-poor C. PEFT damps in the same way, by 0.01, and doubles it while a
    float32 inverse is off by more than 0.05. In float64 it never is.

    Raises:
        ValueError: if C̃ is singular.
    """
    whole = damped(C, damping)
    L, info = torch.linalg.cholesky_ex(whole)
    if int(info) != 0:
        raise ValueError(
            f"damping: C + {damping:g}·mean(diag C)·I is singular, so that CorDA has no inverse; raise damping, or "
            "read more tokens"
        )
    return whole, torch.cholesky_inverse(L)


def corda_target(W: Tensor, C: Tensor, inverse: Tensor) -> Target:
    """ΔW C = SVD(W C) (CorDA, Yang et al. 2024, instruction-previewed; eq. 33–36): B·A = [W C̃]_r C̃⁻¹.

    Args:
        C, inverse: C̃ and C̃⁻¹ of `damped_inverse`.
    """
    return Target(M=W @ C, right=inverse)


def eva_target(gram: Tensor, total: Tensor, tokens: float, center: bool, exact: bool = False) -> Target:
    """Right singular vectors of X (EVA, Paischer et al. 2024; eq. 39), by the eigenvectors of X Xᵀ.

    Args:
        gram: X Xᵀ (d, d) over all tokens. total: Σ x (d,). tokens: their number n.
        center: subtract the mean token, as EVA's own code does (an incremental PCA); False is eq. 39 as printed.
        exact: all eigenvectors, also where the leading ones would do.
    """
    if center:
        gram = gram - torch.outer(total, total) / tokens
    return Target(known=once(partial(input_spectrum, gram, exact=exact)))  # once for all sites that share the input


def lora_one_target(G: Tensor, gamma: float = 128.0) -> Target:
    """ΔW = −G/(γ·σ_1(G)) (LoRA-One, Zhang et al. 2025, algorithm 1): one step of gradient descent, factored by SVD.

    Its letter is `base="keep"`: the step is taken. γ = 128 is its authors'; `strength` scales it.
    """
    return Target(M=-G / (gamma * torch.linalg.matrix_norm(G, 2)), is_delta=True)


def lora_ga_factors(s: Spectrum, r: int, scale: float, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """A = c·V[:, :r]ᵀ, B = c·U[:, r:2r], c² = scale·√k/γ, of G = U S Vᵀ (LoRA-GA, Wang et al. 2024).

    The directions are those of its theorem 3.1, the scale that of theorem 3.2 and its authors' code ("stable", γ = 16).
    The spectrum of the gradient itself does not enter, so that the scale of the loss does not matter. PEFT 0.21
    multiplies B by S[r:2r] and scales B alone, which does let it matter; its subspaces are the same.
    """
    c = math.sqrt(scale * math.sqrt(s.U.shape[0]) / gamma)
    return c * s.U[:, r : 2 * r], c * s.Vh[:r]


def zero_up(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """B = 0 (k, r) beside A (r, d): the start of LoRA and EVA."""
    return A.new_zeros(k, A.shape[0]), A


def lora_down(r: int, d: int, generator: torch.Generator) -> Tensor:
    """A (r, d) uniform in ±1/√d (LoRA, Hu et al. 2021; eq. 22), as its authors' code and PEFT draw it.

    Equation 22 prints N(0, I), which is larger by √(3d); `kaiming_uniform_(a=√5)` of the code is this.
    """
    return (2.0 * torch.rand(r, d, generator=generator, dtype=torch.float64) - 1.0) / math.sqrt(d)

"""Bounds on how far rounding may move a result: they follow from the conditioning of what is computed.

A bound that was read off one CPU is red on the next, since kernels and numbers of threads add in other orders. Here a
bound is eps times the condition of the problem, to first order what the theory gives, times `MARGIN`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 10.0
"""Over the first-order bound: constants and factors of √n that it leaves out, and the next CPU."""


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def truncation(W: Tensor, r: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of [W]_r where W is factored in `dtype`.

    A perturbation E of W turns its leading singular vectors by ‖E‖/(σ_r − σ_{r+1}) (Wedin), and LAPACK's E is of the
    size eps·σ_1.
    """
    s = torch.linalg.svdvals(W.double())
    return MARGIN * eps(dtype) * float(s[0] / (s[r - 1] - s[r]))


def leading_columns(W: Tensor, r: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of Q[:, :r]·R[:r] of W = Q R in `dtype`: eps·‖W‖ through the condition of the first r columns."""
    s = torch.linalg.svdvals(W[:, :r].double())
    Q = torch.linalg.qr(W[:, :r].double()).Q
    part = float(torch.linalg.matrix_norm(Q.mT @ W.double()))
    return MARGIN * eps(dtype) * float(s[0] / s[-1]) * float(torch.linalg.matrix_norm(W.double())) / part


def inverse(condition: float, n: int = 1, dtype: torch.dtype = torch.float64) -> float:
    """Relative error of what an inverse or pseudo-inverse of n rows is made from: √n·eps·σ_max/σ_min."""
    return MARGIN * math.sqrt(n) * eps(dtype) * condition


def norm(n: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of the norm of n numbers: the rounding errors of their sum are independent of each other."""
    return math.sqrt(n) * eps(dtype)

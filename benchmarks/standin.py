"""A stack of linear layers as a stand-in for a model: what an initialisation costs beyond the forward pass, by size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.workloads import forward_pass, seeded
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import cntlora

METHODS = ("cross", "self", "shift", "eva")
SLOW_ROUND = 5.0
"""Seconds of a round that is not repeated."""


@dataclass(frozen=True)
class Size:
    """`layers` linear layers d → d, each with an input of its own; `batches` of `tokens` random tokens each."""

    d: int = 512
    tokens: int = 512
    batches: int = 2
    layers: int = 2
    rank: int = 8


class Stack(nn.Module):
    """Linear layers one after another, each output brought to unit mean square before the next."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(layers))
        for weight in self.parameters():
            nn.init.normal_(weight, std=d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d) → (tokens, d)."""
        for layer in self.layers:
            x = nn.functional.rms_norm(layer(x), x.shape[-1:])
        return x


def stand_in(size: Size) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The stack with LoRA on every layer, and its batches."""
    base = seeded(lambda: Stack(size.d, size.layers))
    config = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=r"layers\.\d+")
    g = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(size.tokens, size.d, generator=g)} for _ in range(size.batches)]
    return get_peft_model(base, config).eval(), batches  # type: ignore[arg-type]


def letter(method: str, **options: Any) -> cntlora.InitConfig:
    """The configuration of a method; † of cross and shift as NumPy has it, of which the records tell."""
    rtol = 0.0 if method in ("cross", "shift") else None
    return cntlora.InitConfig.from_dict({"method": method, "rtol": rtol, **options})


def extra_seconds(size: Size, methods: Sequence[str], repeats: int) -> dict[str, float]:
    """Seconds of the forward pass, and for each method of its initialisation beyond that: medians over rounds.

    All of them once a round, after one round to warm up; what is subtracted is the forward pass of the same round. If
    the first round takes more than SLOW_ROUND seconds, it is the only one: warming up is then a small part.
    """
    model, batches = stand_in(size)
    found: dict[str, list[float]] = {name: [] for name in ("forward", *methods)}
    for done in range(repeats + 1):
        if done == 1 and sum(seconds[0] for seconds in found.values()) > SLOW_ROUND:
            break
        start = time.perf_counter()
        forward_pass(model, batches)
        forward = time.perf_counter() - start
        found["forward"].append(forward)
        for method in methods:
            config = letter(method, num_batches=size.batches)
            start = time.perf_counter()
            cntlora.compute_plan(model, batches, config, progress=False)
            found[method].append(time.perf_counter() - start - forward)
    return {name: median(seconds[1:] or seconds) for name, seconds in found.items()}


def sweep(
    base: Size, what: str, values: Sequence[int], repeats: int, limit: float, methods: Sequence[str] = METHODS
) -> dict[str, Any]:
    """Extra seconds against one of the sizes, and the exponents of the power laws that fit them.

    Args:
        what: the field of `Size` that runs through `values`, which rise.
        limit: a method is left out from the first size on whose round is foreseen to take more seconds, growing as
            the cube of d, or in proportion to another size.
    """
    points: list[dict[str, Any]] = []
    open_, left_out = list(methods), {}
    for value in values:
        if points:
            growth = (value / points[-1][what]) ** (3 if what == "d" else 1)
            for method in [m for m in open_ if points[-1]["seconds"][m] * growth > limit]:
                open_.remove(method)
                left_out[method] = f"from {what} = {value} on: foreseen to take more than {limit:g} s"
        if not open_:
            break
        size = replace(base, **{what: value})
        points.append({**asdict(size), "seconds": extra_seconds(size, open_, repeats)})
    laws = {name: power_law(points, what, name) for name in ("forward", *methods)}
    return {"what": what, "base": asdict(base), "points": points, "laws": laws, "left_out": left_out}


def power_law(points: Sequence[dict[str, Any]], what: str, name: str) -> dict[str, float] | None:
    """seconds ≈ factor·size^exponent through the points that have a positive time, or None for fewer than two."""
    pairs = [(p[what], p["seconds"][name]) for p in points if p["seconds"].get(name, 0.0) > 0.0]
    return fit(*zip(*pairs, strict=True)) if len(pairs) >= 2 else None


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares in log-log.

    Returns:
        exponent, factor (seconds at size 1), residual (root mean square, in factors of e: 0.1 is about 10 %), points.
    """
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(seconds, dtype=float))
    exponent, offset = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((y - exponent * x - offset) ** 2)))
    return {
        "exponent": float(exponent), "factor": float(np.exp(offset)), "residual": residual, "points": float(len(x))
    }  # fmt: skip

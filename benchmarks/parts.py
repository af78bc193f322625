"""The parts of an initialisation: floating-point operations part by part, and the rate of each on this machine.

A batch is digested once for every distinct input ("group") of d features and b tokens, n = min(d, b):

- gram: X Xᵀ (d²·b) where b > d or G itself is needed, else the dual Xᵀ X (2·b²·d);
- factorisation: cross a Cholesky inverse (n³); self an eigendecomposition (9·n³); shift the inverse of I − G (2·n³) and
  a Cholesky factor for the rank (n³/3); eva none, but after all batches the leading directions of G (d×d), and up to
  COUNTED features a Cholesky factor, or eigenvalues (3·d³) where there were fewer tokens than d; descent after all
  batches L⁻¹ of C (d³); lora_ga none;
- map: what leads back to d×d where b ≤ d: cross and shift 2·b²·d + 2·b·d², self 2·b²·d.

A site of weight (k, d) then costs the product W·T (2·k·d²) for cross and self, and for descent W·C and G·L⁻ᵀ (4·k·d²).
Methods of gradients run backward besides, at twice the forward pass, and descent tries its size on half of the batches
twice. For shift, with k ≥ d, a QR of W for its
condition (2·k·d²) and (Wᵀ)†·S: a solution if k = d (8/3·d³), else a QR (4·k·d²) and products (4·k·d²); with k < d, in
each batch, a product (2·k·d²) and the pseudo-inverse of (d, k) by QR (4·d·k² and products of 2·d·k²). At the end its
leading triplets, counted as TRIPLET_PASSES products with a block of q + 4 vectors.

Counts are those of textbooks, so a rate (count ÷ measured seconds) is that of our code, whatever it saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from benchmarks.machine import wait_for
from torch import Tensor

from cntlora.linalg.low_rank import symmetric_product
from cntlora.linalg.parallel import full_precision
from cntlora.linalg.spectrum import spectrum
from cntlora.linalg.symmetric import held_numbers
from cntlora.methods.statistics import COUNTED

TRIPLET_PASSES = 20
"""Products with a thin block that finding leading triplets is counted as."""
ADDED = ("eva", "descent")
"""Methods that hold one triangle of the sum of X Xᵀ."""
PARTS = ("forward", "gram", "product64", "product32", "cholesky", "eigh", "inverse", "qr", "triplets")
Rates = Mapping[str, Sequence[tuple[int, float]]]
"""Part → (size, operations a second), sizes rising."""
Counts = dict[tuple[str, int], float]
"""(part, size of its matrices) → operations."""


@dataclass(frozen=True)
class Group:
    """One distinct input of d features, and the outputs k of the layers that read it."""

    d: int
    outputs: tuple[int, ...]


def add(counts: Counts, part: str, size: int, operations: float) -> None:
    """Add operations of a part at a size."""
    counts[part, size] = counts.get((part, size), 0.0) + operations


def data_pass(counts: Counts, method: str, group: Group, b: int, batches: int) -> None:
    """Add what all batches of b tokens cost at one group, beyond the forward pass."""
    d, n = group.d, min(group.d, b)
    dual = b <= d
    small = [k for k in group.outputs if k < d] if method == "shift" else []
    if method != "lora_ga" and (not dual or small or method in ADDED):
        add(counts, "gram", d, batches * d * d * b)
    if dual and method in ("cross", "self", "shift"):
        add(counts, "product64", n, batches * 2.0 * b * b * d)
    if dual and method in ("cross", "shift"):
        add(counts, "product64", n, batches * (2.0 * b * b * d + 2.0 * b * d * d))
    if method == "cross":
        add(counts, "cholesky", n, batches * n**3)
    elif method == "self":
        add(counts, "eigh", n, batches * 9.0 * n**3)
        if dual:
            add(counts, "product64", n, batches * 2.0 * b * b * d)
    elif method == "shift":
        add(counts, "inverse", n, batches * 2.0 * n**3)
        add(counts, "cholesky", n, batches * n**3 / 3)
        for k in small:
            add(counts, "qr", k, batches * 4.0 * d * k * k)
            add(counts, "product64", k, batches * (2.0 * k * d * d + 2.0 * d * k * k))


def factorisation(counts: Counts, method: str, group: Group, tokens: int, rank: int) -> None:
    """Add what one group's sites cost after the last batch, `tokens` being those of all batches."""
    d = group.d
    if method == "eva":
        add(counts, "triplets", d, TRIPLET_PASSES * 2.0 * d * d * (rank + 4))
        add(counts, "cholesky", d, d**3 / 3)
        if tokens < d <= COUNTED:
            add(counts, "eigh", d, 3.0 * d**3)
        return
    if method == "descent":
        add(counts, "cholesky", d, float(d**3))
    for k in group.outputs:
        if method in ("cross", "self", "descent"):
            add(counts, "product32", d, (4.0 if method == "descent" else 2.0) * k * d * d)
        elif method == "lora_ga":
            pass
        elif k == d:
            add(counts, "qr", d, 2.0 * d**3)
            add(counts, "inverse", d, 8.0 / 3.0 * d**3)
        elif k > d:
            add(counts, "qr", d, 6.0 * k * d * d)
            add(counts, "product64", d, 4.0 * k * d * d)
        add(counts, "triplets", min(k, d), TRIPLET_PASSES * 2.0 * k * d * (rank + 4))


def forward(counts: Counts, groups: Sequence[Group], tokens: int) -> None:
    """Add the forward pass of the layers, 2 operations a weight and token (attention itself is left out)."""
    for group in groups:
        add(counts, "forward", group.d, 2.0 * tokens * group.d * sum(group.outputs))


def initialisation(method: str, groups: Sequence[Group], b: int, batches: int, rank: int) -> Counts:
    """Operations of all parts beyond the forward pass, for `batches` of b tokens."""
    counts: Counts = {}
    for _ in range({"lora_ga": 2, "descent": 3}.get(method, 0)):
        forward(counts, groups, b * batches)
    for group in groups:
        data_pass(counts, method, group, b, batches)
        factorisation(counts, method, group, b * batches, rank)
    return counts


def seconds(counts: Counts, rates: Rates) -> dict[str, float]:
    """Part → seconds at these rates."""
    found: dict[str, float] = {}
    for (part, size), operations in counts.items():
        found[part] = found.get(part, 0.0) + operations / rate_at(rates[part], size)
    return found


def rate_at(points: Sequence[tuple[int, float]], size: int) -> float:
    """Rate at a size: between measured sizes on the line in log-log, beyond them that of the nearest."""
    sizes, rates = zip(*points, strict=True)
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates))))


def statistics_bytes(method: str, groups: Sequence[Group], b: int, width: int) -> float:
    """Bytes of what is held over the batches: a d×d sum a group, and the rows or d×d moments of the batch at hand.

    Of eva and descent one triangle of X Xᵀ a group, whose batches are added one at a time; of descent and lora_ga the
    gradients.

    Args:
        width: bytes a number of the moments, 8 for float32 models and 4 for those in half precision. So are the sums of
            shift; all others are float32 for both.
    """
    if method not in ("cross", "self", "shift", "eva", "descent", "lora_ga"):
        raise ValueError(f"method: expected cross, self, shift, eva, descent or lora_ga, got {method!r}")
    if method in (*ADDED, "lora_ga"):
        sums = sum(4 * held_numbers(group.d) for group in groups) if method in ADDED else 0
        gradients = sum(4 * k * group.d for group in groups for k in group.outputs) if method != "eva" else 0
        return float(sums + gradients)
    held = sum(group.d**2 * (4 if method in ("cross", "self") else width) for group in groups)
    if method == "shift":  # sites with k < d have (k, d) sums of their own
        held += sum(k * group.d * width for group in groups for k in group.outputs if k < group.d)
    # rows in the dtype of the model, half as wide as its moments
    batch = sum(min(b, group.d) * group.d * (width // 2 if b <= group.d else width) for group in groups)
    return float(held + batch)


# --- rates of this machine ------------------------------------------------------------------------------------


def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    drawn = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device)
    return drawn.to(dtype)


def _jobs(n: int, device: torch.device, rank: int = 16) -> dict[str, tuple[float, Callable[[], object]]]:
    """Part → its count at size n, and a job that does it: as for a float32 model on a CPU, a bfloat16 one on a GPU."""
    half = device.type == "cuda"
    model, moments = (torch.bfloat16, torch.float32) if half else (torch.float32, torch.float64)
    single, double = _matrix(n, torch.float32, device), _matrix(n, moments, device)
    weight = single.to(model)
    positive = double @ double.mT + n * torch.eye(n, dtype=moments, device=device)
    return {
        "forward": (2.0 * n**3, lambda: weight @ weight.mT),
        "gram": (float(n**3), lambda: symmetric_product(double)),
        "product64": (2.0 * n**3, lambda: double @ double.mT),
        "product32": (2.0 * n**3, lambda: single @ single),
        "cholesky": (float(n**3), lambda: torch.cholesky_inverse(torch.linalg.cholesky(positive))),
        "eigh": (9.0 * n**3, lambda: torch.linalg.eigh(positive)),
        "inverse": (2.0 * n**3, lambda: torch.linalg.inv(positive)),
        "qr": (float(n**3), lambda: torch.linalg.qr(double[:, : n // 2])),
        "triplets": (TRIPLET_PASSES * 2.0 * n * n * (rank + 4), lambda: spectrum(single, rank)),
    }


def measured_rates(
    sizes: Sequence[int], repeats: int, limit: float, device: torch.device | None = None
) -> dict[str, list[tuple[int, float]]]:
    """Operations a second of every part on this machine; a part stops growing once a run takes more than `limit` s."""
    device = device or torch.device("cpu")
    found: dict[str, list[tuple[int, float]]] = {part: [] for part in PARTS}
    slow: set[str] = set()
    for n in sizes:
        for part, (operations, job) in _jobs(n, device).items():
            if part in slow:
                continue
            times = []
            for _ in range(repeats + 1):
                times.append(_seconds(job, device))
                if times[-1] > limit:
                    slow.add(part)
                    break
            found[part].append((n, operations / median(times[1:] or times)))
    return found


def _seconds(job: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    with full_precision(device):
        job()
    wait_for(device)
    return time.perf_counter() - start

"""Predictions for whole models from parts: on this processor and on a GPU from their measured rates.

Where no GPU has been measured (`scaling.py --rates`), an H100's rates are ASSUMED: the peaks of NVIDIA's data sheet
(H100 SXM: float32 and float64 on tensor cores 67 TFLOP/s each, bfloat16 989 TFLOP/s dense) times an efficiency, part by
part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.parts import PARTS, Group, Rates, forward, initialisation, seconds, statistics_bytes
from benchmarks.standin import METHODS

H100_ASSUMED: Mapping[str, tuple[float, float, str]] = {
    "forward": (989e12, 0.40, "bfloat16 matrix products of a model's forward pass"),
    "gram": (67e12, 0.60, "large matrix products in float32 without TF32"),
    "product64": (67e12, 0.60, "large matrix products in float32 without TF32"),
    "product32": (67e12, 0.60, "large matrix products in float32 without TF32"),
    "cholesky": (67e12, 0.20, "blocked factorisation, mostly products"),
    "inverse": (67e12, 0.20, "blocked factorisation, mostly products"),
    "qr": (67e12, 0.10, "Householder QR, half of it thin products"),
    "eigh": (67e12, 0.01, "reduction to tridiagonal form, bound by memory"),
    "triplets": (67e12, 0.05, "products with thin blocks, bound by memory"),
}
"""Part → peak (FLOP/s), assumed efficiency, why."""


@dataclass(frozen=True)
class Shape:
    """A Llama with LoRA on all linear layers: hidden size, MLP size, rows of k and v, number of layers."""

    name: str
    hidden: int
    inner: int
    keys: int
    layers: int

    def groups(self) -> list[Group]:
        """The distinct inputs: of q, k, v; of o; of gate and up; of down; times the layers."""
        d, m, kv = self.hidden, self.inner, self.keys
        return [Group(d, (d, kv, kv)), Group(d, (d,)), Group(d, (m, m)), Group(m, (d,))] * self.layers


SHAPES = (Shape("Llama-7B", 4096, 11008, 4096, 32), Shape("Llama-70B", 8192, 28672, 1024, 80))
BLOCK = Shape("llama-7b-block", 4096, 11008, 4096, 1)
BATCHES, TOKENS, RANK = 8, 4 * 512, 16
OF_GRADIENTS = ("descent", "lora_ga")
"""Methods that are predicted, and were not measured on stacks of layers."""


def h100_rates() -> Rates:
    """The assumed rates, the same at every size."""
    return {part: [(1, peak * efficiency)] for part, (peak, efficiency, _) in H100_ASSUMED.items()}


def predicted(groups: Sequence[Group], method: str, rates: Rates, b: int, batches: int, devices: int) -> dict[str, Any]:
    """Seconds of the forward pass and beyond it, and bytes of statistics.

    Args:
        devices: each reads its share of the batches, and factors its share of the sites; what they send one another
            is left out.
    """
    parts = seconds(initialisation(method, groups, b, batches, RANK), rates)
    passes: dict[tuple[str, int], float] = {}
    forward(passes, groups, b * batches)
    forward_seconds = sum(seconds(passes, rates).values()) / devices
    extra = sum(parts.values()) / devices
    return {
        "forward_seconds": forward_seconds,
        "extra_seconds": extra,
        "ratio": (forward_seconds + extra) / forward_seconds,
        "parts": {part: value / devices for part, value in sorted(parts.items(), key=lambda item: -item[1])},
    }


def predictions(cpu: Rates, gpu: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every shape and method on this processor, one GPU and eight.

    Args:
        gpu: the record of rates that were measured on a GPU; None for the assumed ones of an H100.
    """
    rows = []
    rates, basis = (h100_rates(), "assumed rates") if gpu is None else (gpu["rates"], "measured rates")
    name = "H100" if gpu is None else gpu["machine"]["gpu"]
    machines = (("this processor", cpu, 1, 8, "measured rates"),
                (f"1 {name}", rates, 1, 4, basis),
                (f"8 {name}", rates, 8, 4, basis))  # fmt: skip
    for shape in SHAPES:
        for machine, rates, devices, width, basis in machines:
            for method in (*METHODS, *OF_GRADIENTS):
                held = statistics_bytes(method, shape.groups(), TOKENS, width)
                rows.append(
                    {"shape": shape.name, "machine": machine, "basis": basis, "method": method}
                    | predicted(shape.groups(), method, rates, TOKENS, BATCHES, devices)
                    | {"statistics_gib": held / 2**30}
                )
    return rows


def against_block(cpu: Rates, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the parts foretell for the workload llama-7b-block, beside what `init_cost.py` measured for it.

    Args:
        record: that of the workload, or None if it has not been measured.
    """
    found: dict[str, Any] = {}
    for method in METHODS:
        foretold = predicted(BLOCK.groups(), method, cpu, 512, 2, 1)
        row = (record or {}).get("rows", {}).get(method, {})
        floor = (record or {}).get("rows", {}).get("forward pass", {})
        measured = row["seconds"] - floor["seconds"] if "seconds" in row and "seconds" in floor else None
        found[method] = {
            "predicted_extra_seconds": foretold["extra_seconds"],
            "measured_extra_seconds": measured,
            "parts": foretold["parts"],
        }
    return found


def against_points(cpu: Rates, sweeps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for every size of the stand-in that was measured."""
    rows = []
    for point in (point for sweep in sweeps for point in sweep["points"]):
        groups = [Group(point["d"], (point["d"],))] * point["layers"]
        for method in (m for m in METHODS if m in point["seconds"]):
            counts = initialisation(method, groups, point["tokens"], point["batches"], point["rank"])
            foretold, measured = sum(seconds(counts, cpu).values()), point["seconds"][method]
            size = {key: point[key] for key in ("d", "tokens", "batches", "layers")}
            rows.append({**size, "method": method, "predicted": foretold, "measured": measured})
    return rows


def assumptions() -> list[dict[str, Any]]:
    """The table of assumed rates, for the record."""
    return [
        {"part": part, "peak": H100_ASSUMED[part][0], "efficiency": H100_ASSUMED[part][1], "why": H100_ASSUMED[part][2]}
        for part in PARTS
    ]

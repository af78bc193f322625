"""The record of scaling.py → Markdown. Pure: needs neither torch nor cntlora."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.tables import machine_line, number, table


def scaling_markdown(record: Mapping[str, Any]) -> str:
    """All tables: exponents, seconds, rates, the check of the parts, predictions and what they assume."""
    parts = [
        f"Measured on {machine_line(record['machine'])} Seconds beyond the forward pass.",
        *(_sweep(sweep) for sweep in record["sweeps"]),
        rates_markdown(record["rates"]),
        *_gpu(record.get("gpu")),
        _checks(record),
        _predictions(record["predictions"]),
        *([_assumptions(record["assumptions"])] if record["assumptions"] else []),
    ]
    return "\n\n".join(parts)


def _sweep(sweep: Mapping[str, Any]) -> str:
    what, points, laws = sweep["what"], sweep["points"], sweep["laws"]
    base = ", ".join(f"{key} {value}" for key, value in sweep["base"].items() if key != what)
    head = ["", *(f"{what} {point[what]}" for point in points), "exponent", "residual"]
    rows = []
    for name, law in laws.items():
        cells = [number(p["seconds"][name]) if name in p["seconds"] else "–" for p in points]
        fitted = [f"{law['exponent']:.2f}", f"{law['residual']:.2f}"] if law else ["–", "–"]
        rows.append([name, *cells, *fitted])
    notes = [f"- {name} left out {why}." for name, why in sweep["left_out"].items()]
    title = f"Against **{what}** ({base}); exponent by least squares in log-log, residual in factors of e:"
    return "\n\n".join([title, table(head, rows), *(["\n".join(notes)] if notes else [])])


def rates_markdown(rates: Mapping[str, Any]) -> str:
    """The rates of the parts by size."""
    sizes = sorted({size for points in rates.values() for size, _ in points})
    rows = []
    for part, points in rates.items():
        known = dict(points)
        rows.append([part, *(number(known[n] / 1e9) if n in known else "–" for n in sizes)])
    title = "Rates of the parts, measured, 10⁹ operations (textbook counts) a second, by size of the matrix:"
    return f"{title}\n\n{table(['part', *map(str, sizes)], rows)}"


def _gpu(record: Mapping[str, Any] | None) -> list[str]:
    """The rates of a GPU, for a model in bfloat16 whose moments are float32; none where none was measured."""
    if record is None:
        return []
    return [
        f"The same on a GPU, with moments in float32. {machine_line(record['machine'])}",
        rates_markdown(record["rates"]),
    ]


def _checks(record: Mapping[str, Any]) -> str:
    """Predicted ÷ measured: how far the sum of the parts may be trusted."""
    by_method: dict[str, list[float]] = {}
    for row in record["parts_against_measured"]:
        if row["measured"] > 0:
            by_method.setdefault(row["method"], []).append(row["predicted"] / row["measured"])
    rows = []
    for method, block in record["block_against_measured"].items():
        ratios = sorted(by_method.get(method, []))
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})" if ratios else "–"
        measured = block["measured_extra_seconds"]
        cells = [number(block["predicted_extra_seconds"]), "not measured" if measured is None else number(measured)]
        rows.append([method, spread, *cells])
    head = [
        "method",
        "stack of layers: predicted ÷ measured (median, range)",
        "llama-7b-block, predicted, s",
        "measured, s",
    ]
    return f"Check of the parts on this processor, seconds beyond the forward pass:\n\n{table(head, rows)}"


def _predictions(rows: list[Mapping[str, Any]]) -> str:
    head = ["shape", "machine", "method", "forward, s", "beyond it, s", "× forward", "largest part", "statistics, GiB"]
    cells = [
        [
            row["shape"], f"{row['machine']} ({row['basis']})", row["method"], number(row["forward_seconds"]),
            number(row["extra_seconds"]), number(row["ratio"]), next(iter(row["parts"])),
            number(row["statistics_gib"]),
        ]
        for row in rows
    ]  # fmt: skip
    title = (
        "**Predicted, not measured**: LoRA on all linear layers, rank 16, 8 batches of 4 × 512 tokens. Statistics are "
        "those of the whole model, held on every device."
    )
    return f"{title}\n\n{table(head, cells)}"


def _assumptions(rows: list[Mapping[str, Any]]) -> str:
    cells = [[row["part"], f"{row['peak'] / 1e12:g}", f"{row['efficiency']:.0%}", row["why"]] for row in rows]
    head = ["part", "published peak, TFLOP/s", "assumed efficiency", "because"]
    return f"Assumed rates of one H100 (SXM); none of them was measured:\n\n{table(head, cells)}"

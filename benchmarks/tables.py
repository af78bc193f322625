"""Records of the benchmarks → Markdown. Pure: needs neither torch nor cntlora."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

VERSIONS = (("PyTorch", "torch"), ("PEFT", "peft"), ("cntlora", "cntlora"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine_line(machine: dict[str, Any]) -> str:
    """One line that says where figures are from."""
    versions = ", ".join(f"{name} {machine[key]}" for name, key in VERSIONS)
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB"
    hardware = f"{machine['gpu']}; {hardware}" if "gpu" in machine else hardware
    return f"{hardware}, {machine['threads']} threads; {versions}."


def number(value: float) -> str:
    """Two or three figures."""
    if abs(value) < 0.1:
        return f"{value:.2g}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(record: dict[str, Any]) -> str:
    """The cost table of one workload; rows that were skipped or failed have their reason."""
    notes, rows = [], []
    for name, row in record["rows"].items():
        if "seconds" not in row:
            word = "skipped" if "skipped" in row else "failed"
            rows.append([name, word, "", "", ""])
            notes.append(f"- {name} {word}: {row[word]}.")
            continue
        runs = f"{row['runs']}{' (cold)' if row['cold'] else ''}"
        ratios = f"{number(row['ratio'])} ({number(row['ratios'][0])}–{number(row['ratios'][-1])})"
        peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
        if "peak_failed" in row:
            notes.append(f"- {name}: peak memory failed: {row['peak_failed']}.")
        rows.append([name, number(row["seconds"]), ratios, runs, peak])
    head = ["", "seconds", "× forward pass (median, range)", "runs", "peak memory above the model, MiB"]
    parts = [f"**{record['workload']}**: {record['about']}. {machine_line(record['machine'])}", table(head, rows)]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def overview(records: Sequence[dict[str, Any]]) -> str:
    """Ratios to the forward pass, a column a workload."""
    names = list(dict.fromkeys(name for record in records for name in record["rows"]))
    rows = []
    for name in names:
        cells = [record["rows"].get(name, {}) for record in records]
        rows.append([name, *(number(cell["ratio"]) if "ratio" in cell else "–" for cell in cells)])
    return table(["× forward pass", *(record["workload"] for record in records)], rows)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of `init_cost.py` in a folder, by name; other benchmarks' records there are left out.

    Raises:
        ValueError: if there is none.
    """
    loaded = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records = [record for record in loaded if "workload" in record]
    if not records:
        raise ValueError(f"{folder}: expected records of init_cost.py, found none; run it without --table first")
    return records


def accuracy_table(record: dict[str, Any]) -> str:
    """Worst and median errors by model and method."""
    errors = [f"{what}, {which}" for what in ("distance", "excess") for which in ("worst", "median")]
    head = ["model", "method", "sites", *errors, "margin"]
    rows = [
        [
            model, method, str(row["sites"]),
            *(f"{row[key]:.1e}" for key in ("distance_worst", "distance_median", "excess_worst", "excess_median")),
            f"{row['worst_margin']:.1e}",
        ]
        for model, methods in record["summary"].items()
        for method, row in methods.items()
    ]  # fmt: skip
    words = (
        "distance: ‖s·B·A − [ΔW]_r‖_F / ‖ΔW‖_F; excess: ‖ΔW − s·B·A‖_F / ‖ΔW‖_F above the tail of the exact spectrum; "
        "margin: at the site of the worst distance, the smallest eigenvalue of G that † keeps over the threshold "
        "max(d, b)·eps·λ_max (near 1 the estimate is ill-posed; shift mode does not invert G). "
    )
    return f"{words}{machine_line(record['machine'])}\n\n{table(head, rows)}"


def starts_table(task: dict[str, Any]) -> str:
    """The starts of one task, see benchmarks/starts.py."""
    rows = [
        [
            start["label"],
            number(start["size"]) if start["size"] else "0",
            f"{start['loss_after'] - start['loss_before']:+.3f}".replace("-", "−"),
            "–" if start["curvature"] is None else number(start["curvature"]).replace("-", "−"),
        ]
        for start in task["starts"].values()
    ]
    return table(["start", "‖s·B·A‖/‖W‖", "Δ loss", "curvature"], rows)


def inputs_table(tasks: dict[str, Any]) -> str:
    """Return what the inputs of the tasks are like, medians over sites."""
    head = ["task", "features", "tokens a batch", "rank of G", "condition of G", "above 10⁻³ of the largest",
            "effective rank", "of the sum over batches"]  # fmt: skip
    keys = ("features", "tokens", "rank", "condition", "kept", "effective_rank", "effective_rank_of_sum")
    rows = []
    for task in tasks.values():
        facts = task["inputs"]
        cells = [f"{facts[key]:.0e}" if key == "condition" else number(facts[key]) for key in keys]
        rows.append([task["title"], *cells])
    return table(head, rows)


def beside_peft(records: Sequence[dict[str, Any]]) -> str:
    """Seconds, ours / PEFT's, a column a workload; bold where ours is not slower.

    In parentheses the ratio to what a method cannot avoid: the forward and backward pass for those that read gradients,
    else the forward pass; none for those that read no data.
    """
    names = [name for name in dict.fromkeys(n for record in records for n in record["rows"]) if "PEFT" not in name]
    lines = []
    for name in names:
        label = f"`{name}` / {RIVALS[name]}" if name in RIVALS else name
        lines.append([label, *(_seconds_cell(record["rows"], name) for record in records)])
    return table(["", *(record["workload"] for record in records)], lines)


def _seconds_cell(rows: dict[str, Any], name: str) -> str:
    row, rival = rows.get(name, {}), rows.get(RIVALS.get(name, ""), {})
    if "seconds" not in row:
        return "–"
    reads_none = name in ("forward pass", "pissa", "olora")
    ratio = row["ratio_backward"] if "ratio_backward" in row and name in OF_GRADIENTS else row["ratio"]
    ours = number(row["seconds"]) if reads_none else f"{number(row['seconds'])} ({ratio:.2f})"
    if "seconds" not in rival:
        return ours
    bold = f"**{ours}**" if row["seconds"] <= rival["seconds"] else ours
    return f"{bold} / {number(rival['seconds'])}"


PEAKS = ("forward pass", "forward and backward pass", "whitened", "descent", "lora_ga", "eva", "corda", "pissa",
         "olora", "self", "cross", "shift")  # fmt: skip
"""Rows of the table of peaks."""
OF_GRADIENTS = ("whitened", "descent", "lora_ga", "lora_one")
"""Rows whose floor is the forward and backward pass."""
RIVALS = {
    "whitened": "PEFT lora_ga",
    "descent": "PEFT lora_ga",
    **{name: f"PEFT {name}" for name in ("lora_ga", "eva", "corda", "pissa", "olora")},
}
"""Row of ours → that of PEFT's which it stands beside: whitened and descent read what LoRA-GA reads."""


def peaks_table(record: dict[str, Any]) -> str:
    """Peak memory above the model in MiB, ours / PEFT's, a column a workload; bold where ours is not above."""
    lines = []
    for name in PEAKS:
        label = f"`{name}` / {RIVALS[name]}" if name in RIVALS else name
        lines.append([label, *(_peaks_cell(part["rows"], name) for part in record.values())])
    return table(["", *record], lines)


def _peaks_cell(rows: dict[str, Any], name: str) -> str:
    ours = rows.get(name, {}).get("peak_mib")
    if ours is None:
        return "–"
    theirs = rows.get(RIVALS.get(name, ""), {}).get("peak_mib")
    if theirs is None:
        return _mib(ours)
    one, other = _mib(ours), _mib(theirs)
    if one == other and ours > theirs:
        one, other = f"{ours:.1f}", f"{theirs:.1f}"
    return f"**{one}** / {other}" if ours <= theirs else f"{one} / {other}"


def _mib(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"

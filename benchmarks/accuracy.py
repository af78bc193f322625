"""Distance of the factors from the exact ones, on real layers: cross, self and shift, † as NumPy has it.

    python benchmarks/accuracy.py    # some layers of minilm, dinov2, smollm2; writes benchmarks/records/accuracy.json

The plan is that of `cntlora.compute_plan` with base="keep" and strength 1, so that scaling·B·A stands for [ΔW]_r. The
exact ΔW is computed in float64 by benchmarks/exact.py from the inputs that plain hooks catch. In bfloat16 these are the
same inputs and weights in bfloat16, and † drops what is under 1e-2, which is above their rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.exact import caught_inputs, delta, errors, margin
from benchmarks.machine import RESULTS, describe
from benchmarks.tables import accuracy_table
from benchmarks.workloads import WORKLOADS, Batch, Workload, with_lora
from torch import Tensor, nn

import cntlora
from cntlora.atomic import write_atomically

DTYPES = {"float32": (torch.float32, 0.0), "bfloat16": (torch.bfloat16, 1e-2)}
"""Name → dtype of the model, and rtol."""
METHODS = ("cross", "self", "shift")
LAYERS = {"minilm": (0, 3, 5), "dinov2": (0, 6, 11), "smollm2": (0, 15, 29), "tiny": (0, 1)}
"""First, middle and last."""


def some_layers(workload: Workload, layers: tuple[int, ...]) -> nn.Module:
    """The workload's model with LoRA in these layers only."""
    lora = {**workload.lora, "layers_to_transform": list(layers)}
    return with_lora(Workload(**{**vars(workload), "lora": lora}), workload.build())


def inputs_of(model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Site → X (d, b) of each batch, float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch in batches:
        with torch.no_grad(), caught_inputs(layers, batch.get("attention_mask")) as inputs:
            model(**batch)
        for name in layers:
            found[name].append(inputs[name])
    return found


def site_errors(
    layer: Any, site: cntlora.SitePlan, method: str, batches: list[Tensor], rtol: float = 0.0
) -> dict[str, float]:
    """The two errors of a site's factors, and the singular values at the cut, relative to the largest."""
    D = delta(method, layer.base_layer.weight.detach().double(), batches, rtol)
    product = site.scaling * site.B.double() @ site.A.double()
    distance, excess = errors(D, product, site.rank)
    s = torch.linalg.svdvals(D)
    gap = float((s[site.rank - 1] - s[site.rank]) / s[0])
    return {"distance": distance, "excess": excess, "gap": gap}


def measure(name: str, kind: str = "float32") -> dict[str, dict[str, dict[str, float]]]:
    """Method → site → errors, on one workload in one of `DTYPES`."""
    workload, (dtype, rtol) = WORKLOADS[name], DTYPES[kind]
    model = some_layers(workload, LAYERS[name]).to(dtype)
    batches = [{key: x.to(dtype) if x.is_floating_point() else x for key, x in b.items()} for b in workload.batches()]
    for key, factor in model.named_parameters():
        if "lora_" in key:
            factor.data = factor.data.float()
    table: dict[str, dict[str, dict[str, float]]] = {}
    inputs: dict[str, list[Tensor]] = {}
    margins: dict[str, float] = {}
    for method in METHODS:
        config = cntlora.InitConfig.from_dict({"method": method, "base": "keep", "strength": 1.0, "rtol": rtol})
        plan = cntlora.compute_plan(model, batches, config, progress=False)
        layers: dict[str, nn.Module] = {n: model.base_model.model.get_submodule(n) for n in plan.sites}  # type: ignore[union-attr,operator]
        inputs = inputs or inputs_of(model, layers, batches)
        margins = margins or {n: margin(inputs[n]) for n in inputs}
        found = {n: site_errors(layers[n], site, method, inputs[n], rtol) for n, site in plan.sites.items()}
        table[method] = {n: values | {"margin": margins[n]} for n, values in found.items()}
    return table


def summary(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Method → worst and median of each error over sites, and the worst site."""
    found: dict[str, dict[str, Any]] = {}
    for method, sites in table.items():
        row: dict[str, Any] = {"sites": len(sites)}
        for what in ("distance", "excess"):
            values = [site[what] for site in sites.values()]
            row |= {f"{what}_worst": max(values), f"{what}_median": median(values)}
        row["worst_site"] = max(sites, key=lambda name: sites[name]["distance"])
        row["worst_margin"] = sites[row["worst_site"]]["margin"]
        found[method] = row
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="minilm,dinov2,smollm2", help=f"some of {', '.join(LAYERS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"some of {', '.join(DTYPES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of accuracy.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = options.workloads.split(",")
    for name in names:
        if name not in LAYERS:
            raise SystemExit(f"--workloads: {name!r} is not known; expected some of: {', '.join(LAYERS)}")
    tables = {
        name if kind == "float32" else f"{name}, {kind}": measure(name, kind)
        for kind in options.dtypes.split(",")
        for name in names
    }
    record = {
        "machine": describe(options.threads),
        "layers": {name: list(LAYERS[name]) for name in names},
        "rtol": {kind: rtol for kind, (_, rtol) in DTYPES.items()},
        "summary": {name: summary(table) for name, table in tables.items()},
        "sites": tables,
    }
    print(accuracy_table(record))
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "accuracy.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()

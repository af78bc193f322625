"""Share of rounding in the inputs of a task: its model in float32, bfloat16 and under autocast against float64.

    python benchmarks/rounding.py studies/tweets.toml studies/vision_emoji.toml studies/language.toml

The noise along a direction p of X (d, b) is ‖pᵀE‖, with E the difference to the inputs in float64, and p the left
singular vectors of X. Nothing is trained or written.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.exact import caught_inputs
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cntlora.lab.experiments.adapting import lora_options
from cntlora.lab.experiments.runs import Run
from cntlora.lab.experiments.settings import Experiment, load_experiment
from cntlora.lab.experiments.tasks import make_task
from cntlora.lab.recipes.scoring import modes
from cntlora.linalg.moments import accumulation_dtype
from cntlora.linalg.pseudo_inverse import default_rtol, rounding_noise
from cntlora.model.sites import find_sites

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.bfloat16}
HEADS = (
    "task", "model in", "sites", "noise, of the entries", "noise, of the sums", "least σ/σ_max kept", "dropped",
    "of them σ < 10 × noise", "kept with σ < 3 × noise", "dropped by the sums' tolerance",
)  # fmt: skip


def noise_facts(X: Tensor, exact: Tensor, precision: torch.dtype, came_in: torch.dtype) -> dict[str, float]:
    """Facts of one site, X and `exact` (d, b) in float64.

    Returns:
        "entries" and "sums": the largest noise along a direction of the smaller half, in units of
        u·(1/√d + 1/√b)·‖X‖_F and of u·‖X‖_F; how many directions are dropped, and how near they are to the noise.
    """
    (d, b), u = X.shape, torch.finfo(precision).eps / 2
    P, s, _ = torch.linalg.svd(X, full_matrices=False)
    noise, size = (P.mT @ (X - exact)).norm(dim=1), s.norm()
    small = noise[len(s) // 2 :].max() / (u * size)
    by_sums = s**2 <= default_rtol(d, b, accumulation_dtype(came_in)) * s[0] ** 2
    dropped = by_sums | (s <= rounding_noise(precision, d, b) * size)
    return {
        "entries": float(small / (d**-0.5 + b**-0.5)),
        "sums": float(small),
        "least": float(s[~dropped].min() / s[0]),
        "dropped": float(dropped.sum()),
        "near": float((dropped & (s < 10 * noise)).sum()),
        "left": float((~dropped & (s < 3 * noise)).sum()),
        "by_sums": float(by_sums.sum()),
    }


def task_facts(experiment: Experiment, seed: int) -> dict[str, list[dict[str, float]]]:
    """Facts of all sites of a task's model on its first batch, for each kind of precision."""
    task = make_task(experiment.task)
    options = lora_options(Run(experiment, "lora", 1e-3, seed), task)
    model = get_peft_model(task.build_model(seed), LoraConfig(**options))  # type: ignore[arg-type]
    batch = next(iter(task.init_batches(seed)))
    exact, _ = _inputs(copy.deepcopy(model).double(), batch, torch.float64, False)
    found = {}
    for kind, precision in KINDS.items():
        cast = copy.deepcopy(model).to(torch.bfloat16) if kind == "bfloat16" else model
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        inputs, dtypes = _inputs(cast, batch, dtype, kind == "autocast")
        found[kind] = [noise_facts(inputs[name], exact[name], precision, dtypes[name]) for name in inputs]
    return found


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype, autocast: bool
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """X (d, b) of every site, and the dtype that it came in."""
    layers = {site.name: site.layer for site in find_sites(model)[0]}
    mask = batch.get("attention_mask") if "input_ids" in batch else None
    dtypes: dict[str, torch.dtype] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: dtypes.__setitem__(name, args[0].dtype))
        for name, layer in layers.items()
    ]
    moved = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    with modes(model, training=False), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with caught_inputs(layers, mask) as inputs:
            model(**moved)
    for handle in handles:
        handle.remove()
    return inputs, dtypes


def row(task: str, kind: str, facts: list[dict[str, float]]) -> tuple[str, ...]:
    """One line of the table: the worst of all sites, and sums over them."""
    total = {key: sum(fact[key] for fact in facts) for key in facts[0]}
    worst = {key: max(fact[key] for fact in facts) for key in facts[0]}
    least = min(fact["least"] for fact in facts)
    counts = [f"{total[key]:.0f}" for key in ("dropped", "near", "left", "by_sums")]
    return (task, kind, str(len(facts)), f"{worst['entries']:.1f}", f"{worst['sums']:.2f}", f"{least:.1e}", *counts)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="experiment files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|")
    for path in options.experiments:
        for kind, facts in task_facts(load_experiment(path), options.seed).items():
            print("| " + " | ".join(row(path.stem, kind, facts)) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Differences of starts: the inputs' G of a task, and the size, the loss and the curvature of every start on it.

    python benchmarks/starts.py studies/tweets_modes.toml studies/vision_emoji.toml
    python benchmarks/starts.py --methods lora,self,descent studies/language.toml

Nothing is trained. Writes benchmarks/records/starts.json, with what was there of other experiments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from benchmarks.exact import EPS, caught_inputs
from benchmarks.machine import RESULTS, describe
from benchmarks.tables import inputs_table, starts_table
from peft import LoraConfig, get_peft_model
from torch import Tensor

from cntlora import start_curvature
from cntlora.atomic import write_atomically
from cntlora.lab.experiments.adapting import adapt, lora_options
from cntlora.lab.experiments.arms import parse_arm
from cntlora.lab.experiments.runs import Run
from cntlora.lab.experiments.settings import Experiment, load_experiment
from cntlora.lab.experiments.tasks import make_task
from cntlora.lab.recipes.scoring import modes
from cntlora.model.sites import find_sites

RTOL = 1e-3
"""The tolerance of † that docs/choosing.md recommends for cross and shift."""


def spectrum_facts(inputs: list[Tensor]) -> dict[str, float]:
    """Facts of one site: what the eigenvalues of G = X Xᵀ of the first batch, and of the sum over batches, are like."""
    X = inputs[0]
    one = torch.linalg.svdvals(X).square()
    kept = one[one > max(X.shape) * EPS * one[0]]
    whole = torch.linalg.svdvals(torch.cat(inputs, dim=1)).square()
    return {
        "features": float(X.shape[0]),
        "tokens": float(X.shape[1]),
        "rank": float(len(kept)),
        "condition": float(kept[0] / kept[-1]),
        "kept": float((one > RTOL * one[0]).sum()),
        "effective_rank": float(one.sum().square() / one.square().sum()),
        "effective_rank_of_sum": float(whole.sum().square() / whole.square().sum()),
    }


def input_facts(experiment: Experiment, seed: int) -> dict[str, float]:
    """Medians over the sites of `spectrum_facts`."""
    task = make_task(experiment.task)
    run = Run(experiment, "lora", 1e-3, seed)
    model = get_peft_model(task.build_model(seed), LoraConfig(**lora_options(run, task)))  # type: ignore[arg-type]
    layers = {site.name: site.layer for site in find_sites(model)[0]}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with modes(model, training=False), torch.no_grad():
        for batch in itertools.islice(task.init_batches(seed), experiment.num_batches):
            mask = batch.get("attention_mask") if "input_ids" in batch else None
            with caught_inputs(layers, mask) as inputs:
                model(**batch)
            for name in layers:
                found[name].append(inputs[name])
    facts = [spectrum_facts(inputs) for inputs in found.values()]
    return {key: median(fact[key] for fact in facts) for key in facts[0]}


def start_facts(experiment: Experiment, method: str, seed: int, iterations: int) -> dict[str, Any]:
    """Facts of one start: ‖s·B·A‖/‖W‖ (median over sites), the change of the first batch's loss, and the curvature."""
    task = make_task(experiment.task)
    run, model = Run(experiment, method, 1e-3, seed), task.build_model(seed)
    batch = next(iter(task.train_batches(seed)))
    before = _loss(model, batch)
    adapted = adapt(run, task, model, task.init_batches(seed), 1)
    sites = [site for site in adapted.plan.sites.values() if site.weight_norm] if adapted.plan else []
    with modes(adapted.model, training=False):
        curvature = start_curvature(adapted.model, batch, iterations=iterations) if iterations else None
    return {
        "label": run.arm.label,
        "size": median(site.start_norm / site.weight_norm for site in sites) if sites else 0.0,
        "loss_before": before,
        "loss_after": _loss(adapted.scored, batch),
        "curvature": curvature,
    }


def _loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> float:
    with modes(model, training=False), torch.no_grad():
        return float(model(**batch).loss)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="experiment files, whose tasks train without noise")
    parser.add_argument("--methods", default="", help="comma-separated; default: the file's")
    parser.add_argument("--iterations", type=int, default=30, help="for the curvature; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of starts.json")
    options = parser.parse_args(arguments)
    path = options.out / "starts.json"
    tasks = json.loads(path.read_text())["tasks"] if path.exists() else {}
    try:
        experiments = [load_experiment(file) for file in options.experiments]
        named = [parse_arm(name).name for name in options.methods.split(",") if name]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    for experiment in experiments:
        methods = named or experiment.sweep.methods
        starts = {method: start_facts(experiment, method, options.seed, options.iterations) for method in methods}
        inputs = input_facts(experiment, options.seed)
        tasks[experiment.name] = {"title": experiment.title, "inputs": inputs, "starts": starts}
        print(starts_table(tasks[experiment.name]), end="\n\n")
    print(inputs_table(tasks))
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe(options.threads), "seed": options.seed, "rtol": RTOL, "tasks": tasks}
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False).encode())


if __name__ == "__main__":
    main()

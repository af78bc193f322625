"""The learning rates that `propose_learning_rate` gives for the starts of the studies, beside the swept ones.

    python benchmarks/proposed_rates.py                        # six tasks, three starts each: 15 minutes
    python benchmarks/proposed_rates.py tweets --methods lora  # one of them

Nothing is trained. Writes benchmarks/records/proposed_rates.json, with what was there of other tasks and methods.
benchmarks/rates.py compares the rates with the swept ones.
"""

from __future__ import annotations

import argparse
import itertools
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
from benchmarks.machine import describe
from benchmarks.rates import DECIDED, FITTED, PROPOSED

from cntlora.analysis.learning_rate import propose_learning_rate
from cntlora.atomic import write_atomically
from cntlora.lab.experiments.adapting import adapt
from cntlora.lab.experiments.runs import Run
from cntlora.lab.experiments.settings import Experiment, load_experiment
from cntlora.lab.experiments.tasks import make_task

ROOT = Path(__file__).parents[1]
METHODS = ("lora", "eva", "descent")


def proposal(experiment: Experiment, method: str, seed: int = 0) -> dict[str, Any]:
    """The rate that is proposed for a start of a study, from the batches that its initialisation reads."""
    task, run = make_task(experiment.task), Run(experiment, method, 1e-3, seed)
    steps = experiment.train.steps or 0
    model = adapt(run, task, task.build_model(seed), task.init_batches(seed), steps).model
    found = propose_learning_rate(model, list(itertools.islice(task.init_batches(seed), 4)))
    return {
        "learning_rate": found.learning_rate,
        "motion": median(found.motion.values()),
        "largest_motion": max(found.motion.values()),
        "sites": len(found.motion),
        "batches": found.batches,
        "command": f"python benchmarks/proposed_rates.py {experiment.name} --methods {method}",
    }


def main(given: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Proposed learning rates for the starts of the studies.")
    parser.add_argument("studies", nargs="*", default=[*FITTED, *DECIDED])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=PROPOSED, help="the record")
    arguments = parser.parse_args(given)
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"tasks": {}}
    for name in arguments.studies:
        experiment = load_experiment(ROOT / "studies" / f"{name}.toml")
        for method in arguments.methods.split(","):
            found = {**proposal(experiment, method), "machine": describe(torch.get_num_threads())}
            record["tasks"].setdefault(name, {})[method] = found
            write_atomically(arguments.out, (json.dumps(record, indent=1) + "\n").encode())
            print(name, method, found["learning_rate"], flush=True)


if __name__ == "__main__":
    main()

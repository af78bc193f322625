"""Tweets, 3 classes, MiniLM-L6, 100 steps: self mode (offset, paired) against plain LoRA, learning rates × seeds.

    python experiments/tweets/sweep.py run    # 36 runs of about a minute on one core; goes on where it stopped
    python experiments/tweets/sweep.py table  # makes the tables of docs/results.md from the records

Every method has rank 8 that trains, alpha 16, the same batches in the same order, AdamW, 10 warm-up steps, linear decay
and no weight decay; only initialisation and learning rate differ. One JSON record a run under results/tweets/.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import cntlora
from cntlora.plan import write_atomically
from cntlora.recipes.sentiment import TARGET_MODULES, SentimentTask
from cntlora.recipes.training import evaluate_classifier, train

RECORDS = Path(__file__).parents[2] / "results" / "tweets"
DOCS = Path(__file__).parents[2] / "docs" / "results.md"
MARKS = ("<!-- tweets: begin -->", "<!-- tweets: end -->")
ARMS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "self-offset": {"method": "self", "base": "offset"},
    "self-paired": {"method": "self", "base": "paired"},
}
LEARNING_RATES = (1e-3, 3e-3, 6e-3, 1e-2)
SEEDS = (0, 1, 2)
STEPS = 100


def git_state() -> str:
    """The commit, with a mark if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def run(task: SentimentTask, arm: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """One training run; everything random comes from `seed`."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES))
    model = get_peft_model(task.build_model(seed), lora)
    batches, held_out = task.train_batches(seed), task.eval_batches()
    options, start = ARMS[arm], time.perf_counter()
    report = (
        None if options is None else cntlora.initialize(model, batches, cntlora.InitConfig(**options), progress=False)
    )
    init_seconds = 0.0 if report is None else time.perf_counter() - start
    torch.manual_seed(seed)  # dropout
    curve = train(
        model, batches, steps=STEPS, learning_rate=learning_rate, evaluate=lambda m: evaluate_classifier(m, held_out)
    )
    return {
        "arm": arm,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": STEPS,
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": list(TARGET_MODULES)},
        "init": None if report is None else report.to_dict(),
        "init_seconds": init_seconds,
        "train_seconds": curve.seconds,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "diverged": curve.diverged,
        "mean_loss": curve.mean_loss if not curve.diverged else None,
        "losses": curve.losses,
        "evaluations": [asdict(e) for e in curve.evaluations],
        "versions": {"cntlora": cntlora.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "git": git_state(),
    }


def run_all(part: int, parts: int) -> None:
    """All runs that have no record yet; `part` of `parts` for several processes side by side."""
    torch.set_num_threads(1)
    task = SentimentTask()
    todo = [(seed, lr, arm) for seed in SEEDS for lr in LEARNING_RATES for arm in ARMS]
    for seed, lr, arm in todo[part::parts]:
        path = RECORDS / f"{arm}-lr{lr:g}-seed{seed}.json"
        if path.exists():
            continue
        record = run(task, arm, lr, seed)
        write_atomically(path, json.dumps(record, indent=1).encode())
        print(f"{path.stem}: mean loss {record['mean_loss']}, {record['train_seconds']:.0f} s", flush=True)


def rows() -> list[dict[str, Any]]:
    """Per arm and learning rate: mean and spread over seeds."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    table = []
    for arm in ARMS:
        for lr in LEARNING_RATES:
            same = [r for r in records if r["arm"] == arm and r["learning_rate"] == lr]
            if not same:
                continue
            table.append({"arm": arm, "lr": lr, "seeds": len(same), "diverged": sum(r["diverged"] for r in same)})
            whole = [r for r in same if not r["diverged"]]
            for key, of in (
                ("mean training loss", lambda r: r["mean_loss"]),
                ("final eval. loss", lambda r: r["evaluations"][-1]["loss"]),
                ("final accuracy", lambda r: r["evaluations"][-1]["accuracy"]),
                ("final macro F1", lambda r: r["evaluations"][-1]["macro_f1"]),
                ("init s", lambda r: r["init_seconds"]),
            ):
                table[-1][key] = [of(r) for r in whole]
    return table


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "diverged"
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0.0:.{digits}f}"


def tables() -> str:
    """Markdown: the best learning rate of each start, then all of them (mean over seeds ± standard deviation)."""
    table = rows()
    best = {arm: min((r for r in table if r["arm"] == arm), key=_mean_loss) for arm in ARMS}
    heads = ("start", "learning rate", "seeds", *KEYS)
    lines = ["At its best learning rate (lowest mean training loss):", "", *_head(heads)]
    lines += [_line(best[arm]) for arm in ARMS]
    lines += ["", "All learning rates (the best of each start in bold):", "", *_head(heads)]
    lines += [_line(row, bold=row is best[row["arm"]]) for row in table]
    return "\n".join(lines)


KEYS = ("mean training loss", "final eval. loss", "final accuracy", "final macro F1", "init s")


def _mean_loss(row: dict[str, Any]) -> float:
    return mean(row["mean training loss"]) if row["mean training loss"] else float("inf")


def _head(heads: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]


def _line(row: dict[str, Any], bold: bool = False) -> str:
    cells = [row["arm"], f"{row['lr']:g}", str(row["seeds"]), *(spread(row[key]) for key in KEYS[:-1])]
    cells.append(spread(row[KEYS[-1]], 1) if any(row[KEYS[-1]]) else "–")
    return f"| {' | '.join(f'**{c}**' if bold else c for c in cells)} |"


def write_tables() -> None:
    """Puts the tables between the two marks of docs/results.md."""
    before, rest = DOCS.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    write_atomically(DOCS, f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{after}".encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--part", type=int, default=0, help="which share of the runs this process does")
    parser.add_argument("--parts", type=int, default=1, help="number of processes side by side")
    options = parser.parse_args()
    if options.command == "table":
        write_tables()
    else:
        run_all(options.part, options.parts)


if __name__ == "__main__":
    main()

"""Tables over several studies, put between their marks in docs/evidence.md.

python benchmarks/overview.py    # from studies/runs/
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tables import inputs_table, starts_table, table

from cntlora.atomic import write_atomically
from cntlora.lab.report import between, load_records, studies
from cntlora.lab.report.batches_read import later_against
from cntlora.lab.report.study import Estimate, Group, Study

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "studies" / "runs"
"""The tables of runs, one a study."""
EVIDENCE = ROOT / "docs" / "evidence.md"
TASKS = (
    ("tweets", "tweets, MiniLM (40 steps)", "macro_f1", "macro F1 ↑"),
    ("vision_emoji", "emoji images, DINOv2-S (40)", "accuracy", "accuracy ↑"),
    ("language", "tales, SmolLM2 (30)", "perplexity", "perplexity ↓"),
    ("pairs", "newsgroup pairs, MiniLM (50)", "macro_f1", "macro F1 ↑"),
    ("dreambooth", "DreamBooth lorikeet (200)", "loss", "held-out loss ↓"),
)
"""Study, what it is called, its metric and how that is called."""
NO_PART = (
    ("vision_fashion_mnist", "Fashion-MNIST, DINOv2-S (40) †", "accuracy", "accuracy ↑"),
    ("vision_textiles", "textiles, DINOv2-S (40) †", "accuracy", "accuracy ↑"),
    ("captioning_concepts", "captions, DINOv2-S + SmolLM2 (40) †", "sentsim", "SentSim ↑"),
    ("dreambooth_dog", "DreamBooth husky (200) †", "loss", "held-out loss ↓"),
)
"""Tasks that were not looked at until descent was finished."""
STEPS = {"vision_emoji": "vision_emoji_steps"}
"""Where the held-out loss along the training is, if not in the study itself."""
PEERS = ("pissa", "olora", "eva", "corda", "lora_ga", "lora_one", "dora", "rslora", "peft:", "eva+dora")


def study_of(results: Path, name: str, criterion: str = "mean_loss") -> Study:
    """The one study of a table of runs, each method at the learning rate that is best by the criterion."""
    (found,) = studies(load_records(results / f"{name}.parquet"), criterion)
    return found


def peers(study: Study) -> list[Group]:
    """The published methods, those with the most seeds."""
    found = [group for method, group in study.best.items() if method.startswith(PEERS)]
    most = max(len(group.finished) for group in found)
    return [group for group in found if len(group.finished) == most]


def best_peer(study: Study) -> Group:
    """The published method that is furthest ahead of plain LoRA."""
    plain = study.best["lora"]
    return min(peers(study), key=lambda group: group.against(plain).mean or 0.0)


def signed(estimate: Estimate, places: int) -> str:
    """A difference with its spread, where there is one."""
    return _with_spread(f"{estimate.mean:+.{places}f}".replace("-", "−"), estimate, places)


def final(group: Group, metric: str, places: int = 3) -> str:
    """A held-out metric at the end."""
    value = group.final(metric)
    return _with_spread(f"{value.mean:.{places}f}", value, places)


def _with_spread(mean: str, estimate: Estimate, places: int) -> str:
    return mean if estimate.spread is None else f"{mean} ± {estimate.spread:.{places}f}"


TRAINING = ("task", "descent − LoRA", "later", "unseen batches", "best peer − LoRA")
HELD_OUT = ("task", "seeds", "metric", "LoRA", "best peer", "descent")
"""Columns of the two tables that show the comparison."""


def comparison(results: Path, columns: Sequence[str] | None = None) -> str:
    """Descent and the best peer against plain LoRA on every task, each at its best learning rate.

    Args:
        results: folder of the tables of runs.
        columns: some of them, in this order; None for all.
    """
    head = ["task", "seeds", "descent − LoRA", "later", "unseen batches", "best peer − LoRA", "metric"]
    head += ["LoRA", "best peer", "descent"]
    rows = []
    for name, title, metric, words in (*TASKS, *NO_PART):
        study, places = study_of(results, name), 4 if name.startswith("dreambooth") else 3
        plain, own, peer = study.best["lora"], study.best["descent"], best_peer(study)
        unseen = study.best.get("descent+unseen")
        rows.append([
            title,
            str(len(own.finished)),
            signed(own.against(plain), places),
            signed(later_against(own, plain), places),
            signed(unseen.against(plain), places) if unseen else "–",
            f"{signed(peer.against(plain), places)} ({study.labels[peer.method]})",
            words,
            *(final(group, metric) for group in (plain, peer, own)),
        ])  # fmt: skip
    chosen = [head.index(name) for name in columns or head]
    return table([head[i] for i in chosen], [[row[i] for i in chosen] for row in rows])


def reached(group: Group, loss: float) -> str:
    """Return the share of a group's steps at which its mean held-out loss falls to a value, between evaluations."""
    found = [[(e["step"], e["loss"]) for e in run["evaluations"]] for run in group.finished]
    steps = [step for step, _ in found[0]]
    means = [sum(run[i][1] for run in found) / len(found) for i in range(len(steps))]
    for i, value in enumerate(means):
        if value <= loss:
            if i == 0:
                return f"{steps[0] / steps[-1]:.2f}"
            share = (means[i - 1] - loss) / (means[i - 1] - value)
            return f"{(steps[i - 1] + share * (steps[i] - steps[i - 1])) / steps[-1]:.2f}"
    return "not"


def halves(results: Path) -> str:
    """Held-out losses after half of the steps (warm-up and schedule too) against plain LoRA's after all of them.

    Learning rates are chosen by that loss.
    """
    head = ["task", "LoRA, all steps", "half: LoRA", "half: peer", "half: descent", "to LoRA's", "to the best peer's"]
    rows = []
    for name, title, *_ in TASKS:
        whole, half = study_of(results, name, "loss"), study_of(results, f"half_{name}", "loss")
        along = study_of(results, STEPS.get(name, name), "loss")
        (peer,) = peers(half)
        ends = (along.best["lora"], min(peers(whole), key=lambda group: group.final("loss").mean or math.inf))
        rows.append([
            title,
            final(whole.best["lora"], "loss"),
            final(half.best["lora"], "loss"),
            f"{final(peer, 'loss')} ({half.labels[peer.method]})",
            final(half.best["descent"], "loss"),
            *(reached(along.best["descent"], group.final("loss").mean or 0.0) for group in ends),
        ])  # fmt: skip
    return table(head, rows)


def starts(record: Path) -> str:
    """Return what benchmarks/starts.py found: the inputs of every task, and its starts."""
    words = {name: title.partition(" (")[0] for name, title, *_ in TASKS}
    found = json.loads(record.read_text())["tasks"]
    tasks = {name: {**task, "title": words[name.removesuffix("_modes")]} for name, task in found.items()}
    return "\n\n".join([inputs_table(tasks), *(f"{t['title']}:\n\n{starts_table(t)}" for t in tasks.values())])


def filled(document: Path, results: Path) -> str:
    """The text of docs/evidence.md with its tables between their marks."""
    text = document.read_text()
    tables = {
        "training loss": comparison(results, TRAINING),
        "held-out": comparison(results, HELD_OUT),
        "halves": halves(results),
    }
    for name, content in tables.items():
        text = between(document, text, name, content)
    return text


if __name__ == "__main__":
    write_atomically(EVIDENCE, filled(EVIDENCE, RUNS).encode())

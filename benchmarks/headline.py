"""The figure and the table of README.md, from the records of the studies of 300 steps.

    python benchmarks/headline.py     # writes docs/assets/heldout_dialogue.svg, prints the rows of the table

The table has held-out losses at the end: plain LoRA at the best of its rates, and both at rates that nobody tuned.
The figure has them along the training of a language model at a rate that is too small for plain LoRA.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.lasting import FIXED, TOLD_DEFAULT, Runs, tasks_of, with_spread
from benchmarks.overview import RUNS

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "assets" / "heldout_dialogue.svg"
SMALL = 2e-4
"""A rate that is common, and too small for plain LoRA here."""
COLUMNS = (
    ("lora", None),
    ("lora", SMALL),
    ("lora", FIXED),
    (TOLD_DEFAULT, SMALL),
    (TOLD_DEFAULT, FIXED),
    (TOLD_DEFAULT, 3e-3),
)
"""Method and learning rate, None for its best one."""
SEEDS = 3
"""Of a study; a cell of fewer says so."""
TASKS = {
    "tweets_300": "tweets in 3 classes, MiniLM-L6",
    "pairs_300": "pairs of texts, MiniLM-L6",
    "vision_fashion_mnist_300": "Fashion-MNIST, DINOv2-S",
    "vision_emoji_300": "emoji images in 10 classes, DINOv2-S",
    "language_300": "dialogue, SmolLM2-135M",
}


def rows(results: Path) -> list[list[str]]:
    """A task and what `COLUMNS` says: held-out losses at the end, mean ± spread over seeds."""
    found = []
    for study, runs in tasks_of(results).items():
        found.append([TASKS[study], *(_cell(runs[method], rate) for method, rate in COLUMNS)])
    return found


def _cell(runs: Runs, rate: float | None) -> str:
    rate = runs.tuned if rate is None else rate
    values = list(runs.ends(rate).values()) if rate in runs.along else []
    if not values:
        return "–"
    return with_spread(values) + (f" ({len(values)})" if len(values) < SEEDS else "")


def figure(results: Path) -> bytes:
    """Held-out loss against steps on the dialogue as an SVG, the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = tasks_of(results)["language_300"]
    best, seed = runs["lora"].tuned, 0
    lines = (
        (f"plain LoRA at {SMALL:g}", runs["lora"].along[SMALL][seed], "#888888", "o", "-"),
        (f"plain LoRA at its best rate, {best:g}", runs["lora"].along[best][seed], "#888888", "s", "--"),
        (f"whitened at {SMALL:g}, told the rate", runs["whitened+fitted"].along[SMALL][seed], "#3050b0", "D", "-"),
    )
    settings = {"svg.fonttype": "none", "svg.hashsalt": "cntlora", "font.family": "sans-serif", "font.size": 9}
    with pyplot.rc_context(settings):
        drawing, axes = pyplot.subplots(figsize=(5.6, 2.9), layout="constrained")
        for label, along, colour, marker, style in lines:
            axes.plot(*zip(*along, strict=True), label=label, color=colour, marker=marker, linestyle=style,
                      markersize=4, linewidth=1.4)  # fmt: skip
        axes.set_xlabel("training step")
        axes.set_ylabel("held-out loss")
        axes.set_ylim(2.65, 3.65)
        axes.set_title("Dialogue, SmolLM2-135M, rank 16, one seed", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        written = io.BytesIO()
        drawing.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(drawing)
    return written.getvalue()


def main() -> None:
    """Command line."""
    FIGURE.write_bytes(figure(RUNS))
    for row in rows(RUNS):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

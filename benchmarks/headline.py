"""The figure and the table of README.md, from the records of the studies of 300 steps.

    python benchmarks/headline.py     # writes docs/assets/heldout_tweets.svg, prints the rows of the table

Held-out losses at the end. Plain LoRA at the best of its rates, and both at one rate that nobody tuned.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.lasting import FIXED, tasks_of
from benchmarks.overview import RUNS

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "assets" / "heldout_tweets.svg"
TASKS = {
    "tweets_300": "tweets in 3 classes, MiniLM-L6",
    "pairs_300": "pairs of texts, MiniLM-L6",
    "vision_fashion_mnist_300": "Fashion-MNIST, DINOv2-S",
    "vision_emoji_300": "emoji images in 10 classes, DINOv2-S",
    "language_300": "dialogue, SmolLM2-135M",
}


def rows(results: Path) -> list[list[str]]:
    """Task, plain LoRA tuned and at one rate, whitened at that rate: held-out losses at the end, mean ± spread.

    Of the seeds that all three have.
    """
    found = []
    for study, runs in tasks_of(results).items():
        plain, ours = runs["lora"], runs["whitened"]
        columns = [plain.ends(plain.tuned), plain.ends(FIXED), ours.ends(FIXED)]
        seeds = sorted(set.intersection(*map(set, columns)))
        count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        found.append([f"{TASKS[study]}, {count}", *(_cell([ends[seed] for seed in seeds]) for ends in columns)])
    return found


def _cell(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def figure(results: Path) -> bytes:
    """Held-out loss against steps on the tweets as an SVG: means of three seeds, bars from the least to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = tasks_of(results)["tweets_300"]
    best = runs["lora"].tuned
    lines = (
        (f"plain LoRA at its best rate, {best:g}", runs["lora"].along[best], "#888888", "s", "--"),
        (f"plain LoRA at {FIXED:g}", runs["lora"].along[FIXED], "#888888", "o", "-"),
        (f"whitened at {FIXED:g}", runs["whitened"].along[FIXED], "#3050b0", "D", "-"),
    )
    settings = {"svg.fonttype": "none", "svg.hashsalt": "cntlora", "font.family": "sans-serif", "font.size": 9}
    with pyplot.rc_context(settings):
        drawing, axes = pyplot.subplots(figsize=(5.6, 2.9), layout="constrained")
        for shift, (label, seeds, colour, marker, style) in zip((-1.5, 0.0, 1.5), lines, strict=True):
            steps = [step for step, _ in next(iter(seeds.values()))]
            losses = [[run[i][1] for run in seeds.values()] for i in range(len(steps))]
            means = [mean(values) for values in losses]
            down = [average - min(values) for average, values in zip(means, losses, strict=True)]
            up = [max(values) - average for average, values in zip(means, losses, strict=True)]
            axes.errorbar(
                [step + shift for step in steps], means, [down, up], label=label, color=colour, marker=marker,
                linestyle=style, markersize=4, linewidth=1.4, elinewidth=0.7, capsize=2,
            )  # fmt: skip
        axes.set_xlabel("training step")
        axes.set_ylabel("held-out loss")
        axes.set_title("Tweets in 3 classes, MiniLM-L6, rank 8, 3 seeds", fontsize=9)
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

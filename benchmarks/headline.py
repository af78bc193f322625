"""The figure and the table of README.md, from the records of the studies.

    python benchmarks/headline.py     # writes docs/assets/heldout_tweets.svg, prints the rows of the table

Held-out losses, each method at the learning rate with the lowest one at the end. Descent has read batches that the
training never comes to ("unseen"), the peers those that it begins with.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.overview import RUNS, final, peers, study_of

from cntlora.lab.report.study import Group

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "assets" / "heldout_tweets.svg"
TASKS = {
    "tweets": "tweets in 3 classes, MiniLM-L6, 40 steps, 3 seeds",
    "vision_emoji": "emoji images in 10 classes, DINOv2-S, 40 steps, 5 seeds (peers: 3)",
    "language": "tales, SmolLM2-135M, 30 steps, 3 seeds",
}
LINES = {
    "lora": ("plain LoRA", "#888888", "o"),
    "eva": ("EVA", "#d08030", "s"),
    "descent+unseen": ("descent", "#3050b0", "D"),
}


def rows(results: Path) -> list[list[str]]:
    """Task, plain LoRA, the best peer, descent: held-out losses at the end of the training, mean ± spread."""
    found = []
    for name, title in TASKS.items():
        study = study_of(results, name, "loss")
        peer = min(peers(study), key=lambda group: group.final("loss").mean or 0.0)
        plain, ours = (final(study.best[method], "loss") for method in ("lora", "descent+unseen"))
        found.append([title, plain, f"{final(peer, 'loss')} ({study.labels[peer.method]})", ours])
    return found


def curve(group: Group) -> tuple[list[int], list[list[float]]]:
    """The steps of the evaluations, and at each the held-out losses of all seeds."""
    steps = [e["step"] for e in group.finished[0]["evaluations"]]
    losses = [[run["evaluations"][i]["loss"] for run in group.finished] for i in range(len(steps))]
    return steps, losses


def figure(results: Path) -> bytes:
    """Held-out loss against steps on the tweets as an SVG: means of three seeds, bars from the least to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    study = study_of(results, "tweets", "loss")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "cntlora", "font.family": "sans-serif", "font.size": 9}
    with pyplot.rc_context(settings):
        drawing, axes = pyplot.subplots(figsize=(5.6, 2.9), layout="constrained")
        for shift, (method, (label, colour, marker)) in zip((-0.4, 0.0, 0.4), LINES.items(), strict=True):
            steps, losses = curve(study.best[method])
            means = [sum(values) / len(values) for values in losses]
            down = [mean - min(values) for mean, values in zip(means, losses, strict=True)]
            up = [max(values) - mean for mean, values in zip(means, losses, strict=True)]
            axes.errorbar(
                [step + shift for step in steps], means, [down, up], label=label, color=colour, marker=marker,
                markersize=4, linewidth=1.4, elinewidth=0.7, capsize=2,
            )  # fmt: skip
        axes.set_xlabel("training step")
        axes.set_ylabel("held-out loss")
        axes.set_title("Tweets in 3 classes, MiniLM-L6, rank 8, 3 seeds, learning rates tuned", fontsize=9)
        axes.set_xticks(steps)
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

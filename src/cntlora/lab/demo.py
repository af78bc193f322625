"""`cntlora demo`: sentiment of tweets with MiniLM-L6; plain LoRA and cntlora from the same seed and budget."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..api import initialize
from ..atomic import write_atomically
from ..config import InitConfig
from ..files.saving import save_adapter
from .recipes.samples.models import minilm_folder
from .recipes.scoring import classifier_metrics
from .recipes.text.classification import SequenceTask
from .recipes.text.sentiment import TARGET_MODULES, make_task
from .recipes.train_settings import TrainSettings
from .recipes.training import Curve, train

LEARNING_RATES = {"plain LoRA": 3e-3, "cntlora": 3e-3}
"""Plain LoRA's best of 1e-3, 3e-3, 6e-3 and 1e-2 in the study tweets_100 (mean training loss, 3 seeds); ours ran there
with a fitted head at this one alone."""

# Runs without cntlora: plain transformers and PEFT, a pristine base, the saved folder.
RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
from peft import PeftModel
logging.set_verbosity_error()
logging.disable_progress_bar()
base, adapter, batch, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
assert "cntlora" not in sys.modules
with torch.no_grad():
    save_file({"logits": model(**load_file(batch)).logits}, out)
"""

Say = Callable[[str], Any]


def run_demo(out: Path, *, steps: int = 100, seed: int = 0, say: Say = print) -> dict[str, Any]:
    """Train both, draw the curves, save the adapter and check it in a fresh process.

    Args:
        out: folder for `curves.png`, `adapter/` and `record.json`.
        steps: updates of each run.
        seed: of head, LoRA's A, data order and dropout.
        say: receives lines of text.

    Returns:
        What `record.json` holds.

    Raises:
        RuntimeError: if model or data cannot be downloaded, or the reloaded adapter predicts otherwise.
    """
    started = time.perf_counter()
    task = make_task()
    say(f"MiniLM-L6 and {len(task.tables[0]):,} labelled tweets, {len(task.tables[1]):,} more held out; LoRA r 8 on")
    say("query, key, value and attention output; the same seed, batches and number of steps for both\n")
    at = sorted({0, steps // 4, steps // 2, steps})
    record: dict[str, Any] = {"steps": steps, "seed": seed, "runs": {}}
    for name in LEARNING_RATES:
        model, init_seconds, curve = _run(task, name, steps, seed, at, say)
        record["runs"][name] = {
            "learning_rate": LEARNING_RATES[name],
            "init_seconds": init_seconds,
            "train_seconds": curve.seconds,
            "mean_loss": curve.mean_loss,
            "losses": curve.losses,
            "evaluations": [{"step": e.step, **e.metrics} for e in curve.evaluations],
        }
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(record, out / "curves.png")
    save_adapter(model, out / "adapter")
    record["reload"] = _check_reload(task, model, out)
    record["seconds"] = time.perf_counter() - started
    write_atomically(out / "record.json", json.dumps(record, indent=1).encode())
    _summary(record, out, say)
    return record


def _run(
    task: SequenceTask, name: str, steps: int, seed: int, at: list[int], say: Say
) -> tuple[nn.Module, float, Curve]:
    """One training run; "cntlora" differs by one line and its learning rate."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES))
    model: nn.Module = get_peft_model(task.build_model(seed), lora)  # type: ignore[arg-type]
    batches, held_out = task.train_batches(seed), task.eval_batches()
    start = time.perf_counter()
    if name == "cntlora":  # from batches in another order, so that it has not seen those that the training begins with
        initialize(model, task.train_batches(seed + 1), InitConfig(method=None))
    init_seconds = time.perf_counter() - start if name == "cntlora" else 0.0
    say(f"{name}: learning rate {LEARNING_RATES[name]:g}, initialised in {init_seconds:.1f} s")
    torch.manual_seed(seed)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("training", total=steps)
        curve = train(
            model,
            batches,
            TrainSettings(steps=steps, warmup=min(10, steps), eval_at=tuple(at)),
            learning_rate=LEARNING_RATES[name],
            evaluate=lambda m: classifier_metrics(m, held_out),
            progress=lambda step, loss: bar.update(line, completed=step),
        )
    for e in curve.evaluations:
        loss, accuracy, macro_f1 = (e.metrics[name] for name in ("loss", "accuracy", "macro_f1"))
        say(f"  step {e.step:4d}   eval loss {loss:.3f}   accuracy {accuracy:.3f}   macro F1 {macro_f1:.3f}")
    say(f"  mean training loss {curve.mean_loss:.4f} over {len(curve.losses)} steps, {curve.seconds:.0f} s\n")
    return model, init_seconds, curve


def _check_reload(task: SequenceTask, model: nn.Module, out: Path) -> dict[str, Any]:
    """Predictions of the model in memory and of the folder loaded by plain PEFT in a fresh process."""
    batch: dict[str, Tensor] = {k: v for k, v in next(iter(task.eval_batches())).items() if k != "labels"}
    model.eval()
    with torch.no_grad():
        here = model(**batch).logits
    inputs, logits = out / ".batch.safetensors", out / ".logits.safetensors"
    try:
        save_file({k: v.contiguous() for k, v in batch.items()}, inputs)
        command = [sys.executable, "-c", RELOAD, str(minilm_folder()), str(out / "adapter"), str(inputs), str(logits)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the saved adapter could not be loaded in a fresh process: {done.stderr[-500:]}")
        there = load_file(logits)["logits"]
    finally:
        inputs.unlink(missing_ok=True)
        logits.unlink(missing_ok=True)
    equal = torch.equal(here.argmax(1), there.argmax(1))
    difference = float((here - there).abs().max())
    if not equal or difference > 1e-3:
        raise RuntimeError(f"the reloaded adapter predicts otherwise: its logits differ by up to {difference:.2g}")
    return {"tweets": len(here), "equal_predictions": equal, "largest_logit_difference": difference}


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """Training loss (mean over ten steps) and held-out accuracy of both runs, as one image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, run), colour in zip(record["runs"].items(), ("#767676", "#0b6e4f"), strict=False):
        losses, label = run["losses"], f"{name}, lr {run['learning_rate']:g}"
        smooth = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        left.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.2, linewidth=0.8)
        left.plot(range(1, len(losses) + 1), smooth, color=colour, label=label)
        points = run["evaluations"]
        right.plot([e["step"] for e in points], [e["accuracy"] for e in points], "o-", color=colour, label=label)
    for axes, what in ((left, "training loss (nats)"), (right, "held-out accuracy")):
        axes.set(xlabel="step", ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _summary(record: dict[str, Any], out: Path, say: Say) -> None:
    plain, ours = record["runs"]["plain LoRA"], record["runs"]["cntlora"]
    reload = record["reload"]
    say(f"mean training loss   plain LoRA {plain['mean_loss']:.4f}   cntlora {ours['mean_loss']:.4f}")
    say(f"fresh process, plain PEFT, pristine base: {reload['tweets']} predictions equal, logits within "
        f"{reload['largest_logit_difference']:.1e}")  # fmt: skip
    say(f"curves: {out / 'curves.png'}   adapter: {out / 'adapter'}   record: {out / 'record.json'}")
    say(f"{record['seconds']:.0f} s in all")

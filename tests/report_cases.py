"""Synthetic records for the tests of the report: plausible curves from a seeded generator, and every odd case."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RATES = (0.0003, 0.001, 0.003, 0.01)
SEEDS = (0, 1, 2)
STEPS = 200
METHODS = {
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "dora": "DoRA",
    "rslora": "rsLoRA",
    "eva+dora": "EVA + DoRA",
    "peft:pissa": "PiSSA (PEFT)",
    "peft:olora": "OLoRA (PEFT)",
    "peft:eva": "EVA (PEFT)",
    "peft:corda": "CorDA (PEFT)",
    "peft:lora_ga": "LoRA-GA (PEFT)",
    "cross": "CNTLoRA-X",
    "self": "CNTLoRA-S",
    "shift": "CNTLoRA-Sh",
    "cross+dora": "CNTDoRA-X",
    "cross+rslora": "CNTRS-LoRA-X",
    "cross+qr": "CNTLoRA-X-QR",
    "self+paired": "CNTLoRA-S paired",
    "self+subtract": "CNTLoRA-S subtract",
    "cross+vas": "CNTLoRA-X + VAS",
    "self+vas": "CNTLoRA-S + VAS",
    "shift+vas": "CNTLoRA-Sh + VAS",
    "shift+gaussian": "CNTLoRA-Sh Norm.",
}
KINDS = ("query", "key", "value", "out", "up")


def many() -> list[dict[str, Any]]:
    """28 methods × 4 learning rates × 3 seeds, some diverged or failed, some with nulls or without sites."""
    return [record(m, rate, seed) for m in METHODS for rate in RATES for seed in SEEDS]


def few() -> list[dict[str, Any]]:
    """Four methods × 2 learning rates × 2 seeds: quick to render."""
    methods = ("lora", "eva", "self", "self+vas")
    return [record(m, rate, seed) for m in methods for rate in (0.001, 0.003) for seed in (0, 1)]


def record(method: str, rate: float, seed: int, **changes: Any) -> dict[str, Any]:
    """One run, the same for the same arguments."""
    place = list(METHODS).index(method)
    generator = np.random.default_rng([place, round(1e6 * rate), seed])
    if method == "full" and rate == 0.01 and seed == 1:
        return failed(method, rate, seed) | changes
    if rate == 0.01 and method in ("full", "cross+rslora", "rslora", "lora_ga"):
        return _diverged(method, rate, seed, generator) | changes
    quality = 0.10 * math.sin(1.7 * place) + (0.12 if place >= 16 else 0.0)
    misfit = math.log10(rate / (0.003 if place % 3 else 0.001)) ** 2
    losses = _losses(generator, 0.30 + quality - 0.12 * misfit, STEPS)
    tick = (0.21 if "dora" in method else 0.15) * (1 + 0.05 * generator.random())
    seconds = [round(tick * (i + 1), 3) for i in range(STEPS)]
    steps = (0, 25, 50, 100, 150, 200)
    evaluations = [_evaluation(generator, step, losses, 0.0 if step == 0 else seconds[step - 1]) for step in steps]
    init = None if method == "adalora" else {"full": 0.0, "lora": 0.0}.get(method, 0.5 + 2.5 * generator.random())
    made = _frame(method, rate, seed) | {
        "status": "finished",
        "init_seconds": init,
        "train_seconds": seconds[-1],
        "peak_memory_mib": 900.0 + 15 * place + generator.random(),
        "trainable_parameters": 22_713_216 if method == "full" else 148_611,
        "mean_loss": float(np.mean(losses)),
        "losses": losses,
        "seconds": seconds,
        "evaluations": evaluations,
        "start": None if method == "olora" else {"loss_before": 1.09, "loss_after": 1.09 + 0.01 * (place % 4)},
        "sites": {} if method in ("full", "adalora") else _sites(generator, method, place),
    }
    return made | changes


def failed(method: str, rate: float, seed: int) -> dict[str, Any]:
    """A run that raised."""
    error = "RuntimeError: out of memory at encoder.layer.3 <script>alert(1)</script> | 100% of 8_GiB & more #1"
    return _frame(method, rate, seed) | {"status": "failed", "error": error, "traceback": "Traceback …"}


def write(records: list[dict[str, Any]], folder: Path) -> Path:
    """The records as files, as an experiment leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for r in records:
        name = f"{r['method'].replace(':', '-')}-lr{r['learning_rate']:g}-seed{r['seed']}.json"
        (folder / name).write_text(json.dumps(r))
    return folder


PROMPTS = ("a <*> toy in the snow", "a <*> toy with a city & the sea", "a <*> toy $1 or $2")
SAMPLED = (0, 10, 20, 40)


def with_samples(records: list[dict[str, Any]], folder: Path, kind: str = "image") -> list[dict[str, Any]]:
    """The finished records with images of every prompt at four steps, or with captions of such images."""
    made = []
    for r in records:
        name = f"{r['method']}-lr{r['learning_rate']:g}-seed{r['seed']}"
        samples = [_sample(folder, name, kind, place, step) for step in SAMPLED for place in range(len(PROMPTS))]
        made.append(r | {"samples": samples} if r["status"] == "finished" else r)
    return made


def _sample(folder: Path, run: str, kind: str, place: int, step: int) -> dict[str, Any]:
    file = f"{run}/step-{step:04d}/{place}.png"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(-1, 1, 96), np.linspace(-1, 1, 96))
    inside = x**2 + y**2 < 0.2 + 0.6 * (step / 40 if kind == "image" else 1)
    pixels = np.where(inside[..., None], [220, 60 + 60 * place, 40], [90, 140, 200]).astype(np.uint8)
    Image.fromarray(pixels).save(folder / file)
    text = None if kind == "image" else ("an image of a toy" if step < 20 else f"<*> sits in the snow, {run} {step}")
    return {"step": step, "kind": kind, "name": PROMPTS[place], "file": file, "text": text}


def _frame(method: str, rate: float, seed: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "experiment": "tweets",
        "task": "tweets",
        "method": method,
        "label": METHODS[method],
        "learning_rate": rate,
        "seed": seed,
        "error": None,
        "config": {"init": {"adaptive_ranks": method.endswith("vas")}},
        "metrics": {"loss": "min", "accuracy": "max", "macro_f1": "max"},
        "main_metric": "macro_f1",
        "init_seconds": None,
        "train_seconds": None,
        "peak_memory_mib": None,
        "trainable_parameters": None,
        "mean_loss": None,
        "losses": [],
        "seconds": [],
        "evaluations": [],
        "start": None,
        "sites": {},
        "versions": {"cntlora": "0.2.0", "torch": "2.13.0", "peft": "0.21.2", "python": "3.11.7"},
        "git": "e8d4708",
        "machine": {"processor": "x86_64, 2 cores", "threads": 1, "device": "cpu"},
    }


def _diverged(method: str, rate: float, seed: int, generator: np.random.Generator) -> dict[str, Any]:
    losses = [round(float(1.1 * 1.05**i + 0.1 * generator.random()), 5) for i in range(60)] + [float("nan")]
    curves = {"losses": losses, "seconds": [0.15 * (i + 1) for i in range(61)]}
    return _frame(method, rate, seed) | {"status": "diverged", "init_seconds": 1.5, **curves}


def _losses(generator: np.random.Generator, gain: float, steps: int) -> list[float]:
    t = np.arange(1, steps + 1)
    curve = 1.1 - gain * (1 - np.exp(-t / 45)) - 0.15 * t / steps + 0.02 * generator.standard_normal()
    return [round(float(v), 5) for v in curve + 0.06 * generator.standard_normal(steps)]


def _evaluation(generator: np.random.Generator, step: int, losses: list[float], seconds: float) -> dict[str, float]:
    loss = (1.09 if step == 0 else float(np.mean(losses[max(0, step - 20) : step]))) + 0.01 * generator.random()
    accuracy = min(0.98, 0.39 + 0.55 * (1.1 - loss) + 0.01 * generator.standard_normal())
    macro = 0.30 + 0.6 * (1.1 - loss) + 0.02 * generator.standard_normal()
    return {"step": step, "seconds": seconds, "loss": loss, "accuracy": accuracy, "macro_f1": macro}


def _sites(generator: np.random.Generator, method: str, place: int) -> dict[str, Any]:
    sites: dict[str, Any] = {}
    for depth in range(6):
        for kind in KINDS:
            values = np.sort(generator.gamma(2.0, 1.5, 64) * np.exp(-np.arange(64) / (8 + place % 5)))[::-1]
            uneven = max(0, round(8 + 5 * math.cos(depth + KINDS.index(kind)) + generator.normal()))
            paper = method not in ("lora", "dora", "rslora")
            sites[f"encoder.layer.{depth}.{kind}"] = {
                "kind": kind,
                "depth": depth,
                "rank": uneven if method.endswith("vas") else 8,
                "file_rank": 16,
                "singular_values": [round(float(v), 5) for v in values] if paper else None,
                "delta_norm": float(np.sqrt((values**2).sum())) if paper else None,
                "weight_norm": 25.0,
                "start_norm": float(2 + generator.random()) if paper else 0.0,
                "tokens": 4096,
                "effective_rank": 380,
                "gradient_A": float(0.02 + 0.02 * generator.random()) if paper else 0.0,
                "gradient_B": float(0.05 + 0.05 * generator.random()),
                "cosine": float(min(0.99, 0.4 + 0.02 * place + 0.1 * generator.random())),
                "cosine_product": float(min(0.99, 0.3 + 0.02 * place)) if paper else None,
                "spectral_norm": float(4 / (1 + 0.2 * place) + generator.random()),
            }
    return sites

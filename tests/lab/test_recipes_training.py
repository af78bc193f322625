"""Training through transformers' Trainer: exact losses, schedules, checkpoints, the model left as found; scores."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from cntlora.lab.recipes import training
from cntlora.lab.recipes.layer_decay import depth_of, layered_groups
from cntlora.lab.recipes.scoring import classifier_metrics, evaluate_classifier
from cntlora.lab.recipes.train_settings import Evaluation, TrainSettings, cycled
from cntlora.lab.recipes.trainer import last_checkpoint
from cntlora.lab.recipes.training import Curve


class Tiny(nn.Module):
    """A linear classifier of 3 classes with dropout, and a frozen part that stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False).eval()

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.linear(self.dropout(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()


def train(model: nn.Module, batches: Iterable[Any], *, learning_rate: float, **options: Any) -> Curve:
    """`training.train` with the fields of `TrainSettings` among its arguments."""
    settings = {key: options.pop(key) for key in [*options] if key in TrainSettings.__dataclass_fields__}
    return training.train(model, batches, TrainSettings(**settings), learning_rate=learning_rate, **options)


def separable(count: int = 4, rows: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * rows, 4, generator=generator)
    labels = x[:, :3].argmax(dim=1)
    return [{"x": a, "labels": b} for a, b in zip(x.split(rows), labels.split(rows), strict=True)]


def seeded(seed: int = 0, model: nn.Module | None = None, **options: Any) -> Curve:
    """A curve from `separable` batches under a seed of dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return train(model or tiny(), separable(), **{"steps": 12, "learning_rate": 0.05, **options})


def by_hand(steps: int, schedule: str = "linear", warmup: int = 10, seed: int = 0) -> list[float]:
    """The same training written out."""
    model, batches = tiny(), separable()
    trained = list(model.linear.parameters())
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            loss = model(**batches[step % len(batches)]).loss
            losses.append(loss.item())
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses


def test_the_loss_falls_and_the_model_is_left_as_found(capfd: pytest.CaptureFixture[str]) -> None:
    model, batches, seen = tiny(), separable(), []
    model.config = SimpleNamespace(use_cache=True)  # type: ignore[assignment]
    frozen = model.frozen.weight.clone()
    modes, attributes = [module.training for module in model.modules()], set(vars(model))
    curve = train(
        model, batches, steps=100, learning_rate=0.1, evaluate=lambda m: classifier_metrics(m, batches),
        eval_at=[0, 20], progress=lambda step, loss: seen.append((step, loss)), precision="bfloat16",
    )  # fmt: skip
    start, middle, end = (e.metrics for e in curve.evaluations)
    assert [e.step for e in curve.evaluations] == [0, 20, 100]
    assert max(end["loss"], middle["loss"]) < 0.5 * start["loss"]
    assert end["accuracy"] > 0.9 > start["accuracy"] and end["macro_f1"] > 0.9
    assert curve.final and curve.final.metrics == end and not curve.diverged
    assert seen == list(enumerate(curve.losses, start=1))
    assert curve.mean_loss == pytest.approx(sum(curve.losses) / 100)
    assert curve.times == sorted(curve.times) and curve.seconds == curve.times[-1] > 0
    assert [e.seconds for e in curve.evaluations] == [0.0, curve.times[19], curve.times[99]]
    assert torch.equal(frozen, model.frozen.weight)
    assert [module.training for module in model.modules()] == modes and set(vars(model)) == attributes
    assert model.config.use_cache is True and all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear",) * 2, ("cosine",) * 2, ("constant", "constant_with_warmup")]
)
def test_the_losses_are_those_of_the_loop_written_out(schedule: str, theirs: str) -> None:
    losses = seeded(steps=20, schedule=schedule).losses
    assert losses == by_hand(20, theirs)
    assert losses != by_hand(20, theirs, seed=1)  # the control: dropout
    assert losses != seeded(steps=20, schedule="linear" if schedule != "linear" else "cosine").losses


def test_the_callers_seed_decides_everything_and_the_trainer_none() -> None:
    assert seeded(0).losses == seeded(0).losses != seeded(1).losses
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    seeded(0)
    assert (random.random(), np.random.rand()) == expected


class Line(nn.Module):
    """Its loss is the weight, so that AdamW moves the weight by exactly the learning rate a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, factor: Tensor) -> Tensor:
        return self.weight * factor


def test_every_update_follows_the_schedule() -> None:
    ones = [torch.ones((), dtype=torch.float64)]
    curve = train(Line(), ones, steps=10, warmup=4, learning_rate=0.5)
    moves = [before - after for before, after in zip(curve.losses, curve.losses[1:], strict=False)]
    falling = [0.5 * (10 - step) / 6 for step in range(4, 9)]
    assert moves == pytest.approx([0.0, 0.125, 0.25, 0.375, *falling], abs=1e-6)


def test_gradients_are_clipped_together() -> None:
    model = tiny()
    batches = [{"x": 100 * b["x"], "labels": b["labels"]} for b in separable()]
    before = [p.detach().clone() for p in model.linear.parameters()]
    # with a clip far under AdamW's eps (1e-8) the updates all but vanish; without it they do not
    train(model, batches, steps=5, warmup=0, learning_rate=0.1, max_grad_norm=1e-14)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.linear.parameters(), before, strict=True))
    assert moved < 1e-5
    train(model, batches, steps=5, warmup=0, learning_rate=0.1, max_grad_norm=1e30)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.linear.parameters(), before, strict=True))
    assert moved > 1e-2


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    good = torch.ones((), dtype=torch.float64)
    batches, model = [good, good, good * math.nan, good], Line()
    curve = train(model, batches, steps=8, warmup=0, learning_rate=0.1, evaluate=lambda m: {"loss": 0.0}, eval_at=[1])
    assert curve.diverged and len(curve.losses) == 2 and curve.mean_loss == math.inf
    assert [e.step for e in curve.evaluations] == [1]
    assert math.isfinite(model.weight.item()) and model.weight.grad is None
    assert not train(Line(), [good], steps=8, warmup=0, learning_rate=0.1).diverged


class Seen(Line):
    """Remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, factor: Tensor) -> Tensor:
        self.seen.append(float(factor))
        return super().forward(factor)


def numbers(*values: int) -> list[Tensor]:
    return [torch.tensor(float(i), dtype=torch.float64) for i in values]


def test_batches_start_again_when_they_end() -> None:
    model = Seen()
    train(model, numbers(1, 2, 3), steps=7, warmup=0, learning_rate=0.1)
    assert model.seen == [1, 2, 3, 1, 2, 3, 1]


def test_an_update_is_the_mean_of_its_batches() -> None:
    model = Seen()
    curve = train(model, numbers(1, 2, 3), steps=3, warmup=0, learning_rate=0.1, gradient_accumulation=2)
    assert model.seen == [1, 2, 3, 1, 2, 3] and len(curve.losses) == 3
    assert curve.losses[1] == pytest.approx(-0.1 * (3 + 1) / 2)
    parts, whole = separable(4, rows=16), separable(2, rows=32)
    options: dict[str, Any] = {"steps": 8, "learning_rate": 0.1, "warmup": 0}
    model_a, model_b = tiny(), tiny()
    for one in (model_a, model_b):
        one.dropout.p = 0.0
    a = train(model_a, parts, gradient_accumulation=2, **options).losses
    assert a == pytest.approx(train(model_b, whole, **options).losses, abs=1e-5)
    assert a != pytest.approx(seeded(**options).losses, abs=1e-3)


class Passes:
    """Gives 10·pass + 1, 2, 3; the pass is what `set_epoch` says, or, without it, how often it was read."""

    def __init__(self) -> None:
        self.passes, self.given = -1, 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        for i in (1, 2, 3):
            self.given += 1
            yield 10 * self.passes + i


class Epochs(Passes):
    def set_epoch(self, epoch: int) -> None:
        self.passes = epoch - 1


@pytest.mark.parametrize(("kind", "read"), [(Passes, 8), (Epochs, 5)])
def test_what_is_skipped_leaves_the_passes_right(kind: type[Passes], read: int) -> None:
    assert list(cycled(kind(), 8)) == [1, 2, 3, 11, 12, 13, 21, 22]
    batches = kind()
    assert list(cycled(batches, 8, first=4)) == [12, 13, 21, 22] and batches.given == read


class Killed(Exception):
    pass


def interrupted(folder: Path, at: int, **options: Any) -> None:
    def progress(step: int, loss: float) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        seeded(folder=folder, progress=progress, **options)


def looked_at(seen: list[int]) -> dict[str, Any]:
    """Evaluations and samples that are told apart by their number."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(1)
        return {"weight": float(model.linear.weight.detach().sum())}  # type: ignore[operator,union-attr]

    return {
        "steps": 20, "learning_rate": 0.05, "evaluate": evaluate, "eval_at": [0, 4, 8, 16],
        "sample": lambda model, step: [{"kind": "text", "name": "x", "file": None, "text": str(step)}],
        "sample_at": [2, 12],
    }  # fmt: skip


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    seen: list[int] = []
    options = looked_at(seen)
    whole = seeded(**options)
    assert [s["step"] for s in whole.samples] == [2, 12] and len(seen) == 5
    interrupted(tmp_path, 11, save_every=3, **options)
    kept = last_checkpoint(tmp_path)
    assert kept is not None and kept.name == "checkpoint-9" and len(list(tmp_path.iterdir())) == 2
    (kept / "trainer_state.json").write_text('{"half": ')  # killed while it wrote: the one before counts
    steps: list[int] = []
    seen.clear()
    again = seeded(99, folder=tmp_path, save_every=3, progress=lambda step, _: steps.append(step), **options)
    assert steps == list(range(7, 21)) and len(seen) == 3
    assert again.losses == whole.losses and again.samples == whole.samples and len(again.times) == 20
    assert [(e.step, e.metrics) for e in again.evaluations] == [(e.step, e.metrics) for e in whole.evaluations]
    assert again.times == sorted(again.times)
    assert seeded(99, folder=tmp_path / "new", save_every=3, **options).losses != whole.losses  # the control


def test_a_checkpoint_holds_what_training_changes_and_no_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    interrupted(tmp_path, 4, save_every=3)
    kept = last_checkpoint(tmp_path)
    assert kept is not None
    assert set(load_file(kept / "trained.safetensors")) == {"linear.weight", "linear.bias"}
    assert len(json.loads((kept / "trainer_state.json").read_text())["stateful_callbacks"]["Recorder"]["losses"]) == 3


def test_no_files_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seeded(folder=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    seeded(folder=tmp_path / "some", save_every=5)
    assert list(tmp_path.iterdir()) == [tmp_path / "some"]


class Layered(nn.Module):
    """Embedding, two blocks, a norm and a head, all with the gradient 1."""

    def __init__(self) -> None:
        super().__init__()
        one = {"dtype": torch.float64}
        self.embeddings = nn.ParameterDict({"weight": torch.zeros(1, **one)})
        self.layers = nn.ModuleList(nn.ParameterDict({"weight": torch.zeros(1, **one)}) for _ in range(2))
        self.classifier = nn.ParameterDict({"weight": torch.zeros(1, **one)})

    def forward(self, factor: Tensor) -> Tensor:
        return sum(p.sum() for p in self.parameters()) * factor  # type: ignore[return-value]


def test_layers_learn_slower_the_nearer_they_are_to_the_input() -> None:
    def moved(**options: Any) -> list[float]:
        model = Layered()
        train(model, numbers(1), steps=1, warmup=0, learning_rate=0.1, max_grad_norm=1e30, **options)
        return [-p.item() for p in model.parameters()]

    assert moved(layer_decay=0.5) == pytest.approx([0.0125, 0.025, 0.05, 0.1], rel=1e-5)
    assert moved() == pytest.approx([0.1] * 4, rel=1e-5)
    with pytest.raises(ValueError, match="numbered layer"):
        layered_groups(tiny(), 0.1, 0.5)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("bert.embeddings.LayerNorm.weight", 0), ("backbone.embeddings.cls_token", 0),
        ("bert.encoder.layer.3.output.dense.weight", 4), ("model.layers.0.mlp.up_proj.weight", 1),
        ("blocks.11.norm1.weight", 12), ("transformer.h.2.ln_1.weight", 3), ("layernorm.weight", 13),
        ("head.bias", 13), ("classifier.dense.weight", 13), ("model.embed_tokens.weight", 0),
    ],
)  # fmt: skip
def test_depth_by_name(name: str, depth: int) -> None:
    assert depth_of(name, 12) == depth


def few() -> Iterator[dict[str, Tensor]]:
    yield from separable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"batches": few()}, "ended after 4 of 10 steps"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "no parameter requires a gradient"),
        ({"steps": 0}, "steps"),
        ({"warmup": 11}, "warmup"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"eval_at": [5]}, "needs evaluate"),
        ({"eval_at": [11], "evaluate": lambda model: {"loss": 0.0}}, "eval_at"),
        ({"sample_at": [5]}, "needs sample"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "float16"}, "precision"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
    ],
)
def test_train_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": tiny(), "batches": separable(), "steps": 10, "learning_rate": 0.1}
    assert len(train(**arguments).losses) == 10
    with pytest.raises(ValueError, match=message):
        train(**arguments | change)


def test_a_model_without_a_loss_is_named() -> None:
    class Silent(Tiny):
        def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x, labels).logits)

    with pytest.raises(TypeError, match="without a scalar loss"):
        train(Silent(), separable(), steps=1, warmup=0, learning_rate=0.1)


def test_bfloat16_is_for_the_forward_pass_only() -> None:
    kinds: list[torch.dtype] = []

    class Watching(Tiny):
        def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
            kinds.append(self.linear(x).dtype)
            return super().forward(x, labels)

    watch: Callable[..., Curve] = lambda **options: seeded(model=Watching(), steps=2, warmup=0, **options)  # noqa: E731
    assert watch(precision="bfloat16").losses != watch().losses
    assert kinds == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_evaluation_counts_rows_and_not_batches() -> None:
    model, (whole,) = tiny(), separable(count=1, rows=20)
    parts = [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]
    modes = [module.training for module in model.modules()]
    loss, accuracy, macro_f1 = evaluate_classifier(model, [whole])
    assert classifier_metrics(model, [whole]) == {"loss": loss, "accuracy": accuracy, "macro_f1": macro_f1}
    assert evaluate_classifier(model, parts) == pytest.approx((loss, accuracy, macro_f1))
    assert [module.training for module in model.modules()] == modes
    per_batch = [evaluate_classifier(model, [part])[0] for part in parts]
    assert sum(per_batch) / 2 != pytest.approx(loss)  # the mean over batches is another number
    logits = model.linear(whole["x"])  # no dropout
    guess, labels = logits.argmax(dim=1), whole["labels"]
    assert accuracy == pytest.approx(float((guess == labels).float().mean()))
    f1 = []
    for c in range(3):
        hits = int(((guess == c) & (labels == c)).sum())
        f1.append(2 * hits / (int((guess == c).sum()) + int((labels == c).sum())))
    assert macro_f1 == pytest.approx(sum(f1) / 3)


def test_evaluation_needs_batches_with_labels() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_classifier(tiny(), [])
    with pytest.raises(ValueError, match="labels"):
        evaluate_classifier(tiny(), [{"x": torch.ones(1, 4)}])


def test_a_curve_without_evaluations() -> None:
    empty = Curve([1.0, 2.0], [], [], [])
    assert empty.final is None and empty.seconds == 0.0
    assert Curve([1.0, 2.0], [Evaluation(2, {"loss": 1.0})], [0.1], []).mean_loss == 1.5

"""Classification and regression of texts and pairs: rows, errors before any training, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cntlora.recipes.text.classification import RECIPES, PairsSettings, SequenceTask, TextSettings
from cntlora.recipes.text.scores import SCORES, evaluate_sequences

Make = Callable[..., Any]


def tiny_task(settings: Any, folder: Path) -> SequenceTask:
    recipe = RECIPES[settings.name]
    task: Any = recipe.make(recipe.tiny(settings, folder))
    return task


SETTINGS = [
    TextSettings(model="x", data="y"),
    TextSettings(model="x", data="y", kind="regression"),
    PairsSettings(model="FacebookAI/roberta-large", data="y", first="q", second="a"),
    PairsSettings(model="x", data="y", kind="regression", label="score"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.name}-{s.kind}")
def test_every_kind_learns_its_tiny_rows(settings: Any, tmp_path: Path) -> None:
    task = tiny_task(settings, tmp_path)
    task.check()
    model = task.build_model(0)
    held_out = task.eval_batches()
    before = task.evaluate(model, held_out)
    assert list(before) == list(task.metrics)
    assert task.main_metric in before
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.eval()  # no dropout
    for _ in range(15):
        for batch in task.train_batches(0):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.evaluate(model.train(), held_out)
    assert after["loss"] < before["loss"]
    assert model.training
    assert after[task.main_metric] > 0.5


def test_seed_draws_head_and_order_and_nothing_else(tmp_path: Path) -> None:
    task = tiny_task(SETTINGS[0], tmp_path)
    state = torch.get_rng_state()
    one, same, other = (task.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    new = {"classifier.weight", "bert.pooler.dense.weight"}  # what the checkpoint of a masked language model lacks
    assert {name for name in one if not torch.equal(one[name], other[name])} == new

    def order(seed: int) -> list[list[int]]:
        return [row for batch in task.train_batches(seed) for row in batch["input_ids"].tolist()]

    assert order(0) == order(0) != order(1)
    assert torch.equal(state, torch.get_rng_state())


def test_the_architecture_follows_the_models_name(tmp_path: Path) -> None:
    names = [type(tiny_task(s, tmp_path / str(i)).build_model(0)).__name__ for i, s in enumerate(SETTINGS[1:3])]
    assert names == ["BertForSequenceClassification", "RobertaForSequenceClassification"]


def test_a_head_for_another_number_of_classes_is_replaced(tmp_path: Path) -> None:
    task = tiny_task(SETTINGS[0], tmp_path)
    task.build_model(0).save_pretrained(tmp_path / "two")
    task.tokenizer.save_pretrained(tmp_path / "two")
    rows = "".join(f"t{i},{i % 3}\n" for i in range(30))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    settings = TextSettings(model=str(tmp_path / "two"), data=str(tmp_path / "rows.csv"), eval_size=6)
    model: Any = RECIPES["text"].make(settings).build_model(0)
    assert model.classifier.out_features == 3


# --- the user's own rows ------------------------------------------------------------------------------------


def rows(folder: Path, content: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


GOOD = [{"text": f"t{i}", "label": i % 2} for i in range(10)]


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        (lambda good: [{**row, "label": "yes"} for row in good], {}, ["column 'label'", "one class only", "'yes'"]),
        (lambda good: [{**row, "label": 2} for row in good], {"kind": "regression"}, ["one number only"]),
        (lambda good: [*good, {"text": "", "label": 0}], {}, ["row 11", "'text'"]),
        (lambda good: [*good, {"text": "x", "label": "high"}], {"kind": "regression"}, ["row 11", "'high'", "number"]),
        (lambda good: [{"body": "x", "label": 0}], {}, ["no column 'text'", "body, label"]),
        (lambda good: good, {"eval_size": 10}, ["10 rows", "--set task.eval_size=2", "task.eval_data"]),
        (lambda good: [*good, {"text": "x", "label": 7}], {}, ["eval_size=4", "rarest class is '7' with 1"]),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, change: Make, options: dict[str, Any], parts: list[str]) -> None:
    settings = TextSettings(model=str(tmp_path), data=rows(tmp_path, change(GOOD)), **{"eval_size": 4, **options})
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        RECIPES["text"].make(settings).check()
    for part in [str(tmp_path / "rows.jsonl"), *parts]:
        assert part in str(error.value)


def test_held_out_rows_of_their_own_keep_the_classes(tmp_path: Path) -> None:
    held_out = rows(tmp_path, [{"text": "z", "label": 1}], "held.jsonl")
    settings = TextSettings(model="x", data=rows(tmp_path, GOOD), eval_data=held_out)
    task: Any = RECIPES["text"].make(settings)
    train, kept = task.tables
    assert (len(train), kept.labels, kept.names) == (10, [1], ["0", "1"])
    other = rows(tmp_path, [{"text": "z", "label": 1}, {"text": "z", "label": 5}], "held.jsonl")
    with pytest.raises(ValueError, match="row 2: class '5' is not in"):
        _ = RECIPES["text"].make(TextSettings(model="x", data=settings.data, eval_data=other)).tables  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "task.data: task 'text' needs it"),
        ({"model": None}, "task.model: task 'text' needs it"),
        ({"kind": "regresion"}, "regression"),
        ({"batch_size": 0}, "task.batch_size: expected at least 1"),
    ],
)
def test_settings_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSettings(**{"model": "x", "data": "y", **options})


@pytest.mark.parametrize(("model", "parts"), [("no/such", ["'no/such'"]), ("sample:minilmm", ["minilm"])])
def test_a_model_that_is_not_there_is_named_before_training(tmp_path: Path, model: str, parts: list[str]) -> None:
    settings = TextSettings(model=model, data=rows(tmp_path, GOOD), eval_size=4)
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        RECIPES["text"].make(settings).check()
    assert all(part in str(error.value) for part in parts)


def test_a_sample_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="sample:pairs"):
        RECIPES["pairs"].make(PairsSettings(model="x", data="sample:pair")).check()


# --- scores -------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """Gives its input as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = x * self.weight
        if logits.shape[1] == 1:
            loss = (logits[:, 0] - labels).square().mean()
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def test_scores_count_rows_and_not_batches() -> None:
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(20, 2, generator=g), torch.randint(0, 2, (20,), generator=g)
    whole, parts = [{"x": x, "labels": labels}], [{"x": x[a:b], "labels": labels[a:b]} for a, b in ((0, 3), (3, 20))]
    names = ("accuracy", "f1", "macro_f1", "matthews")
    scores = evaluate_sequences(Echo(), whole, names)
    assert evaluate_sequences(Echo(), parts, names) == pytest.approx(scores)
    guess = x.argmax(dim=1)
    hits, false, missed = (int(v.sum()) for v in (guess & labels, guess & ~labels & 1, ~guess & 1 & labels))
    assert scores["f1"] == pytest.approx(2 * hits / (2 * hits + false + missed))
    assert scores["accuracy"] == pytest.approx(1 - (false + missed) / 20)
    right = 20 - hits - false - missed
    root = ((hits + false) * (hits + missed) * (right + false) * (right + missed)) ** 0.5
    assert scores["matthews"] == pytest.approx((hits * right - false * missed) / root)


def test_regression_scores_are_correlations_of_the_logit() -> None:
    truth, guess = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 9.0, 3.0])
    batches = [{"x": guess[:, None], "labels": truth}]
    scores = evaluate_sequences(Echo(), batches, ("pearson", "spearman"), regression=True)
    assert scores["spearman"] == pytest.approx(0.8)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert scores["loss"] == pytest.approx(float((truth - guess).square().mean()))
    assert scores["pearson"] != pytest.approx(scores["spearman"])


def test_a_correlation_that_is_undefined_counts_as_none() -> None:
    for name in ("pearson", "spearman"):
        assert SCORES[name]([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == 0.0
        assert SCORES[name]([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)


def test_scores_need_labelled_batches() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_sequences(Echo(), [], ())
    with pytest.raises(ValueError, match="labels"):
        evaluate_sequences(Echo(), [{"x": torch.ones(1, 2)}], ())

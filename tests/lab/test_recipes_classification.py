"""Classification and regression of texts and pairs: rows, errors before any training, scores."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from tests.conftest import RunFresh
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from cntlora import InitConfig, initialize, save_adapter
from cntlora.lab.recipes.loading import load_classifier, load_tokenizer
from cntlora.lab.recipes.text.classification import RECIPES, PairsSettings, SequenceTask, TextSettings
from cntlora.lab.recipes.text.scores import SCORES, evaluate_sequences
from cntlora.lab.recipes.text.tiny import tiny_encoder

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


def lora_of(task: Any) -> LoraConfig:
    return LoraConfig(r=4, task_type=task.peft_type, modules_to_save=list(task.modules_to_save))


NAMES_AND_GUESSES = """
import json
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, adapter, *texts = sys.argv[1:]
labels = json.load(open(f"{adapter}/id2label.json"))
id2label = {int(i): name for i, name in labels["id2label"].items()}
model = AutoModelForSequenceClassification.from_pretrained(base, id2label=id2label, label2id=labels["label2id"])
model = PeftModel.from_pretrained(model, adapter).eval()
batch = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    guesses = model(**batch).logits.argmax(-1).tolist()
print(json.dumps([model.config.id2label[i] for i in guesses]))
"""


@pytest.mark.slow
def test_a_fresh_process_knows_the_names_of_the_classes(tmp_path: Path, run_fresh: RunFresh) -> None:
    """The rows come with the class that is last by name, so that an order of appearance would be the other one."""
    tiny = RECIPES["text"].tiny(SETTINGS[0], tmp_path)
    said = {"a good day": "wonderful", "such a fine day": "fine", "a bad day": "awful"}
    data = rows(tmp_path, [{"text": text, "label": label} for text, label in said.items()] * 10, "named.jsonl")
    task: Any = RECIPES["text"].make(dataclasses.replace(tiny, data=data, eval_size=6))
    task.check()
    assert task.describe() == "classes: 0 = awful, 1 = fine, 2 = wonderful (8, 8, 8 rows); 6 rows held out"
    model: Any = get_peft_model(task.build_model(0), lora_of(task))
    initialize(model, task.train_batches(0), InitConfig(method="self", num_batches=2), progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        for batch in task.train_batches(0):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    task.save(model, tmp_path / "adapter")
    found = json.loads((tmp_path / "adapter" / "id2label.json").read_text())
    names = {"awful": 0, "fine": 1, "wonderful": 2}
    assert found == {"id2label": {str(i): name for name, i in names.items()}, "label2id": names}
    assert "| Classes | 0 = awful, 1 = fine, 2 = wonderful; " in (tmp_path / "adapter" / "README.md").read_text()
    printed = run_fresh(NAMES_AND_GUESSES, tiny.model, tmp_path / "adapter", *said, block=True)
    assert json.loads(printed.splitlines()[-1]) == list(said.values())
    swapped = {"id2label": {"0": "wonderful", "1": "fine", "2": "awful"}, "label2id": {}}
    (tmp_path / "adapter" / "id2label.json").write_text(json.dumps(swapped))  # the control: the file decides
    printed = run_fresh(NAMES_AND_GUESSES, tiny.model, tmp_path / "adapter", *said, block=True)
    assert json.loads(printed.splitlines()[-1]) == list(said.values())[::-1]


SIZES: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.3}
CHECKPOINTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bert": (
        lambda: BertForMaskedLM(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **SIZES)
        ),
        ("bert.pooler.dense",),
    ),
    "deberta-v2": (
        lambda: DebertaV2ForMaskedLM(
            DebertaV2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **SIZES)
        ),
        ("pooler.dense",),
    ),
    "roberta": (
        lambda: RobertaForMaskedLM(
            RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **SIZES)
        ),
        (),  # PEFT saves all of `classifier`
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_all_that_is_new_in_a_classifier_is_saved(tmp_path: Path, kind: str) -> None:
    """A layer between the backbone and the head that no file holds would be another one in every process."""
    make, new = CHECKPOINTS[kind]
    tiny_encoder("bert", tmp_path / kind, ["a good day"])
    make().save_pretrained(tmp_path / kind)
    built, found = load_classifier(str(tmp_path / kind), ["a", "b", "c"], 0, load_tokenizer(str(tmp_path / kind))[1])
    assert found == new
    batch = {"input_ids": torch.tensor([[5, 7, 9, 11]])}
    for name, saved in (("whole", new), ("without", ())):
        options = LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=list(saved) or None)
        model: Any = get_peft_model(copy.deepcopy(built), options).eval()
        initialize(model, None, InitConfig(method="pissa"), progress=False)
        save_adapter(model, tmp_path / name)
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind, num_labels=3)
        loaded: Any = PeftModel.from_pretrained(base, tmp_path / name).eval()
        with torch.no_grad():
            apart = float((model(**batch).logits - loaded(**batch).logits).abs().max())
        assert apart < 1e-4 if saved == new else apart > 1e-3  # the control: what is not saved is another one


def test_a_regressor_names_no_classes(tmp_path: Path) -> None:
    task = tiny_task(SETTINGS[1], tmp_path)
    assert task.describe() == "labels: numbers from 0 to 1.875 (16 rows); 8 rows held out"
    model: Any = get_peft_model(task.build_model(0), LoraConfig(r=4, task_type="SEQ_CLS"))
    task.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "id2label.json").exists()


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


def test_a_column_that_is_not_there_comes_with_the_setting_that_names_it(tmp_path: Path) -> None:
    data = rows(tmp_path, GOOD)
    for settings, said in (
        (PairsSettings(model="x", data=data), r"no column 'first'; .*; name yours with task\.first$"),
        (PairsSettings(model="x", data=data, first="text"), r"no column 'second'; .*; name yours with task\.second$"),
        (TextSettings(model="x", data=data, label="stars"), r"no column 'stars'; .*; name yours with task\.label$"),
    ):
        with pytest.raises(ValueError, match=said):
            RECIPES[settings.name].make(settings).check()


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

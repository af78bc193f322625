"""GLUE from files: the eight tasks, their columns, labels and official scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cntlora.lab.recipes.text.glue import GLUE, RECIPES, GlueSettings, load_tables

RECIPE = RECIPES["glue"]
MAIN = {
    "cola": "matthews", "mnli": "accuracy", "mrpc": "accuracy", "qnli": "accuracy",
    "qqp": "accuracy", "rte": "accuracy", "sst2": "accuracy", "stsb": "pearson",
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_every_task_gives_its_scores_on_a_tiny_roberta(name: str, tmp_path: Path) -> None:
    task: Any = RECIPE.make(RECIPE.tiny(GlueSettings(task=name), tmp_path))
    task.check()
    model = task.build_model(0)
    assert type(model).__name__ == "RobertaForSequenceClassification"
    assert model.config.num_labels == max(1, len(GLUE[name].names))
    assert float(model(**next(iter(task.train_batches(0)))).loss.detach()) > 0
    scores = task.evaluate(model, task.eval_batches())
    assert list(scores) == ["loss", *GLUE[name].scores] == list(task.metrics)
    assert task.main_metric == MAIN[name]
    assert bool(task.tables[0].seconds) == (name not in ("cola", "sst2"))


def test_labels_may_be_names_or_indices_and_published_columns_are_known(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    header = "index\tsentence1\tsentence2\tlabel\n"
    (tmp_path / "train.tsv").write_text(header + "0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n")
    (tmp_path / "dev.tsv").write_text(header + "0\te\tf\t0\n")
    train, held_out = load_tables(GlueSettings(task="rte", data=str(tmp_path)))
    assert (train.texts, train.seconds, train.labels) == (["a", "c"], ["b", "d"], [1, 0])
    assert (held_out.labels, held_out.names) == ([0], ["entailment", "not_entailment"])
    frame = pd.DataFrame({"Quality": ["1"], "#1 String": ["a"], "#2 String": ["b"]})
    for split in ("train", "validation"):
        (tmp_path / "mrpc").mkdir(exist_ok=True)
        frame.to_parquet(tmp_path / "mrpc" / f"{split}-00000-of-00001.parquet")
    train, _ = load_tables(GlueSettings(task="mrpc", data=str(tmp_path)))
    assert (train.texts, train.seconds, train.labels) == (["a"], ["b"], [1])


def test_a_quote_in_a_published_file_is_a_letter(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text('sentence\tlabel\n"good\t1\nbad"\t0\n')
    train, _ = load_tables(GlueSettings(task="sst2", data=str(tmp_path)))
    assert (train.texts, train.labels) == (['"good', 'bad"'], [1, 0])


def test_mnli_is_scored_on_the_matched_rows(tmp_path: Path) -> None:
    settings = RECIPE.tiny(GlueSettings(task="mnli"), tmp_path)
    (tmp_path / "mnli" / "validation_mismatched.jsonl").write_text('{"premise": "x"}\n')  # would be an error
    assert len(load_tables(settings)[1]) == 8


def test_hub_names_a_configuration_and_a_split_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, configuration: str, split: str) -> Any:
        calls.append((name, configuration, split))
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, held_out = load_tables(GlueSettings(task="cola", eval_size=1))
    assert calls == [("nyu-mll/glue", "cola", "train"), ("nyu-mll/glue", "cola", "validation")]
    assert (train.labels, held_out.labels) == ([0, 1], [0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"sentence": "a", "label": -1}', "row 1: expected a label from 0 to 1 or one of unacceptable, acceptable"),
        ('{"sentence": "a", "label": 2}', "row 1: expected a label"),
        ('{"text": "a", "label": 1}', "no column 'sentence'; its columns are: text, label"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: str, message: str) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load_tables(GlueSettings(task="cola", data=str(tmp_path)))
    assert "train.jsonl" in str(error.value)


def test_a_folder_without_a_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\*\.parquet.*GLUE's qnli"):
        load_tables(GlueSettings(task="qnli", data=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"task": "mrcp"}, "mrpc"), ({"eval_size": 0}, "task.eval_size"), ({"data": ""}, "task.data")],
)
def test_settings_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlueSettings(**options)

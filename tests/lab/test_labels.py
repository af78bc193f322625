"""Columns of classes in the user's own tables: what is one class, what is refused, and what is told."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cntlora.lab.recipes.labels import class_column, describe_classes, known_classes, warn_alike
from cntlora.lab.recipes.text.classification import RECIPES, TextSettings
from cntlora.lab.recipes.text.sentiment import TweetsSettings, make_task
from cntlora.lab.recipes.text.tables import label_line, read_table
from cntlora.lab.recipes.vision.images import _published_labels


def table(folder: Path, labels: Sequence[Any], name: str = "rows.jsonl") -> Path:
    """A table with a text and a label a row, the values as they are (.jsonl, .parquet) or as text (.csv)."""
    path = folder / name
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        read_table(path, label="label", **options)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


REALS = [round(0.37 * i + 0.013, 3) for i in range(60)]
STARS = [f"{1 + i % 5}.0" for i in range(60)]
HALVES = [1 + 0.5 * (i % 9) for i in range(60)]


# --- a class a row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_column_of_real_numbers_is_no_column_of_classes(tmp_path: Path, name: str) -> None:
    message = refused(table(tmp_path, REALS, name))
    assert "column 'label' has 60 different numbers in 60 rows" in message
    assert "regression: --set task.kind=regression" in message
    kept = read_table(tmp_path / name, label="label", regression=True)  # the cure
    assert kept.values == pytest.approx(REALS) and not kept.labels
    assert label_line(kept) == "labels: numbers from 0.013 to 21.843 (60 rows)"
    assert label_line(kept.take([0])) == "labels: numbers from 0.013 to 0.013 (1 row)"


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (STARS, 5),
        (HALVES, 9),
        (list(range(40)) * 2, 40),  # many classes, but rows enough for each
        (list("ab"), 2),
        ([0.5, 1.5], 2),
        ([f"topic {i % 77}" for i in range(154)], 77),
    ],
)
def test_classes_stay_classes(tmp_path: Path, labels: list[Any], classes: int) -> None:
    found = read_table(table(tmp_path, labels), label="label")
    assert len(found.names) == classes and not found.values


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([f"id-{i}" for i in range(60)], ["60 different values in 60 rows", "name the column of the classes"]),
        ([f"id-{i // 2 if i < 10 else i}" for i in range(60)], ["55 different values in 60 rows"]),
        (list(range(60)), ["60 different numbers in 60 rows", "--set task.kind=regression"]),
        ([i / 10 for i in range(30)] * 20, ["30 different numbers in 600 rows", "--set task.kind=regression"]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], ["5 different numbers in 5 rows"]),
    ],
)
def test_nearly_a_class_a_row_is_refused(tmp_path: Path, labels: list[Any], parts: list[str]) -> None:
    message = refused(table(tmp_path, labels))
    assert all(part in message for part in parts)
    assert ("regression" in message) == ("numbers" in message)


def test_every_command_says_its_own_way_to_regression(tmp_path: Path) -> None:
    path = table(tmp_path, REALS)
    assert "regression: --task regression" in refused(path, instead="--task regression")
    assert "regression" not in refused(path, instead=None)  # images
    with pytest.raises(ValueError, match=r"--set task.name=text --set task.kind=regression"):
        make_task(TweetsSettings(data=str(path))).check()
    with pytest.raises(ValueError, match=r"60 different numbers in 60 rows.*--set task.kind=regression"):
        RECIPES["text"].make(TextSettings(model="none/such", data=str(path))).check()
    with pytest.raises(ValueError, match="one class only, 'a'"):
        make_task(TweetsSettings(data=str(table(tmp_path, ["a", "a"])))).check()


def test_held_out_rows_may_have_one_of_a_class(tmp_path: Path) -> None:
    names = [f"topic {i}" for i in range(20)]
    data, held_out = table(tmp_path, names * 3), table(tmp_path, names, "held.csv")
    task: Any = RECIPES["text"].make(TextSettings(model="x", data=str(data), eval_data=str(held_out)))
    assert len(task.tables[1]) == 20
    refused(held_out)  # the control


# --- rows without a label -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), "nan", "NaN", "", "  ", "null", "<NA>"])
def test_a_cell_without_a_label_is_no_class(tmp_path: Path, missing: Any) -> None:
    labels = ["good", "bad"] * 10
    labels[3] = labels[7] = labels[12] = missing
    message = refused(table(tmp_path, labels))
    assert "3 rows (4, 8, 13) of 20 have nothing in column 'label'" in message and "remove" in message
    labels[7] = labels[12] = "good"
    assert ": row 4 has nothing in column 'label'" in refused(table(tmp_path, labels))


def test_keys_that_are_missing_and_words_among_numbers_are_cells_without_a_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c"}\n')
    assert ": row 3 has nothing" in refused(path)
    assert "2 rows (3, 4) of 6 have nothing in column 'label' but 'NA'" in refused(
        table(tmp_path, [0, 1, "NA", "NA", 1, 0])
    )
    found = read_table(table(tmp_path, ["NA", "none", "EU", "NA"]), label="label")  # words among words are names
    assert found.names == ["EU", "NA", "none"]
    assert read_table(table(tmp_path, [0, 1, "other", 1]), label="label").names == ["0", "1", "other"]
    assert "expected text or a number in column 'label', got list" in refused(table(tmp_path, [["a"], ["b"]]))


# --- one class, or two --------------------------------------------------------------------------------------


def test_blanks_around_a_name_do_not_count(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, ["pos", " pos", "neg ", "neg\u00a0"], "rows.csv"), label="label")
    assert (found.names, found.labels) == (["neg", "pos"], [1, 1, 0, 0])


def test_names_that_differ_in_case_or_blanks_are_told(tmp_path: Path) -> None:
    path = table(tmp_path, ["Pos", "pos", "pos", "neg"])
    with pytest.warns(UserWarning, match=r"'Pos' \(1 rows\) and 'pos' \(2 rows\) differ in case or blanks only"):
        assert read_table(path, label="label").names == ["Pos", "neg", "pos"]
    with pytest.warns(UserWarning, match=r"'True' \(1 rows\) and 'true'"):
        read_table(table(tmp_path, [True, "true", False]), label="label")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_table(table(tmp_path, ["pos", "neg", True]), label="label")  # the control
        warn_alike(Counter("abc"), "x")


def test_a_number_in_two_spellings_is_refused_and_of_two_kinds_is_one(tmp_path: Path) -> None:
    assert "'1' (2 rows) and '1.0' (1 row)" in refused(table(tmp_path, ["1", "1.0", "2", "1"], "rows.csv"))
    assert "'001' (1 row) and '1' (1 row)" in refused(table(tmp_path, ["001", "1", "2"], "rows.csv"))
    kinds = read_table(table(tmp_path, [1, "1", 1.0, 2]), label="label")
    assert (kinds.names, kinds.labels) == (["1", "2"], [0, 0, 0, 1])
    floats = read_table(table(tmp_path, [3.0, 1.0, 10.0], "rows.parquet"), label="label")
    assert floats.names == ["1", "3", "10"]
    stars = read_table(table(tmp_path, ["10.0", "2.0"] * 3, "rows.csv"), label="label")
    assert stars.names == ["2.0", "10.0"]


# --- tables -------------------------------------------------------------------------------------------------


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label,label\na,1,2\nb,2,1\n")
    assert "column 'label' is there 2 times" in refused(tmp_path / "rows.csv")
    (tmp_path / "rows.tsv").write_text("\ufefflabel\ttext\tlabel\n1\ta\t2\n")
    assert "column 'label' is there 2 times" in refused(tmp_path / "rows.tsv")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1, "label": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2: column 'label' is there 2 times"):
        read_table(tmp_path / "rows.jsonl", label="label")


def test_text_and_label_are_two_columns(tmp_path: Path) -> None:
    path = table(tmp_path, ["a", "b"])
    for more in ({"text": "label"}, {"second": "label"}):
        assert "column 'label' is named" in refused(path, **more)
    with pytest.raises(ValueError, match="column 'text' is named"):
        read_table(path, second="text")


def test_a_byte_order_mark_is_no_letter_of_a_name(tmp_path: Path) -> None:
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        (tmp_path / name).write_text(f"\ufefflabel{mark}text\n1{mark}a\n2{mark}b\n")
        assert read_table(tmp_path / name, label="label").names == ["1", "2"]


def test_pythons_own_way_to_write_numbers_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, ["1.5", "1_000"], "rows.csv")
    assert "row 2: expected a number in column 'label', got '1_000'" in refused(path, regression=True)


# --- published data sets ------------------------------------------------------------------------------------


def dataset(labels: Sequence[Any], names: list[str] | None = None) -> Any:
    import datasets

    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features)


def test_a_published_data_set_keeps_the_names_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset([1, 0, 1], ["world", "business"]))
    found = read_table("owner/name", label="label")
    assert (found.names, found.labels) == (["world", "business"], [1, 0, 1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset([1, -1, -1], ["world", "business"]))
    with pytest.raises(
        ValueError, match=r"expected a class from 0 to 1 \(world, business\), got -1 in 2 rows \(2, 3\)"
    ):
        read_table("owner/name", label="label")


def test_splits_agree_by_the_names_of_their_classes() -> None:
    where = ["o/n#train", "o/n#test"]
    swapped = [dataset([0, 1], ["cat", "dog"]), dataset([0, 1], ["dog", "cat"])]
    assert _published_labels(swapped, "label", where) == (["cat", "dog"], [[0, 1], [1, 0]])
    assert _published_labels([dataset([5, 7, 5]), dataset([7])], "label", where) == (["5", "7"], [[0, 1, 0], [1]])
    with pytest.raises(ValueError, match="o/n#test: row 2: class '9' is not in o/n#train, whose classes are: 5, 7"):
        _published_labels([dataset([5, 7, 5]), dataset([7, 9])], "label", where)
    with pytest.raises(ValueError, match="got -1 in row 1"):
        _published_labels([dataset([0, 1], ["cat", "dog"]), dataset([-1], ["cat", "dog"])], "label", where)


def test_indices_and_names_are_told_in_one_line() -> None:
    assert describe_classes(["bad", "good"], [1, 0, 1]) == "0 = bad, 1 = good (1, 2 rows)"
    many = describe_classes([f"c{i}" for i in range(30)], list(range(30)))
    assert "19 = c19, and 10 more" in many and "\n" not in many
    assert class_column(np.array([2, 1, 2]).tolist(), "y", "here") == ([1, 0, 1], ["1", "2"])
    assert known_classes([1, 0], ["a", "b"], "y", "here") == [1, 0]

"""The text recipe: tables from files, and batches; real model and data under `packages`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from cntlora.lab.recipes.text.tables import Table, by_length, encode_batches, read_table, shuffled

WORDS = ["<pad>", "<unk>", "a", "b", "c", "d"]


def tokenizer(side: str = "right", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word: <pad> 0, <unk> 1, a 2, b 3, c 4, d 5."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token=pad, padding_side=side)


# --- tables -------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'body,kind\n"one, ""two""",no\nNA,yes\n'),
        ("t.tsv", 'body\tkind\n"one, ""two"""\tno\nNA\tyes\n'),
        ("t.jsonl", '{"kind": "no", "body": "one, \\"two\\""}\n\n{"kind": "yes", "body": "NA"}\n'),
    ],
)
def test_every_format_gives_the_same_table(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, name, content)
    expected = ['one, "two"', "NA"]
    assert read_table(path, text="body", label="kind") == Table(expected, [0, 1], ["no", "yes"])
    assert read_table(str(path), text="body") == Table(expected, [], [])


def test_txt_has_a_text_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "t.txt", "\ufefffirst, line\r\n\r\n  second\u2028still second \n")
    assert read_table(path) == Table(["first, line", "second\u2028still second"], [], [])


def test_whole_numbers_are_classes_in_the_order_of_their_value(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", "".join(f'{{"text": "x", "y": {y}}}\n' for y in (10, 2, -1, 2)))
    table = read_table(path, label="y")
    assert (table.labels, table.names) == ([2, 1, 0, 1], ["-1", "2", "10"])


@pytest.mark.parametrize(
    ("name", "content", "arguments", "parts"),
    [
        ("t.csv", "body,kind\nx,y\n", {}, ["'text'", "body, kind"]),
        ("t.csv", "text,kind\nx,y\n", {"label": "class"}, ["'class'", "text, kind"]),
        ("t.csv", "", {}, ["no rows"]),
        ("t.csv", "text\n", {}, ["no rows"]),
        ("t.txt", "\n\n", {}, ["no rows"]),
        ("t.csv", "text,y\nhello, world,1\n", {"label": "y"}, ["quote"]),
        ("t.csv", 'text,y\n"open,1\n', {"label": "y"}, ["quote"]),
        ("t.csv", "text,y\na,1\nb\n", {"label": "y"}, ["row 2", "'y'"]),
        ("t.csv", "text,y\n ,1\n", {}, ["row 1", "'text'"]),
        ("t.jsonl", '{"text": "a"}\n{"text": \n', {}, ["line 2", "JSON"]),
        ("t.jsonl", '["a"]\n', {}, ["line 1", "list"]),
        ("t.jsonl", '{"text": "a"}\n{"text": null}\n', {}, ["row 2"]),
        ("t.jsonl", '{"text": ["a"]}\n', {}, ["row 1", "list"]),
        ("t.txt", "a\n", {"label": "y"}, [".txt", "'y'"]),
        ("t.csv", b"text\ncaf\xe9\n", {}, ["UTF-8"]),
        ("t.xlsx", "x", {}, [".csv, .tsv, .jsonl, .parquet, .txt"]),
        ("t.parquet", "x", {}, ["parquet"]),
        ("t.txt", "a\n", {"second": "z"}, [".txt", "'z'"]),
        ("t.csv", "text,z\na,b\na,\n", {"second": "z"}, ["row 2", "'z'"]),
        ("t.csv", "text,y\na,1.5\na,much\n", {"label": "y", "regression": True}, ["row 2", "'y'", "'much'"]),
        ("t.csv", "text,y\na,nan\n", {"label": "y", "regression": True}, ["row 1", "'nan'"]),
    ],
)
def test_table_errors_name_file_and_cause(
    tmp_path: Path, name: str, content: str | bytes, arguments: dict[str, Any], parts: list[str]
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        read_table(path, **arguments)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        read_table(tmp_path / "absent.csv")


def test_pairs_and_numbers_stay_with_their_text(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "text,z,y\na,b,1\nc,d,2.5\n")
    table = read_table(path, label="y", second="z", regression=True)
    assert table == Table(["a", "c"], [], [], ["b", "d"], [1.0, 2.5])
    assert table.take([1]) == Table(["c"], [], [], ["d"], [2.5])
    assert read_table(path, label="y", second="z") == Table(["a", "c"], [0, 1], ["1", "2.5"], ["b", "d"])
    many = Table([f"t{i}" for i in range(20)], [], [], [f"s{i}" for i in range(20)], [float(i) for i in range(20)])
    for part in (shuffled(many, 1), *many.split(5, 0)):
        assert all(t[1:] == s[1:] == f"{v:.0f}" for t, s, v in zip(part.texts, part.seconds, part.values, strict=True))


def test_short_rows_come_first_by_both_texts() -> None:
    table = Table(["aaa", "a", "aa"], [0, 1, 0], ["x", "y"], ["a", "aaaaa", "a"])
    assert by_length(table).texts == ["aa", "aaa", "a"]
    assert by_length(Table(table.texts, table.labels, table.names)).texts == ["a", "aa", "aaa"]


def test_parquet_is_read_and_lists_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": ["a", "b"], "y": [3, 1], "many": [["a"], ["b", "c"]]}).to_parquet(path)
    assert read_table(path, label="y") == Table(["a", "b"], [1, 0], ["1", "3"])
    with pytest.raises(ValueError, match="row 1: expected text in column 'many'"):
        read_table(path, text="many")


def test_a_hub_name_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_table("owner/name:plain#test", label="label") == Table(["a", "b"], [0, 1], ["0", "1"])
    assert read_table("owner/name").texts == ["a", "b"]
    assert calls == [(("owner/name", "plain"), {"split": "test"}), (("owner/name", None), {"split": "train"})]


def test_a_name_that_is_neither_file_nor_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no such data set\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"data 'data/tweet': there is no such file.*\(no such data set\).*#split"):
        read_table("data/tweet")


def numbered(sizes: tuple[int, ...]) -> Table:
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    return Table([f"{c}-{i}" for i, c in enumerate(labels)], labels, [f"class {c}" for c in range(len(sizes))])


def test_split_is_stratified_disjoint_and_decided_by_the_seed_alone() -> None:
    table = numbered((600, 300, 100))
    state = torch.get_rng_state()
    train_part, held_out = table.split(100, seed=3)
    assert Counter(held_out.labels) == {0: 60, 1: 30, 2: 10}
    assert sorted(train_part.texts + held_out.texts) == sorted(table.texts)
    assert all(int(t[0]) == c for t, c in zip(held_out.texts, held_out.labels, strict=True))
    torch.manual_seed(99)
    assert table.split(100, seed=3) == (train_part, held_out)
    assert table.split(100, seed=4) != (train_part, held_out)
    assert len(table.split(0.25, seed=3)[1]) == 250
    torch.set_rng_state(state)


def test_split_without_labels_and_with_too_few_rows() -> None:
    plain = Table(["a", "b", "c"], [], [])
    assert [len(part) for part in plain.split(1, seed=0)] == [2, 1]
    with pytest.raises(ValueError, match="eval_size=3 of 3 texts"):
        plain.split(3, seed=0)
    with pytest.raises(ValueError, match="eval_size=2"):
        numbered((5, 1)).split(2, seed=0)


def test_shuffled_keeps_rows_together_and_the_global_generator_alone() -> None:
    table, state = numbered((30, 20)), torch.get_rng_state()
    once = shuffled(table, seed=1)
    assert once == shuffled(table, seed=1) != shuffled(table, seed=2)
    assert once.texts != table.texts
    assert sorted(once.texts) == sorted(table.texts)
    assert all(int(t[0]) == c for t, c in zip(once.texts, once.labels, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("extra", [{"seconds": ["a"]}, {"values": [1.0, 2.0, 3.0]}])
def test_table_refuses_columns_of_another_length(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected one for each of 2 texts"):
        Table(["a", "b"], [], [], **extra)


@pytest.mark.parametrize(("labels", "names"), [([0], ["x"]), ([0, 2], ["x", "y"]), ([0, -1], ["x", "y"])])
def test_table_refuses_labels_that_do_not_fit(labels: list[int], names: list[str]) -> None:
    with pytest.raises(ValueError, match="labels: expected"):
        Table(["a", "b"], labels, names)


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding_side_of_the_tokenizer_is_honoured(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    batches = encode_batches(tokenizer(side), ["a b c", "d"], [1, 0], batch_size=2, max_length=8)
    (batch,) = batches
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["labels"].tolist() == [1, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_labels_are_the_tokens_and_ignore_padding_only(side: str) -> None:
    # the padding token also is a word of the text here, as with pad_token = eos_token
    words = tokenizer(side, pad="d")
    (batch,) = encode_batches(words, ["a b d", "d"], None, batch_size=2, max_length=8, causal=True)
    padded = {"right": [5, -100, -100], "left": [-100, -100, 5]}[side]
    assert batch["labels"].tolist() == [[2, 3, 5], padded]
    assert -100 not in batch["input_ids"]


def test_batches_are_read_again_have_a_length_and_cut_long_texts() -> None:
    texts = ["a b c d", "a", "b", "c", "d"]
    batches = encode_batches(tokenizer(), texts, [], batch_size=2, max_length=3)
    first, again = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert [tuple(b["input_ids"].shape) for b in first] == [(2, 3), (2, 1), (1, 1)]
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(first, again, strict=True))
    assert all("labels" not in batch for batch in first)
    fixed = encode_batches(tokenizer(), texts, None, batch_size=2, max_length=6, padding="max_length")
    assert {b["input_ids"].shape[1] for b in fixed} == {6}


def test_pairs_are_encoded_together_and_numbers_are_floats() -> None:
    words = tokenizer()
    (batch,) = encode_batches(words, ["a b", "c"], [0.5, 2.0], seconds=["c", "d"], batch_size=2, max_length=8)
    assert batch["input_ids"].tolist() == [[2, 3, 4], [4, 5, 0]]
    assert (batch["labels"].dtype, batch["labels"].tolist()) == (torch.float32, [0.5, 2.0])
    (single,) = encode_batches(words, ["a b", "c"], [0, 2], batch_size=2, max_length=8)
    assert single["input_ids"].tolist() == [[2, 3], [4, 0]]
    assert single["labels"].dtype == torch.int64


def test_batches_are_tokenised_only_when_read() -> None:
    words, calls = tokenizer(), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return words(*args, **kwargs)

    counting.pad_token = words.pad_token  # type: ignore[attr-defined]
    batches = encode_batches(counting, ["a"] * 100, None, batch_size=1, max_length=4)  # type: ignore[arg-type]
    assert not calls
    next(iter(batches))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "texts"),
        ({"labels": [1]}, "labels"),
        ({"seconds": ["a"]}, "seconds"),
        ({"labels": [1, 0], "causal": True}, "causal"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"padding": "short"}, "longest, max_length"),
        ({"tokenizer": tokenizer(pad=None)}, "pad_token"),
    ],
)
def test_encode_batches_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer(), "texts": ["a", "b"], "labels": None, "batch_size": 2, "max_length": 4
    }  # fmt: skip
    assert len(encode_batches(**arguments)) == 1
    with pytest.raises(ValueError, match=message):
        encode_batches(**arguments | change)


# --- the real model and data --------------------------------------------------------------------------------


@pytest.mark.packages
def test_minilm_and_tweets_are_the_real_ones() -> None:
    """Download 85 MB at the first run."""
    from cntlora.lab.recipes.samples.models import minilm_folder, tweets
    from cntlora.lab.recipes.text.sentiment import make_task

    table = tweets()
    assert [(name, table.labels.count(i)) for i, name in enumerate(table.names)] == [
        ("negative", 14850), ("neutral", 11131), ("positive", 3840)
    ]  # fmt: skip
    assert len(set(table.texts)) == len(table)
    assert json.loads((minilm_folder() / "config.json").read_text())["hidden_size"] == 384

    task = make_task()
    train_part, held_out = task.tables
    assert (len(train_part), len(held_out)) == (28821, 1000)
    assert not set(train_part.texts) & set(held_out.texts)
    state = torch.get_rng_state()
    model, again, other = task.build_model(0), task.build_model(0), task.build_model(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    first = next(iter(task.train_batches(0)))
    assert first["input_ids"].shape[0] == 16
    assert first["input_ids"].shape[1] <= 48

    sentences = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply."]
    (batch,) = encode_batches(task.tokenizer, sentences, None, batch_size=3, max_length=32)
    with torch.no_grad():
        hidden = model.eval().bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    paraphrase, unrelated = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert paraphrase > 0.7
    assert unrelated < 0.3


@pytest.mark.packages
def test_lora_meets_q_k_v_and_the_attention_output_only() -> None:
    from peft import LoraConfig, get_peft_model

    from cntlora.lab.recipes.text.sentiment import TARGET_MODULES, make_task

    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES))
    adapted = get_peft_model(make_task().build_model(0), config)
    names = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    assert len(names) == 4 * 6
    assert all(".attention." in name for name in names)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_may_have_semicolons_or_tabs(tmp_path: Path, separator: str) -> None:
    """As spreadsheets write it where the comma is the decimal point; a comma inside a text is none then."""
    path = written(tmp_path, "t.csv", f'text{separator}y\n"a, b; c"{separator}1\nd{separator}2\n')
    table = read_table(path, label="y")
    assert table.texts == ["a, b; c", "d"] and table.names == ["1", "2"]


def test_a_book_in_one_line_and_other_encodings_are_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its 29,999 characters are one line.*fold -s -w 2000 t\.txt > lines\.txt"):
        read_table(written(tmp_path, "t.txt", "word " * 6000 + "\n"))
    assert len(read_table(written(tmp_path, "t.txt", "word " * 6000 + "\nmore\n"))) == 2  # the control
    for content, says in (
        ("text\ncaf\xe9\n".encode("latin-1"), "byte 8 is 0xe9"),
        ("text\na\n".encode("utf-16"), "UTF-16"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            read_table(written(tmp_path, "t.csv", content))
        assert "iconv -f " in str(error.value) and " > utf8.csv" in str(error.value)

"""Language modelling: what is learned of texts, responses and chats; perplexity, samples, errors before training."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cntlora.lab.recipes.loading import load_tokenizer
from cntlora.lab.recipes.text.language import RECIPES, LanguageSettings, LanguageTask, load_rows, token_loss
from cntlora.lab.recipes.text.tables import IGNORED
from cntlora.lab.recipes.text.tiny import tiny_language_model

RECIPE = RECIPES["language-model"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama."""
    return tiny_language_model(tmp_path_factory.mktemp("llama") / "model", ["a good day", "a bad day"])


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    return load_tokenizer(model)[1]


def written(folder: Path, rows: list[dict[str, Any]] | str, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learned(path: str, tokenizer: Any, max_length: int = 200, **options: Any) -> list[tuple[str, str]]:
    """Each row as text, and what is learned of it."""
    settings = LanguageSettings(model="x", data=path, max_length=max_length, **options)
    rows = load_rows(settings, path, tokenizer)
    kept = [[token for token in row.labels if token != IGNORED] for row in rows]
    return [(tokenizer.decode(row.input_ids), tokenizer.decode(part)) for row, part in zip(rows, kept, strict=True)]


# --- what is learned ----------------------------------------------------------------------------------------


def test_a_text_is_learned_whole_with_its_end(tmp_path: Path, tokenizer: Any) -> None:
    expected = [("a good day<|im_end|>",) * 2, ("bad<|im_end|>",) * 2]
    assert learned(written(tmp_path, "a good day\n\nbad\n", "t.txt"), tokenizer) == expected
    path = written(tmp_path, [{"body": "a good day"}, {"body": "bad"}])
    assert learned(path, tokenizer, text="body") == expected


def test_of_a_prompt_with_response_the_response_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, [{"prompt": "good? ", "response": "bad", "text": "not this"}])
    assert learned(path, tokenizer) == [("good? bad<|im_end|>", "bad<|im_end|>")]
    (row,) = load_rows(LanguageSettings(model="x", data=path), path, tokenizer)
    assert tokenizer.decode(row.prompt) == "good? "
    assert row.labels[len(row.prompt) :] == row.input_ids[len(row.prompt) :]


CHAT = [
    {"role": "user", "content": "good?"},
    {"role": "assistant", "content": "bad"},
    {"role": "user", "content": "a day?"},
    {"role": "assistant", "content": "good"},
]


def test_of_a_chat_every_answer_is_learned(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, [{"messages": CHAT}, {"messages": CHAT[:3]}])
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    (first, second) = learned(path, tokenizer)
    assert first == (whole, "bad<|im_end|>\ngood<|im_end|>\n")
    assert second[1] == "bad<|im_end|>\n"  # what is behind the last answer is of no use and left out
    assert second[0] == tokenizer.apply_chat_template(CHAT[:2], tokenize=False)


def test_a_first_token_of_the_tokenizer_is_put_before_texts(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, [{"prompt": "a ", "response": "b"}])

    def with_start(text: str, add_special_tokens: bool = True) -> Any:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [tokenizer.bos_token_id, *ids] if add_special_tokens else ids}

    fake = SimpleNamespace(bos_token_id=tokenizer.bos_token_id, eos_token="<|im_end|>")
    starting: Any = type("Starting", (), {"__call__": staticmethod(with_start), **vars(fake)})()
    settings = LanguageSettings(model="x", data=path)
    (plain,), (begun,) = load_rows(settings, path, tokenizer), load_rows(settings, path, starting)
    assert begun.input_ids == [tokenizer.bos_token_id, *plain.input_ids]
    assert begun.labels == [IGNORED, *plain.labels]


def test_long_rows_are_cut_behind_and_padding_is_not_learned(tmp_path: Path, model: str) -> None:
    rows = [{"prompt": "a ", "response": "good " * n} for n in (1, 30, 2)]
    settings = LanguageSettings(model=model, data=written(tmp_path, rows), eval_size=1, max_length=9, batch_size=2)
    task = LanguageTask(settings)
    (batch,) = task.train_batches(0)
    assert batch["input_ids"].shape[1] <= 9
    padding = batch["attention_mask"] == 0
    assert bool(padding.any())
    assert bool((batch["labels"][padding] == IGNORED).all())
    (first, second) = (list(task.train_batches(seed)) for seed in (0, 0))
    assert torch.equal(first[0]["input_ids"], second[0]["input_ids"])


@pytest.mark.parametrize("how", ["texts", "messages"])
def test_a_file_for_trl_is_learned_as_one_of_ours(tmp_path: Path, tokenizer: Any, how: str) -> None:
    """Prompt and completion, as texts or as messages, are what prompt and response, or one chat, are."""
    if how == "texts":
        theirs, ours = {"prompt": "good? ", "completion": "bad"}, {"prompt": "good? ", "response": "bad"}
    else:
        theirs, ours = {"prompt": CHAT[:1], "completion": CHAT[1:2]}, {"messages": CHAT[:2]}
    expected = learned(written(tmp_path, [ours], "ours.jsonl"), tokenizer)
    assert learned(written(tmp_path, [theirs], "theirs.jsonl"), tokenizer) == expected
    assert learned(written(tmp_path, json.dumps([theirs]), "theirs.json"), tokenizer) == expected
    other = {**ours, next(iter(ours)): "a day? "} if how == "texts" else {"messages": [*CHAT[2:4]]}  # the control
    assert learned(written(tmp_path, [other], "other.jsonl"), tokenizer) != expected
    with pytest.raises(ValueError, match="row 1: expected prompt and response as two texts or as two lists"):
        learned(written(tmp_path, [{"prompt": CHAT[:1], "completion": "bad"}]), tokenizer)


def test_a_folder_of_datasets_is_read_by_its_own_loader(tmp_path: Path, tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "good? ", "completion": "bad"}, {"prompt": "a ", "completion": "day"}]
    expected = learned(written(tmp_path, rows), tokenizer)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    written(tmp_path / "files", rows, "train.jsonl")
    for folder in ("saved", "files"):
        assert learned(str(tmp_path / folder), tokenizer) == expected
    assert learned(f"{tmp_path / 'files'}#train[:1]", tokenizer) == expected[:1]
    with pytest.raises(ValueError, match="cannot be loaded"):
        learned(f"{tmp_path / 'files'}#validation", tokenizer)


def test_a_warning_says_how_much_is_cut_off(tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, [{"prompt": "a ", "response": "good " * n} for n in (1, 60)])
    with pytest.warns(UserWarning, match=r"1 of 2 rows are longer than task\.max_length=9, and \d\d% of all tokens"):
        learned(path, tokenizer, max_length=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(path, tokenizer, max_length=200)


# --- the task -----------------------------------------------------------------------------------------------


def test_a_tiny_llama_learns_the_responses_and_samples_them(tmp_path: Path) -> None:
    task: Any = RECIPE.make(RECIPE.tiny(LanguageSettings(model="x", data="y"), tmp_path))
    task.check()
    adapted = get_peft_model(
        task.build_model(0), LoraConfig(r=8, task_type=task.peft_type, target_modules="all-linear")
    )
    held_out = task.eval_batches()
    before = task.evaluate(adapted, held_out)
    assert before["perplexity"] == pytest.approx(math.exp(before["loss"]))
    assert list(before) == list(task.metrics)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    adapted.train()
    for _ in range(25):
        for batch in task.train_batches(0):
            adapted(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert task.evaluate(adapted, held_out)["loss"] < 0.5 * before["loss"]
    state = torch.get_rng_state()
    (sample,) = task.sample(adapted, 25, tmp_path)
    assert sample["kind"] == "text"
    assert sample["file"] is None
    assert sample["name"].endswith(": ")
    assert sample["text"]
    assert adapted.training
    assert torch.equal(state, torch.get_rng_state())


def test_reading_batches_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    task: Any = RECIPE.make(RECIPE.tiny(LanguageSettings(model="x", data="y"), tmp_path))
    state = torch.get_rng_state()
    one, same, other = (list(task.train_batches(seed)) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert len(task.train_batches(0)) == len(one)
    ids = [[batch["input_ids"].tolist() for batch in part] for part in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]


class Uneven(nn.Module):
    """The loss of a batch is the mean over its predicted tokens of the token's number."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        kept = labels[:, 1:]
        return SimpleNamespace(loss=kept[kept != IGNORED].float().mean())


def test_the_loss_counts_tokens_and_not_batches() -> None:
    labels = [torch.tensor([[9, 1, 1, 1]]), torch.tensor([[9, 5, IGNORED, IGNORED]]), torch.tensor([[9, IGNORED]])]
    batches = [{"input_ids": part, "labels": part} for part in labels]
    assert token_loss(Uneven(), batches) == pytest.approx((3 * 1 + 5) / 4)  # the mean over batches would be 3
    with pytest.raises(ValueError, match="at least one token"):
        token_loss(Uneven(), batches[2:])


# --- the user's own rows ------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]
GOOD: Rows = [{"prompt": f"p{i} ", "response": "r"} for i in range(6)]


@pytest.mark.parametrize(
    ("rows", "options", "parts"),
    [
        ([{"question": "a"}], {}, ["'messages'", "'prompt' and 'response'", "question", "task.text"]),
        ([{"prompt": "a"}], {}, ["no column 'response'"]),
        ([*GOOD, {"prompt": "a", "response": " "}], {}, ["row 7", "'response'"]),
        ([*GOOD, {"prompt": "good " * 20, "response": "r"}], {"max_length": 16}, ["row 7", "max_length=16"]),
        (GOOD, {"eval_size": 6}, ["6 rows", "task.eval_size=6"]),
        ([{"messages": "hello"}], {}, ["row 1", "'messages'", "str"]),
        ([{"messages": CHAT}, {"messages": [{"role": "user"}]}], {}, ["row 2", "'user'"]),
        ([{"messages": CHAT[:1]}], {}, ["row 1", "assistant"]),
        ([{"messages": [{"role": "assistant", "content": ""}]}], {}, ["row 1", "'assistant' is empty"]),
        ('{"text": "a"}\n{"text"\n', {}, ["line 2", "JSON"]),
    ],
)
def test_rows_that_cannot_be_used(
    tmp_path: Path, model: str, rows: Rows | str, options: dict[str, Any], parts: list[str]
) -> None:
    path = written(tmp_path, rows)
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        LanguageTask(LanguageSettings(model=model, data=path, **{"eval_size": 1, **options})).check()
    for part in [path, *parts]:
        assert part in str(error.value)


def test_a_chat_needs_a_template_that_keeps_what_was_said(tmp_path: Path, model: str) -> None:
    path = written(tmp_path, [{"messages": CHAT}])
    _, own = load_tokenizer(model)
    settings = LanguageSettings(model=model, data=path)
    own.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="row 1: the chat template rewrites"):
        load_rows(settings, path, own)
    own.chat_template = None
    with pytest.raises(ValueError, match="needs a model whose tokenizer has a chat template"):
        load_rows(settings, path, own)


def test_held_out_rows_of_their_own(tmp_path: Path, model: str) -> None:
    held_out = written(tmp_path, [{"text": "good"}], "held.jsonl")
    task = LanguageTask(LanguageSettings(model=model, data=written(tmp_path, GOOD), eval_data=held_out))
    assert [len(part) for part in task.rows] == [6, 1]


def test_the_perplexity_of_other_text_is_what_training_forgets(tmp_path: Path, model: str) -> None:
    other = written(tmp_path, "a bad bad day\na bad day\n", "other.txt")
    settings = LanguageSettings(model=model, data=written(tmp_path, GOOD), eval_size=1, general_data=other)
    task = LanguageTask(settings)
    found = task.evaluate(task.build_model(0), task.eval_batches())
    alone = LanguageTask(LanguageSettings(model=model, data=other, eval_data=other))
    assert list(found) == list(task.metrics) and list(alone.metrics) == ["loss", "perplexity"]
    assert found["general_perplexity"] == pytest.approx(
        alone.evaluate(task.build_model(0), alone.eval_batches())["perplexity"]
    )
    assert found["general_perplexity"] != pytest.approx(found["perplexity"])  # the control: it is other text
    fewer = LanguageTask(LanguageSettings(model=model, data=other, general_data=other, general_size=1))
    assert len(fewer.general_rows) == 1
    tiny = RECIPE.make(RECIPE.tiny(settings, tmp_path / "tiny"))
    tiny.check()
    assert "general_perplexity" in tiny.metrics


def test_other_text_that_cannot_be_used_is_named_before_training(tmp_path: Path, model: str) -> None:
    other = written(tmp_path, [{"question": "a"}], "other.jsonl")
    settings = LanguageSettings(model=model, data=written(tmp_path, GOOD), eval_size=1, general_data=other)
    with pytest.raises(ValueError, match=r"other.jsonl: expected a column"):
        LanguageTask(settings).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "task.model"),
        ({"general_size": 0}, "task.general_size"),
        ({"data": None}, "task.data"),
        ({"max_length": 1}, "task.max_length"),
        ({"dtype": "float16"}, "task.dtype"),
    ],
)
def test_settings_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageSettings(**{"model": "x", "data": "y", **options})


def test_rows_are_checked_without_the_tokenizer(tmp_path: Path) -> None:
    """Its library takes seconds to import; a model that is not there stands for it."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    task = LanguageTask(
        LanguageSettings(model="none/such", data=written(tmp_path, [{"messages": chat}] * 4), eval_size=1)
    )
    task.check_data()  # the control: nothing is wrong with the data
    with pytest.raises(ValueError, match="none/such"):
        task.check_model()
    for row, said in (
        ({"messages": chat[:1]}, "row 1: no message has the role 'assistant'"),
        ({"prompt": "a", "completion": ""}, "row 1 has nothing in column 'completion'"),
        ({"text": " "}, "row 1 has nothing in column 'text'"),
    ):
        wrong = LanguageSettings(model="none/such", data=written(tmp_path, [row] * 4, "wrong.jsonl"), eval_size=1)
        with pytest.raises(ValueError, match=said):
            LanguageTask(wrong).check()
    with pytest.raises(ValueError, match=r"4 rows, so task\.eval_size=9 leaves nothing"):
        LanguageTask(LanguageSettings(model="none/such", data=task.settings.data, eval_size=9)).check()


def test_an_unknown_sample_is_named(model: str) -> None:
    with pytest.raises(ValueError, match=r"task\.data: .*sample:tales"):
        LanguageTask(LanguageSettings(model=model, data="sample:tale")).check()


def test_an_unknown_sample_of_other_text_is_named_by_its_own_setting(tmp_path: Path, model: str) -> None:
    settings = LanguageSettings(model=model, data=written(tmp_path, GOOD), eval_size=1, general_data="sample:dialog")
    with pytest.raises(ValueError, match=r"task\.general_data: .*did you mean 'sample:dialogue'"):
        LanguageTask(settings).check()

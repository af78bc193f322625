"""One run on a tiny random BERT and a file of texts: every kind of arm, PEFT's own initialisations, the record."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from cntlora.extras import MissingExtraError
from cntlora.lab.experiments import peers
from cntlora.lab.experiments.adapting import adapt
from cntlora.lab.experiments.arms import PEFT_LABELS
from cntlora.lab.experiments.environment import git_state
from cntlora.lab.experiments.run import run_one
from cntlora.lab.experiments.runs import Run
from cntlora.lab.experiments.settings import from_dict
from cntlora.lab.experiments.sweep import run_sweep
from cntlora.lab.experiments.tasks import TASKS, make_task, task_kind
from cntlora.lab.record import write_record

WORDS = ["<pad>", "<unk>", "good", "fine", "bad", "poor", "film", "book", "is", "very", "the", "not"]
FIELDS = [
    "schema", "experiment", "task", "method", "label", "learning_rate", "seed", "status", "error", "config", "metrics",
    "main_metric", "init_seconds", "train_seconds", "peak_memory_mib", "trainable_parameters", "mean_loss", "losses",
    "seconds", "evaluations", "samples", "start", "sites", "versions", "git", "command", "machine",
]  # fmt: skip
SITE_FIELDS = [
    "kind", "depth", "rank", "file_rank", "singular_values", "delta_norm", "weight_norm", "start_norm", "tokens",
    "effective_rank", "gradient_A", "gradient_B", "cosine", "cosine_product", "spectral_norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment on 96 texts of two classes, with a BERT of two layers without dropout."""
    folder = tmp_path_factory.mktemp("text")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder / "m")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "m")
    generator = torch.Generator().manual_seed(0)
    rows = ["text,label"]
    for i in range(96):
        filler = [WORDS[6 + int(n)] for n in torch.randint(6, (1 + i % 7,), generator=generator)]
        rows.append(f"{' '.join([*filler, WORDS[2 + i % 4]])},{'up' if i % 4 < 2 else 'down'}")
    (folder / "texts.csv").write_text("\n".join(rows) + "\n")
    return {
        "name": "tiny",
        "task": {
            "name": "text", "model": str(folder / "m"), "data": str(folder / "texts.csv"), "batch_size": 8,
            "max_length": 12, "eval_size": 24,
        },
        "lora": {"rank": 2, "alpha": 4, "targets": ["query", "key", "value"]},
        "init": {"num_batches": 3},
        "train": {"steps": 4, "warmup": 1, "eval_at": [0, 2]},
    }  # fmt: skip


def run_of(settings: dict[str, Any], method: str, seed: int = 0, **sections: Any) -> Run:
    merged = {key: {**settings.get(key, {}), **value} for key, value in sections.items()}
    return Run(from_dict({**settings, **merged, "sweep": {"methods": [method]}}), method, 1e-2, seed)


ARMS = [
    "full", "lora", "dora", "rslora", "cross", "self", "shift", "cross+vas", "self+paired", "self+subtract",
    "cross+dora", "cross+qr", "shift+C10", "pissa", "olora", "eva", "corda", "lora_ga", "lora_one", "eva+dora",
    *(f"peft:{name}" for name in PEFT_LABELS), "peft:eva+dora", "peft:pissa+rslora",
]  # fmt: skip


RecordOf = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def record_of(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RecordOf:
    """The record of an arm, made once."""
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda name: run_one(run_of(settings, name), folder))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_gives_a_whole_record(record_of: RecordOf, name: str, tmp_path: Path) -> None:
    record = record_of(name)
    assert list(record) == FIELDS and record["status"] == "finished" and record["error"] is None
    assert (record["method"], record["task"], record["experiment"]) == (name, "text", "tiny")
    assert len(record["losses"]) == len(record["seconds"]) == 4
    assert record["mean_loss"] == pytest.approx(sum(record["losses"]) / 4)
    assert record["seconds"] == sorted(record["seconds"]) and record["train_seconds"] == record["seconds"][-1] > 0
    assert [e["step"] for e in record["evaluations"]] == [0, 2, 4]
    assert [e["seconds"] for e in record["evaluations"]] == [0.0, record["seconds"][1], record["seconds"][3]]
    assert all(set(e) == {"step", "seconds", *record["metrics"]} for e in record["evaluations"])
    assert record["peak_memory_mib"] > 50 and (record["init_seconds"] > 0) == (name != "full")
    assert all(list(site) == SITE_FIELDS for site in record["sites"].values())
    write_record(tmp_path / "record.json", record)
    assert json.loads((tmp_path / "record.json").read_text())["losses"] == record["losses"]


def test_all_arms_start_from_the_same_model_and_batch(record_of: RecordOf) -> None:
    records = [record_of(name) for name in ARMS]
    before = {record["start"]["loss_before"] for record in records}
    assert len(before) == 1
    for record in records:
        assert record["start"]["loss_after"] == pytest.approx(before.copy().pop(), abs=2e-4)
        assert record["losses"][0] == pytest.approx(record["start"]["loss_after"], abs=2e-4)  # no dropout in this model
    last = {round(record["losses"][-1], 6) for record in records}
    assert len(last) > len(ARMS) // 2  # the control: afterwards they go their own ways


def test_keep_moves_the_start(settings: dict[str, Any], tmp_path: Path) -> None:
    """The control of the test above: with the paper's letter the function is another one at once."""
    start = run_one(run_of(settings, "self+keep"), tmp_path)["start"]
    assert abs(start["loss_after"] - start["loss_before"]) > 1e-2


def test_the_same_seed_gives_the_same_run(settings: dict[str, Any], record_of: RecordOf, tmp_path: Path) -> None:
    for name in ("self", "peft:pissa"):
        assert run_one(run_of(settings, name), tmp_path)["losses"] == record_of(name)["losses"]
        assert run_one(run_of(settings, name, seed=1), tmp_path)["losses"] != record_of(name)["losses"]


def test_trainable_parameters_are_those_that_change(settings: dict[str, Any], record_of: RecordOf) -> None:
    """The frozen half of base "offset" does not count; counted here by what a training run really moves."""
    counts = {name: record_of(name)["trainable_parameters"] for name in ARMS}
    assert counts["self"] == counts["lora"] == counts["peft:pissa"] == counts["self+subtract"]
    assert counts["dora"] == counts["lora"] + 6 * 24 and counts["full"] > 4 * counts["lora"]
    run = run_of(settings, "self")
    task = make_task(run.experiment.task)
    adapted = adapt(run, task, task.build_model(0), task.train_batches(0), 4).model
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for batch in task.train_batches(0):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    moved = sum(int((p != before[name]).sum()) for name, p in adapted.named_parameters())
    assert 0.98 * counts["self"] <= moved <= counts["self"]


def test_sites_tell_ranks_norms_gradients_and_distance(record_of: RecordOf) -> None:
    name = "bert.encoder.layer.1.attention.self.key"
    site = record_of("self")["sites"][name]
    assert (site["kind"], site["depth"], site["rank"], site["file_rank"]) == ("key", 1, 2, 4)
    assert site["start_norm"] == pytest.approx(2 * math.hypot(*site["singular_values"][:2]), rel=1e-3)
    assert site["gradient_A"] > 0 and site["gradient_B"] > 0 and 0 < site["cosine"] <= 1 and site["spectral_norm"] > 0
    plain = record_of("lora")["sites"][name]
    assert plain["gradient_A"] == plain["start_norm"] == 0 and plain["gradient_B"] > 0  # appendix B
    assert plain["cosine_product"] is None and plain["singular_values"] is None
    assert sum(s["rank"] for s in record_of("cross+vas")["sites"].values()) == 12
    assert record_of("full")["sites"] == record_of("peft:adalora")["sites"] == {}


def test_a_site_that_won_no_rank_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    sites = run_one(run_of(settings, "cross+vas", init={"rank_budget": 3, "num_batches": 3}), tmp_path)["sites"]
    assert len(sites) == 6 and sum(site["rank"] for site in sites.values()) == 3
    empty = [site for site in sites.values() if site["rank"] == 0]
    assert empty and all(s["file_rank"] == 0 and s["start_norm"] is None and s["cosine"] is None for s in empty)
    assert all(site["delta_norm"] > 0 and site["singular_values"] for site in sites.values())


def test_adalora_allocates_and_its_losses_have_no_penalty(settings: dict[str, Any], record_of: RecordOf) -> None:
    run = run_of(settings, "peft:adalora")
    task = make_task(run.experiment.task)
    adapted = adapt(run, task, task.build_model(0), task.train_batches(0), 4)
    batch = next(iter(task.train_batches(0)))
    with torch.no_grad():
        penalty = float(adapted.model(**batch).loss - adapted.scored(**batch).loss)
    assert penalty > 0.1  # what the losses of the record must not contain
    assert record_of("peft:adalora")["losses"][0] == pytest.approx(record_of("lora")["losses"][0], abs=1e-4)
    config: Any = adapted.model.peft_config["default"]  # type: ignore[index,union-attr]
    optimizer = torch.optim.SGD([p for p in adapted.model.parameters() if p.requires_grad], lr=0.1)
    assert adapted.adalora is not None
    for inside in (True, False):
        config.rank_pattern = None
        if inside:
            with adapted.adalora.running():
                adapted.model(**batch).loss.backward()
                optimizer.step()
        else:
            optimizer.step()
        assert (config.rank_pattern is not None) == inside


def test_peft_gets_rows_without_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 0], [0, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 0]]),
        "labels": torch.tensor([0, 1]),
        "pixels": torch.arange(4.0).reshape(2, 2),
        "mode": "text",
    }
    rows = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in peers._sequences(batch)]
    first = {"input_ids": [[5, 6]], "attention_mask": [[1, 1]], "labels": [0], "pixels": [[0.0, 1.0]], "mode": "text"}
    second = {"input_ids": [[7]], "attention_mask": [[1]], "labels": [1], "pixels": [[2.0, 3.0]], "mode": "text"}
    assert rows == [first, second]
    with pytest.raises(ValueError, match="one sample at a time"):
        list(peers._sequences({"latents": torch.ones(2, 4), "timesteps": torch.ones(3)}))


def test_vectors_that_count_for_eva() -> None:
    x, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [0, 1, 0]]).bool()
    assert peers._counted((x,), mask, "site").tolist() == [[0, 1], [2, 3], [8, 9]]
    assert peers._counted(x, None, "site").shape == (6, 2) == peers._counted(x, torch.ones(2, 5).bool(), "vision").shape


def test_eva_always_ends(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 48 tokens a batch"):
        run_one(run_of(settings, "peft:eva", lora={"rank": 24}), tmp_path)
    monkeypatch.setattr(peers, "EVA_PASSES", 0)
    with pytest.raises(RuntimeError, match="not converged"):
        run_one(run_of(settings, "peft:eva"), tmp_path)


def test_a_run_that_diverges_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(settings, "full", train={"steps": 12, "max_grad_norm": 1e6})
    record = run_one(Run(run.experiment, "full", 1e30, 0), tmp_path)
    assert record["status"] == "diverged" and record["mean_loss"] is None and "not finite" in record["error"]
    assert len(record["losses"]) == len(record["seconds"]) < 12


def test_a_task_that_is_not_known_or_lacks_a_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'tweets'"):
        task_kind("tweet")
    monkeypatch.setitem(TASKS, "trial", ("trial", "vision"))
    with pytest.raises(ModuleNotFoundError):  # a row without a module is our error, not the user's
        task_kind("trial")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"task 'trial' needs datasets: pip install 'cntlora\[vision\]'"):
        task_kind("trial")


def test_other_data_makes_other_runs(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\na,b\n")
    run = run_of(settings, "lora", task={"data": str(path)})
    before = run.config()
    assert run.config() == before
    path.write_text("text,label\na,c\n")
    os.utime(path, ns=(1, 1))
    assert run.config() != before
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run.config()


@pytest.mark.slow
def test_a_process_of_its_own_changes_nothing(settings: dict[str, Any], record_of: RecordOf, tmp_path: Path) -> None:
    grid = {"methods": ["self", "peft:eva", "full"], "learning_rates": [1e-2], "seeds": [0]}
    done = run_sweep(from_dict({**settings, "sweep": grid}), tmp_path, jobs=2)
    assert done.count("finished") == 3
    for record in done.records:
        assert record["losses"] == pytest.approx(record_of(record["method"])["losses"], abs=1e-5)
        assert record["machine"]["threads"] >= 1


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / ".git").exists(), reason="this copy of the code has no git history"
)
def test_a_record_names_the_commit_of_the_code() -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert len(head) == 40 and head.startswith(git_state().removesuffix("-dirty"))

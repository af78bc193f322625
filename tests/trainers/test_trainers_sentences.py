"""sentence-transformers: add_adapter and its trainer. Each column of text is read as the trainer feeds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss
from sentence_transformers.losses import MultipleNegativesRankingLoss
from tests.tiny import base_model, changed, lora_config, state
from tests.trainer_cases import QUIET, Logged, assert_trains_from_the_base, copies, text, tokenizer
from transformers import AutoModel

from cntlora import InitConfig, initialize, initialize_from_trainer

PAIRS = [{"anchor": text(i, 2 + i % 5), "positive": text(60 + i, 3 + i % 4)} for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with its tokenizer, of which sentence-transformers makes a model with mean pooling."""
    path = tmp_path_factory.mktemp("bert")
    base_model("bert").bert.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def embedder(folder: Path) -> SentenceTransformer:
    model = SentenceTransformer(str(folder), device="cpu")
    model.add_adapter(lora_config("bert"))
    return model


def trainer_of(model: Any, out: Path, **options: Any) -> Any:
    arguments = SentenceTransformerTrainingArguments(str(out), **{**QUIET, **options})
    loss = MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(model, arguments, Dataset.from_list(PAIRS), loss=loss, callbacks=[Logged()])


def test_everything_trains_from_the_base(folder: Path, tmp_path: Path) -> None:
    plain, ours = (trainer_of(embedder(folder), tmp_path) for _ in range(2))
    report = initialize_from_trainer(ours, InitConfig(method="self", num_batches=4))
    assert report.batches == 4 and len(report.sites) == 4
    assert_trains_from_the_base(plain, ours)


def test_what_it_saves_is_an_ordinary_adapter(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(embedder(folder), tmp_path)
    initialize_from_trainer(trainer, config=InitConfig(method="self"))
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "saved"))
    words = [text(200, 5), text(201, 3)]
    wanted = torch.as_tensor(trainer.model.encode(words))
    assert (wanted - torch.as_tensor(SentenceTransformer(str(folder), device="cpu").encode(words))).abs().max() > 1e-3
    loaded = SentenceTransformer(str(folder), device="cpu")
    loaded.load_adapter(str(tmp_path / "saved"))
    torch.testing.assert_close(torch.as_tensor(loaded.encode(words)), wanted, rtol=1e-4, atol=1e-5)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "saved").eval()
    batch = tokenizer()(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = by_peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close((hidden * mask).sum(1) / mask.sum(1), wanted, rtol=1e-4, atol=1e-5)


def test_padding_of_no_column_counts(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(embedder(folder), tmp_path)
    batches = list(trainer.get_train_dataloader())[:2]
    masks = [batch[f"{column}_attention_mask"] for batch in batches for column in ("anchor", "positive")]
    report = initialize_from_trainer(trainer, InitConfig(method="self", num_batches=4))
    real = sum(int(mask.sum()) for mask in masks)
    assert {site["tokens"] for site in report.sites.values()} == {real}
    assert real < sum(mask.numel() for mask in masks)  # the control: there is padding


def test_methods_of_gradients_read_its_loss(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(embedder(folder), tmp_path)
    initialize_from_trainer(trainer, InitConfig(method="lora_ga", num_batches=2))
    model = embedder(folder)

    def loss(model: Any, batch: Any) -> Any:
        features = [
            {k.split("_", 1)[1]: v for k, v in batch.items() if k.startswith(c)} for c in ("anchor", "positive")
        ]
        return MultipleNegativesRankingLoss(model)(features, None)

    batches = list(trainer_of(model, tmp_path).get_train_dataloader())
    initialize(model, batches, InitConfig(method="lora_ga", num_batches=2), loss=loss)
    ours, by_hand = copies(trainer.model), copies(model)
    assert all(torch.allclose(ours[name], by_hand[name], atol=1e-6) for name in ours)
    trainer.train()  # not left in a state of ours
    assert not all(torch.allclose(now, by_hand[name], atol=1e-6) for name, now in copies(trainer.model).items())


def test_a_cross_encoder_says_how(folder: Path, tmp_path: Path) -> None:
    """Its loss tokenises, so its batches are texts; the way that the message names works."""
    base_model("bert").save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    model = CrossEncoder(str(tmp_path / "m"), num_labels=3, device="cpu")
    model.add_adapter(lora_config("bert"))
    rows = Dataset.from_list([{**pair, "label": i % 2} for i, pair in enumerate(PAIRS)])
    arguments = CrossEncoderTrainingArguments(str(tmp_path), **QUIET)
    trainer = CrossEncoderTrainer(model, arguments, rows, loss=CrossEntropyLoss)
    before = state(model)
    with pytest.raises(TypeError, match="its loss tokenises.*initialize\\(trainer.model"):
        initialize_from_trainer(trainer, config=InitConfig(method="self"))
    assert not changed(before, model)
    batches = [model.preprocess([[p["anchor"], p["positive"]] for p in PAIRS[i : i + 8]]) for i in (0, 8, 16)]
    report = initialize(
        trainer.model, batches, forward=lambda model, batch: model(batch), config=InitConfig(method="self")
    )
    assert report.batches == 3
    assert {s["tokens"] for s in report.sites.values()} == {sum(int(b["attention_mask"].sum()) for b in batches)}

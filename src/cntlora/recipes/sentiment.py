"""The tweets task: MiniLM as a classifier of three sentiments, small enough for a laptop's processor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .loading import quiet
from .samples import minilm_folder, tweets
from .text import EncodedBatches, Table, encode_batches, shuffled

TARGET_MODULES = ("query", "key", "value", "attention.output.dense")
"""What LoRA adapts: q, k, v and the attention's output, not `output.dense` of the MLP."""


@dataclass(frozen=True)
class SentimentTask:
    """Three-class sentiment of tweets, with a split that is the same for every seed of training.

    Attributes:
        batch_size: tweets a batch.
        max_length: tokens a tweet, the two special ones included; longer ones are cut.
        eval_size: held-out tweets, stratified by class.
        split_seed: of the split.

    Raises:
        RuntimeError: at the first use, if model or data cannot be downloaded.
    """

    batch_size: int = 16
    max_length: int = 48
    eval_size: int = 1000
    split_seed: int = 0

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's folder."""
        return AutoTokenizer.from_pretrained(minilm_folder())

    @cached_property
    def tables(self) -> tuple[Table, Table]:
        """Training tweets and held-out tweets."""
        return tweets().split(self.eval_size, self.split_seed)

    def build_model(self, seed: int) -> nn.Module:
        """MiniLM with a new classification head, drawn under `seed`; global generators are left as found."""
        names = self.tables[0].names
        cuda = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=cuda), quiet():
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
                minilm_folder(),
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        return model.float()  # newer transformers keep the file's dtype, older ones make it float32

    def train_batches(self, seed: int) -> EncodedBatches:
        """All training tweets once, in an order that depends on `seed` alone."""
        return self._encoded(shuffled(self.tables[0], seed))

    def eval_batches(self) -> EncodedBatches:
        """The held-out tweets, always the same and in the same order."""
        return self._encoded(self.tables[1])

    def _encoded(self, table: Table) -> EncodedBatches:
        return encode_batches(
            self.tokenizer, table.texts, table.labels, batch_size=self.batch_size, max_length=self.max_length
        )

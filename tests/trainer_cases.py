"""Parts that the tests of trainers share: a tokenizer and data for the tiny models, and what holds in any trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import VOCABULARY, base_model, causal_batches, logits, text_batches
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from cntlora.model.sites import find_sites

SPECIAL = ["<pad>", "<s>", "</s>"]
QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
"""Training arguments of all trainers here."""


def tokenizer() -> Any:
    """One token a word: <pad> 0, <s> 1, </s> 2, then "w3" to "w39"."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(seed: int, words: int) -> str:
    """Words that `tokenizer` knows."""
    ids = torch.randint(3, VOCABULARY, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


class Logged(TrainerCallback):
    """Keeps what a trainer logs, by key, and what its optimizer holds when training begins."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.held: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        for key, value in (logs or {}).items():
            self.values.setdefault(key, []).append(float(value))


def logged(trainer: Any) -> Logged:
    """Return the log of a trainer that was made with one."""
    return next(c for c in trainer.callback_handler.callbacks if type(c) is Logged)


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The live factors A and B of every site."""
    sites = find_sites(model)[0]
    return {f"{s.name}.A": s.A for s in sites} | {f"{s.name}.B": s.B for s in sites}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: factor.detach().clone() for name, factor in factors(model).items()}


def assert_trained(model: nn.Module, start: dict[str, Tensor], held: set[int]) -> None:
    """Every factor was in the optimizer and has moved from `start`."""
    now = factors(model)
    assert now.keys() == start.keys() and start
    assert all(id(factor) in held for factor in now.values())
    assert not [name for name in now if torch.equal(now[name].detach(), start[name])]


def assert_trains_from_the_base(plain: Any, ours: Any) -> None:
    """Train both trainers: the same loss at the first step, others later, and every factor of the second moves."""
    start = copies(ours.model)
    for trainer in (plain, ours):
        trainer.train()
    losses, ours_losses = logged(plain).values["loss"], logged(ours).values["loss"]
    assert ours_losses[0] == pytest.approx(losses[0], abs=1e-4)  # the same batch, and the function of the base
    assert ours_losses[2] != pytest.approx(losses[2], abs=1e-3)  # the control: the starts differ
    assert_trained(ours.model, start, logged(ours).held)


def assert_plain(model: Any, folder: Path, kind: str = "llama", moved: float = 1e-3) -> None:
    """Assert that a trainer saved an ordinary adapter: plain PEFT gives the same outputs on an untouched base."""
    batch = causal_batches(1, seed=7)[0]
    loaded = PeftModel.from_pretrained(base_model(kind), folder).eval()
    there = logits(model.eval(), batch)
    torch.testing.assert_close(logits(loaded, batch), there, rtol=1e-4, atol=1e-5)
    assert (there - logits(base_model(kind), batch)).abs().max() > moved  # the control: training changed something


# --- transformers' Trainer -----------------------------------------------------------------------------------


def rows(kind: str = "bert", count: int = 24) -> list[dict[str, Tensor]]:
    make = causal_batches if kind != "bert" else text_batches
    batch = make(1, rows=count)[0]
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


class Watched(Trainer):
    """Remembers the ids of all training batches."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__.setdefault("fed", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def trainer_for(model: Any, folder: Path, kind: str = "bert", optimizers: Any = (None, None), **options: Any) -> Any:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    arguments = TrainingArguments(str(folder), **values)
    return Watched(model, arguments, train_dataset=rows(kind), callbacks=[Logged()], optimizers=optimizers)


def halves(model: nn.Module, part: slice) -> list[Tensor]:
    found = []
    for site in find_sites(model)[0]:
        found += [site.A.detach()[part].clone(), site.B.detach()[:, part].clone()]
    return found


POSITIVE, NEGATIVE = slice(0, 4), slice(4, 8)  # for r = 4


def multiple(now: Tensor, then: Tensor) -> bool:
    return bool(torch.allclose(now, then * (now.norm() / then.norm()), rtol=1e-4, atol=1e-7))


def losses_of(trainer: Any) -> list[float]:
    return logged(trainer).values["loss"]

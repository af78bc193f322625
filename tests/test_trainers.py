"""transformers' Trainer: everything trains after `initialize_from_trainer`, and a resumed run is the straight run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from peft import PeftModel
from tests.tiny import KINDS, adapted, base_model, causal_batches, changed, logits, state, text_batches
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cntlora import InitConfig, freeze_offset, initialize, initialize_from_trainer
from cntlora.sites import find_sites


def rows(kind: str = "bert", count: int = 24) -> list[dict[str, Tensor]]:
    make = causal_batches if kind != "bert" else text_batches
    batch = make(1, rows=count)[0]
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


class Losses(TrainerCallback):
    """Keeps what a run logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


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
    return Watched(model, arguments, train_dataset=rows(kind), callbacks=[Losses()], optimizers=optimizers)


def halves(model: nn.Module, part: slice) -> list[Tensor]:
    found = []
    for site in find_sites(model)[0]:
        found += [site.A.detach()[part].clone(), site.B.detach()[:, part].clone()]
    return found


POSITIVE, NEGATIVE = slice(0, 4), slice(4, 8)  # for r = 4


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_factor_trains(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    trainer = trainer_for(model, tmp_path, kind)
    start = logits(model, KINDS[kind].batches()[0])
    report = initialize_from_trainer(trainer, InitConfig(num_batches=2), progress=False)
    assert report.batches == 2 and len(report.sites) == len(find_sites(model)[0])
    torch.testing.assert_close(logits(model, KINDS[kind].batches()[0]), start, rtol=1e-4, atol=1e-4)
    positive, negative, before = halves(model, POSITIVE), halves(model, NEGATIVE), state(model)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for site in find_sites(model)[0]:
        assert id(site.A) in held and id(site.B) in held
    # a factor that only shrank is a multiple of what it was; a trained one is not
    assert not any(multiple(now, then) for now, then in zip(halves(model, POSITIVE), positive, strict=True))
    assert all(multiple(now, then) for now, then in zip(halves(model, NEGATIVE), negative, strict=True))
    assert all(".lora_" in name for name in changed(before, model))


def multiple(now: Tensor, then: Tensor) -> bool:
    return bool(torch.allclose(now, then * (now.norm() / then.norm()), rtol=1e-4, atol=1e-7))


def test_too_early_in_the_trainers_own_order_is_refused(tmp_path: Path) -> None:
    """lessons.md: parameters replaced once the optimizer is there never train, in silence."""
    made = trainer_for(adapted(), tmp_path)
    made.create_optimizer()
    model = adapted()
    given = trainer_for(model, tmp_path, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    trained = trainer_for(adapted(), tmp_path, max_steps=1)
    trained.train()
    for trainer in (made, given, trained):
        before = state(trainer.model)
        with pytest.raises(ValueError, match="the trainer already has an optimizer.*before .train"):
            initialize_from_trainer(trainer)
        assert not changed(before, trainer.model)


@pytest.mark.parametrize("options", [{}, {"data_seed": 3}, {"accelerator_config": {"use_seedable_sampler": True}}])
def test_the_data_comes_in_the_same_order(options: dict[str, Any], tmp_path: Path) -> None:
    """The trainer feeds what it would have fed without us, and its accelerator keeps nothing of ours."""
    fed = []
    for peek in (False, True):
        torch.manual_seed(0)
        trainer = trainer_for(adapted(), tmp_path, **options)
        loaders = len(trainer.accelerator._dataloaders)
        if peek:
            initialize_from_trainer(trainer, InitConfig(num_batches=3))
        assert len(trainer.accelerator._dataloaders) == loaders
        assert not any(GradientState().dataloader_references)
        trainer.train()
        fed.append(torch.cat(trainer.fed))
    assert torch.equal(*fed)
    assert not torch.equal(fed[0], torch.stack([row["input_ids"] for row in rows()])[: len(fed[0])])  # it is shuffled


def test_an_error_leaves_the_trainer_usable(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(model, tmp_path)
    loaders, before = len(trainer.accelerator._dataloaders), state(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        initialize_from_trainer(trainer, forward=broken)
    assert len(trainer.accelerator._dataloaders) == loaders and not changed(before, model)
    initialize_from_trainer(trainer)
    trainer.train()
    assert len(trainer.fed) == 4


def test_gradient_accumulation_and_clipping(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(
        model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.01, weight_decay=0.0, max_steps=3
    )
    initialize_from_trainer(trainer)
    positive, negative = halves(model, POSITIVE), halves(model, NEGATIVE)
    trainer.train()
    assert len(trainer.fed) == 6
    assert all(torch.equal(a, b) for a, b in zip(halves(model, NEGATIVE), negative, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(halves(model, POSITIVE), positive, strict=True))


# --- stopping and going on ----------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "seed": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trainer that ran 4 steps at once, and its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_for(adapted(), folder, **SAVING)
    initialize_from_trainer(trainer)
    trainer.train()
    return trainer, folder / "checkpoint-2"


def assert_same_end(model: nn.Module, straight: Any) -> None:
    """The negative half to the bit, the positive half up to rounding."""
    for now, wanted in zip(halves(model, NEGATIVE), halves(straight.model, NEGATIVE), strict=True):
        assert torch.equal(now, wanted)
    for now, wanted in zip(halves(model, POSITIVE), halves(straight.model, POSITIVE), strict=True):
        torch.testing.assert_close(now, wanted, rtol=1e-4, atol=1e-6)


def test_resume_from_checkpoint(straight: tuple[Any, Path], tmp_path: Path) -> None:
    model = adapted()
    resumed = trainer_for(model, tmp_path, **SAVING)
    initialize_from_trainer(resumed)
    resumed.train(resume_from_checkpoint=str(straight[1]))
    assert len(resumed.fed) == 2
    assert_same_end(model, straight[0])


def test_resume_from_checkpoint_of_a_loaded_model(straight: tuple[Any, Path], tmp_path: Path) -> None:
    """PeftModel.from_pretrained(is_trainable=True) needs freeze_offset; without it (the control) both halves train."""
    ends = []
    for freeze in (True, False):
        model = PeftModel.from_pretrained(base_model(), straight[1], is_trainable=True)
        if freeze:
            freeze_offset(model)
        resumed = trainer_for(model, tmp_path, **SAVING)
        resumed.train(resume_from_checkpoint=str(straight[1]))
        ends.append(model)
    assert_same_end(ends[0], straight[0])
    with pytest.raises(AssertionError):
        assert_same_end(ends[1], straight[0])


@pytest.mark.slow
def test_the_trained_checkpoint_is_an_ordinary_adapter(straight: tuple[Any, Path]) -> None:
    trainer, folder = straight
    model = PeftModel.from_pretrained(base_model(), folder.parent / "checkpoint-4").eval()
    batch = text_batches()[0]
    torch.testing.assert_close(logits(model, batch), logits(trainer.model.eval(), batch), rtol=1e-4, atol=1e-5)


def test_offset_and_subtract_log_the_same_losses(tmp_path: Path) -> None:
    losses = []
    for base in ("offset", "subtract", "paired"):
        model = adapted()
        trainer = trainer_for(model, tmp_path, weight_decay=0.0, learning_rate=1e-3, seed=2)
        initialize(model, text_batches(), InitConfig(base=base))
        trainer.train()
        losses.append(torch.tensor(next(c for c in trainer.callback_handler.callbacks if type(c) is Losses).values))
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    assert (losses[2] - losses[0]).abs().max() > 1e-3  # the control

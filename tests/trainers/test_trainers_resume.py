"""transformers' Trainer goes on from a checkpoint: a resumed run is the straight run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import adapted, base_model, logits, text_batches
from tests.trainer_cases import NEGATIVE, POSITIVE, halves, losses_of, trainer_for
from torch import nn

from cntlora import InitConfig, InitPlan, apply_plan, compute_plan, freeze_offset, initialize_from_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "seed": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trainer that ran 4 steps at once, and its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_for(adapted(), folder, **SAVING)
    initialize_from_trainer(trainer, config=InitConfig(method="self"))
    trainer.train()
    return trainer, folder / "checkpoint-2"


def assert_same_end(model: nn.Module, straight: Any) -> None:
    """The negative half is bit-identical, the positive one equal up to rounding."""
    for now, wanted in zip(halves(model, NEGATIVE), halves(straight.model, NEGATIVE), strict=True):
        assert torch.equal(now, wanted)
    for now, wanted in zip(halves(model, POSITIVE), halves(straight.model, POSITIVE), strict=True):
        torch.testing.assert_close(now, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["initialised again", "plan applied"])
def test_resume_from_checkpoint(how: str, straight: tuple[Any, Path], tmp_path: Path) -> None:
    """The ranks and the frozen half have to be there, the values come from the checkpoint: any data will do."""
    model = adapted()
    resumed = trainer_for(model, tmp_path, **SAVING)
    if how == "plan applied":
        compute_plan(adapted(), text_batches(seed=5), config=InitConfig(method="self")).save(
            tmp_path / "plan.safetensors"
        )
        apply_plan(model, InitPlan.load(tmp_path / "plan.safetensors"))
    else:
        initialize_from_trainer(resumed, config=InitConfig(method="self"))
    resumed.train(resume_from_checkpoint=str(straight[1]))
    assert len(resumed.fed) == 2
    assert_same_end(model, straight[0])
    assert losses_of(resumed) == pytest.approx(losses_of(straight[0])[2:], abs=1e-5)
    assert losses_of(straight[0])[:2] != pytest.approx(losses_of(straight[0])[2:], abs=1e-3)  # the control


def test_resume_without_initialising(straight: tuple[Any, Path], tmp_path: Path) -> None:
    """Base offset has twice the rank, which PEFT says; base paired goes on as any LoRA does."""
    resumed = trainer_for(adapted(), tmp_path, **SAVING)
    with pytest.raises(RuntimeError, match="size mismatch"):
        resumed.train(resume_from_checkpoint=str(straight[1]))
    losses = []
    for folder in (None, tmp_path / "paired" / "checkpoint-2"):
        trainer = trainer_for(adapted(), tmp_path / "paired", **SAVING)
        if folder is None:
            initialize_from_trainer(trainer, InitConfig(method="self", base="paired"))
        trainer.train(resume_from_checkpoint=str(folder) if folder else None)
        losses.append(losses_of(trainer))
    assert losses[1] == pytest.approx(losses[0][2:], abs=1e-5)


def test_resume_of_base_subtract_needs_the_same_start(tmp_path: Path) -> None:
    """Its base weights are in no checkpoint: the same call or the same plan writes them again."""
    config = InitConfig(method="self", base="subtract")
    straight = trainer_for(adapted(), tmp_path, **SAVING)
    initialize_from_trainer(straight, config)
    straight.train()
    again, forgotten = (trainer_for(adapted(), tmp_path, **SAVING) for _ in range(2))
    initialize_from_trainer(again, config)
    for trainer in (again, forgotten):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(again) == pytest.approx(losses_of(straight)[2:], abs=1e-5)
    assert losses_of(forgotten) != pytest.approx(losses_of(straight)[2:], abs=1e-3)  # the control


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

"""TRL's SFTTrainer and DPOTrainer: everything trains, the start is the base, the reference model stays what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tests.tiny import base_model, causal_batches, changed, lora_config, state
from tests.trainer_cases import (
    QUIET,
    Logged,
    assert_plain,
    assert_trained,
    assert_trains_from_the_base,
    copies,
    logged,
    text,
    tokenizer,
)
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from cntlora import InitConfig, initialize, initialize_from_trainer


def sft(folder: Path, **options: Any) -> Any:
    rows = Dataset.from_list([{"prompt": text(i, 3), "completion": " " + text(50 + i, 2 + i % 4)} for i in range(16)])
    return SFTTrainer(
        base_model("llama"), SFTConfig(str(folder), **{**QUIET, **options}), train_dataset=rows,
        processing_class=tokenizer(), peft_config=lora_config("llama"), callbacks=[Logged()],
    )  # fmt: skip


def peft_model() -> Any:
    return get_peft_model(base_model("llama"), lora_config("llama"))


def dpo(folder: Path, made: str = "peft_config", **options: Any) -> Any:
    """The reference is the base with the adapter off, the adapter "ref" of a PeftModel, or a model of its own."""
    model = peft_model() if made == "PeftModel" else base_model("llama")
    rows = [{"prompt": text(i, 3), "chosen": text(50 + i, 2 + i % 3), "rejected": text(90 + i, 3)} for i in range(16)]
    return DPOTrainer(
        model, args=DPOConfig(str(folder), **{**QUIET, **options}), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(), callbacks=[Logged()],
        ref_model=base_model("llama") if made == "ref_model" else None,
        peft_config=None if made == "PeftModel" else lora_config("llama"),
    )  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=SLOW) for o in ({"gradient_checkpointing": True}, {"max_length": 6}))]
)
def test_sft(options: dict[str, Any], tmp_path: Path) -> None:
    plain, ours = sft(tmp_path, **options), sft(tmp_path, **options)
    report = initialize_from_trainer(ours, InitConfig(method="self", num_batches=2))
    assert report.batches == 2
    assert_trains_from_the_base(plain, ours)
    ours.save_model(str(tmp_path / "saved"))
    assert_plain(ours.model, tmp_path / "saved")


# --- trainers that generate their data ----------------------------------------------------------------------


def generating(kind: str, folder: Path) -> Any:
    """GRPO or RLOO: prompts alone, to which the model writes the answers."""
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    rows = Dataset.from_list([{"prompt": text(i, 3)} for i in range(16)])
    options = {**QUIET, "num_generations": 2, "max_completion_length": 4}
    return trainer(
        base_model("llama"), reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=config(str(folder), **options), train_dataset=rows, processing_class=tokenizer(),
        peft_config=lora_config("llama"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_trainer_that_generates_its_data_says_what_to_do(kind: str, tmp_path: Path) -> None:
    trainer = generating(kind, tmp_path)
    before = state(trainer.model)
    for method in ("self", "descent"):
        with pytest.raises(ValueError, match="Trainer generates what it trains on.*give batches of your own"):
            initialize_from_trainer(trainer, InitConfig(method=method))
    assert not changed(before, trainer.model)
    initialize(trainer.model, causal_batches(), config=InitConfig(method="self"))  # the cure
    assert changed(before, trainer.model)
    other = generating(kind, tmp_path)
    initialize_from_trainer(other, InitConfig(method="pissa"))  # the other one: it reads no data
    other.train()
    assert changed(before, other.model)


# --- preference data ----------------------------------------------------------------------------------------


def reference(trainer: Any) -> Tensor:
    """Log-probabilities (2, rows) of the answers under the reference model, on the first four rows."""
    rows = [trainer.train_dataset[i] for i in range(4)]
    return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, trainer.data_collator(rows)))


@pytest.mark.parametrize("made", ["peft_config", "PeftModel", "ref_model"])
@pytest.mark.parametrize("base", ["offset", *(pytest.param(base, marks=SLOW) for base in ("paired", "keep"))])
def test_the_reference_model_is_the_base_at_every_step(base: str, made: str, tmp_path: Path) -> None:
    trainer = dpo(tmp_path, made)
    before = reference(trainer)
    initialize_from_trainer(trainer, InitConfig(method="self", base=base, num_batches=2))
    start = copies(trainer.model)
    assert torch.equal(reference(trainer), before)
    trainer.train()
    assert torch.equal(reference(trainer), before)
    # with a policy equal to the reference the loss is log 2; `keep` says that it moves the policy
    started_as_base = logged(trainer).values["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert started_as_base is (base != "keep")
    if base != "offset":  # whose frozen half moves only by weight decay, of which there is none
        assert_trained(trainer.model, start, logged(trainer).held)
    else:
        assert all(id(p) in logged(trainer).held for n, p in trainer.model.named_parameters() if ".default." in n)


def test_dpo_saves_an_ordinary_adapter(tmp_path: Path) -> None:
    """Also where TRL has put an adapter "ref" beside it, whose configuration is the very same object."""
    for made in ("peft_config", "PeftModel"):
        trainer = dpo(tmp_path, made)
        initialize_from_trainer(trainer, config=InitConfig(method="self"))
        trainer.train()
        assert {config.r for name, config in trainer.model.peft_config.items() if name == "ref"} <= {4}
        trainer.save_model(str(tmp_path / "saved"))
        assert_plain(trainer.model, tmp_path / "saved")


def test_subtract_is_refused_where_the_reference_is_the_base(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    before, weights = reference(trainer), state(trainer.model)
    config = InitConfig(method="self", base="subtract")
    with pytest.raises(ValueError, match="reference model of this DPOTrainer is the base model.*'offset'"):
        initialize_from_trainer(trainer, config)
    assert not changed(weights, trainer.model)
    initialize(trainer.model, trainer.get_train_dataloader(), config, forward=lambda m, b: m(b["input_ids"]))
    assert not torch.allclose(reference(trainer), before, atol=1e-3)  # the control: so it would have gone wrong
    trainer = dpo(tmp_path, "PeftModel")
    with pytest.raises(ValueError, match="it also has adapter 'ref'"):
        initialize(trainer.model, trainer.get_train_dataloader(), config, forward=lambda m, b: m(b["input_ids"]))


@pytest.mark.parametrize("how", ["ref_model", pytest.param("precomputed", marks=SLOW)])
def test_subtract_is_right_where_the_reference_is_kept_apart(how: str, tmp_path: Path) -> None:
    own = {"precompute_ref_log_probs": True} if how == "precomputed" else {"made": how}
    trainer = dpo(tmp_path, **own)
    initialize_from_trainer(trainer, InitConfig(method="self", base="subtract"))
    trainer.train()
    assert logged(trainer).values["loss"][0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("make", [pytest.param(sft, marks=SLOW), dpo])
def test_methods_of_gradients_read_the_trainers_own_loss(make: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    calls, own = [], trainer.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return own(*args, **kwargs)

    trainer.compute_loss = counted
    initialize_from_trainer(trainer, InitConfig(method="lora_ga", num_batches=2))
    assert len(calls) == 2
    assert not any(trainer._metrics[mode] for mode in trainer._metrics)  # nothing of it gets into the trainer's logs
    start = copies(trainer.model)
    trainer.train()
    assert any(not torch.equal(now, start[name]) for name, now in copies(trainer.model).items())
    own(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert any(trainer._metrics[mode] for mode in trainer._metrics)  # the control: the loss does write there


@pytest.mark.parametrize("method", ["descent", "lora_ga", "self"])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=SLOW)])
def test_dpo_trains_after_every_way_of_reading(method: str, checkpointing: bool, tmp_path: Path) -> None:
    """The loss of DPO switches the adapter off for its reference, while ours is left out of the forward pass."""
    trainer = dpo(tmp_path, gradient_checkpointing=checkpointing)
    wanted = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert wanted
    initialize_from_trainer(trainer, InitConfig(method=method, num_batches=2))
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == wanted
    start = copies(trainer.model)
    trainer.train()
    assert any(not torch.equal(factor, start[name]) for name, factor in copies(trainer.model).items())

"""transformers' Trainer: everything trains after `initialize_from_trainer`, and the trainer is left as found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from peft import LoraConfig, get_peft_model
from tests.tiny import KINDS, adapted, base_model, changed, logits, lora_config, state, text_batches
from tests.trainer_cases import NEGATIVE, POSITIVE, halves, losses_of, multiple, rows, trainer_for
from torch import Tensor, nn

from cntlora import InitConfig, apply_plan, compute_plan, initialize, initialize_from_trainer
from cntlora.model.sites import find_sites


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_factor_trains(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    trainer = trainer_for(model, tmp_path, kind)
    start = logits(model, KINDS[kind].batches()[0])
    report = initialize_from_trainer(trainer, InitConfig(method="self", num_batches=2), progress=False)
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
            initialize_from_trainer(trainer, config=InitConfig(method="self"))
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
            initialize_from_trainer(trainer, InitConfig(method="self", num_batches=3))
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
        initialize_from_trainer(trainer, forward=broken, config=InitConfig(method="self"))
    assert len(trainer.accelerator._dataloaders) == loaders and not changed(before, model)
    initialize_from_trainer(trainer, config=InitConfig(method="self"))
    trainer.train()
    assert len(trainer.fed) == 4


def test_gradient_accumulation_and_clipping(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_for(
        model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.01, weight_decay=0.0, max_steps=3
    )
    initialize_from_trainer(trainer, config=InitConfig(method="self"))
    positive, negative = halves(model, POSITIVE), halves(model, NEGATIVE)
    trainer.train()
    assert len(trainer.fed) == 6
    assert all(torch.equal(a, b) for a, b in zip(halves(model, NEGATIVE), negative, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(halves(model, POSITIVE), positive, strict=True))


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    """The factors and the losses are those of a run that keeps its activations; the frozen half stays frozen."""
    losses, starts = [], []
    for checkpointing in (False, True):
        model = adapted("llama")
        trainer = trainer_for(
            model, tmp_path, "llama", gradient_checkpointing=checkpointing, weight_decay=0.0,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )  # fmt: skip
        initialize_from_trainer(trainer, config=InitConfig(method="self"))
        starts.append(halves(model, POSITIVE))
        negative = halves(model, NEGATIVE)
        trainer.train()
        losses.append(losses_of(trainer))
        assert all(torch.equal(a, b) for a, b in zip(halves(model, NEGATIVE), negative, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(halves(model, POSITIVE), starts[-1], strict=True))
    assert model.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_callers_configuration_stays_as_it_is(tmp_path: Path) -> None:
    """It may be used for a second model; the model has one of its own, with the ranks of its layers."""
    config = lora_config("bert")
    before = config.to_dict()
    model = get_peft_model(base_model(), config)
    initialize_from_trainer(trainer_for(model, tmp_path), config=InitConfig(method="self"))
    assert config.to_dict() == before
    assert model.peft_config["default"].r == 2 * config.r == model.base_model.peft_config["default"].r


def test_the_trainers_rate_is_used_where_it_is_told(tmp_path: Path) -> None:
    """Not by itself: preference trainers have small rates on purpose."""

    def scaling(**options: Any) -> float:
        trainer = trainer_for(adapted(), tmp_path, learning_rate=5e-5)
        report = initialize_from_trainer(trainer, InitConfig(**options), progress=False)
        return next(iter(report.sites.values()))["scaling"] / find_sites(adapted())[0][0].scaling

    assert scaling(learning_rate=5e-5) == scaling(method="whitened", learning_rate=5e-5) == pytest.approx(400.0)
    assert scaling() == scaling(learning_rate=1e-3) == pytest.approx(1.0)


def test_what_is_no_trainer_is_refused() -> None:
    for wrong in (adapted(), None):
        with pytest.raises(TypeError, match="trainer: expected a transformers.Trainer.*initialize\\(model, batches\\)"):
            initialize_from_trainer(wrong, config=InitConfig(method="self"))


def test_offset_and_subtract_log_the_same_losses(tmp_path: Path) -> None:
    losses = []
    for base in ("offset", "subtract", "paired"):
        model = adapted()
        trainer = trainer_for(model, tmp_path, weight_decay=0.0, learning_rate=1e-3, seed=2)
        initialize(model, text_batches(), InitConfig(method="self", base=base))
        trainer.train()
        losses.append(torch.tensor(losses_of(trainer)))
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert (losses[2] - losses[0]).abs().max() > 1e-4  # the control


class Fused(nn.Module):
    """Kernel as in unsloth and axolotl: a projection from the weights of its LoRA layer, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q: Any = self.q
        h = nn.functional.linear(x, q.weight, q.bias)
        if hasattr(q, "lora_A"):
            h = h + q.scaling["default"] * (x @ q.lora_A["default"].weight.T @ q.lora_B["default"].weight.T)
        return self.out(torch.tanh(h))


class Plain(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)))


def test_a_layer_that_a_fused_kernel_passes_by_is_named_and_a_plan_made_elsewhere_fits() -> None:
    """docs/guides/other_trainers.md, unsloth: the plan of the plain model, applied to the one with the kernels."""
    plain, fused = Plain(), Fused()
    fused.load_state_dict(plain.state_dict())
    ours, theirs = (get_peft_model(m, LoraConfig(r=2, target_modules=["q"])) for m in (plain, fused))  # type: ignore[arg-type]
    data = [torch.randn(30, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    before = theirs(data[0])
    with pytest.raises(ValueError, match="site q cannot be initialised: its layer was not called"):
        initialize(theirs, data, config=InitConfig(method="self"))
    apply_plan(theirs, compute_plan(ours, data, config=InitConfig(method="self")))
    torch.testing.assert_close(theirs(data[0]), before, rtol=1e-4, atol=1e-5)
    site = find_sites(theirs)[0][0]
    second = site.A[2:].detach().clone()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    theirs(data[0]).square().sum().backward()
    optimizer.step()
    assert torch.equal(site.A[2:], second) and (theirs(data[0]) - before).abs().max() > 1e-3


@pytest.mark.parametrize("config", [None, InitConfig("whitened", fit_head=True), InitConfig("eva", fit_head=True),
                                    InitConfig("pissa", fit_head=True)])  # fmt: skip
def test_a_new_head_is_fitted_by_the_loss_of_the_trainer(config: InitConfig | None, tmp_path: Path) -> None:
    """Whatever the method reads, and with smoothed labels too."""
    model = adapted(modules_to_save=["classifier"])
    trainer = trainer_for(model, tmp_path, per_device_train_batch_size=16, label_smoothing_factor=0.1)
    trainer.train_dataset = [{**row, "labels": row["input_ids"][0] % 3} for row in rows(count=128)]
    report = initialize_from_trainer(trainer, config)
    assert report.head is not None and report.head["ridge"] and "cross-entropy" in str(report)
    assert report.head["loss_after"] < report.head["loss_before"]

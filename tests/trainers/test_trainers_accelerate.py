"""accelerate's loops: initialise before or after `prepare(model)`, and always before the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tests.tiny import adapted, base_model, causal_batches, changed, logits, state
from tests.trainer_cases import assert_plain, assert_trained, copies
from torch.utils.data import DataLoader

from cntlora import InitConfig, initialize

CONFIG = InitConfig.from_dict(
    {"method": "self", "num_batches": 3, "rtol": 1e-3}
)  # few tokens: without a tolerance ΔW is so large that float32 rounds


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    _reset()  # another test's trainer may have left one
    yield
    _reset()


def _reset() -> None:
    for kept in (AcceleratorState, PartialState, GradientState):
        kept._reset_state()


def loader() -> Any:
    rows = causal_batches(1, rows=24)[0]
    return DataLoader([{k: v[i] for k, v in rows.items()} for i in range(24)], batch_size=4)  # type: ignore[arg-type]


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(accelerator: Any, model: Any, optimizer: Any, batches: Any) -> list[float]:
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_before_or_after_the_model_is_prepared(when: str, precision: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, batches = adapted("llama"), loader()
    if when == "before":
        initialize(model, batches, CONFIG)
        model, batches = accelerator.prepare(model, batches)
    else:
        model, batches = accelerator.prepare(model, batches)
        initialize(model, batches, CONFIG)
    assert len(accelerator._dataloaders) == 1 and not any(GradientState().dataloader_references)
    optimizer = accelerator.prepare(adamw(model))
    start = copies(model)
    losses = [loss for _ in range(5) for loss in train(accelerator, model, optimizer, batches)]
    assert_trained(accelerator.unwrap_model(model), start, held(optimizer))
    base = base_model("llama")(**next(iter(loader()))).loss.item()
    assert losses[0] == pytest.approx(base, abs=1e-4 if precision == "no" else 0.05)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])  # the last epoch against the first
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    if precision == "no":
        assert_plain(accelerator.unwrap_model(model), tmp_path)


def test_an_optimizer_that_is_there_already_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted("llama")
    model, optimizer, batches = accelerator.prepare(model, adamw(model), loader())
    before = state(model)
    with pytest.raises(ValueError, match="an optimizer.*already holds.*initialise first, then make the optimizer"):
        initialize(model, batches, CONFIG)
    assert not changed(before, model)
    assert optimizer.param_groups


def test_resume_by_load_state(tmp_path: Path) -> None:
    """`save_state` and `load_state`, into a model that was initialised again or whose plan was applied."""
    ends, starts = [], []
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True)
        model = adapted("llama")
        initialize(model, loader(), CONFIG)
        model, optimizer, batches = accelerator.prepare(model, adamw(model), loader())
        parts = list(batches)
        starts.append(copies(model))
        if resumed:
            accelerator.load_state(str(tmp_path / "state"))
        else:
            train(accelerator, model, optimizer, parts[:3])
            accelerator.save_state(str(tmp_path / "state"))
        train(accelerator, model, optimizer, parts[3:])
        ends.append(copies(model))
        _reset()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not any(torch.equal(ends[0][name], starts[0][name]) for name in starts[0])  # the control: it did train


def test_outputs_of_the_prepared_model_are_the_bases() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted("llama"))
    batch = causal_batches(1, seed=3)[0]
    initialize(model, loader(), CONFIG)
    torch.testing.assert_close(logits(model.eval(), batch), logits(base_model("llama"), batch), rtol=1e-4, atol=1e-4)

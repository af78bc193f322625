"""A start that is rescaled for a learning rate: it trains there as it did at its own, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.cases import draw, lora, mlp, relative_error, squares, token_batches, wrapped
from tests.tiny import adapted, base_model, changed, logits, state, text_batches
from torch import Tensor, nn

from cntlora import (
    InitConfig,
    InitPlan,
    apply_plan,
    compute_plan,
    fit_learning_rate,
    initialize,
    propose_learning_rate,
)
from cntlora.model.lora_layers import lora_layers
from cntlora.model.writer import change_rate

SIZES = ((2, 9), (3, 4))
STARTS = ["lora", "descent", "offset"]


def started(kind: str, **options: Any) -> Any:
    """A small adapted model in float64, with the start of a method; "offset" is descent's with that base."""
    model = wrapped(mlp(), lora(**options))
    if kind != "lora":
        config = InitConfig(method="descent", base="offset" if kind == "offset" else None)
        initialize(model, token_batches(SIZES), config, loss=squares, progress=False)
    return model


def trained(model: nn.Module, rate: float, steps: int = 6) -> list[Tensor]:
    """Outputs for a batch after every step of AdamW without weight decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, eps=1e-30, weight_decay=0.0)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        squares(model, draw(step, 20, 10)).backward()
        optimizer.step()
        seen.append(model(draw(99, 5, 10)).detach())
    return seen


@pytest.mark.parametrize("kind", STARTS)
def test_at_another_rate_it_trains_as_it_did_at_the_first(kind: str) -> None:
    first, other, control = (started(kind) for _ in range(3))
    change_rate(other, 30.0)
    assert relative_error(other(draw(99, 5, 10)), first(draw(99, 5, 10))) < 1e-12
    want = trained(first, 3e-2)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(trained(other, 1e-3), want, strict=True))
    assert relative_error(trained(control, 1e-3)[-1], want[-1]) > 1e-2
    assert relative_error(want[-1], want[0]) > 1e-2  # it did train


@pytest.mark.parametrize(
    ("method", "base"), [("whitened", None), ("whitened_descent", None), ("whitened_descent", "offset")]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_that_is_told_the_rate_trains_as_at_its_own(
    method: str, base: Any, rslora: bool, tmp_path: Path
) -> None:
    def told(rate: float | None) -> Any:
        model = wrapped(mlp(), lora(use_rslora=rslora))
        plan = compute_plan(model, token_batches(SIZES), InitConfig(method, base, learning_rate=rate), loss=squares)
        plan.save(tmp_path / "plan.safetensors")
        apply_plan(model, InitPlan.load(tmp_path / "plan.safetensors"))
        return model

    first, other, control = told(None), told(1e-3 / 30), told(None)
    assert relative_error(other(draw(99, 5, 10)), first(draw(99, 5, 10))) < 1e-12
    assert relative_error(told(1e-3)(draw(99, 5, 10)), first(draw(99, 5, 10))) < 1e-12
    want = trained(first, 1e-3)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(trained(other, 1e-3 / 30), want, strict=True))
    assert relative_error(trained(control, 1e-3 / 30)[-1], want[-1]) > 1e-3
    layer = next(iter(dict(lora_layers(other, "default")).values()))
    root = layer.r["default"] ** 0.5 if rslora else layer.r["default"]
    assert layer.scaling["default"] == pytest.approx(layer.lora_alpha["default"] / root)


def test_the_report_says_what_rate_the_start_is_for() -> None:
    def lines(**options: Any) -> str:
        model = wrapped(mlp(), lora())
        config = InitConfig(**options)
        return str(initialize(model, token_batches(SIZES), config, loss=squares, progress=False))

    assert "made for AdamW with a peak of 0.001; InitConfig(learning_rate=…)" in lines(method="whitened")
    assert "brought to 0.0001: scaling times 100" in lines(method="whitened", learning_rate=1e-4)
    assert "learning rate" not in lines(method="descent")


def test_a_rate_that_cannot_be_met_is_refused() -> None:
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="learning_rate: expected a finite number"):
            InitConfig("whitened", learning_rate=rate)
    with pytest.raises(TypeError, match="learning_rate: expected a number, got str '1e-3'"):
        InitConfig("whitened", learning_rate="1e-3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method 'eva' is made for no rate of its own.*whitened.*fit_learning_rate"):
        InitConfig("eva", learning_rate=1e-4)
    with pytest.raises(ValueError, match="learning_rate: it is met by the scaling, which fold_alpha"):
        InitConfig("whitened", learning_rate=1e-4, fold_alpha=True)
    assert InitConfig.from_dict(InitConfig("whitened", learning_rate=1e-4).to_dict()).learning_rate == 1e-4


def test_sgd_does_not_train_alike() -> None:
    """Control of the claim that this is about Adam: the gradients of both units differ by the square of the factor."""
    outputs = []
    for factor, rate in ((1.0, 1e-2), (10.0, 1e-3)):
        model = started("descent")
        change_rate(model, factor)
        squares(model, draw(0, 20, 10)).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate).step()
        outputs.append(model(draw(99, 5, 10)).detach())
    assert relative_error(*outputs) > 1e-3


def test_the_rate_that_the_start_wants_becomes_the_given_one() -> None:
    model, batches = adapted(), text_batches()
    initialize(model, batches, InitConfig(method="descent"), progress=False)
    before, wanted = logits(model, batches[0]), propose_learning_rate(model, batches)
    layers = dict(lora_layers(model, "default"))
    scaling = {name: layer.scaling["default"] for name, layer in layers.items()}
    found = fit_learning_rate(model, 2e-5, batches)
    assert found == wanted
    f = wanted.learning_rate / 2e-5
    assert relative_error(logits(model, batches[0]), before) < 1e-5
    for name, layer in layers.items():
        assert layer.scaling["default"] == pytest.approx(f**2 * scaling[name])
        assert layer.scaling["default"] == pytest.approx(layer.lora_alpha["default"] / layer.r["default"])
    again = fit_learning_rate(adapted(), found.learning_rate, batches)
    assert again.motion != wanted.motion  # control: another start moves otherwise


def test_peft_saves_and_loads_what_was_rescaled(tmp_path: Path) -> None:
    model, batches = adapted(), text_batches()
    initialize(model, batches, InitConfig(method="descent"), progress=False)
    fit_learning_rate(model, 1e-4, batches)
    want = logits(model.eval(), batches[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert relative_error(logits(loaded, batches[0]), want) < 1e-5
    config = loaded.peft_config["default"]
    config.lora_alpha = 16  # control: the alpha of before
    config.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert relative_error(logits(other, batches[0]), want) > 1e-4


def test_what_trains_besides_is_left_alone() -> None:
    model, batches = adapted(), text_batches()
    before = state(model)
    fit_learning_rate(model, 1e-5, batches)
    assert changed(before, model) == {name for name in before if ".lora_A." in name}  # B = 0 stays zero


def test_wrong_inputs_are_one_clear_error_each_and_change_nothing() -> None:
    model, batches = adapted(), text_batches()
    before = state(model)
    for rate in (0.0, -1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="learning_rate"):
            fit_learning_rate(model, rate, batches)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        fit_learning_rate(model, 1e-4, [])
    assert not changed(before, model)
    initialize(model, batches, InitConfig(method="pissa", base="subtract"), progress=False)
    before = state(model)
    with pytest.raises(ValueError, match="base 'subtract'"):
        fit_learning_rate(model, 1e-4, batches)
    assert not changed(before, model)

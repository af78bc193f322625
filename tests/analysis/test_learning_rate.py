"""The proposed learning rate: its equation, what it depends on, and that the model is left as found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import reference
from tests.cases import array, draw, lora, squares, wrapped
from tests.tiny import KINDS, adapted, changed, one_shot, state, text_batches
from torch import nn

from cntlora import InitConfig, initialize, propose_learning_rate
from cntlora.analysis.learning_rate import MOST, rate_of


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.first(x)


def one_layer(rows: float = 1.0) -> Any:
    """One adapted layer in float64, the rows of A multiplied by a number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wrapped(OneLayer().double(), lora(targets=["first"]))
    with torch.no_grad():
        model.base_model.model.first.lora_A["default"].weight.mul_(rows)
    return model


def test_the_motion_is_that_of_the_first_update_by_hand() -> None:
    model, batch = one_layer(), draw(5, 40, 10)
    found = propose_learning_rate(model, [batch], loss=squares)
    layer = model.base_model.model.first
    W, A = array(layer.base_layer.weight), array(layer.lora_A["default"].weight)
    want = reference.first_update_motion(W, A, array(batch).T, layer.scaling["default"])
    assert found.motion == {"first": pytest.approx(want, rel=1e-6)}
    assert found.learning_rate == pytest.approx(reference.proposed_rate([want]), rel=1e-6) and found.batches == 1
    other = reference.first_update_motion(W, A, array(batch).T, 2 * layer.scaling["default"])
    assert found.motion["first"] != pytest.approx(other, rel=0.5)  # control: another scaling


def test_larger_rows_of_a_want_a_smaller_rate() -> None:
    """With B = 0 the motion is in proportion to A, and the rate falls with its power of 2/3."""
    batch = draw(5, 40, 10)
    one, ten = (propose_learning_rate(one_layer(rows), [batch], loss=squares) for rows in (40.0, 400.0))
    assert ten.motion["first"] == pytest.approx(10 * one.motion["first"], rel=1e-6)
    assert one.learning_rate / ten.learning_rate == pytest.approx(10 ** (2 / 3), rel=1e-6)
    assert one.learning_rate < MOST  # else the ratio would be that of the bound


def test_the_rate_is_bounded() -> None:
    assert rate_of(1e-9) == MOST > rate_of(1e3) > 0


def test_the_update_is_of_the_mean_gradient_over_the_batches() -> None:
    """A batch that outweighs the first one turns the update around, so that the outputs move elsewhere."""
    one, other = draw(5, 40, 10), draw(6, 40, 10)

    def signed(model: nn.Module, batch: Any) -> Any:
        return squares(model, batch) * (1.0 if batch is one else -50.0)

    both = propose_learning_rate(one_layer(), [one, other], loss=signed)
    alone = propose_learning_rate(one_layer(), [one, other], loss=signed, num_batches=1)
    assert (both.batches, alone.batches) == (2, 1)
    assert both.motion["first"] != pytest.approx(alone.motion["first"], rel=1e-3)


@pytest.mark.parametrize("method", ["self", "descent", "lora"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_model_the_data_and_the_generators_are_as_found(method: str, kind: str) -> None:
    model, batches = adapted(kind), KINDS[kind].batches()
    initialize(model, batches, InitConfig(method=method), progress=False)
    model.train()
    marked = next(p for p in model.parameters() if p.requires_grad)
    marked.grad = torch.ones_like(marked)
    before, random = state(model), torch.random.get_rng_state()
    wanted = [p.requires_grad for p in model.parameters()]
    found = propose_learning_rate(model, one_shot(batches), num_batches=2)
    assert 0 < found.learning_rate <= MOST and found.batches == 2
    assert not changed(before, model) and model.training and torch.equal(marked.grad, torch.ones_like(marked))
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        marked.add_(1)
    assert changed(before, model)  # control


def test_the_model_is_as_found_after_a_loss_that_fails() -> None:
    model, batches = adapted(), text_batches()
    before, calls = state(model), []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == len(batches) + 2:  # the forward pass with the update in place
            raise RuntimeError("out of luck")
        return model(**batch)

    with pytest.raises(RuntimeError, match="out of luck"):
        propose_learning_rate(model, batches, loss=loss)
    assert not changed(before, model) and len(calls) == len(batches) + 2


def test_the_frozen_half_of_an_offset_does_not_move() -> None:
    """Base "offset" trains as "subtract" does, so that its outputs move alike."""
    found = {}
    for base in ("offset", "subtract", "paired"):
        model = adapted()
        initialize(model, text_batches(), InitConfig(method="pissa", base=base), progress=False)  # type: ignore[arg-type]
        found[base] = propose_learning_rate(model, text_batches()).motion
    assert found["offset"] == pytest.approx(found["subtract"], rel=1e-2)
    assert found["paired"] != pytest.approx(found["subtract"], rel=1e-2)  # control: other directions, both halves train


def test_wrong_inputs_are_one_clear_error_each() -> None:
    with pytest.raises(ValueError, match="batches: expected at least one"):
        propose_learning_rate(adapted(), [])
    model = adapted().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        propose_learning_rate(model, text_batches())
    with pytest.raises(ValueError, match="no LoRA layer"):
        propose_learning_rate(nn.Linear(3, 3), text_batches())
    without = [{k: v for k, v in batch.items() if k != "labels"} for batch in text_batches()]
    with pytest.raises(ValueError, match="needs a loss"):
        propose_learning_rate(adapted(), without)
    with pytest.raises(ValueError, match="moves no output"):
        propose_learning_rate(one_layer(), [draw(5, 40, 10)], loss=lambda model, batch: 0 * squares(model, batch))

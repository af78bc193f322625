"""Descent mode: its equation, what makes it the best step of its rank, and how its size is found."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import (
    SIZES,
    added,
    array,
    draw,
    gradients,
    inputs_of,
    mlp,
    relative_error,
    squares,
    token_batches,
    wrapped,
)
from tests.tiny import KINDS, adapted, causal_batches, changed, one_shot, state, text_batches
from torch import Tensor, nn

from cntlora import InitConfig, InitReport, compute_plan, initialize
from cntlora.data.batches import scalar_loss
from cntlora.execution.step_size import ENOUGH, LEAST, MOST, NEAR, TRIED, best_size, lowest_near
from cntlora.linalg.damping import whitening
from cntlora.methods.descent import ROW_NORM, descent_factors, descent_target, mean_square

DESCENT = InitConfig(method="descent")


# --- the equation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_the_product_is_the_least_squares_step_up_to_one_number(dtype: torch.dtype, tolerance: float) -> None:
    base, batches = mlp(dtype=dtype), token_batches(SIZES, dtype=dtype)
    X, G = inputs_of(base, batches), gradients(base, batches)
    plan = compute_plan(
        wrapped(base),
        batches,
        InitConfig.from_dict({"method": "descent", "strength": 0.1}),
        loss=squares,
        progress=False,
    )
    factors = []
    for name, site in plan.sites.items():
        W = array(base.get_submodule(name).weight)
        want = reference.descent_delta(W, np.hstack(X[name]), G[name], site.rank, damping=0.01)
        factors.append(float(np.sum(added(site) * want) / np.sum(want**2)))
        assert relative_error(added(site), factors[-1] * want) < tolerance, name
        other = reference.descent_delta(W, np.hstack(X[name]), array(draw(6, *W.shape)), site.rank, damping=0.01)
        assert relative_error(added(site), factors[-1] * other) > 0.3  # the control: another gradient
    assert max(factors) / min(factors) - 1 < tolerance and min(factors) > 0
    assert max(s.start_norm / s.weight_norm for s in plan.sites.values()) == pytest.approx(0.1)


def test_no_product_of_that_rank_is_nearer_in_the_outputs() -> None:
    X, G, r = draw(1, 12, 40), draw(2, 9, 12), 3
    C = X @ X.mT / 40
    full = -G @ torch.linalg.inv(C)
    target = descent_target(G, whitening(C, 0.0))
    U, S, Vh = torch.linalg.svd(target.M)
    best = (U[:, :r] * S[:r]) @ Vh[:r] @ target.right
    distance = float(torch.linalg.matrix_norm((full - best) @ X))
    for seed in range(20):
        near = best + 1e-3 * draw(seed, 9, r) @ draw(seed + 99, r, 12)
        u, s, v = torch.linalg.svd(near)
        assert float(torch.linalg.matrix_norm((full - (u[:, :r] * s[:r]) @ v[:r]) @ X)) >= distance
    u, s, v = torch.linalg.svd(full)  # the control: cut where ΔW itself is nearest, which its inputs do not know of
    assert float(torch.linalg.matrix_norm((full - (u[:, :r] * s[:r]) @ v[:r]) @ X)) > 1.001 * distance


def test_the_factors_have_plain_loras_rows_in_a_and_the_step_in_b() -> None:
    B, A = draw(1, 9, 3), draw(2, 3, 12)
    up, down = descent_factors(B, A)
    assert relative_error(up @ down, B @ A) < 1e-12
    assert relative_error(down @ down.mT, ROW_NORM**2 * torch.eye(3).double()) < 1e-6
    assert relative_error(A @ A.mT, ROW_NORM**2 * torch.eye(3)) > 0.1
    random = (2 * torch.rand(64, 400, generator=torch.Generator().manual_seed(0)) - 1) / 400**0.5
    assert float(random.norm(dim=1).mean()) == pytest.approx(ROW_NORM, rel=0.02)


def test_the_units_of_a_layers_outputs_do_not_matter() -> None:
    """y → 10 y, undone behind the layer: G becomes G / 10, and the relative step is the same."""
    X, G, W = draw(1, 12, 40), draw(2, 9, 12), draw(3, 9, 12)
    C = X @ X.mT / 40
    inverse = whitening(C, 0.01)

    def step(W: Tensor, G: Tensor, eta: Any) -> Tensor:
        target = descent_target(G, inverse, eta)
        return target.M @ target.right / torch.linalg.matrix_norm(W)

    assert relative_error(step(10 * W, G / 10, mean_square(10 * W, C)), step(W, G, mean_square(W, C))) < 1e-12
    assert relative_error(step(10 * W, G / 10, 1.0), step(W, G, 1.0)) > 0.9  # the control


def test_a_singular_input_without_damping_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="damping: .* singular"):
        whitening(torch.zeros(3, 3, dtype=torch.float64), 0.01)


# --- the size -----------------------------------------------------------------------------------------------


def falling(best: float, depth: float = 0.1, start: float = 1.0) -> Any:
    """A loss that falls by start·depth at its lowest, and its slope: −slope·size·exp(−size/best)."""
    slope = -start * depth * math.e / best
    return (lambda size: start + slope * size * math.exp(-size / best)), start, slope


@pytest.mark.parametrize("best", [4 * LEAST, 0.004, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("depth", [0.03, 0.1, 0.4])
def test_two_trials_find_the_lowest_loss(best: float, depth: float) -> None:
    loss_at, before, slope = falling(best, depth)
    found = best_size(loss_at, before, slope)
    assert found["trials"] <= 2
    assert 1 / NEAR <= found["size"] / best <= NEAR
    assert before - found["loss_after"] > 0.9 * depth  # size/best within NEAR keeps 92 % of the fall
    steeper = best_size(loss_at, before, 3 * slope)  # the control: with a wrong slope the trials do not agree
    assert steeper["size"] != found["size"]


@pytest.mark.parametrize("best", [0.004, 0.1])
def test_a_parabola_is_followed_too(best: float) -> None:
    found = best_size(lambda size: 1 + 0.1 * ((size / best - 1) ** 2 - 1), 1.0, -0.2 / best)
    assert found["trials"] <= 2 and found["loss_after"] < 1 - 0.09


def test_one_trial_is_enough_where_it_is_near_the_lowest() -> None:
    loss_at, before, slope = falling(0.1, 0.25 / math.e)  # a quarter of before/|slope| is 0.1
    assert best_size(loss_at, before, slope) == {
        "size": pytest.approx(0.1), "loss_before": 1.0, "loss_after": pytest.approx(1 - 0.25 / math.e), "trials": 1
    }  # fmt: skip


def test_where_the_lowest_loss_is_placed_from_one_trial() -> None:
    assert lowest_near(0.1, math.exp(-0.5)) == pytest.approx(0.2)
    assert lowest_near(0.1, 0.0) == pytest.approx(0.025)  # the loss is as before
    assert lowest_near(0.1, -math.inf) < 0.01 and lowest_near(0.1, 1.2) == pytest.approx(0.4)


def test_the_size_stays_within_bounds_and_survives_overflow() -> None:
    assert best_size(lambda size: 1 - size, 1.0, -1.0)["size"] == MOST
    rising = best_size(lambda size: 1 + size, 1.0, -1.0)
    assert rising["trials"] == ENOUGH and rising["loss_after"] == pytest.approx(1, abs=1e-2)
    assert best_size(lambda size: 1.0, 1.0, 0.0)["size"] < 0.01  # a start without a slope
    broken = best_size(lambda size: math.nan if size > 0.05 else 1 - size, 1.0, -1.0)
    assert 0.01 < broken["size"] <= 0.05 and math.isfinite(broken["loss_after"])
    assert best_size(lambda size: -5 - size, -5.0, -1.0)["loss_after"] < -5  # a loss below zero


def test_weights_of_batches_that_cancel_are_one_clear_error() -> None:
    """One small token and 40 others: their second moment is that of the others, and the losses have no mean."""
    batches = [0.01 * draw(0, 1, 10), draw(1, 40, 10)]
    config = {"method": "descent", "strength": 0.1}
    with pytest.raises(ValueError, match="batch_weights: expected a sum above 0"):
        compute_plan(
            wrapped(mlp()), batches, InitConfig.from_dict({**config, "batch_weights": (-1.0, 1.0)}), loss=squares
        )
    assert compute_plan(
        wrapped(mlp()), batches, InitConfig.from_dict({**config, "batch_weights": (-0.5, 1.0)}), loss=squares
    ).sites  # control


@pytest.mark.parametrize("options", [{}, {"base": "offset"}, {"base": "paired"}, {"batch_weights": (2.0, 1.0, 0.5)}])
def test_the_slope_is_that_of_the_loss_along_the_start(options: Any) -> None:
    """By finite differences in float64, of the first half of the directions where base "paired" keeps no more."""
    base, batches = mlp(), token_batches(SIZES)[:3]
    config = InitConfig.from_dict({"method": "descent", "strength": 0.1, **options})
    plan = compute_plan(wrapped(base), batches, config, loss=squares, progress=False)
    weights = options.get("batch_weights", (1.0,) * len(batches))

    def mean_loss(size: float) -> float:
        moved = mlp()
        with torch.no_grad():
            for name, site in plan.sites.items():
                r = site.file_rank // (2 if "base" in options else 1)
                moved.get_submodule(name).weight += size * site.scaling * (site.B[:, :r] @ site.A[:r])
            return sum(w * float(squares(moved, b)) for w, b in zip(weights, batches, strict=True)) / sum(weights)

    numeric = (mean_loss(1e-4) - mean_loss(-1e-4)) / 2e-4
    slope = sum(site.slope or 0.0 for site in plan.sites.values())
    assert slope < 0
    assert slope == pytest.approx(numeric, rel=1e-3)
    assert sum(2 * (site.slope or 0.0) for site in plan.sites.values()) != pytest.approx(numeric, rel=0.3)  # control


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_step_lowers_the_loss_that_it_reports(kind: str) -> None:
    model, batches = adapted(kind), KINDS[kind].batches()
    report = initialize(model, batches, DESCENT, progress=False)
    count = min(TRIED, len(batches))
    model.eval()
    with torch.no_grad():
        after = sum(float(model(**batch).loss) for batch in batches[:count]) / count
    assert report.step["batches"] == count
    assert after == pytest.approx(report.step["loss_after"], rel=1e-4)
    assert after < report.step["loss_before"] - 1e-3
    assert "step: ‖s·B·A‖/‖W‖ is" in str(report) and report.to_dict()["step"] == report.step
    with torch.no_grad():  # the control: the same step the other way
        for name, p in model.named_parameters():
            p.mul_(-1 if "lora_B" in name else 1)
        assert sum(float(model(**batch).loss) for batch in batches[:count]) / count > report.step["loss_before"]


def test_a_strength_is_the_size_and_costs_no_trial() -> None:
    calls: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(batch)
        return model(**batch)

    batches = text_batches()
    plan = compute_plan(
        adapted(), batches, InitConfig.from_dict({"method": "descent", "strength": 0.2}), loss=loss, progress=False
    )
    assert plan.step == {"size": 0.2} and len(calls) == len(batches)
    assert max(s.start_norm / s.weight_norm for s in plan.sites.values()) == pytest.approx(0.2)
    tried = compute_plan(adapted(), batches, DESCENT, loss=loss, progress=False)
    assert tried.step["trials"] in (1, 2)
    assert len(calls) == 2 * len(batches) + tried.step["trials"] * min(TRIED, len(batches))


def test_dora_starts_at_the_same_function() -> None:
    batches = text_batches()
    plain, dora = (adapted("bert", use_dora=use) for use in (False, True))
    for model in (plain, dora):
        initialize(model, batches, DESCENT, progress=False)
    one, other = (model.eval()(**batches[0]).logits for model in (plain, dora))
    assert relative_error(other, one) < 1e-5


def test_the_model_the_data_and_the_generators_are_as_found() -> None:
    model, batches = adapted(), text_batches(6)
    model.train()
    before, torch_state = state(model), torch.random.get_rng_state()
    rest: Iterator[Any] = one_shot(batches)
    plan = compute_plan(model, rest, InitConfig(method="descent", num_batches=4), progress=False)
    assert not changed(before, model) and model.training
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert len(list(rest)) == 2 and plan.batches == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    again = compute_plan(model, batches, InitConfig(method="descent", num_batches=4), progress=False)
    assert all(torch.equal(again.sites[n].B, s.B) for n, s in plan.sites.items())


def test_hooks_go_also_when_a_trial_fails() -> None:
    model, batches = adapted(), text_batches()
    calls = []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > len(batches):
            raise RuntimeError("out of luck")
        return model(**batch)

    with pytest.raises(RuntimeError, match="out of luck"):
        compute_plan(model, batches, DESCENT, loss=loss, progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_trial_whose_loss_overflows_is_one_too_far() -> None:
    model, batches = wrapped(mlp()), token_batches(SIZES)[:1]
    pristine = float(squares(model, batches[0]).detach())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = squares(model, batch)
        return value if float(value.detach()) > 0.9 * pristine else value * math.inf

    plan = compute_plan(model, batches, DESCENT, loss=loss, progress=False)
    assert 0.9 * pristine < plan.step["loss_after"] < plan.step["loss_before"] == pytest.approx(pristine)


def test_a_loss_that_draws_noise_draws_the_same_in_every_trial() -> None:
    drawn: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        noise = torch.randn(3)
        if not torch.is_grad_enabled():
            drawn.append(noise)
        return squares(model, batch) + 0 * noise.sum()

    plan = compute_plan(wrapped(mlp()), token_batches(SIZES)[:1], DESCENT, loss=loss, progress=False)
    # the loss before, too, is one that drew this noise: the data pass drew another
    assert len(drawn) == plan.step["trials"] + 1 and all(torch.equal(noise, drawn[0]) for noise in drawn)


def test_plans_keep_the_step() -> None:
    from cntlora import InitPlan

    plan = compute_plan(adapted(), text_batches(), DESCENT, progress=False)
    assert InitPlan.from_bytes(plan.to_bytes()).step == plan.step != {}
    assert not compute_plan(adapted(), text_batches(), InitConfig(method="self"), progress=False).step
    assert "step:" not in str(
        InitReport.of(compute_plan(adapted(), text_batches(), InitConfig(method="self"), progress=False))
    )


def test_the_base_is_the_methods_own_unless_given() -> None:
    assert DESCENT.effective_base == "keep" and InitConfig(method="self").effective_base == "offset"
    assert InitConfig(method="descent", base="offset").effective_base == "offset"
    assert InitConfig(method="eva").effective_base == "keep" and InitConfig(method="eva").stated_base == "offset"


def test_outside_of_gradients_a_loss_needs_none() -> None:
    with torch.no_grad():
        assert float(scalar_loss(torch.tensor(2.0), 0)) == 2
    with pytest.raises(ValueError, match="does not depend on the weights"):
        scalar_loss(torch.tensor(2.0), 0)


def test_convolutions_take_the_step_too() -> None:
    from peft import LoraConfig
    from tests.tiny import denoise, unet, unet_batches

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return denoise(model, batch).square().mean()

    model, batches = unet(), unet_batches()
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1", "conv2"]))
    report = initialize(model, batches, DESCENT, loss=loss, progress=False)
    model.eval()
    with torch.no_grad():
        after = sum(float(loss(model, batch)) for batch in batches) / len(batches)
    assert after == pytest.approx(report.step["loss_after"], rel=1e-4) and after < report.step["loss_before"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_step_too(dtype: torch.dtype) -> None:
    report = initialize(adapted("bert", dtype=dtype), text_batches(), DESCENT, progress=False)
    assert report.step["loss_after"] < report.step["loss_before"] - 0.01


def test_a_trainer_gives_its_own_loss(tmp_path: Any) -> None:
    from tests.trainers.test_trainers import trainer_for

    from cntlora import initialize_from_trainer

    report = initialize_from_trainer(trainer_for(adapted(), tmp_path), DESCENT)
    assert report.step["loss_after"] < report.step["loss_before"]


@pytest.mark.parametrize("method", ["descent", "lora_ga"])
def test_logits_are_free_in_the_backward_pass(method: str) -> None:
    model, held, logits = adapted("llama"), list[bool](), list[Any]()
    inner = model.get_base_model()

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:  # not in the trials of descent's size
            output.register_hook(lambda gradient: held.append(logits[-1]() is not None))

    inner.lm_head.register_forward_hook(lambda module, args, output: logits.append(weakref.ref(output)))
    inner.model.norm.register_forward_hook(look)  # its gradient comes after that of the logits
    batches, kept = causal_batches(2), list[Any]()
    compute_plan(model, batches, InitConfig(method=method), progress=False)
    assert held == [False] * 2

    def keeping(model: nn.Module, batch: Any) -> Tensor:
        output = model(**batch)
        kept.append(output.logits)
        loss: Tensor = output.loss
        return loss

    compute_plan(model, batches, InitConfig(method=method), loss=keeping, progress=False)
    assert held[2:] == [True] * 2  # the control

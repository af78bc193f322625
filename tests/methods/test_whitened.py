"""Whitened mode: its equation, and that the outputs of every layer move alike, at any rank and alpha."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import (
    SIZES,
    Mlp,
    array,
    draw,
    gradients,
    inputs_of,
    lora,
    mlp,
    relative_error,
    squares,
    token_batches,
    wrapped,
)

from cntlora import Descent, InitConfig, InitPlan, Whitened, WhitenedDescent, compute_plan, initialize
from cntlora.linalg.moments import Moments
from cntlora.methods.estimator import absorb_batch
from cntlora.methods.target import Target


def plan_of(base: Any, batches: Any, config: Any = None, **options: Any) -> InitPlan:
    chosen = InitConfig(method=Whitened(**options))
    return compute_plan(wrapped(base, config), batches, chosen, loss=squares, progress=False)


def up_to_signs(A: np.ndarray, B: np.ndarray) -> float:
    """The relative distance of two matrices whose rows may differ in sign."""
    return relative_error(A * np.sign((A * B).sum(axis=1, keepdims=True)), B)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 5e-3)])
def test_a_is_that_of_the_equation_and_b_is_zero(dtype: torch.dtype, tolerance: float) -> None:
    base, batches = mlp(dtype=dtype), token_batches(SIZES, dtype=dtype)
    X, G = inputs_of(base, batches), gradients(base, batches)
    sites = plan_of(base, batches).sites
    for name, site in sites.items():
        W = array(base.get_submodule(name).weight)
        want = reference.whitened_factor(W, np.hstack(X[name]), G[name], 3, 2.0, len(sites))
        assert up_to_signs(array(site.A), want) < tolerance and not site.B.any()
        other = reference.whitened_factor(W, np.hstack(X[name]), array(draw(6, *W.shape)), 3, 2.0, len(sites))
        assert up_to_signs(array(site.A), other) > 0.3  # control: another gradient


def units(X: list[np.ndarray]) -> np.ndarray:
    """The tokens (d, n) of all batches, each of mean square 1."""
    x = np.hstack(X)
    return x / np.sqrt((x**2).mean(axis=0))


def motions(plan: InitPlan, base: Any, batches: Any) -> list[float]:
    """Return s·(Σ mean (A x)²)^½ / σ of every site, of x of unit size: the relative motion of the outputs by B = ±1."""
    X, found = inputs_of(base, batches), []
    for name, site in plan.sites.items():
        x = units(X[name])
        z, y = array(site.A) @ x, array(base.get_submodule(name).weight) @ x
        found.append(site.scaling * float(np.sqrt((z**2).mean(axis=1).sum() / (y**2).mean())))
    return found


def test_the_outputs_of_every_layer_move_alike_at_any_rank_and_alpha() -> None:
    base, batches = mlp(), token_batches(SIZES)
    for rank, alpha in ((3, 6.0), (3, 60.0), (2, 1.0), (5, 10.0)):
        plan = plan_of(mlp(), batches, lora(r=rank, alpha=alpha), damping=0.5 / rank)
        assert motions(plan, base, batches) == pytest.approx(alike(20.0, len(plan.sites)), rel=1e-5)
    plain = compute_plan(wrapped(mlp()), None, InitConfig(method="lora"), progress=False)
    assert max(motions(plain, base, batches)) > 1.05 * min(motions(plain, base, batches))  # control
    assert motions(plan_of(mlp(), batches, motion=8.0), base, batches) == pytest.approx(alike(8.0, 5), rel=1e-5)


def alike(together: float, layers: int) -> list[float]:
    """Motions of layers, the same for each, whose root sum of squares is `together`."""
    return [together / layers**0.5] * layers


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_motions_of_all_layers_add_up_to_the_same(layers: int) -> None:
    base, batches = mlp(), token_batches(SIZES)
    plan = plan_of(mlp(), batches, lora(targets=Mlp.targets[:layers]))
    assert len(plan.sites) == layers
    assert motions(plan, base, batches) == pytest.approx(alike(20.0, layers), rel=1e-5)
    assert motions(plan, base, batches) != pytest.approx(alike(20.0, layers + 1), rel=1e-2)  # control


def test_layers_that_wait_for_another_pass_count() -> None:
    batches = token_batches(SIZES)
    one = plan_of(mlp(), batches)
    several = compute_plan(
        wrapped(mlp()), batches, InitConfig(method=Whitened()), loss=squares, progress=False, max_memory="14KiB"
    )
    assert several.memory["passes"] > 1 == one.memory["passes"]
    for name, site in one.sites.items():
        assert torch.allclose(site.A, several.sites[name].A, rtol=1e-9)


def test_what_goes_into_b_is_white() -> None:
    base, batches = mlp(), token_batches(SIZES)
    X = inputs_of(base, batches)
    eva = compute_plan(wrapped(mlp()), batches, InitConfig(method="eva"), progress=False)
    for name, site in plan_of(mlp(), batches, damping=1e-9).sites.items():
        x = units(X[name])
        seen = [array(A) @ (x @ x.T) @ array(A).T for A in (site.A, eva.sites[name].A)]
        white, other = (relative_error(C / np.trace(C), np.eye(3) / 3) for C in seen)
        assert white < 1e-5 < 1e-2 < other  # control: EVA's directions have the variances of the inputs


def test_folded_alpha_moves_the_outputs_as_far() -> None:
    base, batches = mlp(), token_batches(SIZES)
    config = InitConfig(method=Whitened(), fold_alpha=True)
    plan = compute_plan(wrapped(mlp()), batches, config, loss=squares, progress=False)
    assert motions(plan, base, batches) == pytest.approx(alike(20.0, len(plan.sites)), rel=1e-5)


@pytest.mark.parametrize("method", [Whitened(), Descent()], ids=["whitened", "descent"])
def test_a_token_counts_the_same_however_large_it_is(method: Any) -> None:
    """As the first tokens of language models, whose activations in some layers are hundreds of times the others'."""
    W, G, X = draw(1, 6, 5), draw(2, 6, 5), draw(3, 40, 5)

    def target(factor: float) -> Target:
        made = method.estimator(lambda name: W, None)
        moments = Moments(5, unit=made.unit)
        moments.update(torch.cat([X[:1] * factor, X[1:]]))
        absorb_batch(made, [(("site",), moments)], 1.0)
        made.add_gradient("site", G.clone(), 1.0)
        return made.target("site", 1)

    usual, large = target(1.0), target(300.0)
    same = torch.allclose(usual.right, large.right, rtol=1e-9) and torch.allclose(usual.M, large.M, rtol=1e-9)
    assert same == (method.name == "whitened")  # control: descent minds, as its step is one of these outputs


# --- with a step in B ---------------------------------------------------------------------------------------


def stepped(config: Any = None, **options: Any) -> InitPlan:
    chosen = InitConfig(method=WhitenedDescent(**options))
    return compute_plan(wrapped(mlp(), config), token_batches(SIZES), chosen, loss=squares, progress=False)


def test_the_step_is_that_of_descent_for_tokens_of_unit_size() -> None:
    base, batches = mlp(), token_batches(SIZES)
    X, G = inputs_of(base, batches), gradients(base, batches)
    first = Mlp.targets[0]
    plan = stepped(lora(rank_pattern={first: 2}, alpha_pattern={first: 10.0}), strength=0.1)
    sizes, others = [], []
    for name, site in plan.sites.items():
        W, x = array(base.get_submodule(name).weight), units(X[name])
        moved = site.scaling * array(site.B) @ array(site.A)
        want, other = (reference.descent_delta(W, x, G[name], site.rank, damping) for damping in (1.0, 0.01))
        sizes.append((moved * want).sum() / (want**2).sum())
        others.append(relative_error(moved, sizes[-1] * other))
        assert relative_error(moved, sizes[-1] * want) < 1e-7
    assert sizes == pytest.approx([sizes[0]] * len(sizes), rel=1e-7)  # one number for all sites
    assert min(others) > 1e-2  # control: another damping
    assert len({site.scaling for site in plan.sites.values()}) == 2


def test_a_is_that_of_whitened_and_b_a_gradient_step() -> None:
    base, batches = mlp(), token_batches(SIZES)
    G, plain, plan = gradients(base, batches), plan_of(mlp(), batches), stepped(strength=0.1)
    for name, site in plan.sites.items():
        assert torch.equal(site.A, plain.sites[name].A)
        down = -G[name] @ array(site.A).T
        other = -array(draw(6, *G[name].shape)) @ array(site.A).T
        along, control = ((array(site.B) * d).sum() / np.linalg.norm(array(site.B)) for d in (down, other))
        assert along == pytest.approx(np.linalg.norm(down), rel=1e-7)
        assert control < 0.9 * np.linalg.norm(other)


def test_the_size_of_the_step_is_found_by_the_loss() -> None:
    batches = token_batches(SIZES)

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return float(np.mean([float(squares(model, x)) for x in batches[:4]]))

    model = wrapped(mlp())
    before = loss_of(model)
    report = initialize(model, batches, config=InitConfig(method="whitened_descent"), loss=squares, progress=False)
    step = report.step
    assert step["loss_before"] == pytest.approx(before, rel=1e-9)
    assert step["loss_after"] == pytest.approx(loss_of(model), rel=1e-6) and step["loss_after"] < before
    offset = wrapped(mlp())
    initialize(
        offset, batches, config=InitConfig(method="whitened_descent", base="offset"), loss=squares, progress=False
    )
    assert loss_of(offset) == pytest.approx(before, rel=1e-9)  # control: the function is kept


def test_a_step_that_hardly_lowers_the_loss_is_left_out() -> None:
    batches = token_batches(SIZES)

    def made(method: str, rest: float) -> Any:
        config = InitConfig(method=method)
        return initialize(
            model := wrapped(mlp()), batches, config, loss=lambda m, x: squares(m, x) + rest, progress=False
        ), max(float(p.abs().max()) for name, p in model.named_parameters() if "lora_B" in name)

    report, largest = made("whitened_descent", 1e6)
    assert largest == 0.0 and report.step["size"] == 0.0 and report.step["loss_after"] == report.step["loss_before"]
    assert "step: none (B = 0)" in str(report)
    for method, rest in (("whitened_descent", 0.0), ("descent", 1e6)):  # controls
        report, largest = made(method, rest)
        assert largest > 0.0 and report.step["size"] > 0.0 and "step: none" not in str(report)

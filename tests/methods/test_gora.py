"""GoRA: the gradient projected on random directions, its size, and ranks by importance."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import SIZES, Mlp, added, array, draw, gradients, mlp, relative_error, squares, token_batches, wrapped

from cntlora import InitConfig, compute_plan
from cntlora.methods.factors import lora_down
from cntlora.methods.gora import GAMMA, gora_ranks, gora_up
from cntlora.methods.target import RankFacts

R = 3


def test_b_is_the_nearest_to_the_gradient_for_this_a() -> None:
    G, A = draw(0, 9, 7), draw(1, R, 7)
    B = gora_up(G, A)
    step = -GAMMA * (7 / R) ** 0.5 * G
    assert relative_error(B, reference.gora_factor(array(G), array(A))) < 1e-10
    assert float(((B @ A - step) @ A.mT).norm()) < 1e-12 * float(step.norm())
    distance = float((B @ A - step).norm())
    assert all(float(((B + 1e-3 * draw(20 + i, 9, R)) @ A - step).norm()) > distance for i in range(20))
    assert relative_error(gora_up(G, 5 * A) @ (5 * A), B @ A) < 1e-12
    assert relative_error(gora_up(G, draw(2, 7, 7)) @ draw(2, 7, 7), -GAMMA * G) < 1e-10  # all directions: the step
    assert relative_error(-GAMMA * (7 / R) ** 0.5 * G @ A.mT, B) > 0.1  # the control: without (A Aᵀ)⁻¹


def test_the_size_is_that_of_the_step_over_the_draw_of_a() -> None:
    """E‖B·A‖² = γ²‖G‖²: with 2,000 draws within 2 %, where without √(d/r) it would be r/d of that."""
    G, r, d = draw(0, 6, 16), 4, 16
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(2000):
        A = lora_down(r, d, generator)
        sizes.append(float((gora_up(G, A) @ A).norm() / (GAMMA * G.norm())) ** 2)
    assert np.mean(sizes) == pytest.approx(1.0, abs=0.02)
    assert abs(np.mean(sizes) * r / d - 1.0) > 0.5  # the control


def test_the_start_goes_down_the_loss_and_draws_a_as_lora_does() -> None:
    base, batches = mlp(), token_batches(SIZES)
    plans = {
        method: compute_plan(
            wrapped(copy.deepcopy(base)), batches, InitConfig(method=method, base="keep"), loss=squares, progress=False
        )
        for method in ("gora", "lora")
    }
    G = gradients(base, batches)

    def loss(sign: float) -> float:
        moved = copy.deepcopy(base)
        with torch.no_grad():
            for name in Mlp.targets:
                moved.get_submodule(name).weight += sign * torch.as_tensor(added(plans["gora"].sites[name]))
            return sum(float(squares(moved, batch)) for batch in batches)

    assert loss(0.2) < loss(0.0) < loss(-0.2)  # the control: the sign of its authors' code goes up
    for name in Mlp.targets:
        assert torch.equal(plans["gora"].sites[name].A, plans["lora"].sites[name].A)
        assert float(np.sum(added(plans["gora"].sites[name]) * G[name])) < 0


# --- ranks ------------------------------------------------------------------------------------------------------


def facts(importance: dict[str, float], shapes: dict[str, tuple[int, int]]) -> dict[str, RankFacts]:
    return {name: RankFacts(shapes[name], [], value) for name, value in importance.items()}


def test_equal_shapes_get_ranks_in_proportion_to_their_importance() -> None:
    shapes = dict.fromkeys("abcd", (64, 64))
    sites = facts(dict(zip("abcd", (1.0, 2.0, 3.0, 6.0), strict=True)), shapes)
    assert gora_ranks(sites, 8, low=1) == {"a": 3, "b": 5, "c": 8, "d": 16}
    assert gora_ranks(sites, 8) == {"a": 4, "b": 5, "c": 8, "d": 16}  # by default half the reference at least
    assert gora_ranks(sites, 8, high=9)["d"] == 9
    many = {name: RankFacts(f.shape, [], 1e6 * (f.importance or 0)) for name, f in sites.items()}
    assert gora_ranks(many, 8) == gora_ranks(sites, 8) == gora_ranks(dict(reversed(sites.items())), 8)
    assert set(gora_ranks(facts(dict.fromkeys("abcd", 2.0), shapes), 8).values()) == {8}  # the control


def test_larger_layers_get_less_rank_for_the_same_importance() -> None:
    sites = facts({"small": 1.0, "wide": 1.0}, {"small": (64, 64), "wide": (64, 192)})
    assert gora_ranks(sites, 8) == {"small": 10, "wide": 7}
    with pytest.raises(ValueError, match="zero at every site"):
        gora_ranks(facts({"small": 0.0}, {"small": (64, 64)}), 8)


def test_adaptive_ranks_are_its_own() -> None:
    base, batches = mlp(), token_batches(SIZES)
    W = {name: array(base.get_submodule(name).weight) for name in Mlp.targets}
    G = gradients(base, batches)
    importance = {name: float(np.abs(W[name] * G[name]).mean()) for name in W}
    config = InitConfig(method="gora", adaptive_ranks=True)
    plan = compute_plan(wrapped(base), batches, config, loss=squares, progress=False)
    ranks = {name: site.rank for name, site in plan.sites.items()}
    shapes: dict[str, tuple[int, int]] = {name: W[name].shape for name in W}  # type: ignore[misc]
    assert ranks == reference.gora_ranks(importance, shapes, R, low=1, high=4 * R)
    assert len(set(ranks.values())) > 1
    turned = dict(zip(importance, reversed(importance.values()), strict=True))  # the control: other importances
    assert ranks != reference.gora_ranks(turned, shapes, R, low=1, high=4 * R)
    bounded = InitConfig(method="gora", adaptive_ranks=True, min_rank=2, max_rank=4)
    found = compute_plan(wrapped(copy.deepcopy(base)), batches, bounded, loss=squares, progress=False)
    assert {site.rank for site in found.sites.values()} <= {2, 3, 4}


def test_the_gradient_is_all_that_it_reads() -> None:
    """Two halves of the batches average to the whole: the start is linear in the mean gradient."""
    base, batches = mlp(), token_batches(SIZES)
    whole, one, two = (
        compute_plan(
            wrapped(copy.deepcopy(base)), part, InitConfig(method="gora", base="keep"), loss=squares, progress=False
        )
        for part in (batches, batches[:2], batches[2:])
    )
    for name in Mlp.targets:
        mean = (added(one.sites[name]) + added(two.sites[name])) / 2
        assert relative_error(mean, added(whole.sites[name])) < 1e-8
        assert relative_error(added(one.sites[name]), added(whole.sites[name])) > 1e-3  # the control

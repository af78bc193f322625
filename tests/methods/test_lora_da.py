"""LoRA-DA: what its start is best for, its limits, and the output gradients that it reads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import (
    SIZES,
    Mlp,
    added,
    array,
    draw,
    mlp,
    output_squares,
    relative_error,
    squares,
    token_batches,
    wrapped,
)
from tests.tiny import adapted, text_batches
from torch import Tensor, nn

from cntlora import InitConfig, LoraDa, compute_plan
from cntlora.data.gradients import weight_gradients
from cntlora.linalg.damping import damped_inverse
from cntlora.methods.lora_da import GAMMA, lora_da_target
from cntlora.model.sites import find_sites

R = 3


def data(seed: int = 0, k: int = 9, d: int = 7, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """G (k, d), X (d, n) of unequal directions, and f (k,)."""
    scale = torch.logspace(1, -1, d, dtype=torch.float64)[:, None]
    return draw(seed, k, d), scale * draw(seed + 1, d, n), draw(seed + 2, k).square() + 0.1


def factors(G: Tensor, X: Tensor, f: Tensor, damping: float = 0.01, variance: float = 0.0) -> tuple[Tensor, Tensor]:
    """B (k, r) and A (r, d) times √γ, so that A has orthonormal rows."""
    _, inverse = damped_inverse(X @ X.mT / X.shape[1], damping)
    known = lora_da_target(G, inverse, f, damping, variance).known
    assert known is not None
    found = known(R)
    return found.U[:, :R], found.Vh[:R]


def overlap(A: Tensor, other: Tensor) -> float:
    """Overlap of two row spaces, 1 where they are the same; the rows of both are orthonormal."""
    return float((A @ other.mT).square().sum()) / len(A)


def test_the_factors_are_those_of_the_reference() -> None:
    G, X, f = data()
    for damping, variance in ((0.01, 0.03e-5), (0.1, 1.0), (1e-6, 1e-3)):
        B, A = factors(G, X, f, damping, variance)
        want_B, want_A = reference.lora_da_factors(*map(array, (G, X, f)), R, damping, variance, samples=1)
        assert relative_error(B @ A / GAMMA, want_B @ want_A) < 1e-8
        assert overlap(A, torch.as_tensor(want_A) * GAMMA**0.5) > 1 - 1e-8
        other, _ = reference.lora_da_factors(*map(array, (G, X, f + 1.0)), R, damping, variance, samples=1)
        assert relative_error(B, other * GAMMA**0.5) > 1e-3  # the control: other output gradients


def test_with_equal_curvature_it_is_a_step_of_gradient_descent() -> None:
    """C = I, f = 1 and no variance: the truncated gradient, as LoRA-One has it up to γ."""
    G, X, f = data()
    Q = torch.linalg.qr(draw(9, 40, 7)).Q.mT * 40**0.5  # X Xᵀ/n = I
    B, A = factors(G, Q, torch.ones_like(f))
    U, S, Vh = torch.linalg.svd(G)
    assert relative_error(B @ A, -(U[:, :R] * S[:R]) @ Vh[:R] / S[0]) < 1e-10
    B, A = factors(G, X, f)
    assert relative_error(B @ A, -(U[:, :R] * S[:R]) @ Vh[:R] / S[0]) > 0.1  # the control


def test_a_is_the_best_of_all_frames_and_b_the_projection_of_the_step() -> None:
    G, X, f = data()
    damping, variance = 0.01, 5.0
    B, A = factors(G, X, f, damping, variance)
    _, inverse = damped_inverse(X @ X.mT / X.shape[1], damping)
    fisher = f + damping * f.mean()
    step = -(G / fisher[:, None]) @ inverse
    size = torch.linalg.matrix_norm(step, 2)
    omega = variance * (1 / fisher).sum() / size**2 * inverse - (step / size).mT @ (step / size)

    def error(frame: Tensor) -> float:
        return float(torch.trace(frame @ omega @ frame.mT))

    frames = [torch.linalg.qr(draw(50 + i, 7, R)).Q.mT for i in range(200)]
    assert all(error(A) < error(frame) for frame in frames)
    assert error(factors(G, X, f, damping)[1]) > error(A) + 1e-6  # the control: the frame without the variance
    assert relative_error(A @ A.mT, torch.eye(R)) < 1e-10
    assert relative_error(B, step / size @ A.mT) < 1e-10


def test_few_samples_take_the_directions_of_the_inputs_and_many_those_of_the_step() -> None:
    G, X, f = data()
    inputs = torch.linalg.svd(X).U[:, :R].mT
    step = factors(G, X, f)[1]
    assert overlap(factors(G, X, f, variance=1e9)[1], inputs) > 0.999
    assert overlap(factors(G, X, f, variance=1e-15)[1], step) > 0.999
    assert overlap(step, inputs) < 0.7  # the control: the two are not the same


def test_the_units_of_the_loss_do_not_matter_and_inputs_may_be_rotated() -> None:
    G, X, f = data()
    B, A = factors(G, X, f, variance=0.05)
    scaled = factors(1e3 * G, X, 1e6 * f, variance=0.05)
    assert relative_error(scaled[0] @ scaled[1], B @ A) < 1e-9
    Q = torch.linalg.qr(draw(8, 7, 7)).Q
    turned = factors(G @ Q.mT, Q @ X, f, variance=0.05)
    assert relative_error(turned[0] @ turned[1], B @ A @ Q.mT) < 1e-9
    P = torch.linalg.qr(draw(8, 9, 9)).Q  # the control: outputs may not, f being a diagonal
    turned = factors(P @ G, X, f, variance=0.05)
    assert relative_error(turned[0] @ turned[1], P @ B @ A) > 1e-2


# --- the output gradients -------------------------------------------------------------------------------------


def read_squares(model: nn.Module, batches: list[Tensor], names: tuple[str, ...] = Mlp.targets) -> dict[str, Tensor]:
    """Σ over tokens of (b·∂L/∂y)² of every site, as the data pass reads it."""
    found: dict[str, Tensor] = {}
    sites = [site for site in find_sites(model)[0] if site.name in names]

    def take(index: int, name: str, total: Tensor) -> None:
        found[name] = found[name] + total if name in found else total

    with weight_gradients(model, sites, lambda *_: None, take) as backward:
        for index, batch in enumerate(batches):
            backward(index, squares(model, batch))
    assert not any(module._forward_hooks for module in model.modules())
    return found


def test_the_output_gradients_are_those_of_autograd() -> None:
    base, batches = mlp(), token_batches(SIZES)
    tokens = sum(rows * length for rows, length in SIZES)
    want = output_squares(base, batches)
    found = read_squares(wrapped(base), batches)
    assert found.keys() == want.keys()
    for name in want:
        assert relative_error(found[name] / tokens, want[name]) < 1e-10
        assert relative_error(found[name] / tokens, want[name][::-1].copy()) > 1e-2  # the control


def test_how_samples_are_batched_does_not_matter() -> None:
    """One batch of b samples gives the sums of b batches of one, since the loss is a mean over samples."""
    base, (x,) = mlp(), token_batches(((6, 4),))
    whole = read_squares(wrapped(copy.deepcopy(base)), [x])
    single = read_squares(wrapped(copy.deepcopy(base)), list(x.split(1)))
    for name in whole:
        assert relative_error(whole[name], single[name]) < 1e-10
    plans = [
        compute_plan(wrapped(copy.deepcopy(base)), batches, config, loss=squares, progress=False)
        for config, batches in (
            (InitConfig(method=LoraDa(variance=1e3), base="keep"), [x]),
            (InitConfig(method=LoraDa(variance=1e3), base="keep", num_batches=6), list(x.split(1))),
            (InitConfig(method=LoraDa(variance=0.0), base="keep"), [x]),
        )
    ]
    for name in Mlp.targets:
        one, split, without = (added(plan.sites[name]) for plan in plans)
        assert relative_error(split, one) < 1e-8
        assert relative_error(without, one) > 1e-3  # the control: the variance, which depends on the samples, counts


class Twice(nn.Module):
    """A layer that is called twice, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).flatten(2).mT
        return self.line(torch.tanh(self.line(rows)))


def test_convolutions_and_layers_that_are_called_twice() -> None:
    from tests.cases import lora

    torch.manual_seed(0)
    base, batch = Twice().double(), draw(3, 2, 2, 5, 5)
    outputs: dict[str, list[Tensor]] = {"conv": [], "line": []}

    def keep(name: str) -> Any:
        return lambda module, args, output: (output.retain_grad(), outputs[name].append(output))[0]

    bare = copy.deepcopy(base)
    for name in outputs:
        bare.get_submodule(name).register_forward_hook(keep(name))
    squares(bare, batch).backward()
    want = {
        "conv": (2 * outputs["conv"][0].grad).square().sum(dim=(0, 2, 3)),
        "line": sum((2 * y.grad).square().sum(dim=(0, 1)) for y in outputs["line"]),
    }
    found = read_squares(wrapped(base, lora(targets=["conv", "line"])), [batch], ("conv", "line"))
    for name in want:
        assert relative_error(found[name], want[name]) < 1e-10
    assert len(outputs["line"]) == 2


def test_in_half_precision_the_loss_is_scaled_and_the_squares_are_not() -> None:
    """Σ (∂ℓ/∂y)² of 1e-10 is nothing in float16; what is read there is that of float32 within its rounding."""
    batches = text_batches(2)
    plans = [compute_plan(adapted("bert").to(dtype), batches, InitConfig(method="lora_da", base="keep"), progress=False)
             for dtype in (torch.float32, torch.float16)]  # fmt: skip
    for name, site in plans[0].sites.items():
        product, half = (plan.sites[name].B.float() @ plan.sites[name].A.float() for plan in plans)
        assert relative_error(half, product) < 0.1, name
        assert bool(product.any()) and site.rank > 0


def test_adaptive_ranks_follow_the_gain_of_each_direction() -> None:
    base, batches = mlp(), token_batches(SIZES)
    config = InitConfig(method="lora_da", adaptive_ranks=True, rank_budget=11)
    plan = compute_plan(wrapped(base), batches, config, loss=squares, progress=False)
    ranks = {name: site.rank for name, site in plan.sites.items()}
    assert sum(ranks.values()) == 11 and len(set(ranks.values())) > 1


@pytest.mark.parametrize("option", ["variance", "samples"])
def test_its_own_options_are_checked(option: str) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        LoraDa(**{option: -1})
    with pytest.raises(TypeError, match="samples: expected a whole number"):
        LoraDa(samples=0.5)  # type: ignore[arg-type]
    assert np.isfinite(LoraDa(variance=0.0).variance)

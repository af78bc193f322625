"""The loss that a gradient tells, and the fit of a layer: its optimum by the equations, and where nothing is gained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import array, draw
from torch import Tensor
from torch.nn import functional as F

from cntlora.linalg.output_loss import BINARY, CROSS_ENTROPY, SQUARES, Targets, fit_layer, folds_of, targets_of

CLASSES = torch.arange(24) % 4
LABELS = (draw(3, 24, 4) > 0).double()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
Loss = Callable[[Tensor], Tensor]
KNOWN: dict[str, tuple[Loss, object]] = {
    "classes": (lambda z: F.cross_entropy(z, CLASSES), CROSS_ENTROPY),
    "classes, summed": (lambda z: F.cross_entropy(z, CLASSES, reduction="sum"), CROSS_ENTROPY),
    "weighted classes": (lambda z: F.cross_entropy(z, CLASSES, weight=WEIGHTS), CROSS_ENTROPY),
    "smoothed classes": (lambda z: F.cross_entropy(z, CLASSES, label_smoothing=0.1), CROSS_ENTROPY),
    "labels": (lambda z: F.binary_cross_entropy_with_logits(z, LABELS), BINARY),
    "squares": (lambda z: F.mse_loss(z, LABELS), SQUARES),
}
OTHERS: dict[str, Loss] = {
    "margins": lambda z: F.multi_margin_loss(z, CLASSES),
    "absolute": lambda z: F.l1_loss(z, LABELS),
    "focal": lambda z: ((1 - torch.exp(-F.cross_entropy(z, CLASSES, reduction="none"))) ** 2 * z.logsumexp(1)).mean(),
    "fourth powers": lambda z: (z - LABELS).pow(4).mean(),
}


def told(loss: Loss, z: Tensor, dtype: torch.dtype = torch.float64) -> Targets | None:
    z = z.to(dtype).requires_grad_(True)
    value = loss(z)
    (g,) = torch.autograd.grad(value, z)
    return targets_of(z.detach().double(), g.double(), value.item(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KNOWN)
def test_the_gradient_tells_the_loss_and_its_targets(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and name == "weighted classes":
        pytest.skip("its class weights are float64")
    loss, kind = KNOWN[name]
    z = draw(1, 24, 4)
    found = told(loss, z, dtype)
    assert found is not None and found.loss is kind
    want = F.one_hot(CLASSES, 4).double() if kind is CROSS_ENTROPY else LABELS
    if name == "smoothed classes":
        want = 0.9 * want + 0.1 / 4
    assert torch.allclose(found.y, want, atol=1e-4)
    # the same loss up to a constant, at other outputs too
    other, total = draw(2, 24, 4), found.w.sum()
    losses = [(found.w * found.loss.value(at, found.y)).sum().item() / total.item() for at in (z, other)]
    assert losses[1] - losses[0] == pytest.approx((loss(other) - loss(z)).item() / total.item(), rel=1e-3)


def test_one_logit_is_told_from_squares_by_the_value() -> None:
    z, y = draw(1, 24, 1), (draw(5, 24, 1) > 0).double()
    binary = told(lambda z: F.binary_cross_entropy_with_logits(z, y), z)
    squares = told(lambda z: F.mse_loss(z, y), z)
    assert binary is not None and binary.loss is BINARY and squares is not None and squares.loss is SQUARES


def test_right_rows_have_the_weight_of_the_others() -> None:
    """In float32 a row that is as good as right says nothing of its weight."""
    z = draw(1, 24, 4) + 30.0 * F.one_hot(CLASSES, 4) * (torch.arange(24) < 12)[:, None]
    found = told(lambda z: F.cross_entropy(z, CLASSES), z, torch.float32)
    assert found is not None and torch.allclose(found.w, torch.full((24,), 1 / 24, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_not_taken_for_one_of_these(name: str) -> None:
    assert told(OTHERS[name], draw(1, 24, 4)) is None


def problem(kind: str, n: int, d: int) -> tuple[Tensor, Tensor, Targets]:
    """Inputs that tell the targets, and the outputs of a layer of small random weights."""
    X = draw(7, n, d) * torch.linspace(0.2, 2.0, d, dtype=torch.float64)
    score = X[:, -6:] @ draw(8, 6, 4) + 0.3
    y = {"labels": (score > 0).double(), "squares": score}.get(kind, F.one_hot(score.argmax(-1), 4).double())
    loss = {"labels": BINARY, "squares": SQUARES}.get(kind, CROSS_ENTROPY)
    return X, 0.02 * X @ draw(9, d, 4), Targets(loss, y, 0.5 + torch.rand(n, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "d"), [(40, 12), (60, 80)])
@pytest.mark.parametrize("kind", ["classes", "labels", "squares"])
def test_the_fit_is_the_optimum_of_its_equation(kind: str, n: int, d: int, bias: bool) -> None:
    torch.manual_seed(0)
    X, z, targets = problem(kind, n, d)
    fit = fit_layer(X, z, targets, folds_of(list(range(n))), bias)
    assert fit.ridge is not None and fit.after < fit.before
    args = (array(X), array(z), array(targets.y), array(targets.w), targets.loss.name, fit.ridge, bias)
    D, e = array(fit.delta), array(fit.bias)
    at_fit, by_delta, by_bias = reference.head_objective(D, e, *args)
    at_none, none_by_delta, _ = reference.head_objective(0 * D, 0 * e, *args)
    # what is left of the gradient, at a change of 1e-5 in the loss: about its square root
    assert np.linalg.norm(by_delta) < 0.02 * np.linalg.norm(none_by_delta) and at_fit < at_none
    assert np.abs(by_bias).max() < 0.02 if bias else not e.any()
    for change in (0.7, 1.4):  # control: the objective is no flat one
        assert reference.head_objective(change * D, e, *args)[0] > at_fit + 1e-4


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_a_layer_that_is_fitted_is_left_as_it_is(kind: str) -> None:
    torch.manual_seed(0)
    X, z, targets = problem(kind, 40, 12)
    best = X[:, -6:] @ draw(8, 6, 4) + 0.3  # the very scores that the targets are made from
    again = fit_layer(X, 50 * best, targets, folds_of(list(range(40))), True)
    assert again.ridge is None and not again.delta.any() and not again.bias.any() and again.after == again.before
    assert fit_layer(X, z, targets, folds_of(list(range(40))), True).ridge is not None  # control


def test_noise_is_not_fitted() -> None:
    """Targets that have nothing to do with the inputs: the shares of classes are all that is learned."""
    g = torch.Generator().manual_seed(0)
    X, y = draw(7, 48, 30), F.one_hot(torch.randint(0, 4, (48,), generator=g), 4).double()
    noise = fit_layer(
        X,
        torch.zeros(48, 4, dtype=torch.float64),
        Targets(CROSS_ENTROPY, y, torch.ones(48).double()),
        folds_of(list(range(48))),
        True,
    )
    assert noise.ridge is None or noise.ridge >= 1.0


def test_folds_are_of_whole_batches() -> None:
    assert folds_of([0, 0, 1, 1, 2, 5]).tolist() == [0, 0, 1, 1, 2, 1]
    assert folds_of([3, 3, 3]).tolist() == [0, 1, 2]  # of one batch, rows

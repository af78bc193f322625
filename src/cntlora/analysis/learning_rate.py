"""A learning rate for a start: from how far AdamW's first update moves the outputs of the adapted layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import default_forward, device_of, scalar_loss, to_device, unwrapped
from ..data.gradients import gradients_of
from ..data.reading_mode import as_found
from ..messages import check_number
from ..model.sites import Site, find_sites
from ..model.writer import change_rate

RATE = 1e-3
"""The rate of the update that is tried and taken back."""
FACTOR, EXPONENT, MOST = 0.027, 2 / 3, 3e-3
"""Of the rule: FACTOR and EXPONENT fitted on three tasks of the records; MOST, beyond which every method fails on some
task (docs/math/learning_rate.md)."""
ENTRIES = 2**16
"""About so many entries of a layer's outputs are compared at most, or twice as many."""


@dataclass(frozen=True)
class ProposedRate:
    """A learning rate for AdamW, and what it was read from.

    Attributes:
        learning_rate: the peak rate, after a warm-up.
        motion: site name → ‖Δy‖/‖y‖ of its outputs y with the first update, per unit of rate.
        batches: whose gradients gave the update.
    """

    learning_rate: float
    motion: dict[str, float]
    batches: int


def propose_learning_rate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
    num_batches: int = 4,
) -> ProposedRate:
    """Propose a learning rate for AdamW from the start that the model has; the model is left as found.

    AdamW's first update moves every trained parameter by lr·sign(∂L/∂θ). Let m be the median over the adapted layers of
    the relative change of their outputs per unit of rate, ‖y(θ − ε sign g) − y(θ)‖ / (ε ‖y(θ)‖) with ε = 1e-3. Then

        lr = min(0.027 · m^(−2/3), 3e-3)

    It works for any start, also for plain LoRA, and for any rank and alpha. It costs a forward and a backward pass over
    the batches and two forward passes of the first one. The rule is fitted to trainings of 40 steps; how near it comes
    to swept rates is measured in docs/math/learning_rate.md.

    Args:
        model: with an initialised adapter of LoRA layers; all that has `requires_grad` takes part.
        batches: with labels, as the model takes them; the first `num_batches` are read.
        loss: `loss(model, batch)`, a scalar; None for the loss in the model's own output.
        adapter_name: of the adapter.
        num_batches: how many batches the gradient is the mean of.

    Returns:
        The rate and the motion of every site.

    Raises:
        ValueError: without LoRA layers, batches, a loss, or a parameter that trains, or if no output moves.
    """
    sites, _ = find_sites(model, adapter_name)
    bare = unwrapped(model)
    trained = [p for p in bare.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient, so nothing trains; set requires_grad of the adapter")
    call = loss or default_forward
    with as_found(bare, batches):
        read = [to_device(batch, device_of(bare)) for batch in islice(batches, num_batches)]
        if not read:
            raise ValueError("batches: expected at least one, got none")
        bare.eval()
        with gradients_of(trained, bare):
            with torch.enable_grad():
                for index, batch in enumerate(read):
                    scalar_loss(call(bare, batch), index).backward()  # type: ignore[no-untyped-call]
            update = [None if p.grad is None else p.grad.sign() for p in trained]
        before = _outputs(bare, sites, call, read[0])
        with _moved(trained, update, -RATE):
            after = _outputs(bare, sites, call, read[0])
    motion = {name: _relative(after[name], y) / RATE for name, y in before.items() if name in after and y.any()}
    middle = median(motion.values()) if motion else 0.0
    if not middle > 0:
        raise ValueError("the first update moves no output of an adapted layer; does the loss depend on the adapter?")
    return ProposedRate(rate_of(middle), motion, len(read))


def fit_learning_rate(
    model: nn.Module,
    learning_rate: float,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
    num_batches: int = 4,
) -> ProposedRate:
    """Rescale a start so that the learning rate that you will train with is the one that it wants.

    AdamW moves every parameter by about its rate, whatever the size of the gradient. So an adapter with A/f, B/f and
    the scaling f²·s learns at the rate lr/f exactly what A, B and s learn at lr. f is the rate that
    `propose_learning_rate` gives for the start, divided by yours. The function of the model stays the same, and the
    file stays an ordinary LoRA (with another alpha). Call it between `initialize` and the optimizer; it works for any
    start, also for plain LoRA.

    It is exact for AdamW and its kin without weight decay and clipping (AdamW decays by lr·λ, so λ would have to be f
    times as large). It is not for SGD. What trains besides A and B, as a new head or DoRA's magnitudes, is left as it
    is and trains at your rate.

    Args:
        model: with an initialised adapter; its A, B, scaling and alpha are changed.
        learning_rate: the peak rate of your training.
        batches, loss, adapter_name, num_batches: as of `propose_learning_rate`.

    Returns:
        The rate that the start wanted before, so that f is its `learning_rate` divided by yours.

    Raises:
        ValueError: for a rate that is not above zero, base "subtract", or factors that are offloaded or partitioned;
            else as of `propose_learning_rate`. Nothing is changed then.
    """
    check_number("learning_rate", learning_rate, 0.0, math.inf, "the peak rate of your training", open_low=True)
    found = propose_learning_rate(model, batches, loss=loss, adapter_name=adapter_name, num_batches=num_batches)
    change_rate(model, found.learning_rate / learning_rate, adapter_name)
    return found


def rate_of(motion: float) -> float:
    """min(FACTOR · m^(−EXPONENT), MOST) for a relative motion m of the outputs per unit of rate."""
    return min(FACTOR * motion**-EXPONENT, MOST)


def _relative(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def _outputs(
    model: nn.Module, sites: list[Site], call: Callable[[nn.Module, Any], Any], batch: Any
) -> dict[str, Tensor]:
    """Return what the adapted layers give for a batch, at most ENTRIES entries of each, evenly spaced."""
    found: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            flat = output.detach().flatten()
            found[name] = flat[:: max(1, len(flat) // ENTRIES)].float().clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            stack.callback(site.layer.register_forward_hook(see(site.name)).remove)
        call(model, batch)
    return found


@contextmanager
def _moved(parameters: list[nn.Parameter], direction: list[Tensor | None], amount: float) -> Iterator[None]:
    """Context in which the parameters are moved along a direction; afterwards they have their old values."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                if d is not None:
                    p.add_(d, alpha=amount)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)

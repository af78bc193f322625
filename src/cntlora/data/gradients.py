"""Gradients of the loss by the pretrained weights, for the methods that read them; the model is left as found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..linalg.parallel import read_back
from ..model.layouts import as_matrix
from ..model.patches import is_convolution
from ..model.sharded import full, is_sharded
from .batches import scalar_loss

if TYPE_CHECKING:
    from ..model.sites import Site

OnGradient = Callable[[int, str, Tensor], None]
"""Called for each batch and site: batch index, name of the site, ∂L/∂W (k, d)."""


@contextmanager
def gradients_of(parameters: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Context in which `parameters` are the only ones of the model with gradients; afterwards all are as before."""
    wanted = list(parameters)
    found = [(p, p.requires_grad, p.grad) for p in {id(p): p for p in (*model.parameters(), *wanted)}.values()]
    try:
        for p, *_ in found:
            p.requires_grad_(False)
            p.grad = None
        for p in wanted:
            p.requires_grad_(True)
        yield
    finally:
        for p, wants, gradient in found:
            p.requires_grad_(wants)
            p.grad = gradient


class _OutputSquares:
    """Σ over tokens of (b·∂L/∂y)² (k,) of every site, in the backward pass of one batch of b samples.

    L is the mean over the samples of a batch, so that b·∂L/∂y is the gradient of the loss of a single one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def hook(self, site: Site) -> Callable[..., Any]:
        def see(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor) and output.requires_grad:
                # a view loses its hooks where the model edits it in place (Longformer's global queries)
                output = output.clone() if output._is_view() else output
                output.register_hook(add)
            return output

        def add(gradient: Tensor) -> None:
            rows = gradient.movedim(1, -1) if is_convolution(site.base) else gradient
            each = rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).reshape(-1, rows.shape[-1])
            found = (len(gradient) * each).square().sum(dim=0)
            self.sums[site.name] = self.sums[site.name] + found if site.name in self.sums else found

        return see


@contextmanager
def weight_gradients(
    model: nn.Module, sites: list[Site], sink: OnGradient, output_sink: OnGradient | None = None
) -> Iterator[Callable[[int, Any], None]]:
    """Context in which only the weights of the sites have gradients; the yielded function runs the backward pass.

    It takes the index of the batch and what the model gave for it. It hands ∂L/∂W of every site to `sink`, which may
    keep it, and to `output_sink` the sum (k,) over tokens of (∂ℓ/∂y)², ℓ being the loss of one sample. The gradients
    and the `requires_grad` of all parameters are as before afterwards, also after an exception.

    A gradient is handed on when it is there, so that no two are held at a time; not those of float16, which may have to
    be computed again, and of sharded weights, for which processes wait for each other.
    """
    weights = {site.name: site.stored for site in sites}
    squares = _OutputSquares()
    early = not any(weight.dtype == torch.float16 or is_sharded(weight) for weight in weights.values())
    taken = _Taken(sink)

    def backward(index: int, output: Any) -> None:
        taken.index, taken.finite = index, {}
        scale = _backward(scalar_loss(output, index), list(weights.values()), squares.sums.clear)
        if early:
            _check_finite(taken.finite, index)
            for name in taken.finite:
                if output_sink is not None and name in squares.sums:  # not where the loss leaves a layer out
                    output_sink(index, name, squares.sums[name])
            return
        reached = [site for site in sites if weights[site.name].grad is not None]
        _check_finite({site.name: _finite(weights[site.name].grad) for site in reached}, index)
        for site in reached:
            gradient = weights[site.name].grad
            assert gradient is not None
            unscaled = gradient if scale == 1.0 else gradient.float() / scale
            sink(index, site.name, as_matrix(site.base, unscaled))
            if output_sink is not None and site.name in squares.sums:  # not where the loss leaves a layer out
                output_sink(index, site.name, squares.sums[site.name] / scale**2)
        for weight in weights.values():
            weight.grad = None

    with ExitStack() as stack:
        stack.enter_context(gradients_of(weights.values(), model))
        for site in sites if early else ():
            stack.callback(weights[site.name].register_post_accumulate_grad_hook(taken.hook(site)).remove)
        for site in sites if output_sink is not None else ():
            stack.callback(site.layer.register_forward_hook(squares.hook(site)).remove)
        yield backward


class _Taken:
    """Hand gradients on while the backward pass of one batch runs.

    Attributes:
        index: of the batch. finite: site name → whether its gradient is finite ().
    """

    def __init__(self, sink: OnGradient) -> None:
        self.sink, self.index = sink, 0
        self.finite: dict[str, Tensor] = {}

    def hook(self, site: Site) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient = weight.grad
            assert gradient is not None
            weight.grad = None
            fine = _finite(gradient)
            # several times a pass where a part of the model runs backward by itself (gradient checkpointing)
            self.finite[site.name] = fine & self.finite[site.name] if site.name in self.finite else fine
            self.sink(self.index, site.name, as_matrix(site.base, gradient))

        return take


def _finite(gradient: Tensor | None) -> Tensor:
    """Return whether a gradient has no NaN or Inf, boolean (): by its sum, a single look that stores nothing."""
    assert gradient is not None
    return full(gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)).isfinite())


def _check_finite(found: Mapping[str, Tensor], index: int) -> None:
    """Raise ValueError for the first site whose gradient is not finite; reads back from the device once."""
    finite = read_back([fine[None] for fine in found.values()])
    for name, fine in zip(found, finite, strict=True):
        if not fine[0]:
            raise ValueError(f"site {name}, batch {index}: its gradient has NaN or Inf; check the batch and the dtype")


def _backward(loss: Tensor, weights: list[Tensor], begin: Callable[[], None]) -> float:
    """Backward of the loss times a power of two, which it returns: float16 gradients under 6e-8 would vanish.

    Args:
        begin: called before each attempt.
    """
    half = any(weight.dtype == torch.float16 for weight in weights)
    for power in (14, 10, 6, 3) if half else ():
        begin()
        (loss.float() * 2.0**power).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if all(bool(w.grad.isfinite().all()) for w in weights if w.grad is not None):
            return 2.0**power
        for weight in weights:
            weight.grad = None
    begin()
    loss.backward()  # type: ignore[no-untyped-call]
    return 1.0

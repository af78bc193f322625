"""A new head that starts fitted to the features of the pretrained model, and not at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import default_forward, device_of, loss_in, to_device, unwrapped
from ..data.reading_mode import as_found, read_eagerly
from ..execution.distributed import choose_executor
from ..linalg.output_loss import Targets, fit_layer, folds_of, targets_of
from ..messages import check_integer, counted
from ..model.sharded import is_sharded

MOST_ROWS = 2048
"""Rows that a head is fitted to at most, evenly spaced; a token classifier has one a token."""


@dataclass(frozen=True)
class FittedHead:
    """What was fitted, and how well it does on rows that took no part.

    Attributes:
        name: of the layer.
        loss: "cross-entropy", "binary cross-entropy" or "squares".
        loss_before, loss_after: the mean of it over rows that the fit left out in turn, with the head as it was and
            fitted; equal where nothing lowers it, and the head is left as it was.
        ridge: of the fit, in units of the mean variance of a feature; None where the head is left as it was.
        rows, batches: that were read.
    """

    name: str
    loss: str
    loss_before: float
    loss_after: float
    ridge: float | None
    rows: int
    batches: int

    def __str__(self) -> str:
        size = f"{counted(self.rows, 'row')} of {counted(self.batches, 'batch')}"
        if self.ridge is None:
            return f"head {self.name}: left as it was ({self.loss} {self.loss_before:.3f}; no fit to {size} is better)"
        return (
            f"head {self.name}: fitted to {size}, {self.loss} {self.loss_before:.3f} → {self.loss_after:.3f} on rows "
            "left out"
        )


def fit_head(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    num_batches: int = 8,
) -> FittedHead:
    """Fit a new head to the features that the model has before training; call it before `initialize`.

    A new head begins at random, and layers below it get gradients through random weights until it has been learned.
    This fits the last linear layer in closed form, as far as the batches say, and changes nothing else:

        min over D, e:  mean ℓ(W h + b + D h + e, y) + ½ ridge·v·‖D‖²

    h are its inputs, v their mean variance, W and b the layer as it is. The ridge is the one with the lowest loss on
    batches that are left out in turn; where none lowers it, as for a head that is trained already, nothing is changed.
    The loss ℓ (cross-entropy of classes or of labels, squares) and the targets y are read from ∂L/∂z of the layer's
    outputs z, so that any batch and any `loss` will do that has such a one at its end. It takes a forward pass.

    With several processes, all call it, each with its own batches; the fit is to the rows of all.

    Args:
        model: with its adapter; the head has to train, as PEFT's `modules_to_save` do.
        batches: with labels, as the model takes them; the first `num_batches` are read.
        loss: `loss(model, batch)`, a scalar; None for the loss in the model's own output.
        num_batches: of each process.

    Returns:
        What was fitted: `print` it.

    Raises:
        ValueError: if no linear layer that trains gives the outputs of such a loss, if it has more outputs than there
            are rows (as the head of a language model), or its weights are sharded. Nothing is changed then.
    """
    check_integer("num_batches", num_batches, 1)
    bare, executor = unwrapped(model), choose_executor(model)
    heads = _candidates(bare)
    read = executor.run(lambda: _read(bare, heads, batches, loss or default_forward, num_batches), "reading the head")
    parts = executor.gather(read)
    rows = _joined([part for part in parts if part is not None], heads)
    layer = heads[rows.name]
    fit = executor.gather(fit_layer(rows.X, rows.z, rows.targets, folds_of(rows.batch), layer.bias is not None))[0]
    if fit.ridge is not None:
        with torch.no_grad():
            for parameter, change in ((layer.weight, fit.delta), (layer.bias, fit.bias)):
                if parameter is not None:
                    parameter.copy_(parameter.double() + change.to(parameter.device))
    return FittedHead(
        rows.name, rows.targets.loss.name, fit.before, fit.after, fit.ridge, len(rows.X), len(set(rows.batch))
    )


def _candidates(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose own weight trains, by name: not those that LoRA adapts, and not its factors."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and ".lora_" not in f".{name}"
    }
    if not found:
        raise ValueError(
            "no linear layer trains with its own weight, so there is no new head; name it in LoraConfig's "
            "modules_to_save"
        )
    for name, module in found.items():
        if is_sharded(module.weight):
            raise ValueError(f"layer {name}: its weight is split over processes; call fit_head before it is sharded")
    return found


@dataclass(frozen=True)
class _Rows:
    """What a head saw: inputs X (n, d) and outputs z (n, c) in float64, the targets, and each row's batch."""

    name: str
    X: Tensor
    z: Tensor
    targets: Targets
    batch: list[int]


def _read(
    model: nn.Module,
    heads: dict[str, nn.Linear],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
    count: int,
) -> _Rows | None:
    """What the head saw of the batches; None without batches. The model is left as found."""
    found: list[_Rows] = []
    with as_found(model, batches), read_eagerly(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for index, batch in enumerate(islice(batches, count)):
            with _watched(heads) as outputs:
                loss = loss_in(call(model, to_device(batch, device_of(model))), index)
            found.append(_rows_of(heads, outputs, loss, index))
    return _joined(found, heads) if found else None


@contextmanager
def _watched(heads: dict[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Context in which the graph of the loss begins at the outputs of the layers; yields their inputs and outputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.pop(name, None)  # the order is that of the last calls
            seen[name] = args[0].detach(), output.detach().requires_grad_(True)
            return seen[name][1]

        return hook

    handles = [head.register_forward_hook(see(name)) for name, head in heads.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows_of(heads: dict[str, nn.Linear], seen: dict[str, tuple[Tensor, Tensor]], loss: Tensor, index: int) -> _Rows:
    """The rows of a batch that have a gradient, of the layer that gives the outputs of the loss."""
    names = list(seen)
    if not names or not loss.requires_grad:
        raise ValueError(f"batch {index}: the loss does not depend on a layer that trains ({_listed(heads)})")
    gradients = torch.autograd.grad(loss, [seen[name][1] for name in names], allow_unused=True)
    reaching = [(name, g) for name, g in zip(names, gradients, strict=True) if g is not None]
    if len(reaching) > 1:
        raise ValueError(f"batch {index}: the loss is of several heads ({', '.join(n for n, _ in reaching)}), not one")
    (name, gradient) = reaching[0]
    inputs, outputs = seen[name]
    X, z, g = (part.detach().double().cpu().flatten(0, -2) for part in (inputs, outputs, gradient))
    taken = (g != 0).any(-1)
    rounding = max(1e-4, 16 * torch.finfo(outputs.dtype).eps)
    targets = targets_of(z[taken], g[taken], float(loss.detach()), rounding) if taken.any() else None
    if targets is None:
        raise ValueError(
            f"layer {name}, batch {index}: the loss is not one of cross-entropy, binary cross-entropy and mean squares "
            "of its outputs, by its gradient; leave fit_head out, the head then begins as it is"
        )
    return _Rows(name, X[taken], z[taken], targets, [index] * int(taken.sum()))


def _joined(parts: list[_Rows], heads: dict[str, nn.Linear]) -> _Rows:
    """The rows of all batches, at most MOST_ROWS, evenly spaced."""
    if not parts:
        raise ValueError("batches: expected at least one, got none")
    if len({(part.name, part.targets.loss.name) for part in parts}) > 1:
        raise ValueError(f"the loss of one batch is another than that of the next ({_listed(heads)})")
    X, z, y, w = (
        torch.cat(found) for found in zip(*((p.X, p.z, p.targets.y, p.targets.w) for p in parts), strict=True)
    )
    first = 0
    batch: list[int] = []
    for part in parts:
        batch += [first + number for number in part.batch]
        first = batch[-1] + 1
    some = torch.linspace(0, len(X) - 1, min(len(X), MOST_ROWS)).round().long()
    name, loss = parts[0].name, parts[0].targets.loss
    if max(z.shape[1], 2) > len(X):
        raise ValueError(
            f"layer {name}: {counted(z.shape[1], 'output')}, and {counted(len(X), 'row')} in the batches that were "
            "read, expected as many rows at least, and two; give more batches (num_batches), or leave fit_head out"
        )
    return _Rows(name, X[some], z[some], Targets(loss, y[some], w[some]), [batch[i] for i in some.tolist()])


def _listed(heads: dict[str, nn.Linear]) -> str:
    return ", ".join(heads)

"""A new head, fitted to the features that the model has before training: gradients then come through no random one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import KeptBatches, add_batch, default_forward, device_of, loss_in, to_device, unwrapped
from ..data.reading_mode import as_found, read_eagerly
from ..fitted_head import FittedHead
from ..linalg.output_loss import Targets, fit_layer, folds_of, targets_of
from ..messages import counted
from ..model.heads import put_head, trained_layers
from ..model.sharded import is_sharded

if TYPE_CHECKING:
    from ..config import InitConfig
    from ..data.batches import Forward
    from .arguments import Request
    from .executor import Executor

MOST_ROWS = 2048
"""Rows that a head is fitted to at most, evenly spaced; a token classifier has one a token."""


class NotFittedError(ValueError):
    """No head can be fitted; the message says why."""


@contextmanager
def with_head(
    request: Request, executor: Executor, given: InitConfig
) -> Iterator[tuple[Request, FittedHead | None, str]]:
    """The request, with a new head that is fitted while this context lasts; and why none was, where one might be.

    Where there are several processes, all have to call it. The batches are kept for the pass that follows.

    Args:
        given: the configuration before a method was chosen. With `fit_head` None a head is fitted if that was left
            open, and there is one.

    Raises:
        NotFittedError: if `fit_head` is True and there is none to fit.
    """
    config, model, adapter = request.config, request.model, request.adapter_name
    assert config is not None
    if not wants_head(request, given):
        yield request, None, ""
        return
    batches: Any = request.batches if request.batches is not None else ()
    kept = batches if isinstance(batches, KeptBatches) else KeptBatches(batches, config.num_batches)
    call = request.loss or request.forward or default_forward
    try:
        head, why = found_head(model, adapter, kept, call, config.num_batches, executor), ""
    except NotFittedError as error:
        if given.fit_head:
            raise
        head, why = None, str(error)
    request = replace(request, batches=kept, config=replace(config, fit_head=head is not None))
    with put_head(model, head, adapter):
        yield request, head, why


def wants_head(request: Request, given: InitConfig) -> bool:
    """Return whether a head is to be fitted, or to be tried at least: see `with_head`."""
    if given.fit_head is not None:
        return given.fit_head
    return (
        given.method is None
        and request.batches is not None
        and bool(trained_layers(request.model, request.adapter_name))
    )


def found_head(
    model: nn.Module, adapter: str, batches: Iterable[Any], call: Forward, count: int, executor: Executor
) -> FittedHead:
    """The head of a model, fitted to the batches of all processes; nothing is written.

    Raises:
        NotFittedError: says what is missing, on all processes alike.
    """
    heads = trained_layers(model, adapter)
    found = executor.gather(
        executor.run(lambda: _rows_or_reason(unwrapped(model), heads, batches, call, count), "reading the head")
    )
    for part in found:
        if isinstance(part, str):
            raise NotFittedError(part)
    rows = _joined([part for part in found if isinstance(part, _Rows)])
    weight, bias = heads[rows.name].weight, heads[rows.name].bias
    fit = executor.gather(fit_layer(rows.X, rows.z, rows.targets, folds_of(rows.batch), bias is not None))[0]
    return FittedHead(
        name=rows.name,
        weight=_changed(weight, fit.delta),
        bias=None if bias is None else _changed(bias, fit.bias),
        loss=rows.targets.loss.name,
        loss_before=fit.before,
        loss_after=fit.after,
        ridge=fit.ridge,
        rows=len(rows.X),
        batches=len(set(rows.batch)),
    )


def _changed(parameter: Tensor, change: Tensor) -> Tensor:
    """The new values of a parameter on the CPU, in its dtype."""
    return (parameter.detach().cpu().double() + change).to(parameter.dtype)


@dataclass(frozen=True)
class _Rows:
    """Inputs and outputs of a head: X (n, d) and z (n, c) in float64, the targets, and each row's batch, from 0."""

    name: str
    X: Tensor
    z: Tensor
    targets: Targets
    batch: list[int]


def _rows_or_reason(
    model: nn.Module, heads: dict[str, nn.Linear], batches: Iterable[Any], call: Forward, count: int
) -> _Rows | str | None:
    """Return what the head sees, or why there is none: a plain value, which processes can tell each other."""
    try:
        return _read(model, heads, batches, call, count)
    except NotFittedError as error:
        return str(error)


def _read(
    model: nn.Module, heads: dict[str, nn.Linear], batches: Iterable[Any], call: Forward, count: int
) -> _Rows | None:
    """Read what the head sees of the batches; None without batches. The model is left as found."""
    if any(map(is_sharded, model.parameters())):
        raise NotFittedError("the model's weights are split over processes; call fit_head before they are")
    if not heads:
        raise NotFittedError(
            "no linear layer trains with its own weight, so there is no new head; name it in LoraConfig's "
            "modules_to_save"
        )
    found: list[_Rows] = []
    with as_found(model, batches), read_eagerly(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for index, batch in enumerate(islice(batches, count)):
            moved = to_device(batch, device_of(model))
            with _watched(heads) as outputs:
                try:
                    output = call(model, moved)
                except Exception as error:
                    add_batch(error, index, moved, model)
                    raise
            found.append(_rows_of(heads, outputs, _loss(output, index), index))
    return _joined(found) if found else None


def _loss(output: Any, index: int) -> Tensor:
    try:
        loss = loss_in(output, index)
    except ValueError as error:
        raise NotFittedError(f"batch {index} gives no loss; put labels into the batches, or give loss=") from error
    if not bool(loss.isfinite()):
        raise NotFittedError(f"batch {index}: the loss is {float(loss.detach())}, expected a finite number")
    return loss


@contextmanager
def _watched(heads: dict[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Context in which the graph of the loss begins at the outputs of the layers; yields their inputs and outputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
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
    gradients = torch.autograd.grad(loss, [seen[n][1] for n in names], allow_unused=True) if loss.requires_grad else ()
    reaching = [(name, g) for name, g in zip(names, gradients, strict=False) if g is not None]
    if len(reaching) != 1:
        which = "of several heads" if reaching else "of no layer that trains"
        names = [name for name, _ in reaching] or list(heads)
        raise NotFittedError(f"batch {index}: the loss is {which} ({', '.join(names)})")
    (name, gradient) = reaching[0]
    inputs, outputs = seen[name]
    if outputs.shape[-1] > MOST_ROWS:
        raise NotFittedError(f"layer {name} has {counted(outputs.shape[-1], 'output')}, more than there are rows")
    z, g = (part.detach().double().cpu().flatten(0, -2) for part in (outputs, gradient))
    taken = (g != 0).any(-1)
    rounding = max(1e-4, 16 * torch.finfo(outputs.dtype).eps)
    targets = targets_of(z[taken], g[taken], float(loss.detach()), rounding) if taken.any() else None
    some = _spread(int(taken.sum()))
    X = inputs.flatten(0, -2)[taken.nonzero()[some, 0].to(inputs.device)].double().cpu()
    if targets is None or not bool(X.isfinite().all()):
        raise NotFittedError(
            f"layer {name}, batch {index}: the loss is not one of cross-entropy, binary cross-entropy and mean squares "
            "of its outputs, by its gradient"
        )
    return _Rows(name, X, z[taken][some], Targets(targets.loss, targets.y[some], targets.w[some]), [0] * len(some))


def _spread(count: int) -> Tensor:
    """Return at most MOST_ROWS of so many rows, evenly spaced."""
    return torch.linspace(0, max(count - 1, 0), min(count, MOST_ROWS)).round().long()


def _joined(parts: list[_Rows]) -> _Rows:
    """The rows of all batches, at most MOST_ROWS, evenly spaced."""
    if not parts:
        raise NotFittedError("batches: expected at least one, got none")
    name, loss = parts[0].name, parts[0].targets.loss
    if any((part.name, part.targets.loss.name) != (name, loss.name) for part in parts):
        raise NotFittedError(f"layer {name}: the loss of one batch is of another kind than that of the next")
    X, z, y, w = (
        torch.cat(found) for found in zip(*((p.X, p.z, p.targets.y, p.targets.w) for p in parts), strict=True)
    )
    if max(z.shape[1], 2) > len(X):
        raise NotFittedError(
            f"layer {name}: {counted(z.shape[1], 'output')}, and {counted(len(X), 'row')} in the batches that were "
            "read, expected as many rows at least, and two; read more batches (num_batches)"
        )
    batch: list[int] = []
    for part in parts:
        first = batch[-1] + 1 if batch else 0
        batch += [first + number for number in part.batch]
    some = _spread(len(X))
    return _Rows(name, X[some], z[some], Targets(loss, y[some], w[some]), [batch[i] for i in some.tolist()])

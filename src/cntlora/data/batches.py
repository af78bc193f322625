"""Batches, how a model is called with one, and the loss in what it gives.

A batch is a mapping (BatchEncoding too), a tuple or list, or a tensor. It is never edited.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import in_short

Forward = Callable[[nn.Module, Any], Any]


def first_batches(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """The first `count` batches and not one more, so that a one-shot iterator keeps the rest.

    Raises:
        TypeError: if `batches` is a single batch or no iterable at all.
    """
    if isinstance(batches, (Mapping, str, bytes, Tensor)):
        raise TypeError(
            f"batches: expected an iterable of batches (a DataLoader, a list), got one {type(batches).__name__}; "
            "put it in a list: [batch]"
        )
    try:
        iterator = iter(batches)
    except TypeError:
        raise TypeError(
            f"batches: expected an iterable of batches (a DataLoader, a list, a generator), got "
            f"{type(batches).__name__}"
        ) from None
    return islice(iterator, count)


class KeptBatches:
    """The first batches of a source, kept, so that each loop over them has the same; in all else it is the source."""

    def __init__(self, source: Iterable[Any], count: int) -> None:
        self.source, self.count = source, count
        self._kept: list[Any] = []
        self._rest: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # a DataLoader's generators, which are left as found

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        if self._rest is None:
            self._rest = first_batches(self.source, self.count)
        for batch in self._rest:
            self._kept.append(batch)
            yield batch
        self._rest = iter(())  # a DataLoader's workers end

    def first(self) -> Any:
        """The first batch, read ahead; None where there is none."""
        return next(iter(self), None)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; containers are rebuilt, the caller's are left alone."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Return the device of batches: that of the first parameter that has values."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose own forward pass would wait for a backward pass of training."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def default_forward(model: nn.Module, batch: Any) -> Any:
    """model(**batch), model(*batch) or model(batch), by the kind of the batch.

    Raises:
        TypeError: if the batch does not fit the arguments of the model. What the model itself raises stays as it is.
    """
    args, kwargs = _arguments(batch)
    try:
        return model(*args, **kwargs)
    except (TypeError, IndexError, AttributeError, RuntimeError) as error:
        if not (_does_not_fit(model, args, kwargs, error) or _misplaced(batch, error)):
            raise
        raise TypeError(
            f"the model could not be called: {in_short(error)}. It was given a batch that is {_kind(batch)}; say how "
            f"with forward=, e.g. forward=lambda model, batch: {_example(model, batch)}"
        ) from error


def body_forward(model: nn.Module, batch: Any) -> Any:
    """`default_forward` of a causal language model of whose output nothing is wanted (`has_spare_logits`): no loss, and
    the logits of one token alone, which else take more memory than all layers."""
    if not isinstance(batch, Mapping):
        return default_forward(model, batch)
    return default_forward(model, {"logits_to_keep": 1, **{key: batch[key] for key in batch if key != "labels"}})


def has_spare_logits(model: nn.Module, read: Iterable[nn.Module]) -> bool:
    """Return whether a model is a causal language model that takes `logits_to_keep`, and its head is not read.

    Others may make inputs of their labels (T5Gemma those of the decoder, CSM those of the depth decoder), and then need
    them.
    """
    base = next(reversed(list(_layers_of(unwrapped(model)))))
    if not any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(base).__mro__):
        return False
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head is not None and "logits_to_keep" in _signature(base).parameters and all(x is not head for x in read)


REPEATABLE: set[Forward] = {default_forward}
"""Our own ways to call a model, which may call it once more: a function of the user may count or print."""


def has_loss(output: Any) -> bool:
    """Return whether what a model gave names its loss: a tensor alone, or the first of a tuple, may be anything."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(loss, Tensor) and loss.numel() == 1


def loss_in(output: Any, index: int) -> Tensor:
    """The loss in what a model gave: itself, `output.loss`, `output["loss"]`, or the first of a tuple.

    Raises:
        ValueError: if there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}, expected a scalar" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"batch {index}: this method reads gradients and so needs a loss, and the model's output "
            f"({type(output).__name__}{shape}) has none; put labels into the batches, or give loss=, a function of the "
            "model and the batch that returns a scalar"
        )
    return loss


def scalar_loss(output: Any, index: int) -> Tensor:
    """The loss in what a model gave, ready for a backward pass.

    Raises:
        ValueError: if there is none, it is not finite, or, where gradients are enabled, it does not depend on weights.
    """
    loss = loss_in(output, index)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            f"batch {index}: the loss does not depend on the weights of the adapted layers, so it has no gradient; is "
            "the model called under torch.no_grad(), or the adapter on layers that do not reach the loss?"
        )
    if not bool(loss.isfinite()):
        raise ValueError(
            f"batch {index}: the loss is {float(loss.detach())}, expected a finite number; check the batch and dtype "
            "(all its labels may be −100)"
        )
    return loss


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)), {}


def _kind(batch: Any) -> str:
    return (
        f"a mapping with keys {in_short(sorted(map(str, batch)), 150)}"
        if isinstance(batch, Mapping)
        else type(batch).__name__
    )


def _example(model: nn.Module, batch: Any) -> str:
    """A call that may be right for a batch of this kind."""
    if isinstance(batch, (list, tuple)):
        return "model(batch[0])"
    if not isinstance(batch, Mapping):
        return "model(batch.values)"
    taken = {name for part in _layers_of(model) for name in _signature(part).parameters}
    key = next((key for key in batch if key in taken), next(iter(batch), "x"))
    return f"model(batch[{key!r}])"


def _does_not_fit(model: nn.Module, args: Any, kwargs: Mapping[str, Any], error: Exception) -> bool:
    """Return whether a TypeError says that a batch does not fit the model, and is not one of a layer inside."""
    if not isinstance(error, TypeError):
        return False
    for part in _layers_of(model):
        try:
            _signature(part).bind(*args, **kwargs)
        except TypeError:
            return True
    # a model that takes **kwargs hands them on, and the complaint comes from further inside
    named = re.search(r"unexpected keyword argument '([^']+)'", str(error))
    return named is not None and named[1] in kwargs


def _layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and that which PEFT's class around it calls with the same arguments."""
    yield model
    base = getattr(model, "get_base_model", None)
    if callable(base):
        yield base()


def _signature(model: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except ValueError:  # a function that is not written in Python
        return inspect.signature(lambda *args, **kwargs: None)


def _misplaced(batch: Any, error: Exception) -> bool:
    """Return whether arguments by position may have been taken for others, which shows anywhere in the model."""
    several = isinstance(batch, (list, tuple)) and len(batch) > 1
    return several and not isinstance(error, torch.cuda.OutOfMemoryError)


PLAIN_ERRORS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)
"""Kinds of errors that a model raises for a batch that it cannot take."""


def add_batch(error: BaseException, index: int, batch: Any, model: nn.Module) -> None:
    """Put the number of the batch, its keys and what its labels say before the message of an error.

    Subclasses (out of memory, the user's own) and errors that this package raises, which say it already, stay as they
    are.

    Args:
        error: raised by the call of the model.
        index: of the batch.
        batch: on the device of the model.
        model: whose configuration says how many classes there are.
    """
    if type(error) not in PLAIN_ERRORS or _is_ours(error):
        return
    hint = _labels_out_of_range(batch, model)
    error.args = (f"batch {index}, {_kind(batch)}: {in_short(error)}{hint}", *error.args[1:])


def _is_ours(error: BaseException) -> bool:
    """Return whether the error was raised in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "cntlora"


def _labels_out_of_range(batch: Any, model: nn.Module) -> str:
    """Describe labels that the model has no class or token for; "" where there are none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return ""
    key = "num_labels" if labels.dim() == 1 else "vocab_size"
    count = getattr(getattr(model, "config", None), key, None)
    low, high = int(labels.min()), int(labels.max())
    if not isinstance(count, int) or (high < count and (low >= 0 or low == -100)):
        return ""
    return f"; its labels run from {low} to {high}, and the model has {count} ({key}), from 0 to {count - 1}"

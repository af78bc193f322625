"""The choice of a method where the configuration leaves it open: by whether gradients of a loss can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..config import WITH_LOSS, WITHOUT_LOSS, InitConfig
from ..data.batches import REPEATABLE, KeptBatches, default_forward, device_of, has_loss, to_device, unwrapped
from ..data.reach import first_row, is_watched
from ..data.reading_mode import as_found, reading_mode
from ..methods.method import find
from ..model.checks import gradient_refusal
from ..model.sharded import is_sharded
from ..model.sites import find_sites

if TYPE_CHECKING:
    from torch import nn

    from ..data.batches import Forward
    from .arguments import Request
    from .executor import Executor


@contextmanager
def with_method(request: Request, executor: Executor) -> Iterator[tuple[Request, str]]:
    """The request with a method, and why it was chosen; as it is where it names one.

    Where there are several processes, all have to call it, and choose the same. The batches are kept for the pass that
    follows, which has to be made inside: random states are as found only afterwards.
    """
    config = request.config or InitConfig()
    if config.method is not None:
        yield request, ""
        return
    with as_found(request.model, () if request.batches is None else request.batches):
        batches = request.batches if request.batches is None else KeptBatches(request.batches, config.num_batches)
        found = executor.run(lambda: _usable(replace(request, batches=batches)), "the choice of a method")
        everywhere = executor.gather(found)
        usable = all(has for has, _ in everywhere)
        reason = next(why for has, why in everywhere if has == usable)
        method = find(WITH_LOSS if usable else WITHOUT_LOSS)()
        if config.learning_rate is not None and method.rate is None:
            reason += f"; it is made for no learning rate, so that {config.learning_rate:g} is not used"
            config = replace(config, learning_rate=None)
        yield replace(request, batches=batches, config=replace(config, method=method)), reason


def _usable(request: Request) -> tuple[bool, str]:
    """Return whether gradients of a loss can be read, and why or why not.

    Raises:
        ValueError: if there are no batches.
    """
    if request.batches is None:
        raise ValueError(
            "batches: expected some, from which the method is chosen and which it reads; give a DataLoader or a list, "
            "or a method that reads the weights alone: InitConfig(method='pissa')"
        )
    if torch.is_inference_mode_enabled():
        return False, "gradients cannot be read in torch.inference_mode"
    found = find_sites(request.model, request.adapter_name)
    refusal = gradient_refusal(
        request.model, found, request.adapter_name, InitConfig(WITH_LOSS), InitConfig(WITHOUT_LOSS)
    )
    if refusal is not None:
        return False, f"gradients cannot be read: {refusal}"
    if request.loss is not None:
        return True, "a loss was given"
    batch = request.batches.first() if isinstance(request.batches, KeptBatches) else None
    labelled = isinstance(batch, Mapping) and "labels" in batch
    call = request.forward or default_forward
    sharded = any(map(is_sharded, request.model.parameters()))
    if call in REPEATABLE and not is_watched(request.model) and not sharded:
        try:
            gives = _gives_loss(request.model, call, batch)
        except Exception:  # the pass that follows raises it where it is one, with the batch and the cure
            gives = labelled
        return gives, f"the model gives {'a' if gives else 'no'} loss for the batches"
    # it is not called once more just to look, since the caller would notice
    return labelled, f"the batches have {'labels' if labelled else 'no labels, and no loss was given'}"


def _gives_loss(model: nn.Module, call: Forward, batch: Any) -> bool:
    """Return whether the model names a loss for the first row of a batch; no random state moves.

    Not finite is a loss too: all labels of one row may be −100, and those of a whole batch are named when it is read.
    """
    with reading_mode(model, [], ()), torch.no_grad():
        output = call(unwrapped(model), to_device(first_row(batch), device_of(model)))
    return has_loss(output)

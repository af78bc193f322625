"""`fit_head`: a new head that starts fitted to the features of the pretrained model, and not at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..data.batches import default_forward
from ..execution.distributed import choose_executor
from ..execution.head import found_head
from ..fitted_head import FittedHead
from ..messages import check_integer
from ..model.heads import write_head


def fit_head(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
    num_batches: int = 8,
) -> FittedHead:
    """Fit a new head to the features that the model has before training; call it before `initialize`.

    `initialize` does it itself where no method is named, and with `InitConfig(fit_head=True)`; this is for starts of
    others, as plain LoRA.

    A new head begins at random, and layers below it get gradients through random weights until it has been learned.
    This fits the last linear layer, as far as the batches say, and changes nothing else:

        min over D, e:  mean ℓ(W h + b + D h + e, y) + ½ ridge·v·‖D‖²

    h are its inputs, v their mean variance, W and b the layer as it is. The ridge is the one with the lowest loss on
    batches that are left out in turn, within its standard error the largest; where none lowers it, as for a head that
    is trained already, nothing is changed.
    The loss ℓ (cross-entropy of classes or of labels, squares) and the targets y are read from ∂L/∂z of the layer's
    outputs z, so that any batch and any `loss` will do that has such a one at its end. It takes a forward pass.

    With several processes, all call it, each with its own batches; the fit is to the rows of all.

    Args:
        model: with its adapter; the head has to train, as PEFT's `modules_to_save` do.
        batches: with labels, as the model takes them; the first `num_batches` are read.
        loss: `loss(model, batch)`, a scalar; None for the loss in the model's own output.
        adapter_name: of the adapter.
        num_batches: of each process.

    Returns:
        What was fitted: `print` it.

    Raises:
        ValueError: if no linear layer that trains gives the outputs of such a loss, if it has more outputs than there
            are rows (as the head of a language model), or its weight is sharded or tied. Nothing is changed then.
    """
    check_integer("num_batches", num_batches, 1)
    head = found_head(model, adapter_name, batches, loss or default_forward, num_batches, choose_executor(model))
    write_head(model, head, adapter_name)
    return head

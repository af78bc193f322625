"""The losses of the batches of a data pass, for a method whose size they find."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import device_of, has_loss, loss_in

if TYPE_CHECKING:
    from ..data.batches import Forward


class Losses:
    """The losses of the batches of a data pass, and whether they depend on torch's random generators.

    Attributes:
        noisy: whether a call drew random numbers, so that another one of the same batch gives another loss.
    """

    def __init__(self) -> None:
        self.noisy = False
        self._losses: list[Tensor] = []

    def recording(self, call: Forward) -> Forward:
        """`call`, whose losses are kept."""

        def recorded(model: nn.Module, batch: Any) -> Any:
            before = _random_states(model)
            output = call(model, batch)
            self.noisy |= not all(map(torch.equal, before, _random_states(model)))
            self._losses.append(loss_in(output, len(self._losses)).detach())
            return output

        return recorded

    def first(self, count: int) -> list[float]:
        """The first so many, read back from the device at once."""
        return torch.stack([loss.double().reshape(()) for loss in self._losses[:count]]).tolist() if count else []


def loss_alone(call: Forward) -> Forward:
    """`call` without the rest of what it gives: logits that nobody holds are free in the backward pass."""

    def reduced(model: nn.Module, batch: Any) -> Any:
        output = call(model, batch)
        return loss_in(output, 0) if has_loss(output) else output

    return reduced


def _random_states(model: nn.Module) -> list[Tensor]:
    """Return the states of the CPU's generator and of that of the GPU which the model is on."""
    device = device_of(model)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

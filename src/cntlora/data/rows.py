"""The rows of a tensor that are tokens that count, carried over to views and copies of the same tokens.

Tensor layout: a layer's input (..., d) has one row a token; its leading shape, `lead`, is (batch, tokens) as a rule,
(tokens, batch) in XLNet, (batch·tokens,) where a layer flattens, (n,) for the tokens that an expert gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows:
    """The rows of a tensor, as tokens of a stream.

    Attributes:
        stream: name of the stream: "text", "decoder", "frames", or the key of the batch that it came in by.
        keep: boolean, of the leading shape of the tensor: the rows that count. None: all of them.
        why: which mask that is; without one, why there is none, and "" where none was given.
    """

    def __init__(self, stream: str, keep: Tensor | None, why: str) -> None:
        self.stream, self.keep, self.why = stream, keep, why
        self._chosen: Tensor | None = None
        self._derived: dict[object, Rows] = {}

    @property
    def lead(self) -> torch.Size | None:
        """The leading shape that the rows are of; None where all count, whatever their shape."""
        return None if self.keep is None else self.keep.shape

    def chosen(self) -> Tensor:
        """Indices (n,) of the rows that count; waits for the device once, whoever asks."""
        assert self.keep is not None
        if self._chosen is None:
            self._chosen = self.keep.flatten().nonzero().squeeze(1)
        return self._chosen

    def _as(self, key: object, keep: Callable[[Tensor], Tensor]) -> Rows:
        """The same tokens looked at in another way; made once, so that the device is waited for once."""
        if self.keep is None:
            return self
        if key not in self._derived:
            self._derived[key] = Rows(self.stream, keep(self.keep), self.why)
        return self._derived[key]

    def transposed(self) -> Rows:
        """The rows of (tokens, batch)."""
        return self._as("transposed", lambda keep: keep.mT)

    def flattened(self) -> Rows:
        """The rows of (batch·tokens,)."""
        return self._as("flattened", lambda keep: keep.flatten())

    def padded(self, columns: int) -> Rows:
        """The rows with tokens at the end that the model added itself, which do not count."""
        return self._as(("padded", columns), lambda keep: F.pad(keep, (0, columns)))

    def per_sequence(self) -> Rows:
        """The rows of (batch,): a sequence counts if any of its tokens does."""
        return self._as("per sequence", lambda keep: keep.any(dim=1))

    def expanded(self, lead: torch.Size) -> Rows:
        """The rows of (batch, tokens, ...): every part of a token counts as the token does."""
        return self._as(
            ("expanded", lead), lambda keep: keep.reshape(*keep.shape, *[1] * (len(lead) - keep.dim())).expand(lead)
        )

    def at(self, index: Tensor, lead: torch.Size, key: object = None) -> Rows:
        """The rows of the tokens with these places in the flattened stream, in the shape `lead`."""

        def pick(keep: Tensor) -> Tensor:
            return keep.flatten()[index.to(keep.device)].reshape(lead)

        if key is None:
            return self if self.keep is None else Rows(self.stream, pick(self.keep), self.why)
        return self._as(key, pick)


def lead_of(x: Tensor) -> torch.Size:
    """The leading shape: all of it for ids, without the features for activations."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def seen_as_view(x: Tensor, base: Tensor, rows: Rows) -> Rows | None:
    """The rows of a tensor that looks at the memory of `base`: its transpose, a flattened or a cut-out one.

    Returns:
        None if it does not look at whole rows of it.
    """
    if rows.keep is None:
        return rows
    if x.dtype != base.dtype or rows.keep.shape != lead_of(base):
        return None
    if x.is_floating_point() and (x.shape[-1:], x.stride()[-1:]) != (base.shape[-1:], base.stride()[-1:]):
        return None
    shift = int(x.storage_offset()) - int(base.storage_offset())
    if x.shape == base.shape and x.stride() == base.stride() and shift == 0:
        return rows
    key = ("view", x.shape, x.stride(), base.shape, base.stride(), shift)
    if key in rows._derived:
        return rows._derived[key]
    starts, order = _starts(base, 0).flatten().sort()
    wanted = _starts(x, shift).flatten()
    place = torch.searchsorted(starts, wanted).clamp_max(max(len(starts) - 1, 0))
    if not len(starts) or not torch.equal(starts[place], wanted):
        return None
    return rows.at(order[place], lead_of(x), key)


def _starts(x: Tensor, offset: int) -> Tensor:
    """Return where in memory each row of a tensor begins, in the leading shape; on the CPU."""
    lead = lead_of(x)
    starts = torch.full(lead, offset)
    for axis, (size, stride) in enumerate(zip(lead, x.stride()[: len(lead)], strict=True)):
        starts = starts + (torch.arange(size) * stride).reshape(-1, *[1] * (len(lead) - axis - 1))
    return starts


def found_by_value(x: Tensor, base: Tensor, rows: Rows) -> Rows | None:
    """The rows of a tensor that holds copies of rows of `base`, as a router hands them to an expert.

    Rows are known by a sum over their bits, equal ones in their order. Waits for the device.

    Returns:
        None if one of them is no row of `base`.
    """
    if rows.keep is None:
        return rows
    if x.dtype != base.dtype or x.shape[-1] != base.shape[-1] or rows.keep.shape != base.shape[:-1]:
        return None
    marks, order = _marks(base).sort(stable=True)
    wanted, places = _marks(x).sort(stable=True)
    if not len(marks) or not len(wanted):
        return rows.at(order[:0], x.shape[:-1]) if not len(wanted) else None
    first = torch.searchsorted(marks, wanted)
    copies = torch.searchsorted(marks, wanted, right=True) - first
    if not bool((copies > 0).all()):
        return None
    repeats = torch.arange(len(wanted), device=wanted.device) - torch.searchsorted(wanted, wanted)
    index = torch.empty_like(first)
    index[places] = order[first + repeats % copies]
    return rows.at(index, x.shape[:-1])


def _marks(x: Tensor) -> Tensor:
    """A number (n,) for each row, equal for rows of equal bits, and by next to no chance for others."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().reshape(-1, x.shape[-1]).contiguous().view(whole)
    return (bits.long() * _factors(x.shape[-1]).to(x.device)).sum(dim=1)


@cache
def _factors(width: int) -> Tensor:
    """Odd numbers (width,), fixed."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(-(2**62), 2**62, (width,), generator=generator) * 2 + 1


def same_ids(x: Tensor, known: Tensor, rows: Rows) -> Rows | None:
    """The rows of ids that are `known`, their transpose, or they with columns at the end; waits for the device.

    Returns:
        None if they are other ids.
    """
    if x.dim() != 2 or known.dim() != 2:
        return None
    if x.shape == known.shape and torch.equal(x, known):
        return rows
    if x.shape == known.mT.shape and torch.equal(x, known.mT):
        return rows.transposed()
    more = x.shape[1] - known.shape[1]
    if x.shape[0] == known.shape[0] and more > 0 and torch.equal(x[:, : known.shape[1]], known):
        return rows.padded(more)
    return None


def is_flat(lead: torch.Size, of: torch.Size) -> bool:
    """Return whether a leading shape is another one, of more axes, in one."""
    return len(of) > 1 and lead == torch.Size([math.prod(of)])

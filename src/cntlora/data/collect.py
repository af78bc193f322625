"""Reads the inputs of all sites during one forward pass a batch, by hooks, and leaves the model as found.

Sites that are given the very same tensor (q, k, v; gate, up) share one accumulator. Tensors are recognised by
identity through weak references, so a reused address cannot be mistaken and no activation is kept alive.

Statistics that simply add up are handed on as soon as no further layer can see their input: once the model has let go
of it, or, where the graph of the loss keeps it, after the backward pass. From the second batch on they are handed on
when the sites of the batch before have seen it; the few that see it later take it once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from ..linalg.moments import Moments, TokenCount
from ..linalg.parallel import full_precision, read_back
from ..methods.facts import Facts, SiteFacts
from ..model.lora_layers import lora_layers
from ..model.patches import geometry, is_convolution, patches
from .anatomy import Anatomy
from .batches import (
    PLAIN_ERRORS,
    Forward,
    add_batch,
    default_forward,
    device_of,
    first_batches,
    to_device,
    unwrapped,
)
from .padding import TokenMask, TokenMasks, token_masks
from .reading_mode import reading_mode
from .rows import Rows
from .streams import Streams, following

if TYPE_CHECKING:
    from ..model.sites import Site

Stats = Moments | TokenCount
Groups = list[tuple[tuple[str, ...], Any]]
"""The distinct inputs of one forward pass: names of the sites that saw it, its `Stats`."""
Admits = Callable[["Site", bool, int | None], bool]
"""Whether the statistics of a site are taken, told whether its input is one that is taken for another site anyway, and
how many tokens that has, where that is known."""
OnBatch = Callable[[int, Groups], None]
"""Called with the index of a batch and inputs of it: once after its forward pass, or (`early`) one at a time."""


@dataclass(eq=False)
class _Input:
    """A tensor that sites were given in one forward pass.

    Attributes:
        names: of the sites, in the order of their calls. tensor, version: which it is, and as which it was read.
        stats: its statistics; a count of its tokens once they were handed on.
        rows: which of its rows counted.
        handed_on: whether they were.
    """

    names: list[str]
    tensor: TensorWeakRef
    version: int | None
    stats: Stats
    rows: Rows | None
    handed_on: bool = False

    def is_gone(self) -> bool:
        """Return whether no site can be given it any more, as it was read."""
        tensor = self.tensor()
        return tensor is None or self.version is None or tensor._version != self.version


class _Watcher:
    """Takes the moments of one forward pass.

    Args:
        early: takes the moments of an input that no further site can see; None where all are wanted together.
        expected: names of the sites that saw one input in the batch before, in the order of their calls, by the first.
    """

    def __init__(
        self,
        new: Callable[[Site], Stats],
        admits: Admits,
        streams: Streams | None,
        batch: int,
        facts: Facts,
        early: Callable[[Sequence[str], Moments], None] | None = None,
        expected: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.new, self.admits, self.streams, self.batch, self.facts = new, admits, streams, batch, facts
        # tensor → its version, and by how it is looked at (see `_read`) its statistics and which rows counted
        self.known: Any = WeakIdKeyDictionary()
        self.inputs: dict[str, list[_Input]] = {}
        self.early, self.expected, self.waiting = early, expected or {}, list[_Input]()

    def hook(self, site: Site) -> Callable[..., None]:
        convolution = is_convolution(site.base)
        features, axis = (site.base.in_channels, -1 - len(site.base.kernel_size)) if convolution else (0, -1)
        features = features or site.in_features

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next((kwargs[k] for k in ("x", "input", "hidden_states") if k in kwargs), None)
            if not isinstance(x, Tensor) or x.dim() < -axis or x.shape[axis] != features:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                wanted = ", ".join(("...", str(features), *(["size"] * (-1 - axis))))
                raise ValueError(f"site {site.name}, batch {self.batch}: expected an input ({wanted}), got {got}")
            self._read(site, x, geometry(site.base) if convolution else None)

        return read

    def _read(self, site: Site, x: Tensor, view: Any) -> None:
        """Take the moments of an input, once for all sites that look at it alike: as rows, or as the same patches."""
        self.hand_on(_Input.is_gone)
        # an inference tensor counts no versions: an edit of it would go unseen, so it is never taken for known
        version = None if x.is_inference() else x._version
        entry = self.known.get(x)
        if entry is None or version is None or entry[0] != version:
            entry = self.known[x] = (version, {})
        stats = entry[1]  # by view, and whether it is read: a site that waits for another pass shares no moments
        if self.streams is not None and site.name in self.streams.masks.sites:
            view = (view, site.name)  # with a mask of its own
        tokens = None if is_convolution(site.base) else x.numel() // x.shape[-1]
        admitted = self.admits(site, (view, True) in stats, tokens)
        if (view, admitted) not in stats or stats[view, admitted].handed_on:
            made = self._new_statistics(site, x, self.new(site) if admitted else TokenCount())
            stats[view, admitted] = _Input([], TensorWeakRef(x), version, *made)
            if isinstance(made[0], Moments):
                self.waiting.append(stats[view, admitted])
        taken: _Input = stats[view, admitted]
        taken.names.append(site.name)
        self.inputs.setdefault(site.name, []).append(taken)
        if taken.rows is not None:
            _note_mask(self.facts[site.name], taken.rows)
        if taken.names == self.expected.get(taken.names[0]):
            self.hand_on(lambda one: one is taken)

    def hand_on(self, ready: Callable[[_Input], bool]) -> None:
        """Hand on the moments of those inputs that are ready, in the order in which they were seen."""
        if self.early is None:
            return
        for taken in [one for one in self.waiting if ready(one)]:
            self.waiting.remove(taken)
            moments = taken.stats
            assert isinstance(moments, Moments)
            taken.stats, taken.handed_on = TokenCount.of(moments), True
            if not moments.tokens:
                continue
            times = Counter(taken.names)  # a layer may be called twice with the same tensor
            for call in range(max(times.values())):
                self.early([name for name, count in times.items() if count > call], moments)

    def sharing(self) -> dict[str, list[str]]:
        """Names of the sites that saw one input, by the first; not of sites that came first with several inputs."""
        inputs = {id(one): one.names for taken in self.inputs.values() for one in taken}
        times = Counter(names[0] for names in inputs.values())
        return {names[0]: names for names in inputs.values() if times[names[0]] == 1}

    def _new_statistics(self, site: Site, x: Tensor, new: Stats) -> tuple[Stats, Rows | None]:
        """The statistics of an input, and which of its rows counted. Patches are never masked."""
        rows, precision = None, _autocast_dtype(x)
        if is_convolution(site.base):
            blocks: Iterable[Tensor] = patches(site.base, x.detach())
            if self.streams is not None and self.streams.masks.given:
                rows = Rows("patches", None, "patches of a convolution are never masked")
        else:
            block = x.detach().reshape(-1, x.shape[-1])
            rows = self.streams.at(site.name, x) if self.streams is not None else None
            if rows is not None and rows.keep is not None:
                block = block.index_select(0, rows.chosen().to(block.device))
            blocks = (block,)
        for block in blocks:
            block = block.to("cpu") if block.device.type == "mps" else block  # which has no float64
            with full_precision(block.device):
                new.update(block, precision)
        return new, rows

    def groups(self) -> list[tuple[tuple[str, ...], Stats]]:
        """Distinct inputs in the order of the forward pass, each with the sites that saw exactly it."""
        names: dict[tuple[int, ...], list[str]] = {}
        inputs: dict[tuple[int, ...], list[Stats]] = {}
        for name, taken in self.inputs.items():
            key = tuple(map(id, taken))
            names.setdefault(key, []).append(name)
            inputs[key] = [one.stats for one in taken]
        return [(tuple(names[key]), _merged(inputs[key])) for key in names]


def _note_mask(facts: SiteFacts, rows: Rows) -> None:
    """Note which mask chose the tokens of a site, or why none did."""
    if rows.keep is not None:
        facts.masks.add(f"{rows.stream} ({rows.why})")
    elif rows.why:
        facts.unmasked.add(rows.why)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which a layer that is called now multiplies x, where autocast makes it another than that of x."""
    kind = x.device.type
    applies = x.dtype in (torch.float16, torch.bfloat16, torch.float32) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if applies else None


def _merged(parts: list[Stats]) -> Stats:
    if len(parts) == 1:
        return parts[0]
    total: Any = parts[0].empty()
    for part in parts:
        total.merge(part)
    return total


@contextmanager
def watching(sites: list[Site], watcher: _Watcher) -> Iterator[None]:
    """Hooks on all sites, removed on the way out whatever happens; hooks of others are not touched."""
    handles = []
    try:
        for site in sites:
            handles.append(site.layer.register_forward_pre_hook(watcher.hook(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Any],
    on_batch: OnBatch,
    *,
    num_batches: int = 8,
    gram: str = "sum",
    forward: Forward | None = None,
    token_mask: TokenMask = None,
    on_output: Callable[[int, Any], None] | None = None,
    on_first: Callable[[Any, Any], None] | None = None,
    step: Callable[[], None] = lambda: None,
    inputs: bool = True,
    totals: bool = False,
    single: bool = False,
    unit: bool = False,
    admits: Admits = lambda site, known, tokens: True,
    by_loss: bool = False,
    early: bool = False,
    facts: Facts | None = None,
) -> Facts:
    """Run the first `num_batches` batches through the model in eval mode; with gradients only for `on_output`.

    Args:
        on_batch: receives the moments of all distinct inputs after each forward pass.
        forward: how to call the model with a batch; by default by the kind of the batch.
        token_mask: which tokens count, see `padding.token_masks`; by_loss: of these, only those that the loss reaches.
        on_output: receives the index of each batch and what the model gave for it, while gradients are enabled.
        on_first: receives the first batch and what the model gave for it, in the mode of reading.
        inputs: whether the moments of the inputs are taken; else their tokens are only counted.
        step: called after each batch (progress).
        totals: whether the moments hold Σ x too. single: whether float32 will do for those of float32.
        unit: whether they are of tokens of unit size.
        admits: which sites are read, see `memory.Budget`; the tokens of the others are counted.
        early: whether `on_batch` gets each input by itself, as soon as no further site can be given it, and those of
            the calls of one site apart.
        facts: to which those of these batches are added; None for new ones.

    Raises:
        ValueError: no batch, a batch without a token that counts, NaN or Inf in an input (names site and batch).
    """
    facts = Facts() if facts is None else facts
    call = forward or default_forward
    model = unwrapped(model)
    device = device_of(model)
    anatomy = Anatomy(model)

    def new(site: Site) -> Stats:
        return Moments(site.in_features, gram, totals=totals, single=single, unit=unit) if inputs else TokenCount()

    expected: dict[str, list[str]] = {}
    with reading_mode(model, sites, batches), torch.set_grad_enabled(on_output is not None):
        for index, batch in enumerate(first_batches(batches, num_batches)):
            moved = to_device(batch, device)
            masks = _usable_masks(token_masks(anatomy, moved, token_mask, by_loss), sites, model, index)
            streams = Streams(anatomy, moved, masks) if masks.needed() else None
            hand_on = partial(_hand_on, on_batch, index) if early else None
            watcher = _Watcher(new, admits, streams, index, facts, hand_on, expected)
            with following(anatomy, streams), watching(sites, watcher):
                try:
                    output = call(model, moved)
                except PLAIN_ERRORS as error:
                    add_batch(error, index, moved, anatomy.innermost)
                    raise
            if on_output:
                _check_called(watcher, sites, index)
                on_output(index, output)
            watcher.hand_on(lambda taken: True)
            expected = watcher.sharing()
            _absorb_inputs(watcher, index, on_batch, facts)
            if on_first and index == 0:
                on_first(moved, output)
            step()
    if facts.batches == 0:
        raise ValueError("batches: expected at least one batch, got none; is the loader empty, or already used up?")
    return facts


def _hand_on(on_batch: OnBatch, index: int, names: Sequence[str], moments: Moments) -> None:
    on_batch(index, [(tuple(names), moments)])


def _usable_masks(masks: TokenMasks, sites: list[Site], model: nn.Module, index: int) -> TokenMasks:
    for mask in masks.all():
        if not bool(mask.any()):
            raise ValueError(
                f"batch {index}: its mask {tuple(mask.shape)} hides every token, so there is nothing to learn from; "
                "check padding and labels, or choose what counts with token_mask="
            )
    names = {name for name, _ in lora_layers(model, sites[0].adapter)} if masks.sites and sites else set()
    for name in masks.sites:
        if name not in names:
            raise ValueError(
                "token_mask: expected masks for streams ('text', 'decoder', 'encoder', 'frames', a key of the batch) "
                f"or sites, got one for {name!r}; sites are {', '.join(sorted(names)[:3])}, …"
            )
    return masks


def _check_called(watcher: _Watcher, sites: list[Site], index: int) -> None:
    """Raise ValueError if the model called no site, so that the loss can have no gradient by any."""
    if not watcher.inputs:
        raise ValueError(
            f"batch {index}: none of the {len(sites)} adapted layers was called (the first is {sites[0].name}), so "
            "that there is no gradient by any; does this data reach them, is the adapter in the model that is called?"
        )


def _absorb_inputs(watcher: _Watcher, index: int, on_batch: OnBatch, facts: Facts) -> None:
    groups = watcher.groups()
    device = groups[0][1].device if groups else torch.device("cpu")
    with full_precision(device):
        finite = read_back([stats.finite()[None] for _, stats in groups])
    for (names, _), fine in zip(groups, finite, strict=True):
        if not fine[0]:
            raise ValueError(
                f"site {names[0]}, batch {index}: its input has NaN or Inf; check the batch and the dtype "
                "(float16 overflows where bfloat16 and float32 do not)"
            )
    on_batch(index, [(names, stats) for names, stats in groups if stats.tokens])
    for names, stats in groups:
        for name in names:
            n = stats.tokens
            facts[name].merge(SiteFacts(calls=1, batches=int(n > 0), tokens=n, largest_batch=n))
    facts.batches += 1

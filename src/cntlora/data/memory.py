"""`max_memory=`: where the statistics are held, and which sites have to wait for another pass over the batches.

The limit is for what the initialisation needs above the model and its forward pass: the sums over batches, the moments
of one batch, and the room in which one matrix is factored. Sums go to the model's device while they fit, then to the
CPU's memory, then into a file; sites whose inputs fit nowhere are read in another pass, layer by layer.

Without a limit it is a share of what is free (`bound_by_free`), where that is not plainly enough.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ..linalg.moments import accumulation_dtype
from ..linalg.parallel import SIDE_BY_SIDE, STREAMS
from ..linalg.symmetric import held_numbers
from ..messages import quoted

if TYPE_CHECKING:
    from ..model.sites import Site

MaxMemory = int | str | Mapping[str, int | str] | None
PLACES = ("device", "cpu", "disk")
_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
          **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}}  # fmt: skip


def parse_limits(value: MaxMemory) -> dict[str, float]:
    """Bytes for each of `PLACES`: "6GiB" or a number for the model's device, or a mapping with the places by name.

    What is not named is not limited on the device, nor on the CPU if the model is elsewhere; files are written
    only if "disk" is named.

    Raises:
        ValueError, TypeError: with the key, what came and what is right.
    """
    given = dict(value) if isinstance(value, Mapping) else {} if value is None else {"device": value}
    unknown = [key for key in given if key not in PLACES]
    if unknown:
        raise ValueError(
            f"max_memory: {quoted(unknown[0])} is not known; expected a size such as '6GiB', or a mapping with "
            f"{', '.join(PLACES)}"
        )
    limits = {"device": float("inf"), "cpu": float("inf"), "disk": 0.0}
    return limits | {key: float(_size(key, size)) for key, size in given.items()}


FREE_SHARE = {"cpu": 0.9, "cuda": 0.7}
"""Share of the free memory that is the limit by default; the rest is for the forward and backward pass."""
USABLE = 0.8
"""Share of the limit on the device that is planned for: allocators hold on to some of what has been given back."""


def _size(key: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"max_memory: {key}: expected bytes or a size such as '6GiB', got {quoted(size)}")
    if isinstance(size, int):
        found = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"max_memory: {key}: expected a size such as '6GiB' or '500MB', got {quoted(size)}")
        found = int(float(match[1]) * _UNITS[match[2].upper()])
    if found < 0:
        raise ValueError(f"max_memory: {key}: expected at least 0, got {quoted(size)}")
    return found


def readable(size: float) -> str:
    """Bytes as KiB, MiB or GiB, rounded up, so that the number can be given as a limit."""
    units = ((10 * 2**30, 2**30, "GiB"), (2**20, 2**20, "MiB"), (0, 2**10, "KiB"))
    unit, name = next((unit, name) for least, unit, name in units if size >= least)
    return f"{-(-int(size) // unit)}{name}"


@dataclass
class MemoryUse:
    """Memory used: passes over the batches, and the most bytes of sums in each place.

    Attributes:
        free: bytes that were free, where these and no `max_memory` set the limit; else 0.
    """

    passes: int = 0
    device: int = 0
    cpu: int = 0
    disk: int = 0
    free: int = 0


@dataclass
class Budget:
    """The room of one pass.

    Attributes:
        limits: bytes by place, see `parse_limits`.
        of_gradients: whether gradients (k, d) are summed.
        of_inputs: whether d×d statistics of the inputs are summed.
        own_sums: whether each site may need a sum (k, d) of its own besides (shift mode).
        single: whether statistics of inputs of float32 are in float32.
        early: whether inputs are added one at a time, to sums that are held by one triangle.
        solved_in: dtype in which eigenpairs of G are found; None for that of its sums.
        use: how the room was used, for the report.
    """

    limits: Mapping[str, float]
    of_gradients: bool = False
    of_inputs: bool = True
    own_sums: bool = False
    single: bool = False
    early: bool = False
    solved_in: torch.dtype | None = None
    use: MemoryUse = field(default_factory=MemoryUse)
    admitted: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    _used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))  # promised to sums
    _placed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))  # the sums that are there
    _taken: int = 0  # by the moments
    _room: int = 0  # for factorisations
    _elsewhere_first: bool = False
    _folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def limited(self) -> bool:
        """Return whether there may be more than one pass."""
        return self.limits["device"] < float("inf")

    def bound_by_free(self, sites: Sequence[Site], free: float) -> None:
        """Set the limit on the device by what is free there, unless all that the sites may need is there at once.

        Sums stay on the device, and the rest waits for further passes: these cost less than a sum that moves between
        device and CPU with every batch. Only where a single site does not fit do sums move to the CPU.
        """
        device = sites[0].device.type if sites else "cpu"
        limit = FREE_SHARE.get(device, FREE_SHARE["cpu"]) * free
        most = sum(self._sums(s, False) + self._moments(s) for s in sites)
        if most + self.working_room(sites) <= USABLE * limit:
            return
        self.limits = {"device": limit, "cpu": 0.0, "disk": 0.0}
        self.use.free = int(free)

    def next_pass(self, sites: list[Site]) -> None:
        """Forget the sums of the last pass. If the statistics of `sites` might not all fit on the device, its room is
        for the moments, and sums go elsewhere first, where that is allowed: so there are fewest passes.
        """
        most = sum(self._sums(s, False) + self._moments(s) for s in sites)
        self._elsewhere_first = most + self.working_room(sites) > self._limit("device")
        self.use.passes += 1
        self.admitted, self.waiting = set(), set()
        self._used, self._placed = dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0)
        self._taken = self._room = 0
        self.close()

    def close(self) -> None:
        """Delete the files of the last pass."""
        if self._folder is not None:
            with suppress(OSError):
                self._folder.cleanup()
            self._folder = None

    def admit_in_order(self, sites: list[Site]) -> None:
        """Decide on all sites before any input is seen, as if none shared its input with another."""
        for site in sites:
            self.admits(site, False)

    def admits(self, site: Site, known: bool, tokens: int | None = None) -> bool:
        """Return whether a site is read in this pass; decided when its input is first seen.

        Args:
            known: whether its input is one that another site of this pass is read for anyway.
            tokens: of that input, where that is known; used where the limit is not the caller's, since the next batch
                may have more.

        Raises:
            ValueError: if the limit is too small for this site alone.
        """
        if site.name in self.admitted or site.name in self.waiting:
            return site.name in self.admitted
        rows = tokens if self.use.free or not self.limited else None
        room = max(self._room, self._working_room(site, rows))
        sums, moments = self._sums(site, known), 0 if known else self._moments(site, rows)
        on_device = self._used["device"] + self._taken + moments + room
        place = self._place_for(sums, on_device, site)
        if place is None and not self.admitted and self.use.free:
            self.limits = {**self.limits, "cpu": float("inf")}
            place = self._place_for(sums, on_device, site)
        if place is None and self.admitted:
            self.waiting.add(site.name)
            return False
        if place is None:
            need = readable((sums + moments + room) / USABLE)
            shape = f"({site.out_features}×{site.in_features})"
            if self.use.free:
                raise ValueError(
                    f"site {site.name} {shape}: its statistics need {need} on {site.device}, of which "
                    f"{readable(self.limits['device'])} may be taken ({readable(self.use.free)} are free); free some, "
                    "or give max_memory={'device': …, 'cpu': …, 'disk': …}"
                )
            raise ValueError(
                f"max_memory: {readable(self.limits['device'])} is too little: site {site.name} {shape} alone needs "
                f"{need}; give at least that, or name cpu and disk: {{'device': …, 'cpu': …, 'disk': …}}"
            )
        self.admitted.add(site.name)
        self._room = room
        self._taken += moments
        self._used[place] += sums
        return True

    def foretold(self, sites: Sequence[Site], input_of: Callable[[Site], object], tokens: int | None = None) -> float:
        """The most bytes that a pass will take above the model, of all passes, which are counted in `use`.

        Args:
            input_of: what tells the inputs of sites apart.
            tokens: of a batch.
        """
        todo, most = list(sites), 0
        while todo:
            self.next_pass(todo)
            seen: set[object] = set()
            for site in todo:  # gradients are admitted in order, as if none shared its input
                if self.admits(site, not self.of_gradients and input_of(site) in seen, tokens):
                    seen.add(input_of(site))
            most = max(most, self._used["device"] + self._taken + self._room)
            todo = [site for site in todo if site.name in self.waiting]
        return float(most)

    def _place_for(self, sums: int, on_device: int, site: Site) -> str | None:
        """The first place with room for the sums of a site, if the rest of what it needs fits on the device."""
        if on_device > self._limit("device"):
            return None
        elsewhere = PLACES[1:] if site.device.type != "cpu" else PLACES[2:]
        order = (*elsewhere, "device") if self._elsewhere_first else ("device", *elsewhere)
        used = {**self._used, "device": on_device}
        return next((p for p in order if used[p] + sums <= self._limit(p)), None)

    def _limit(self, place: str) -> float:
        return self.limits[place] * (USABLE if place == "device" else 1.0)

    def _sums(self, site: Site, known: bool) -> int:
        own = self._item(site) * site.in_features * site.out_features if self.own_sums else 0
        own += 4 * site.in_features * site.out_features if self.of_gradients else 0
        if not self.of_inputs or known:
            return own
        numbers = held_numbers(site.in_features) if self.early else site.in_features**2
        return own + accumulation_dtype(site.dtype, self.single).itemsize * numbers

    def _moments(self, site: Site, rows: int | None = None) -> int:
        """Bytes of the inputs of one batch, at most d rows or else d×d, and of gradients that are held together.

        Inputs that are added one at a time are in the working room.
        """
        d, k = site.in_features, site.out_features
        together = self.of_gradients and site.stored.dtype == torch.float16  # see `gradients.weight_gradients`
        gradient = site.stored.element_size() * d * k if together else 0
        if not self.of_inputs or self.early:
            return gradient
        return gradient + self._item(site) * d * min(d, d if rows is None else rows)

    def working_room(self, sites: Sequence[Site]) -> int:
        """Bytes in which the largest of the sites is factored."""
        return max(map(self._working_room, sites), default=0)

    def _working_room(self, site: Site, rows: int | None = None) -> int:
        """Bytes in which one input is worked on (five d×d, the tokens in the dtype of accumulation among them) and one
        site is factored (four k×d in float32, one in float64); one gradient that is being added takes less.
        """
        d, k = site.in_features, site.out_features
        threads = torch.get_num_threads() if d <= SIDE_BY_SIDE else 1
        side_by_side = {"cpu": threads, "cuda": STREAMS}.get(site.device.type, 1)
        item = self._item(site)
        if self.solved_in is not None and site.device.type == "cpu":  # a GPU solves one stack at a time, not STREAMS
            item = max(item, self.solved_in.itemsize)
        digest = 5 * item * d * min(d, d if rows is None else rows) if self.of_inputs else 0
        return side_by_side * max(digest, 24 * d * k)

    def _item(self, site: Site) -> int:
        return accumulation_dtype(site.dtype).itemsize

    def place(self, total: Tensor) -> Tensor:
        """A new sum where there is room for it: itself, or a copy on the CPU or in a file.

        Sites that turn out not to share an input after all need more sums than was foreseen; where nothing else is
        allowed, those stay on the device.
        """
        size = total.numel() * total.element_size()
        allowed = [p for p in PLACES if p != "cpu" or total.device.type != "cpu"]
        place = next((p for p in allowed if self._placed[p] + size <= self._used[p]), None)
        place = place or next((p for p in allowed if self._placed[p] + size <= self.limits[p]), "device")
        self._placed[place] += size
        setattr(self.use, place, max(getattr(self.use, place), self._placed[place]))
        return total if place == "device" else total.cpu() if place == "cpu" else self._in_file(total)

    def _in_file(self, total: Tensor) -> Tensor:
        """The tensor as a file that the system may drop from memory; its room on the disk is taken first."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="cntlora-")
        path = Path(self._folder.name) / f"{self._placed['disk']}.sum"
        size = total.numel() * total.element_size()
        try:
            with path.open("wb") as file:
                _reserve(file, size)
        except OSError as error:
            self._folder.cleanup()  # at once, not when the last reference to this object goes
            self._folder = None
            what = f"max_memory: no room for {readable(size)} of statistics in {path.parent}: {error.strerror}"
            raise OSError(error.errno, what) from error
        held = torch.from_file(str(path), shared=True, size=total.numel(), dtype=total.dtype).view(total.shape)
        with suppress(OSError):  # its name goes at once, so that a process that is killed leaves no file
            path.unlink()
        return held.copy_(total)


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room on the disk: a file with holes would kill the process where the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 2**20):
        file.write(bytes(min(2**20, size - start)))

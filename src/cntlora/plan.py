"""`InitPlan`: everything that will be written, as one safetensors file that another machine can apply."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from .atomic import write_atomically
from .config import InitConfig
from .fitted_head import FittedHead
from .site_plan import FAR, OTHER_MODEL, PLAIN, TENSORS, SitePlan

if TYPE_CHECKING:
    from .model.sites import Site

FORMAT = 6
_KEY, _DIGEST = "cntlora_plan", "cntlora_digest"
_HEAD = "head::"


@dataclass(frozen=True, repr=False)
class InitPlan:
    """The outcome of `compute_plan`: one `SitePlan` a site, by the base model's own module names.

    Attributes:
        sites: in the order of the model.
        config: the configuration that made it.
        skipped: sites left as plain LoRA → the reason (only with `on_missing="warn"`).
        batches: batches read; seconds: of the whole computation; forward_seconds: of its data pass.
        versions: of cntlora and torch.
        memory: passes over the batches, and the most bytes of statistics on the "device", the "cpu" and the "disk".
        step: if the loss chose the size of the start: "size" (the largest ‖scaling·B·A‖/‖W‖ of all sites),
            "loss_before" and "loss_after", the number of "batches" that they are means over, and "trials"; else empty.
        shared: sites that have the factors of another site → the name of that site.
        unreached: sites on which the loss of the first row does not depend, so that they would not train. Empty if this
            was not checked: if the output names no loss, hooks or `forward=` are the caller's, or weights are sharded.
        choice: why the method was chosen, where the configuration left it open; else empty.
        head: the new head that was fitted; None without one.
        unfitted: why no head was fitted, where one trains and none had to be; else empty.
    """

    sites: Mapping[str, SitePlan]
    config: InitConfig
    skipped: Mapping[str, str]
    batches: int
    seconds: float
    forward_seconds: float
    versions: Mapping[str, str]
    memory: Mapping[str, int]
    step: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    unreached: Sequence[str] = field(default_factory=list)
    choice: str = ""
    head: FittedHead | None = None
    unfitted: str = ""

    def __repr__(self) -> str:
        ranks = sum(site.rank for name, site in self.sites.items() if name not in self.shared)
        left = f", {len(self.skipped)} skipped" if self.skipped else ""
        name = self.config.method.name if self.config.method is not None else None
        return f"InitPlan(method={name!r}, {len(self.sites)} sites, total rank {ranks}, batches={self.batches}{left})"

    def far_starts(self) -> dict[str, float]:
        """List the sites whose ‖scaling·B·A‖/‖W‖ of the directions that train is above `FAR`, the largest first."""
        sizes = {name: s.start_norm / s.weight_norm for name, s in self.sites.items() if s.rank and s.weight_norm}
        far = {name: size for name, size in sizes.items() if size > FAR}
        return dict(sorted(far.items(), key=lambda item: -item[1]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save as one safetensors file, written under a temporary name first; no pickle, no path inside."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Serialise to the bytes of the file."""
        tensors = {
            f"{name}::{key}": getattr(site, key).detach().cpu().contiguous().clone()
            for name, site in self.sites.items()
            for key in TENSORS
        }
        if self.head is not None:
            kept = {"weight": self.head.weight, "bias": self.head.bias}
            tensors |= {f"{_HEAD}{key}": t.contiguous().clone() for key, t in kept.items() if t is not None}
        head = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "sites": {name: {key: getattr(site, key) for key in PLAIN} for name, site in self.sites.items()},
            "skipped": dict(self.skipped),
            "batches": self.batches,
            "seconds": self.seconds,
            "forward_seconds": self.forward_seconds,
            "versions": dict(self.versions),
            "memory": dict(self.memory),
            "step": dict(self.step),
            "shared": dict(self.shared),
            "unreached": list(self.unreached),
            "choice": self.choice,
            "head": None if self.head is None else self.head.to_dict(),
            "unfitted": self.unfitted,
            "digests": {key: _digest(tensor) for key, tensor in tensors.items()},
        }
        text = json.dumps(head)
        return dump_tensors(tensors, metadata={_KEY: text, _DIGEST: _digest_of_text(text)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitPlan:
        """Load a plan.

        Raises:
            ValueError: if the file is cut short, edited, not a plan, or of a newer format; says which.
            FileNotFoundError: if there is no such file.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file; plans are written by InitPlan.save") from None
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "plan") -> InitPlan:
        """Load from the bytes that `to_bytes` made."""
        head, tensors = _read(data, source)
        try:
            _check_digests(head["digests"], tensors, source)
            sites = {name: _site_of(name, plain, tensors) for name, plain in head["sites"].items()}
            return cls(
                sites=sites,
                config=InitConfig.from_dict(head["config"]),
                choice=head.get("choice", ""),
                head=_head_of(head.get("head"), tensors),
                unfitted=head.get("unfitted", ""),
                **{key: head[key] for key in _REST},
            )
        except (KeyError, TypeError, AttributeError) as error:  # of right digests, but not written by this class
            raise ValueError(f"{source}: no plan as this cntlora writes it ({error!r}); make the plan again") from error

    def check(self, sites: Iterable[Site]) -> None:
        """Check that the plan was made for a model with these sites.

        Raises:
            ValueError: names the first site that differs, what the plan has and what the model has.
        """
        present = {site.name: site for site in sites}
        for name in (*self.sites, *self.skipped):
            if name not in present and name in self.sites:
                raise ValueError(f"the plan has site {name!r}, the model has no such adapted layer; {OTHER_MODEL}")
        for name, site in present.items():
            if name in self.sites:
                self.sites[name].check(site)
            elif name not in self.skipped:
                raise ValueError(f"the model adapts {name!r}, the plan has nothing for it; {OTHER_MODEL}")


_REST = ("skipped", "batches", "seconds", "forward_seconds", "versions", "memory", "step", "shared", "unreached")


def _site_of(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SitePlan:
    values: dict[str, Any] = {**plain, **{key: tensors[f"{name}::{key}"] for key in TENSORS}}
    return SitePlan(**values)


def _head_of(plain: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> FittedHead | None:
    if plain is None:
        return None
    return FittedHead(**plain, weight=tensors[f"{_HEAD}weight"], bias=tensors.get(f"{_HEAD}bias"))


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _digest(tensor: Tensor) -> str:
    tensor = tensor.contiguous()
    digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    # flat first: a dimension of length 1 may have any stride, which a view of other element size does not take
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _check_digests(digests: Mapping[str, str], tensors: Mapping[str, Tensor], source: str) -> None:
    for key in sorted(digests.keys() | tensors.keys()):
        if key not in tensors or digests.get(key) != _digest(tensors[key]):
            name, _, part = key.rpartition("::")
            raise ValueError(f"{source}: site {name}: its {part} {_CHANGED}")


def _read(data: bytes, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head and the tensors of a plan of this format, whose head is what was saved."""
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{source}: not a whole safetensors file ({error}); it was cut short or is no plan") from error
    if _KEY not in metadata:
        raise ValueError(f"{source}: a safetensors file, but no cntlora plan; plans are written by InitPlan.save")
    text: str = metadata[_KEY]
    try:
        head = json.loads(text)
        found = head.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{source}: its header {_CHANGED}") from error
    if found != FORMAT:  # first, since another format may have another digest
        newer = isinstance(found, int) and found > FORMAT
        advice = "update cntlora" if newer else "make the plan again"
        raise ValueError(f"{source}: plan format {found!r}, this cntlora reads {FORMAT}; {advice}")
    if metadata.get(_DIGEST) != _digest_of_text(text):
        raise ValueError(f"{source}: its header {_CHANGED}")
    return head, tensors


_CHANGED = "is not what was saved (the digests differ); the file was changed, make the plan again"

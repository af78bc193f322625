"""`InitPlan`: everything that will be written, as one safetensors file that another machine can apply."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from .atomic import write_atomically
from .config import InitConfig

if TYPE_CHECKING:
    from .model.sites import Site

FORMAT = 6
FAR = 20.0
"""‖s·B·A‖/‖W‖ beyond which a start is said to be far: twice the largest that trained as well as smaller ones, ten times
what training adds at its best rate, and under all that trained worse (docs/math/rounding.md)."""
_KEY, _DIGEST = "cntlora_plan", "cntlora_digest"


@dataclass(frozen=True)
class SitePlan:
    """Factors of one site, and what they were computed from.

    Attributes:
        A, B: (file_rank, in) and (out, file_rank), exactly what is written into the layer, in its dtype;
            scaling·B·A is the function added at step 0 (zero for base "offset" and "paired").
        rank: the rank that trains, which the budget counts; with 0 the site loses its adapter.
        scaling, alpha, use_rslora: of the layer afterwards.
        found_rank, found_scaling: of the adapter that the plan was made for.
        singular_values: of the matrix that is factored, descending: ΔW, W (pissa, olora), W·C (corda), the gradient
            (lora_ga) or the inputs (eva); all of them for a small layer, the leading ones for a large one; none for
            lora.
        factored_norm: ‖·‖_F of that matrix, (Σ s²)^½ over all its singular values; None for lora.
        delta_norm, weight_norm: ‖ΔW‖_F, None where that matrix is not ΔW, and ‖W‖_F.
        start_norm: scaling·‖B'·A'‖_F of the directions that train: the distance of the start if nothing cancels it.
        slope: for descent ⟨∂L/∂W, scaling·B'·A'⟩, the first-order change of the mean loss along the start; else None.
        sketch: uᵀWv for four fixed random pairs u, v, which distinguishes another pretrained weight from a rounded one.
        tokens, batches: how many the site saw.
        masked: whether a mask was applied.
        mask: the stream of tokens that it saw and where their mask comes from, as "decoder (labels)"; "" without one.
        unmasked: why no mask was applied, in some batch, though one was given; else "".
        effective_rank: smallest numerical rank of G over the batches, or that of all inputs (corda, eva): the number of
            directions that the data determine; None if no inputs are read.
        rtol: the tolerance of the pseudo-inverse; None without one.
        seconds: time for the site's part of the statistics and for its factors.
    """

    A: Tensor
    B: Tensor
    rank: int
    scaling: float
    alpha: float
    use_rslora: bool
    found_rank: int
    found_scaling: float
    singular_values: Tensor
    factored_norm: float | None
    delta_norm: float | None
    weight_norm: float
    start_norm: float
    slope: float | None
    sketch: list[float]
    tokens: int
    batches: int
    masked: bool
    effective_rank: int | None
    rtol: float | None
    seconds: float
    mask: str = ""
    unmasked: str = ""

    @property
    def file_rank(self) -> int:
        """Number of rows of A: 2·rank for base "offset", else rank."""
        return self.A.shape[0]

    @property
    def captured(self) -> float | None:
        """Fraction of Σ s² in the first `rank` of `singular_values` (base "paired" holds half as many)."""
        if self.factored_norm is None:
            return None
        first = float(self.singular_values[: self.rank].double().square().sum())
        return min(first / self.factored_norm**2, 1.0) if self.factored_norm > 0 else 0.0


_TENSORS = ("A", "B", "singular_values")
_PLAIN = tuple(f.name for f in fields(SitePlan) if f.name not in _TENSORS)


@dataclass(frozen=True)
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
            for key in _TENSORS
        }
        head = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "sites": {name: {key: getattr(site, key) for key in _PLAIN} for name, site in self.sites.items()},
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
                raise ValueError(f"the plan has site {name!r}, the model has no such adapted layer; {_OTHER_MODEL}")
        for name, site in present.items():
            if name in self.sites:
                _check_site(name, self.sites[name], site)
            elif name not in self.skipped:
                raise ValueError(f"the model adapts {name!r}, the plan has nothing for it; {_OTHER_MODEL}")


_REST = ("skipped", "batches", "seconds", "forward_seconds", "versions", "memory", "step", "shared", "unreached")


def _site_of(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SitePlan:
    values: dict[str, Any] = {**plain, **{key: tensors[f"{name}::{key}"] for key in _TENSORS}}
    return SitePlan(**values)


_OTHER_MODEL = "it was made for another model or other target_modules: make a plan for this one"


def _check_site(name: str, plan: SitePlan, site: Site) -> None:
    planned, found = (plan.B.shape[0], plan.A.shape[1]), (site.out_features, site.in_features)
    if planned != found:
        raise ValueError(f"site {name}: the plan is for (out, in) = {planned}, the layer is {found}; {_OTHER_MODEL}")
    adapter = (site.rank, round(site.scaling, 9))
    if adapter != (plan.found_rank, round(plan.found_scaling, 9)):
        raise ValueError(
            f"site {name}: the plan is for an adapter of rank {plan.found_rank} and scaling {plan.found_scaling:g}, "
            f"this one has rank {site.rank} and scaling {site.scaling:g}; use the same LoraConfig"
        )
    W = site.weight()
    if sketch_distance(weight_sketch(W), plan.sketch) > site.rounding * max(plan.weight_norm, 1e-12):
        raise ValueError(f"site {name}: the pretrained weight is not the one the plan was made for; {_OTHER_MODEL}")


def weight_sketch(W: Tensor) -> list[float]:
    """uᵀWv for four random pairs u, v: for another W they differ by about ‖W‖_F, for a rounded W by next to nothing."""
    generator = torch.Generator().manual_seed(W.shape[0] * 65_537 + W.shape[1])
    U, V = (torch.randn(4, n, generator=generator, dtype=torch.float64).to(W) for n in W.shape)
    return ((U @ W) * V).sum(dim=1).tolist()


def sketch_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two sketches."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


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


def site_dict(site: SitePlan) -> dict[str, Any]:
    """The plain values of a site, without its matrices."""
    values = {key: getattr(site, key) for key in _PLAIN}
    return {**values, "file_rank": site.file_rank, "captured": site.captured}

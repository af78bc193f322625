"""Finds the adapted layers of a model, whoever made them, without importing PEFT.

A site is one LoRA layer with one adapter, under the base model's own name for it (`lora_layers.base_name`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import unknown_name
from . import quantised
from .layouts import INSIDE_ATTENTION, as_matrix, layout_of, stored_weight, weight_matrix, why_fixed
from .lora_layers import adapters_of, factor_of, factor_slots, is_lora_layer, lora_layers, uses_rslora
from .offloaded import execution_device, is_offloaded


@dataclass(frozen=True)
class Site:
    """One adapted layer: W (k, d) = (out_features, in_features) with factors A (rank, d) and B (k, rank).

    Of a convolution d is in_channels·kernel, of an embedding the size of the vocabulary.

    Attributes:
        gathered: W (k, d), while this process holds all of a weight that is sharded.
        source: gives the weight as the layer would store it, in place of that of the model (`weights=`).
        unseen: why the inputs of its W cannot be read, for methods that need them; None where they can.
    """

    name: str
    adapter: str
    layer: Any  # a PEFT LoRA layer, known by its attributes
    in_features: int
    out_features: int
    gathered: Tensor | None = field(default=None, repr=False, compare=False)
    source: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)
    unseen: str | None = field(default=None, repr=False, compare=False)

    @property
    def base(self) -> Any:
        """The pretrained layer inside."""
        return self.layer.get_base_layer()

    @property
    def stored(self) -> Any:
        """The parameter of `base` that holds W, as it is stored."""
        return stored_weight(self.base)

    @property
    def A(self) -> nn.Parameter:
        """(rank, d), of a convolution (rank, in_channels, *kernel)."""
        return factor_of(*factor_slots(self.layer, self.adapter)[0])

    @property
    def B(self) -> nn.Parameter:
        """(k, rank), of a convolution (k, rank, 1, …)."""
        return factor_of(*factor_slots(self.layer, self.adapter)[1])

    @property
    def device(self) -> torch.device:
        """The device of W, or that on which it computes while it is offloaded."""
        device: torch.device = self.stored.device
        return execution_device(self.base) if device.type == "meta" else device

    @property
    def adapter_device(self) -> torch.device:
        """The device of A and B, or that on which they compute while they are offloaded."""
        device = self.A.device
        return execution_device(factor_slots(self.layer, self.adapter)[0][0]) if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that W is worth."""
        return quantised.dtype_of(self.stored)

    @property
    def fixed(self) -> str | None:
        """The reason why W can neither be written nor have a gradient; None where it can."""
        return why_fixed(self.base)

    @property
    def rounding(self) -> float:
        """Bound on the distance of the sketches of W and of another copy of the same weight, in units of ‖W‖."""
        # bfloat16 rounds each entry by up to 0.4 %, which moves the sketch by far less than 2 % of ‖W‖
        return max(0.02, quantised.rounding_of(self.stored))

    @property
    def rank(self) -> int:
        return int(self.layer.r[self.adapter])

    @property
    def alpha(self) -> float:
        return float(self.layer.lora_alpha[self.adapter])

    @property
    def scaling(self) -> float:
        """s: the layer adds s·B·A."""
        return float(self.layer.scaling[self.adapter])

    @property
    def use_rslora(self) -> bool:
        return uses_rslora(self.layer, self.adapter)

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's magnitude vector (k,), or None."""
        vectors = getattr(self.layer, "lora_magnitude_vector", None)
        if vectors is None or self.adapter not in vectors:
            return None
        weight = vectors[self.adapter].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def weight(self, dtype: torch.dtype = torch.float64, copy: bool = True) -> Tensor:
        """W (k, d) in `dtype`, a copy unless `copy` is off; a collective where it is sharded and not `gathered`."""
        if self.gathered is not None:
            W = self.gathered
        elif self.source is not None:
            W = as_matrix(self.base, self.source()).to(self.device)
        else:
            W = weight_matrix(self.base)
        return W.to(dtype, copy=copy)

    def working_weight(self) -> Tensor:
        """W (k, d) in its own dtype, float32 at least; not to be edited, since it may be the model's own."""
        return self.weight(torch.promote_types(self.dtype, torch.float32), copy=False)


def find_sites(model: nn.Module, adapter: str = "default") -> tuple[list[Site], dict[str, str]]:
    """All sites of one adapter in the order of the model, and the layers that cannot be one, with the reason.

    Raises:
        ValueError: if no layer carries the adapter; lists the adapters that exist.
    """
    sites, refused = [], {}
    found = list(lora_layers(model, adapter))
    inside = _inside_attention(model, {id(layer) for _, layer in found})
    for name, layer in found:
        adapted = inside.get(id(layer))
        reason = _NEVER_CALLED if adapted is False else _refusal(layer, adapter)
        if reason:
            refused[name] = reason
        else:
            sites.append(_site(name, adapter, layer, INSIDE_ATTENTION if adapted else None))
    if sites or refused:
        return sites, refused
    present = sorted({a for m in model.modules() if is_lora_layer(m) for a in adapters_of(m)})
    if present:
        raise ValueError(unknown_name("adapter_name", adapter, present))
    raise ValueError(
        f"the model ({type(model).__name__}) has no LoRA layer; wrap it first: get_peft_model(model, LoraConfig(...)) "
        "or model.add_adapter(LoraConfig(...))"
    )


_NEVER_CALLED = (
    "the nn.MultiheadAttention around it reads its weight and never calls it, so that a LoRA there has no effect; "
    "target the attention module itself"
)


def _inside_attention(model: nn.Module, lora: set[int]) -> dict[int, bool]:
    """The output projections of every nn.MultiheadAttention, and whether the attention around is adapted too."""
    around = {id(m.get_base_layer()) for m in model.modules() if id(m) in lora}  # type: ignore[operator]
    return {id(m.out_proj): id(m) in around for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def _site(name: str, adapter: str, layer: Any, unseen: str | None) -> Site:
    layout = layout_of(layer.get_base_layer())
    A, B = (factor_of(*slot) for slot in factor_slots(layer, adapter))
    return Site(name, adapter, layer, A.shape[1:].numel(), B.shape[0], unseen=unseen or layout.unseen)


def _refusal(layer: Any, adapter: str) -> str | None:
    """Return why a LoRA layer cannot be initialised, or None."""
    base = layer.get_base_layer()
    if adapter in layer.lora_A and not hasattr(layer.lora_A[adapter], "weight"):
        return f"it is not plain LoRA but a {type(layer).__name__} of {type(layer).__module__} (AdaLoRA)"
    if hasattr(layer, "parameter_name"):
        return (
            f"it adapts the bare parameter {layer.parameter_name!r} (target_parameters), which its module computes "
            "with as it likes, so that its inputs cannot be read"
        )
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and "Dora" not in type(variant).__name__:
        return f"its LoRA variant {type(variant).__name__} is not plain LoRA, DoRA or rsLoRA"
    try:
        layout_of(base)
    except ValueError as error:
        return str(error)
    owner, name = factor_slots(layer, adapter)[0]
    if factor_of(owner, name).dtype not in quantised.FLOATS:
        return (
            f"its LoRA factors are {factor_of(owner, name).dtype}, in which nothing trains; expected float32, bfloat16 "
            "or float16: leave autocast_adapter_dtype on, and the adapter out of layerwise casting"
        )
    if factor_of(owner, name).device.type == "meta" and not is_offloaded(owner):
        return (
            "its LoRA factors are on the meta device (no values); create the adapter with low_cpu_mem_usage=False, and "
            "before the base is offloaded: PEFT puts the adapter of an offloaded layer on the meta device"
        )
    return None

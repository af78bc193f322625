"""Finds the adapted layers of a model, whoever made them, without importing PEFT.

A site is one LoRA layer with one adapter. Its name is the one of the base model's own `named_modules()`: prefixes that
PEFT, DDP or a wrapper put in front are dropped, so that a plan fits the model however it is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import unknown_name
from .layouts import layout_of, weight_matrix


@dataclass(frozen=True)
class Site:
    """One adapted layer: W (k, d) = (out_features, in_features) with factors A (rank, d) and B (k, rank).

    Attributes:
        gathered: W (k, d), while this process holds all of a weight that is sharded.
    """

    name: str
    adapter: str
    layer: Any  # a PEFT LoRA layer, known by its attributes
    in_features: int
    out_features: int
    gathered: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def base(self) -> Any:
        """The pretrained layer inside, an nn.Module with `weight`."""
        return self.layer.get_base_layer()

    @property
    def A(self) -> nn.Parameter:
        weight = self.layer.lora_A[self.adapter].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def B(self) -> nn.Parameter:
        weight = self.layer.lora_B[self.adapter].weight
        assert isinstance(weight, nn.Parameter)
        return weight

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

    @property
    def transposed(self) -> bool:
        return layout_of(self.base).transposed

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """W (k, d), a copy in `dtype`; a collective where it is sharded and not `gathered`."""
        W = weight_matrix(self.base) if self.gathered is None else self.gathered
        return W.to(dtype, copy=True)


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module carries LoRA factors the way PEFT's layers do."""
    return hasattr(module, "get_base_layer") and hasattr(module, "lora_A") and hasattr(module, "lora_B")


def lora_paths(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """(path below the naming root, layer) of every layer that carries `adapter`."""
    root = naming_root(model, adapter)
    for path, module in model.named_modules():
        if is_lora_layer(module) and adapter in adapters_of(module):
            yield path.removeprefix(root), module


def base_name(path: str, layer: Any = None) -> str:
    """The base model's own name for a path: without the `base_layer` of LoRA layers around it.

    A layer that adapts a bare parameter (`target_parameters`) has the name of the parameter, as in PEFT's patterns.
    """
    parts = [part for part in path.split(".") if part != "base_layer"]
    parameter = getattr(layer, "parameter_name", None)
    return ".".join(parts if parameter is None else [*parts, parameter])


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that carries `adapter`, also of kinds that cannot be initialised."""
    for path, layer in lora_paths(model, adapter):
        yield base_name(path, layer), layer


def uses_rslora(layer: Any, adapter: str) -> bool:
    """Whether one adapter of a LoRA layer has scaling alpha/√r instead of alpha/r."""
    return bool(getattr(layer, "use_rslora", {}).get(adapter, False))


def adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that one LoRA layer holds."""
    return set(layer.lora_A) | set(getattr(layer, "lora_embedding_A", ()))


def config_holder(model: nn.Module, adapter: str) -> tuple[str, nn.Module] | None:
    """Path and module of the innermost module whose `peft_config` knows `adapter`; None for a bare model."""
    found = None
    for path, module in model.named_modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            found = (path, module)
    return found


def naming_root(model: nn.Module, adapter: str) -> str:
    """The prefix, with its dot, that separates names in `model` from the base model's own names."""
    holder = config_holder(model, adapter)
    return f"{holder[0]}." if holder and holder[0] else ""


def find_sites(model: nn.Module, adapter: str = "default") -> tuple[list[Site], dict[str, str]]:
    """All sites of one adapter in the order of the model, and the layers that cannot be one, with the reason.

    Raises:
        ValueError: if no layer carries the adapter; lists the adapters that exist.
    """
    sites, refused = [], {}
    for name, layer in lora_layers(model, adapter):
        reason = _refusal(layer, adapter)
        if reason:
            refused[name] = reason
        else:
            sites.append(Site(name, adapter, layer, int(layer.in_features), int(layer.out_features)))
    if sites or refused:
        return sites, refused
    present = sorted({a for m in model.modules() if is_lora_layer(m) for a in adapters_of(m)})
    if present:
        raise ValueError(unknown_name("adapter_name", adapter, present))
    raise ValueError(
        f"the model ({type(model).__name__}) has no LoRA layer; wrap it first: get_peft_model(model, LoraConfig(...)) "
        "or model.add_adapter(LoraConfig(...))"
    )


def _refusal(layer: Any, adapter: str) -> str | None:
    """Why a LoRA layer cannot be initialised, or None."""
    if adapter not in layer.lora_A:
        return f"it is a LoRA of {type(layer.get_base_layer()).__name__}, which has no linear map to initialise"
    if not hasattr(layer.lora_A[adapter], "weight"):
        return f"it is not plain LoRA but a {type(layer).__name__} of {type(layer).__module__} (AdaLoRA)"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and "Dora" not in type(variant).__name__:
        return f"its LoRA variant {type(variant).__name__} is not plain LoRA, DoRA or rsLoRA"
    if layer.lora_A[adapter].weight.dim() != 2:
        return f"it is a LoRA of {type(layer.get_base_layer()).__name__}; only Linear and Conv1D are initialised"
    if hasattr(layer, "parameter_name"):
        return f"it adapts the bare parameter {layer.parameter_name!r} (target_parameters), which is not supported"
    try:
        layout_of(layer.get_base_layer())
    except ValueError as error:
        return str(error)
    if layer.lora_A[adapter].weight.device.type == "meta":
        return "its LoRA factors are on the meta device (no values); create the adapter with low_cpu_mem_usage=False"
    return None

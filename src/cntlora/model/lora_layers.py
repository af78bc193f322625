"""The LoRA layers of a model, known by their attributes: their names, factors and adapters. PEFT is not imported.

The name of a layer is the one of the base model's own `named_modules()`: prefixes that PEFT, DDP or a wrapper put in
front are dropped, so that a plan fits the model however it is wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn


def factor_slots(layer: Any, adapter: str) -> tuple[tuple[Any, str], tuple[Any, str]]:
    """Return the places of A and B of a LoRA layer: (module, name of the parameter) for each."""
    if adapter in layer.lora_A:
        return (layer.lora_A[adapter], "weight"), (layer.lora_B[adapter], "weight")
    return (layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)


def factor_of(owner: Any, name: str) -> nn.Parameter:
    """The parameter in one of `factor_slots`."""
    parameter = getattr(owner, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def is_lora_layer(module: nn.Module) -> bool:
    """Return whether a module carries LoRA factors the way PEFT's layers do."""
    return hasattr(module, "get_base_layer") and hasattr(module, "lora_A") and hasattr(module, "lora_B")


def lora_paths(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """(path below the naming root, layer) of every layer that carries `adapter`."""
    root = naming_root(model, adapter)
    for path, module in model.named_modules():
        if is_lora_layer(module) and adapter in adapters_of(module):
            yield path.removeprefix(root).replace("_orig_mod.", ""), module


def base_name(path: str, layer: Any = None) -> str:
    """The base model's own name for a path: without the `base_layer` of LoRA layers, the `_orig_mod` of compiled ones.

    A layer that adapts a bare parameter (`target_parameters`) has the name of the parameter, as in PEFT's patterns.
    """
    parts = [part for part in path.split(".") if part not in ("base_layer", "_orig_mod")]
    parameter = getattr(layer, "parameter_name", None)
    return ".".join(parts if parameter is None else [*parts, parameter])


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that carries `adapter`, also of kinds that cannot be initialised."""
    for path, layer in lora_paths(model, adapter):
        yield base_name(path, layer), layer


def uses_rslora(layer: Any, adapter: str) -> bool:
    """Return whether one adapter of a LoRA layer has scaling alpha/√r instead of alpha/r."""
    told = getattr(layer, "use_rslora", None)
    if told is not None:
        return bool(told.get(adapter, False))
    # PEFT before 0.18 keeps no note of it in the layer
    alpha, rank, scaling = (float(values[adapter]) for values in (layer.lora_alpha, layer.r, layer.scaling))
    return rank > 1 and math.isclose(scaling * rank**0.5, alpha, rel_tol=1e-6)


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

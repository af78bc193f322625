"""PEFT's configuration of an adapter, kept in line with its layers, so that PEFT saves and reloads the same model."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

from torch import nn

from .lora_layers import base_name, config_holder, lora_layers, naming_root, uses_rslora


def as_integer(value: float) -> int | float:
    """2.0 as 2: `lora_alpha` is a whole number wherever it can be."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def sync_config(model: nn.Module, adapter: str) -> None:
    """Bring `peft_config[adapter]` in line with the layers, so that saving and reloading gives the same model.

    The commonest rank and its alpha become `r` and `lora_alpha`; every other site gets a pattern with its anchored full
    name (PEFT matches patterns by suffix, and `foo` would also catch `bar.foo`). `target_modules` becomes the list of
    the sites where some lost their adapter. A bare module without a config is left alone.
    """
    holder = config_holder(model, adapter)
    if holder is None:
        return
    _own_config(model, adapter)
    config: Any = holder[1].peft_config[adapter]  # type: ignore[index,union-attr]
    layers = dict(lora_layers(model, adapter))
    config.use_rslora = all(uses_rslora(layer, adapter) for layer in layers.values())
    shapes = {n: (int(x.r[adapter]), _alpha(x, adapter, config.use_rslora)) for n, x in layers.items()}
    config.r, config.lora_alpha = Counter(shapes.values()).most_common(1)[0][0]
    config.rank_pattern = {anchored(n): r for n, (r, _) in shapes.items() if r != config.r}
    config.alpha_pattern = {anchored(n): a for n, (_, a) in shapes.items() if a != config.lora_alpha}
    config.target_modules = selecting(model, adapter, config.target_modules)
    if isinstance(config.target_modules, str):
        config.layers_to_transform = config.layers_pattern = None  # PEFT takes them with a list only


def _own_config(model: nn.Module, adapter: str) -> None:
    """A copy in place of the config, which the caller may use again, and which TRL's adapter "ref" shares."""
    dicts = {id(c): c for c in (getattr(m, "peft_config", None) for m in model.modules()) if isinstance(c, dict)}
    copies: dict[int, Any] = {}
    for configs in dicts.values():
        if adapter in configs:
            old = configs[adapter]
            configs[adapter] = copies[id(old)] = copies.get(id(old)) or copy.deepcopy(old)


def _alpha(layer: Any, adapter: str, use_rslora: bool) -> int | float:
    """The alpha that gives a layer its scaling by the rule of the config, where some layers use rsLoRA and some not."""
    alpha, rank = float(layer.lora_alpha[adapter]), int(layer.r[adapter])
    own = uses_rslora(layer, adapter)
    return as_integer(alpha if own == use_rslora else alpha * (rank**0.5 if own else rank**-0.5))


def anchored(name: str) -> str:
    """A pattern that matches this module and no other."""
    return f"^{re.escape(name)}"


def selecting(model: nn.Module, adapter: str, targets: Any) -> Any:
    """`target_modules` that selects exactly the layers that have the adapter: the old value if it still does, else
    their names, else one regex."""
    layers = dict(lora_layers(model, adapter))
    # bare parameters have a list of their own, and the projection inside an attention layer comes with that layer
    inside = {name for name in layers if name.rpartition(".")[0] in layers}
    names = [n for n, layer in layers.items() if n not in inside and not hasattr(layer, "parameter_name")]
    root = naming_root(model, adapter)
    paths = {path.removeprefix(root) for path, _ in model.named_modules() if path.startswith(root)}
    candidates = {base_name(path) for path in paths if ".lora_" not in path} - {""}
    if _selected(targets, candidates) == set(names):
        return targets
    if _selected(set(names), candidates) == set(names):
        return set(names)
    return "|".join(re.escape(name) for name in names)


def _selected(targets: Any, candidates: set[str]) -> set[str]:
    """The modules that PEFT would adapt for a value of `target_modules`."""
    if isinstance(targets, str):
        return set() if targets == "all-linear" else {c for c in candidates if re.fullmatch(targets, c)}
    endings = tuple(f".{t}" for t in targets or ())
    return {c for c in candidates if c in (targets or ()) or c.endswith(endings)} if endings else set()

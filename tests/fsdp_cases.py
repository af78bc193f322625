"""Tiny models that `fully_shard` (FSDP2) splits over processes, and what to compare of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tests.tiny import adapted, causal_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cntlora import InitConfig, initialize
from cntlora.model import sharded

READ_NOTHING = ("pissa", "lora")


def shard(model: Any, at_once: bool = False) -> Any:
    """Every layer, then the rest, as FSDP2 is meant to be used; or all at once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.base_model.model
    for layer in () if at_once else inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def model_of(kind: str = "llama", **options: Any) -> Any:
    return adapted(kind, dtype=torch.float64, **options)


def batches(rank: int, count: int = 2) -> list[dict[str, Tensor]]:
    return causal_batches(count, rows=6, seed=rank)


def config_of(method: str, base: str = "keep", count: int = 2, **options: Any) -> InitConfig:
    # shift's own tolerance drops something everywhere, so that no site shares; that of rounding lets some
    rtol = {"cross": {"rtol": 1e-6}, "self": {"rtol": 1e-6}, "shift": {"rtol": 0.0}}.get(method, {})
    step = {"strength": 0.1} if method == "descent" else {}  # its search looks at the first batches of each process
    return InitConfig.from_dict({"method": method, "base": base, "num_batches": count, **rtol, **step, **options})


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered."""
    sharded.reshard(model)
    return {name: sharded.full(p).clone() for name, p in model.named_parameters()}


def factors(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items() if "lora_" in name}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference."""
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / right[n].norm().clamp_min(1e-12)) for n in left)


def alone(world: int, method: str, base: str, **options: Any) -> Any:
    """One process with the whole model that reads what so many ranks read."""
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        model, everything = model_of(**options), [b for rank in range(world) for b in batches(rank)]
        initialize(model, None if method in READ_NOTHING else everything, config_of(method, base, 2 * world))
        return model
    finally:
        dist.is_initialized = initialized


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(**causal_batches(1, seed=9)[0]).loss)

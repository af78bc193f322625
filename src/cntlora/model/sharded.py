"""Weights that are split over processes: read whole, and those of FSDP2 (`fully_shard`) written whole.

The only place with DTensors and with the parameters of DeepSpeed ZeRO-3, which is not imported: such a parameter is
empty, and carries its shape and its part. What gives a whole tensor is a collective: every process has to call it, in
the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WHY_FIXED = "its weight is partitioned over processes (DeepSpeed ZeRO-3)"
"""Why a weight can neither be written nor have a gradient here."""


def is_sharded(tensor: object) -> bool:
    """Return whether each process holds only a part of a tensor: a DTensor, or a parameter of ZeRO-3."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported by anyone: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioned(tensor: Any) -> bool:
    """Return whether a parameter is one of ZeRO-3's, gathered at the moment or not."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor")


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a parameter, of the whole one where it is partitioned."""
    return torch.Size(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def gathered_parameters(parameters: Sequence[Any]) -> Any:
    """A context in which partitioned parameters are whole on every process. A collective."""
    zero = sys.modules["deepspeed"].zero  # whoever made them has imported it
    return zero.GatheredParameters(list(parameters))


def full_copy(parameter: Any) -> Tensor:
    """A copy of all of a partitioned parameter. A collective."""
    with gathered_parameters([parameter]):
        copy: Tensor = parameter.detach().clone()
    return copy


def full_copy_where(parameter: Any, here: bool) -> Tensor | None:
    """`full_copy` where `here`, None on the processes that only take part. A collective."""
    with gathered_parameters([parameter]):
        return parameter.detach().clone() if here else None


def shards(model: nn.Module) -> int:
    """Count the parameters of a model that are sharded.

    Raises:
        ValueError: if any is by other means than `fully_shard`: then processes may see parts of the same tokens.
    """
    number = sum(is_dtensor(parameter) for parameter in model.parameters())
    if number and not any(isinstance(module, _fsdp_kind()) for module in model.modules()):
        raise ValueError(
            "the model has DTensor parameters that fully_shard did not make (tensor parallelism?); initialise the "
            "adapter before the model is made parallel"
        )
    return number + partitioned(model)


def partitioned(model: nn.Module) -> int:
    """Count the parameters of a model that ZeRO-3 has partitioned."""
    return sum(is_partitioned(parameter) for parameter in model.parameters())


def is_split(model: nn.Module) -> bool:
    """Return whether parameters are sharded over more than this process, or have to be gathered to be read."""
    sharded: list[Any] = [p for p in model.parameters() if is_dtensor(p)]
    return any(p.device_mesh.size() > 1 for p in sharded) or partitioned(model) > 0


def reshard(model: nn.Module) -> None:
    """Free the whole weights that `fully_shard` keeps after a forward pass, so that the parameters are the shards."""
    for module in model.modules():
        if isinstance(module, _fsdp_kind()):
            module.reshard()  # type: ignore[operator]


def recover(model: nn.Module, before: int) -> None:
    """Put a model back in order after an error, also one in a forward or backward pass, as far as this torch can.

    Args:
        before: how many parameters were sharded; where it is fewer, layers are stuck with what was gathered.
    """
    reshard(model)
    if shards(model) == before:
        return
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, _fsdp_kind()) and id(module) not in inside:
            inside |= {id(child) for child in module.modules()}
            if hasattr(module, "reset_iter_state"):
                with suppress(RuntimeError):  # it waits for what was under way, which may be what has failed
                    module.reset_iter_state()  # type: ignore[operator]


def _fsdp_kind() -> Any:
    """The class of modules that `fully_shard` was called on; an empty tuple where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def refusal(tensor: Any) -> str | None:
    """Return why a sharded weight cannot be read, or None: `fully_shard` over all processes has to be what made it."""
    if not is_dtensor(tensor):
        return None
    mesh, shards = tensor.device_mesh, [p for p in tensor.placements if not p.is_replicate()]
    if len(shards) <= 1 and all(p.is_shard() for p in shards) and mesh.size() == dist.get_world_size():
        return None
    return (
        f"its weight is a DTensor with placements {tensor.placements} over {mesh.size()} of {dist.get_world_size()} "
        "processes, expected that of fully_shard over all of them; initialise the adapter before the model is made "
        "parallel"
    )


def check_rank(name: str, A: Tensor, rank: int) -> None:
    """Raise ValueError if A (r, d) is sharded and would get another rank: FSDP goes on with the parameter it knows."""
    if is_dtensor(A) and A.shape[0] != rank:
        raise ValueError(
            f"site {name}: its adapter of rank {A.shape[0]} is already sharded by fully_shard, which cannot take one "
            f"of rank {rank}; initialise first, then shard, or keep the rank: base='paired', 'subtract' or 'keep', "
            "without adaptive_ranks"
        )


def full(tensor: Tensor) -> Tensor:
    """The whole value on every process, detached; a tensor that is whole already is not copied. A collective."""
    if is_partitioned(tensor):
        return full_copy(tensor)
    if not is_sharded(tensor):
        return tensor.detach()
    whole: Tensor = _on_mesh(tensor.detach()).full_tensor()
    return whole.to(tensor.device)


def full_at(tensor: Tensor, owner: int) -> Tensor | None:
    """The whole value on rank `owner`, None elsewhere: the others send their part and hold no more. A collective."""
    mine = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == owner
    if is_partitioned(tensor):
        return full_copy_where(tensor, mine)
    if not is_sharded(tensor):
        return tensor.detach() if mine else None
    sharded = _on_mesh(tensor.detach())
    mesh, placements = sharded.device_mesh, sharded.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        whole = full(tensor)
        return whole if mine else None
    local = sharded.to_local()
    count, shape = -(-tensor.shape[0] // mesh.size()), tensor.shape[1:]  # rows of a part, as torch.chunk makes them
    if local.shape[0] < count:
        local = torch.cat([local, local.new_zeros(count - local.shape[0], *shape)])
    whole = local.new_empty(count * mesh.size() if mine else 0, *shape)
    parts = list(whole.split(count)) if mine else None
    dist.gather(local.contiguous(), parts, dst=owner, group=mesh.get_group())
    return whole[: tensor.shape[0]].to(tensor.device) if mine else None


def part_of(value: Tensor, parameter: Any) -> Tensor:
    """The part of `value` that this process holds where it is sharded as `parameter` is. Nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    there = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    return there.to_local().to(parameter.device)


def write(parameter: Any, value: Tensor) -> None:
    """Copy a whole value, which every process has, into a parameter, sharded or not."""
    with torch.no_grad():
        if is_sharded(parameter):
            parameter.to_local().copy_(part_of(value, parameter))
        else:
            parameter.copy_(value)


def address(tensor: Any) -> int:
    """Return where the values that this process holds begin, to tell whether two tensors share them."""
    if is_partitioned(tensor):
        return int(tensor.ds_tensor.data_ptr())
    local: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor
    return local.data_ptr()


def _on_mesh(tensor: Any) -> Any:
    """The shard on the device that collectives work on; with CPU offload it lies elsewhere."""
    kind = tensor.device_mesh.device_type
    return tensor if tensor.device.type == kind else tensor.to(kind)

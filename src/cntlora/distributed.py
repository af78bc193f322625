"""One decision everywhere: where several processes run, all apply the plan of the first."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .plan import InitPlan


def share_plan(plan: InitPlan) -> InitPlan:
    """The plan of rank 0 on every rank of the default process group; the plan itself where there is none.

    The statistics are those of rank 0's batches; factors, signs and ranks are then the same bits everywhere.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return plan
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(plan.to_bytes()), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return InitPlan.from_bytes(data.cpu().numpy().tobytes(), "the plan of rank 0")

"""One decision everywhere: where several processes run, all apply the plan of the first."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .plan import InitPlan


def share_plan(outcome: InitPlan | Exception) -> InitPlan:
    """The plan of rank 0 on every rank of the default process group; the plan itself where there is none.

    The statistics are those of rank 0's batches; factors, signs and ranks are then the same bits everywhere.

    Args:
        outcome: the plan made on this rank, or the exception that was raised instead.

    Raises:
        Exception: the outcome, if it is one.
        RuntimeError: if there was none on another rank, with its message, so that no rank waits for one that failed.
    """
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    failed = [] if alone else _failures(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    if failed:
        raise RuntimeError(f"the initialisation failed on another rank, so no rank applies it: {failed[0]}")
    return outcome if alone else _of_rank_0(outcome)


def _failures(outcome: InitPlan | Exception) -> list[str]:
    """What went wrong on any rank."""
    messages: list[str | None] = [None] * dist.get_world_size()
    failed = isinstance(outcome, Exception)
    dist.all_gather_object(messages, f"rank {dist.get_rank()}: {outcome}" if failed else None)
    return [message for message in messages if message is not None]


def _of_rank_0(plan: InitPlan) -> InitPlan:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(plan.to_bytes()), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return InitPlan.from_bytes(data.cpu().numpy().tobytes(), "the plan of rank 0")

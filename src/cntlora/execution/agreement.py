"""How processes talk: none waits for one that failed, and one that ended is an error on the others, not a hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batches import Forward
from ..messages import in_short

T = TypeVar("T")

_KNOWN = "known_to_all"  # attribute of an exception of which every rank has heard


def alone() -> bool:
    """Whether this process has no others to agree with."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def attempt(make: Callable[[], T]) -> T | Exception:
    """The result, or the exception: other processes must not wait for what does not come."""
    try:
        return make()
    except Exception as error:
        return error


def agreed(outcome: T | Exception, stage: str = "") -> T:
    """The outcome, if no rank failed and all are at the same stage.

    Raises:
        Exception: the outcome, if it is one.
        RuntimeError: if there was one on another rank, with its message, so that no rank waits for one that failed; if
            another rank is at another stage; or if one has ended.
    """
    if isinstance(outcome, Exception) and getattr(outcome, _KNOWN, False):
        raise outcome
    failed = f"{type(outcome).__name__}: {in_short(outcome, 800)}" if isinstance(outcome, Exception) else None
    reports = [] if alone() else gathered((failed, stage), failed)
    if isinstance(outcome, Exception):
        raise _known(outcome)
    for rank, (failure, _) in enumerate(reports):
        if failure is not None:
            raise _known(RuntimeError(f"rank {rank} failed, so that no rank goes on: {failure}"))
    stages = {rank: at for rank, (_, at) in enumerate(reports) if at != stage}
    if stages:
        rank, at = next(iter(stages.items()))
        raise _known(
            RuntimeError(
                f"this process is at {stage}, rank {rank} at {at}: with sharded weights every process has to read "
                "equally many batches; give all of them as many, or lower num_batches"
            )
        )
    return outcome


def in_step(call: Forward, check: Callable[[Any, int], Any] | None = None) -> Forward:
    """A forward pass that all processes begin together, since sharded weights are gathered in it.

    Args:
        check: looks at the output and the index of the batch, before a backward pass that is done together too.
    """
    indices = count()

    @wraps(call)  # with what is noted on it, such as `by_labels`
    def stepped(model: nn.Module, batch: Any) -> Any:
        index = next(indices)
        agreed(None, f"batch {index}")
        output = call(model, batch)
        if check is not None:
            agreed(attempt(lambda: check(output, index)), f"the loss of batch {index}")
        return output

    return stepped


def gathered(value: T, failed: str | None = None) -> list[T]:
    """The value of every rank, in the order of ranks; small plain values only.

    Args:
        failed: what went wrong on this rank, for the message if another has ended.
    """
    values: list[Any] = [None] * dist.get_world_size()
    with answered(failed):
        dist.all_gather_object(values, value)
    return values


def summed_at(total: Tensor, owner: int) -> Tensor | None:
    """The sum over ranks on rank `owner`, on the device that `total` lies on; None elsewhere. `total` is used up."""
    there = total.to(device())
    with answered():
        dist.reduce(there, dst=owner)
    return there.to(total.device) if dist.get_rank() == owner else None


def sent_by_each(data: bytes) -> Iterator[bytes]:
    """What every rank gives, in the order of ranks, one after the other."""
    for rank, size in enumerate(gathered(len(data))):
        mine = rank == dist.get_rank()
        there = torch.frombuffer(bytearray(data), dtype=torch.uint8) if mine else torch.empty(size, dtype=torch.uint8)
        there = there.to(device())
        with answered():
            dist.broadcast(there, src=rank)
        yield data if mine else there.cpu().numpy().tobytes()


def device() -> torch.device:
    """Where tensors have to lie to be sent; NCCL works on the GPU alone."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def answered(failed: str | None = None) -> Iterator[None]:
    """Makes one clear error of what a backend raises where another process does not answer.

    Args:
        failed: what went wrong on this rank.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError and DistNetworkError are kinds of it
        here = f" (here: {failed})" if failed else ""
        raise _known(
            RuntimeError(
                "another process has ended, or has not answered within the timeout of the process group "
                f"(init_process_group(timeout=...)){here}; nothing was written into this model. Look for the first "
                f"error in the output of the other processes. The backend says: {in_short(error, 800)}"
            )
        ) from error


def _known(error: Exception) -> Exception:
    setattr(error, _KNOWN, True)
    return error

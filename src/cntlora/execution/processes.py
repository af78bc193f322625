"""Communication of processes: none waits for one that failed, and one that ended is an error on the others, no hang.

Without a process group, or in one of a single process, everything here is what that one process does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..messages import in_short

if TYPE_CHECKING:
    from ..data.batches import Forward

T = TypeVar("T")

_KNOWN = "known_to_all"  # attribute of an exception of which every rank has heard


def world_size() -> int:
    """The number of processes that work together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def outcome_of(make: Callable[[], T]) -> T | Exception:
    """The result, or the exception: other processes must not wait for a result that does not come."""
    try:
        return make()
    except Exception as error:
        return error


def raise_together(outcome: T | Exception, stage: str = "") -> T:
    """The outcome, if no rank failed and all are at the same stage.

    Raises:
        Exception: the outcome, if it is one.
        RuntimeError: if there was one on another rank, with its message, so that no rank waits for one that failed; if
            another rank is at another stage; or if one has ended.
    """
    if isinstance(outcome, Exception) and getattr(outcome, _KNOWN, False):
        raise outcome
    failed = f"{type(outcome).__name__}: {in_short(outcome, 800)}" if isinstance(outcome, Exception) else None
    reports = gather((failed, stage), failed)
    if isinstance(outcome, Exception):
        raise _known(outcome)
    for other, (failure, _) in enumerate(reports):
        if failure is not None:
            raise _known(RuntimeError(f"rank {other} failed, so that no rank goes on: {failure}"))
    stages = {other: at for other, (_, at) in enumerate(reports) if at != stage}
    if stages:
        other, at = next(iter(stages.items()))
        raise _known(
            RuntimeError(
                f"this process is at {stage}, rank {other} at {at}: with sharded weights every process has to read "
                "equally many batches; give all of them as many, or lower num_batches"
            )
        )
    return outcome


def run_together(make: Callable[[], T], stage: str = "") -> T:
    """Run `make` on this process; every process has to call this, and what one raises is raised on all."""
    return raise_together(outcome_of(make), stage)


def on_first_process(make: Callable[[], None]) -> None:
    """Run `make` on the first process; every process has to call this, and fails if that one does."""
    run_together(make if rank() == 0 else lambda: None)


def synchronised(call: Forward, check: Callable[[Any, int], Any] | None = None) -> Forward:
    """A forward pass that all processes begin together, since sharded weights are gathered in it.

    Args:
        check: looks at the output and the index of the batch, before a backward pass that is done together too.
    """
    indices = count()

    @wraps(call)  # with its attributes, such as `by_labels`
    def stepped(model: nn.Module, batch: Any) -> Any:
        index = next(indices)
        raise_together(None, f"batch {index}")
        output = call(model, batch)
        if check is not None:
            run_together(lambda: check(output, index), f"the loss of batch {index}")
        return output

    return stepped


def gather(value: T, failed: str | None = None) -> list[T]:
    """The value of every rank, in the order of ranks; small plain values only.

    Args:
        failed: what went wrong on this rank, for the message if another has ended.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with lost_process_named(failed):
        dist.all_gather_object(values, value)
    return values


def sum_at(total: Tensor, owner: int) -> Tensor | None:
    """The sum over ranks on rank `owner`, on the device that `total` lies on; None elsewhere. `total` is used up."""
    if world_size() == 1:
        return total
    there = total.to(_device())
    with lost_process_named():
        dist.reduce(there, dst=owner)
    return there.to(total.device) if rank() == owner else None


def exchange_bytes(data: bytes) -> Iterator[bytes]:
    """The bytes of every rank, in the order of ranks, one after the other."""
    for sender, size in enumerate(gather(len(data))):
        mine = sender == rank()
        there = torch.frombuffer(bytearray(data), dtype=torch.uint8) if mine else torch.empty(size, dtype=torch.uint8)
        there = there.to(_device())
        with lost_process_named():
            dist.broadcast(there, src=sender)
        yield data if mine else there.cpu().numpy().tobytes()


def _device() -> torch.device:
    """Return the device from which tensors are sent; NCCL works on the GPU alone."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def lost_process_named(failed: str | None = None) -> Iterator[None]:
    """Make one clear error of what a backend raises where another process does not answer.

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

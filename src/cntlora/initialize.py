"""The one call: `initialize(model, batches)`, and its form for a Hugging Face trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapters import apply_plan
from .agreement import agreed, alone, attempt, in_step
from .batches import Forward, TokenMask, default_forward
from .compute import plan_from
from .config import InitConfig
from .core.family import METHODS
from .distributed import plan_together
from .gradients import scalar_loss
from .lockstep import absorb_together
from .memory import MaxMemory
from .reading import Loss, Request, read
from .sharded import recover, reshard, shards
from .summary import InitReport


def initialize(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    config: InitConfig | None = None,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    token_mask: TokenMask = None,
    adapter_name: str = "default",
    on_missing: str = "raise",
    progress: bool = True,
    max_memory: MaxMemory = None,
) -> InitReport:
    """Initialises the LoRA factors of a model from its weights and a few batches of the fine-tuning data.

    Call it between wrapping the model and making the optimizer. `compute_plan` followed by `apply_plan`; arguments and
    errors are theirs. Where several processes run, all have to call it. Each reads its own batches; the statistics of a
    site are added up at one process, which factors it, and all take the same plan. The model may be sharded by
    `fully_shard` (FSDP2) before, where the adapter keeps its ranks (not base "offset"), or afterwards.

    Returns:
        The report: `print` it, or keep `report.to_dict()`.

    Raises:
        RuntimeError: with several processes, if one failed or has ended; no process writes anything then.
    """
    config = config or InitConfig()
    reshard(model)
    sharded = shards(model)

    request = Request(
        model, batches, config, forward, loss, token_mask, adapter_name, on_missing, progress, max_memory,
        in_order=not alone(),
    )  # fmt: skip
    if sharded:
        request.forward = _together(forward or default_forward, config)
        request.loss = _together(loss, config) if loss else None
        request.take = absorb_together
    try:
        found = agreed(attempt(lambda: read(request)), "the end of its data")
        plan = plan_from(found) if alone() and not sharded else plan_together(found)
    except BaseException:
        recover(model, sharded)
        raise
    return apply_plan(model, plan, adapter_name=adapter_name)


def _together(call: Forward, config: InitConfig) -> Forward:
    reads = METHODS[config.method].reads
    return in_step(call, scalar_loss if reads == "gradients" else None)


def initialize_from_trainer(trainer: Any, config: InitConfig | None = None, **options: Any) -> InitReport:
    """`initialize` with the model and the training data of a `transformers.Trainer` or `trl.SFTTrainer`.

    Call it between the constructor and `.train()`: from then on the trainer's optimizer holds the parameters.

    Args:
        trainer: has `.model`, `.get_train_dataloader()` and no optimizer yet.
        config, options: as for `initialize`.

    Raises:
        ValueError: if the trainer has its optimizer already.
    """
    if getattr(trainer, "optimizer", None) is not None:
        raise ValueError(
            "the trainer already has an optimizer, which holds the old parameters; call initialize_from_trainer before "
            ".train(), and leave `optimizers` to the trainer"
        )
    prepared = getattr(getattr(trainer, "accelerator", None), "_dataloaders", None)
    known = len(prepared) if prepared is not None else 0
    try:
        return initialize(trainer.model, trainer.get_train_dataloader(), config, **options)
    finally:
        if prepared is not None:
            del prepared[known:]  # the loader made for this call is none of the trainer's

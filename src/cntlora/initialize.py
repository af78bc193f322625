"""The one call: `initialize(model, batches)`, and its form for a Hugging Face trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from .adapters import apply_plan
from .batches import Forward, TokenMask
from .compute import Loss, plan_from, read
from .config import InitConfig
from .distributed import add_up, agreed, alone, attempt, share_plan
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
) -> InitReport:
    """Initialises the LoRA factors of a model from its weights and a few batches of the fine-tuning data.

    Call it between wrapping the model and making the optimizer. `compute_plan` followed by `apply_plan`; arguments and
    errors are theirs. Where several processes run, each reads its own batches, their statistics are added up, and all
    take the plan that the first makes of them.

    Returns:
        The report: `print` it, or keep `report.to_dict()`.
    """
    reading = agreed(
        attempt(
            lambda: read(
                model,
                batches,
                config,
                forward=forward,
                loss=loss,
                token_mask=token_mask,
                adapter_name=adapter_name,
                on_missing=on_missing,
                progress=progress,
            )
        )
    )
    if not alone():
        add_up(reading)
    first = alone() or dist.get_rank() == 0
    plan = share_plan(attempt(lambda: plan_from(reading)) if first else None)
    return apply_plan(model, plan, adapter_name=adapter_name)


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

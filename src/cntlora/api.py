"""The one call: `initialize(model, batches)`, and its form for a Hugging Face trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from .config import InitConfig
from .data.batches import Forward, default_forward
from .data.gradients import scalar_loss
from .data.memory import MaxMemory
from .data.padding import TokenMask
from .execution.agreement import agreed, alone, attempt, in_step
from .execution.compute import complete, plan_from
from .execution.distributed import plan_together
from .execution.lockstep import absorb_together
from .execution.reading import Loss, Request, read
from .execution.sizing import sized
from .model.lora_layers import lora_layers
from .model.sharded import partitioned, recover, reshard, shards
from .model.writer import write_plan
from .model.zero3 import gathering, is_partitioned
from .plan import InitPlan
from .report import InitReport
from .trainers import check_trainer, closed, left_as_found, training_arguments


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
    weights: str | os.PathLike[str] | None = None,
) -> InitReport:
    """Initialises the LoRA factors of a model from its weights and a few batches of the fine-tuning data.

    Call it between wrapping the model and making the optimizer. `compute_plan` followed by `apply_plan`; arguments and
    errors are theirs. Where several processes run, all have to call it. Each reads its own batches; the statistics of a
    site are added up at one process, which factors it, and all take the same plan. The model may be sharded by
    `fully_shard` (FSDP2) before, where the adapter keeps its ranks (not base "offset"), or afterwards. Weights that
    DeepSpeed ZeRO-3 partitioned while loading are gathered one module at a time; `deepspeed.initialize` comes later.

    Returns:
        The report: `print` it, or keep `report.to_dict()`.

    Raises:
        RuntimeError: with several processes, if one failed or has ended; no process writes anything then.
    """
    config = config or InitConfig()
    reshard(model)
    sharded = shards(model)
    _check_before_engine(model, adapter_name)

    request = Request(
        model, batches, config, forward, loss, token_mask, adapter_name, on_missing, progress, max_memory,
        in_order=not alone(), weights=weights,
    )  # fmt: skip
    if sharded:
        call = forward or default_forward
        request.forward = _together(gathering(call) if partitioned(model) else call, config)
        request.loss = _together(loss, config) if loss else None
        request.take = absorb_together
    try:
        with closed(batches):
            found = agreed(attempt(lambda: read(request)), "the end of its data")
        plan = sized(plan_from(found) if alone() and not sharded else plan_together(found), found)
        plan = complete(plan, found)
    except BaseException:
        recover(model, sharded)
        raise
    return apply_plan(model, plan, adapter_name=adapter_name)


def apply_plan(model: nn.Module, plan: InitPlan, *, adapter_name: str = "default") -> InitReport:
    """Writes a plan into the adapter of a model: call it before the optimizer is made.

    Where the model is sharded by `fully_shard`, all processes have to call it, with the same plan.

    Raises:
        ValueError: if the plan is not for this model (names the site), the adapter is not fresh, a weight that would
            be changed is shared with another module or adapter, an optimizer or DistributedDataParallel already holds
            the parameters, or they are sharded and would change their rank; nothing is written then.
    """
    write_plan(model, plan, adapter_name)
    return InitReport.of(plan)


def _check_before_engine(model: nn.Module, adapter: str) -> None:
    """Raises ValueError if ZeRO-3 has partitioned the adapter too: its optimizer would go on with the old one."""
    for name, layer in lora_layers(model, adapter):
        if any(is_partitioned(p) for n, p in layer.named_parameters() if ".lora_" in f".{n}"):
            raise ValueError(
                f"site {name}: its adapter is partitioned by DeepSpeed ZeRO-3 already; initialise before "
                "deepspeed.initialize or accelerator.prepare (in a Trainer: before .train())"
            )


def _together(call: Forward, config: InitConfig) -> Forward:
    reads = config.method.reads
    return in_step(call, scalar_loss if reads == "gradients" else None)


def initialize_from_trainer(trainer: Any, config: InitConfig | None = None, **options: Any) -> InitReport:
    """`initialize` with the model and the training data of a `transformers.Trainer` or one made from it.

    Call it between the constructor and `.train()`: from then on the trainer's optimizer holds the parameters. TRL's
    trainers of supervised and preference data and sentence-transformers' trainer of embeddings are known: batches are
    fed as they feed them, each column of text of the latter as a batch of its own. Methods that read gradients take the
    trainer's own loss.

    Args:
        trainer: has `.model`, `.get_train_dataloader()` and no optimizer yet.
        config, options: as for `initialize`.

    Raises:
        TypeError: if it is no such trainer.
        ValueError: if the trainer has its optimizer already, or takes its own model without the adapter as a reference,
            which base "subtract" would change; else as for `initialize`.
    """
    config = config or InitConfig()
    check_trainer(trainer, config)
    with left_as_found(trainer):
        given = training_arguments(trainer, config, options.pop("forward", None), options.pop("loss", None))
        return initialize(trainer.model, config=config, **given, **options)

"""The calls: `initialize(model, batches)`, its halves `compute_plan` and `apply_plan`, and its form for a trainer."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import torch
from torch import nn

from .config import InitConfig
from .execution.arguments import Request, TrainerRequest, called_with
from .execution.choice import with_method
from .execution.distributed import choose_executor
from .execution.executor import Executor, LocalExecutor
from .execution.head import with_head
from .execution.reached import reached_sites
from .execution.reading import Statistics, read_statistics
from .execution.site_plans import plan_sites, with_followers
from .execution.step_size import with_step_size
from .messages import warn_caller
from .model.lora_layers import lora_layers
from .model.sharded import is_partitioned, is_split, recover, reshard, shards
from .model.writer import write_plan
from .plan import InitPlan
from .report import InitReport, far_cure
from .site_plan import FAR
from .trainers import check_trainer, closed, left_as_found, training_arguments
from .version import VERSION


@called_with(Request)
def initialize(request: Request) -> InitReport:
    """Initialise the LoRA factors of a model from its weights and a few batches of the fine-tuning data.

    Call it between wrapping the model and making the optimizer. It does not train. It is `compute_plan` followed by
    `apply_plan`, and raises what they raise.

    With several processes, all of them have to call it, each with its own batches. The statistics of a site are added
    up at one process, which factors it, and all processes apply the same plan. With FSDP2, call it before
    `fully_shard`, or afterwards if the ranks do not change (not base "offset", no adaptive ranks). Weights that
    DeepSpeed ZeRO-3 partitioned while loading are gathered one module at a time; call `deepspeed.initialize` later.

    Returns:
        The report: `print` it, or keep `report.to_dict()`.

    Raises:
        RuntimeError: with several processes, if one of them failed or ended; then no process writes anything.
    """
    model, adapter = request.model, request.adapter_name
    reshard(model)
    executor, sharded = choose_executor(model), shards(model)
    _check_before_engine(model, adapter)
    try:
        with closed(request.batches):
            plan = make_plan(request, executor)
    except BaseException:
        recover(model, sharded)
        raise
    return apply_plan(model, plan, adapter_name=adapter)


@called_with(Request)
def compute_plan(request: Request) -> InitPlan:
    """Compute the factors and ranks from the weights and the first `config.num_batches` batches; change nothing.

    Returns:
        The plan, for `apply_plan`; it can be saved and applied in another process.

    Raises:
        ValueError, TypeError: the message names the site or batch, what was expected, what came and what to change.
    """
    if is_split(request.model):
        raise ValueError(
            "the model's weights are split over several processes, which have to make the plan together: call "
            "initialize on all of them, or compute_plan on the model before it is sharded"
        )
    return make_plan(request, LocalExecutor())


def apply_plan(model: nn.Module, plan: InitPlan, *, adapter_name: str = "default") -> InitReport:
    """Write a plan into the adapter of a model; call it before the optimizer is made.

    If the model is sharded by `fully_shard`, all processes have to call it with the same plan.

    Args:
        model: with the adapter that the plan was made for, freshly made.
        plan: from `compute_plan` or `InitPlan.load`.
        adapter_name: of the adapter, if the model has several.

    Returns:
        The report, as of `initialize`.

    Raises:
        ValueError: if the plan is not for this model (names the site), the adapter is not fresh, a weight that would
            be changed is shared with another module or adapter, an optimizer or DistributedDataParallel already holds
            the parameters, or they are sharded and would change their rank; nothing is written then.
    """
    write_plan(model, plan, adapter_name)
    return InitReport.of(plan)


@called_with(TrainerRequest)
def initialize_from_trainer(request: TrainerRequest) -> InitReport:
    """Initialise the model of a trainer of transformers, TRL or sentence-transformers from its own training data.

    Call it between the constructor and `.train()`; later is too late: `.train()` makes an optimizer that holds the old
    parameters. It works with any subclass of `transformers.Trainer`. TRL's trainers for supervised and preference data
    and sentence-transformers' trainer are known: their batches are fed to the model as they feed them, and each text
    column of the latter counts as a batch. Methods that read gradients use the trainer's own loss.

    Returns:
        The report, as of `initialize`.

    Raises:
        TypeError: if it is not such a trainer.
        ValueError: if the trainer has its optimizer already, or takes its own model without the adapter as a reference,
            which base "subtract" would change; else as for `initialize`.
    """
    trainer, config = request.trainer, request.config or InitConfig()
    check_trainer(trainer, config)
    with left_as_found(trainer):
        given = training_arguments(trainer, config, request.forward, request.loss, request.adapter_name)
        return initialize(trainer.model, config=config, **{**request.options(), **given})


def make_plan(request: Request, executor: Executor) -> InitPlan:
    """Read the data and work out the plan of all sites; change nothing.

    Where there are several processes, all have to call it, and get the same plan.
    """
    given = request.config or InitConfig()
    with (
        with_method(request, executor) as (request, choice),
        with_head(request, executor, given) as (request, head, unfitted),
    ):
        statistics = read_statistics(request, executor)
        part = plan_from(statistics)
        plan = executor.join(part, [site.name for site in statistics.sites])
        plan = replace(with_step_size(plan, statistics), choice=choice, head=head, unfitted=unfitted)
    if statistics.tied:
        order = [name for name, _ in lora_layers(request.model, request.adapter_name)]
        plan = with_followers(plan, statistics.tied, order)
    _warn_of_far_starts(plan)
    return plan


def plan_from(statistics: Statistics) -> InitPlan:
    """Estimates, factors and ranks of the sites of this process, from what was read."""
    try:
        reached, left_plain = reached_sites(statistics)
        sites = plan_sites(reached, statistics)
    finally:
        statistics.budget.close()
    return InitPlan(
        sites=sites,
        config=statistics.config,
        skipped={**statistics.skipped, **left_plain},
        batches=statistics.facts.batches,
        seconds=time.perf_counter() - statistics.started,
        forward_seconds=statistics.seconds,
        versions={"cntlora": VERSION, "torch": torch.__version__},
        memory=asdict(statistics.budget.use),
        unreached=[name for name in statistics.unreached or () if name in sites],
    )


def _warn_of_far_starts(plan: InitPlan) -> None:
    """Warn of starts whose ‖s·B·A‖/‖W‖ is far beyond what trained adapters reach."""
    far = plan.far_starts()
    if far:
        name, size = next(iter(far.items()))
        others = f" (and {len(far) - 1} more, see the report)" if len(far) > 1 else ""
        warn_caller(
            f"site {name}{others}: ‖s·B·A‖/‖W‖ of its start is {size:.3g}, expected at most {FAR:g}; trained adapters "
            f"stay far below, and such starts train badly; {far_cure(plan.config)}"
        )


def _check_before_engine(model: nn.Module, adapter: str) -> None:
    """Raise ValueError if ZeRO-3 has partitioned the adapter too: its optimizer would go on with the old one."""
    for name, layer in lora_layers(model, adapter):
        if any(is_partitioned(p) for n, p in layer.named_parameters() if ".lora_" in f".{n}"):
            raise ValueError(
                f"site {name}: its adapter is partitioned by DeepSpeed ZeRO-3 already; initialise before "
                "deepspeed.initialize or accelerator.prepare (in a Trainer: before .train())"
            )

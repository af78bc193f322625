"""The executor: chosen once, and the only place that differs between one process and several."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.tiny import adapted, text_batches

from cntlora import InitConfig, InitPlan, compute_plan
from cntlora.api import make_plan
from cntlora.execution import distributed
from cntlora.execution.arguments import Request
from cntlora.execution.distributed import DistributedExecutor, choose_executor
from cntlora.execution.executor import LocalExecutor
from cntlora.linalg.filtered_svd import filtered_triplets

PACKAGE = Path(distributed.__file__).parents[1]


def same(one: InitPlan, other: InitPlan) -> bool:
    """Return whether two plans hold the same bits and facts."""
    facts = ("rank", "tokens", "batches", "mask", "effective_rank", "rtol", "slope")
    return one.batches == other.batches and all(
        torch.equal(one.sites[name].A, other.sites[name].A)
        and torch.equal(one.sites[name].B, other.sites[name].B)
        and all(getattr(one.sites[name], fact) == getattr(other.sites[name], fact) for fact in facts)
        for name in one.sites
    )


@pytest.mark.parametrize("method", ["self", "shift", "eva", "corda", "lora_ga", "descent", "pissa"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_group_of_one_process_makes_the_plan_of_that_process(
    method: str, adaptive: bool, process_group: None
) -> None:
    config = InitConfig(method=method, adaptive_ranks=adaptive)
    batches: Any = None if method == "pissa" else text_batches(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every process read the same batches")
        plan = make_plan(Request(adapted(), batches, config), DistributedExecutor(LocalExecutor()))
    local = compute_plan(adapted(), batches, config)
    assert list(plan.sites) == list(local.sites) and same(plan, local)
    other = compute_plan(adapted(), batches and batches[:2], InitConfig(method=method, fold_alpha=True))
    assert not same(plan, other)  # the control


def test_several_passes_are_those_of_the_local_executor(process_group: None) -> None:
    torch.set_num_threads(1)  # each thread needs room for a factorisation of its own
    batches = text_batches(3)
    executor = DistributedExecutor(LocalExecutor())
    plan = make_plan(Request(adapted(), batches, InitConfig(method="self"), max_memory=60_000), executor)
    free = compute_plan(adapted(), batches, InitConfig(method="self"))
    assert plan.memory["passes"] > 1 == free.memory["passes"] and same(plan, free)
    assert [site.tokens for site in plan.sites.values()] == [site.tokens for site in free.sites.values()]


def test_the_executor_is_chosen_by_the_group_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_executor(adapted()), LocalExecutor)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = choose_executor(adapted())
    assert isinstance(found, DistributedExecutor) and not found.sharded
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "shards", lambda model: 3)
    found = choose_executor(adapted())
    assert isinstance(found, DistributedExecutor) and found.sharded


def test_nobody_else_asks_for_other_processes() -> None:
    """Only the module that communicates and the one that reads sharded weights know torch.distributed."""
    asks = re.compile(r"torch\.distributed|\bworld_size\(|\bget_rank\(")
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if asks.search(path.read_text())}
    room = {"distributed.py", "reduction.py", "sharded_inputs.py", "processes.py"}
    assert {name for name in found if not name.startswith("lab/")} == {f"execution/{name}" for name in room} | {
        "model/sharded.py"
    }


@pytest.mark.parametrize("method", ["descent", "self", "lora_ga", "eva", "lora"])
def test_a_stack_gives_the_plan_of_single_sites(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; matrices that are large enough for the leading triplets alone."""
    base = torch.nn.Sequential(*(torch.nn.Linear(280, 280, bias=False) for _ in range(3)), torch.nn.Linear(280, 4))
    model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1", "2"], r=4))  # type: ignore[arg-type]
    batches = [torch.randn(300, 280, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    stacked: list[int] = []

    def watched(stack: Any, q: int, norm: Any) -> Any:
        stacked.append(stack.ndim)
        return filtered_triplets(stack, q, norm)

    def plan() -> InitPlan:
        config = InitConfig.from_dict({"method": method, **({"strength": 0.1} if method == "descent" else {})})
        loss = (lambda model, batch: model(batch).square().mean()) if method in ("descent", "lora_ga") else None
        return compute_plan(model, batches if method != "lora" else None, config, loss=loss)

    monkeypatch.setattr("cntlora.linalg.spectrum.filtered_triplets", watched)
    alone = plan()
    monkeypatch.setattr("cntlora.execution.executor.STACKING", ("cpu",))
    before = len(stacked)
    together = plan()
    # one stack; control: others take none
    assert stacked[before:] == ([3] if method in ("descent", "self", "lora_ga") else [])
    assert list(alone.sites) == list(together.sites)
    for name, site in alone.sites.items():
        one, other = (s.B.double() @ s.A.double() for s in (site, together.sites[name]))
        assert float((one - other).norm()) <= 1e-3 * float(site.start_norm or 1) / site.scaling
        assert site.weight_norm == together.sites[name].weight_norm

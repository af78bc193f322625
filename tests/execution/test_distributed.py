"""Two processes (gloo) end identical under DDP and accelerate; one that failed or died is an error on the others."""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.model.test_shared_factors import batches as tied_batches
from tests.model.test_shared_factors import is_one, sharing, tied
from tests.processes import connect, outcome, run
from tests.tiny import adapted, state, text_batches
from tests.versions import TIED_FACTORS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cntlora import InitConfig, apply_plan, compute_plan, initialize
from cntlora.execution import reduction, site_plans
from cntlora.execution.distributed import choose_executor
from cntlora.execution.executor import LocalExecutor
from cntlora.execution.processes import gather, raise_together, world_size
from cntlora.model.sites import find_sites

BASES = ("offset", "paired", "subtract", "keep")
SCENARIOS: dict[str, dict[str, Any]] = {
    **{base: {"base": base} for base in BASES},
    "adaptive": {"base": "offset", "adaptive_ranks": True, "rank_budget": 6},
    "paired after wrapping": {"base": "paired", "wrap_first": True},
}
TIMEOUT = 3.0


def same(model: nn.Module) -> bool:
    """Return whether both ranks hold the same bits."""
    bits = torch.cat([t.double().flatten() for t in model.state_dict().values()])
    other = [torch.zeros_like(bits), torch.zeros_like(bits)]
    dist.all_gather(other, bits)
    return torch.equal(*other)


def train(model: DistributedDataParallel, batches: list[dict[str, Tensor]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(2):
        with model.no_sync():  # gradient accumulation
            model(**batches[2 * step]).loss.backward()
        model(**batches[2 * step + 1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def half(model: nn.Module, which: int) -> Tensor:
    """The positive (0) or negative (1) halves of all factors, a copy."""
    sites = find_sites(model)[0]
    parts = [(s.A.detach().chunk(2, 0)[which], s.B.detach().chunk(2, 1)[which]) for s in sites]
    return torch.cat([part.flatten() for pair in parts for part in pair])


def scenario(rank: int, base: str, wrap_first: bool = False, **options: Any) -> dict[str, bool]:
    model, before, mine = adapted(), state(adapted()), text_batches(4, seed=rank)
    wrapped = DistributedDataParallel(model) if wrap_first else None
    initialize(wrapped or model, mine, InitConfig.from_dict({"method": "self", "base": base, **options}))
    start = same(model)
    wrapped = wrapped or DistributedDataParallel(model)
    positive, negative, decay = half(model, 0), half(model, 1), (1 - 1e-2 * 0.1) ** 2
    train(wrapped, mine)
    return {
        "same start": start,
        "same end": same(model),
        "negative half only shrinks": torch.allclose(half(model, 1), negative * decay, rtol=1e-6, atol=0),
        "positive half trains": not torch.equal(half(model, 0), positive * decay),
        "base untouched": all(torch.equal(before[n], t) for n, t in model.state_dict().items() if "lora_" not in n),
    }


def job_ddp(rank: int, world: int, folder: Path) -> Any:
    connect(rank, world, folder)
    results: dict[str, Any] = {name: scenario(rank, **options) for name, options in SCENARIOS.items()}
    mine = text_batches(4, seed=rank)
    model = adapted()  # the control: a plan of its own on every rank
    apply_plan(model, compute_plan(model, mine, config=InitConfig(method="self")))
    results["own plans"] = {"same start": same(model)}
    if rank == 0:  # compute_plan is the work of one process, also where the loss finds the size
        results["one rank"] = dict(compute_plan(adapted(), mine, InitConfig(method="descent")).step)
    results["offset after wrapping"] = outcome(
        lambda: initialize(DistributedDataParallel(adapted()), mine, config=InitConfig(method="self"))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        initialize(adapted(), text_batches(2, seed=0), config=InitConfig(method="self"))
        results["equal data"] = [str(w.message) for w in caught]
        caught.clear()
        initialize(adapted(), mine, config=InitConfig(method="self"))
        results["other data"] = [str(w.message) for w in caught]
    return results


def job_failures(rank: int, world: int, folder: Path) -> Any:
    """Let something go wrong on the second rank: its data, its factors."""
    connect(rank, world, folder)
    failing = text_batches(1, seed=rank)
    if rank == 1:
        failing[0]["attention_mask"].zero_()
    original = site_plans._plan_site

    def broken(*_: Any) -> Any:
        raise ArithmeticError("no factors")

    results = {}
    for name, batches in (("data", failing), ("factors", text_batches(1, seed=rank))):
        site_plans._plan_site = broken if name == "factors" and rank == 1 else original
        model, before = adapted(), state(adapted())
        results[name] = outcome(lambda m=model, b=batches: initialize(m, b, config=InitConfig(method="self")))
        results[name]["unchanged"] = all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    return results


def dying(rank: int, world: int, folder: Path, where: str, end: Any) -> Any:
    """The second rank ends in the middle; what the first is told, and how it is left."""
    connect(rank, world, folder, seconds=TIMEOUT)
    original = site_plans._plan_site
    if rank == 1 and where == "factors":
        site_plans._plan_site = lambda *rest: end()

    def batches() -> Any:
        yield from text_batches(1, seed=rank)
        if rank == 1 and where == "data":
            end()
        yield from text_batches(1, seed=rank + 2)

    model, before = adapted(), state(adapted())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    try:
        found = outcome(lambda: initialize(model, batches(), config=InitConfig(method="self")))
    finally:
        site_plans._plan_site = original
    found["unchanged"] = all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    found["hooks"] = hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    return found


def job_exit_in_data(rank: int, world: int, folder: Path) -> Any:
    return dying(rank, world, folder, "data", lambda: os._exit(1))


def job_killed_in_factors(rank: int, world: int, folder: Path) -> Any:
    return dying(rank, world, folder, "factors", lambda: os.kill(os.getpid(), signal.SIGKILL))


def job_stopped_in_factors(rank: int, world: int, folder: Path) -> Any:
    """Hang for longer than the timeout, which alone can tell."""
    if rank == 0:
        return dying(rank, world, folder, "factors", None)
    return dying(rank, world, folder, "factors", lambda: time.sleep(TIMEOUT + 3) or os._exit(1))


def job_accelerate(rank: int, world: int, folder: Path) -> Any:
    """Start as `accelerate launch` starts processes: by the environment."""
    from accelerate import Accelerator

    port_file = folder / "port"
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (folder / "port.new").write_text(str(free.getsockname()[1]))
        (folder / "port.new").rename(port_file)
    while not port_file.exists():
        time.sleep(0.01)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({key: str(value) for key, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port_file.read_text(), ACCELERATE_USE_CPU="true")
    accelerator = Accelerator(cpu=True)
    rows = [{key: value[i] for key, value in batch.items()} for batch in text_batches(4, seed=0) for i in range(8)]
    results: dict[str, Any] = {"processes": accelerator.num_processes, "world": world_size()}
    for name, base in (("initialise, then prepare", "offset"), ("prepare, then initialise", "paired")):
        model, loader = adapted(), accelerator.prepare(DataLoader(rows, batch_size=4))
        prepared = accelerator.prepare(model) if base == "paired" else None
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the loader is shared out: nothing to warn of
            report = initialize(prepared or model, loader, InitConfig(method="self", base=base, num_batches=3))
        start, prepared = same(model), prepared or accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2))
        for batch in loader:
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        wrapped = isinstance(prepared, DistributedDataParallel)
        results[name] = {"start": start, "end": same(model), "batches": report.batches, "wrapped": wrapped}
    return results


def job_shared(rank: int, world: int, folder: Path) -> Any:
    """Two layers with one set of factors: a tied head that DDP trains, layers of one set, and layers of their own."""
    connect(rank, world, folder)
    results: dict[str, Any] = {}
    mine = tied_batches(4)[2 * rank : 2 * rank + 2]
    for name, options in {
        "tied": {"method": "self", "base": "offset"},
        "tied, paired": {"method": "self", "base": "paired"},
        "tied, adaptive": {"method": "pissa", "base": "keep", "adaptive_ranks": True, "rank_budget": 6},
    }.items():
        model = tied("llama")
        report = initialize(model, mine, InitConfig.from_dict(options))
        start = same(model)
        train(DistributedDataParallel(model, find_unused_parameters=True), mine * 2)
        results[name] = {"shared": dict(report.shared), "start": start, "end": same(model), "one": is_one(model)}
    data = [torch.randn(20, 12, generator=torch.Generator().manual_seed(rank))]
    for name, slots in {"layers": ("lora_A", "lora_B"), "of their own": ()}.items():
        model = sharing(slots=slots)
        report = initialize(model, data, InitConfig(method="self"))
        first, second = (site for site in find_sites(model)[0] if site.name != "last")
        one = first.A is second.A and first.B is second.B
        results[name] = {"shared": dict(report.shared), "start": same(model), "end": same(model), "one": one}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    names = ["ddp", "failures", "exit_in_data", "killed_in_factors", "stopped_in_factors", "accelerate", "shared"]
    return run(__file__, tmp_path_factory.mktemp("gloo"), {f"job_{name}": 2 for name in names})


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_start_and_end_identical(results: Any, name: str) -> None:
    for rank in results["job_ddp"]:
        assert rank[name]["same start"] and rank[name]["same end"] and rank[name]["positive half trains"]
        assert rank[name]["base untouched"] or name == "subtract"


def test_plans_of_their_own_differ(results: Any) -> None:
    """The control: the ranks see other data, and without sharing they would start apart."""
    assert not any(rank["own plans"]["same start"] for rank in results["job_ddp"])


def test_a_plan_is_computed_without_the_other_processes(results: Any) -> None:
    zero, one = results["job_ddp"]
    assert zero["one rank"]["batches"] == 4 and zero["one rank"]["trials"] > 0 and "one rank" not in one


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_negative_half_is_masked_under_ddp(results: Any, name: str) -> None:
    for rank in results["job_ddp"]:
        assert rank[name]["negative half only shrinks"] == (name in ("offset", "adaptive"))


def test_a_loader_that_is_not_sharded_is_noticed(results: Any) -> None:
    for rank in results["job_ddp"]:
        assert any("every process read the same batches" in text for text in rank["equal data"])
        assert not any("every process" in text for text in rank["other data"])


def test_the_same_batches_may_be_rounded_in_another_way() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    one = [reduction.size_of(x.mT @ x)]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert reduction.equal_sizes(one, [reduction.size_of((x * (1 + 1e-7))[order].mT @ x[order])])
    assert not reduction.equal_sizes(one, [reduction.size_of(x[1:].mT @ x[1:])])  # the control: a row less
    assert not reduction.equal_sizes(one, [])


def test_parameters_that_ddp_holds_are_not_replaced(results: Any) -> None:
    for rank in results["job_ddp"]:
        assert "initialise first, then wrap" in rank["offset after wrapping"]["message"]


@pytest.mark.parametrize(
    ("where", "own"),
    [("data", "ValueError: batch 0: its mask (8, 8) hides every token"), ("factors", "ArithmeticError: no factors")],
)
def test_a_failure_on_one_rank_is_an_error_on_all(results: Any, where: str, own: str) -> None:
    zero, one = (rank[where] for rank in results["job_failures"])
    assert one["message"].startswith(own)
    assert zero["message"] == f"RuntimeError: rank 1 failed, so that no rank goes on: {one['message']}"
    assert zero["unchanged"] and one["unchanged"]


@pytest.mark.parametrize("job", ["exit_in_data", "killed_in_factors", "stopped_in_factors"])
def test_a_process_that_dies_or_hangs_is_an_error_on_the_other(results: Any, job: str) -> None:
    """Within the timeout of the process group; only one that hangs takes as long as that."""
    found, lost = results[f"job_{job}"]
    assert lost == "ended without a word"
    assert found["message"].startswith("RuntimeError: another process has ended, or has not answered")
    assert "RuntimeError" in found["cause"] or "Dist" in found["cause"]
    assert found["unchanged"] and found["hooks"]
    assert found["seconds"] < TIMEOUT + 4 and (job != "stopped_in_factors" or found["seconds"] > TIMEOUT - 1)


@pytest.mark.parametrize("name", ["initialise, then prepare", "prepare, then initialise"])
def test_accelerate(results: Any, name: str) -> None:
    for rank in results["job_accelerate"]:
        assert (rank["processes"], rank["world"]) == (2, 2)
        assert rank[name] == {"start": True, "end": True, "batches": 6, "wrapped": True}


@TIED_FACTORS
@pytest.mark.parametrize("name", ["tied", "tied, paired", "tied, adaptive", "layers"])
def test_layers_that_share_one_set_of_factors(results: Any, name: str) -> None:
    for rank in results["job_shared"]:
        assert rank[name]["shared"] and rank[name]["one"] and rank[name]["start"] and rank[name]["end"]


@TIED_FACTORS
def test_layers_with_factors_of_their_own_stay_apart(results: Any) -> None:
    """The control."""
    for rank in results["job_shared"]:
        assert not rank["of their own"]["shared"] and not rank["of their own"]["one"]


def test_one_process_is_left_alone(process_group: None) -> None:
    assert isinstance(choose_executor(adapted()), LocalExecutor) and gather(5) == [5] == [raise_together(5, "here")]
    with pytest.raises(KeyError):
        raise_together(KeyError("x"))
    assert dist.get_world_size() == 1

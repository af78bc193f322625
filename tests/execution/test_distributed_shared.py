"""Two and four processes share the sites out, and end with the plan that one process makes of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import connect, run
from tests.tiny import adapted, text_batches
from torch import Tensor, nn

from cntlora import InitConfig, api, compute_plan, initialize
from cntlora.execution import site_plans
from cntlora.execution.distributed import distribute, linked_names
from cntlora.execution.step_size import TRIED
from cntlora.model.sites import find_sites

METHODS = (
    "cross",
    "self",
    "shift",
    "eva",
    "corda",
    "lora_ga",
    "lora_one",
    "lora_da",
    "gora",
    "pissa",
    "descent",
    "whitened",
)
UNSEEN = "bert.encoder.layer.1.attention.self.value"
Batch = dict[str, Any]


def own_batches(rank: int) -> list[Batch]:
    """Other data on every rank, on odd ranks one batch fewer; rank 0 runs the first layer alone."""
    batches: list[Batch] = [dict(batch) for batch in text_batches(3 - rank % 2, seed=rank)]
    return [{**batch, "all": rank > 0} for batch in batches]


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model, or its first layer where the batch says so."""
    rest = {key: value for key, value in batch.items() if key != "all"}
    if batch["all"]:
        return model(**rest)
    bert: Any = model.base_model.model.bert
    return bert.encoder.layer[0](bert.embeddings(rest["input_ids"]))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    output = forward(model, batch)
    if batch["all"]:
        return output.loss
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def call(method: str) -> dict[str, Any]:
    return (
        {"loss": loss}
        if method in ("lora_ga", "lora_one", "lora_da", "gora", "descent", "whitened")
        else {"forward": forward}
    )


def products(plan: Any) -> dict[str, Tensor]:
    """B·A of every site, or A where B is zero."""
    return {n: site.B @ site.A if site.B.any() else site.A for n, site in plan.sites.items()}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference of two sites; infinite where they are not alike."""
    if any(left[n].shape != right[n].shape for n in left):
        return float("inf")
    return max(float((left[n] - right[n]).norm() / right[n].norm()) for n in left)


def same_everywhere(model: nn.Module, report: Any) -> bool:
    """Return whether all ranks hold the same bits and say the same."""
    bits = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (bits, report.to_dict()))
    return all(other == everyone[0] for other in everyone)


def compared(method: str, rank: int, world: int, adaptive: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"rtol": 1e-6} if method in ("cross", "self", "shift") else {}
    own |= {"strength": 0.1} if method == "descent" else {}  # its search looks at the first batches of each process
    config = InitConfig.from_dict(
        {"method": method, "base": "keep", "num_batches": 3 * world, "adaptive_ranks": adaptive, **own}
    )
    everything = [batch for other in range(world) for batch in own_batches(other)]
    batches: Any = None if method == "pissa" else own_batches(rank)
    model, made, original = adapted(dtype=torch.float64), [], site_plans._plan_site

    def counted(site: Any, *rest: Any) -> Any:
        made.append(site.name)
        return original(site, *rest)

    site_plans._plan_site = counted
    try:
        report = initialize(model, batches, config, **call(method))
    finally:
        site_plans._plan_site = original
    single = compute_plan(adapted(dtype=torch.float64), everything, config, **call(method))
    all_but_one = compute_plan(adapted(dtype=torch.float64), everything[:-1], config, **call(method))
    together = {s.name: s.B.detach() @ s.A.detach() if s.B.any() else s.A.detach() for s in find_sites(model)[0]}
    names = [n for n in single.sites if single.sites[n].rank]
    facts = ("rank", "tokens", "batches", "effective_rank", "masked", "rtol")
    return {
        "difference": distance({n: together[n] for n in names}, products(single)),
        "control": distance(products(all_but_one), products(single)),
        "same": same_everywhere(model, report),
        "facts": all(report.sites[n][f] == getattr(single.sites[n], f) for n in single.sites for f in facts),
        "order": list(report.sites) == list(single.sites),
        "batches": report.batches == single.batches,
        "made": made,
        "sites": list(single.sites),
    }


def job_methods(rank: int, world: int, folder: Path) -> Any:
    connect(rank, world, folder)
    return {f"{m}-{adaptive}": compared(m, rank, world, adaptive) for m in METHODS for adaptive in (False, True)}


def job_four(rank: int, world: int, folder: Path) -> Any:
    """Do as `job_methods`, and with a model of one site: three processes have nothing to factor."""
    results = job_methods(rank, world, folder)
    model = adapted(target_modules=["layer.0.attention.self.query"])
    report = initialize(model, own_batches(rank), InitConfig(method="self"), forward=forward)
    return {**results, "one site": {"same": same_everywhere(model, report), "sites": len(report.sites)}}


def job_step(rank: int, world: int, folder: Path) -> Any:
    """The size of descent's step is found by all together, on equally many batches of each."""
    connect(rank, world, folder)
    model = adapted()
    report = initialize(model, own_batches(rank), InitConfig(method="descent"), loss=loss)
    return {"same": same_everywhere(model, report), "step": dict(report.step), "batches": len(own_batches(rank))}


def job_choice(rank: int, world: int, folder: Path) -> Any:
    """The method is left open, and one process has a batch without labels."""
    connect(rank, world, folder)
    model = adapted()
    mixed = [{k: v for k, v in b.items() if rank == 0 or k != "labels"} for b in text_batches(2, seed=rank)]
    report = initialize(model, mixed, InitConfig(method=None))
    labelled = initialize(adapted(), text_batches(2, seed=rank), InitConfig(method=None))
    names = [found.config.chosen.name for found in (report, labelled)]
    return {"same": same_everywhere(model, report), "methods": names, "choice": report.choice}


def job_traffic(rank: int, world: int, folder: Path) -> Any:
    """Sizes of the sums that are sent, and the names whose sums this process keeps."""
    connect(rank, world, folder)
    sent: list[int] = []
    kept: list[list[str]] = []
    reduce, plan_from = dist.reduce, api.plan_from

    def counted(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, **options)

    def seen(statistics: Any) -> Any:
        kept.extend(names for names, _ in statistics.estimator.accumulated[0].groups())
        return plan_from(statistics)

    dist.reduce, api.plan_from = counted, seen
    try:
        initialize(adapted(), text_batches(2, seed=rank), InitConfig(method="self", base="keep"))
    finally:
        dist.reduce, api.plan_from = reduce, plan_from
    return {"sent": sent, "kept": kept}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("shared")
    return run(__file__, folder, {"job_methods": 2, "job_four": 4, "job_traffic": 2, "job_step": 2, "job_choice": 2})


@pytest.mark.parametrize("job", ["job_methods", "job_four"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_together_they_know_what_one_process_would(results: Any, job: str, method: str, adaptive: bool) -> None:
    """With uneven batches, and a site that the first rank never sees. One batch fewer is the control."""
    for rank in results[job]:
        found = rank[f"{method}-{adaptive}"]
        assert found["same"] and found["facts"] and found["order"]
        assert found["difference"] < 1e-8
        assert found["control"] > 1e-3 or method == "pissa"
        assert found["batches"] or method == "pissa"


@pytest.mark.parametrize("job", ["job_methods", "job_four"])
def test_each_site_is_factored_once(results: Any, job: str) -> None:
    for method in METHODS:
        parts = [rank[f"{method}-False"]["made"] for rank in results[job]]
        assert sorted(name for part in parts for name in part) == sorted(results[job][0][f"{method}-False"]["sites"])
        assert sum(bool(part) for part in parts) >= 2


def test_the_size_of_a_step_is_found_together(results: Any) -> None:
    fewest = min(rank["batches"] for rank in results["job_step"])
    for rank in results["job_step"]:
        assert rank["same"] and rank["step"] == results["job_step"][0]["step"]
        assert rank["step"]["loss_after"] < rank["step"]["loss_before"]
        assert rank["step"]["batches"] == 2 * min(fewest, TRIED)


def test_more_processes_than_sites(results: Any) -> None:
    assert [rank["one site"] for rank in results["job_four"]] == [{"same": True, "sites": 1}] * 4


def test_a_sum_travels_once_to_its_owner(results: Any) -> None:
    """Two inputs of two sites each, 24 wide; each of the two processes keeps one sum."""
    for rank in results["job_traffic"]:
        assert rank["sent"] == [24 * 24] * 2
        assert len(rank["kept"]) == 1
    assert results["job_traffic"][0]["kept"] != results["job_traffic"][1]["kept"]


def test_dealing_balances_and_keeps_groups_together() -> None:
    costs = {"a": 8.0, "b": 4.0, "c": 1.0, "d": 5.0, "e": 3.0}
    owners = distribute([["a"], ["b", "c"], ["d"], ["e"]], costs, 2)
    assert owners == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 0}
    first = distribute([["a"], ["b", "c"]], costs, 2)
    assert distribute([["e"], ["d"], ["b", "c"], ["a"]], costs, 2)["b"] == first["c"]
    assert set(distribute([["a"], ["b"]], costs, 4).values()) == {0, 1}


def test_what_any_sum_links_is_one_group() -> None:
    assert linked_names(list("abcde"), ["ab", "cd", "bc"]) == [["a", "b", "c", "d"], ["e"]]
    assert linked_names(list("abc"), []) == [["a"], ["b"], ["c"]]


def test_all_processes_choose_the_same_method(results: dict[str, list[Any]]) -> None:
    """Descent where all have a loss (the control), else self, everywhere and for the same reason."""
    for found in results["job_choice"]:
        assert found["methods"] == ["self", "whitened"] and found["same"]
        assert found["choice"] == "the model gives no loss for the batches"

"""Two processes (gloo) add up what each has read and end identical; none waits for one that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cntlora.distributed import share_plan

WORKER = """
import json, sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import cntlora
from cntlora import InitConfig
from cntlora.sites import find_sites
from tests.tiny import adapted, state, text_batches

warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
MINE = text_batches(4, seed=rank)  # every rank sees other data
results = {}

def same(model):
    "Whether both ranks hold the same bits."
    bits = torch.cat([t.double().flatten() for t in model.state_dict().values()])
    other = [torch.zeros_like(bits), torch.zeros_like(bits)]
    dist.all_gather(other, bits)
    return torch.equal(*other)

def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(2):
        with model.no_sync():  # gradient accumulation
            model(**MINE[2 * step]).loss.backward()
        model(**MINE[2 * step + 1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

def halves(model, negative):
    parts = []
    for site in find_sites(model)[0]:
        h = site.A.shape[0] // 2
        part = slice(h, None) if negative else slice(0, h)
        parts += [site.A.detach()[part].flatten().clone(), site.B.detach()[:, part].flatten().clone()]
    return torch.cat(parts)

def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

def scenario(name, base, wrap_first=False, **options):
    model, before = adapted(), state(adapted())
    wrapped = DistributedDataParallel(model) if wrap_first else None
    cntlora.initialize(wrapped or model, MINE, InitConfig(base=base, **options))
    start = same(model)
    wrapped = wrapped or DistributedDataParallel(model)
    negative, positive = halves(model, True), halves(model, False)
    train(wrapped)
    shrunk = negative * (1 - 1e-2 * 0.1) ** 2
    results[name] = {
        "same start": start,
        "same end": same(model),
        "negative half only shrinks": torch.allclose(halves(model, True), shrunk, rtol=1e-6, atol=0),
        "positive half trains": not torch.equal(halves(model, False), positive * (1 - 1e-2 * 0.1) ** 2),
        "base untouched": all(torch.equal(before[n], t) for n, t in model.state_dict().items() if "lora_" not in n),
    }

for base in ("offset", "paired", "subtract", "keep"):
    scenario(base, base)
scenario("adaptive", "offset", adaptive_ranks=True, rank_budget=6)
scenario("paired after wrapping", "paired", wrap_first=True)

model = adapted()  # the control: a plan of its own on every rank
cntlora.apply_plan(model, cntlora.compute_plan(model, MINE))
results["own plans"] = {"same start": same(model)}

EVERYTHING = text_batches(4, seed=0) + text_batches(4, seed=1)[:3]
UNEVEN = text_batches(4, seed=rank)[: 4 - rank]  # one rank has fewer batches than the other

def difference(method, **options):
    "Largest relative difference of B·A between this initialisation and one process that reads all batches."
    tolerance = dict(rtol=1e-6) if method in ("cross", "self", "shift") else {}
    config = dict(base="keep", num_batches=7, method=method, **tolerance, **options)
    together, single = adapted(dtype=torch.float64), adapted(dtype=torch.float64)
    report = cntlora.initialize(together, UNEVEN, InitConfig(**config))
    plan = cntlora.compute_plan(single, EVERYTHING, InitConfig(**config))
    own = cntlora.compute_plan(adapted(dtype=torch.float64), UNEVEN, InitConfig(**config))
    worst, control = 0.0, 0.0
    for site in find_sites(together)[0]:
        one, all_of_it = plan.sites[site.name], (site.B @ site.A if site.B.any() else site.A)
        whole = one.B @ one.A if one.B.any() else one.A
        mine = own.sites[site.name].B @ own.sites[site.name].A if one.B.any() else own.sites[site.name].A
        worst = max(worst, float((all_of_it - whole).norm() / whole.norm()))
        control = max(control, float((mine - whole).norm() / whole.norm()))
        assert report.sites[site.name]["tokens"] == one.tokens and report.batches == 7
        assert report.sites[site.name]["batches"] == 7
        assert report.sites[site.name]["effective_rank"] == one.effective_rank
    return {"difference": worst, "control": control}

for method in ("cross", "self", "shift", "eva", "corda", "lora_ga", "lora_one"):
    results[method] = difference(method)

def routed(model, batch):
    "Rank 0 never calls the second layer's value."
    if rank == 1:
        return model(**batch)
    return model.base_model.model.bert.encoder.layer[0].attention.self.query(torch.randn(5, 24))

model = adapted()
starved = "bert.encoder.layer.1.attention.self.value"
report = cntlora.initialize(model, text_batches(2, seed=rank), InitConfig(base="keep"), forward=routed)
plan = cntlora.compute_plan(adapted(), text_batches(2, seed=1), InitConfig(base="keep"))
results["starved on one rank"] = {
    "same": same(model),
    "batches": report.sites[starved]["batches"],
    "as rank 1 alone": torch.allclose(
        dict((s.name, s) for s in find_sites(model)[0])[starved].A, plan.sites[starved].A, rtol=1e-4, atol=1e-5
    ),
}

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cntlora.initialize(adapted(), text_batches(2, seed=0))
    equal = [str(w.message) for w in caught]
    caught.clear()
    cntlora.initialize(adapted(), MINE)
    results["equal data"] = {"said": equal, "control": [str(w.message) for w in caught]}

model, before = adapted(), state(adapted())
failing = text_batches(1, seed=rank)
if rank == 1:
    failing[0]["attention_mask"].zero_()
results["failure"] = {
    "message": message(lambda: cntlora.initialize(model, failing)),
    "unchanged": all(torch.equal(before[n], t) for n, t in model.state_dict().items()),
}
wrapped = DistributedDataParallel(model)
results["offset after wrapping"] = {"message": message(lambda: cntlora.initialize(wrapped, MINE))}
(folder / f"{rank}.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
"""

Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the two processes report, by rank."""
    import json

    folder = tmp_path_factory.mktemp("gloo")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(rank), str(folder)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


SCENARIOS = ["offset", "paired", "subtract", "keep", "adaptive", "paired after wrapping"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_start_and_end_identical(results: Results, name: str) -> None:
    for rank in results:
        assert rank[name]["same start"] and rank[name]["same end"] and rank[name]["positive half trains"]
        assert rank[name]["base untouched"] or name == "subtract"


def test_plans_of_their_own_differ(results: Results) -> None:
    """The control: the ranks see other data, and without sharing they would start apart."""
    assert not any(rank["own plans"]["same start"] for rank in results)


@pytest.mark.parametrize("method", ["cross", "self", "shift", "eva", "corda", "lora_ga", "lora_one"])
def test_together_they_know_what_one_process_would(results: Results, method: str) -> None:
    """With other batches on each rank, and one batch fewer on the second; what a rank alone reads is the control."""
    for rank in results:
        assert rank[method]["difference"] < 1e-5 < 1e-2 < rank[method]["control"]


def test_a_site_that_one_rank_never_sees_is_initialised_by_the_other(results: Results) -> None:
    for rank in results:
        assert rank["starved on one rank"] == {"same": True, "batches": 2, "as rank 1 alone": True}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_negative_half_is_masked_under_ddp(results: Results, name: str) -> None:
    for rank in results:
        assert rank[name]["negative half only shrinks"] == (name in ("offset", "adaptive"))


def test_a_loader_that_is_not_sharded_is_noticed(results: Results) -> None:
    for rank in results:
        assert any("every process read the same batches" in text for text in rank["equal data"]["said"])
        assert not any("every process" in text for text in rank["equal data"]["control"])


def test_a_failure_on_one_rank_is_an_error_on_all(results: Results) -> None:
    zero, one = (rank["failure"]["message"] for rank in results)
    assert one.startswith("ValueError: batch 0: its mask") and "hides every token" in one
    assert zero.startswith("RuntimeError: the initialisation failed on another rank") and "rank 1: batch 0" in zero
    assert all(rank["failure"]["unchanged"] for rank in results)


def test_parameters_that_ddp_holds_are_not_replaced(results: Results) -> None:
    for rank in results:
        assert "initialise first, then wrap" in rank["offset after wrapping"]["message"]


def test_one_process_is_left_alone(process_group: None) -> None:
    marker: Any = object()
    assert share_plan(marker) is marker
    with pytest.raises(KeyError):
        share_plan(KeyError("x"))
    assert torch.distributed.get_world_size() == 1

"""Models whose weights `fully_shard` (FSDP2) has split over two processes are initialised as whole ones are."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fsdp_cases import (
    READ_NOTHING,
    alone,
    batches,
    config_of,
    distance,
    factors,
    loss_of,
    model_of,
    shard,
    whole,
)
from tests.processes import connect, run
from tests.versions import FSDP_ON_CPU
from torch import Tensor

from cntlora import initialize
from cntlora.execution import distributed
from cntlora.model import layouts, sharded
from cntlora.model.sites import find_sites

pytestmark = FSDP_ON_CPU

METHODS = (
    "cross",
    "self",
    "shift",
    "descent",
    "whitened",
    "eva",
    "corda",
    "lora_ga",
    "lora_da",
    "gora",
    "pissa",
    "lora",
)
VARIANTS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "paired": {"base": "paired"},
    "subtract": {"base": "subtract"},
    "keep dora": {"use_dora": True},
    "subtract dora": {"base": "subtract", "use_dora": True},
    "gpt2": {"kind": "gpt2"},
    "all at once": {"at_once": True},
}


def compared(rank: int, world: int, method: str = "self", base: str = "keep", **options: Any) -> dict[str, Any]:
    at_once = options.pop("at_once", False)
    model = shard(model_of(**options), at_once)
    before = whole(model)
    with LiveWeights() as live:
        initialize(model, None if method in READ_NOTHING else batches(rank), config_of(method, base))
    after, loss = whole(model), loss_of(model)
    weights = [n for n in after if "lora_" not in n]
    sharded.reshard(model)
    held = [p for site in find_sites(model)[0] for p in (site.A, site.B, site.base.weight)]
    found = {
        "untouched": all(torch.equal(after[n], before[n]) for n in weights),
        "sharded": all(map(sharded.is_sharded, held)),
        "live": live.most,
        "gathered": live.count,
    }
    if rank > 0:  # what follows is the same on every rank
        return found
    reference, other = (alone(n, method, base, **options) for n in (world, world - 1))
    wanted = dict(reference.named_parameters())
    return {
        **found,
        "difference": distance(factors(after), factors(wanted)),
        "control": distance(factors(dict(other.named_parameters())), factors(wanted)),
        "weights": distance({n: after[n] for n in weights}, {n: wanted[n].detach() for n in weights}),
        "loss": abs(loss - loss_of(reference)),
    }


class LiveWeights:
    """Counts the gathered values that are alive at once in this process."""

    PLACES = ((distributed, "full_at"), (distributed, "full"), (layouts, "full"))

    def __init__(self) -> None:
        self.alive = self.most = self.count = 0

    def __enter__(self) -> LiveWeights:
        self.originals = [getattr(module, name) for module, name in self.PLACES]
        for (module, name), original in zip(self.PLACES, self.originals, strict=True):
            setattr(module, name, self.counting(original))
        return self

    def __exit__(self, *_: object) -> None:
        for (module, name), original in zip(self.PLACES, self.originals, strict=True):
            setattr(module, name, original)

    def counting(self, original: Any) -> Any:
        def gathering(tensor: Tensor, *rest: Any) -> Any:
            found = original(tensor, *rest)
            if found is None or not sharded.is_sharded(tensor):
                return found
            found = found.clone()  # an object of its own, which dies with its last use
            weakref.finalize(found, self.freed)
            self.count, self.alive = self.count + 1, self.alive + 1
            self.most = max(self.most, self.alive)
            return found

        return gathering

    def freed(self) -> None:
        self.alive -= 1


def job_methods(rank: int, world: int, folder: Path) -> Any:
    connect(rank, world, folder)
    gc.disable()  # so that what is freed is freed because nothing holds it
    return {name: compared(rank, world, **options) for name, options in VARIANTS.items()}


def job_passes(rank: int, world: int, folder: Path) -> Any:
    """Read with little memory: the batches are read several times, by all processes alike."""
    connect(rank, world, folder)
    results = {}
    for method in ("self", "shift"):
        found = []
        for limit in (None, 110_000):
            model, config = shard(model_of()), config_of(method)
            report = initialize(model, batches(rank), config, max_memory=limit)
            found.append((factors(whole(model)), report.to_dict()["memory"]["passes"]))
        (free, one), (bounded, several) = found
        results[method] = {"passes": [one, several], "difference": distance(bounded, free)}
    return results


def job_step(rank: int, world: int, folder: Path) -> Any:
    """The search of descent, whose trials gather the weights in step."""
    connect(rank, world, folder)
    model = shard(model_of())
    report = initialize(model, batches(rank), config_of("descent", strength=None))
    sharded.reshard(model)
    return dict(report.step)


def job_count(rank: int, world: int, folder: Path) -> Any:
    """The control of the count: what is held is counted."""
    connect(rank, world, folder)
    sites = find_sites(shard(model_of()))[0]
    with LiveWeights() as live:
        held = [layouts.weight_matrix(site.base) for site in sites[:3]]
        del held[0]
        held.append(layouts.weight_matrix(sites[3].base))
    return {"live": live.most, "count": live.count}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs = ("job_methods", "job_passes", "job_count", "job_step")
    return run(__file__, tmp_path_factory.mktemp("fsdp"), dict.fromkeys(jobs, 2))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sharded_model_gets_what_a_whole_one_gets(results: Any, name: str) -> None:
    """The control: what half of the batches give."""
    found = results["job_methods"][0][name]
    assert found["difference"] < 1e-8 and found["weights"] < 1e-12 and found["loss"] < 1e-6
    assert found["control"] > 1e-3 or name in READ_NOTHING
    for rank in results["job_methods"]:
        assert rank[name]["untouched"] == (not name.startswith("subtract")) and rank[name]["sharded"]


@pytest.mark.parametrize("name", VARIANTS)
def test_no_process_holds_two_whole_weights(results: Any, name: str) -> None:
    """Eight sites: one half of them for its own factors, all to check the plan; shift needs some in the data pass."""
    for rank in results["job_methods"]:
        assert rank[name]["live"] == 1
        assert rank[name]["gathered"] >= 12 or name == "gpt2"
    assert [rank["live"] for rank in results["job_count"]] == [3, 3]  # the control


def test_the_size_of_a_step_is_found_on_a_sharded_model(results: Any) -> None:
    one, other = results["job_step"]
    assert one == other and one["loss_after"] < one["loss_before"] and one["batches"] == 4


@pytest.mark.parametrize("method", ["self", "shift"])
def test_several_passes_over_the_batches(results: Any, method: str) -> None:
    for rank in results["job_passes"]:
        one, several = rank[method]["passes"]
        assert one == 1 < several and rank[method]["difference"] < 1e-10


def test_shift_mode_gathers_only_what_cannot_share(results: Any) -> None:
    """Of eight sites the four with fewer outputs than inputs, in each of two batches, and half to judge the weights."""
    others, shift = (results["job_methods"][0][name]["gathered"] for name in ("self", "shift"))
    assert shift - others == 4 + 2 * 4


@pytest.mark.parametrize("method", ["self", "shift", "lora_ga"])
def test_one_process_may_shard_too(process_group: None, method: str) -> None:
    model = shard(model_of())
    initialize(model, batches(0), config_of(method))
    wanted = model_of()
    initialize(wanted, batches(0), config_of(method))
    assert distance(factors(whole(model)), factors(dict(wanted.named_parameters()))) < 1e-8

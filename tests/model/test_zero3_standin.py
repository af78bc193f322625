"""Weights partitioned as DeepSpeed ZeRO-3 does it, by a stand-in of its interface, for machines without DeepSpeed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from tests import processes
from tests.tiny import base_model, causal_batches, lora_config
from torch import Tensor, nn

from cntlora import InitConfig, compute_plan, initialize
from cntlora.model.sites import find_sites

METHODS = ("self", "cross", "shift", "eva", "pissa")
AVAILABLE, NOT_AVAILABLE = SimpleNamespace(name="AVAILABLE"), SimpleNamespace(name="NOT_AVAILABLE")


def partition(parameter: Any) -> None:
    """Leave this process its part of a parameter, as `deepspeed.zero.Init` does."""
    values = parameter.detach().flatten()
    size = -(-values.numel() // dist.get_world_size())
    padded = torch.cat([values, values.new_zeros(size * dist.get_world_size() - values.numel())])
    parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
    parameter.ds_tensor = padded[dist.get_rank() * size :][:size].clone()
    parameter.ds_status = NOT_AVAILABLE
    parameter.data = values.new_empty(0)


class GatheredParameters:
    """Context in which the parameters are whole; `most` is the largest number of values that were at once."""

    held = most = 0

    def __init__(self, parameters: list[Any]) -> None:
        self.absent = [p for p in parameters if p.ds_status is NOT_AVAILABLE]

    def __enter__(self) -> None:
        for p in self.absent:
            parts = [torch.empty_like(p.ds_tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, p.ds_tensor)
            p.data, p.ds_status = torch.cat(parts)[: p.ds_shape.numel()].reshape(p.ds_shape), AVAILABLE
        GatheredParameters.held += sum(p.numel() for p in self.absent)
        GatheredParameters.most = max(GatheredParameters.most, GatheredParameters.held)

    def __exit__(self, *_: object) -> None:
        GatheredParameters.held -= sum(p.numel() for p in self.absent)
        for p in self.absent:
            p.data, p.ds_status = p.data.new_empty(0), NOT_AVAILABLE


def whole_model() -> nn.Module:
    return get_peft_model(base_model("llama"), lora_config("llama"))


def partitioned_model() -> nn.Module:
    base = base_model("llama")
    for parameter in base.parameters():
        partition(parameter)
    return get_peft_model(base, lora_config("llama"))


def start(A: Tensor, B: Tensor) -> Tensor:
    """B·A of the half that trains, or A where B is zero."""
    first = B.chunk(2, 1)[0]
    cancels = B.shape[1] == 2 * first.shape[1] and torch.equal(B, torch.cat([first, -first], 1))
    r = first.shape[1] if cancels else B.shape[1]
    return (B[:, :r] @ A[:r] if bool(B.any()) else A).detach()


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n] - other[n]).norm() / other[n].norm().clamp_min(1e-9)) for n in other)


def job(rank: int, world: int, folder: Path) -> Any:
    processes.connect(rank, world, folder)
    standin: Any = ModuleType("deepspeed")
    standin.zero = SimpleNamespace(GatheredParameters=GatheredParameters)
    sys.modules["deepspeed"] = standin
    found: dict[str, Any] = {}
    for method in METHODS:
        options = {"rtol": 1e-3} if method in ("self", "cross", "shift") else {}
        config = InitConfig.from_dict({"method": method, "num_batches": 3 * world, **options})
        own: list[Any] = [causal_batches(3, rows=6, tokens=12, seed=r) for r in range(world)]
        reads = method != "pissa"
        model, GatheredParameters.most = partitioned_model(), 0
        initialize(model, own[rank] if reads else None, InitConfig.from_dict({**config.to_dict(), "num_batches": 3}))
        base = [p for n, p in model.named_parameters() if ".lora_" not in n]
        plans = [
            compute_plan(whole_model(), batches if reads else None, config)
            for batches in ([batch for of_one in own for batch in of_one], own[0])
        ]
        expected, other = ({n: start(s.A, s.B) for n, s in plan.sites.items()} for plan in plans)
        got = {site.name: start(site.A, site.B) for site in find_sites(model)[0]}
        found[method] = {
            "difference": distance(got, expected),
            "control": distance(other, expected),
            "partitioned": all(p.ds_status is NOT_AVAILABLE and p.numel() == 0 for p in base),
            "share": GatheredParameters.most / sum(p.ds_shape.numel() for p in base),
        }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return processes.run(__file__, tmp_path_factory.mktemp("standin"), {"job": 2})["job"]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_plan_of_one_with_the_whole_model(results: list[Any], method: str) -> None:
    for rank in results:
        assert rank[method]["difference"] < 1e-4
        assert rank[method]["partitioned"] and 0 < rank[method]["share"] < 0.7
        assert method == "pissa" or rank[method]["control"] > 1e-2  # the control: half of the batches

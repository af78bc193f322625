"""The life of a model that FSDP2 shards: training, saving, errors on one process, a process that dies."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.fsdp_cases import batches, config_of, loss_of, model_of, shard, whole
from tests.processes import connect, outcome, run
from tests.tiny import base_model, state
from tests.versions import FSDP_ON_CPU
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from cntlora import InitConfig, compute_plan, freeze_offset, initialize, save_adapter
from cntlora.model import sharded
from cntlora.model.freezing import unmask
from cntlora.model.sites import find_sites

pytestmark = FSDP_ON_CPU


def negative(model: nn.Module, which: int = 1) -> Tensor:
    """The negative halves of all factors (which = 0: the positive)."""
    sharded.reshard(model)
    found = []
    for site in find_sites(model)[0]:
        found += [sharded.full(site.A).chunk(2, 0)[which].flatten(), sharded.full(site.B).chunk(2, 1)[which].flatten()]
    return torch.cat(found)


def train(model: nn.Module, rank: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        for batch in batches(rank):  # gradient accumulation
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def masked(rank: int, prepare: Any) -> dict[str, bool]:
    """Return whether the negative half only shrinks by weight decay, and the other trains."""
    model = prepare()
    start, positive, decay = negative(model), negative(model, 0), (1 - 1e-2 * 0.1) ** 2
    train(model, rank)
    return {
        "shrinks": torch.allclose(negative(model), start * decay, rtol=1e-9, atol=0),
        "trains": not torch.allclose(negative(model, 0), positive * decay, rtol=1e-3),
    }


def job_offset(rank: int, world: int, folder: Path) -> Any:
    connect(rank, world, folder)

    def started() -> Any:
        model = model_of()
        initialize(model, batches(rank), config_of("self", "offset"))
        return model

    def lost() -> Any:
        model = shard(started())
        for site in find_sites(model)[0]:
            unmask(site.A)
            unmask(site.B)
        return model

    def frozen_again() -> Any:
        model = lost()
        assert freeze_offset(model) == len(find_sites(model)[0])
        return model

    def through_meta() -> Any:
        """Load as accelerate does: sharded without values, then values put in by assignment."""
        model = started()
        values, buffers = state(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
        model = shard(model.to("meta"))
        shards = {n: distribute_tensor(values[n], p.device_mesh, p.placements) for n, p in model.state_dict().items()}
        wants = {name: p.requires_grad for name, p in model.named_parameters()}
        model.load_state_dict(shards, assign=True)
        for name, p in model.named_parameters():
            p.requires_grad_(wants[name])
        for name, buffer in buffers.items():
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner).register_buffer(key, buffer, persistent=False)
        return model

    results: dict[str, Any] = {
        "sharded after": masked(rank, lambda: shard(started())),
        "frozen again": masked(rank, frozen_again),
        "through meta": masked(rank, through_meta),
        "control": masked(rank, lost),
    }
    configs = {
        "offset": config_of("self", "offset"),
        "adaptive": config_of("self", adaptive_ranks=True, rank_budget=8),
    }
    for name, config in configs.items():
        model = shard(model_of())
        before = whole(model)
        results[name] = outcome(lambda m=model, c=config: initialize(m, batches(rank), c))
        results[name]["unchanged"] = all(torch.equal(before[n], t) for n, t in whole(model).items())
    return results


def job_saving(rank: int, world: int, folder: Path) -> Any:
    """The folder that all ranks write together, against that of the whole model."""
    connect(rank, world, folder)
    results: dict[str, Any] = {}
    for base in ("subtract", "paired"):
        model = shard(model_of())
        initialize(model, batches(rank), config_of("self", base))
        train(model, rank)
        save_adapter(model, folder / base)
        reloaded = PeftModel.from_pretrained(base_model("llama").double(), folder / base)
        loss = loss_of(model)
        results[base] = abs(loss_of(reloaded) - loss), abs(loss_of(base_model("llama").double()) - loss)
        results[f"{base} files"] = sorted(path.name for path in (folder / base).iterdir())
    blocked = folder / "file"
    blocked.write_text("")
    results["failure"] = outcome(lambda: save_adapter(model, blocked / "adapter"))
    return results


def in_parts(rank: int) -> dict[str, Any]:
    """Each process has a copy of its own: a mesh of one of the two."""
    model = model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "part"))["part"])
    return outcome(lambda: initialize(model, batches(rank), config_of("self")))


def tensor_parallel(rank: int) -> None:
    model = model_of()
    plan = {"model.layers.*.self_attn.q_proj.base_layer": ColwiseParallel()}
    parallelize_module(model.base_model.model, init_device_mesh("cpu", (2,)), plan)
    initialize(model, batches(rank), config_of("self"))


def job_dies(rank: int, world: int, folder: Path) -> Any:
    """The second process ends in the data pass, where the first waits for its part of a layer."""
    connect(rank, world, folder, seconds=3.0)
    model, calls = shard(model_of()), count()
    before = [p.to_local().clone() for p in model.parameters()]

    def forward(model: nn.Module, batch: Any) -> Any:
        if rank == 1 and next(calls) == 1:
            os._exit(1)
        return model(**batch)

    found = outcome(lambda: initialize(model, batches(rank), config_of("self"), forward=forward))
    sharded_now = all(map(sharded.is_sharded, model.parameters()))
    after = [p.to_local() for p in model.parameters()] if sharded_now else []
    return {**found, "unchanged": sharded_now and all(map(torch.equal, before, after))}


def job_failures(rank: int, world: int, folder: Path) -> Any:
    """An error on one rank is an error on both, and at once: no process is left in a forward pass."""
    connect(rank, world, folder)
    hidden, poisoned = batches(rank), batches(rank)
    if rank == 1:
        hidden[1]["attention_mask"].zero_()

    def nan_on_one(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss * (float("nan") if rank == 1 else 1.0)

    def broken_loader() -> Any:
        yield poisoned[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield poisoned[1]

    calls = {
        "mask": lambda m: initialize(m, hidden, config_of("self")),
        "mask in shift mode": lambda m: initialize(m, hidden, config_of("shift")),
        "loader": lambda m: initialize(m, broken_loader(), config_of("self")),
        "loss": lambda m: initialize(m, batches(rank), config_of("lora_ga"), loss=nan_on_one),
        "uneven": lambda m: initialize(m, batches(rank, 2 - rank), config_of("self")),
        "own plan": lambda m: compute_plan(m, batches(rank), config_of("self")),
    }
    results: dict[str, Any] = {"part": in_parts(rank), "tensor parallel": outcome(lambda: tensor_parallel(rank))}
    for name, call in calls.items():
        model = shard(model_of())
        before = whole(model)
        results[name] = outcome(lambda c=call, m=model: c(m))
        results[name]["unchanged"] = all(torch.equal(before[n], t) for n, t in whole(model).items())
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs = ("job_offset", "job_saving", "job_dies", "job_failures")
    return run(__file__, tmp_path_factory.mktemp("fsdp"), dict.fromkeys(jobs, 2))


def test_the_mask_of_offset_goes_over_to_the_shards(results: Any) -> None:
    """Sharded after it was initialised; the control has its masks taken off."""
    for rank in results["job_offset"]:
        for name in ("sharded after", "frozen again", "through meta"):
            assert rank[name] == {"shrinks": True, "trains": True}, name
        assert rank["control"] == {"shrinks": False, "trains": True}


@pytest.mark.parametrize("name", ["offset", "adaptive"])
def test_another_rank_is_refused_where_parameters_are_sharded(results: Any, name: str) -> None:
    for rank in results["job_offset"]:
        assert "initialise first, then shard" in rank[name]["message"] and "site model.layers" in rank[name]["message"]
        assert rank[name]["unchanged"]


def test_a_sharded_model_is_saved_by_all_together(results: Any) -> None:
    for rank in results["job_saving"]:
        for base in ("subtract", "paired"):
            difference, control = rank[base]
            assert difference < 1e-6 < 1e-4 < control
            assert rank[f"{base} files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    first, second = (rank["failure"]["message"] for rank in results["job_saving"])
    assert first.startswith("FileExistsError") and second.startswith("RuntimeError: rank 0 failed")


@pytest.mark.parametrize("name", ["mask", "mask in shift mode", "loader", "loss"])
def test_a_failure_in_the_data_pass_leaves_nobody_waiting(results: Any, name: str) -> None:
    zero, one = (rank[name] for rank in results["job_failures"])
    assert one["message"].startswith("OSError" if name == "loader" else "ValueError: batch")
    assert zero["message"] == f"RuntimeError: rank 1 failed, so that no rank goes on: {one['message']}"
    assert zero["unchanged"] and one["unchanged"] and max(zero["seconds"], one["seconds"]) < 10


def test_uneven_batches_are_an_error_on_all(results: Any) -> None:
    for rank in results["job_failures"]:
        assert "equally many batches" in rank["uneven"]["message"] and rank["uneven"]["unchanged"]


def test_a_process_that_dies_in_a_forward_pass(results: Any) -> None:
    found, lost = results["job_dies"]
    assert lost == "ended without a word"
    assert found["message"].startswith("RuntimeError: another process has ended") and found["cause"] == "RuntimeError"
    assert found["unchanged"] and found["seconds"] < 8


def test_other_ways_to_shard_are_refused(results: Any) -> None:
    for rank in results["job_failures"]:
        assert "over 1 of 2 processes, expected that of fully_shard over all" in rank["part"]["message"]
        assert "that fully_shard did not make" in rank["tensor parallel"]["message"]


def test_flat_parts_of_weights_are_refused() -> None:
    """As the first FSDP and DeepSpeed ZeRO-3 leave them."""
    model = model_of()
    site = find_sites(model)[0][0]
    site.base.weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"site {site.name} cannot be .* has shape \(0,\), expected 2 dimensions"):
        initialize(model, batches(0), config=InitConfig(method="self"))


def test_a_plan_of_one_process_is_refused(results: Any) -> None:
    for rank in results["job_failures"]:
        assert rank["own plan"]["message"].startswith("ValueError") and "call initialize" in rank["own plan"]["message"]

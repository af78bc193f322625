"""DeepSpeed ZeRO-3 on two processes (gloo): `zero.Init` partitions, then `initialize`, then the engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tests import processes
from tests.tiny import base_model, causal_batches, logits, lora_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from cntlora import InitConfig, compute_plan, initialize, initialize_from_trainer
from cntlora.model import sharded, zero3
from cntlora.model.sites import find_sites

pytest.importorskip("deepspeed", reason="builds from source; `pip install deepspeed`")
import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

pytestmark = pytest.mark.slow
METHODS = ("self", "cross", "shift", "eva", "corda", "pissa")
CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 6,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}


def connect(rank: int, world: int, folder: Path) -> None:
    processes.connect(rank, world, folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for; the group is there already
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def partitioned(kind: str = "llama") -> Any:
    """Make a model as under ZeRO-3 `from_pretrained` does: base weights partitioned, the adapter put on afterwards."""
    base = base_model(kind)
    deepspeed.zero.Init(module=base, config_dict_or_path=CONFIG, dtype=torch.float32)
    return get_peft_model(base, lora_config(kind))


def batches(rank: int) -> list[dict[str, Tensor]]:
    return causal_batches(3, rows=6, tokens=12, seed=rank)


def config(method: str, **options: Any) -> InitConfig:
    rtol = {"rtol": 1e-3} if method in ("cross", "self", "shift") else {}
    return InitConfig.from_dict({"method": method, "num_batches": options.pop("count", 3), **rtol, **options})


def products(model: nn.Module) -> dict[str, Tensor]:
    """The frozen half's s·B·A, which is −ΔW of step 0, or the whole one's."""
    return {s.name: (s.scaling * s.B[:, : s.rank // 2] @ s.A[: s.rank // 2]).detach() for s in find_sites(model)[0]}


def away(model: nn.Module) -> bool:
    """Return whether every base weight is partitioned again, and no hook is left."""
    base = [p for n, p in model.named_parameters() if ".lora_" not in n]
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in base) and not hooks


# --- jobs: what runs in the processes -----------------------------------------------------------------------


def agrees(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Return the distance of the plans from those of one process with the whole model and all batches."""
    connect(rank, world, folder)
    found = {}
    for method in METHODS:
        ours, whole = partitioned(), get_peft_model(base_model("llama"), lora_config("llama"))
        reads = METHODS_READ_DATA(method)
        initialize(ours, batches(rank) if reads else None, config(method))
        everything = [b for r in range(world) for b in batches(r)]
        plan = _alone(lambda whole=whole, method=method, reads=reads, everything=everything: compute_plan(
            whole, everything if reads else None, config(method, count=3 * world)))  # fmt: skip
        wanted = {n: s.scaling * s.B[:, : s.rank] @ s.A[: s.rank] for n, s in plan.sites.items()}
        got = products(ours)
        found[method] = max(float((got[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-9)) for n in wanted)
        found[f"{method} away"] = away(ours)
    return found


def METHODS_READ_DATA(method: str) -> bool:
    return method != "pissa"


def _alone(call: Any) -> Any:
    known, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    try:
        return call()
    finally:
        torch.distributed.is_initialized = known


def one_at_a_time(rank: int, world: int, folder: Path) -> dict[str, int]:
    """The most numbers that were gathered at once, beside those of the largest parameter and of all."""
    connect(rank, world, folder)
    model = partitioned()
    most, held, own = 0, 0, sharded.gathered_parameters

    class Counted:
        def __init__(self, parameters: Any) -> None:
            self.size = sum(p.ds_numel for p in parameters)
            self.inner = own(parameters)

        def __enter__(self) -> None:
            nonlocal most, held
            held += self.size
            most = max(most, held)
            self.inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            nonlocal held
            held -= self.size
            self.inner.__exit__(*error)

    sharded.gathered_parameters = zero3.gathered_parameters = Counted
    initialize(model, batches(rank), config("self"))
    sizes = [p.ds_numel for p in model.parameters() if hasattr(p, "ds_numel")]
    return {"most": most, "largest": max(sizes), "all": sum(sizes), "left": held}


def life(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Initialise, make the engine, train, save as Trainer does; beside it one process without DeepSpeed."""
    connect(rank, world, folder)
    model, whole = partitioned(), get_peft_model(base_model("llama"), lora_config("llama"))
    data = batches(5)  # the same for both ranks, so that the mean gradient is that of one
    initialize(model, data, config("self"))
    _alone(lambda: initialize(whole, data, config("self")))
    for ours, theirs in zip(find_sites(model)[0], find_sites(whole)[0], strict=True):
        theirs.A.data.copy_(ours.A.data)
        theirs.B.data.copy_(ours.B.data)
    start = {s.name: (s.A.detach().clone(), s.B.detach().clone()) for s in find_sites(model)[0]}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, config=CONFIG, model_parameters=trained)[0]
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses, wanted = [], []
    for batch in data:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        loss = whole(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    state = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        save_file({k: v.contiguous() for k, v in state.items() if "lora_" in k}, folder / "factors.safetensors")
        model.save_pretrained(folder / "adapter", state_dict=state)
    return {"losses": losses, "wanted": wanted, "frozen": _frozen(state, start) if rank == 0 else None}


def _frozen(state: dict[str, Tensor], start: dict[str, tuple[Tensor, Tensor]]) -> list[bool]:
    """Return whether the second half is bit-identical to what it was, and the first is not, of every site."""
    found = []
    for name, (A, B) in start.items():
        a, b = (state[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
        same = torch.equal(a[4:], A[4:]) and torch.equal(b[:, 4:], B[:, 4:])
        found.append(same and not torch.equal(a[:4], A[:4]) and not torch.equal(b[:, :4], B[:, :4]))
    return found


def refusals(rank: int, world: int, folder: Path) -> dict[str, Any]:
    connect(rank, world, folder)
    model = partitioned()
    found = {
        "subtract": processes.outcome(lambda: initialize(model, batches(rank), config("self", base="subtract"))),
        "gradients": processes.outcome(lambda: initialize(model, batches(rank), config("lora_ga"))),
        "plan": processes.outcome(lambda: compute_plan(model, batches(rank), config("self"))),
    }
    broken = lambda model, batch: model(**batch).nothing  # noqa: E731
    found["error"] = processes.outcome(lambda: initialize(model, batches(rank), config("self"), forward=broken))
    left = away(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    deepspeed.initialize(model=model, config=CONFIG, model_parameters=trained)
    found["engine"] = processes.outcome(lambda: initialize(model, batches(rank), config("self")))
    return {name: outcome["message"] for name, outcome in found.items()} | {"away": left}


def trainer(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """transformers' Trainer with a DeepSpeed configuration: `initialize_from_trainer`, train, save_model."""
    connect(rank, world, folder)
    base_model("llama").save_pretrained(folder / "base")  # which rank 0 does
    torch.distributed.barrier()
    ds = {k: CONFIG[k] for k in ("zero_optimization", "zero_force_ds_cpu_optimizer")}
    ds |= dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
    ds["zero_optimization"] = {**ds["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": True}
    ds["zero_allow_untested_optimizer"] = True
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=6, max_steps=3, learning_rate=1e-2, logging_steps=1,
        deepspeed=ds, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    split = base.model.layers[0].mlp.up_proj.weight.numel()
    model = get_peft_model(base, lora_config("llama"))
    rows = [{k: v[i] for k, v in batches(0)[0].items()} for i in range(6)] * 6
    made = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    report = initialize_from_trainer(made, config("self"))
    made.train()
    made.save_model(str(folder / "saved"))
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"losses": losses, "split": split, "batches": report.batches}


# --- what they found ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Any]], Path]:
    folder = tmp_path_factory.mktemp("zero3")
    return processes.run(
        __file__, folder, {"agrees": 2, "one_at_a_time": 2, "life": 2, "refusals": 2, "trainer": 2}
    ), folder


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_that_of_the_whole_model(method: str, found: Any) -> None:
    for of_rank in found[0]["agrees"]:
        assert of_rank[method] < 1e-3
        assert of_rank[f"{method} away"]


def test_one_module_at_a_time(found: Any) -> None:
    for of_rank in found[0]["one_at_a_time"]:
        assert of_rank["most"] == of_rank["largest"] < of_rank["all"] / 5
        assert of_rank["left"] == 0


def test_it_trains_as_one_process_and_the_frozen_half_stays(found: Any) -> None:
    jobs, folder = found
    for of_rank in jobs["life"]:
        assert of_rank["losses"] == pytest.approx(of_rank["wanted"], abs=5e-3)  # Adam enlarges rounding
    frozen = jobs["life"][0]["frozen"]
    assert len(frozen) == 8 and all(frozen)
    base = base_model("llama")
    start = base(**batches(5)[0]).loss.item()
    assert jobs["life"][0]["losses"][0] == pytest.approx(start, abs=1e-3)
    loaded = PeftModel.from_pretrained(base, folder / "life" / "adapter").eval()
    assert (logits(loaded, batches(9)[0]) - logits(base_model("llama"), batches(9)[0])).abs().max() > 1e-3


def test_the_trainer_of_transformers(found: Any) -> None:
    jobs, folder = found
    base = base_model("llama")
    start = base(**batches(0)[0]).loss.item()
    for of_rank in jobs["trainer"]:
        assert of_rank["split"] == 0  # from_pretrained partitions
        assert of_rank["losses"][0] == pytest.approx(start, abs=1e-2)
        assert of_rank["losses"][2] < of_rank["losses"][0]
    loaded = PeftModel.from_pretrained(base, folder / "trainer" / "saved").eval()
    assert loaded(**batches(0)[0]).loss.item() < jobs["trainer"][0]["losses"][2] + 1e-2 < start


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("subtract", "partitioned over processes .DeepSpeed ZeRO-3.*base='offset'"),
        ("gradients", "reads the gradient by its weight, and its weight is partitioned"),
        ("plan", "call initialize on all of them"),
        ("error", "has no attribute 'nothing'"),
        ("engine", "its adapter is partitioned by DeepSpeed ZeRO-3 already; initialise before deepspeed.initialize"),
    ],
)
def test_refused_with_the_reason(case: str, message: str, found: Any) -> None:
    import re

    for of_rank in found[0]["refusals"]:
        assert re.search(message, of_rank[case]), of_rank[case]
        assert of_rank["away"]

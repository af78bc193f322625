"""Limits without `max_memory`: what is free; further passes or the CPU rather than an error of the allocator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cases import SIZES, mlp, token_batches, wrapped
from tests.tiny import adapted, causal_batches, text_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

import cntlora
from cntlora import InitConfig, InitPlan
from cntlora.data import free_memory
from cntlora.data.free_memory import free_bytes
from cntlora.data.gradients import weight_gradients
from cntlora.data.memory import FREE_SHARE, USABLE, Budget, parse_limits
from cntlora.execution import reading
from cntlora.execution.arguments import Request
from cntlora.execution.executor import LocalExecutor
from cntlora.methods.estimator import InputReader
from cntlora.model.sites import find_sites

GIB = 2**30
CPU = torch.device("cpu")


def equal(one: InitPlan, two: InitPlan) -> bool:
    """Return whether two plans write the same bits."""
    return list(one.sites) == list(two.sites) and all(
        torch.equal(site.A, two.sites[name].A) and torch.equal(site.B, two.sites[name].B)
        for name, site in one.sites.items()
    )


# --- what is free -------------------------------------------------------------------------------------------


def machine(root: Path, available: int, **groups: tuple[int | str, int, int]) -> None:
    """The files of a Linux machine, in KiB available, with control groups: limit, used, files of that."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available} kB\n")
    for version, (limit, used, files) in groups.items():
        folder, most, now, key = free_memory.GROUPS[0 if version == "v2" else 1]
        (root / folder).mkdir(parents=True)
        (root / folder / most).write_text(f"{limit}\n")
        (root / folder / now).write_text(f"{used}\n")
        (root / folder / "memory.stat").write_text(f"anon 7\n{key} {files}\n")


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, groups, expected in (
        ("plain", {}, 4096 * 1024),
        ("unlimited", {"v2": ("max", 10, 5)}, 4096 * 1024),
        ("container", {"v2": (1000_000, 400_000, 100_000)}, 700_000),
        ("old container", {"v1": (1000_000, 400_000, 0)}, 600_000),
        ("full container", {"v2": (1000, 4000, 0)}, 0),
    ):
        machine(tmp_path / name, 4096, **groups)
        monkeypatch.setattr(free_memory, "ROOT", tmp_path / name)
        assert free_bytes(CPU) == expected, name


def test_a_system_that_does_not_say_sets_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "ROOT", tmp_path)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(free_memory.importlib, "import_module", missing)
    assert free_bytes(CPU) == float("inf")
    asked = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=12345))
    monkeypatch.setattr(free_memory.importlib, "import_module", lambda name: asked)
    assert free_bytes(CPU) == 12345


# --- calls --------------------------------------------------------------------------------------------------


def least_free(model: nn.Module, config: InitConfig, bounded: bool) -> float:
    """The least free memory with which nothing is bounded, or else with which each site fits alone."""
    budget = reading.prepared(Request(model=model, config=config), LocalExecutor()).budget
    sites = find_sites(model)[0]
    low, high = 0.0, float(2**30)
    while high - low > 1:
        middle = (low + high) / 2
        budget.limits = parse_limits(None)
        budget.bound_by_free(sites, middle)
        enough = not budget.limited
        if bounded and not enough:
            try:
                budget.foretold(sites, lambda site: site.name)
                enough = True
            except ValueError:
                enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


@pytest.mark.parametrize("method", ["self", "eva", "lora_ga", "descent", "whitened", "lora_da", "gora"])
def test_several_passes_where_little_is_free(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches = InitConfig(method=method), text_batches()
    free = cntlora.compute_plan(adapted("bert"), batches, config)
    assert free.memory["free"] == 0 and free.memory["passes"] == 1
    enough = least_free(adapted("bert"), config, bounded=False)
    monkeypatch.setattr(reading, "free_bytes", lambda device: enough)
    assert cntlora.compute_plan(adapted("bert"), batches, config).memory == free.memory
    least = least_free(adapted("bert"), config, bounded=True)
    assert least < enough
    monkeypatch.setattr(reading, "free_bytes", lambda device: least)
    model = adapted("bert")
    tight = cntlora.initialize(model, iter(batches), config)
    assert tight.memory["passes"] > 1 and tight.memory["free"] == int(least)
    assert "GiB that were free" in str(tight) and f"{tight.memory['passes']} passes" in str(tight)
    plan = cntlora.compute_plan(adapted("bert"), batches, config)
    assert equal(plan, free) and plan.step == free.step and plan.skipped == free.skipped
    other = cntlora.compute_plan(adapted("bert"), batches[:2], config)  # control
    assert not equal(other, free)


def test_one_site_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches = InitConfig(method="self"), token_batches(SIZES)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 1.0)
    with pytest.raises(ValueError, match=r"site q \(14×10\): its statistics need \d+KiB on cpu, of which 0KiB may be"):
        cntlora.compute_plan(wrapped(mlp()), batches, config)
    limit = cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory="1MiB")  # control: the caller's is taken
    assert limit.memory["free"] == 0


def test_sites_without_a_gradient_are_told_though_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer sees zeros, so that its weight has a gradient of zero in every batch."""

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Any) -> Any:
            return (self.three(self.two(x).tanh() + self.one(torch.zeros_like(x)))).square().mean()

    def model() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["one", "two", "three"])
        return get_peft_model(Deaf(), config)  # type: ignore[arg-type]

    config, batches = InitConfig(method="lora_ga"), [torch.randn(5, 12)]

    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch)

    with pytest.warns(UserWarning, match="its gradient is zero"):
        free = cntlora.compute_plan(model(), batches, config, loss=loss)
    monkeypatch.setattr(reading, "free_bytes", lambda device: least_free(model(), config, bounded=True))
    with pytest.warns(UserWarning, match="its gradient is zero"):
        tight = cntlora.compute_plan(model(), batches, config, loss=loss)
    assert tight.memory["passes"] > 1 and equal(free, tight)
    assert list(free.skipped) == list(tight.skipped) == ["one"]


# --- gradients ----------------------------------------------------------------------------------------------


def test_no_two_gradients_are_held_at_a_time() -> None:
    model, batch = adapted("llama"), causal_batches(1)[0]
    sites = find_sites(model)[0]
    held: list[int] = []

    def sink(index: int, name: str, G: Any) -> None:
        held.append(sum(site.stored.grad is not None for site in sites))

    with weight_gradients(model, sites, sink) as backward:
        backward(0, model(**batch))
    assert held == [0] * len(sites)
    half = adapted("llama", dtype=torch.float16)  # control: these may have to be computed again
    sites, seen = find_sites(half)[0], len(held)
    with weight_gradients(half, sites, sink) as backward:
        backward(0, half(**batch))
    assert held[seen:] == [len(sites)] * len(sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    class Steep(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.layer, self.power = nn.Linear(4, 4), power

        def forward(self, x: Any) -> Any:
            return (0 * self.layer(x)).float().pow(self.power).sum()  # the root of zero has no slope

    def read(power: float) -> list[str]:
        model = get_peft_model(Steep(power), LoraConfig(r=2, target_modules=["layer"])).to(dtype)  # type: ignore[arg-type]
        names: list[str] = []
        with weight_gradients(model, find_sites(model)[0], lambda index, name, G: names.append(name)) as backward:
            backward(3, model(torch.ones(2, 4, dtype=dtype)))
        return names

    with pytest.raises(ValueError, match="site layer, batch 3: its gradient has NaN or Inf"):
        read(0.5)
    assert read(2.0) == ["layer"]  # control


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    class Twice(nn.Module):
        def __init__(self, wrap: Callable[..., Any]) -> None:
            super().__init__()
            self.layer, self.wrap = nn.Linear(12, 12), wrap

        def forward(self, x: Any) -> Any:
            x = x.requires_grad_(True)
            return self.wrap(self.layer, self.wrap(self.layer, x).tanh()).square().mean()

    def checkpointed(layer: nn.Module, x: Any) -> Any:
        return checkpoint(layer, x, use_reentrant=reentrant)

    found = []
    for wrap in (checkpointed, lambda layer, x: layer(x)):
        torch.manual_seed(0)
        model = get_peft_model(Twice(wrap), LoraConfig(r=2, target_modules=["layer"]))  # type: ignore[arg-type]
        total = torch.zeros(12, 12)
        with weight_gradients(model, find_sites(model)[0], lambda index, name, G, t=total: t.add_(G)) as backward:  # type: ignore[misc]
            backward(0, model(torch.randn(5, 12)))
        found.append(total)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[1].norm()) > 0


# --- by counting --------------------------------------------------------------------------------------------


def llama_7b(bits: int) -> tuple[list[Any], float]:
    """The sites of Llama-7B as a budget sees them on a GPU, in bfloat16 or 4 bits, and the bytes of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
        model = LlamaForCausalLM(config)
    sites = [
        SimpleNamespace(
            name=name, in_features=layer.in_features, out_features=layer.out_features, dtype=torch.bfloat16,
            device=torch.device("cuda"), stored=layer.weight.to(torch.bfloat16),
        )
        for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"
    ]  # fmt: skip
    weights = sum(site.stored.numel() for site in sites)
    rest = sum(p.numel() for p in model.parameters()) - weights
    return sites, 2 * rest + weights * bits / 8 * (1.125 if bits == 4 else 1)  # a scale for every 64 of NF4


def count(method: str, bits: int, memory: float) -> tuple[Budget, float]:
    sites, model = llama_7b(bits)
    config = InitConfig(method=method)
    budget = Budget(parse_limits(None), of_gradients=config.chosen.reads == "gradients")
    reader = config.chosen.estimator(lambda name: torch.empty(0), config)
    budget.of_inputs = isinstance(reader, InputReader)
    if isinstance(reader, InputReader):
        budget.single, budget.early = reader.single, reader.early
    budget.bound_by_free(sites, memory - model)
    peak = budget.foretold(sites, lambda site: site.name.rsplit(".", 1)[0] if _shares(site.name) else site.name, 2048)
    return budget, peak


def _shares(name: str) -> bool:
    """q, k and v see one tensor; so do gate and up."""
    return name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))


@pytest.mark.parametrize(
    ("method", "bits", "memory", "passes"),
    [
        ("self", 16, 80e9, 1), ("eva", 16, 80e9, 1), ("lora_ga", 16, 80e9, 1), ("descent", 16, 80e9, 2),
        ("whitened", 16, 80e9, 2), ("self", 4, 24e9, 5), ("eva", 4, 24e9, 2), ("self", 16, 24e9, 20),
    ],
)  # fmt: skip
def test_a_7b_model_fits(method: str, bits: int, memory: float, passes: int) -> None:
    budget, peak = count(method, bits, memory)
    assert 1 <= budget.use.passes <= passes
    assert 0 < peak <= USABLE * FREE_SHARE["cuda"] * memory
    assert not budget.limited or budget.limits["cpu"] == 0
    wide, whole = count(method, bits, 1e15)  # control: as much as one wants
    assert whole <= 16 * GIB or method != "eva"
    assert wide.use.passes == 1 and whole >= peak

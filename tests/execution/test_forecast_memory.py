"""The memory that a forecast foretells is what the call then takes, by counting what the allocator gives out."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.cases import wrapped
from torch import Tensor, nn

import cntlora
from cntlora import InitConfig
from cntlora.data.peak_memory import counted_memory
from cntlora.execution.forecast import forecast
from cntlora.linalg.symmetric import held_numbers

CPU = torch.device("cpu")
WITHIN = 0.15


class Deep(nn.Module):
    """Layers of two widths, as an MLP of a transformer has them, with a loss."""

    def __init__(self, width: int = 96, inner: int = 160, layers: int = 6) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, inner) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(inner, width) for _ in range(layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return {"loss": x.square().mean()}


def model(width: int = 96) -> nn.Module:
    torch.manual_seed(0)
    targets = [f"{name}.{i}" for name in ("up", "down") for i in range(6)]
    return wrapped(Deep(width), LoraConfig(r=4, target_modules=targets))


def batches(width: int = 96, tokens: int = 300) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(2, tokens // 2, width, generator=g)} for _ in range(4)]


def measured(method: str, limit: Any = None, tokens: int = 300) -> int:
    """Bytes that the call takes, after one that has made what is kept for further calls."""
    adapted, read, config = model(), batches(tokens=tokens), InitConfig(method=method)
    cntlora.compute_plan(adapted, read[:1], config, progress=False)
    gc.collect()
    with counted_memory(CPU) as held:
        plan = cntlora.compute_plan(adapted, read, config, progress=False, max_memory=limit)
    assert plan.sites and held.most is not None
    return held.most


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("limit", [None, "4MiB", "3MiB", "2MiB"])
@pytest.mark.parametrize("method", ["self", "eva", "corda", "descent", "whitened", "lora_ga"])
def test_memory_is_what_was_foretold(method: str, limit: str | None) -> None:
    found = forecast(model(), batches(), InitConfig(method=method), max_memory=limit)
    taken = measured(method, limit)
    assert abs(found.peak - taken) <= WITHIN * taken


@pytest.mark.parametrize(("method", "limits"), [("self", ("4MiB", "3MiB")), ("descent", ("2.5MiB", "2MiB"))])
def test_a_limit_lowers_what_is_foretold(method: str, limits: tuple[str, str]) -> None:
    peaks = [forecast(model(), batches(), InitConfig(method=method), max_memory=m).peak for m in (None, *limits)]
    assert peaks[0] > peaks[1] > peaks[2] > 0


def test_the_batches_count() -> None:
    """The control: what is foretold for some batches is not what others take."""
    few = forecast(model(), batches(tokens=80), InitConfig(method="lora_ga")).peak
    many = measured("lora_ga", tokens=900)
    assert abs(few - many) > WITHIN * many


def test_inputs_are_added_one_at_a_time() -> None:
    """The sums of EVA, one triangle each in float32, and room for three inputs; the control holds those of a batch."""
    with counted_memory(CPU) as forward, torch.no_grad():
        model()(**batches()[0])
    assert forward.most is not None
    one = 4 * 160**2
    assert measured("eva") <= forward.most + 6 * (4 * 96**2 + 4 * held_numbers(160)) + 3 * one
    assert measured("self") > forward.most + 6 * (4 * 96**2 + one) + 6 * one


@pytest.mark.parametrize("method", ["descent", "whitened", "lora_da", "eva", "self"])
def test_sums_are_free_when_the_call_is_over(method: str) -> None:
    """An estimator that holds itself would keep its sums until Python looks for such cycles."""
    adapted, read, config = model(), batches(), InitConfig(method=method)
    cntlora.compute_plan(adapted, read[:1], config, progress=False)
    gc.collect()
    gc.disable()
    try:
        with counted_memory(CPU) as held:
            plan = cntlora.compute_plan(adapted, read, config, progress=False, max_memory="4MiB")
    finally:
        gc.enable()
    factors = sum(t.nbytes for site in plan.sites.values() for t in (site.A, site.B))
    one_sum = 8 * 96 * 96
    assert factors <= held.left < factors + one_sum


def test_counting_is_of_what_is_held_at_a_time() -> None:
    with counted_memory(CPU) as held:
        for _ in range(3):
            torch.zeros(1000, 250)  # 1 MB each, one after another
        kept = torch.zeros(500, 250)
    assert held.most == 1_000_000 and held.left == kept.nbytes == 500_000
    with counted_memory(CPU) as both:
        pair = [torch.zeros(1000, 250) for _ in range(2)]
    assert both.most == sum(t.nbytes for t in pair) == 2_000_000


def test_counting_prints_nothing_and_leaves_the_environment(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    with counted_memory(CPU):
        torch.zeros(10)
    assert dict(os.environ) == before
    assert "profiler" not in capfd.readouterr().err

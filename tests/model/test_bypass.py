"""Fresh adapters are left out of the forward pass that reads the data, and everything is as found afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cases import lora, mlp, token_batches, wrapped

import cntlora
from cntlora import InitConfig
from cntlora.model import bypass
from cntlora.model.sites import find_sites


def calls_of(model: torch.nn.Module, **options: Any) -> int:
    """Count the calls of an adapter's own matrices while a plan is made."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [site.layer.lora_A[site.adapter].register_forward_pre_hook(counted) for site in find_sites(model)[0]]
    cntlora.compute_plan(model, token_batches([(2, 10), (3, 10)]), InitConfig.from_dict({"method": "self", **options}))
    for handle in handles:
        handle.remove()
    return count


@pytest.mark.parametrize("dora", [False, True])
def test_the_plan_is_the_same_with_and_without(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(mlp(), lora(use_dora=dora))
    assert calls_of(model) == 0
    plan = cntlora.compute_plan(model, token_batches([(2, 10), (3, 10)]), config=cntlora.InitConfig(method="self"))
    monkeypatch.setattr(bypass, "_adds_nothing", lambda site: False)
    assert calls_of(model) > 0  # control
    other = cntlora.compute_plan(model, token_batches([(2, 10), (3, 10)]), config=cntlora.InitConfig(method="self"))
    for name, site in plan.sites.items():
        torch.testing.assert_close(site.A, other.sites[name].A, rtol=1e-8, atol=1e-10)


def test_another_active_adapter_stays_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["q", "up"], init_lora_weights=False), "trained")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q", "up"]))
    model.base_model.set_adapter(["trained", "default"])
    both = cntlora.compute_plan(model, token_batches([(2, 10), (3, 10)]), config=cntlora.InitConfig(method="self"))
    model.base_model.set_adapter(["default"])
    alone = cntlora.compute_plan(model, token_batches([(2, 10), (3, 10)]), config=cntlora.InitConfig(method="self"))
    assert torch.equal(both.sites["q"].A, alone.sites["q"].A)  # q is first: its input knows no adapter
    assert not torch.equal(both.sites["up"].A, alone.sites["up"].A)  # control: the trained adapter on q counts


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_found(fails: bool) -> None:
    model = wrapped(mlp(), lora())
    layers = [site.layer for site in find_sites(model)[0]]
    before = [(layer._disable_adapters, layer.active_adapters, [p.requires_grad for p in layer.parameters()])
              for layer in layers]  # fmt: skip

    def forward(model: torch.nn.Module, batch: torch.Tensor) -> Any:
        assert all(layer.disable_adapters for layer in layers)
        if fails:
            raise RuntimeError("on purpose")
        return model(batch)

    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            cntlora.compute_plan(
                model, token_batches([(2, 10)]), forward=forward, config=cntlora.InitConfig(method="self")
            )
    else:
        cntlora.compute_plan(model, token_batches([(2, 10)]), forward=forward, config=cntlora.InitConfig(method="self"))
    after = [(layer._disable_adapters, layer.active_adapters, [p.requires_grad for p in layer.parameters()])
             for layer in layers]  # fmt: skip
    assert before == after


def test_disabled_adapters_stay_disabled() -> None:
    model = wrapped(mlp(), lora())
    with model.disable_adapter():
        cntlora.compute_plan(model, token_batches([(2, 10)]), config=cntlora.InitConfig(method="self"))
        assert all(site.layer.disable_adapters for site in find_sites(model)[0])
    assert not any(site.layer.disable_adapters for site in find_sites(model)[0])

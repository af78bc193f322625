"""Adapters after training: merged, swapped, weighted, several on one model. Outputs are compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from tests.tiny import adapted, base_model, causal_batches, logits, lora_config, state, text_batches, train
from torch import Tensor, nn

from cntlora import InitConfig, initialize, save_adapter

BASES = ["offset", "paired", "subtract", "keep"]
DENSE = ["query", "value", "dense"]
NEAR = {"rtol": 1e-4, "atol": 2e-5}
BATCH = text_batches(1, seed=9)[0]
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's remarks on merging


def trained(base: str = "offset", seed: int = 0, lora: dict[str, Any] | None = None, **init: Any) -> Any:
    model, batches = adapted(**(lora or {})), text_batches(seed=seed)
    initialize(model, batches, InitConfig.from_dict({"method": "self", "base": base, **init}), progress=False)
    train(model, batches)
    return model


def differs(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# --- merging ------------------------------------------------------------------------------------------------


MERGED = [
    pytest.param(base, lora, id=f"{base}-{lora}", marks=[pytest.mark.slow] if lora and base != "offset" else [])
    for base in BASES
    for lora in ({}, {"use_dora": True}, {"use_rslora": True})
]


@pytest.mark.parametrize(("base", "lora"), MERGED)
def test_merged_in_memory_and_from_the_file(tmp_path: Path, base: str, lora: dict[str, Any]) -> None:
    model = trained(base, lora=lora)
    wanted = logits(model, BATCH)
    assert differs(wanted, logits(base_model(), BATCH))
    save_adapter(model, tmp_path)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    from_file = PeftModel.from_pretrained(base_model(), tmp_path).merge_and_unload()
    for plain in (merged, from_file):
        assert not any("lora" in name for name, _ in plain.named_modules())
        torch.testing.assert_close(logits(plain.eval(), BATCH), wanted, **NEAR)
    if base == "offset":  # the merged model is the pristine one again where nothing was trained
        fresh = adapted(**lora)
        initialize(fresh, text_batches(), progress=False, config=InitConfig(method="self"))
        torch.testing.assert_close(state(fresh.merge_and_unload()), state(base_model()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["offset", *(pytest.param(base, marks=pytest.mark.slow) for base in BASES[1:])])
def test_merged_and_taken_off_again(base: str) -> None:
    model = trained(base)
    before, weights = logits(model, BATCH), state(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BATCH), before, **NEAR)
    model.unmerge_adapter()
    torch.testing.assert_close(state(model), weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, BATCH), before, **NEAR)


def test_a_merged_conv1d(tmp_path: Path) -> None:
    model, batches = adapted("gpt2"), causal_batches()
    initialize(model, batches, progress=False, config=InitConfig(method="self"))
    train(model, batches)
    save_adapter(model, tmp_path)
    merged = PeftModel.from_pretrained(base_model("gpt2"), tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(logits(merged, batches[0]), logits(model, batches[0]), **NEAR)
    assert differs(logits(merged, batches[0]), logits(base_model("gpt2"), batches[0]))


# --- several adapters on one model --------------------------------------------------------------------------


def test_two_adapters_are_initialised_on_one_model() -> None:
    """Neither moves the other, and each trains alone."""
    model, batches = adapted(adapter_name="one"), text_batches()
    model.add_adapter("two", lora_config(r=3, lora_alpha=3))
    initialize(model, batches, adapter_name="one", progress=False, config=InitConfig(method="self"))
    one = {name: value for name, value in state(model).items() if ".one." in name}
    initialize(model, text_batches(seed=5), InitConfig(method="eva"), adapter_name="two", progress=False)
    assert all(torch.equal(state(model)[name], value) for name, value in one.items()) and one
    model.set_adapter("two")
    pristine = logits(base_model(), BATCH)
    torch.testing.assert_close(logits(model, BATCH), pristine, **NEAR)
    train(model, batches)
    assert differs(logits(model, BATCH), pristine)
    model.set_adapter("one")
    torch.testing.assert_close(logits(model, BATCH), pristine, **NEAR)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, BATCH), pristine, **NEAR)


def test_deleting_one_leaves_the_other() -> None:
    model = adapted(adapter_name="one")
    model.add_adapter("two", lora_config(r=3))
    initialize(model, text_batches(), adapter_name="one", progress=False, config=InitConfig(method="self"))
    initialize(model, text_batches(), adapter_name="two", progress=False, config=InitConfig(method="self"))
    train(model, text_batches())
    wanted = logits(model, BATCH)
    model.delete_adapter("two")
    torch.testing.assert_close(logits(model, BATCH), wanted)
    assert list(model.peft_config) == ["one"]
    assert differs(wanted, logits(base_model(), BATCH))


def product(model: Any, name: str) -> dict[str, Tensor]:
    """s·B·A of an adapter by site."""
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with the saved adapters of two trained ones, of offset with ranks of its own at each site, and keep."""
    root = tmp_path_factory.mktemp("two")
    wanted = []
    for index, base in enumerate(("offset", "keep")):
        adaptive = {"adaptive_ranks": True, "rank_budget": 40, "min_rank": 1} if base == "offset" else {}
        one = trained(base, seed=index, lora={"target_modules": DENSE}, **adaptive)
        save_adapter(one, root / str(index))
        wanted.append(logits(one, BATCH))
    model = PeftModel.from_pretrained(base_model(), root / "0", adapter_name="a")
    model.load_adapter(root / "1", adapter_name="b")
    for name, output in zip("ab", wanted, strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model.eval(), BATCH), output, **NEAR)
    assert len({A.shape[0] for n, A in model.state_dict().items() if "lora_A.a" in n}) > 2
    return model


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sums_are_those_of_the_products(two: Any, combination: str, tmp_path: Path) -> None:
    model = copy.deepcopy(two)
    rank = {"svd_rank": 24} if combination == "svd" else {}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", combination_type=combination, **rank)
    model.set_adapter("sum")
    a, b, total = (product(model, name) for name in ("a", "b", "sum"))
    for site, value in total.items():
        torch.testing.assert_close(value, 0.7 * a[site] - 0.4 * b[site], rtol=1e-3, atol=1e-4)
        assert (value - a[site]).norm() > 0.1 * a[site].norm()  # the control
    wanted = logits(model.eval(), BATCH)
    save_adapter(model, tmp_path, "sum")
    read = logits(PeftModel.from_pretrained(base_model(), tmp_path).eval(), BATCH)
    torch.testing.assert_close(read, wanted, **NEAR)
    assert differs(wanted, logits(base_model(), BATCH))


def test_both_at_once_add_up(two: Any) -> None:
    model = copy.deepcopy(two)
    model.base_model.set_adapter(["a", "b"])
    summed = base_model()
    for name in ("a", "b"):
        for path, delta in product(model, name).items():
            weight: Any = summed.get_submodule(path.removeprefix("base_model.model.")).weight
            weight.data += delta
    torch.testing.assert_close(logits(model.eval(), BATCH), logits(summed, BATCH), **NEAR)
    for name in ("a", "b"):
        model.set_adapter(name)
        assert differs(logits(model, BATCH), logits(summed, BATCH))


# --- hot-swapping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["subtract", pytest.param("keep", marks=pytest.mark.slow)])
def test_hot_swapped_into_a_loaded_model(tmp_path: Path, base: str) -> None:
    one, other = trained(base, seed=0), trained(base, seed=3)
    for name, model in (("one", one), ("other", other)):
        save_adapter(model, tmp_path / name)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "one").eval()
    torch.testing.assert_close(logits(loaded, BATCH), logits(one, BATCH), **NEAR)
    hotswap_adapter(loaded, tmp_path / "other", adapter_name="default")
    torch.testing.assert_close(logits(loaded, BATCH), logits(other, BATCH), **NEAR)
    assert differs(logits(one, BATCH), logits(other, BATCH))


def test_hot_swapped_into_the_model_that_was_initialised(tmp_path: Path) -> None:
    """In the place of a trained one of base offset, whose second half is frozen; and it trains on from there."""
    model, other = trained(seed=0), trained(seed=3)
    save_adapter(other, tmp_path / "other", fold_alpha=False)
    hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    torch.testing.assert_close(logits(model.eval(), BATCH), logits(other, BATCH), **NEAR)
    for one in (model, other):
        train(one, text_batches(seed=4))
    torch.testing.assert_close(logits(model, BATCH), logits(other, BATCH), **NEAR)


def test_hot_swapped_ranks_that_differ(tmp_path: Path) -> None:
    """After `prepare_model_for_compiled_hotswap`, PEFT's way for adapters of other ranks."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    save_adapter(trained("offset"), tmp_path / "one")
    other = trained("paired", seed=3)
    save_adapter(other, tmp_path / "other")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "one").eval()
    prepare_model_for_compiled_hotswap(loaded, target_rank=8)
    hotswap_adapter(loaded, tmp_path / "other", adapter_name="default")
    torch.testing.assert_close(logits(loaded, BATCH), logits(other, BATCH), **NEAR)
    assert differs(logits(other, BATCH), logits(base_model(), BATCH))


def test_no_module_of_ours_is_in_a_model_that_was_loaded(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert not any(type(module).__module__.startswith("cntlora") for module in loaded.modules())
    assert not any(hooks(module) for module in loaded.modules())


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)

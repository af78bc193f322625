"""`max_memory=`: the same plan within less memory, wherever the statistics are held.

The same bits: each sum has the same terms in the same order and layout, and small matrices are factored by one thread.
"""

from __future__ import annotations

import errno
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cases import SIZES, mlp, token_batches, wrapped
from tests.tiny import adapted, text_batches
from torch import nn

import cntlora
from cntlora import InitConfig, InitPlan
from cntlora.data.memory import Budget, parse_limits, readable
from cntlora.model.sites import find_sites

METHODS = ("cross", "self", "shift", "eva", "corda")


def same(one: InitPlan, two: InitPlan) -> bool:
    """Return whether two plans write the same bits."""
    return list(one.sites) == list(two.sites) and all(
        torch.equal(site.A, two.sites[name].A) and torch.equal(site.B, two.sites[name].B) and
        site.tokens == two.sites[name].tokens and site.effective_rank == two.sites[name].effective_rank
        for name, site in one.sites.items()
    )  # fmt: skip


def least(model: nn.Module, batches: list[Any], config: InitConfig, passes: int = 10**6) -> int:
    """The smallest limit with which so many passes are enough, by halving."""
    low, high = 0, 2**24
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = cntlora.compute_plan(model, batches, config, max_memory=middle).memory["passes"] <= passes
            low, high = (low, middle) if enough else (middle, high)
        except ValueError as error:
            assert "max_memory" in str(error)
            low = middle
    return high


# --- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [(12, 12), ("12", 12), ("2KiB", 2048), ("1.5MiB", 1572864), ("3 GB", 3e9), ("1gib", 2**30), ("0", 0)],
)
def test_sizes(given: int | str, bytes_: float) -> None:
    assert parse_limits(given)["device"] == bytes_
    assert parse_limits({"cpu": given}) == {"device": float("inf"), "cpu": bytes_, "disk": 0.0}


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ("six", ValueError, "expected a size such as '6GiB'"),
        ("6 apples", ValueError, "expected a size such as '6GiB'"),
        (-1, ValueError, "at least 0"),
        (True, TypeError, "expected bytes"),
        (1.5, TypeError, "expected bytes"),
        ({"gpu": "1GiB"}, ValueError, "'gpu' is not known; .* or a mapping with device, cpu"),
        ({"disk": None}, TypeError, "disk: expected bytes"),
    ],
)  # fmt: skip
def test_wrong_limits_are_named(wrong: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cntlora.compute_plan(
            wrapped(mlp()), token_batches(SIZES), max_memory=wrong, config=cntlora.InitConfig(method="self")
        )


def test_readable_sizes_can_be_given_back() -> None:
    for size in (1, 2**20, 5 * 2**20 + 1, 11 * 2**30 + 1):
        assert parse_limits(readable(size))["device"] >= size


# --- passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"adaptive_ranks": True, "rank_budget": 9}, {"base": "keep"}], ids=str)
def test_several_passes_give_the_same_bits(method: str, options: dict[str, Any]) -> None:
    config, batches = InitConfig.from_dict({"method": method, **options}), token_batches(SIZES)
    free = cntlora.compute_plan(wrapped(mlp()), batches, config)
    limit = least(wrapped(mlp()), batches, config)
    tight = cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory=limit)
    assert same(free, tight)
    assert free.memory["passes"] == 1 and tight.memory["passes"] > 1
    assert 0 < tight.memory["device"] <= limit
    assert tight.batches == free.batches
    other = cntlora.compute_plan(wrapped(mlp()), batches[:2], config)  # control
    assert not same(free, other)


@pytest.mark.parametrize("decomposition", ["qr", "qr_pivoted"])
def test_several_passes_with_factors_that_need_the_matrix_twice(decomposition: str) -> None:
    config = InitConfig.from_dict(
        {"method": "cross", "decomposition": decomposition, "adaptive_ranks": True, "rank_budget": 11}
    )
    batches = token_batches(SIZES)
    limit = least(wrapped(mlp()), batches, config)
    tight = cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory=limit)
    assert same(cntlora.compute_plan(wrapped(mlp()), batches, config), tight)
    assert tight.memory["passes"] > 3  # once for the ranks, once more for the factors


def test_a_generator_is_read_once_and_no_further() -> None:
    batches = token_batches(SIZES)
    config = InitConfig(method="self", num_batches=2)
    limit = least(wrapped(mlp()), batches[:2], config)
    source = chain(batches)
    plan = cntlora.compute_plan(wrapped(mlp()), source, config, max_memory=limit)
    assert plan.memory["passes"] > 1 and len(list(source)) == 2
    assert same(plan, cntlora.compute_plan(wrapped(mlp()), batches[:2], config))


def test_a_transformer_with_padding_in_several_passes() -> None:
    model, batches = adapted("bert"), text_batches()
    free = cntlora.compute_plan(model, batches, config=cntlora.InitConfig(method="self"))
    limit = least(model, batches, InitConfig(method="self"))
    tight = cntlora.compute_plan(model, batches, max_memory=limit, config=cntlora.InitConfig(method="self"))
    assert tight.memory["passes"] > 1 and same(free, tight)
    assert all(site.masked for site in tight.sites.values())


def test_sites_that_share_an_input_are_read_together() -> None:
    """q, k and v see one tensor: their statistics are one, so that all three are read where one is."""
    budget = Budget(parse_limits(None))
    sites = {site.name: site for site in find_sites(wrapped(mlp()))[0]}
    budget.next_pass(list(sites.values()))
    assert budget.admits(sites["q"], False)
    used = dict(budget._used)
    assert budget.admits(sites["k"], True) and budget._used == used
    assert budget.admits(sites["up"], False) and budget._used != used  # control


def test_too_little_for_one_site_says_how_much_it_needs() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(256, 256)), LoraConfig(r=4, target_modules=["0"]))
    batches = [torch.randn(300, 256)]
    with pytest.raises(
        ValueError, match=r"max_memory: 1MiB is too little: site 0 .256×256. alone needs \d+MiB"
    ) as caught:
        cntlora.compute_plan(model, batches, max_memory="1MiB", config=cntlora.InitConfig(method="self"))
    need = str(caught.value).split("alone needs ")[1].split(";")[0]
    assert cntlora.compute_plan(model, batches, max_memory=need, config=cntlora.InitConfig(method="self")).sites


def test_the_model_is_left_as_found_after_a_limit_that_is_too_small() -> None:
    model = wrapped(mlp())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="max_memory"):
        cntlora.initialize(model, token_batches(SIZES), max_memory=1, config=cntlora.InitConfig(method="self"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sums_in_a_file_give_the_same_bits_and_leave_no_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config, batches = InitConfig(method=method), token_batches(SIZES)
    free = cntlora.compute_plan(wrapped(mlp()), batches, config)
    limit = least(wrapped(mlp()), batches, config, passes=1) - free.memory["device"] // 4
    plan = cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory={"device": limit, "disk": "1MiB"})
    assert plan.memory["passes"] == 1 and 0 < plan.memory["disk"] <= free.memory["device"]
    assert same(plan, free)
    without = cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory=limit)  # control
    assert without.memory["passes"] > 1 and without.memory["disk"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_a_full_disk_is_one_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    torch.set_num_threads(threads)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.posix_fallocate", full)
    config, batches = InitConfig(method="self"), token_batches(SIZES)
    limit = least(wrapped(mlp()), batches, config, passes=1) - 100
    with pytest.raises(OSError, match="no room for 1KiB of statistics"):
        cntlora.compute_plan(wrapped(mlp()), batches, config, max_memory={"device": limit, "disk": "1MiB"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "lora_da", "gora", "descent", "whitened_descent"])
def test_gradients_are_summed_in_a_file_too_but_in_one_pass(method: str) -> None:
    config, batches = InitConfig(method=method), text_batches()
    free = cntlora.compute_plan(adapted("bert"), batches, config)
    need = free.memory["device"]
    with pytest.raises(ValueError, match="max_memory"):
        cntlora.compute_plan(adapted("bert"), batches, config, max_memory=1)
    plan = cntlora.compute_plan(adapted("bert"), batches, config, max_memory={"device": 10**9, "disk": need})
    assert same(free, plan) and plan.memory["passes"] == 1


def test_the_report_says_what_was_chosen() -> None:
    model, batches = wrapped(mlp()), token_batches(SIZES)
    limit = least(model, batches, InitConfig(method="self"))
    report = cntlora.initialize(model, batches, max_memory=limit, config=cntlora.InitConfig(method="self"))
    assert report.to_dict()["memory"]["passes"] > 1
    assert "passes over the batches" in str(report)
    assert "passes over the batches" not in str(
        cntlora.initialize(wrapped(mlp()), batches, config=cntlora.InitConfig(method="self"))
    )


def test_a_plan_keeps_what_was_chosen_in_its_file(tmp_path: Path) -> None:
    plan = cntlora.compute_plan(
        wrapped(mlp()),
        token_batches(SIZES),
        max_memory={"device": 10**7, "disk": "1MiB"},
        config=cntlora.InitConfig(method="self"),
    )
    plan.save(tmp_path / "plan.safetensors")
    assert InitPlan.load(tmp_path / "plan.safetensors").memory == plan.memory

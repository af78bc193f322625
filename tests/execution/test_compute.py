"""`compute_plan` on PEFT-wrapped modules: the reference on inputs that the test records itself on the bare model."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import reference
from tests.cases import (
    MODES,
    SIZES,
    TOLERANCE,
    Mlp,
    Mode,
    added,
    array,
    draw,
    inputs_of,
    lora,
    mlp,
    precision_of,
    reference_delta,
    relative_error,
    seeded,
    token_batches,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

import cntlora.execution.site_spectra as site_spectra
from cntlora import InitConfig, InitPlan, compute_plan
from cntlora.data.batches import to_device
from cntlora.data.collect import collect
from cntlora.linalg.low_rank import LowRank
from cntlora.linalg.moments import Moments
from cntlora.linalg.pseudo_inverse import default_rtol
from cntlora.model.sites import find_sites

mode = pytest.mark.parametrize("mode", MODES, ids=repr)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
KEEP: dict[str, Any] = {"base": "keep"}


def plan_of(model: nn.Module, batches: Any, config: InitConfig | None = None, **more: Any) -> InitPlan:
    return compute_plan(
        model, batches, config or InitConfig.from_dict({"method": "self", **KEEP}), progress=False, **more
    )


def same(one: InitPlan, other: InitPlan, tolerance: float = 0.0) -> bool:
    """Return whether two plans hold the same factors: the same bits, or within a relative error."""
    if list(one.sites) != list(other.sites):
        return False
    for name, site in one.sites.items():
        for key in ("A", "B", "singular_values"):
            a, b = getattr(site, key), getattr(other.sites[name], key)
            if a.shape != b.shape or not (torch.equal(a, b) or relative_error(a, b) <= tolerance):
                return False
    return True


def truncated(M: np.ndarray, r: int, decomposition: str = "svd") -> np.ndarray:
    """[M]_r by the reference."""
    if decomposition == "svd":
        B, A = reference.svd_factors(M, r)
    else:
        B, A = reference.qr_factors(M, r, decomposition == "qr_pivoted")
    return B @ A


def weights_of(base: nn.Module) -> dict[str, np.ndarray]:
    return {name: array(base.get_submodule(name).weight) for name in Mlp.targets}


# --- the whole of it against the reference ------------------------------------------------------------------


@both_dtypes
@mode
def test_a_plan_equals_the_reference(mode: Mode, dtype: torch.dtype, record_property: Callable) -> None:
    """scaling·B·A of base "keep" = strength·[ΔW]_r, for both scalings, both grams, both W_0 and weighted batches."""
    worst = 0.0
    batches = token_batches(SIZES, dtype=dtype)
    inputs = inputs_of(mlp(dtype=dtype), batches)
    W = weights_of(mlp(dtype=dtype))
    settings: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({}, {}, {}),
        ({"use_rslora": True, "alpha": 5}, {"gram": "mean"}, {"gram_kind": "mean"}),
        ({"alpha": 1}, {"initial_weight": "zero", "strength": 0.5}, {"initial": "zero"}),
        ({"r": 4, "alpha": 7}, {"batch_weights": (0.5, 2, 1, 0)}, {"weights": (0.5, 2, 1, 0)}),
        ({"r": 2}, {"rtol": 0.1, "gram": "mean"}, {"rtol": 0.1, "gram_kind": "mean"}),
    ]
    for adapter, options, arguments in settings:
        model = wrapped(mlp(dtype=dtype), lora(**adapter))
        config = InitConfig.from_dict({**mode.options, **KEEP, **options})
        plan = plan_of(model, batches, config)
        assert list(plan.sites) == list(Mlp.targets)
        r = adapter.get("r", 3)
        for name, site in plan.sites.items():
            M = reference_delta(mode, W[name], inputs[name], name, precision=precision_of(dtype), **arguments)
            expected = options.get("strength", 2.0) * truncated(M, r)  # None is 2 for the paper's modes
            s = adapter.get("alpha", 6) / (r**0.5 if adapter.get("use_rslora") else r)
            assert site.scaling == pytest.approx(s, rel=1e-12)
            assert site.A.dtype == site.B.dtype == dtype
            error = relative_error(added(site), expected)
            assert error <= TOLERANCE[dtype], (name, adapter, options)
            assert relative_error(site.singular_values, np.linalg.svd(M, compute_uv=False)) < 1e-6
            assert site.delta_norm == pytest.approx(float(np.linalg.norm(M)), rel=1e-6)
            worst = max(worst, error)
        other = reference_delta(mode, W["up"], inputs["up"][:3], "up", **{**arguments, "weights": None})
        if options.get("batch_weights") is None:  # control: a plan of three of the four batches differs
            assert relative_error(added(plan.sites["up"]), truncated(other, r)) > 1e-3
    record_property("worst", worst)


@both_dtypes
@mode
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_factors_are_those_of_the_reference(p: float, mode: Mode, dtype: torch.dtype) -> None:
    """B = (strength/s)^(1−p) U S^(1−p) and A = (strength/s)^p S^p Vᵀ, factor by factor and sign by sign."""
    batches = token_batches(SIZES, dtype=dtype)
    base = mlp(dtype=dtype)
    inputs, W = inputs_of(base, batches), weights_of(base)
    plan = plan_of(
        wrapped(base, lora(r=3, alpha=4, use_rslora=True)),
        batches,
        InitConfig.from_dict({**mode.options, **KEEP, "p": p}),
    )
    for name, site in plan.sites.items():
        M = reference_delta(mode, W[name], inputs[name], name, precision=precision_of(dtype))
        B, A = reference.svd_factors(2 * 3**0.5 / 4 * M, 3, p)
        assert relative_error(site.A, A) <= 10 * TOLERANCE[dtype]  # vectors feel the gaps of the spectrum
        assert relative_error(site.B, B) <= 10 * TOLERANCE[dtype]
        if p != 0.5:
            assert relative_error(site.A, reference.svd_factors(2 * 3**0.5 / 4 * M, 3, 0.5)[1]) > 1e-2  # control


@both_dtypes
@mode
@pytest.mark.parametrize("decomposition", ["qr", "qr_pivoted"])
def test_qr_plans_equal_the_reference(decomposition: str, mode: Mode, dtype: torch.dtype) -> None:
    batches = token_batches(SIZES, dtype=dtype)
    base = mlp(dtype=dtype)
    inputs, W = inputs_of(base, batches), weights_of(base)
    config = InitConfig.from_dict({**mode.options, **KEEP, "decomposition": decomposition, "strength": 1.5})
    plan = plan_of(wrapped(base), batches, config)
    for name, site in plan.sites.items():
        M = reference_delta(mode, W[name], inputs[name], name, precision=precision_of(dtype))
        assert relative_error(added(site), 1.5 * truncated(M, 3, decomposition)) <= TOLERANCE[dtype]
        assert relative_error(site.B, reference.qr_factors(M, 3, decomposition == "qr_pivoted")[0]) <= TOLERANCE[dtype]
        assert relative_error(added(site), 1.5 * truncated(M, 3)) > 1e-3  # control: it is not the SVD


def test_injected_adapters_and_wrapped_models_get_the_same_plan() -> None:
    batches = token_batches(SIZES)
    one = plan_of(wrapped(mlp()), batches)
    assert same(one, plan_of(wrapped(mlp(), how="inject_adapter_in_model"), batches))
    assert not same(one, plan_of(wrapped(mlp(seed=1)), batches))  # control


def test_a_transposed_layer_equals_its_linear_twin() -> None:
    class Twin(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.layer = Conv1D(7, 10) if transposed else nn.Linear(10, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    linear, conv = seeded(lambda: Twin(False)), seeded(lambda: Twin(True))
    conv.get_submodule("layer").load_state_dict(
        {"weight": linear.layer.weight.mT.contiguous(), "bias": linear.layer.bias}  # type: ignore[union-attr]
    )
    batches = token_batches(SIZES)
    plans = [
        plan_of(wrapped(twin, lora(targets=["layer"], fan_in_fan_out=twin is conv)), batches) for twin in (linear, conv)
    ]
    assert same(*plans, tolerance=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 6, 40])
def test_the_function_added_does_not_depend_on_alpha_or_fold_alpha(alpha: float, use_rslora: bool) -> None:
    batches = token_batches(SIZES)
    expected = plan_of(wrapped(mlp()), batches)
    model = wrapped(mlp(), lora(alpha=alpha, use_rslora=use_rslora))
    for fold in (False, True):
        plan = plan_of(model, batches, InitConfig.from_dict({"method": "self", **KEEP, "fold_alpha": fold}))
        for name, site in plan.sites.items():
            assert relative_error(added(site), added(expected.sites[name])) < 1e-12
            assert (site.scaling == 1.0 and site.alpha == site.rank and not site.use_rslora) or not fold
            rank = site.file_rank**0.5 if site.use_rslora else site.file_rank
            assert site.alpha / rank == pytest.approx(site.scaling, rel=1e-12)
    bare = array(plan.sites["up"].B) @ array(plan.sites["up"].A)
    other = plan_of(model, batches).sites["up"]
    same_scaling = other.scaling == pytest.approx(1.0)
    assert same_scaling or relative_error(array(other.B) @ array(other.A), bare) > 0.1  # control


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("base", ["offset", "paired"])
@both_dtypes
def test_offset_and_paired_plans_add_exactly_nothing(dtype: torch.dtype, base: str, r: int) -> None:
    batches = token_batches(SIZES, dtype=dtype)
    plan = plan_of(wrapped(mlp(dtype=dtype), lora(r=r)), batches, InitConfig(method="self", base=base))
    keep = plan_of(wrapped(mlp(dtype=dtype), lora(r=r)), batches)
    for name, site in plan.sites.items():
        assert site.file_rank == (2 * r if base == "offset" else r) and site.rank == r
        h = site.file_rank // 2
        first, second = site.B[:, :h] @ site.A[:h], site.B[:, h : 2 * h] @ site.A[h : 2 * h]
        assert not bool((first + second).any()) and not bool(site.B[:, 2 * h :].any())
        assert h == 0 or bool(first.any())  # control: each half does something
        assert torch.equal(site.A[:h], keep.sites[name].A[:h]) and torch.equal(site.B[:, :h], keep.sites[name].B[:, :h])
        if base == "paired" and r % 2:
            assert torch.equal(site.A[-1], keep.sites[name].A[h])
        x = draw(1, 20, site.A.shape[1]).to(dtype)
        low_rank = (x @ site.A.mT) @ site.B.mT
        assert float(low_rank.abs().max()) <= 1e3 * torch.finfo(dtype).eps * float((x @ keep.sites[name].A.mT).norm())


# --- batches and eq. 18 -------------------------------------------------------------------------------------


@mode
def test_splitting_a_batch_in_two_changes_the_estimate_and_its_layout_does_not(mode: Mode) -> None:
    x = draw(0, 8, 5, 10)
    config = InitConfig.from_dict({**mode.options, **KEEP})
    whole = plan_of(wrapped(mlp()), [x], config)
    for shape in ((40, 10), (4, 10, 10), (1, 40, 10)):
        assert same(plan_of(wrapped(mlp()), [x.reshape(shape)], config), whole, tolerance=1e-7)
    shuffled = x.reshape(40, 10)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for name, site in plan_of(wrapped(mlp()), [shuffled], config).sites.items():
        assert relative_error(added(site), added(whole.sites[name])) < 1e-7
    halves = plan_of(wrapped(mlp()), [x[:4], x[4:]], config)
    for name, site in halves.sites.items():
        assert relative_error(added(site), added(whole.sites[name])) > 1e-3  # the paper's definition, per batch


def test_only_num_batches_are_taken_from_a_one_shot_iterator() -> None:
    batches = token_batches(SIZES)
    iterator = iter(batches)
    plan = plan_of(wrapped(mlp()), iterator, InitConfig.from_dict({"method": "self", **KEEP, "num_batches": 2}))
    assert plan.batches == 2
    assert [id(left) for left in iterator] == [id(batch) for batch in batches[2:]]
    assert same(plan, plan_of(wrapped(mlp()), batches[:2]))
    assert not same(plan, plan_of(wrapped(mlp()), batches[:3]))  # control
    assert plan_of(wrapped(mlp()), iter(batches)).batches == 4  # fewer than the default 8: all


def test_weights_must_match_the_batches_read() -> None:
    batches = token_batches(SIZES)
    for weights in ((1.0, 1.0), (1.0,) * 5):
        with pytest.raises(ValueError, match=f"batch_weights: expected one for each of .*batches.* got {len(weights)}"):
            plan_of(wrapped(mlp()), batches, InitConfig.from_dict({"method": "self", "batch_weights": weights}))
    ones = plan_of(wrapped(mlp()), batches, InitConfig.from_dict({"method": "self", **KEEP, "batch_weights": (1,) * 4}))
    assert same(ones, plan_of(wrapped(mlp()), batches))
    assert not same(
        ones,
        plan_of(
            wrapped(mlp()), batches, InitConfig.from_dict({"method": "self", **KEEP, "batch_weights": (1, 1, 1, 2)})
        ),
    )


class Mapped(nn.Module):
    """Accepts its features under a name, by position, or both ways with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.body(features)


class Pair(NamedTuple):
    features: Tensor
    attention_mask: Tensor | None = None


class Plain(UserDict):  # type: ignore[type-arg]
    """Stand-in for transformers' BatchEncoding: a UserDict, not a dict."""


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


KINDS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list of tensors": list,
    "generator": lambda xs: (x for x in xs),
    "tuples": lambda xs: [(x,) for x in xs],
    "lists": lambda xs: [[x] for x in xs],
    "named tuples": lambda xs: [Pair(x) for x in xs],
    "dicts": lambda xs: [{"features": x} for x in xs],
    "user dicts": lambda xs: [Plain(features=x) for x in xs],
    "BatchEncoding": lambda xs: [BatchEncoding({"features": x}) for x in xs],
    "dicts with more": lambda xs: [{"features": x, "labels": None} for x in xs],
    "DataLoader": lambda xs: DataLoader(torch.cat(xs), batch_size=2),  # type: ignore[arg-type]
    "DataLoader of tuples": lambda xs: DataLoader(TensorDataset(torch.cat(xs)), batch_size=2),
    "DataLoader of a stream": lambda xs: DataLoader(Stream(list(torch.cat(xs))), batch_size=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_may_be_of_any_kind(kind: str) -> None:
    batches = token_batches([(2, 5)] * 3)
    expected = plan_of(wrapped(seeded(Mapped)), batches)
    assert same(plan_of(wrapped(seeded(Mapped)), KINDS[kind](batches)), expected)


def test_a_kind_of_batch_that_needs_help_says_so_and_forward_helps() -> None:
    batches = token_batches(SIZES)
    odd = [{"pixels": x} for x in batches]
    with pytest.raises(TypeError, match=r"\['pixels'\].*forward="):
        plan_of(wrapped(seeded(Mapped)), odd)
    helped = plan_of(wrapped(seeded(Mapped)), odd, forward=lambda model, batch: model(batch["pixels"]))
    assert same(helped, plan_of(wrapped(seeded(Mapped)), batches))
    for single in ({"features": batches[0]}, batches[0], "text"):
        with pytest.raises(TypeError, match="put it in a list"):
            plan_of(wrapped(seeded(Mapped)), single)
    with pytest.raises(TypeError, match="expected an iterable"):
        plan_of(wrapped(seeded(Mapped)), 3)
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="at least one batch"):
            plan_of(wrapped(seeded(Mapped)), empty)


def test_tensors_move_to_the_device_in_any_container_and_the_callers_stay() -> None:
    x, meta = torch.ones(2), torch.device("meta")
    batch = Plain(a=x, b=[x, Pair(x, None)], c={"d": (x, "text", 3)}, e=BatchEncoding({"f": x}))
    moved = to_device(batch, meta)
    assert isinstance(moved["b"][1], Pair) and moved["b"][1].attention_mask is None
    assert moved["c"]["d"][1:] == ("text", 3)
    tensors = (moved["a"], moved["b"][0], moved["b"][1].features, moved["c"]["d"][0], moved["e"]["f"])
    assert {tensor.device for tensor in tensors} == {meta}
    assert batch["a"] is x and batch["b"][0] is x and batch["e"]["f"] is x  # control: the originals did not move


def test_the_callers_batches_are_left_alone() -> None:
    batch = Plain(features=draw(0, 2, 5, 10), attention_mask=torch.ones(2, 5, dtype=torch.long))
    kept = {key: value.clone() for key, value in batch.items()}
    plan_of(wrapped(seeded(Mapped)), [batch])
    assert list(batch) == list(kept) and all(torch.equal(batch[key], kept[key]) for key in kept)


# --- masks --------------------------------------------------------------------------------------------------


def padded(x: Tensor, lengths: list[int], side: str) -> dict[str, Tensor]:
    """The first `lengths[i]` tokens of each row, padded with large junk on one side."""
    width = x.shape[1]
    features, mask = 50 + 50 * draw(7, *x.shape), torch.zeros(x.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        features[row, where] = x[row, :length]
        mask[row, where] = 1
    return {"features": features, "attention_mask": mask}


LENGTHS = [[5, 2, 1], [3, 5, 4]]


def packed(x: Tensor, lengths: list[int]) -> Tensor:
    """The tokens that count, in one row (1, tokens, d)."""
    return torch.cat([x[row, :length] for row, length in enumerate(lengths)])[None]


@mode
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, mode: Mode) -> None:
    xs = [draw(i, 3, 5, 10) for i in range(2)]
    config = InitConfig.from_dict({**mode.options, **KEEP})
    plain = plan_of(wrapped(seeded(Mapped)), [packed(x, n) for x, n in zip(xs, LENGTHS, strict=True)], config)
    batches = [padded(x, n, side) for x, n in zip(xs, LENGTHS, strict=True)]
    masked = plan_of(wrapped(seeded(Mapped)), batches, config)
    assert same(masked, plain, tolerance=1e-9)
    assert all(site.masked and site.tokens == 8 + 12 for site in masked.sites.values())
    assert not any(site.masked for site in plain.sites.values())
    blind = plan_of(wrapped(seeded(Mapped)), batches, config, token_mask="none")  # control: the junk would count
    assert not same(blind, plain, tolerance=1e-2)
    assert all(not site.masked and site.tokens == 30 for site in blind.sites.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_also_fits_inputs_that_a_layer_sees_flattened(side: str) -> None:
    class Flat(Mapped):
        def forward(
            self, features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            return self.body(features.reshape(-1, features.shape[-1])).reshape(*features.shape[:-1], -1)

    batch = padded(draw(0, 3, 5, 10), LENGTHS[0], side)
    flat = plan_of(wrapped(seeded(Flat)), [batch])
    assert same(flat, plan_of(wrapped(seeded(Mapped)), [batch]), tolerance=1e-9)
    assert {site.tokens for site in flat.sites.values()} == {8}
    transposed = {**batch, "attention_mask": batch["attention_mask"].mT}  # control: a mask that does not fit is none
    unfit = plan_of(wrapped(seeded(Mapped)), [transposed])
    assert {(site.tokens, site.masked) for site in unfit.sites.values()} == {(15, False)}


def test_which_tokens_count_can_be_chosen() -> None:
    x = draw(0, 2, 6, 10)
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 1, 2, 3, -100, 0]])
    batch = {"features": x, "attention_mask": attention, "labels": labels}

    def counted(rule: Any, batch: Any = batch) -> InitPlan:
        return plan_of(wrapped(seeded(Mapped)), [batch], token_mask=rule)

    def direct(mask: Tensor) -> InitPlan:
        return plan_of(wrapped(seeded(Mapped)), [x[mask.bool()][None]])

    both = attention.bool() & (labels != -100)
    assert same(counted(None), direct(attention), 1e-9)
    assert same(counted("labels"), direct(both), 1e-9)
    assert same(counted("none"), direct(torch.ones(2, 6)), 1e-9)
    assert same(counted(lambda b: b["labels"] == 3), direct(labels == 3), 1e-9)
    assert same(counted(lambda b: None), counted("none"))
    assert same(counted("labels", {"features": x, "labels": labels}), direct(labels != -100), 1e-9)
    assert not same(counted(None), counted("labels"), 1e-3)  # control
    sequence = {"features": x, "attention_mask": attention, "labels": torch.tensor([0, 1])}
    assert same(counted(None, sequence), counted(None))  # labels of a classifier do not disturb


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        ("label", {}, "token_mask: expected None, 'labels', 'none' or a function.*'label'"),
        ("labels", {"labels": torch.zeros(2)}, r"needs labels of shape \(batch, tokens\), got \(2,\)"),
        ("labels", {"labels": None}, r"needs labels of shape \(batch, tokens\), got NoneType"),
        ("labels", {"labels": torch.full((2, 6), -100)}, "batch 0: its mask .* hides every token"),
        (None, {"attention_mask": torch.zeros(2, 6)}, "batch 0: its mask .* hides every token"),
        (lambda b: torch.ones(6), {}, r"must return a \(batch, tokens\) mask or None, got \(6,\)"),
        (lambda b: [1], {}, r"must return a \(batch, tokens\) mask or None, got list"),
    ],
)
def test_a_mask_that_makes_no_sense_is_an_error(rule: Any, change: dict[str, Any], message: str) -> None:
    batch = {"features": draw(0, 2, 6, 10), "attention_mask": torch.ones(2, 6), "labels": torch.ones(2, 6), **change}
    with pytest.raises(ValueError, match=message):
        plan_of(wrapped(seeded(Mapped)), [batch], token_mask=rule)


# --- inputs that are shared, repeated, edited ---------------------------------------------------------------


def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the shape of whatever enters a Moments."""
    calls: list[tuple[int, int]] = []
    plain = Moments.update

    def counted(self: Moments, rows: Tensor, *more: Any) -> None:
        calls.append((rows.shape[0], rows.shape[1]))
        plain(self, rows, *more)

    monkeypatch.setattr(Moments, "update", counted)
    return calls


def test_inputs_that_are_shared_meet_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = updates(monkeypatch)
    plan_of(wrapped(mlp()), token_batches(SIZES[:2]))
    # q, k, v once; up; down: three a batch for five sites
    assert calls == [(6, 10), (6, 14), (6, 14), (28, 10), (28, 14), (28, 14)]

    class Copies(Mlp):
        def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
            h = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x.clone())) + self.v(x.clone())
            return self.down(torch.nn.functional.gelu(self.up(h)))

    calls.clear()
    separate = plan_of(wrapped(seeded(Copies)), token_batches(SIZES[:2]))
    assert len(calls) == 10  # control: equal values are not the same tensor
    assert same(separate, plan_of(wrapped(mlp()), token_batches(SIZES[:2])), 1e-12)


class Twice(nn.Module):
    """One layer called twice in a forward pass, another that shares only its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x).sum(-1) + self.a(torch.tanh(self.a(x))).sum(-1)


@mode
@pytest.mark.parametrize("tokens", [(1, 4), (3, 4)], ids=["b<d", "b>d"])
def test_a_layer_called_twice_sees_both_inputs_as_one_batch(mode: Mode, tokens: tuple[int, int]) -> None:
    base = seeded(Twice)
    batches = token_batches([tokens, tokens])
    once = inputs_of(base, batches, ["a", "b"])
    W = {name: array(base.get_submodule(name).weight) for name in ("a", "b")}
    plan = plan_of(wrapped(base, lora(targets=["a", "b"])), batches, InitConfig.from_dict({**mode.options, **KEEP}))
    joined = [np.hstack(once["a"][i : i + 2]) for i in (0, 2)]
    for name, inputs in (("a", joined), ("b", once["b"])):
        expected = 2 * truncated(reference_delta(mode, W[name], inputs, name), 3)
        assert relative_error(added(plan.sites[name]), expected) < 1e-8
    assert (
        relative_error(added(plan.sites["b"]), 2 * truncated(reference_delta(mode, W["b"], once["b"], "b"), 3)) < 1e-8
    )
    assert plan.sites["a"].tokens == 2 * plan.sites["b"].tokens
    assert plan.sites["a"].batches == plan.sites["b"].batches == 2
    apart = reference_delta(mode, W["a"], once["a"], "a")  # control: four batches are not two
    assert relative_error(added(plan.sites["a"]), 2 * truncated(apart, 3)) > 1e-3


def test_a_tensor_seen_twice_by_one_layer_counts_twice() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a(x)

    base, x = seeded(Again), draw(0, 3, 4, 10)
    W, X = array(base.a.weight), array(x.reshape(-1, 10)).T  # type: ignore[union-attr]
    plan = plan_of(wrapped(base, lora(targets=["a"])), [x])
    expected = reference.delta(W, [np.hstack([X, X])], "self")
    assert plan.sites["a"].tokens == 24
    assert relative_error(added(plan.sites["a"]), 2 * truncated(expected, 3)) < 1e-8
    assert relative_error(added(plan.sites["a"]), 2 * truncated(reference.delta(W, [X], "self"), 3)) > 1e-3  # control


class Edited(nn.Module):
    """Edits the tensor that the first layer saw, in place, before the second one sees it."""

    edit = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        y = self.a(h)
        if self.edit:
            h.mul_(torch.linspace(0.5, 3, 10, dtype=h.dtype)).add_(1)
        return y + self.b(h)


class Unedited(Edited):
    edit = False


@both_dtypes
@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", [(1, 4), (3, 7)], ids=["b<d", "b>d"])
def test_a_tensor_edited_between_two_layers_is_another_input(
    tokens: tuple[int, int], how: Callable[[], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        with how():
            model(batch)

    batches = token_batches([tokens], dtype=dtype)
    base = seeded(Edited, dtype=dtype)
    inputs = inputs_of(base, batches, ["a", "b"])
    W = {name: array(base.get_submodule(name).weight) for name in ("a", "b")}
    plan = plan_of(wrapped(base, lora(targets=["a", "b"])), batches, forward=forward)
    for name, site in plan.sites.items():
        delta = reference.delta(W[name], inputs[name], "self", precision=precision_of(dtype))
        assert relative_error(added(site), 2 * truncated(delta, 3)) < TOLERANCE[dtype], name
    swapped = 2 * truncated(reference.delta(W["b"], inputs["a"], "self"), 3)
    assert relative_error(added(plan.sites["b"]), swapped) > 1e-2  # control: the two inputs do differ
    calls = updates(monkeypatch)
    plan_of(wrapped(seeded(Unedited, dtype=dtype), lora(targets=["a", "b"])), batches)
    assert len(calls) == 1  # control: without the edit they share


def test_an_address_that_is_used_again_is_another_input() -> None:
    class Recycled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(12)])
            self.addresses: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros((), dtype=x.dtype)
            for i, layer in enumerate(self.layers):
                h = x * (i + 1)
                self.addresses.append(h.data_ptr())
                total = total + layer(h).sum()
                del h
            return total

    base, x = seeded(Recycled), draw(0, 64, 10)
    names = [f"layers.{i}" for i in range(12)]
    W = {name: array(base.get_submodule(name).weight) for name in names}
    plan = plan_of(wrapped(base, lora(targets=[f"layers.{i}" for i in range(12)])), [x])
    assert len(set(base.addresses)) < 12  # control: the allocator does hand out the same memory again
    for i, name in enumerate(names):
        expected = reference.delta(W[name], [array((i + 1) * x).T], "self")
        assert relative_error(added(plan.sites[name]), 2 * truncated(expected, 3)) < 1e-8


def test_a_layer_may_be_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x=x)

    class Positional(Keyword):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    batches = token_batches(SIZES)
    plans = [plan_of(wrapped(seeded(kind), lora(targets=["a"])), batches) for kind in (Keyword, Positional)]
    assert same(*plans)


# --- tokens, ranks of the data, starved sites ---------------------------------------------------------------


class Routed(nn.Module):
    """A mixture of two experts: the sign of the first feature decides; a third is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 10)
        chosen = x[:, 0] > 0
        self.up(x[chosen])
        if bool((~chosen).any()):
            self.down(x[~chosen])
        return x


def test_tokens_are_counted_per_site_and_batches_without_any_do_not_dilute() -> None:
    x = draw(0, 3, 12, 10)
    x[1, :, 0] = x[1, :, 0].abs()  # no token for `down` in the second batch
    x[2, :, 0] = -x[2, :, 0].abs() - 0.1  # none for `up` in the third, which is called with no row
    batches = list(x)
    model = wrapped(seeded(Routed), lora(targets=["up", "down"]))
    W = {name: array(seeded(Routed).get_submodule(name).weight) for name in ("up", "down")}
    plan = plan_of(model, batches)
    seen = {
        "up": [array(b[b[:, 0] > 0]).T for b in batches if bool((b[:, 0] > 0).any())],
        "down": [array(b[b[:, 0] <= 0]).T for b in batches if bool((b[:, 0] <= 0).any())],
    }
    for name, site in plan.sites.items():
        assert site.batches == len(seen[name]) == 2
        assert site.tokens == sum(X.shape[1] for X in seen[name])
        expected = reference.delta(W[name], seen[name], "self")
        assert relative_error(added(site), 2 * truncated(expected, 3)) < 1e-8
        assert site.effective_rank == min(int(np.linalg.matrix_rank(X)) for X in seen[name])
        diluted = reference.delta(W[name], [*seen[name], np.zeros((10, 1))], "self")
        assert relative_error(added(site), 2 * truncated(diluted, 3)) > 1e-2  # control
    assert plan.batches == 3


def test_a_site_that_sees_no_token_is_named() -> None:
    batches = token_batches(SIZES)
    model = wrapped(seeded(Routed), lora(targets=["up", "down", "idle"]))
    with pytest.raises(ValueError, match="site idle cannot be initialised.*not called in any of 4.*on_missing='warn'"):
        plan_of(model, batches)
    with pytest.warns(UserWarning, match="site idle .*left as plain LoRA"):
        plan = plan_of(model, batches, on_missing="warn")
    assert list(plan.sites) == ["up", "down"] and list(plan.skipped) == ["idle"]
    negative = [-batch.abs() for batch in batches]
    with pytest.raises(ValueError, match="site up .*saw no token that counts in 4 batches"):
        plan_of(wrapped(seeded(Routed), lora(targets=["up", "down"])), negative)
    with pytest.raises(ValueError, match="on_missing: expected one of raise, warn, got 'ignore'"):
        plan_of(model, batches, on_missing="ignore")


@mode
def test_fewer_tokens_than_rank_works_and_the_effective_rank_says_so(mode: Mode) -> None:
    base, batches = mlp(), token_batches([(1, 2), (1, 3)])
    inputs, W = inputs_of(base, batches), weights_of(base)
    plan = plan_of(wrapped(base, lora(r=5)), batches, InitConfig.from_dict({**mode.options, **KEEP}))
    for name, site in plan.sites.items():
        assert site.effective_rank == 2 and site.tokens == 5 and site.rank == 5
        expected = reference_delta(mode, W[name], inputs[name], name)
        assert relative_error(added(site), 2 * truncated(expected, 5)) < 1e-8
    enough = plan_of(
        wrapped(mlp(), lora(r=5)), token_batches([(4, 20)]), InitConfig.from_dict({**mode.options, **KEEP})
    )
    assert [site.effective_rank for site in enough.sites.values()] == [10, 10, 10, 14, 14]  # control


@mode
def test_the_tolerance_reported_is_the_one_in_force(mode: Mode) -> None:
    batches = token_batches(SIZES)
    plan = plan_of(wrapped(mlp()), batches, InitConfig.from_dict(mode.options))
    for name, site in plan.sites.items():
        k, d = site.B.shape[0], site.A.shape[1]
        largest = k if mode.options["method"] == "shift" else 28  # tokens of the largest batch, not of all
        expected = default_rtol(d, largest, torch.float64)
        if mode.options["method"] == "self":  # of float64 inputs the sums are what rounds, on D; the default is on D^½
            assert site.rtol == pytest.approx(expected**0.5, rel=1e-12), name
        else:
            assert site.rtol == expected, name
    letter = plan_of(wrapped(mlp()), batches, InitConfig.from_dict({**mode.options, "rtol": 0.0}))
    assert letter.sites["q"].rtol == default_rtol(10, 14 if mode.options["method"] == "shift" else 28, torch.float64)
    given = plan_of(wrapped(mlp()), batches, InitConfig.from_dict({**mode.options, "rtol": 1e-3}))
    assert {site.rtol for site in given.sites.values()} == {1e-3}


@pytest.mark.parametrize(("method", "own"), [("cross", 1e-3), ("shift", 1e-3), ("self", 0.0)])
def test_the_tolerance_of_a_method_is_its_default(method: str, own: float) -> None:
    """1e-3 for cross and shift, as the study says; self keeps that of rounding, as printed in the paper."""
    batches = token_batches(SIZES)
    plans = {
        rtol: plan_of(wrapped(mlp()), batches, InitConfig.from_dict({"method": method, "rtol": rtol}))
        for rtol in (None, own, 0.0, 0.3)
    }
    assert same(plans[None], plans[own])
    assert not same(plans[None], plans[0.3], tolerance=1e-3)  # the control: a tolerance has an effect
    assert same(plans[None], plans[0.0], tolerance=1e-9) == (own == 0.0)


# --- variable adapter structure -----------------------------------------------------------------------------


class Uneven(nn.Module):
    """Two layers with nearly flat spectra, and one of rank about one that a fixed rank would waste."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.steep, self.other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(x) + self.steep(x) + self.other(x)


def uneven(dtype: torch.dtype = torch.float64) -> nn.Module:
    base = seeded(Uneven, dtype=dtype)
    values = torch.full((16,), 1e-3, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 0.8, 0.7])
    U, V = torch.linalg.qr(draw(0, 16, 16))[0], torch.linalg.qr(draw(1, 16, 16))[0]
    steep, flat = base.get_submodule("steep"), base.get_submodule("flat")
    with torch.no_grad():
        steep.weight.copy_(U * values @ V.mT)
        flat.weight.copy_(U @ V.mT * 0.5)
    return base


@mode
def test_adaptive_ranks_meet_the_budget_and_are_those_of_the_reference(mode: Mode) -> None:
    batches = token_batches(SIZES)
    base = mlp()
    inputs, W = inputs_of(base, batches), weights_of(base)
    deltas = {name: reference_delta(mode, W[name], inputs[name], name) for name in Mlp.targets}
    for budget, low, high in ((None, 0, None), (7, 0, None), (20, 2, 6), (12, 0, 3)):
        config = InitConfig.from_dict(
            {**mode.options, **KEEP, "adaptive_ranks": True, "rank_budget": budget, "min_rank": low, "max_rank": high}
        )
        plan = plan_of(wrapped(mlp()), batches, config)
        ranks = {name: site.rank for name, site in plan.sites.items()}
        assert sum(ranks.values()) == (3 * 5 if budget is None else budget)  # K = r × sites unless given
        assert ranks == reference.allocate(deltas, 15 if budget is None else budget, low, high)
        for name, site in plan.sites.items():
            assert site.A.shape[0] == site.B.shape[1] == site.rank
            assert site.scaling == 2.0  # survives the resizing: alpha moves
            assert site.alpha == 2.0 * site.rank
            if site.rank:
                assert relative_error(added(site), 2 * truncated(deltas[name], site.rank)) < 1e-8


@pytest.mark.parametrize("decomposition", ["svd", "qr", "qr_pivoted"])
def test_a_site_that_wins_more_than_twice_its_rank_gets_the_factors_of_a_full_svd(
    decomposition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [draw(5, 4, 20, 16)]
    base = uneven()
    config = InitConfig.from_dict(
        {**KEEP, "method": "cross", "adaptive_ranks": True, "rank_budget": 20, "decomposition": decomposition}
    )
    asked: list[int] = []
    plain = site_spectra.spectrum
    monkeypatch.setattr(site_spectra, "spectrum", lambda M, q, exact, **o: asked.append(q) or plain(M, q, exact, **o))
    W = {name: array(base.get_submodule(name).weight) for name in ("flat", "steep", "other")}
    plan = plan_of(wrapped(base, lora(r=2, targets=["flat", "steep", "other"])), batches, config)
    X = [array(batches[0].reshape(-1, 16)).T]
    deltas = {name: reference.delta(W[name], X, "cross") for name in W}
    assert {name: site.rank for name, site in plan.sites.items()} == reference.allocate(deltas, 20)
    assert max(site.rank for site in plan.sites.values()) > 4
    extended = [q for q in asked if q > 4]
    assert extended and asked.count(4) == 3  # control: the first pass did hold too few
    for name, site in plan.sites.items():
        if decomposition == "svd":
            B, A = reference.svd_factors(2 / 3 * deltas[name], site.rank)  # scaling 3
            full_svd = relative_error(site.B, B), relative_error(site.A, A)
            assert max(full_svd) < 1e-8, name
        assert relative_error(added(site), 2 * truncated(deltas[name], site.rank, decomposition)) < 1e-8


@pytest.mark.parametrize("base", ["offset", "paired", "keep", "subtract"])
@pytest.mark.parametrize("decomposition", ["svd", "qr", "qr_pivoted"])
def test_a_rank_of_zero_is_an_empty_adapter(base: str, decomposition: str) -> None:
    config = InitConfig.from_dict(
        {"method": "self", "base": base, "adaptive_ranks": True, "rank_budget": 2, "decomposition": decomposition}
    )
    plan = plan_of(wrapped(mlp()), token_batches(SIZES), config)
    empty = {name: site for name, site in plan.sites.items() if site.rank == 0}
    assert len(empty) >= 3 and sum(site.rank for site in plan.sites.values()) == 2
    for site in empty.values():
        assert site.A.shape[0] == site.B.shape[1] == site.file_rank == 0 and site.captured == 0.0
        assert site.alpha == 0.0 and site.scaling == 2.0
    factor = 2 if base == "offset" else 1
    assert all(site.file_rank == factor * site.rank for site in plan.sites.values())


def test_ranks_do_not_depend_on_the_order_of_the_sites_and_grow_with_the_budget() -> None:
    class Reversed(Mlp):
        def __init__(self) -> None:
            super().__init__()
            for name in Mlp.targets[::-1]:
                layer = getattr(self, name)
                delattr(self, name)
                setattr(self, name, layer)

    batches = token_batches(SIZES)

    def ranks(make: Callable[[], nn.Module], budget: int) -> dict[str, int]:
        config = InitConfig(method="self", adaptive_ranks=True, rank_budget=budget)
        return {name: s.rank for name, s in plan_of(wrapped(seeded(make)), batches, config).sites.items()}

    assert list(ranks(Reversed, 9)) == list(Mlp.targets)[::-1]
    before = dict.fromkeys(Mlp.targets, 0)
    for budget in (1, 5, 9, 20, 40):
        after = ranks(Mlp, budget)
        assert after == ranks(Reversed, budget)
        assert sum(after.values()) == budget
        assert all(after[name] >= before[name] for name in after)
        before = after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_budget": 60}, "rank_budget: expected between 1 .* and 50 .* got 60"),
        ({"min_rank": 4}, "rank_budget: expected between 20 .* got 15"),
        ({"max_rank": 2}, "rank_budget: expected between 1 .* and 10 .* got 15"),
    ],
)
def test_a_budget_that_cannot_be_met_is_an_error(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(
            wrapped(mlp()),
            token_batches(SIZES),
            InitConfig.from_dict({"method": "self", "adaptive_ranks": True, **options}),
        )


def test_a_rank_above_what_a_layer_has_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"site down: rank 7 is above min\(in, out\) = 6; lower r"):
        plan_of(wrapped(mlp(), lora(r=7)), token_batches(SIZES))
    whole = plan_of(wrapped(mlp(), lora(r=6)), token_batches(SIZES))  # control: all of it is fine
    assert whole.sites["down"].captured == pytest.approx(1.0)


# --- determinism and the state of the world -----------------------------------------------------------------


@mode
@pytest.mark.parametrize("options", [{}, {"adaptive_ranks": True}, {"decomposition": "qr_pivoted"}], ids=str)
def test_two_runs_give_the_same_bits(mode: Mode, options: dict[str, Any]) -> None:
    config = InitConfig.from_dict({**mode.options, **options})
    plans = []
    for _ in range(2):
        torch.rand(3), random.random(), np.random.rand()  # the global generators have moved on
        plans.append(plan_of(wrapped(mlp()), token_batches(SIZES), config))
    assert same(*plans)


def test_only_the_gaussian_constant_listens_to_the_seed() -> None:
    batches = token_batches(SIZES)

    def planned(seed: int, constant: Any) -> InitPlan:
        config = InitConfig.from_dict({**KEEP, "method": "shift", "shift_constant": constant, "seed": seed})
        return plan_of(wrapped(mlp()), batches, config)

    assert same(planned(0, 1.0), planned(1, 1.0))
    assert same(planned(7, "gaussian"), planned(7, "gaussian"))
    for seed in (1, 2**32):
        one, other = planned(0, "gaussian"), planned(seed, "gaussian")
        for name in Mlp.targets:
            assert relative_error(added(one.sites[name]), added(other.sites[name])) > 0.1


class Noisy(nn.Module):
    """Dropout, batch statistics and draws from all three global generators: eval mode and restored state matter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.a = nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        return self.a(self.drop(self.norm(x.reshape(-1, 10))))


class Failing(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("kind", [Noisy, Failing])
def test_the_model_and_the_generators_are_left_as_found(kind: type[nn.Module]) -> None:
    model = wrapped(seeded(kind), lora(targets=["a"], lora_dropout=0.3))
    model.train()
    model.get_submodule("base_model.model.norm").eval()  # a mixed state, as frozen parts have
    x = torch.cat(token_batches(SIZES, dtype=torch.float64)[1:2])
    loader = DataLoader(TensorDataset(x), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))
    modes = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    own_state = loader.generator.get_state()
    if kind is Failing:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            plan_of(model, loader)
    else:
        plan_of(model, loader)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))
    assert torch.equal(loader.generator.get_state(), own_state)
    with torch.random.fork_rng(devices=[]):
        list(loader)
        assert not torch.equal(loader.generator.get_state(), own_state)  # control: a pass does move it


def test_dropout_is_off_while_the_inputs_are_read() -> None:
    x = token_batches(SIZES)
    model = wrapped(seeded(Noisy), lora(targets=["a"])).train()
    base = seeded(Noisy).eval()
    inputs, W = inputs_of(base, x, ["a"]), array(base.a.weight)  # type: ignore[union-attr]
    site = plan_of(model, x).sites["a"]
    assert relative_error(added(site), 2 * truncated(reference.delta(W, inputs["a"], "self"), 3)) < 1e-8
    with torch.random.fork_rng(devices=[]):
        dropped = inputs_of(seeded(Noisy).train(), x, ["a"])["a"]
    assert relative_error(added(site), 2 * truncated(reference.delta(W, dropped, "self"), 3)) > 1e-2  # control


# --- errors at the border -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    batches = token_batches(SIZES)
    batches[2][0, 1, 3] = bad
    with pytest.raises(ValueError, match="site q, batch 2: its input has NaN or Inf"):
        plan_of(wrapped(mlp()), batches)
    mask = torch.ones(1, 2)
    mask[0, 1] = 0
    hidden = [*batches[:2], {"x": batches[2], "attention_mask": mask}]
    assert plan_of(wrapped(mlp()), hidden, forward=call).batches == 3  # control: padding may hold anything


def call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        model(**batch)
    else:
        model(batch)


def test_an_adapter_that_is_not_fresh_is_refused() -> None:
    model = wrapped(mlp())
    with torch.no_grad():
        model.get_parameter("base_model.model.k.lora_B.default.weight")[0, 0] = 1.0
    with pytest.raises(ValueError, match="site k: adapter 'default' is not fresh"):
        plan_of(model, token_batches(SIZES))
    with pytest.raises(ValueError, match="has no LoRA layer"):
        plan_of(mlp(), token_batches(SIZES))
    with pytest.raises(ValueError, match="adapter_name: 'defualt'.*did you mean 'default'"):
        plan_of(wrapped(mlp()), token_batches(SIZES), adapter_name="defualt")


@pytest.mark.parametrize("alpha", [0, -4])
def test_a_scaling_that_is_not_positive_is_refused(alpha: float) -> None:
    """s·B·A = strength·[ΔW]_r has no solution for s = 0, and S^(1−p) none that is real for s < 0."""
    with pytest.raises(ValueError, match="site q: .*scaling.*lora_alpha"):
        plan_of(wrapped(mlp(), lora(alpha=alpha)), token_batches(SIZES))


def test_an_input_of_the_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"site q, batch 0: expected an input \(\.\.\., 10\), got \(2, 3, 9\)"):
        plan_of(wrapped(mlp()), [draw(0, 2, 3, 9)])


def test_a_zero_weight_is_named() -> None:
    base = mlp()
    with torch.no_grad():
        base.get_submodule("v").weight.zero_()
    with pytest.raises(ValueError, match="site v cannot be initialised: its pretrained weight is all zeros"):
        plan_of(wrapped(base), token_batches(SIZES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_float64(dtype: torch.dtype) -> None:
    batches = token_batches(SIZES, dtype=dtype)
    base = mlp(dtype=dtype)
    inputs, W = inputs_of(base, batches), weights_of(base)
    plan = plan_of(wrapped(base), batches)
    for name, site in plan.sites.items():
        assert site.A.dtype == dtype
        delta = reference.delta(W[name], inputs[name], "self", precision=precision_of(dtype))
        error = relative_error(added(site), 2 * truncated(delta, 3))
        assert 1e-6 < error < 2 * torch.finfo(dtype).eps  # rounded once, when written


def test_every_batch_reaches_the_progress_and_no_more() -> None:
    steps: list[int] = []
    model = wrapped(mlp())
    sites, _ = find_sites(model)
    groups: list[tuple[int, tuple[str, ...]]] = []
    seen = collect(
        model, sites, chain(token_batches(SIZES)), lambda i, new: groups.extend((i, names) for names, _ in new),
        num_batches=2,
        step=lambda: steps.append(1),
    )  # fmt: skip
    assert seen.batches == len(steps) == 2
    assert groups == [(i, names) for i in (0, 1) for names in (("q", "k", "v"), ("up",), ("down",))]


class _Wide(nn.Module):
    """Two layers of 64 features, for batches of fewer tokens than that."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


@pytest.mark.parametrize("options", [{}, {"adaptive_ranks": True}, {"decomposition": "qr"}], ids=str)
@pytest.mark.parametrize("method", ["cross", "self"])
def test_few_tokens_give_the_plan_of_sums_that_are_formed(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(_Wide(), LoraConfig(r=4, target_modules=["up", "down"]))
    batches = [(draw(seed, 9, 64).float(),) for seed in range(3)]
    config = InitConfig.from_dict({"method": method, **options})
    formed = compute_plan(model, batches, config)
    monkeypatch.setattr("cntlora.linalg.low_rank.LARGE", 8)
    terms: list[int] = []
    plain = LowRank.dense
    monkeypatch.setattr(LowRank, "dense", lambda self: (terms.append(self.rank), plain(self))[1])
    held = compute_plan(model, batches, config)
    assert not terms  # no sum was formed
    for name, site in formed.sites.items():
        other = held.sites[name]
        assert other.rank == site.rank and other.tokens == site.tokens == 27
        assert other.delta_norm == pytest.approx(site.delta_norm, rel=1e-4)
        half = other.rank
        assert relative_error(other.B[:, :half] @ other.A[:half], site.B[:, :half] @ site.A[:half]) < 1e-4
    fewer = compute_plan(model, batches[:2], config)  # control
    one, two = (plan.sites["down"] for plan in (fewer, held))
    assert relative_error(one.B[:, :4] @ one.A[:4], two.B[:, :4] @ two.A[:4]) > 1e-2

"""Rounding is not data: no mode amplifies what is at the level of the rounding of the activations, in any dtype.

`rerounded` puts in what other kernels and layers would: entries some units in the last place away.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import reference
from tests.cases import absorb, array, draw, moments, precision_of, relative_error, seeded
from torch import Tensor, nn

import cntlora
from cntlora import InitConfig
from cntlora.linalg.moments import Moments
from cntlora.linalg.pseudo_inverse import coarser, rounding_noise
from cntlora.methods.cross import cross_map
from cntlora.methods.facts import Facts, SiteFacts
from cntlora.methods.self_mode import self_map, self_quick
from cntlora.methods.statistics import InputEstimator
from cntlora.methods.target import Target
from cntlora.site_plan import FAR

root = pytest.mark.parametrize("root", ["paper", "symmetric", "cholesky"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=precision_of)
SELF = {f"self {root}": {"method": "self", "root": root} for root in ("paper", "symmetric", "cholesky")}
METHODS = {**SELF, "cross": {"method": "cross"}, "shift": {"method": "shift"}, "corda": {"method": "corda"}}


ULPS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 1, torch.float64: 16}
"""Units in the last place, at most: the rounding of a network of 12 layers in float32, where the sums round too, and of
one layer in half precision."""


def rerounded(x: Tensor, seed: int = 0) -> Tensor:
    """x with every entry up to so many units in the last place lower or higher."""
    most = ULPS[x.dtype]
    steps = torch.randint(-most, most + 1, x.shape, generator=torch.Generator().manual_seed(seed))
    return (x.double() * (1 + torch.finfo(x.dtype).eps * steps)).to(x.dtype)


def few_distinct(d: int, b: int, distinct: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """X (d, b) whose columns are a few, repeated, but for their rounding."""
    columns = draw(seed, d, distinct).to(dtype)
    return rerounded(columns.repeat(1, -(-b // distinct))[:, :b], seed)


# --- the cut-off --------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(32, 64), (384, 200), (64, 9), (16, 2000)], ids=str)
def test_what_is_rounding_lies_under_the_cut_and_small_data_above(shape: tuple[int, int], dtype: torch.dtype) -> None:
    X = few_distinct(*shape, 4, dtype).double()
    S = torch.linalg.svdvals(X)
    cut = rounding_noise(dtype, *shape) * float(S.square().sum().sqrt())
    assert 1e-3 * cut < float(S[4]) < cut / 3
    small = 1e-4 if dtype == torch.float32 else 0.1  # of σ_max
    assert small * float(S[0]) > cut
    assert float(S[3]) > 2 * cut  # control: the four columns are not under it


@pytest.mark.parametrize("b", [20, 200], ids=["b<d", "b>d"])
@root
@dtypes
def test_self_mode_keeps_the_data_and_drops_the_rounding(dtype: torch.dtype, root: str, b: int) -> None:
    X = few_distinct(48, b, 4, dtype)
    m = moments(X)
    T, rank = self_map(m, root)
    assert rank == 4
    expected = reference.self_target(array(draw(9, 7, 48)), array(X), root, precision=precision_of(dtype))
    assert relative_error(draw(9, 7, 48).to(T) @ T, expected) < (1e-8 if dtype == torch.float32 else 1e-3)
    assert float(m.noise_rtol()) >= 0.99 * rounding_noise(dtype, 48, b)
    assert not bool(self_quick(m)[1])
    if dtype == torch.float32:  # control: at the tolerance of the sums it is noise that decides
        blown, more = self_map(m, root, 0.0)
        assert more > 4 and float(blown.norm()) > 1e3 * float(T.norm())


@pytest.mark.parametrize("b", [20, 200], ids=["b<d", "b>d"])
@root
def test_small_directions_well_above_rounding_are_kept(root: str, b: int) -> None:
    """Singular values of 1e-4·σ_max in float32, as real activations have."""
    U, V = torch.linalg.qr(draw(0, 48, 10)).Q, torch.linalg.qr(draw(1, b, 10)).Q
    S = torch.logspace(0, -4, 10, dtype=torch.float64)
    X = ((U * S) @ V.mT).float()
    T, rank = self_map(moments(X), root)
    assert rank == 10
    W = draw(2, 7, 48)
    assert relative_error(W @ T, reference.self_target(array(W), array(X), root, precision="float32")) < 1e-8
    assert self_map(moments(((U * S.square()) @ V.mT).float()), root)[1] < 10  # control: 1e-8 is under it


@pytest.mark.parametrize("b", [30, 90], ids=["b<d", "b>d"])
def test_the_quick_cholesky_holds_where_no_rounding_has_to_be_dropped(b: int) -> None:
    full = draw(0, 48, b).float()
    quick, holds, rank = self_quick(moments(full))
    assert bool(holds) and rank == min(48, b)
    assert relative_error(quick, self_map(moments(full), "cholesky")[0]) < 1e-8
    # one direction goes down to the level of rounding, which the sums in float64 resolve
    U, S, Vh = torch.linalg.svd(full.double(), full_matrices=False)
    S[-1] = 3e-7 * S.square().sum().sqrt()
    X = (U * S) @ Vh
    m = Moments(48)
    m.update(X.mT, torch.float32)
    assert not bool(self_quick(m)[1]) and self_map(m, "cholesky")[1] == min(48, b) - 1
    assert bool(self_quick(moments(X))[1])  # control: in float64 it is data


@dtypes
def test_exact_inputs_lose_nothing(dtype: torch.dtype) -> None:
    """One-hot rows, small integers and rows of zeros have no rounding; nothing real of them is near the cut."""
    one_hot = torch.eye(24, dtype=dtype).repeat_interleave(torch.arange(1, 25), dim=0)
    assert self_map(moments(one_hot.mT))[1] == 24
    integers = torch.randint(-3, 4, (12, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    integers[:, 30:] = 0
    exact = int(torch.linalg.matrix_rank(integers.double()))
    assert self_map(moments(integers))[1] == exact == 12
    assert self_map(moments(torch.zeros(12, 40, dtype=dtype)))[1] == 0
    integers[5] = integers[4]  # control: what is exactly dependent is dropped
    assert self_map(moments(integers))[1] == 11


def test_float64_activations_keep_the_tolerance_of_the_sums() -> None:
    X = draw(0, 12, 60)
    X[11] = X[10] + 1e-6 * draw(1, 60)
    assert self_map(moments(X))[1] == self_map(moments(X), rtol=0.0)[1] == 12
    assert float(moments(X).noise_rtol()) == pytest.approx(moments(X).rtol ** 0.5)
    assert self_map(moments(X.float()), rtol=0.0)[1] == 12
    X[11] = X[10] + 1e-7 * draw(1, 60)
    assert self_map(moments(X.float()))[1] == 11  # control: of float32 that is rounding


def test_the_coarsest_dtype_of_a_batch_decides() -> None:
    X = few_distinct(32, 64, 4, torch.bfloat16)
    mixed, fine = Moments(32), Moments(32)
    for m, first in ((mixed, X[:, :32]), (fine, X[:, :32].float())):
        m.update(X[:, 32:].float().mT)
        m.update(first.mT)
    assert mixed.precision == torch.bfloat16 and fine.precision == torch.float32
    assert self_map(mixed)[1] == 4 < self_map(fine)[1]
    merged = Moments(32)
    merged.update(X[:, 32:].float().mT)
    other = Moments(32)
    other.update(X[:, :32].mT)
    merged.merge(other)
    assert merged.precision == torch.bfloat16
    assert coarser(None, torch.float32) == torch.float32
    assert coarser(torch.float16, torch.bfloat16) == coarser(torch.bfloat16, torch.float16) == torch.bfloat16


def test_facts_are_put_together_over_batches_processes_and_passes() -> None:
    one, two = Facts(batches=2), Facts(batches=1)
    one.add(["a", "b"], rank=5, rtol=torch.tensor(1e-6), precision=torch.float32)
    one.add(["a"], rank=7, rtol=torch.tensor(4e-6), precision=torch.bfloat16)
    two.add(["b"], rank=3, rtol=torch.tensor(2e-6), precision=torch.float64)
    one["a"].merge(SiteFacts(calls=1, batches=1, tokens=9, largest_batch=9, masks={"text (labels)"}, seconds=1.0))
    one["a"].merge(SiteFacts(calls=1, batches=0, seconds=0.5, unmasked={"no mask"}))
    two["a"].merge(SiteFacts(calls=1, batches=1, tokens=4, largest_batch=4, masks={"text (attention_mask)"}))
    two.read_back()
    assert isinstance(two["b"].rtol, float) and isinstance(one["b"].rtol, torch.Tensor)
    one.read_back()
    one.merge(two)
    assert (one["a"].effective_rank, one["b"].effective_rank) == (5, 3)
    assert (one["a"].rtol, one["b"].rtol) == pytest.approx((4e-6, 2e-6))
    assert (one["a"].precision, one["b"].precision) == (torch.bfloat16, torch.float32)
    counts = (one["a"].calls, one["a"].batches, one["a"].tokens, one["a"].largest_batch, one["a"].seconds)
    assert counts == (3, 2, 13, 9, 1.5) and one.batches == 3
    assert one["a"].masks == {"text (labels)", "text (attention_mask)"} and one["a"].unmasked == {"no mask"}
    again = Facts(batches=3)
    again["a"].merge(SiteFacts(calls=3, batches=2, tokens=13, largest_batch=9, seconds=2.0, effective_rank=6))
    one.reread(again)
    counts = (one["a"].calls, one["a"].batches, one["a"].tokens, one["a"].largest_batch, one["a"].seconds)
    assert counts == (3, 2, 13, 9, 3.5) and one.batches == 3 and one["a"].effective_rank == 5
    one.merge(again)  # the control: as further batches they count
    assert one["a"].tokens == 26 and one.batches == 6


def test_the_rank_of_all_inputs_does_not_count_rounding() -> None:
    """EVA and CorDA: the rank that the report gives."""
    made = InputEstimator(lambda gram, total, n: gram, lambda name, batches, C: Target(M=C))
    for seed in (0, 1):
        absorb(made, ["site"], moments(few_distinct(32, 64, 4, torch.float32, seed)), 1.0)
    made.target("site", 2)
    assert made.facts["site"].effective_rank == 8  # four columns in each of two batches
    made.facts["site"].precision = torch.float64  # control: without the dtype it would be full
    made._last = None  # which holds the rank that was found
    made.target("site", 2)
    found = made.facts["site"].effective_rank
    assert found is not None and found > 8


# --- models whose inputs hardly vary ------------------------------------------------------------------------


class Rows(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Queries(nn.Module):
    """Learned queries, the same for every image, read from it by attention, as object queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 24))
        self.layer, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q = self.layer(rerounded(self.queries.expand(x.shape[0], -1, -1).detach()))
        return torch.softmax(q @ self.k(x).mT, -1) @ self.v(x)


class Patches(nn.Module):
    """A convolution, whose images have one colour each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Bert(nn.Module):
    """BERT over one sentence many times."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        )
        self.bert = BertModel(config)
        self.bert.embeddings.register_forward_hook(lambda module, args, output: rerounded(output))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.bert(input_ids).last_hidden_state


@dataclass(frozen=True)
class Model:
    """A model, what of it LoRA adapts, its batches, and the rank of what its first site sees."""

    make: Callable[[], nn.Module]
    target: str
    batches: Callable[[torch.dtype], list[Any]]
    rank: int


def _colours(dtype: torch.dtype) -> list[Tensor]:
    colours = draw(3, 6, 3, 1, 1).to(dtype)
    return [rerounded(colours.expand(6, 3, 8, 8), seed) for seed in range(2)]


MODELS = {
    "linear": Model(Rows, "layer", lambda dtype: [few_distinct(32, 64, 4, dtype, s).mT[None] for s in range(2)], 4),
    "queries": Model(Queries, "layer", lambda dtype: [draw(s, 30, 7, 24).to(dtype) for s in range(2)], 5),
    "convolution": Model(Patches, "layer", _colours, 3),
    "bert": Model(Bert, "query", lambda dtype: [torch.arange(6).repeat(20, 1) for _ in range(2)], 6),
}
model = pytest.mark.parametrize("name", MODELS)


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    case = MODELS[name]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[case.target])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(seeded(case.make, dtype=dtype), config).to(dtype).eval()  # type: ignore[arg-type]


def planned(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The plan, and the warnings of far starts."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plan = cntlora.compute_plan(
            adapted(name, dtype),
            MODELS[name].batches(dtype),
            InitConfig.from_dict({"method": "self", **options}),
            progress=False,
        )
    return plan, [str(w.message) for w in found if "of its start" in str(w.message)]


@model
@pytest.mark.parametrize("method", METHODS)
def test_no_method_amplifies_rounding(method: str, name: str) -> None:
    plan, said = planned(name, **METHODS[method])
    first = next(iter(plan.sites.values()))
    assert said == [] and plan.far_starts() == {}
    if method != "corda":  # which sees all batches together
        assert first.effective_rank == MODELS[name].rank
    assert first.start_norm / first.weight_norm < FAR / 5


@model
@root
def test_the_letter_amplifies_it_and_says_so(root: str, name: str) -> None:
    """Control of the test above."""
    plan, said = planned(name, method="self", root=root, rtol=0.0)
    first, site = next(iter(plan.sites.items()))
    assert site.effective_rank > MODELS[name].rank
    assert plan.far_starts()[first] > 1e3 and len(said) == 1
    assert "site " in said[0] and "rtol" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=precision_of)
@model
def test_a_model_in_half_precision_has_the_rank_of_its_data(name: str, dtype: torch.dtype) -> None:
    plan, said = planned(name, dtype)
    site = next(iter(plan.sites.values()))
    assert site.effective_rank == MODELS[name].rank and said == []
    assert site.rtol > 1e-3 > planned(name)[0].sites[next(iter(plan.sites))].rtol > 0


def test_under_autocast_it_is_the_dtype_of_the_products_that_counts() -> None:
    """The rows come in float32, and the layer rounds them to bfloat16; what is under that is no data."""
    X = few_distinct(32, 64, 4, torch.bfloat16)
    batches = [X.float().mT[None]]

    def forward(model: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)

    plan = cntlora.compute_plan(
        adapted("linear"), batches, forward=forward, progress=False, config=cntlora.InitConfig(method="self")
    )
    site = next(iter(plan.sites.values()))
    assert site.effective_rank == 4 and site.rtol > 1e-3
    plain = cntlora.compute_plan(
        adapted("linear"), batches, progress=False, config=cntlora.InitConfig(method="self")
    )  # control: in float32 it might be data
    assert next(iter(plain.sites.values())).effective_rank > 4


@root
def test_the_report_gives_the_tolerance_that_was_used(root: str) -> None:
    plan, _ = planned("linear", root=root)
    site = next(iter(plan.sites.values()))
    X = [x[0].mT.double() for x in MODELS["linear"].batches(torch.float32)]
    S = [torch.linalg.svdvals(x) for x in X]
    expected = max(rounding_noise(torch.float32, 32, 64) * float(s.norm() / s[0]) for s in S)
    assert site.rtol == pytest.approx(expected, rel=0.05)
    assert planned("linear", root=root, rtol=0.0)[0].sites[site_name(plan)].rtol == 64 * torch.finfo(torch.float64).eps
    assert planned("linear", root=root, rtol=1e-3)[0].sites[site_name(plan)].rtol == 1e-3


def site_name(plan: Any) -> str:
    return next(iter(plan.sites))


# --- training, and the warning ------------------------------------------------------------------------------


def trained(name: str, **options: Any) -> tuple[nn.Module, list[Any]]:
    """A few steps of AdamW from the start that the options give."""
    model, batches = adapted(name), MODELS[name].batches(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cntlora.initialize(
            model, batches, InitConfig.from_dict({"method": "self", "base": "keep", **options}), progress=False
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(4):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return model.eval(), batches


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_after_training_rows_and_the_merged_model_give_the_same_answers(name: str) -> None:
    """The same rows with other rounding, a row alone, and the merged weight: equal within float32, over the size of
    the pretrained outputs."""

    def spread(**options: Any) -> float:
        model, (batch, _) = trained(name, **options)
        with torch.no_grad():
            whole, other = model(batch), model(rerounded(batch, 7))
            alone = model(batch[:1])
            merged = copy.deepcopy(model).merge_and_unload()(batch)  # type: ignore[operator]
            with model.disable_adapter():  # type: ignore[operator]
                size = model(batch).norm()
        return max(float((a - b).norm() / size) for a, b in ((other, whole), (alone, whole[:1]), (merged, whole)))

    assert spread(method="self") < 1e-5  # a hundred units in the last place of float32
    assert spread(method="self", rtol=0.0) > 1e-3  # control


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("method", ["self", "pissa", "lora_one", "corda"])
def test_a_far_start_is_said_for_every_method_and_base(method: str, base: str) -> None:
    def said(strength: float) -> tuple[list[str], cntlora.InitReport]:
        model, batches = adapted("linear"), MODELS["linear"].batches(torch.float32)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            report = cntlora.initialize(
                model,
                batches,
                InitConfig.from_dict({"method": method, "base": base, "strength": strength}),
                loss=lambda model, batch: model(batch).square().mean(),
                progress=False,
            )
        ours = [w for w in found if "of its start" in str(w.message)]
        assert all(w.filename == __file__ for w in ours)  # at the line of the caller
        return [str(w.message) for w in ours], report

    messages, report = said(1e6)
    assert len(messages) == 1 and messages[0].startswith("site layer:") and "strength" in messages[0]
    assert ("rtol" in messages[0]) == (method == "self")
    note = next(line for line in str(report).splitlines() if line.startswith("! "))
    assert "layer" in note and "!" in next(line for line in str(report).splitlines() if line.startswith("  layer"))
    assert list(report.to_dict()["far"]) == ["layer"]
    messages, report = said(1.0)  # control
    assert messages == [] and not report.far and "!" not in str(report)


def test_the_cross_mode_of_the_letter_is_said_too() -> None:
    for method in ("cross", "shift"):
        plan, said = planned("linear", method=method, rtol=0.0)
        assert len(said) == 1 and plan.far_starts()
        assert planned("linear", method=method)[1] == []  # control: at their own tolerance


@root
def test_cross_and_self_agree_on_what_is_data(root: str) -> None:
    X = few_distinct(32, 64, 4, torch.float32)
    assert cross_map(moments(X), 1e-3)[1] == self_map(moments(X), root)[1] == 4
    assert cross_map(moments(X))[1] > 4  # control

"""Writing into a model: where training starts, which gradients flow, and what stays as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from tests.tiny import KINDS, Batch, adapted, base_model, changed, logits, lora_config, state, text_batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cntlora import InitConfig, apply_plan, compute_plan, initialize
from cntlora.model.lora_layers import is_lora_layer
from cntlora.model.peft_config import anchored, sync_config
from cntlora.model.sites import Site, find_sites

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = ["offset", "paired", "subtract", "keep"]
STARTS_AT_ZERO = ["offset", "paired"]


def in_dtype(model: nn.Module, batch: Batch) -> Any:
    """Call a model of lower precision; images are floating-point inputs."""
    dtype = next(model.parameters()).dtype
    return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})


def weights_of(sites: list[Site]) -> dict[str, Tensor]:
    return {site.name: site.weight() for site in sites}


def added(site: Site) -> Tensor:
    """s·B·A in float64."""
    return site.scaling * (site.B.detach().double() @ site.A.detach().double())


def halves_product(site: Site) -> Tensor:
    """B·A with the two halves of the rank multiplied separately, in float64; the odd direction of paired after them."""
    A, B = site.A.detach().double(), site.B.detach().double()
    h = A.shape[0] // 2
    return B[:, :h] @ A[:h] + B[:, h : 2 * h] @ A[h : 2 * h] + B[:, 2 * h :] @ A[2 * h :]


def rounding(site: Site, x: Tensor, W: Tensor) -> Tensor:
    """Return what rounding may change in an output of the layer: eps·(|W||x| + s|B||A||x|), a few times over."""
    A, B, x = site.A.detach().double().abs(), site.B.detach().double().abs(), x.double().abs()
    eps = torch.finfo(site.base.weight.dtype).eps
    return 4 * eps * (x @ W.double().abs().mT + site.scaling * (x @ A.mT) @ B.mT) + 1e-30


@pytest.fixture(scope="module", params=itertools.product(KINDS, DTYPES), ids=lambda p: f"{p[0]}-{p[1]}"[:15])
def kind_and_dtype(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


# --- where training starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "same dtype"])
def test_start_of_every_policy(kind_and_dtype: tuple[str, torch.dtype], base: str, autocast: bool) -> None:
    kind, dtype = kind_and_dtype
    model = adapted(kind, dtype=dtype, autocast_adapter_dtype=autocast)
    batches = KINDS[kind].batches(2)
    start, W = logits(model, batches[0]), weights_of(find_sites(model)[0])
    initialize(model, batches, InitConfig(method="self", base=base), forward=in_dtype)
    sites, _ = find_sites(model)
    for site in sites:
        x = torch.randn(6, site.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            out = site.layer(x).double()
        expected = x.double() @ W[site.name].mT
        bias = site.base.bias
        expected = expected if bias is None else expected + bias.double()
        shift = x.double() @ added(site).mT
        if base in STARTS_AT_ZERO:
            assert not halves_product(site).any()
        else:
            assert halves_product(site).any()  # so that the line above can fail
        if base != "subtract":
            assert torch.equal(site.weight(), W[site.name])
        wanted = expected + shift if base == "keep" else expected
        bound = rounding(site, x, W[site.name])
        assert ((out - wanted).abs() <= bound).all(), ((out - wanted).abs() / bound).max()
        if base == "keep":  # the same check without the shift fails
            assert not ((out - expected).abs() <= bound).all()
    if dtype == torch.float32:
        tolerance = 100 * torch.finfo(dtype).eps * float(start.abs().max())
        moved = float((logits(model, batches[0]) - start).abs().max())
        assert moved > 100 * tolerance if base == "keep" else moved <= tolerance


@pytest.mark.parametrize("base", ["subtract", "keep"])
def test_what_is_added_is_strength_times_the_estimate(base: str) -> None:
    """s·B·A has the singular values strength·S, whatever alpha and r are; with subtract W + s·B·A is the old W."""
    model, batches = adapted(lora_alpha=3, r=5), text_batches()
    W = weights_of(find_sites(model)[0])
    plan = compute_plan(model, batches, InitConfig.from_dict({"method": "self", "base": base, "strength": 1.5}))
    apply_plan(model, plan)
    for site in find_sites(model)[0]:
        S = torch.linalg.svdvals(added(site))[:5]
        torch.testing.assert_close(S.float(), 1.5 * plan.sites[site.name].singular_values[:5], rtol=1e-4, atol=1e-5)
        total = site.weight() + added(site)
        if base == "subtract":
            torch.testing.assert_close(total, W[site.name], rtol=1e-5, atol=1e-6)
        else:
            assert (total - W[site.name]).abs().max() > 1e-2


@pytest.mark.parametrize("r", [1, 5])
def test_paired_of_odd_rank_keeps_a_direction_for_A_only(r: int) -> None:
    model = adapted(r=r)
    initialize(model, text_batches(), InitConfig(method="self", base="paired"))
    for site in find_sites(model)[0]:
        assert site.A.shape[0] == r and not halves_product(site).any()
        assert not site.B[:, -1].any() and site.A[-1].any()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_gradients_flow_from_the_first_step(kind: str, base: str) -> None:
    model, batches = adapted(kind), KINDS[kind].batches()
    initialize(model, batches, InitConfig(method="self", base=base))
    model(**batches[0]).loss.backward()
    for site in find_sites(model)[0]:
        assert site.A.grad is not None and site.A.grad.any(), site.name
        assert site.B.grad is not None and site.B.grad.any(), site.name


def test_plain_lora_has_no_gradient_in_A_at_first() -> None:
    """The control of the test above."""
    model = adapted()
    model(**text_batches()[0]).loss.backward()
    assert not any(site.A.grad.any() for site in find_sites(model)[0] if site.A.grad is not None)


def test_model_is_in_the_dtype_it_was() -> None:
    for dtype, autocast in itertools.product(DTYPES, [True, False]):
        model = adapted(dtype=dtype, autocast_adapter_dtype=autocast)
        before = {n: p.dtype for n, p in model.named_parameters()}
        initialize(model, text_batches(), forward=in_dtype, config=InitConfig(method="self"))
        assert {n: p.dtype for n, p in model.named_parameters()} == before
        assert (torch.float32 in before.values()) == (autocast or dtype == torch.float32)


# --- after the fact: whoever made the adapter ---------------------------------------------------------------


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    sites, _ = find_sites(model, adapter)
    return {f"{s.name}.{half}": getattr(s, half).detach().clone() for s in sites for half in "AB"}


def by_add_adapter(config: LoraConfig) -> nn.Module:
    model = base_model()
    model.add_adapter(config)
    return model.eval()


ROUTES = {
    "PeftModel": lambda config: get_peft_model(base_model(), config).eval(),
    "add_adapter": by_add_adapter,
    "inject_adapter_in_model": lambda config: inject_adapter_in_model(config, base_model()).eval(),
}


@pytest.mark.parametrize("base", BASES)
def test_every_route_gives_the_same_adapter(base: str) -> None:
    results = []
    for make in ROUTES.values():
        model = make(lora_config())
        initialize(model, text_batches(), InitConfig(method="self", base=base))
        results.append(factors(model))
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(results[0][key], other[key]) for key in other)
    model = get_peft_model(base_model(seed=7), lora_config())  # control: another base gives other factors
    initialize(model, text_batches(), InitConfig(method="self", base=base))
    assert not any(torch.equal(results[0][key], value) for key, value in factors(model).items())


@pytest.mark.parametrize("base", ["offset", "paired", "keep"])
def test_only_the_named_adapter_changes(base: str) -> None:
    model = adapted(adapter_name="first")
    model.add_adapter("second", lora_config(r=3))
    before = state(model)
    initialize(model, text_batches(), InitConfig(method="self", base=base), adapter_name="second")
    names = changed(before, model)
    assert names and all(".second." in name for name in names)
    assert len(names) == 2 * len(find_sites(model, "second")[0])
    assert model.active_adapters == ["first"]
    assert model.peft_config["first"].r == 4


def test_another_adapter_works_as_before() -> None:
    """A trained adapter beside the new one has the same outputs when it is active."""
    model, batches = adapted(adapter_name="first"), text_batches()
    with torch.no_grad():
        for site in find_sites(model, "first")[0]:
            site.B.normal_(std=0.3)
    model.add_adapter("second", lora_config(r=3))
    start = logits(model, batches[0])
    initialize(model, batches, adapter_name="second", config=InitConfig(method="self"))
    assert torch.equal(logits(model, batches[0]), start)
    model.set_adapter("second")
    assert (logits(model, batches[0]) - start).abs().max() > 1e-3  # the control: another function
    with model.disable_adapter():
        pristine = logits(model, batches[0])
    torch.testing.assert_close(logits(model, batches[0]), pristine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["paired", "subtract", "keep"])
def test_wrapped_in_ddp(process_group: None, base: str) -> None:
    plain, inner = adapted(), adapted()
    wrapped = DistributedDataParallel(inner)
    reports = [initialize(m, text_batches(), InitConfig(method="self", base=base)) for m in (plain, wrapped)]
    assert list(reports[0].sites) == list(reports[1].sites)  # no `module.` in the names
    assert changed(state(plain), inner) == set()
    wrapped(**text_batches()[0]).loss.backward()
    assert all(s.A.grad.any() for s in find_sites(inner)[0])


# --- Conv1D, DoRA, rsLoRA -----------------------------------------------------------------------------------


def test_conv1d_is_not_transposed() -> None:
    """GPT-2 stores W as (in, out): with subtract W + s·B·A in (out, in) is the old W; with the transpose it is not."""
    model = adapted("gpt2", target_modules=["attn.c_proj"])  # square, so that a wrong layout has the right shape
    W = weights_of(find_sites(model)[0])
    initialize(model, KINDS["gpt2"].batches(), InitConfig(method="self", base="subtract"))
    for site in find_sites(model)[0]:
        assert type(site.base).__name__ == "Conv1D" and site.in_features == site.out_features
        stored = site.base.weight.detach().double()
        torch.testing.assert_close(stored.mT + added(site), W[site.name], rtol=1e-4, atol=1e-4)
        assert (stored + added(site) - W[site.name]).abs().max() > 0.1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_dora_starts_where_lora_starts(kind: str, base: str) -> None:
    """m = ‖W + s·B·A‖ per output row, so that the output is that of W, or of W + s·B·A with keep."""
    model, batches = adapted(kind, use_dora=True), KINDS[kind].batches()
    W = weights_of(find_sites(model)[0])
    start = logits(model, batches[0])
    initialize(model, batches, InitConfig(method="self", base=base))
    for site in find_sites(model)[0]:
        total = W[site.name] + (added(site) if base == "keep" else 0.0)
        assert site.magnitude is not None
        torch.testing.assert_close(site.magnitude.double(), total.norm(dim=1), rtol=1e-5, atol=1e-6)
        x = torch.randn(5, site.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out = site.layer(x).double()
        expected = x.double() @ total.mT + (0 if site.base.bias is None else site.base.bias.double())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        if base == "keep":  # the control: with the magnitude of W the output would be another
            with torch.no_grad():
                site.magnitude.copy_(W[site.name].norm(dim=1))
                assert (site.layer(x).double() - expected).abs().max() > 1e-2
    if base != "keep":
        torch.testing.assert_close(logits(model, batches[0]), start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_scaling_is_kept_on_every_site(base: str, adaptive: bool, use_rslora: bool) -> None:
    """alpha follows the rank: alpha_i = s·r_i, or s·√r_i with rsLoRA, in the layers and in the config."""
    model = adapted(r=4, lora_alpha=12, use_rslora=use_rslora)
    s = 12 / 2 if use_rslora else 12 / 4
    report = initialize(model, text_batches(), InitConfig(method="self", base=base, adaptive_ranks=adaptive))
    ranks = {name: site["rank"] for name, site in report.sites.items()}
    assert sum(ranks.values()) == 4 * len(ranks) and (len(set(ranks.values())) > 1) == adaptive
    config = model.peft_config["default"]
    for site in find_sites(model)[0]:
        assert site.rank == site.A.shape[0] == (2 if base == "offset" else 1) * ranks[site.name]
        assert site.scaling == pytest.approx(s) and site.use_rslora == use_rslora
        r = config.rank_pattern.get(anchored(site.name), config.r)
        alpha = config.alpha_pattern.get(anchored(site.name), config.lora_alpha)
        assert (r, alpha / (r**0.5 if use_rslora else r)) == (site.rank, pytest.approx(s))


def test_fold_alpha_trains_with_scaling_one() -> None:
    model = adapted(lora_alpha=12, use_rslora=True)
    initialize(model, text_batches(), InitConfig(method="self", base="keep", fold_alpha=True))
    folded = {s.name: added(s) for s in find_sites(model)[0]}
    assert all((s.scaling, s.alpha, s.use_rslora) == (1.0, s.rank, False) for s in find_sites(model)[0])
    assert (model.peft_config["default"].lora_alpha, model.peft_config["default"].use_rslora) == (4, False)
    model = adapted(lora_alpha=12, use_rslora=True)
    initialize(model, text_batches(), InitConfig(method="self", base="keep"))
    for site in find_sites(model)[0]:
        assert site.scaling == 6.0
        torch.testing.assert_close(added(site), folded[site.name], rtol=1e-5, atol=1e-6)


# --- patterns and sites without rank ------------------------------------------------------------------------


class Nested(nn.Module):
    """Modules `foo`, `bar.foo` and `baz.foo`: a pattern for the first catches the others by its ending."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(12, 12)
        self.bar = nn.ModuleDict({"foo": nn.Linear(12, 12)})
        self.baz = nn.ModuleDict({"foo": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        return self.foo(x) + torch.tanh(self.bar["foo"](x)) + torch.sin(self.baz["foo"](x))


def nested(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Nested(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["foo"], **options}))


def rows(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 20, 12, generator=torch.Generator().manual_seed(0)))


def ranks_on_reload(config: LoraConfig) -> dict[str, int]:
    return {s.name: s.rank for s in find_sites(get_peft_model(Nested(), config))[0]}


def test_patterns_are_anchored() -> None:
    model = nested(rank_pattern={"^foo": 2})
    report = initialize(model, rows(), config=InitConfig(method="self"))
    config = model.peft_config["default"]
    wanted = {"foo": 4, "bar.foo": 8, "baz.foo": 8}
    assert {n: s["file_rank"] for n, s in report.sites.items()} == wanted
    assert config.rank_pattern == {"^foo": 4}
    assert ranks_on_reload(config) == wanted
    config.rank_pattern = {"foo": 4}  # the control: not anchored, PEFT takes it for all three
    assert ranks_on_reload(config) == {"foo": 4, "bar.foo": 4, "baz.foo": 4}
    assert get_pattern_key(["foo"], "bar.foo") == "foo"


def test_names_with_special_characters_are_escaped() -> None:
    assert get_pattern_key([anchored("a.b")], "a.b") == anchored("a.b")
    assert get_pattern_key([anchored("a.b")], "axb") == "axb"
    assert get_pattern_key(["^a.b"], "axb") == "^a.b"  # the control


def one_site_loses(**options: Any) -> Any:
    """A Nested whose `foo` starts with an isotropic estimate, so that under a small budget it wins nothing."""
    model = nested(**options)
    with torch.no_grad():
        for name, sigma in (("foo", 0.0), ("bar", 5.0), ("baz", 5.0)):
            layer = getattr(model.base_model.model, name)
            weight = (layer if name == "foo" else layer["foo"]).get_base_layer().weight
            weight.copy_(torch.eye(12) + sigma * torch.outer(torch.ones(12), torch.ones(12)))
    return model


SMALL = InitConfig.from_dict({"adaptive_ranks": True, "rank_budget": 2, "method": "cross", "initial_weight": "zero"})


def test_a_site_without_rank_becomes_its_base_layer() -> None:
    model = one_site_loses()
    layer = model.base_model.model.foo.get_base_layer()
    report = initialize(model, rows(), SMALL)
    assert report.sites["foo"]["rank"] == 0 and report.sites["bar.foo"]["rank"] > 0
    assert model.base_model.model.foo is layer
    assert is_lora_layer(model.base_model.model.bar["foo"])
    # reloading gives adapters in the same places, no more and no fewer
    reloaded = get_peft_model(Nested(), model.peft_config["default"])
    names = {n for n in reloaded.state_dict() if "lora_" in n}
    assert names == {n for n in model.state_dict() if "lora_" in n} and names
    model.peft_config["default"].target_modules = {"foo"}  # the control: the old value adapts `foo` again
    assert names != {n for n in get_peft_model(Nested(), model.peft_config["default"]).state_dict() if "lora_" in n}


def test_target_modules_are_full_names_where_endings_would_catch_more() -> None:
    """`foo` stays, `bar.foo` goes: the list ["foo", "baz.foo"] would adapt `bar.foo` again, so it is one regex."""
    model = nested()
    bar = model.base_model.model.bar
    bar["foo"] = bar["foo"].get_base_layer()
    sync_config(model, "default")
    assert ranks_on_reload(model.peft_config["default"]).keys() == {"foo", "baz.foo"}
    model.peft_config["default"].target_modules = {"foo", "baz.foo"}
    assert ranks_on_reload(model.peft_config["default"]).keys() == {"foo", "bar.foo", "baz.foo"}


def test_other_adapters_stay_on_a_site_without_rank() -> None:
    model, x = one_site_loses(), rows()[0]
    model.add_adapter("other", LoraConfig(r=3, target_modules=["foo"]))
    model.set_adapter("other")
    with torch.no_grad():
        for site in find_sites(model, "other")[0]:
            site.B.normal_(std=0.3)
        start = model(x)
    before = {n: t for n, t in state(model).items() if ".other." in n}
    report = initialize(model, rows(), SMALL, adapter_name="default")
    assert report.sites["foo"]["rank"] == 0
    layer = model.base_model.model.foo
    assert is_lora_layer(layer) and set(layer.lora_A) == {"other"} and "default" not in layer.scaling
    assert layer.active_adapters == ["other"] and model.active_adapters == ["other"]
    with torch.no_grad():
        assert torch.equal(model(x), start)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("default")  # the site without it is simply its base layer then
    with torch.no_grad():
        moved = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(moved, model(x), rtol=1e-3, atol=1e-3)
    assert (moved - start).abs().max() > 0.1
    assert [s.name for s in find_sites(model, "default")[0]] == ["bar.foo", "baz.foo"]
    assert model.merge_and_unload(adapter_names=["other"]) is not None


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_that_lost_sites_can_be_trained_and_merged(use_dora: bool) -> None:
    model, batches = adapted(use_dora=use_dora), text_batches()
    report = initialize(model, batches, InitConfig(method="self", adaptive_ranks=True, rank_budget=2))
    lost = {name for name, site in report.sites.items() if site["rank"] == 0}
    assert len(lost) >= 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = state(model)
    model(**batches[0]).loss.backward()
    optimizer.step()
    assert changed(before, model)
    trained = logits(model, batches[0])
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batches[0]), trained, rtol=1e-4, atol=1e-4)

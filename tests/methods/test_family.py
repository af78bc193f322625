"""The published peers in the frame: their equations, every base policy, what they read, and their errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests import reference
from tests.cases import (
    SIZES,
    Mlp,
    added,
    array,
    draw,
    gradients,
    inputs_of,
    lora,
    mlp,
    output_squares,
    relative_error,
    squares,
    token_batches,
    wrapped,
)
from tests.tiny import KINDS, adapted, changed, logits, state, text_batches
from torch import Tensor, nn

import cntlora
from cntlora import InitConfig, apply_plan, compute_plan, initialize
from cntlora.data.batches import scalar_loss
from cntlora.linalg import low_rank
from cntlora.methods import statistics
from cntlora.methods.method import METHODS, all_options, option_names

PRODUCT = ("pissa", "olora", "corda", "lora_ga", "lora_one", "lora_da", "gora")
ZERO = ("lora", "eva", "whitened")
PEERS = (*PRODUCT, *ZERO)
R, ALPHA = 3, 6.0  # of `cases.lora`: s = 2


def expected(
    method: str, W: np.ndarray, X: list[np.ndarray], G: np.ndarray, f: np.ndarray, s: float, A: np.ndarray
) -> np.ndarray:
    """s·B·A (k, d) as the papers have it, at the strength that is the method's own; A is what was drawn for GoRA."""
    everything = np.hstack(X)
    if method == "pissa":
        B, A = reference.pissa_factors(W, R)
    elif method == "olora":
        B, A = reference.olora_factors(W, R)
        B = s * B
    elif method == "corda":
        B, A = reference.corda_factors(W, everything, R, damping=0.01)
    elif method == "lora_ga":
        B, A = reference.lora_ga_factors(G, R)
        B = s * B
    elif method == "lora_da":
        B, A = reference.lora_da_factors(G, everything, f, R)
        B = s * B
    elif method == "gora":
        B = reference.gora_factor(G, A)
    else:
        B, A = reference.svd_factors(reference.lora_one_delta(G), R)
        B = s * B
    return B @ A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", PRODUCT)
def test_the_product_is_that_of_the_paper(method: str, dtype: torch.dtype) -> None:
    base = mlp(dtype=dtype)
    batches = token_batches(SIZES, dtype=dtype)
    X, G, f = inputs_of(base, batches), gradients(base, batches), output_squares(base, batches)
    W = {name: array(base.get_submodule(name).weight) for name in Mlp.targets}
    plan = compute_plan(wrapped(base), batches, InitConfig(method=method, base="keep"), loss=squares, progress=False)
    tolerance = 1e-8 if dtype == torch.float64 else 2e-4
    for name, site in plan.sites.items():
        A = array(site.A)
        want = expected(method, W[name], X[name], G[name], f[name], ALPHA / R, A)
        assert relative_error(added(site), want) < tolerance, name
        wrong = [draw(seed, *W[name].shape).numpy() for seed in (5, 6)]
        other = expected(method, wrong[0], X[name], wrong[1], f[name], ALPHA / R, A)
        assert relative_error(added(site), other) > 0.3  # the control: another weight and gradient


@pytest.mark.parametrize("center", [True, False])
def test_eva_writes_the_principal_directions_of_the_inputs(center: bool) -> None:
    base, batches = mlp(), [batch + 0.7 for batch in token_batches(SIZES)]
    X = inputs_of(base, batches)
    plan = compute_plan(
        wrapped(base), batches, InitConfig.from_dict({"method": "eva", "center": center}), progress=False
    )
    for name, site in plan.sites.items():
        A = reference.eva_directions(np.hstack(X[name]), R, center)
        assert relative_error(site.A, A) < 1e-8
        assert relative_error(site.A, reference.eva_directions(np.hstack(X[name]), R, not center)) > 1e-2  # control
        assert not site.B.any() and site.file_rank == R


def test_lora_draws_a_as_peft_does_by_site_and_seed() -> None:
    """Uniform in ±1/√d: mean 0, variance 1/(3d); the same for the same seed and site, another for another."""
    model = wrapped(nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 400)).double(), lora(r=100, targets=["0", "1"]))
    plans = [compute_plan(model, None, InitConfig(method="lora", seed=seed), progress=False) for seed in (0, 0, 1)]
    A, again, other = (plan.sites["0"].A for plan in plans)
    assert torch.equal(A, again) and not torch.equal(A, other)
    peft = model.base_model.model[0].lora_A["default"].weight.detach()
    for matrix in (A, peft):
        assert float(matrix.abs().max()) <= 1 / 400**0.5
        assert abs(float(matrix.var()) * 3 * 400 - 1) < 0.02 and abs(float(matrix.mean())) < 1e-3
    assert not torch.equal(A[:, :300], plans[0].sites["1"].A)


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("method", (*PEERS, "descent"))
def test_every_base_policy_holds(method: str, base: str) -> None:
    module, batches = mlp(), token_batches(SIZES)
    pristine = copy.deepcopy(module)
    model = wrapped(module)
    report = initialize(model, batches, InitConfig(method=method, base=base), loss=squares, progress=False)
    x = batches[0]
    moved = relative_error(model(x), pristine(x))
    if base == "keep" and method not in ZERO:
        assert moved > 1e-4
    else:
        assert moved < (1e-12 if base == "subtract" else 1e-14)
    squares(model, x).backward()
    for name, p in model.named_parameters():
        if "lora_B" in name or ("lora_A" in name and method not in ZERO):
            assert float(p.grad.norm()) > 0, name
    ranks = {site["file_rank"] for site in report.sites.values()}
    assert ranks == ({2 * R} if base == "offset" and method not in ZERO else {R})
    untouched = all(torch.equal(module_of(model, n).weight, pristine.get_submodule(n).weight) for n in Mlp.targets)
    assert untouched == (base != "subtract" or method in ZERO)


def module_of(model: nn.Module, name: str) -> Any:
    """The base layer of a site of a PeftModel."""
    return model.get_submodule(f"base_model.model.{name}").get_base_layer()


@pytest.mark.parametrize("method", ["lora", "pissa", "olora"])
def test_methods_of_the_weights_alone_need_no_data(method: str) -> None:
    def never(model: nn.Module, batch: Any) -> None:
        raise AssertionError("the model was called")

    plans = [compute_plan(wrapped(mlp()), batches, InitConfig(method=method), forward=never, progress=False)
             for batches in (None, token_batches(SIZES))]  # fmt: skip
    for name, site in plans[0].sites.items():
        assert torch.equal(site.A, plans[1].sites[name].A)
        assert site.tokens == 0 and site.effective_rank is None
    read = compute_plan(wrapped(mlp()), token_batches(SIZES), InitConfig(method="self"), progress=False)
    shown, control = (str(cntlora.InitReport.of(plan)) for plan in (plans[0], read))
    assert "eff. rank" not in shown and "eff. rank" in control


@pytest.mark.parametrize("method", ["eva", "corda", "descent", "whitened"])
@pytest.mark.parametrize("large", [1024, 1])  # inputs held as they are, and by their rows
def test_a_rank_that_costs_too_much_is_left_out(method: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "LARGE", large)
    plans = []
    for counted in (statistics.COUNTED, 1):
        monkeypatch.setattr(statistics, "COUNTED", counted)
        config = InitConfig(method=method)
        plans.append(compute_plan(wrapped(mlp()), token_batches(SIZES), config, loss=squares, progress=False))
    for name, site in plans[0].sites.items():
        other = plans[1].sites[name]
        assert other.effective_rank is None and site.effective_rank is not None  # the control
        assert torch.equal(site.A, other.A) and torch.equal(site.B, other.B)


@pytest.mark.parametrize(
    "method",
    ["self", "descent", "whitened", "whitened_descent", "eva", "corda", "lora_ga", "lora_one", "lora_da", "gora"],
)
def test_methods_that_read_data_say_so(method: str) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' reads (inputs|gradients)"):
        compute_plan(wrapped(mlp()), None, InitConfig(method=method))


# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_how_rows_are_split_into_batches_changes_nothing(method: str) -> None:
    base, (x,) = mlp(), token_batches(((8, 6),))
    whole, halves = ([x], [x[:3], x[3:]])
    one, two = (
        compute_plan(wrapped(copy.deepcopy(base)), batches, InitConfig(method=method), progress=False)
        for batches in (whole, halves)
    )
    ours = [compute_plan(wrapped(copy.deepcopy(base)), b, InitConfig(method="self", base="keep"), progress=False)
            for b in (whole, halves)]  # fmt: skip
    for name in Mlp.targets:
        assert relative_error(one.sites[name].A, two.sites[name].A) < 1e-8
        assert relative_error(added(ours[0].sites[name]), added(ours[1].sites[name])) > 1e-3  # eq. 18 is per batch


@pytest.mark.parametrize(
    ("method", "side"),  # BERT's pooler reads position 0, which padding on the left hides: gradients differ by right
    [
        *(("eva", "left"), ("corda", "left")),
        *(
            (m, "right")
            for m in (
                "eva",
                "corda",
                "descent",
                "whitened",
                "whitened_descent",
                "lora_ga",
                "lora_one",
                "lora_da",
                "gora",
            )
        ),
    ],
)
def test_padding_changes_nothing(method: str, side: str) -> None:
    """BERT's own masking hides padding from the loss; the statistics have to do the same."""
    batches = text_batches(2, rows=4, tokens=6)
    plain = adapted("bert")
    padded = []
    for batch in batches:
        pad = {k: torch.zeros(4, 3, dtype=torch.long) for k in ("input_ids", "attention_mask")}
        joined = {
            k: torch.cat([pad[k], batch[k]] if side == "left" else [batch[k], pad[k]], dim=1)
            for k in ("input_ids", "attention_mask")
        }
        positions = (joined["attention_mask"].cumsum(1) - 1).clamp_min(0)
        padded.append({**joined, "labels": batch["labels"], "position_ids": positions})
    unpadded = [{**b, "position_ids": (b["attention_mask"].cumsum(1) - 1).clamp_min(0)} for b in batches]
    config = InitConfig(method=method, base="keep")
    one, two = (compute_plan(plain, b, config, progress=False) for b in (unpadded, padded))
    for name in one.sites:
        assert one.sites[name].tokens == two.sites[name].tokens
        a, b = ((s.sites[name].B, s.sites[name].A) for s in (one, two))
        assert relative_error(b[1], a[1]) < 1e-3
        assert relative_error(b[0], a[0]) < 1e-3 or not a[0].any()
    if method in ("eva", "corda"):  # the control: with padding counted the same batches give another start
        counted = compute_plan(plain, padded, config, token_mask="none", progress=False)
        errors = [relative_error(counted.sites[n].A, one.sites[n].A) for n in one.sites]
        assert max(errors) > 1e-2


def test_adaptive_ranks_follow_the_explained_variance() -> None:
    base, batches = mlp(), token_batches(SIZES)
    X = inputs_of(base, batches)
    config = InitConfig(method="eva", adaptive_ranks=True, rank_budget=11, max_rank=6)
    plan = compute_plan(wrapped(base), batches, config, progress=False)
    centred = {n: np.hstack(x) - np.hstack(x).mean(axis=1, keepdims=True) for n, x in X.items()}
    # a matrix of the site's own shape limits its rank, the inputs have more directions than `down` has outputs
    wanted = reference.allocate(centred, 11, max_rank=6)
    assert {n: s.rank for n, s in plan.sites.items()} == wanted
    assert len(set(wanted.values())) > 1


def test_adaptive_ranks_of_lora_ga_leave_room_for_both_halves() -> None:
    model, batches = wrapped(mlp()), token_batches(SIZES)
    config = InitConfig(method="lora_ga", adaptive_ranks=True, rank_budget=20)
    plan = compute_plan(model, batches, config, loss=squares, progress=False)
    assert sum(s.rank for s in plan.sites.values()) == 20
    assert all(2 * s.rank <= min(s.B.shape[0], s.A.shape[1]) for s in plan.sites.values())
    with pytest.raises(ValueError, match="rank_budget"):
        compute_plan(model, batches, InitConfig(method="lora_ga", adaptive_ranks=True, rank_budget=27), loss=squares)


# --- gradients ----------------------------------------------------------------------------------------------


def test_the_model_is_as_it_was_after_reading_gradients() -> None:
    model = adapted("bert")
    model.base_model.model.classifier.weight.requires_grad_(True)
    model.base_model.model.classifier.weight.grad = torch.ones_like(model.base_model.model.classifier.weight)
    before, wanted = state(model), [p.requires_grad for p in model.parameters()]
    compute_plan(model, text_batches(), InitConfig(method="lora_ga"), progress=False)
    assert not changed(before, model)
    assert [p.requires_grad for p in model.parameters()] == wanted
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 1 and bool((grads[0] == 1).all())


def test_also_after_an_exception() -> None:
    model = adapted("bert")
    wanted = [p.requires_grad for p in model.parameters()]

    def fails(model: nn.Module, batch: Any) -> Tensor:
        assert any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)  # the control
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        compute_plan(model, text_batches(), InitConfig(method="lora_ga"), loss=fails, progress=False)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_conv1d_gradients_are_turned_round() -> None:
    model, batches = adapted("gpt2"), KINDS["gpt2"].batches()
    plan = compute_plan(model, batches, InitConfig(method="lora_one", base="keep"), progress=False)
    pristine = adapted("gpt2")
    for p in pristine.parameters():
        p.requires_grad_(True)
    for batch in batches:
        (pristine(**batch).loss / len(batches)).backward()
    for name, site in plan.sites.items():
        G = array(pristine.get_submodule(f"base_model.model.{name}").get_base_layer().weight.grad).T
        B, A = reference.svd_factors(reference.lora_one_delta(G), site.rank)
        assert relative_error(added(site), site.scaling * B @ A) < 1e-3


def test_without_a_loss_one_clear_error() -> None:
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in text_batches()]
    with pytest.raises(ValueError, match=r"batch 0: this method reads gradients .* labels .* or give loss="):
        compute_plan(adapted("bert"), batches, InitConfig(method="lora_ga"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": torch.ones(2)}, "needs a loss"),
        (torch.ones(2, requires_grad=True), "needs a loss"),
        (torch.tensor(1.0), "does not depend on the weights"),
        (torch.tensor(float("nan"), requires_grad=True), "the loss is nan"),
        (None, "needs a loss"),
    ],
)
def test_bad_losses(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scalar_loss(output, 3)
    assert scalar_loss((torch.ones((), requires_grad=True), 5), 0) == 1  # the control: the first of a tuple


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_option_without_effect_is_an_error_and_one_with_an_effect_has_it(method: str) -> None:
    values: dict[str, Any] = {
        "decomposition": "qr_pivoted", "p": 0.9, "strength": 3.0, "rtol": 0.3, "gram": "mean", "initial_weight": "zero",
        "batch_weights": (1.0, 0.2, 3.0, 0.5), "root": "symmetric", "shift_constant": 3.0, "center": False,
        "damping": 2.0, "motion": 8.0, "variance": 300.0, "samples": 7,
    }  # fmt: skip
    assert set(values) == set(all_options())
    batches = [batch + 0.3 for batch in token_batches(SIZES)]

    def start(**options: Any) -> Any:
        config = InitConfig.from_dict({"method": method, "base": "keep", **options})
        return compute_plan(wrapped(mlp()), batches, config, loss=squares, progress=False).sites["up"]

    plain = start()
    for option, value in values.items():
        if option in option_names(METHODS[method]):
            other = start(**{option: value})
            assert not (torch.equal(other.A, plain.A) and torch.equal(other.B, plain.B)), option
        else:
            with pytest.raises(ValueError, match=f"{option}: .* has no effect with method '{method}'"):
                InitConfig.from_dict({"method": method, **{option: value}})


def test_wrong_combinations_say_so() -> None:
    with pytest.raises(ValueError, match="method 'lora' has no spectrum"):
        InitConfig(method="lora", adaptive_ranks=True)
    with pytest.raises(ValueError, match="damping"):
        InitConfig.from_dict({"method": "corda", "damping": -1})
    with pytest.raises(ValueError, match=r"min\(in, out\)/2, which lora_ga needs = 3"):
        batches, loss = token_batches(SIZES), squares
        compute_plan(wrapped(mlp(), lora(r=4)), batches, InitConfig(method="lora_ga"), loss=loss)
    with pytest.raises(ValueError, match="raise damping"):
        compute_plan(
            wrapped(mlp()),
            token_batches(((1, 2),)),
            InitConfig.from_dict({"method": "corda", "damping": 0.0}),
            progress=False,
        )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_source_and_its_row_in_the_docs(method: str) -> None:
    from pathlib import Path

    docs = Path(__file__).parents[2]
    assert METHODS[method].source and METHODS[method].summary
    for page in ("README.md", "docs/math.md"):
        assert f"`{method}`" in (docs / page).read_text() or f'"{method}"' in (docs / page).read_text(), page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PEERS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    batch, model = text_batches()[0], adapted("bert", dtype=dtype)
    before = logits(model, batch)
    initialize(model, text_batches(), InitConfig(method=method), progress=False)
    torch.testing.assert_close(logits(model, batch), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", PRODUCT)
def test_dora_starts_as_w_plus_the_product(method: str) -> None:
    """With `keep` DoRA's function is that of W + s·B·A; with magnitudes left at ‖W‖ it is another (the control)."""
    batches, batch = text_batches(), text_batches(seed=9)[0]
    strength = {"lora_ga": None, "lora_da": 300.0}.get(method, 1.5)  # LoRA-DA's own start is very small
    config = InitConfig.from_dict({"method": method, "base": "keep", "strength": strength})
    plain, dora = adapted("bert"), adapted("bert", use_dora=True)
    for model in (plain, dora):
        initialize(model, batches, config, progress=False)
    torch.testing.assert_close(logits(dora, batch), logits(plain, batch), rtol=1e-4, atol=1e-4)
    for site in cntlora.model.sites.find_sites(dora)[0]:
        with torch.no_grad():
            site.magnitude.copy_(torch.linalg.vector_norm(site.weight(), dim=1))
    assert (logits(dora, batch) - logits(plain, batch)).abs().max() > 1e-4


def test_large_float16_inputs_are_finite() -> None:
    """Their sum is not, above 65,504."""
    model = wrapped(nn.Sequential(nn.Linear(64, 64)).half(), lora(targets=["0"]))
    batch = torch.full((4, 64, 64), 30.0, dtype=torch.float16)
    batch += torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    plan = compute_plan(model, [batch], InitConfig(method="lora_ga"), loss=lambda m, b: m(b).float().square().mean())
    assert plan.sites["0"].tokens == 256
    batch[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf|the loss is"):
        compute_plan(model, [batch], InitConfig(method="lora_ga"), loss=lambda m, b: m(b).float().square().mean())


def test_small_float16_gradients_do_not_vanish() -> None:
    """Both methods ignore the scale of the loss, so a loss of 1e-6 times the usual gives the same start."""
    plans = []
    for factor in (1.0, 1e-5):
        model = adapted("bert", dtype=torch.float16)
        loss = lambda m, b, factor=factor: factor * m(**b).loss.float()  # noqa: E731
        plans.append(compute_plan(model, text_batches(), InitConfig(method="lora_one", base="keep"), loss=loss))
    for name, site in plans[0].sites.items():
        assert relative_error(added(plans[1].sites[name]), added(site)) < 0.05


def test_neighbours_with_one_input_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v see the same tensor: three inputs for five sites. In one thread, where neighbours come in turn."""
    torch.set_num_threads(1)
    calls = []
    plain = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: calls.append(M.shape) or plain(M))
    plan = compute_plan(wrapped(mlp()), token_batches(SIZES), InitConfig(method="eva"), progress=False)
    assert len(plan.sites) == 5 and len(calls) == 3


def test_spectra_of_eva_hold_no_square_matrix_for_each_site() -> None:
    from cntlora.execution.site_spectra import spectrum_of
    from cntlora.methods.eva import eva_target
    from cntlora.model.sites import find_sites

    X = draw(1, 10, 30)
    target = eva_target(X @ X.mT, X.sum(dim=1), 30, True)
    kept = spectrum_of(find_sites(wrapped(mlp()))[0][0], target, 4, False)
    assert kept.Vh.shape == (4, 10) and kept.S.shape == (10,)
    assert kept.Vh.untyped_storage().nbytes() == 4 * 10 * 8


def test_a_mask_for_a_method_that_reads_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="token_mask: has no effect with method 'lora_ga'"):
        compute_plan(adapted("bert"), text_batches(), InitConfig(method="lora_ga"), token_mask="none")


def test_a_plan_of_a_peer_survives_its_file(tmp_path: Any) -> None:
    plan = compute_plan(wrapped(mlp()), token_batches(SIZES), InitConfig(method="eva"), progress=False)
    plan.save(tmp_path / "plan.safetensors")
    model = wrapped(mlp())
    apply_plan(model, cntlora.InitPlan.load(tmp_path / "plan.safetensors"))
    for site in cntlora.model.sites.find_sites(model)[0]:
        assert torch.equal(site.A, plan.sites[site.name].A)


def test_a_report_says_that_a_zero_start_needs_no_policy() -> None:
    plans = [compute_plan(wrapped(mlp()), token_batches(SIZES), InitConfig(method=m), progress=False)
             for m in ("eva", "self")]  # fmt: skip
    titles = [str(cntlora.InitReport.of(plan)).splitlines()[0] for plan in plans]
    assert "B = 0" in titles[0] and "offset" not in titles[0] and "base offset" in titles[1]


@pytest.mark.parametrize(
    ("method", "decomposition", "passes"), [("self", "svd", 1), ("self", "qr", 2), ("corda", "svd", 2)]
)
def test_with_adaptive_ranks_a_target_is_made_again_only_where_its_matrix_is_needed(
    method: str, decomposition: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cntlora.execution.reading import Statistics

    made: list[str] = []
    plain = Statistics.target
    monkeypatch.setattr(Statistics, "target", lambda self, site: made.append(site.name) or plain(self, site))
    config = InitConfig.from_dict({"method": method, "decomposition": decomposition, "adaptive_ranks": True})
    plan = compute_plan(wrapped(mlp()), token_batches(SIZES), config, progress=False)
    extended = [n for n, s in plan.sites.items() if s.rank > 2 * R]
    assert sorted(made) == sorted([*plan.sites] * passes + (extended if passes == 1 else []))

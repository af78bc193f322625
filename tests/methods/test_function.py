"""Functions of tensors as methods: equal to the methods of the same equations, and their errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tests.cases import SIZES, added, gradients, inputs_of, mlp, relative_error, squares, token_batches, wrapped
from torch import Tensor

import cntlora
from cntlora import InitConfig, InitPlan, compute_plan, initialize
from cntlora.methods import function as module
from cntlora.methods.factors import lora_down
from cntlora.methods.method import METHODS


@pytest.fixture(autouse=True)
def _table_as_found() -> Any:
    found = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(found)


def all_of_w(W: Tensor) -> Tensor:
    """The pretrained weight itself."""
    return W


def by_covariance(W: Tensor, C: Tensor, r: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """CorDA, from its equation."""
    damped = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    return U[:, :r] * S[:r], torch.linalg.solve(damped, Vh[:r].mT).mT


def down_the_gradient(G: Tensor) -> Tensor:
    """LoRA-One, from its equation."""
    return -G / torch.linalg.matrix_norm(G, 2) / 128


def natural_step(W: Tensor, C: Tensor, G: Tensor, r: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The direction of descent, from its equation."""
    damped = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    L = torch.linalg.cholesky(damped)
    eta = ((W @ C) * W).sum() / len(W)
    U, S, Vh = torch.linalg.svd(-eta * torch.linalg.solve_triangular(L, G.mT, upper=False).mT, full_matrices=False)
    return U[:, :r] * S[:r], torch.linalg.solve_triangular(L.mT, Vh[:r].mT, upper=True).mT


def drawn(W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Plain LoRA."""
    return torch.zeros(len(W), r), lora_down(r, W.shape[1], generator)


EQUATIONS: list[tuple[Callable[..., Any], InitConfig]] = [
    (all_of_w, InitConfig(cntlora.Pissa(), "keep")),
    (by_covariance, InitConfig(cntlora.Corda(), "keep")),
    (down_the_gradient, InitConfig(cntlora.LoraOne(strength=1.0), "keep")),
    (natural_step, InitConfig(cntlora.Descent(strength=0.1))),
]


def plan_of(config: InitConfig, **arguments: Any) -> InitPlan:
    return compute_plan(wrapped(mlp()), token_batches(SIZES), config, progress=False, **arguments)


@pytest.mark.parametrize(("function", "built_in"), EQUATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_function_gives_what_the_method_of_its_equation_gives(
    function: Callable[..., Any], built_in: InitConfig
) -> None:
    loss = {"loss": squares} if built_in.chosen.reads == "gradients" else {}
    own, other = plan_of(InitConfig(function, base="keep"), **loss), plan_of(built_in, **loss)
    assert own.config.chosen.reads == built_in.chosen.reads
    for name, site in own.sites.items():
        mine, its = added(site), added(other.sites[name])
        size = (mine * its).sum() / (mine * mine).sum()  # of descent, which the loss finds
        if function is not natural_step:
            assert abs(size - 1) < 1e-8
        assert relative_error(size * mine, its) < 1e-8
        assert relative_error(mine, mine[::-1].copy()) > 1e-3  # a control: rows in another order are not the same


def test_a_drawn_start_is_plain_lora_of_the_same_seed() -> None:
    own, lora = (plan_of(InitConfig(method, base="keep", seed=3)) for method in (drawn, "lora"))
    other = plan_of(InitConfig(drawn, base="keep", seed=4))
    for name, site in own.sites.items():
        assert torch.equal(site.A, lora.sites[name].A) and not site.B.any()
        assert not torch.equal(site.A, other.sites[name].A)


def test_parameters_are_what_they_are_named() -> None:
    seen: dict[str, Any] = {}

    def reader(W: Tensor, C: Tensor, mean: Tensor, n: int, G: Tensor) -> Tensor:
        seen[f"{tuple(W.shape)} {float(W.sum())}"] = W, C, mean, n, G
        return W

    base, batches = mlp(), token_batches(SIZES)
    X = {name: np.hstack(found) for name, found in inputs_of(base, batches).items()}
    gradient = gradients(base, batches)
    plan_of(InitConfig(reader, base="keep"), loss=squares)
    assert len(seen) == len(X)
    for W, C, mean, n, G in seen.values():
        name = next(name for name in X if torch.equal(base.get_submodule(name).weight.double(), W))
        assert n == X[name].shape[1] and {C.dtype, mean.dtype, G.dtype, W.dtype} == {torch.float64}
        assert relative_error(C.numpy(), X[name] @ X[name].T / n) < 1e-10
        assert relative_error(mean.numpy(), X[name].mean(1)) < 1e-10
        assert relative_error(G.numpy(), gradient[name]) < 1e-6


def test_options_are_those_of_a_method() -> None:
    def scaled(W: Tensor, share: float = 0.5, sign: Literal["plus", "minus"] = "plus", times: int = 0) -> Tensor:
        return W * share * (1 if sign == "plus" else -1) * (1 + times)

    half = plan_of(InitConfig(scaled, base="keep"))
    config = InitConfig.from_dict({"method": "scaled", "share": 1.0, "sign": "minus", "times": 2, "base": "keep"})
    assert config == InitConfig(cntlora.from_function(scaled)(share=1.0, sign="minus", times=2), "keep")
    for name, site in plan_of(config).sites.items():
        assert relative_error(added(site), -6 * added(half.sites[name])) < 1e-8
    for wrong, words in (({"share": "much"}, "number"), ({"sign": "up"}, "plus, minus"), ({"times": 1.5}, "whole")):
        with pytest.raises((TypeError, ValueError), match=words):
            InitConfig.from_dict({"method": "scaled", **wrong})


def test_delta_w_takes_adaptive_ranks_and_given_factors_do_not() -> None:
    plan = plan_of(InitConfig(all_of_w, adaptive_ranks=True))
    other = plan_of(InitConfig("pissa", adaptive_ranks=True))
    assert {n: s.rank for n, s in plan.sites.items()} == {n: s.rank for n, s in other.sites.items()}
    with pytest.raises(ValueError, match="adaptive_ranks: method 'by_covariance'"):
        InitConfig(by_covariance, adaptive_ranks=True)


def test_a_start_keeps_the_function_and_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batches = wrapped(mlp()), token_batches(SIZES)
    before = copy.deepcopy(model)(batches[0])
    report = initialize(model, batches, InitConfig(by_covariance), progress=False)
    assert "by_covariance" in str(report)
    torch.testing.assert_close(model(batches[0]), before)
    plan = plan_of(InitConfig(by_covariance))
    plan.save(tmp_path / "plan.safetensors")
    assert InitPlan.load(tmp_path / "plan.safetensors").config == plan.config
    del METHODS["by_covariance"]  # as in another process
    with pytest.raises(ValueError, match=r"method: 'by_covariance' is not known.*file.py:function"):
        InitPlan.load(tmp_path / "plan.safetensors")


def test_a_function_is_found_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "starts.py"
    file.write_text("from __future__ import annotations\ndef whole(W, share: float = 1.0):\n    return share * W\n")
    plan = plan_of(InitConfig(f"{file}:whole", base="keep"))
    for name, site in plan_of(InitConfig("pissa", base="keep")).sites.items():
        assert relative_error(added(plan.sites[name]), added(site)) < 1e-8
    assert plan_of(InitConfig("tests.methods.test_function:all_of_w")).config.chosen.summary == (
        "The pretrained weight itself"
    )
    for name, words in (
        (f"{file}:hole", "did you mean 'whole'"),
        (f"{tmp_path}/start.py:whole", "there is no file"),
        ("no_module_of_this_name:whole", "No module named"),
    ):
        with pytest.raises(ValueError, match=words):
            InitConfig(name)


def test_wrong_functions_are_refused_by_name() -> None:
    def unknown(W: Tensor, X: Tensor) -> Tensor:
        return W

    def pissa(W: Tensor) -> Tensor:
        return W

    def texts(W: Tensor, where: str = "here") -> Tensor:
        return W

    def seeded(W: Tensor, seed: int = 0) -> Tensor:
        return W

    def many(*W: Tensor) -> Tensor:
        return W[0]

    for function, words in (
        (unknown, r"method 'unknown': parameter: 'X' is not known.*give it a default"),
        (pissa, "'pissa' is a method of cntlora"),
        (texts, "option where: expected a number"),
        (seeded, "'seed' is an option of InitConfig"),
        (many, "given by name"),
        (lambda W: W, "made by def"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            InitConfig(function)


def test_what_a_function_returns_is_checked_at_its_site() -> None:
    def square(W: Tensor) -> Tensor:
        return W.mT @ W

    def pair(W: Tensor) -> tuple[Tensor, Tensor]:
        return W, W

    def turned(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return W[:r], W[:, :r]

    def failing(W: Tensor) -> Tensor:
        raise ZeroDivisionError("by zero")

    for function, words in (
        (square, r"site .*: square: expected ΔW \(\d+, \d+\), got a tensor"),
        (pair, "got tuple of a tensor.*has the parameter r"),
        (turned, r"expected B \(\d+, 3\) and A \(3, \d+\), got tuple of a tensor"),
        (failing, "site .*: failing raised ZeroDivisionError: by zero"),
    ):
        model = wrapped(mlp())
        state = copy.deepcopy(model.state_dict())
        with pytest.raises((ValueError, RuntimeError), match=words):
            initialize(model, token_batches(SIZES), InitConfig(function), progress=False)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("function", [all_of_w, by_covariance, down_the_gradient, natural_step])
def test_an_estimator_that_is_given_up_is_gone_with_its_sums(function: Callable[..., Any]) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.own = lambda: self

    estimator = cntlora.from_function(function)().estimator(lambda name: torch.eye(3), InitConfig())
    gc.collect()
    gc.disable()
    try:
        held, control = weakref.ref(estimator), weakref.ref(Cycle())
        del estimator
        assert held() is None and control() is not None  # what holds itself waits until Python looks for cycles
    finally:
        gc.enable()


def test_options_cannot_hide_those_of_the_configuration() -> None:
    assert set(module._FIELDS) == {field.name for field in fields(InitConfig)}


def test_the_example_of_the_docs_gives_inputs_of_one_size() -> None:
    page = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
    example = page.read_text("utf-8").split("```python\n")[1].split("```")[0]
    model, batches = wrapped(mlp()), token_batches(SIZES)
    exec(compile(example, str(page), "exec"), {"model": model, "batches": batches})
    X = {name: np.hstack(found) for name, found in inputs_of(mlp(), batches).items()}
    for name, x in X.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        A = layer.lora_A["default"].weight.detach().double().numpy()
        moment = (A @ x) @ (A @ x).T / x.shape[1]
        assert not layer.lora_B["default"].weight.any()
        assert np.diag(moment).max() < 1.03 * np.diag(moment).min()
        leading = np.linalg.eigvalsh(x @ x.T / x.shape[1])[-len(A) :]  # a control: sizes without the division
        assert leading[-1] > 1.06 * leading[0]

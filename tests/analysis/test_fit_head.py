"""A new head that is fitted: what changes, what does not, with which losses, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import connect, run
from tests.tiny import Batch, Wrapper, adapted, causal_batches, changed, image_batches, one_shot, state, text_batches
from torch import Tensor, nn

from cntlora import FittedHead, InitConfig, InitPlan, apply_plan, compute_plan, fit_head, initialize

HEADS = {"bert": "classifier", "vit": "classifier"}


def batches(kind: str = "bert", count: int = 6, rows: int = 16, seed: int = 0) -> list[Batch]:
    """Whose classes the features of an untrained model tell."""
    made = (text_batches if kind == "bert" else image_batches)(count, rows=rows, seed=seed)
    for batch in made:
        if kind == "bert":
            batch["labels"] = batch["input_ids"][:, 0] % 3
        else:
            batch["labels"] = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(seed))
            batch["pixel_values"] += 2.0 * (batch["labels"][:, None, None, None] - 1)
    return made


def model(kind: str = "bert", **options: Any) -> Any:
    return adapted(kind, modules_to_save=[HEADS[kind]], **options)


def mean_loss(adapter: nn.Module, of: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float(adapter(**batch).loss) for batch in of) / len(of)


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_alone_is_fitted_and_the_loss_falls_on_other_batches(kind: str) -> None:
    adapter, others = model(kind), batches(kind, seed=5)
    before, start = state(adapter), mean_loss(adapter, others)
    found = fit_head(adapter, batches(kind))
    assert changed(before, adapter) == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    assert found.loss == "cross-entropy" and found.rows == 96 and found.batches == 6 and found.ridge
    assert found.loss_after < 0.98 * found.loss_before
    assert mean_loss(adapter, others) < start - 0.5 * (found.loss_before - found.loss_after)  # on batches not read
    assert "fitted to 96 rows of 6 batches, cross-entropy" in str(found)


def test_the_model_is_left_as_found() -> None:
    adapter = model()
    adapter.train()
    grads = {name: p.requires_grad for name, p in adapter.named_parameters()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    fit_head(adapter, batches())
    assert torch.equal(torch.get_rng_state(), random) and adapter.training
    assert grads == {name: p.requires_grad for name, p in adapter.named_parameters()}
    assert all(p.grad is None for p in adapter.parameters())
    assert not any(module._forward_hooks for module in adapter.modules())


def test_a_head_that_is_fitted_is_left_as_it_is() -> None:
    adapter = model()
    fit_head(adapter, batches())
    head = dict(adapter.named_modules())["base_model.model.classifier.modules_to_save.default"]
    with torch.no_grad():  # as a trained one: sure of what it says
        for parameter in head.parameters():
            parameter.mul_(20.0)
    right = batches()
    for batch in right:
        batch["labels"] = adapter(**batch).logits.argmax(-1)
    before = state(adapter)
    found = fit_head(adapter, right)
    assert found.ridge is None and not changed(before, adapter) and "left as it was" in str(found)


def test_a_loss_of_the_user_and_an_iterator_will_do() -> None:
    """Class weights and smoothed labels are in the gradient, whoever wrote the loss."""

    def weighted(adapter: nn.Module, batch: Batch) -> Tensor:
        weight = torch.tensor([1.0, 2.0, 3.0])
        return nn.functional.cross_entropy(adapter(**batch).logits, batch["labels"], weight=weight)

    one, other = model(), model()
    found = fit_head(one, one_shot(batches()), loss=weighted, num_batches=4)
    fit_head(other, batches(), num_batches=4)
    assert found.batches == 4 and found.loss == "cross-entropy"
    assert changed(state(one), other)  # control: other weights, another head


def test_it_is_saved_with_the_adapter_and_goes_before_initialize(tmp_path: Path) -> None:
    """Gradients come through the head, so that the plan is another one."""
    plain, fitted = model(), model()
    fit_head(fitted, batches())
    A, other = (
        next(iter(compute_plan(m, batches(), InitConfig("whitened")).sites.values())).A for m in (plain, fitted)
    )
    assert not torch.allclose(A.abs(), other.abs(), rtol=0.1)
    want = state(fitted)["base_model.model.classifier.modules_to_save.default.weight"]
    initialize(fitted, batches())
    fitted.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["base_model.model.classifier.weight"], want)


class TwoHeads(nn.Module):
    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6).requires_grad_(False)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)
        self.hidden = hidden

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        h = self.body(x)
        if self.hidden:  # a head of two layers, of which the last gives the outputs
            return {"loss": nn.functional.cross_entropy(self.two(torch.cat([self.one(h), h], 1)[:, :6]), labels)}
        return {"loss": nn.functional.cross_entropy(self.one(h) + self.two(h), labels)}


def drawn(rows: int = 16, count: int = 3) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(rows, 5, generator=g) for _ in range(count)]
    return [{"x": one, "labels": one[:, :3].argmax(-1)} for one in x]


def test_of_a_head_of_several_layers_the_last_is_fitted() -> None:
    torch.manual_seed(0)
    heads = TwoHeads(hidden=True)
    before = state(heads)
    assert fit_head(heads, drawn()).name == "two" and changed(before, heads) == {"two.weight", "two.bias"}


def hinge(adapter: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.multi_margin_loss(adapter(**batch).logits, batch["labels"])


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no head": (lambda: adapted("bert"), batches, {}, "no linear layer trains with its own weight"),
    "another loss": (model, batches, {"loss": hinge}, "the loss is not one of cross-entropy"),
    "no labels": (
        model,
        lambda: [{k: v for k, v in b.items() if k != "labels"} for b in batches()],
        {},
        "batch 0 gives no loss",
    ),
    "no batches": (model, list, {}, "expected at least one"),
    "two heads": (TwoHeads, drawn, {}, "of several heads"),
    "fewer rows than outputs": (model, lambda: batches(rows=2, count=1), {}, "3 outputs, and 2 rows"),
    "a language model": (
        lambda: adapted("llama", modules_to_save=["lm_head"]),
        lambda: causal_batches(1, rows=2, tokens=4),
        {},
        "expected as many rows",
    ),
    "num_batches": (model, batches, {"num_batches": 0}, "expected at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_and_nothing_changes(case: str) -> None:
    make, data, options, message = REFUSED[case]
    adapter = make()
    before = state(adapter)
    with pytest.raises(ValueError, match=message):
        fit_head(adapter, data(), **options)
    assert not changed(before, adapter) and not any(module._forward_hooks for module in adapter.modules())


def of_both(rank: int, world: int, folder: Path) -> Any:
    connect(rank, world, folder)
    adapter = model()
    found = fit_head(adapter, batches()[3 * rank : 3 * rank + 3])
    return [found.rows, found.batches, adapter.base_model.model.classifier.modules_to_save.default.weight.tolist()]


def test_of_many_rows_some_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cntlora.execution.head.MOST_ROWS", 200)
    adapter, others = model(), batches(seed=5)
    start = mean_loss(adapter, others)
    found = fit_head(adapter, batches(rows=96))
    assert found.rows == 200 and found.batches == 6 and mean_loss(adapter, others) < start


def test_processes_fit_one_head_to_the_batches_of_all(tmp_path: Path) -> None:
    first, second = run(__file__, tmp_path, {"of_both": 2})["of_both"]
    assert first == second and first[:2] == [96, 6], first
    alone = model()
    found: FittedHead = fit_head(alone, batches())
    want = alone.base_model.model.classifier.modules_to_save.default.weight
    assert found.rows == 96 and torch.allclose(torch.tensor(first[2]), want, rtol=1e-3, atol=1e-4)


def test_the_default_start_fits_a_new_head_and_says_so() -> None:
    adapter, alone = model(), model()
    report = initialize(adapter, batches())
    fitted = fit_head(alone, batches())
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(state(adapter)[name], state(alone)[name]) and name in changed(state(model()), adapter)
    assert str(fitted) in str(report) and report.to_dict()["head"] == fitted.to_dict()
    plain = model()
    named = initialize(plain, batches(), InitConfig("whitened"))
    assert name not in changed(state(model()), plain) and named.head is None  # a method alone is that method
    asked = model()
    initialize(asked, batches(), InitConfig("whitened", fit_head=True))
    assert not changed(state(asked), adapter)  # gradients were read through the same head
    assert changed(state(plain), adapter) - {name, name.replace("weight", "bias")}  # control: through another


def test_a_plan_holds_the_head_and_leaves_the_model_alone(tmp_path: Path) -> None:
    adapter, other = model(), model()
    before = state(adapter)
    plan = compute_plan(adapter, one_shot(batches()))
    assert not changed(before, adapter) and plan.head is not None
    plan.save(tmp_path / "plan.safetensors")
    loaded = InitPlan.load(tmp_path / "plan.safetensors")
    assert loaded.head is not None and str(loaded.head) == str(plan.head) and loaded.config.fit_head
    apply_plan(other, loaded)
    initialize(adapter, batches())
    assert not changed(state(other), adapter)
    with pytest.raises(ValueError, match="trains no such linear layer"):
        apply_plan(adapted("bert"), loaded)


def test_where_no_head_can_be_fitted_the_default_goes_on_and_says_why() -> None:
    adapter = model()
    before = state(adapter)
    report = initialize(adapter, batches(), loss=hinge)
    assert "head: not fitted, layer classifier" in str(report) and report.head is None
    assert report.to_dict()["head_line"] in str(report).splitlines()  # a program is told the reason too
    assert not any("classifier" in name for name in changed(before, adapter))
    assert "head" not in str(initialize(adapted("bert"), batches()))  # none trains
    with pytest.raises(ValueError, match="the loss is not one of"):
        initialize(model(), batches(), InitConfig(fit_head=True), loss=hinge)
    left = model()
    assert initialize(left, batches(), InitConfig(fit_head=False)).head is None
    with pytest.raises(TypeError, match="fit_head"):
        InitConfig(fit_head="yes")  # type: ignore[arg-type]


def test_a_head_has_the_name_of_the_base_model_however_it_is_wrapped() -> None:
    bare, wrapped, named = model(), Wrapper(model()), model(adapter_name="other")
    plan = compute_plan(bare, batches())
    assert plan.head is not None and plan.head.name == "classifier"
    apply_plan(wrapped, plan)
    initialize(bare, batches())
    assert not changed(state(bare), wrapped.module)
    assert fit_head(named, batches(), adapter_name="other").name == "classifier"

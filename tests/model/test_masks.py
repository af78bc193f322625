"""Base "offset": the negative half never trains, whatever happens to the model, and it trains as subtract does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import KINDS, adapted, base_model, changed, logits, lora_config, state, text_batches, train
from torch import Tensor, nn

from cntlora import InitConfig, freeze_offset, initialize, save_adapter
from cntlora.model.freezing import mask_gradient, unmask
from cntlora.model.sites import find_sites


def offset_model(kind: str = "bert", **options: Any) -> Any:
    model = adapted(kind, **options)
    initialize(model, KINDS[kind].batches(), config=InitConfig(method="self"))
    return model


def halves(model: nn.Module, which: str, adapter: str = "default") -> list[Tensor]:
    """The positive or negative halves of all factors, copies."""
    found = []
    for site in find_sites(model, adapter)[0]:
        h = site.A.shape[0] // 2
        part = slice(0, h) if which == "positive" else slice(h, None)
        found += [site.A.detach()[part].clone(), site.B.detach()[:, part].clone()]
    return found


def gradients(model: nn.Module, which: str, adapter: str = "default") -> list[Tensor]:
    found = []
    for site in find_sites(model, adapter)[0]:
        h = site.A.shape[0] // 2
        part = slice(0, h) if which == "positive" else slice(h, None)
        assert site.A.grad is not None and site.B.grad is not None, site.name
        found += [site.A.grad[part], site.B.grad[:, part]]
    return found


def assert_masked(model: nn.Module, adapter: str = "default") -> None:
    """One backward pass: the negative half gets exactly zero, the positive half does not."""
    model.zero_grad()
    model(**text_batches()[0]).loss.backward()
    assert not any(g.any() for g in gradients(model, "negative", adapter))
    assert all(g.any() for g in gradients(model, "positive", adapter))


def is_masked(model: nn.Module) -> bool:
    model.zero_grad()
    model(**text_batches()[0]).loss.backward()
    return not any(g.any() for g in gradients(model, "negative"))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_negative_half_gets_no_gradient() -> None:
    model = offset_model()
    assert_masked(model)
    for site in find_sites(model)[0]:  # the control: without the mask it does
        unmask(site.A)
        unmask(site.B)
    assert not is_masked(model)


@pytest.mark.parametrize("base", ["paired", "keep", "subtract"])
def test_other_policies_train_everything(base: str) -> None:
    model = adapted()
    initialize(model, text_batches(), InitConfig(method="self", base=base))
    assert not is_masked(model)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_negative_half_stays_with_any_optimizer(optimizer: type[torch.optim.Optimizer], clip: float | None) -> None:
    model, batches = offset_model(), text_batches()
    negative, positive = halves(model, "negative"), halves(model, "positive")
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer(parameters, lr=1e-2, **({"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}))
    for _ in range(3):
        for batch in batches[:2]:  # gradient accumulation
            model(**batch).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        steps.step()
        steps.zero_grad()
    assert equal(halves(model, "negative"), negative)
    assert not any(torch.equal(a, b) for a, b in zip(halves(model, "positive"), positive, strict=True))


def test_clipping_sees_the_masked_gradient() -> None:
    model = offset_model()
    model(**text_batches()[0]).loss.backward()
    wanted = torch.stack([g.norm() for g in gradients(model, "positive")]).norm()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    torch.testing.assert_close(norm, wanted)


def test_accumulated_gradients_stay_masked() -> None:
    model = offset_model()
    model(**text_batches()[0]).loss.backward()
    once = [g.clone() for g in gradients(model, "positive")]
    model(**text_batches()[0]).loss.backward()
    assert not any(g.any() for g in gradients(model, "negative"))
    for twice, one in zip(gradients(model, "positive"), once, strict=True):
        torch.testing.assert_close(twice, 2 * one)


def test_weight_decay_shrinks_both_halves_alike() -> None:
    """AdamW multiplies by 1 − lr·λ: what does not train cancels exactly, also after many steps."""
    model, start = offset_model(), logits(offset_model(), text_batches()[0])
    sites = find_sites(model)[0]
    first = halves(model, "negative")
    untrained = sites[0]  # no gradient at all reaches this site
    for parameter in (untrained.A, untrained.B):
        mask_gradient(parameter, torch.zeros_like)
    train(model, text_batches(), steps=5, lr=1e-2, weight_decay=0.5)
    for now, before in zip(halves(model, "negative"), first, strict=True):
        torch.testing.assert_close(now, before * (1 - 1e-2 * 0.5) ** 5)
        assert not torch.equal(now, before)
    for site in sites:
        A, B = site.A.detach(), site.B.detach()
        h = A.shape[0] // 2
        cancels = torch.equal(A[:h], A[h:]) and torch.equal(B[:, :h], -B[:, h:])
        assert cancels == (site is untrained)
    assert (logits(model, text_batches()[0]) - start).abs().max() > 1e-3


# --- through the life of a model ----------------------------------------------------------------------------


def through_state_dict(model: Any) -> Any:
    other = offset_model(seed=3)
    other.load_state_dict(model.state_dict())
    assert not changed(state(model), other)
    return other


def through_frozen_time(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wanted = {n for n, _ in model.named_parameters() if "lora_" in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return model


def through_another_adapter(model: Any) -> Any:
    model.add_adapter("other", lora_config())
    model.set_adapter("other")
    model(**text_batches()[0]).loss.backward()
    assert all(g.any() for site in find_sites(model, "other")[0] for g in [site.B.grad] if g is not None)
    model.set_adapter("default")
    return model


def through_dtypes(model: Any) -> Any:
    return model.to(torch.bfloat16).to(torch.float32)


def through_modes(model: Any) -> Any:
    with model.disable_adapter():
        logits(model, text_batches()[0])
    return model.train().eval()


def through_merging(model: Any) -> Any:
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def through_adapter_reload(model: Any, folder: Path = Path("unused")) -> Any:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    return model


LIVES: list[Callable[[Any], Any]] = [
    through_state_dict,
    through_frozen_time,
    through_another_adapter,
    through_dtypes,
    through_modes,
    through_merging,
    through_adapter_reload,
    lambda model: model,
]


@pytest.mark.parametrize("live", LIVES)
def test_mask_stays(live: Callable[[Any], Any]) -> None:
    assert_masked(live(offset_model()))


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def assigned(model: Any) -> Any:
    model.load_state_dict(model.state_dict(), assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("live", [copied, assigned])
def test_new_parameters_need_freeze_offset(live: Callable[[Any], Any]) -> None:
    """As its docstring says; also the control of the test above: the mask can be lost."""
    model = live(offset_model())
    assert not is_masked(model)
    assert freeze_offset(model) == len(find_sites(model)[0])
    assert_masked(model)


@pytest.mark.parametrize("saver", ["save_pretrained", "save_adapter"])
def test_from_pretrained_and_freeze_offset(tmp_path: Path, saver: str) -> None:
    """Stopping after 2 steps, loading into a new model and going on is the same as 4 steps at once (SGD)."""
    batches = text_batches(4)
    straight, stopped = offset_model(), offset_model()
    for model, part in ((straight, batches), (stopped, batches[:2])):
        sgd(model, part)
    if saver == "save_pretrained":
        stopped.save_pretrained(tmp_path)
    else:
        save_adapter(stopped, tmp_path, fold_alpha=False)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True).eval()
    unfrozen = copy.deepcopy(loaded)
    freeze_offset(loaded)
    assert_masked(loaded)
    loaded.zero_grad()
    sgd(loaded, batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(halves(loaded, "negative"), halves(straight, "negative"), strict=True))
    for now, wanted in zip(halves(loaded, "positive"), halves(straight, "positive"), strict=True):
        torch.testing.assert_close(now, wanted)
    sgd(unfrozen, batches[2:])  # the control: without it the other half trains
    assert not equal(halves(unfrozen, "negative"), halves(straight, "negative"))


def sgd(model: nn.Module, batches: list[dict[str, Tensor]], lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_freeze_offset_twice_and_while_frozen() -> None:
    model = offset_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert freeze_offset(model) == freeze_offset(model) == 4
    assert not any(p.requires_grad for p in model.parameters())
    for site in find_sites(model)[0]:
        assert len(site.A._backward_hooks or {}) == len(site.B._backward_hooks or {}) == 1
        site.A.requires_grad_(True)
        site.B.requires_grad_(True)
    assert_masked(model)


def test_freeze_offset_of_an_odd_rank() -> None:
    with pytest.raises(ValueError, match="rank 3 is odd; base 'offset' writes 2r"):
        freeze_offset(adapted(r=3))


def test_a_second_adapter_has_its_own_mask() -> None:
    model = offset_model()
    model.add_adapter("other", lora_config(r=2, target_modules=["query"]))
    initialize(model, text_batches(), adapter_name="other", config=InitConfig(method="self"))
    model.set_adapter("other")
    assert_masked(model, "other")
    model.base_model.set_adapter(["default", "other"])
    assert_masked(model, "default")
    assert_masked(model, "other")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert_masked(model)


def test_other_hooks_on_the_factors_are_kept() -> None:
    model, seen = adapted(), []
    site = find_sites(model)[0][0]
    site.A.register_hook(lambda gradient: seen.append(gradient.shape))
    initialize(model, text_batches(), InitConfig(method="self", base="paired"))
    model(**text_batches()[0]).loss.backward()
    assert seen == [site.A.shape]


# --- the same training as subtract --------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0),
}


def ten_losses(kind: str, base: str, optimizer: str, **options: Any) -> tuple[list[float], Tensor]:
    model, batches = adapted(kind, **options).double(), KINDS[kind].batches(5)
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    initialize(model, batches, InitConfig(method="self", base=base))
    stepper = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(10):
        loss = model(**batches[step % 5]).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses, logits(model, batches[0])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_offset_trains_as_subtract(kind: str, optimizer: str, options: dict[str, Any]) -> None:
    """In float64, so that only the method can make a difference."""
    losses, end = ten_losses(kind, "offset", optimizer, **options)
    expected, expected_end = ten_losses(kind, "subtract", optimizer, **options)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end, expected_end, rtol=1e-4, atol=1e-5)
    assert max(abs(a - b) for a, b in zip(losses[:5], losses[5:], strict=True)) > 1e-2  # the same batches again
    paired, _ = ten_losses(kind, "paired", optimizer, **options)  # the control: another way to train
    assert max(abs(a - b) for a, b in zip(paired, losses, strict=True)) > 1e-3


def test_freeze_offset_of_a_start_at_zero_is_refused() -> None:
    """Its second half would be frozen at B = 0, and never train."""
    for model in (adapted(), initialised("eva")):
        with pytest.raises(ValueError, match=r"the second half of its lora_B is zero, .* has no half to freeze"):
            freeze_offset(model)
    assert freeze_offset(initialised("self")) > 0  # the control


@pytest.mark.parametrize("base", ["paired", "keep", "subtract"])
def test_freeze_offset_of_another_base_is_refused(base: str) -> None:
    """Half of an adapter whose rank trains as a whole would be frozen."""
    model = adapted()
    initialize(model, text_batches(), InitConfig(method="self", base=base), progress=False)
    with pytest.raises(ValueError, match=f"was initialised with base '{base}', where all of the rank trains"):
        freeze_offset(model)


def initialised(method: str) -> Any:
    model = adapted()
    initialize(model, text_batches(), InitConfig(method=method), progress=False)
    return model

"""Everything is left as it was found: hooks, modes, gradients, generators, batches, weights; and imports are light."""

from __future__ import annotations

import ast
import gc
import io
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import RunFresh
from tests.tiny import KINDS, VOCABULARY, Batch, adapted, changed, lora_config, state, text_batches
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from cntlora import InitConfig, apply_plan, compute_plan, initialize
from cntlora.data.collect import watching
from cntlora.model.sites import find_sites

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def hooks(model: nn.Module) -> dict[str, list[int]]:
    """Identities of the hooks on all modules."""
    return {
        f"{name}.{kind}": [id(hook) for hook in getattr(module, kind).values()]
        for name, module in model.named_modules()
        for kind in HOOKS
        if getattr(module, kind, None)
    }


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def mixed_modes(model: nn.Module) -> nn.Module:
    """Every third module in training mode."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    return model


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must not change while inputs are read."""
    return {
        "hooks": hooks(model),
        "modes": modes(model),
        "ids": {n: id(p) for n, p in model.named_parameters()},
        "versions": {n: p._version for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.sum().item() for n, p in model.named_parameters()},
        "dtypes": {n: (p.dtype, p.device) for n, p in model.named_parameters()},
        "tensors": {n: t.double().sum().item() for n, t in model.state_dict().items()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "config": repr(model.peft_config),
        "active": model.active_adapters,
    }


class Interrupted(RuntimeError):
    pass


def loud(model: nn.Module, batch: Batch) -> Any:
    """A forward pass that draws from every generator and uses dropout."""
    torch.rand(3)
    np.random.rand()
    random.random()
    return model.train()(**batch)


def failing(at: int) -> Callable[[nn.Module, Batch], Any]:
    """Raise in the middle of a forward pass, after some sites have been seen, at batch `at`."""
    count = iter(range(100))

    def forward(model: nn.Module, batch: Batch) -> Any:
        number = next(count)
        loud(model, batch)
        if number == at:
            deep = model.get_submodule("base_model.model.bert.encoder.layer.1")
            handle = deep.register_forward_pre_hook(stop)
            try:
                model(**batch)
            finally:
                handle.remove()
        return None

    return forward


def stop(*_: object) -> None:
    raise Interrupted


def breaking_off(batches: list[Batch]) -> Iterator[Batch]:
    yield batches[0]
    torch.rand(7)
    raise Interrupted


ENDS: dict[str, Callable[[nn.Module], Any]] = {
    "well": lambda m: compute_plan(m, text_batches(), forward=loud, config=InitConfig(method="self")),
    "error in the first forward pass": lambda m: compute_plan(
        m, text_batches(), forward=failing(0), config=InitConfig(method="self")
    ),
    "error in the third forward pass": lambda m: compute_plan(
        m, text_batches(), forward=failing(2), config=InitConfig(method="self")
    ),
    "error in the loader": lambda m: compute_plan(
        m, breaking_off(text_batches()), forward=loud, config=InitConfig(method="self")
    ),
    "error in token_mask": lambda m: compute_plan(m, text_batches(), token_mask=stop, config=InitConfig(method="self")),
    "all masked": lambda m: compute_plan(
        m, text_batches(), token_mask=lambda b: b["attention_mask"] * 0, config=InitConfig(method="self")
    ),
    "budget too large": lambda m: compute_plan(
        m, text_batches(), InitConfig(method="self", adaptive_ranks=True, rank_budget=10**6), forward=loud
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_plan_leaves_everything_as_found(end: str) -> None:
    model = mixed_modes(adapted(lora_dropout=0.5))
    model.base_model.model.classifier.weight.requires_grad_(True)
    model(**text_batches()[0]).loss.backward()
    calls: list[int] = []
    site = find_sites(model)[0][0]
    site.layer.register_forward_pre_hook(lambda *_: calls.append(0))
    site.base.register_forward_hook(lambda *_: calls.append(1))
    before, generators = fingerprint(model), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    if end == "well":
        ENDS[end](model)
        assert calls[:2] == [0, 1]  # hooks of others are called
    else:
        with pytest.raises((Interrupted, ValueError)):
            ENDS[end](model)
    after = fingerprint(model)
    for key in before:
        assert before[key] == after[key], key
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1][1].tolist()
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_the_fingerprint_can_tell() -> None:
    """The control: each of these is seen."""
    edits: list[Callable[[Any], Any]] = [
        lambda m: m.train(),
        lambda m: m.base_model.model.bert.register_forward_hook(lambda *_: None),
        lambda m: find_sites(m)[0][0].A.data.add_(1e-3),
        lambda m: find_sites(m)[0][0].A.requires_grad_(False),
        lambda m: setattr(m.base_model.model.bert, "cntlora", 1),
        lambda m: m.to(torch.float64),
    ]
    for edit in edits:
        model = mixed_modes(adapted())
        before = fingerprint(model)
        edit(model)
        assert fingerprint(model) != before


def test_hooks_are_there_during_the_pass_only() -> None:
    model = adapted()
    sites, counts = find_sites(model)[0], []
    before = hooks(model)

    def forward(model: nn.Module, batch: Batch) -> None:
        counts.append(sum(map(len, hooks(model).values())) - sum(map(len, before.values())))
        model(**batch)

    batches = [{key: batch[key] for key in ("input_ids", "labels")} for batch in text_batches()]
    initialize(model, batches, forward=forward, config=InitConfig(method="self"))
    assert counts == [len(sites)] * 3 and hooks(model) == before  # without a mask, one hook a site and no other
    counts.clear()
    model = adapted()
    sites, before = find_sites(model)[0], hooks(model)
    initialize(model, text_batches(), forward=forward, config=InitConfig(method="self"))
    assert min(counts) > len(sites) and hooks(model) == before  # with one, calls are followed too
    with pytest.raises(Interrupted), watching(sites, type("W", (), {"hook": lambda *_: stop})()):
        assert hooks(model) != before
        raise Interrupted
    assert hooks(model) == before


def test_no_activation_is_kept_alive() -> None:
    model, alive = adapted(), []
    site = find_sites(model)[0][0]
    site.layer.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    plan = compute_plan(model, text_batches(), config=InitConfig(method="self"))
    gc.collect()
    assert len(alive) == 3 and all(reference() is None for reference in alive)
    assert plan.batches == 3


# --- initialize: only what it is for ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("dora", [False, True])
def test_initialize_changes_its_adapter_only(base: str, dora: bool) -> None:
    model = mixed_modes(adapted(adapter_name="other", target_modules=["key"]))
    model.add_adapter("default", lora_config(use_dora=dora))
    before, found, trainable = state(model), fingerprint(model), requires_grad(model)
    initialize(model, text_batches(), InitConfig(method="self", base=base))
    touched = changed(before, model)
    allowed = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")
    if base == "subtract":
        allowed += ("base_layer.weight",)
    assert touched and all(name.endswith(allowed) for name in touched)
    assert any("base_layer" in name for name in touched) == (base == "subtract")
    after = fingerprint(model)
    for key in ("hooks", "modes", "dtypes", "attributes", "active"):
        assert found[key] == after[key], key
    assert requires_grad(model) == trainable
    assert not any(p.grad is not None for p in model.parameters())


def requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("trainable", [True, False])
def test_replaced_parameters_are_trainable_where_the_old_ones_were(trainable: bool) -> None:
    model = adapted()
    for site in find_sites(model)[0]:
        site.A.requires_grad_(trainable)
        site.B.requires_grad_(trainable)
    initialize(model, text_batches(), config=InitConfig(method="self"))
    for site in find_sites(model)[0]:
        assert site.A.requires_grad == site.B.requires_grad == trainable
        assert site.A.is_leaf and site.A.grad is None and not site.base.weight.requires_grad


def test_applying_draws_nothing() -> None:
    model = adapted()
    plan = compute_plan(model, text_batches(), InitConfig.from_dict({"method": "shift", "shift_constant": "gaussian"}))
    before = torch.get_rng_state()
    apply_plan(model, plan)
    assert torch.equal(torch.get_rng_state(), before)


def test_sites_share_no_storage() -> None:
    """lessons.md: EVA's q and k shared a tensor that was edited in place twice."""
    model = adapted("llama")
    initialize(model, KINDS["llama"].batches(), InitConfig(method="self", base="keep"))
    pointers = [half.data_ptr() for site in find_sites(model)[0] for half in (site.A, site.B)]
    assert len(set(pointers)) == len(pointers)
    plan = compute_plan(adapted(), text_batches(), config=InitConfig(method="self"))
    one, two = adapted(), adapted()
    apply_plan(one, plan)
    with torch.no_grad():
        for site in find_sites(one)[0]:
            site.A.zero_()
    apply_plan(two, plan)  # the plan is not the model's memory
    assert all(site.A.any() for site in find_sites(two)[0])


# --- data ---------------------------------------------------------------------------------------------------


def copies(batches: list[Batch]) -> list[Batch]:
    return [{key: value.clone() for key, value in batch.items()} for batch in batches]


def test_the_callers_batches_are_not_edited() -> None:
    def greedy(model: nn.Module, batch: Batch) -> Any:
        batch.pop("labels")
        batch["extra"] = batch.pop("attention_mask")
        return model(input_ids=batch["input_ids"], attention_mask=batch["extra"])

    batches = text_batches()
    wanted = copies(batches)
    initialize(adapted(), batches, forward=greedy, config=InitConfig(method="self"))
    for batch, before in zip(batches, wanted, strict=True):
        assert list(batch) == list(before)
        assert all(torch.equal(batch[key], before[key]) for key in batch)


def rows() -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (5,), generator=g), "labels": torch.tensor(i % 3)} for i in range(16)
    ]


def loaders(seed: int | None) -> dict[str, DataLoader[Any]]:
    def generator() -> torch.Generator | None:
        return None if seed is None else torch.Generator().manual_seed(seed)

    data: Any = rows()
    batched = BatchSampler(RandomSampler(data, generator=generator()), 4, drop_last=False)
    return {
        "shuffle": DataLoader(data, 4, shuffle=True, generator=generator()),
        "sampler": DataLoader(data, 4, sampler=RandomSampler(data, generator=generator())),
        "batch_sampler": DataLoader(data, batch_sampler=batched),
    }


@pytest.mark.parametrize("name", ["shuffle", "sampler", "batch_sampler"])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_order_of_the_data_is_the_same_after_it(name: str, seed: int | None) -> None:
    """The first epoch of training sees the batches that it would have seen without us."""

    def first_epoch(peek: Callable[[DataLoader[Any]], object]) -> Tensor:
        torch.manual_seed(5)
        loader = loaders(seed)[name]
        peek(loader)
        return torch.cat([batch["input_ids"] for batch in loader])

    untouched = first_epoch(lambda loader: None)
    assert torch.equal(
        first_epoch(lambda loader: initialize(adapted(), loader, InitConfig(method="self", num_batches=2))), untouched
    )
    assert torch.equal(
        first_epoch(lambda loader: initialize(adapted(), loader, InitConfig(method="self", num_batches=50))), untouched
    )
    assert not torch.equal(first_epoch(lambda loader: next(iter(loader))), untouched)  # the control


def test_a_one_shot_iterator_keeps_the_rest() -> None:
    batches = iter(text_batches(5))
    initialize(adapted(), batches, InitConfig(method="self", num_batches=2))
    assert len(list(batches)) == 3


def test_two_runs_agree_to_the_bit() -> None:
    models = [adapted(), adapted()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        initialize(model, text_batches(), config=InitConfig(method="self"))
    assert not changed(state(models[0]), models[1])


# --- imports ------------------------------------------------------------------------------------------------

HEAVY = ("peft", "transformers", "matplotlib", "pandas", "sklearn", "accelerate", "diffusers", "safetensors")
IMPORTS = f"""
import cntlora
print(sorted(name for name in {(*HEAVY, "rich", "typer")} if name in sys.modules))
import io, random
from tests.tiny import adapted, text_batches
print(sorted(name for name in {HEAVY} if name in sys.modules))
sys.stderr = io.StringIO()
sys.stderr.isatty = lambda: True
model, state = adapted(), random.getstate()
report = cntlora.initialize(model, text_batches())
print(random.getstate() == state and "reading batches 3/8" in sys.stderr.getvalue())
print(len(str(report)) > 0 and random.getstate() == state)
print("rich" in sys.modules)
"""


def test_import_is_light_and_the_first_call_draws_nothing(run_fresh: RunFresh) -> None:
    """In a fresh process, since libraries such as rich draw a random number when they are first imported."""
    ours, control, first, printed, rich = run_fresh(IMPORTS).splitlines()
    assert set(ast.literal_eval(ours)) <= {"safetensors"}
    assert {"peft", "transformers"} <= set(ast.literal_eval(control))
    assert (first, printed, rich) == ("True", "True", "False")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_progress_on_a_terminal(progress: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    initialize(adapted(), text_batches(), progress=progress, config=InitConfig(method="self"))
    assert isinstance(sys.stderr, Terminal) and ("reading batches" in sys.stderr.getvalue()) == shown

"""A data pass: inputs that are handed on early, and a model that is asked for no logits and no cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cases import mlp, wrapped
from tests.tiny import adapted, causal_batches
from torch import Tensor, nn
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

import cntlora
from cntlora import InitConfig
from cntlora.data.batches import body_forward, has_spare_logits
from cntlora.data.collect import collect
from cntlora.data.reading_mode import reading_mode
from cntlora.execution import reading
from cntlora.linalg.moments import Moments
from cntlora.model.sites import find_sites


class Twice(nn.Module):
    """Calls one layer twice with the same tensor, and edits another's input in place once it has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.edited, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x) + self.twice(x)
        z = torch.tanh(y)
        w = self.edited(z)
        z *= 2
        last: Tensor = self.last(z) + self.last(w)
        return last


def sums(model: nn.Module, early: bool, batches: list[Any]) -> tuple[dict[str, Tensor], list[int]]:
    """Site → X Xᵀ over all batches, and how many inputs came with each call."""
    found: dict[str, Tensor] = {}
    came: list[int] = []

    def add(index: int, groups: Any) -> None:
        read = [(names, X) for names, X in groups if isinstance(X, Moments)]
        came.append(len(read))
        for names, X in read:
            for name in names:
                found[name] = found.get(name, torch.zeros(())) + X.gram()

    collect(model, find_sites(model)[0], batches, add, early=early)
    return found, came


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_that_come_early_add_up_to_the_same(grad: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Twice(), LoraConfig(target_modules=["twice", "edited", "last"]))
    batches = [(torch.randn(3, 9, 16),) for _ in range(2)]
    together, came = sums(model, False, batches)
    early, one_by_one = sums(model, True, batches)
    assert together.keys() == early.keys() and all(torch.allclose(together[n], early[n]) for n in together)
    assert max(came) == 3 and max(one_by_one) == 1
    assert not torch.allclose(2 * early["edited"], early["last"], rtol=1e-2)


def test_inputs_come_while_the_model_runs() -> None:
    model, order = get_peft_model(Twice(), LoraConfig(target_modules=["twice", "edited", "last"])), list[str]()
    last = model.get_submodule("base_model.model.last")
    last.register_forward_hook(lambda *_: order.append("last was called"))
    for early, expected in ((True, "edited"), (False, "last was called")):
        order.clear()
        batch = [(torch.randn(3, 9, 16),)]
        collect(model, find_sites(model)[0], batch, lambda i, groups: order.append(groups[0][0][0]), early=early)
        assert order[0] == expected  # and not the first, whose input the batch holds


class Changing(nn.Module):
    """Gives one tensor to q and k, to v as well where the batch says so, and what comes out to a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, with_v: bool) -> Tensor:
        x = x + 0.5  # which the batch does not hold, and the graph does
        y = self.q(x) + self.k(x)
        if with_v:
            y = y + self.v(x)
        out: Tensor = self.out(y)
        return out


def changing() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Changing(), LoraConfig(target_modules=["q", "k", "v", "out"]))


@pytest.mark.parametrize(
    ("called", "more"), [((True, True, True), 0), ((False, True, True), 2), ((True, False, True), 1)]
)
def test_sites_may_see_an_input_that_they_did_not_see_before(called: tuple[bool, ...], more: int) -> None:
    model = changing()
    batches = [(torch.randn(3, 9, 16), with_v) for with_v in called]
    together, _ = sums(model, False, batches)
    early, came = sums(model, True, batches)
    assert together.keys() == early.keys() and all(torch.allclose(together[n], early[n]) for n in together)
    assert sum(came) == 2 * len(called) + more  # v took x by itself after a batch in which it did not see it
    assert torch.allclose(early["v"], early["q"]) == all(called)  # the control


def test_an_input_is_handed_on_when_those_that_saw_it_before_have_seen_it() -> None:
    model, order = changing(), list[str]()
    model.get_submodule("base_model.model.out").register_forward_hook(lambda *_: order.append("out was called"))
    batches = [(torch.randn(3, 9, 16), True) for _ in range(2)]

    def add(index: int, groups: Any) -> None:
        order.extend(f"{index}: {', '.join(names)}" for names, X in groups if isinstance(X, Moments))

    for name in ("q", "k", "v"):
        model.get_submodule(f"base_model.model.{name}").base_layer.weight.requires_grad_(True)  # the graph holds x
    collect(model, find_sites(model)[0], batches, add, early=True, on_output=lambda index, y: y.sum().backward())
    first, second = order[: order.index("0: out") + 1], order[order.index("0: out") + 1 :]
    assert first == ["out was called", "0: q, k, v", "0: out"]
    assert second == ["1: q, k, v", "1: out", "out was called"]


def test_nan_is_named_also_where_inputs_come_early() -> None:
    model = wrapped(mlp())
    x = torch.full((2, 5, find_sites(model)[0][0].in_features), float("nan")).double()
    with pytest.raises(ValueError, match="site q, batch 0: its input has NaN"):
        cntlora.compute_plan(model, [(x,)], InitConfig("eva"))


# --- the head -------------------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, run: Any) -> list[tuple[int, ...]]:
    """Rows and tokens of what the head is given meanwhile."""
    shapes: list[tuple[int, ...]] = []
    head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    forward = head.forward
    head.forward = lambda x: (shapes.append(tuple(x.shape[:2])), forward(x))[1]
    try:
        run()
    finally:
        del head.forward
    return shapes


@pytest.mark.parametrize("method", ["eva", "self", "corda"])
def test_no_logits_are_computed_that_nobody_reads(method: str) -> None:
    model, batches, config = adapted("llama"), causal_batches(), InitConfig(method=method)
    plans: list[Any] = []
    few = outputs_of(model, lambda: plans.append(cntlora.compute_plan(model, batches, config)))
    whole = outputs_of(
        model, lambda: plans.append(cntlora.compute_plan(model, batches, config, forward=lambda m, b: m(**b)))
    )
    assert [shape for shape in few if shape[0] == 8] == [(8, 1)] * 3 and (8, 8) in whole
    for name, site in plans[0].sites.items():
        assert torch.equal(site.A, plans[1].sites[name].A) and torch.equal(site.B, plans[1].sites[name].B)


def test_methods_that_read_gradients_read_the_loss() -> None:
    model = adapted("llama")
    shapes = outputs_of(model, lambda: cntlora.compute_plan(model, causal_batches(), InitConfig("lora_ga")))
    assert all(shape[1] == 8 for shape in shapes)


def test_a_head_that_is_read_is_called_whole() -> None:
    llama = adapted("llama")
    base = llama.get_base_model()
    head = base.get_output_embeddings()
    assert has_spare_logits(llama, [])
    assert not has_spare_logits(llama, [head]) and not has_spare_logits(adapted("bert"), [])
    assert body_forward(llama, causal_batches()[0]).logits.shape[1] == 1


def test_a_model_that_makes_inputs_of_its_labels_gets_them() -> None:
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    side |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32}
    config = T5GemmaConfig(encoder=side, decoder=side, vocab_size=32, pad_token_id=0, bos_token_id=1)
    model = get_peft_model(T5GemmaForConditionalGeneration(config), LoraConfig(r=2, target_modules=["q_proj"]))
    batch = {"input_ids": torch.randint(1, 32, (2, 8)), "labels": torch.randint(1, 32, (2, 4))}
    assert any("decoder" in name for name in cntlora.compute_plan(model, [batch], InitConfig("self")).sites)
    with pytest.raises(ValueError, match="input_ids"):  # the control
        body_forward(model, batch)


def test_layers_that_the_loss_does_not_reach_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no output of the pass has a loss."""
    looked: list[int] = []
    monkeypatch.setattr(reading, "unreached", lambda *_: (looked.append(1), [])[1])
    plain = [{key: value for key, value in batch.items() if key != "labels"} for batch in causal_batches()]
    for batches, expected in ((plain, 0), (causal_batches(), 1)):
        cntlora.compute_plan(adapted("llama"), batches, InitConfig("eva"))
        assert len(looked) == expected


def test_no_keys_and_values_are_kept() -> None:
    model = adapted("llama")
    config = model.get_base_model().config
    batch = causal_batches()[0]
    assert config.use_cache is True and model(**batch).past_key_values is not None
    with reading_mode(model, find_sites(model)[0], ()):
        assert model(**batch).past_key_values is None
    assert config.use_cache is True
    with pytest.raises(KeyError), reading_mode(model, find_sites(model)[0], ()):
        raise KeyError
    assert config.use_cache is True

"""Layers that the loss does not depend on, named by methods that read inputs, without a backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import KINDS, adapted, text_batches
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from cntlora import InitConfig, InitPlan, compute_plan, initialize
from cntlora.data import reach
from cntlora.data.batches import default_forward, has_loss
from cntlora.model.sites import find_sites

LINE = "the loss of the first row does not depend on it"


class Tagger(nn.Module):
    """A label a token, by a model that has a pooler besides."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.bert = BertModel(BertConfig(vocab_size=40, **shape))
        self.head, self.pooled = nn.Linear(16, 3), pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        out = self.bert(input_ids, attention_mask)
        first = out.pooler_output if self.pooled else out.last_hidden_state[:, 0]
        logits = self.head(first)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def tagger(pooled: bool = False) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Tagger(pooled), LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]))


@pytest.mark.parametrize("method", ["self", "cross", "shift", "eva", "corda"])
def test_a_pooler_that_the_loss_passes_by_is_named(method: str) -> None:
    model = tagger()
    report = initialize(model, text_batches(), InitConfig(method=method))
    assert report.unreached == ["bert.pooler.dense"] == report.to_dict()["unreached"]
    assert f"bert.pooler.dense: {LINE}" in str(report)
    assert "bert.pooler.dense" in report.sites  # it is initialised all the same
    model(**text_batches()[0])["loss"].backward()
    assert {s.name for s in find_sites(model)[0] if s.B.grad is None} == {"bert.pooler.dense"}


def test_a_pooler_that_is_used_is_not() -> None:
    """The control."""
    report = initialize(tagger(pooled=True), text_batches(), config=InitConfig(method="self"))
    assert not report.unreached and LINE not in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_of_whole_models(kind: str) -> None:
    assert not initialize(adapted(kind), KINDS[kind].batches(), config=InitConfig(method="self")).unreached


def test_nothing_is_said_of_two_towers_with_one_loss() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config={**shape, "vocab_size": 40}, vision_config=vision, projection_dim=8))
    model = get_peft_model(clip, LoraConfig(r=2, target_modules=["q_proj", "visual_projection"]))
    g = torch.Generator().manual_seed(0)
    both = {
        "input_ids": torch.randint(3, 40, (2, 6), generator=g),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=g),
    }
    assert not compute_plan(model, [{**both, "return_loss": True}], config=InitConfig(method="self")).unreached


def test_it_goes_through_a_plan_and_its_file() -> None:
    plan = compute_plan(tagger(), text_batches(), config=InitConfig(method="self"))
    assert InitPlan.from_bytes(plan.to_bytes()).unreached == plan.unreached == ["bert.pooler.dense"]


def test_where_it_cannot_be_told_nothing_is_said() -> None:
    """No loss; a function of the caller, which is not called once more; a model that runs without gradients."""
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in text_batches()]
    assert not initialize(tagger(), unlabelled, config=InitConfig(method="self")).unreached
    calls: list[int] = []

    def forward(model: Any, batch: Any) -> Any:
        calls.append(0)
        return model(**batch)

    assert not initialize(tagger(), text_batches(), forward=forward, config=InitConfig(method="self")).unreached
    assert len(calls) == len(text_batches())
    model = tagger()
    model.base_model.model.forward = torch.no_grad()(model.base_model.model.forward)
    assert not initialize(model, text_batches(), config=InitConfig(method="self")).unreached
    with torch.inference_mode():
        assert reach.unreached(tagger(), [], default_forward, text_batches()[0]) == []


def test_a_pass_that_fails_is_no_error() -> None:
    """An operation may want what is not kept."""

    model = tagger()
    encoder = model.base_model.model.bert.encoder
    forward, failed = encoder.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            failed.append(0)
            raise RuntimeError("wants more")
        return forward(*args, **kwargs)

    encoder.forward = failing
    assert not initialize(model, text_batches(), config=InitConfig(method="self")).unreached and failed == [0]


def test_hooks_of_the_user_are_not_called_once_more() -> None:
    model, calls = tagger(), []
    handle = model.base_model.model.bert.register_forward_hook(lambda *_: calls.append(0))
    assert not initialize(model, text_batches(), config=InitConfig(method="self")).unreached and len(calls) == len(
        text_batches()
    )
    handle.remove()
    assert compute_plan(tagger(), text_batches(), config=InitConfig(method="self")).unreached  # the control


def test_a_tensor_alone_is_not_taken_for_a_loss() -> None:
    assert has_loss({"loss": torch.ones(())}) and not has_loss(torch.ones(()))
    assert not has_loss((torch.ones(()),)) and not has_loss({"loss": torch.ones(2)})


def test_nothing_is_kept_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are gone as without gradients: what is saved is dropped, which a backward pass shows."""
    found: list[Tensor] = []
    real = reach.loss_in

    def keep(output: Any, index: int) -> Tensor:
        found.append(real(output, index))
        return found[-1]

    monkeypatch.setattr(reach, "loss_in", keep)
    initialize(tagger(), text_batches(), config=InitConfig(method="self"))
    assert len(found) == 1 and found[0].requires_grad
    with pytest.raises(RuntimeError, match="nothing is kept for a backward pass here"):
        found[0].backward()


def test_one_row_is_enough() -> None:
    x, boxes = torch.randn(4, 3), [{"boxes": torch.randn(i, 4)} for i in range(4)]
    cut = reach.first_row({"x": x, "labels": boxes, "return_loss": True})
    assert torch.equal(cut["x"], x[:1]) and cut["labels"] == boxes[:1] and cut["return_loss"] is True
    assert torch.equal(reach.first_row(x), x[:1]) and torch.equal(reach.first_row((x, x))[1], x[:1])
    packed = {"input_ids": x, "patches": torch.randn(9, 5)}  # the control: of other counts, all of it
    assert reach.first_row(packed) is packed


def test_the_first_tokens_are_enough_where_all_sites_are_reached() -> None:
    """A text that is long is run from its start; where that leaves a site open, the whole row tells."""
    lengths: list[int] = []

    def call(model: nn.Module, batch: Any) -> Any:
        lengths.append(batch["input_ids"].shape[1])
        return model(**batch)

    def found(targets: list[str]) -> list[str]:
        model = get_peft_model(Tagger(), LoraConfig(r=2, target_modules=targets))
        ids = torch.arange(40).reshape(2, 20)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
        return reach.unreached(model, find_sites(model)[0], call, batch)

    assert found(["query"]) == [] and lengths == [16]
    lengths.clear()
    assert found(["query", "dense"]) == ["bert.pooler.dense"] and lengths == [16, 20]  # the control
    row = {"input_ids": torch.zeros(1, 20), "labels": torch.zeros(1)}
    assert reach.first_tokens(row)["input_ids"].shape == (1, 16) and reach.first_tokens(row)["labels"] is row["labels"]
    for other in ({**row, "decoder_input_ids": torch.zeros(1, 9)}, {**row, "pixels": torch.zeros(1, 3, 20, 20)}):
        assert reach.first_tokens(other) is other


def test_the_plan_is_the_one_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model draws in that pass, the others draw the same as before."""

    class Noisy(Tagger):
        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            with torch.no_grad():
                self.bert.embeddings.LayerNorm.bias.copy_(torch.randn(16))
            return super().forward(*args, **kwargs)

    def made() -> InitPlan:
        torch.manual_seed(0)
        model = get_peft_model(Noisy(), LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]))
        torch.manual_seed(1)
        return compute_plan(model, text_batches(), config=InitConfig(method="self"))

    plan = made()
    monkeypatch.setattr("cntlora.execution.reading.unreached", lambda *_: [])
    other = made()
    assert all(torch.equal(site.A, other.sites[name].A) for name, site in plan.sites.items())
    assert plan.unreached and not other.unreached

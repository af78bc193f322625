"""Methods that read gradients, on models in which some adapted layers have none: those few stay plain LoRA."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    LongformerConfig,
    LongformerForSequenceClassification,
    ResNetConfig,
)

from cntlora import InitConfig, initialize
from cntlora.model.sites import Site, find_sites

METHODS = ["descent", "whitened", "lora_ga", "lora_one", "lora_da", "gora"]
NO_GRADIENT = "the loss does not depend on it: its gradient is zero in every batch"


def longformer() -> tuple[Any, list[Any]]:
    """The classifier reads the first token of the last layer, through the global attention alone."""
    torch.manual_seed(0)
    model = LongformerForSequenceClassification(
        LongformerConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            attention_window=4, max_position_embeddings=40, num_labels=3,
        )
    )  # fmt: skip
    targets = ["query", "key", "value", "query_global", "value_global"]
    ids = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(4) % 3}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets)), [batch] * 2


def detr() -> tuple[Any, list[Any]]:
    """The first layer of the decoder is given queries of zeros."""
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage4"])
    model = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=3,
        )
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    boxes = [{"class_labels": torch.tensor([0, 1]), "boxes": 0.3 + 0.3 * torch.rand(2, 4, generator=g)}] * 2
    batch = {"pixel_values": torch.randn(2, 3, 64, 64, generator=g), "labels": boxes}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"])), [batch] * 2


class Chain(nn.Module):
    """A layer whose output nothing uses beside some that are used."""

    def __init__(self, used: int, idle: int) -> None:
        super().__init__()
        self.used = nn.ModuleList(nn.Linear(8, 8) for _ in range(used))
        self.idle = nn.ModuleList(nn.Linear(8, 8) for _ in range(idle))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.idle:
            layer(x)
        for layer in self.used:
            x = torch.tanh(layer(x))
        return {"loss": (x - 1).square().mean()}


def chain(used: int = 3, idle: int = 1) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    names = [f"used.{i}" for i in range(used)] + [f"idle.{i}" for i in range(idle)]
    model = get_peft_model(Chain(used, idle), LoraConfig(r=2, lora_alpha=4, target_modules=names))
    return model, list(torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)))


MODELS = {"longformer": longformer, "detr": detr, "chain": chain}


def has_a_gradient(model: Any, batches: list[Any]) -> dict[str, bool]:
    """Tell by autograd alone whether any batch gives the weight of a site a gradient other than zero."""
    sites = find_sites(model)[0]
    found = dict.fromkeys([site.name for site in sites], False)
    model.eval()
    for batch in batches:
        weights = [site.base.weight.requires_grad_(True) for site in sites]
        out = model(**batch) if isinstance(batch, dict) else model(batch)
        gradients = torch.autograd.grad(out["loss"], weights, allow_unused=True)
        for site, gradient in zip(sites, gradients, strict=True):
            site.base.weight.requires_grad_(False)
            found[site.name] |= gradient is not None and bool(gradient.any())
    return found


def rows_of(model: Any) -> dict[str, Tensor]:
    """A copy of every site's A."""
    return {site.name: site.A.detach().clone() for site in find_sites(model)[0]}


def plain(site: Site, before: Tensor) -> bool:
    """Return whether a site is the LoRA that it was before: A as it was, B zero."""
    return torch.equal(site.A, before) and not bool(site.B.any())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_sites_without_a_gradient_stay_plain_lora(kind: str, method: str) -> None:
    model, batches = MODELS[kind]()
    heard = has_a_gradient(*MODELS[kind]())
    silent = {name for name, has in heard.items() if not has}
    assert 0 < len(silent) < len(heard) / 2
    before = rows_of(model)
    with pytest.warns(UserWarning, match="its gradient is zero in every batch of 2; left as plain LoRA") as caught:
        report = initialize(model, batches, InitConfig(method=method, base="offset"))
    ours = [w for w in caught if "left as plain LoRA" in str(w.message)]
    assert len(ours) == 1 and ours[0].filename == __file__
    assert dict(report.skipped) == dict.fromkeys(report.skipped, NO_GRADIENT) and set(report.skipped) == silent
    assert all(f"{name}: left as plain LoRA" in str(report) for name in silent)
    sites = {site.name: site for site in find_sites(model)[0]}
    assert all(plain(sites[name], before[name]) == (name in silent) for name in sites)


def test_without_such_a_site_nothing_is_said() -> None:
    """The control."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = initialize(*chain(idle=0), InitConfig(method="lora_ga"))
    assert not report.skipped and len(report.sites) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("idle", [3, 4])
def test_where_most_have_none_it_is_an_error(method: str, idle: int) -> None:
    """Then it is not the model's build but another fault: the wrong loss, or layers beside the way to it."""
    with pytest.raises(ValueError, match=f"site idle.0 .*of {idle} of {idle + 2} sites; is the adapter on layers"):
        initialize(*chain(2, idle), InitConfig(method=method))
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        report = initialize(*chain(2, idle), InitConfig(method=method), on_missing="warn")
    assert len(report.sites) == 2 and len(report.skipped) == idle


@pytest.mark.parametrize("on_missing", ["raise", "warn"])
def test_where_none_has_one_nothing_is_left(on_missing: str) -> None:
    model, rows = chain(2, 2)

    def loss(model: Any, x: Tensor) -> Tensor:
        inner = model.base_model.model
        return sum(0 * layer(x).sum() for layer in (*inner.used, *inner.idle))  # type: ignore[return-value]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = rows_of(model)
        with pytest.raises(ValueError, match="gradient is zero in every batch"):
            initialize(model, rows, InitConfig(method="lora_ga"), loss=loss, on_missing=on_missing)
    assert all(plain(site, before[site.name]) for site in find_sites(model)[0])

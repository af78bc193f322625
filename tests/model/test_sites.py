"""Sites and their names, whoever put the adapter in and whatever is wrapped around."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.tiny import KINDS, Wrapper, adapted, base_model, denoise, lora_config, unet, unet_batches
from tests.versions import before
from torch import Tensor, nn

from cntlora import InitConfig, initialize, save_adapter
from cntlora.model.layouts import layout_of, weight_matrix
from cntlora.model.lora_layers import config_holder, naming_root
from cntlora.model.sites import find_sites

QUERY = "bert.encoder.layer.0.attention.self.query"


def names(model: nn.Module, adapter: str = "default") -> list[str]:
    return [site.name for site in find_sites(model, adapter)[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_base_model(kind: str) -> None:
    modules = [name for name, _ in base_model(kind).named_modules()]
    found = names(adapted(kind))
    assert found and set(found) <= set(modules)
    assert found == [name for name in modules if name in found]  # in the order of the model
    endings = tuple(f".{target}" for target in KINDS[kind].targets)
    assert set(found) == {name for name in modules if name.endswith(endings)}


def test_wrapping_does_not_change_names() -> None:
    model, added, injected = adapted(), base_model(), inject_adapter_in_model(lora_config(), base_model())
    added.add_adapter(lora_config())
    wanted = names(model)
    assert len(wanted) == 4 and wanted[0] == QUERY
    for other in (added, injected, Wrapper(model), Wrapper(Wrapper(added)), model.base_model, model.get_base_model()):
        assert names(other) == wanted
    assert naming_root(Wrapper(model), "default") == "module.base_model.model."
    assert naming_root(added, "default") == ""
    assert next(n for n, _ in model.named_modules() if n.endswith("query")) != QUERY  # the control


def test_site_reads_the_layer() -> None:
    model = adapted("gpt2", r=3, lora_alpha=6, use_rslora=True, target_modules=["c_attn"])
    site = find_sites(model)[0][0]
    assert (site.in_features, site.out_features) == (24, 72) == (site.A.shape[1], site.B.shape[0])
    assert (site.rank, site.alpha, site.use_rslora) == (3, 6.0, True)
    assert site.scaling == pytest.approx(6 / 3**0.5)
    stored = site.base.weight.detach()
    assert stored.shape == (24, 72) and torch.equal(site.weight(), stored.T.double())
    site.weight().zero_()
    site.weight(torch.float32).zero_()
    assert stored.any()  # a copy, also in the dtype that it has
    assert weight_matrix(site.base).data_ptr() == stored.data_ptr()
    assert site.magnitude is None
    dora = find_sites(adapted(use_dora=True))[0][0].magnitude
    assert dora is not None and dora.shape == (24,)


def test_adapters_are_found_by_name() -> None:
    model = adapted(adapter_name="first", target_modules=["query"])
    model.add_adapter("second", lora_config(target_modules=["value"]))
    assert all(name.endswith("query") for name in names(model, "first"))
    assert all(name.endswith("value") for name in names(model, "second"))
    holder = config_holder(model, "second")
    assert holder is not None and holder[0] == "base_model.model"
    assert config_holder(base_model(), "default") is None
    with pytest.raises(ValueError, match="adapter_name: 'secnd' is not known .did you mean 'second'.*first, second"):
        find_sites(model, "secnd")


# --- layers that are refused --------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A convolution that computes otherwise than its class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = Doubled(1, 2, 3)
        self.conv1 = nn.Conv1d(2, 2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embedding(ids))
        return self.conv1(self.conv(x[:, None])[:, :, 0])


def mixed(*targets: str, **options: Any) -> Any:
    return get_peft_model(Mixed(), LoraConfig(r=2, target_modules=list(targets), **options))


@pytest.mark.parametrize(("target", "kind"), [("embedding", "Embedding"), ("conv", "Doubled")])
def test_other_layers_are_refused_by_name(target: str, kind: str) -> None:
    model = mixed("linear", target)
    sites = [site for site in find_sites(model)[0] if site.name != target]
    assert [s.name for s in sites] == ["linear"]
    batches = [torch.randint(0, 10, (3, 8))]
    with pytest.raises(ValueError, match=f"site {target} cannot be initialised.*{kind}.*on_missing='warn'"):
        initialize(model, batches, config=InitConfig(method="self"))
    assert not any(site.B.any() for site in sites)
    with pytest.warns(UserWarning, match=f"site {target} .*left as plain LoRA"):
        report = initialize(model, batches, on_missing="warn", config=InitConfig(method="self"))
    assert list(report.sites) == ["linear"] and list(report.skipped) == [target]


class Experts(nn.Module):
    """A layer with two fused parameters and a linear map, as mixtures of experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x @ self.up[0] @ self.down[1] * 0.1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.experts(x)
        return self.out(x + self.attention(x, x, x)[0])


def mixture() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixture()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("saver", ["save_pretrained", "folded", "plain alpha"])
def test_layers_inside_other_adapted_layers(saver: str, use_rslora: bool, tmp_path: Path) -> None:
    """PEFT nests them (`experts.base_layer.base_layer.linear`): names stay the base model's, and reloading works."""
    if before("peft", "0.18"):
        pytest.skip("PEFT 0.17 warns of every module whose parameters it adapts, and here a warning is an error")
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["linear", "out", "attention"],
        target_parameters=["experts.up", "experts.down"],
        use_rslora=use_rslora,
    )
    model, batches = get_peft_model(mixture(), config), [torch.randn(4, 6, 8), torch.randn(4, 6, 8)]
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        report = initialize(model, batches, on_missing="warn", config=InitConfig(method="self"))
    assert list(report.sites) == ["experts.linear", "out"]
    assert set(report.skipped) == {"experts.up", "experts.down", "attention", "attention.out_proj"}
    assert set(report.sites) <= {name for name, _ in mixture().named_modules()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
        trained, pristine = model(batches[0]), mixture()(batches[0])
    if saver == "save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path, fold_alpha=saver == "folded")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # missing keys are a warning
        read = PeftModel.from_pretrained(mixture(), tmp_path)(batches[0])
    scale = float(trained.abs().max())  # a sum of several layers: what they add may cancel, their rounding does not
    torch.testing.assert_close(read, trained, rtol=0, atol=1e-4 * scale)
    assert (trained - pristine).abs().max() > 1e-2 * scale


def test_quantised_weights_are_refused_with_the_way_out() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="dtype int8.*unquantised model, save it and load it on the other"):
        layout_of(layer)

    class Int4Params(nn.Parameter):
        pass

    layer.weight = Int4Params(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="weight is a Int4Params"):
        layout_of(layer)
    assert layout_of(nn.Linear(4, 4)).name == "Linear"


# --- diffusers ----------------------------------------------------------------------------------------------


def test_unet_sites_are_named_as_in_diffusers() -> None:
    model = unet()
    modules = {name for name, _ in model.named_modules()}
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    found = names(model)
    assert found and set(found) <= modules
    report = initialize(model, unet_batches(), forward=denoise, config=InitConfig(method="self"))
    assert list(report.sites) == found

"""The way of an adapter: table 2's quantities, from models, folders, snapshots; and the state before the first step."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cases import SIZES, array, lora, mlp, relative_error, token_batches, wrapped
from tests.tiny import adapted, changed, state, text_batches, train

import cntlora
from cntlora import (
    InitConfig,
    compare_adapters,
    initialize,
    save_adapter,
    snapshot,
    start_curvature,
    start_diagnostics,
)
from cntlora.linalg.factors import product_inner, product_spectrum
from cntlora.model.kinds import depth_of, kind_of
from cntlora.model.sites import find_sites


def test_an_adapter_equals_itself() -> None:
    model = adapted("bert")
    initialize(model, text_batches(), InitConfig(method="self", base="keep"), progress=False)
    result = compare_adapters(model, copy.deepcopy(model))
    for site in result.sites.values():
        assert site.cosine == pytest.approx(1.0) and site.cosine_product == pytest.approx(1.0)
        assert site.spectral_norm < 1e-6
    train(model, text_batches(), lr=0.05)
    moved = compare_adapters(snapshot(adapted("bert")), model)  # the control: from PEFT's random start
    assert all(site.cosine is not None and site.cosine < 0.99 for site in moved.sites.values())
    assert all(site.cosine_product is None for site in moved.sites.values())  # B = 0 has no direction


def test_values_against_dense_float64() -> None:
    model = wrapped(mlp())
    initialize(model, token_batches(SIZES), InitConfig(method="self", base="keep"), progress=False)
    before = snapshot(model)
    old = {s.name: s.scaling * array(s.B) @ array(s.A) for s in find_sites(model)[0]}
    with torch.no_grad():
        for site in find_sites(model)[0]:
            site.A.mul_(1.3)
            site.B[:, 0] += 0.5
    result = compare_adapters(before, model)
    for site in find_sites(model)[0]:
        new = site.scaling * array(site.B) @ array(site.A)
        got = result.sites[site.name]
        assert got.spectral_norm == pytest.approx(np.linalg.norm(new - old[site.name], 2))
        assert got.cosine_product == pytest.approx(
            float((new * old[site.name]).sum() / np.linalg.norm(new) / np.linalg.norm(old[site.name]))
        )
        one = np.concatenate([array(before[site.name].A).ravel(), array(before[site.name].B).ravel()])
        two = np.concatenate([array(site.A).ravel(), array(site.B).ravel()])
        assert got.cosine == pytest.approx(float(one @ two / np.linalg.norm(one) / np.linalg.norm(two)))


@pytest.mark.parametrize(("decay", "near"), [(0.0, 1e-5), (0.1, 3e-2)])
def test_of_offset_only_the_half_that_trains_counts(decay: float, near: float) -> None:
    """The same training from `offset` and from `subtract` moves the same directions by the same amount.

    Weight decay shrinks the frozen half too, and so acts on what is added to W, by 0.2 %. In float64, since AdamW's
    first steps have the sign of a gradient, which rounding decides where it is next to nothing.
    """
    results = {}
    for base in ("offset", "subtract", "paired"):
        model = adapted("bert").double()
        initialize(model, text_batches(), InitConfig(method="self", base=base), progress=False)
        before = snapshot(model)
        train(model, text_batches(), weight_decay=decay)
        results[base] = compare_adapters(before, model)
    for name, site in results["subtract"].sites.items():
        assert results["offset"].sites[name].cosine == pytest.approx(site.cosine, abs=near / 10)
        assert results["offset"].sites[name].spectral_norm == pytest.approx(site.spectral_norm, rel=near)
        assert results["paired"].sites[name].spectral_norm != pytest.approx(site.spectral_norm, rel=0.1)  # the control


def test_folders_and_models_agree(tmp_path: Path) -> None:
    model = adapted("bert", use_rslora=True)
    initialize(model, text_batches(), InitConfig(method="self", base="paired"), progress=False)
    save_adapter(model, tmp_path / "before", fold_alpha=False)
    before = snapshot(model)
    train(model, text_batches())
    save_adapter(model, tmp_path / "after", fold_alpha=False)
    from_files, in_memory = compare_adapters(tmp_path / "before", tmp_path / "after"), compare_adapters(before, model)
    for name, site in in_memory.sites.items():
        assert from_files.sites[name].cosine == pytest.approx(site.cosine, abs=1e-6)
        assert from_files.sites[name].spectral_norm == pytest.approx(site.spectral_norm, rel=1e-4)
    table = str(in_memory)
    assert "query" in table and "value" in table and "σ max" in table
    assert set(in_memory.by_kind()) == {"query", "value"} == set(in_memory.to_dict()["kinds"])


def test_two_different_adapters_are_refused() -> None:
    one, two = wrapped(mlp(), lora(r=3)), wrapped(mlp(), lora(r=2))
    with pytest.raises(ValueError, match=r"site q: before it has A and B of shapes .* expected two states of the same"):
        compare_adapters(one, two)
    with pytest.raises(ValueError, match="site k"):
        compare_adapters(wrapped(mlp(), lora(targets=["q"])), wrapped(mlp(), lora(targets=["q", "k"])))


def test_products_without_forming_them() -> None:
    g = torch.Generator().manual_seed(0)
    B, Y = (torch.randn(9, 3, generator=g, dtype=torch.float64) for _ in range(2))
    A, X = (torch.randn(3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    assert product_inner(B, A, Y, X) == pytest.approx(float(((B @ A) * (Y @ X)).sum()))
    assert relative_error(product_spectrum(B, A), torch.linalg.svdvals(B @ A)[:3]) < 1e-12


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("bert.encoder.layer.3.attention.self.query", "query", 3),
        ("bert.encoder.layer.3.attention.output.dense", "out", 3),
        ("bert.encoder.layer.11.output.dense", "down", 11),
        ("bert.encoder.layer.11.intermediate.dense", "up", 11),
        ("model.layers.29.self_attn.k_proj", "key", 29),
        ("model.layers.0.mlp.gate_proj", "up", 0),
        ("transformer.h.1.attn.c_attn", "qkv", 1),
        ("transformer.h.1.attn.c_proj", "out", 1),
        ("transformer.h.1.mlp.c_proj", "down", 1),
        ("down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_out.0", "out", 2),
        ("blocks.5.attn.proj", "out", 5),
        ("vision.sidekick", "sidekick", 0),
    ],
)
def test_kinds_and_depths(name: str, kind: str, depth: int) -> None:
    assert (kind_of(name), depth_of(name)) == (kind, depth)


# --- the state before the first step ------------------------------------------------------------------------


def test_appendix_b() -> None:
    """A start with B = 0 has no gradient at A; ours has both, in every base policy."""
    batch = text_batches()[0]
    plain = start_diagnostics(adapted("bert"), batch)
    assert all(g == 0 for g in plain.gradient_A.values()) and all(g > 0 for g in plain.gradient_B.values())
    for base in ("offset", "paired", "subtract", "keep"):
        model = adapted("bert")
        initialize(model, text_batches(), InitConfig(method="self", base=base), progress=False)
        found = start_diagnostics(model, batch)
        assert all(g > 0 for g in (*found.gradient_A.values(), *found.gradient_B.values()))
        assert (found.loss == pytest.approx(plain.loss, abs=1e-5)) == (base != "keep")


def test_the_norms_are_those_of_autograd_and_the_model_is_left_as_found() -> None:
    model, batch = adapted("bert"), text_batches()[0]
    initialize(model, text_batches(), progress=False, config=InitConfig(method="self"))
    model.train()
    before, wanted = state(model), [p.requires_grad for p in model.parameters()]
    found = start_diagnostics(model, batch)
    assert not changed(before, model) and model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    model(**batch).loss.backward()
    for site in find_sites(model)[0]:
        assert found.gradient_A[site.name] == pytest.approx(float(site.A.grad.norm()), rel=1e-5)
        assert not site.A.grad[site.rank // 2 :].any()  # the frozen half is masked, so that it does not count
    with pytest.raises(ValueError, match="needs a loss"):
        start_diagnostics(model, {k: v for k, v in batch.items() if k != "labels"})


@pytest.mark.parametrize("base", ["keep", "offset"])
def test_the_curvature_is_that_of_the_whole_hessian(base: str) -> None:
    model, batch = wrapped(mlp()), token_batches(SIZES)[0]
    initialize(model, token_batches(SIZES), InitConfig(method="self", base=base), progress=False)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(model(batch)).square().mean()

    before, state_of_rng = state(model), torch.get_rng_state()
    found = start_curvature(model, batch, loss=loss, iterations=300)
    assert not changed(before, model) and torch.equal(state_of_rng, torch.get_rng_state())
    trained = [(s, n, s.rank // 2 if base == "offset" else s.rank) for s in find_sites(model)[0] for n in "AB"]
    factors = [getattr(site, name) for site, name, _ in trained]
    value = loss(model, batch)
    gradients = torch.autograd.grad(value, factors, create_graph=True)
    kept = [g[:h] if name == "A" else g[:, :h] for g, (_, name, h) in zip(gradients, trained, strict=True)]
    rows = []
    for entry in torch.cat([g.flatten() for g in kept]):
        second = torch.autograd.grad(entry, factors, retain_graph=True)
        cut = [g[:h] if name == "A" else g[:, :h] for g, (_, name, h) in zip(second, trained, strict=True)]
        rows.append(torch.cat([g.flatten() for g in cut]))
    values = torch.linalg.eigvalsh(torch.stack(rows))
    largest = float(values[values.abs().argmax()])
    assert found == pytest.approx(largest, rel=0.03)
    assert start_curvature(model, batch, loss=lambda m, b: 2 * loss(m, b)) == pytest.approx(2 * found, rel=0.03)
    with pytest.raises(ValueError, match="needs a loss"):
        start_curvature(model, batch)


def test_a_model_in_ddp_can_go_on_training(process_group: None) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model, batch = adapted("bert", modules_to_save=["classifier"]), text_batches()[0]
    wrapped_model = DistributedDataParallel(model)
    found = start_diagnostics(wrapped_model, batch)
    assert found.loss == pytest.approx(start_diagnostics(model, batch).loss)
    for _ in range(2):  # DDP refuses a second pass if the first left its reduction unfinished
        wrapped_model(**batch).loss.backward()


def test_adalora_is_refused_by_name() -> None:
    from peft import AdaLoraConfig, get_peft_model
    from tests.tiny import base_model

    model = get_peft_model(base_model("bert"), AdaLoraConfig(target_modules=["query"], total_step=10))
    with pytest.raises(ValueError, match="it is not plain LoRA but a SVDLinear .*AdaLoRA"):
        initialize(model, text_batches(), progress=False, config=InitConfig(method="self"))


def test_they_are_public() -> None:
    assert {"compare_adapters", "snapshot", "start_curvature", "start_diagnostics"} <= set(cntlora.__all__)

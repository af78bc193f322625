"""Layers other than Linear: convolutions, embeddings, attention, tied weights, experts, modules called many times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny import causal_batches, changed, denoise, logits, state, text_batches, train, unet, unet_batches
from tests.versions import before
from torch import Tensor, nn

from cntlora import InitConfig, apply_plan, compare_adapters, compute_plan, initialize, save_adapter, snapshot
from cntlora.data.memory import Budget, parse_limits
from cntlora.files.inspection import inspect_adapter
from cntlora.model.layouts import weight_matrix
from cntlora.model.patches import patches
from cntlora.model.sites import find_sites

WEIGHT_METHODS = ("pissa", "olora", "lora")


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def wrapped(make: Callable[[], Any], **options: Any) -> Any:
    return seeded(lambda: get_peft_model(seeded(make), LoraConfig(**{"r": 4, "lora_alpha": 8, **options})), 1)


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found.logits if hasattr(found, "logits") else found


def fit(model: nn.Module, batches: list[Any], steps: int = 2) -> None:
    """A few steps of AdamW towards outputs of one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.1)
    for step in range(steps):
        batch = batches[step % len(batches)]
        found = model(**batch) if isinstance(batch, dict) else model(batch)
        ((found.logits if hasattr(found, "logits") else found) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_life(
    make: Callable[[], Any], batches: list[Any], path: Path, config: InitConfig | None = None, **options: Any
) -> Any:
    """Initialise → starts as the base → train → save → plain PEFT on a pristine base → the same outputs."""
    config = config or InitConfig(method="self")
    model = wrapped(make, **options)
    plain = outputs(model, batches[0])
    report = initialize(model, batches, config)
    started = outputs(model, batches[0])
    if config.base != "keep":
        torch.testing.assert_close(started, plain, rtol=1e-4, atol=1e-4)
    fit(model, batches)
    trained = outputs(model, batches[0])
    assert (trained - started).abs().max() > 1e-3  # the control: it has trained
    save_adapter(model, path)
    read = outputs(PeftModel.from_pretrained(seeded(make), path).eval(), batches[0])
    torch.testing.assert_close(read, trained, rtol=1e-4, atol=1e-4)
    return report


# --- convolutions -------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    """Convolutions of different kernels, strides and paddings, of which two see the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(0, 1))
        self.point = nn.Conv2d(8, 6, 1)
        self.same = nn.Conv2d(8, 6, 4, padding="same")
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        parts = [layer(x).mean((-2, -1)) for layer in (self.strided, self.point, self.same)]
        return self.head(sum(parts[1:], start=parts[0]))


def pictures(count: int = 3, rows: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3, 9, 9, generator=g) for _ in range(count)]


CONVOLUTIONS = ["first", "strided", "point", "same"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "cross", "rtol": 1e-3},
        {"method": "pissa", "base": "subtract"},
        {"base": "paired"},
        {"adaptive_ranks": True},
        {"method": "eva"},
        {"base": "subtract"},
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_convolutions_live_through_training_and_reloading(
    options: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    config = InitConfig.from_dict({"method": "self", **options})
    report = whole_life(Pictures, pictures(), tmp_path, config, target_modules=[*CONVOLUTIONS, "head"], **lora)
    assert set(report.sites) <= {*CONVOLUTIONS, "head"} and len(report.sites) >= 4
    assert all(site.norm >= 0 for site in inspect_adapter(tmp_path))


class Patched(nn.Module):
    """One convolution as a Linear on patches that torch itself unfolds."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(layer.weight[0].numel(), layer.out_channels)
        self.linear.weight.data = layer.weight.detach().flatten(1).clone()
        self.linear.bias.data = layer.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        padding = self.layer.padding
        if padding == "same":
            x, padding = F.pad(x, (1, 2, 1, 2)), 0
        unfolded = F.unfold(x, self.layer.kernel_size, padding=padding, stride=self.layer.stride)
        return self.linear(unfolded.mT)


class Alone(nn.Module):
    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("method", ["self", "cross", "shift", "eva", "corda", "lora_ga", "lora_one", "pissa"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_on_its_patches(name: str, method: str) -> None:
    """ΔW is that of a Linear on the patches of F.unfold, which makes them in another way."""
    layer = getattr(seeded(Pictures), name)
    batches = [torch.randn(5, layer.in_channels, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    config = InitConfig(method=method, base="keep")
    reads_loss = method.startswith("lora_")
    loss: Any = (lambda model, x: (model(x) ** 3).sum()) if reads_loss else None
    conv, linear = (
        get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=[target]))
        for model, target in ((Alone(layer), "layer"), (Patched(layer), "linear"))
    )
    found = compute_plan(conv, batches, config, loss=loss).sites["layer"]
    wanted = compute_plan(linear, batches, config, loss=loss).sites["linear"]
    assert found.A.shape == wanted.A.shape and found.tokens == wanted.tokens
    if method != "eva":
        torch.testing.assert_close(found.B @ found.A, wanted.B @ wanted.A, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.singular_values, wanted.singular_values, rtol=1e-3, atol=1e-4)
    assert (found.B @ found.A).norm() > 0 or method == "eva"
    if method == "self" and name != "point":  # the control: the patches of another geometry give something else
        layer.padding = (2, 2)
        other = compute_plan(conv, batches, config).sites["layer"]
        assert not torch.allclose(other.B @ other.A, wanted.B @ wanted.A, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, padding=3), (3, 4, 11)),
        (nn.Conv1d(4, 6, 2, padding="valid"), (4, 11)),
        (nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0)), (3, 4, 8, 9)),
        (nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 5, 6)),
        (nn.Conv2d(4, 6, 1, dilation=2), (3, 4, 5, 6)),
        (nn.Conv3d(4, 6, (1, 2, 3), padding=1), (2, 4, 3, 4, 5)),
        (nn.Conv2d(32, 6, 3, padding=1), (2, 32, 60, 40)),
        (nn.Conv2d(4, 6, 3, padding=1), (300, 4, 20, 20)),
    ],
    ids=str,
)
def test_patches_times_the_weight_are_what_the_layer_gives(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        blocks = list(patches(layer, x))
        found = torch.cat(blocks) @ weight_matrix(layer).T + layer.bias
        wanted = layer(x if x.dim() == layer.weight.dim() else x[None])
    torch.testing.assert_close(found, wanted.movedim(1, -1).reshape(-1, 6), rtol=1e-4, atol=1e-5)
    most = max(weight_matrix(layer).shape[1] ** 2, 2**18)
    assert max(block.numel() for block in blocks) <= most + shape[-1] * weight_matrix(layer).shape[1]


def test_convolutions_that_see_one_input_share_their_statistics_only_where_their_patches_are_the_same() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.other = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).sum() + self.two(x).sum() + self.other(x).sum()

    from cntlora.data.collect import collect

    model = wrapped(Twins, target_modules=["one", "two", "other"], r=2)
    groups: list[Any] = []
    collect(model, find_sites(model)[0], pictures(1), lambda index, found: groups.extend(found))
    assert [names for names, _ in groups] == [("one", "two"), ("other",)]
    assert [X.tokens for _, X in groups] == [4 * 49, 4 * 16]


class Odd(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "Conv2d with groups=2, whose LoRA mixes the channels"),
        ({"dilation": 2}, r"dilation \(2, 2\), which PEFT's LoRA of it has not"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'.*pads with zeros"),
    ],
)
def test_convolutions_whose_lora_is_another_map_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = wrapped(lambda: Odd(**options), target_modules=["conv"])
    with pytest.raises(ValueError, match=f"site conv cannot be initialised: .*{message}"):
        initialize(model, [torch.randn(2, 4, 8, 8)], config=InitConfig(method="self"))
    assert not changed(state(wrapped(lambda: Odd(**options), target_modules=["conv"])), model)
    initialize(
        wrapped(Odd, target_modules=["conv"]), [torch.randn(2, 4, 8, 8)], config=InitConfig(method="self")
    )  # the control


def test_inputs_that_are_no_pictures_are_refused_with_the_site() -> None:
    model = wrapped(Odd, target_modules=["conv"])
    with pytest.raises(ValueError, match=r"site conv, batch 0: expected an input \(\.\.\., 4, size, size\), got"):
        initialize(model, [torch.randn(2, 3, 8, 8)], config=InitConfig(method="self"))


def test_the_memory_of_a_convolution_is_that_of_its_patches() -> None:
    model = wrapped(Odd, target_modules=["conv"])
    (site,) = find_sites(model)[0]
    assert (site.in_features, site.out_features) == (4 * 9, 8)
    batches = [torch.randn(2, 4, 8, 8)] * 2
    with pytest.raises(ValueError, match=r"max_memory.*site conv \(8×36\) alone needs"):
        compute_plan(model, batches, max_memory=20_000, config=InitConfig(method="self"))
    budget = Budget(parse_limits(1 << 20))
    budget.next_pass([site])
    assert budget.admits(site, False)
    plan = compute_plan(model, batches, max_memory="1MiB", config=InitConfig(method="self"))
    assert plan.memory["device"] == 36 * 36 * 4  # the sum of a float32 model


@pytest.mark.slow
def test_a_unet_with_convolutions_lives_through_training_and_reloading(tmp_path: Path) -> None:
    model, batches = unet(), unet_batches()
    targets = ["to_q", "conv1", "conv_in", "conv_shortcut"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    plain = denoise(model, batches[0]).detach()
    report = initialize(model, batches, forward=denoise, config=InitConfig(method="self"))
    assert any(name.endswith("conv1") for name in report.sites) and "conv_in" in report.sites
    torch.testing.assert_close(denoise(model, batches[0]).detach(), plain, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        (denoise(model, batch) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = denoise(model, batches[0]).detach()
    save_adapter(model, tmp_path)
    read = denoise(PeftModel.from_pretrained(unet(), tmp_path), batches[0]).detach()
    torch.testing.assert_close(read, trained, rtol=1e-4, atol=1e-4)
    assert (trained - plain).abs().max() > 1e-3
    merged = denoise(PeftModel.from_pretrained(unet(), tmp_path).merge_and_unload(), batches[0]).detach()
    torch.testing.assert_close(merged, trained, rtol=1e-3, atol=1e-3)


def test_factors_of_convolutions_can_be_compared_and_planned_elsewhere(tmp_path: Path) -> None:
    model = wrapped(Pictures, target_modules=CONVOLUTIONS)
    plan = compute_plan(model, pictures(), config=InitConfig(method="self"))
    plan.save(tmp_path / "plan.safetensors")
    apply_plan(model, type(plan).load(tmp_path / "plan.safetensors"))
    before = snapshot(model)
    assert before["same"].A.shape == (8, 8 * 16) and before["same"].B.shape == (6, 8)
    fit(model, pictures())
    assert all(site.spectral_norm > 0 for site in compare_adapters(before, model).sites.values())


# --- embeddings ---------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(ids)))


def sentences(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 30, (6, 7), generator=g) for _ in range(count)]


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
def test_embeddings_live_through_training_and_reloading(method: str, base: str, tmp_path: Path) -> None:
    config = InitConfig(method=method, base=base)
    report = whole_life(Words, sentences(), tmp_path, config, target_modules=["words", "out"])
    assert list(report.sites) == ["words", "out"]
    assert {site.name for site in inspect_adapter(tmp_path)} == {"words", "out"}


def test_the_start_of_an_embedding_is_the_leading_part_of_its_table() -> None:
    model = wrapped(Words, target_modules=["words"])
    E = model.base_model.model.words.base_layer.weight.detach().double()
    initialize(model, config=InitConfig.from_dict({"method": "pissa", "base": "keep", "strength": 1.0}))
    layer = model.base_model.model.words
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    wanted = (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(layer.get_delta_weight("default").double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["self", "eva", "lora_ga"])
def test_methods_that_read_data_refuse_embeddings_by_name(method: str) -> None:
    model = wrapped(Words, target_modules=["words", "out"], r=2)
    config, loss = InitConfig(method=method), lambda model, ids: model(ids).sum()
    options: Any = {"loss": loss} if method == "lora_ga" else {}
    with pytest.raises(ValueError, match="site words cannot be initialised: .*Embedding looks up rows.*pissa, olora"):
        initialize(model, sentences(), config, **options)
    with pytest.warns(UserWarning, match="site words .*left as plain LoRA"):
        report = initialize(model, sentences(), config, on_missing="warn", **options)
    assert list(report.sites) == ["out"]


def test_a_trained_embedding_adapter_is_not_overwritten() -> None:
    model = wrapped(Words, target_modules=["words"])
    initialize(model, config=InitConfig(method="lora"))
    with pytest.raises(
        ValueError, match="site words: adapter 'default' is not fresh .its lora_embedding_A is not zero"
    ):
        initialize(model, config=InitConfig(method="pissa"))


# --- nn.MultiheadAttention ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x)[0])


def sequences(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 8, generator=g) for _ in range(count)]


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("base", ["offset", "paired"])
def test_attention_modules_live_through_training_and_reloading(method: str, base: str, tmp_path: Path) -> None:
    config = InitConfig(method=method, base=base)
    report = whole_life(Attention, sequences(), tmp_path, config, target_modules=["attention", "out"], r=2)
    assert list(report.sites) == ["attention", "attention.out_proj", "out"]


@pytest.mark.parametrize("base", ["subtract", "keep"])
def test_bases_that_start_elsewhere_are_refused_on_attention_modules(base: str) -> None:
    """PEFT adds s·B·A of the output projection twice; once it adds it once, the refusal can go."""
    model = wrapped(Attention, target_modules=["attention"], r=2)
    with pytest.raises(ValueError, match=f"site attention: PEFT adds .* twice, so that base '{base}'"):
        initialize(model, config=InitConfig(method="pissa", base=base))
    layer = model.base_model.model.attention.base_layer.out_proj
    layer.lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        layer.lora_A["default"].weight.data.normal_()
        added = layer.get_delta_weight("default")
        found = outputs(model, sequences()[0])
        plain = seeded(Attention)
        plain.attention.out_proj.weight += 2 * added
        torch.testing.assert_close(found, outputs(plain, sequences()[0]), rtol=1e-4, atol=1e-4)


def test_methods_that_read_data_refuse_attention_modules_by_name() -> None:
    model = wrapped(Attention, target_modules=["attention", "out"], r=2)
    with pytest.raises(ValueError, match="site attention cannot be initialised: .*inside one function.*and 1 more"):
        initialize(model, sequences(), config=InitConfig(method="self"))
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        report = initialize(model, sequences(), on_missing="warn", config=InitConfig(method="self"))
    assert list(report.sites) == ["out"] and set(report.skipped) == {"attention", "attention.out_proj"}


def test_the_projection_inside_attention_is_refused_without_the_attention() -> None:
    model = wrapped(Attention, target_modules=["out_proj", "out"], r=2)
    with pytest.raises(
        ValueError, match="attention.out_proj cannot be initialised: .*never calls it.*target the atten"
    ):
        initialize(model, config=InitConfig(method="pissa"))


# --- tied weights, experts, shared modules ------------------------------------------------------------------


def tied(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_head_that_is_tied_to_the_embedding_lives_through_training_and_reloading(tmp_path: Path) -> None:
    base = seeded(tied)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    report = whole_life(tied, causal_batches(), tmp_path, target_modules=["q_proj", "lm_head"])
    assert "lm_head" in report.sites


def test_what_a_tied_weight_makes_impossible_is_refused_by_name() -> None:
    model = wrapped(tied, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head: its weight is shared with another module.*embed_tokens"):
        initialize(model, causal_batches(), InitConfig(method="self", base="subtract"))
    with pytest.raises(ValueError, match="lm_head cannot be initialised: .*'lora_ga'.*tied .*embed_tokens"):
        initialize(model, causal_batches(), InitConfig(method="lora_ga"))
    report = initialize(model, causal_batches(), config=InitConfig(method="self"))
    assert len(report.sites) == 2


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=6, num_experts_per_tok=1, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_fused_experts_are_refused_by_name_and_the_rest_of_the_model_goes_on(tmp_path: Path) -> None:
    """Also where some experts see no token."""
    if before("transformers", "5"):
        pytest.skip("Mixtral in transformers 4 has its experts as layers, not as fused parameters")
    lora: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"], "lora_dropout": 0.0,
    }  # fmt: skip
    model = wrapped(mixtral, **lora)
    batches = causal_batches(rows=1, tokens=3)
    for method in ("self", "pissa", "eva", "lora_ga"):
        with pytest.raises(ValueError, match="gate_up_proj cannot be initialised: .*bare parameter 'gate_up_proj'"):
            initialize(model, batches, InitConfig(method=method))
    with pytest.warns(UserWarning, match="gate_up_proj.*left as plain LoRA"):
        report = initialize(model, batches, on_missing="warn", config=InitConfig(method="self"))
    assert len(report.sites) == 2 and len(report.skipped) == 1
    train(model, batches, steps=2)
    trained = logits(model, batches[0])
    save_adapter(model, tmp_path)
    read = logits(PeftModel.from_pretrained(seeded(mixtral), tmp_path), batches[0])
    torch.testing.assert_close(read, trained, rtol=1e-4, atol=1e-4)


class Experts(nn.Module):
    """Experts as modules of their own; the last one sees no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8)
        chosen = (rows[:, 0] > 0).long()
        found = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            found = found.index_put((torch.where(chosen == i)[0],), expert(rows[chosen == i]))
        return found.reshape(x.shape)


def test_an_expert_that_sees_no_token_is_named() -> None:
    model = wrapped(Experts, target_modules=["0", "1", "2"], r=2)
    with pytest.raises(
        ValueError, match="site experts.2 cannot be initialised: it saw no token that counts in 3 batch"
    ):
        initialize(model, sequences(), config=InitConfig(method="self"))
    with pytest.warns(UserWarning, match="experts.2"):
        report = initialize(model, sequences(), on_missing="warn", config=InitConfig(method="self"))
    assert list(report.sites) == ["experts.0", "experts.1"]


class Recurrent(nn.Module):
    """One convolution and one linear map that are each called three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.linear(self.conv(x)))
        return x


def test_modules_that_are_called_several_times_see_all_their_inputs(tmp_path: Path) -> None:
    batches = pictures()
    report = whole_life(Recurrent, batches, tmp_path, target_modules=["conv", "linear"], r=2)
    sites = report.to_dict()["sites"]
    assert sites["conv"]["tokens"] == 3 * 3 * 4 * 81 and sites["linear"]["tokens"] == 3 * 3 * 4 * 27
    model = seeded(Recurrent)
    seen: list[Tensor] = []
    model.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    outputs(model, batches[0])
    one = wrapped(lambda: Alone(seeded(Recurrent).conv), target_modules=["layer"], r=2)
    config = InitConfig(method="self", base="keep")
    wanted = compute_plan(one, [torch.cat(seen)], config).sites["layer"]
    found = compute_plan(wrapped(Recurrent, target_modules=["conv"], r=2), batches[:1], config).sites["conv"]
    torch.testing.assert_close(found.B @ found.A, wanted.B @ wanted.A, rtol=1e-4, atol=1e-5)


def test_masks_of_tokens_are_not_applied_to_pictures() -> None:
    """A text mask of (batch, 81) beside 81 patches says nothing of them."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

        def forward(self, x: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
            return self.conv(x).flatten(2).mT + self.linear(text)

    batches = [
        {"x": x, "text": torch.randn(4, 81, 5), "attention_mask": (torch.arange(81) < 40).expand(4, 81).long()}
        for x in pictures()
    ]
    report = initialize(
        wrapped(Both, target_modules=["conv", "linear"], r=2), batches, config=InitConfig(method="self")
    ).to_dict()["sites"]
    assert report["conv"]["tokens"] == 3 * 4 * 81 and report["linear"]["tokens"] == 3 * 4 * 40
    assert len(text_batches()) == 3

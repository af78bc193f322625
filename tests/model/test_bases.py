"""Bases that are stored or called in other ways: quantised, 8-bit floats, offloaded, compiled, checkpointed."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from tests.bounds import truncation
from tests.cases import relative_error
from tests.tiny import adapted, base_model, causal_batches, changed, logits, lora_config, state, text_batches, train
from tests.versions import before
from torch import Tensor, nn

import cntlora.model.layouts
from cntlora import InitConfig, apply_plan, compute_plan, initialize, save_adapter
from cntlora.model.quantised import dequantised, kind_of
from cntlora.model.sites import find_sites
from cntlora.model.weight_files import WeightFiles

TARGETS = ["q_proj", "v_proj", "down_proj"]
QUANTISED = ("bitsandbytes nf4", "bitsandbytes nested", "bitsandbytes 8-bit", "torchao int8", "torchao int4")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama of `tests.tiny`, as files."""
    path = tmp_path_factory.mktemp("llama")
    base_model("llama").save_pretrained(path)
    return path


def quantised(kind: str, folder: Path) -> Any:
    """The model of `folder` as transformers loads it with a quantisation."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

    pytest.importorskip(kind.partition(" ")[0])
    if kind.startswith("bitsandbytes"):
        few = kind != "bitsandbytes 8-bit"
        options: Any = BitsAndBytesConfig(
            load_in_4bit=few,
            load_in_8bit=not few,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=kind == "bitsandbytes nested",
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

        int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4)
        options = TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao int8" else int4)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32, device_map="cpu")
    return model.eval()


def with_lora(model: Any, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(**{**LORA, **options})).eval()


def whole_life(
    make: Callable[[], Any],
    path: Path,
    config: InitConfig | None = None,
    pristine: Callable[[], Any] | None = None,
    **options: Any,
) -> Any:
    """Initialise → starts as the base → train → save → plain PEFT on a pristine base → the same outputs."""
    batches = causal_batches()
    model = with_lora(make(), **options).train()  # no dropout; in eval mode 4-bit weights are repacked
    plain = logits(model, batches[0])
    report = initialize(model, batches, config)
    started = logits(model, batches[0])
    torch.testing.assert_close(started, plain, rtol=1e-3, atol=1e-3)
    losses = train(model, batches, steps=2)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    trained = logits(model, batches[0])
    assert (trained - started).abs().max() > 1e-2  # the control: it has trained
    save_adapter(model, path)
    read = logits(PeftModel.from_pretrained((pristine or make)(), path).train(), batches[0])
    torch.testing.assert_close(read, trained, rtol=1e-3, atol=1e-3)
    return report


# --- quantised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_base_lives_through_training_and_reloading(kind: str, folder: Path, tmp_path: Path) -> None:
    report = whole_life(lambda: quantised(kind, folder), tmp_path)
    assert len(report.sites) == 6 and not report.skipped
    assert all(site["delta_norm"] > 0 for site in report.to_dict()["sites"].values())


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_unpacked_as_its_own_layer_does(kind: str, folder: Path) -> None:
    """W·I is what the layer gives for the identity; and it is near the weight that was quantised."""
    plain = {site.name: site.weight() for site in find_sites(with_lora(base_model("llama")))[0]}
    for site in find_sites(with_lora(quantised(kind, folder)))[0]:
        assert kind_of(site.stored) is not None and site.fixed
        W = site.weight()
        assert W.shape == (site.out_features, site.in_features)
        if "8-bit" not in kind:  # that one rounds the inputs too
            applied = site.base.train()(torch.eye(site.in_features)).double().T
            torch.testing.assert_close(W, applied, rtol=1e-4, atol=1e-5)
        error = (W - plain[site.name]).norm() / plain[site.name].norm()
        assert 1e-4 < error < (0.02 if "8" in kind else 0.25)


@contextmanager
def living(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Count the layers whose W is unpacked at the same time, and how often any is unpacked."""
    alive: dict[int, int] = {}
    counts = {"most": 0, "calls": 0}

    def watched(layer: Any) -> Tensor:
        W = dequantised(layer)
        key = id(layer)
        alive[key] = alive.get(key, 0) + 1
        weakref.finalize(W.untyped_storage(), lambda: alive.update({key: alive[key] - 1}))
        counts["most"] = max(counts["most"], sum(n > 0 for n in alive.values()))
        counts["calls"] += 1
        return W

    monkeypatch.setattr(cntlora.model.layouts.quantised, "dequantised", watched)
    yield counts


@pytest.mark.parametrize("method", ["self", "shift", "pissa", "corda"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_thread_unpacks_one_quantised_weight_at_a_time(
    method: str, adaptive: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(quantised("bitsandbytes nf4", folder))
    gc.disable()  # nothing may wait for the collector
    try:
        with living(monkeypatch) as counts:
            initialize(model, causal_batches(), InitConfig(method=method, adaptive_ranks=adaptive))
            assert 0 < counts["most"] <= torch.get_num_threads() and counts["calls"] >= 6 * 3
            kept = [site.weight(torch.float32) for site in find_sites(model)[0]]
            held = [cntlora.model.layouts.quantised.dequantised(site.base) for site in find_sites(model)[0]]
            assert counts["most"] == len(kept) == len(held) == 6  # the control
    finally:
        gc.enable()


def test_base_subtract_is_refused_on_a_quantised_base(folder: Path) -> None:
    model = with_lora(quantised("bitsandbytes nf4", folder))
    before = state(model)
    message = r"site model\.layers\.0.*q_proj: its weight is quantised \(bitsandbytes 4-bit\).*use base='offset'"
    with pytest.raises(ValueError, match=message):
        initialize(model, causal_batches(), InitConfig(method="self", base="subtract"))
    plan = compute_plan(with_lora(base_model("llama")), causal_batches(), InitConfig(method="self", base="subtract"))
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert not changed(before, model)
    initialize(model, causal_batches(), InitConfig(method="self", base="paired"))


def test_methods_that_read_gradients_are_refused_on_a_quantised_base(folder: Path) -> None:
    model = with_lora(quantised("torchao int8", folder))
    with pytest.raises(ValueError, match=r"q_proj cannot be initialised: method 'lora_ga'.*quantised \(torchao"):
        initialize(model, causal_batches(), InitConfig(method="lora_ga"))
    initialize(model, causal_batches(), InitConfig(method="eva"))


def test_a_plan_of_the_unquantised_model_applies_to_the_quantised_one_and_no_other_does(folder: Path) -> None:
    batches = causal_batches()
    for kind in QUANTISED:
        model = with_lora(quantised(kind, folder))
        plan = compute_plan(with_lora(base_model("llama")), batches, config=InitConfig(method="self"))
        apply_plan(model, plan)
    other = compute_plan(with_lora(base_model("llama", seed=5)), batches, config=InitConfig(method="self"))
    with pytest.raises(ValueError, match="is not the one the plan was made for"):
        apply_plan(with_lora(quantised("bitsandbytes nf4", folder)), other)


def test_reading_leaves_4_bit_weights_trainable(folder: Path) -> None:
    """On processors with AVX512-BF16 bitsandbytes repacks them at the first call in eval mode, and they stay so."""
    model = with_lora(quantised("bitsandbytes nf4", folder))
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # also where the processor has it not: the repacking is plain torch
    stored = [layer.weight.data.clone() for layer in layers]
    initialize(model, causal_batches(), config=InitConfig(method="self"))
    assert all(torch.equal(layer.weight.data, before) for layer, before in zip(layers, stored, strict=True))
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    layers[0].weight.quant_state.packing_format_for_cpu = True
    fresh = get_peft_model(model.unload(), LoraConfig(**LORA))
    with pytest.raises(
        ValueError, match="repacked for inference by an earlier call in eval mode.*load the model again"
    ):
        initialize(fresh, causal_batches(), config=InitConfig(method="self"))


def test_quantised_weights_that_are_not_known_are_refused_with_the_way_out() -> None:
    model = with_lora(base_model("llama"))
    layer = find_sites(model)[0][0].base
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="dtype int8.*unquantised model, save it and load it on the other"):
        initialize(model, causal_batches(), config=InitConfig(method="self"))
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale", torch.ones(24))
    with pytest.raises(ValueError, match="float8_e4m3fn with scales in weight_scale, a layout that is not known"):
        initialize(model, causal_batches(), config=InitConfig(method="self"))


# --- 8-bit floats and half precision ------------------------------------------------------------------------


def in_float8(folder: Path) -> Any:
    """Linear weights in float8_e4m3fn, cast for each call by diffusers' hooks."""
    from transformers import LlamaForCausalLM

    hooks = pytest.importorskip("diffusers.hooks", reason="this diffusers casts no layers")

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    hooks.apply_layerwise_casting(
        model.model.layers,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=torch.float32,
        skip_modules_pattern=["norm"],
    )
    return model


def test_a_base_in_8_bit_floats_lives_through_training_and_reloading(folder: Path, tmp_path: Path) -> None:
    if before("peft", "0.18"):
        pytest.skip("PEFT 0.17 leaves the adapter of such a base in 8-bit floats, which CPUs cannot multiply")

    def make() -> Any:
        model = in_float8(folder)
        assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
        return model

    report = whole_life(make, tmp_path)
    assert len(report.sites) == 6


def test_an_adapter_in_8_bit_floats_is_refused(folder: Path) -> None:
    model = get_peft_model(in_float8(folder), LoraConfig(**LORA), autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match="q_proj cannot be initialised: its LoRA factors are torch.float8_e4m3fn"):
        initialize(model, causal_batches(), config=InitConfig(method="self"))


def test_scales_of_transformers_fp8_layers_are_applied() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(20, 12, block_size=(8, 8))
    layer.weight.data = torch.randn(12, 20).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(2, 3) + 0.5
    W = cntlora.model.layouts.weight_matrix(layer)
    stored, scale = layer.weight.float(), layer.weight_scale_inv
    for i in range(12):
        for j in range(20):
            assert W[i, j] == stored[i, j] * scale[i // 8, j // 8]
    assert not torch.equal(W, stored)  # the control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lives_through_training_and_reloading(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = causal_batches()
    model = adapted("llama", dtype=dtype)
    plain = logits(model, batches[0])
    initialize(model, batches, config=InitConfig(method="self"))
    torch.testing.assert_close(logits(model, batches[0]), plain, rtol=0.05, atol=0.05)
    train(model, batches, steps=2)
    trained = logits(model, batches[0])
    save_adapter(model, tmp_path)
    read = logits(PeftModel.from_pretrained(base_model("llama").to(dtype), tmp_path), batches[0])
    torch.testing.assert_close(read, trained, rtol=0.05, atol=0.05)
    assert (trained - plain).abs().max() > 0.1


# --- weights= -----------------------------------------------------------------------------------------------


def test_weights_come_from_the_files_of_the_unquantised_model(folder: Path, tmp_path: Path) -> None:
    """The same factors as on the unquantised model, where the method reads W alone; others see other inputs."""
    config = InitConfig(method="pissa")
    plain = compute_plan(with_lora(base_model("llama")), config=config)
    model = with_lora(quantised("bitsandbytes nf4", folder))
    rough = compute_plan(model, config=config)
    base_model("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for place in (folder, folder / "model.safetensors", str(tmp_path)):
        read = compute_plan(model, config=config, weights=place)
        for name, site in read.sites.items():
            torch.testing.assert_close(site.B @ site.A, plain.sites[name].B @ plain.sites[name].A, rtol=1e-4, atol=1e-6)
            assert site.weight_norm == pytest.approx(plain.sites[name].weight_norm)
            assert site.weight_norm != rough.sites[name].weight_norm  # the control
    apply_plan(model, read)
    data_driven = compute_plan(
        with_lora(quantised("bitsandbytes nf4", folder)),
        causal_batches(),
        weights=folder,
        config=InitConfig(method="self"),
    )
    assert len(data_driven.sites) == 6


def test_wrong_weight_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = adapted("llama")
    with pytest.raises(FileNotFoundError, match="weights: .* has none of model.safetensors"):
        compute_plan(model, causal_batches(), weights=tmp_path, config=InitConfig(method="self"))
    files = {f"{s.name}.weight": s.weight(torch.float32).contiguous() for s in find_sites(model)[0]}
    first = next(iter(files))
    wrong = {
        "is (out, in) = (3, 24), the layer is (24, 24)": {**files, first: torch.zeros(3, 24)},
        "is torch.int8, expected the weight before": {**files, first: torch.zeros(24, 24, dtype=torch.int8)},
        f"has no tensor '{first}'": {k: v for k, v in files.items() if k != first},
    }
    for i, (message, tensors) in enumerate(wrong.items()):
        path = tmp_path / f"{i}.safetensors"
        save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            compute_plan(model, causal_batches(), weights=path, config=InitConfig(method="self"))
        assert message in str(error.value) and first.removesuffix(".weight") in str(error.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        compute_plan(model, causal_batches(), weights=path, config=InitConfig(method="self"))
    index = {"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="named in the index"):
        WeightFiles(tmp_path)


def test_files_of_the_inner_model_serve_too(tmp_path: Path) -> None:
    """A checkpoint of BertModel has no `bert.` in front of its names."""
    save_file({k: v.contiguous() for k, v in base_model().bert.state_dict().items()}, tmp_path / "model.safetensors")
    config = InitConfig(method="pissa")
    read, plain = (compute_plan(adapted(), config=config, weights=place) for place in (tmp_path, None))
    model = base_model()
    for name, site in plain.sites.items():  # a mapped file need not be aligned as memory is, which may round otherwise
        bound = truncation(model.get_submodule(name).weight.detach(), site.rank)
        assert relative_error(read.sites[name].B @ read.sites[name].A, site.B @ site.A) < bound < 1e-2, name


# --- offload and several devices ----------------------------------------------------------------------------

DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_gives_the_plan_of_the_model_in_memory(place: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, dispatch_model

    batches = causal_batches()
    model = with_lora(base_model("llama"))
    if place == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = {f"base_model.model.{name}": where for name, where in DISK.items()}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    away = [site.name for site in find_sites(model)[0] if site.stored.device.type == "meta"]
    assert len(away) == (3 if place == "disk" else 6)
    found, wanted = (
        compute_plan(model, batches, config=InitConfig(method="self")),
        compute_plan(with_lora(base_model("llama")), batches, config=InitConfig(method="self")),
    )
    for name, site in wanted.sites.items():
        assert torch.equal(found.sites[name].A, site.A) and torch.equal(found.sites[name].B, site.B)
        assert found.sites[name].sketch == site.sketch
    assert [site.name for site in find_sites(model)[0] if site.stored.device.type == "meta"] == away  # left as found
    with pytest.raises(ValueError, match=r"q_proj: its adapter is offloaded.*apply it to the model before it is disp"):
        apply_plan(model, found)
    apply_plan(with_lora(base_model("llama")), found)


def test_a_base_that_is_offloaded_in_part_lives_through_training_and_reloading(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    def make() -> Any:
        model = base_model("llama")
        return dispatch_model(model, DISK, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True)

    assert make().model.layers[1].mlp.up_proj.weight.device.type == "meta"
    report = whole_life(make, tmp_path / "adapter", InitConfig(method="self"), layers_to_transform=[0])
    assert len(report.sites) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["self", "shift", "corda", "lora_ga", "pissa"])
def test_a_model_over_several_devices_gives_the_plan_of_one(method: str, tmp_path: Path) -> None:
    """One layer on the GPU, one on the processor, both with adapters; hooks of accelerate move what goes between."""
    from accelerate import dispatch_model

    def spread() -> Any:
        places = {**DISK, "model.layers.0": 0, "model.layers.1": "cpu", "model.embed_tokens": 0}
        return dispatch_model(base_model("llama"), places, main_device="cpu", force_hooks=True)

    batches, config = causal_batches(), InitConfig(method=method)
    model = with_lora(spread())
    assert {site.device.type for site in find_sites(model)[0]} == {"cuda", "cpu"}
    found, wanted = compute_plan(model, batches, config), compute_plan(with_lora(base_model("llama")), batches, config)
    for name, site in wanted.sites.items():
        pair = found.sites[name].B.cpu() @ found.sites[name].A.cpu(), site.B @ site.A
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
    whole_life(spread, tmp_path, config, lambda: base_model("llama"))


def test_what_offload_makes_impossible_is_refused_by_name() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(with_lora(base_model("llama")), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj: its weight is offloaded.*'subtract' would have to write"):
        compute_plan(model, causal_batches(), InitConfig(method="self", base="subtract"))
    with pytest.raises(ValueError, match="lora_one.*gradient by its weight, and its weight is offloaded"):
        compute_plan(model, causal_batches(), InitConfig(method="lora_one"))
    late = with_lora(cpu_offload(base_model("llama"), execution_device=torch.device("cpu")))
    with pytest.raises(ValueError, match="factors are on the meta device.*before the base is offloaded"):
        initialize(late, causal_batches(), config=InitConfig(method="self"))


def test_weights_on_the_meta_device_are_refused_with_what_to_do() -> None:
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = base_model("llama")
    model = get_peft_model(model, LoraConfig(**LORA))
    with pytest.raises(ValueError, match="its weight is on the meta device .no values.; load the pretrained weights"):
        initialize(model, causal_batches(), config=InitConfig(method="self"))


# --- how the model is called --------------------------------------------------------------------------------


def same_plan(model: Any, batches: Any, around: Any = None, **options: Any) -> None:
    """The plan of `model` is bit-identical to that of the plain one."""
    call = {"config": InitConfig(method="self"), **options}
    wanted = compute_plan(adapted(), batches, **call)
    with around or nullcontext():
        found = compute_plan(model, batches, **call)
    for name, site in wanted.sites.items():
        assert torch.equal(found.sites[name].A, site.A) and torch.equal(found.sites[name].B, site.B), name


def compiled(how: str) -> Any:
    model = adapted()
    if how == "whole":
        return torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
        return model
    layers = model.base_model.model.bert.encoder.layer
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    return model


@pytest.mark.parametrize("how", ["whole", "in place", "by layer"])
@pytest.mark.parametrize("called", [False, True])
def test_a_compiled_model_gives_the_plan_of_the_plain_one(how: str, called: bool) -> None:
    batches = text_batches()
    model = compiled(how)
    if called:
        logits(model, batches[0])  # compiled code that knows of no hooks
    found = compute_plan(model, batches, config=InitConfig(method="self"))
    wanted = compute_plan(adapted(), batches, config=InitConfig(method="self"))
    clean = {name.replace("_orig_mod.", ""): site for name, site in found.sites.items()}
    assert list(clean) == list(wanted.sites)
    assert all(torch.equal(clean[name].B, site.B) for name, site in wanted.sites.items())


@pytest.mark.slow
def test_a_compiled_model_lives_through_training_and_reloading(tmp_path: Path) -> None:
    batches = text_batches()
    model = compiled("whole")
    plain = logits(model, batches[0])
    initialize(model, batches, config=InitConfig(method="self"))
    torch.testing.assert_close(logits(model, batches[0]), plain, rtol=1e-4, atol=1e-4)
    train(model, batches, steps=2)
    trained = logits(model, batches[0])
    save_adapter(model, tmp_path)
    read = logits(PeftModel.from_pretrained(base_model(), tmp_path), batches[0])
    torch.testing.assert_close(read, trained, rtol=1e-4, atol=1e-4)
    assert (trained - plain).abs().max() > 1e-2


def test_names_are_those_of_the_base_model_under_compile() -> None:
    wanted = [site.name for site in find_sites(adapted())[0]]
    bare = torch.compile(inject_adapter_in_model(lora_config(), base_model()), backend="eager")
    for model in (compiled("whole"), compiled("by layer"), bare):
        assert [site.name for site in find_sites(model)[0]] == wanted


def test_autocast_around_the_call_rounds_the_forward_pass_alone() -> None:
    """The inputs are those of autocast, the mathematics that of a call without it."""
    batches = text_batches()

    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    wanted = compute_plan(adapted(), batches, forward=forward, config=InitConfig(method="self"))
    with torch.autocast("cpu", torch.bfloat16):
        found = compute_plan(adapted(), batches, config=InitConfig(method="self"))
    plain = compute_plan(adapted(), batches, config=InitConfig(method="self"))
    for name, site in wanted.sites.items():
        assert torch.equal(found.sites[name].B, site.B), name
    assert any(not torch.equal(plain.sites[name].B, site.B) for name, site in wanted.sites.items())  # the control


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["self", "lora_ga"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, method: str) -> None:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    batches = text_batches()
    same_plan(model, batches, config=InitConfig(method=method))
    assert model.training and model.is_gradient_checkpointing
    initialize(model, batches, InitConfig(method=method))
    losses = train(model, batches, steps=3)
    assert losses[0] > 0 and copy.copy(losses) == losses

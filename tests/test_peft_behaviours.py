"""Questions of PEFT's own tests to EVA, CorDA, LoRA-GA and PiSSA, put to ours; where PEFT refuses, ours works.

After its `test_initialization.py`, `test_lora_ga.py` and `test_gpu_examples.py` (EVA): consistency across shuffles,
hooks and fields left on the model, the same output after conversion and loading with patterns and rsLoRA, Conv1D,
dtypes, scaling, loading without memory for the weights, and batches of several adapters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import KINDS, adapted, base_model, changed, logits, state, text_batches, train
from torch import Tensor

from cntlora import InitConfig, compute_plan, initialize, save_adapter
from cntlora.plan import InitPlan

METHODS = ["self", "cross", "shift", "eva", "corda", "lora_ga"]
EXACT = {"rtol": 2e-4, "atol": 2e-5}
Batch = dict[str, Tensor]


def of(method: str, **options: Any) -> InitConfig:
    stable = {"rtol": 1e-3} if method in ("cross", "shift") else {}
    return InitConfig.from_dict({"method": method, **stable, **options})


def fast(*methods: str) -> list[Any]:
    """All methods, of which the others are slow tests."""
    return [m if m in methods else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


def rows_of(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def shuffled(batches: list[Batch], seed: int) -> list[Batch]:
    """The same rows in another order, so in other batches."""
    rows, size = rows_of(batches), len(batches[0]["labels"])
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(seed))
    mixed = {key: value[order] for key, value in rows.items()}
    return [{key: value[i : i + size] for key, value in mixed.items()} for i in range(0, len(order), size)]


# --- consistency across shuffles (EVA: mean cosine over 0.75) ------------------------------------------------


def plan_of(method: str, batches: list[Batch], **options: Any) -> InitPlan:
    config = of(method, base="keep", num_batches=len(batches), **options)
    return compute_plan(adapted(target_modules=["query", "dense"]), batches, config, progress=False)


def agreement(one: InitPlan, other: InitPlan, factor: str = "A") -> float:
    """The mean over sites and directions of the cosines of principal angles between the spaces of a factor."""
    cosines = []
    for name, site in one.sites.items():
        bases = [
            torch.linalg.qr((M.mT if factor == "A" else M).double()).Q
            for M in (getattr(site, factor), getattr(other.sites[name], factor))
        ]
        cosines.append(torch.linalg.svdvals(bases[0].mT @ bases[1]).mean())
    return float(torch.stack(cosines).mean())


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_batches_give_the_same_start(method: str) -> None:
    batches = text_batches(4)
    one, other = plan_of(method, batches), plan_of(method, batches[::-1])
    for name, site in one.sites.items():
        products = [p.sites[name].scaling * p.sites[name].B.double() @ p.sites[name].A.double() for p in (one, other)]
        assert (products[0] - products[1]).norm() <= 1e-3 * products[0].norm() + 1e-9, name
        assert site.tokens == other.sites[name].tokens


@pytest.mark.parametrize("method", fast("eva", "corda"))
def test_shuffled_rows_give_a_start_that_is_near(method: str) -> None:
    batches = text_batches(6, rows=48)
    plans = [plan_of(method, shuffled(batches, seed)) for seed in (0, 1)]
    elsewhere = plan_of("lora", batches)
    for factor in ("A",) if method == "eva" else ("A", "B"):
        near = agreement(*plans, factor)
        assert near > 0.75, (factor, near)
        if factor == "A":  # the control: random directions, which B of plain LoRA does not have
            assert agreement(plans[0], elsewhere) < 0.75


# --- hooks and fields ---------------------------------------------------------------------------------------


def traces(model: Any) -> dict[str, Any]:
    """Names of the attributes of every module, and its hooks."""
    found = {}
    for path, module in model.named_modules():
        hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value]
        found[path] = (sorted(vars(module)), hooks)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_the_user_is_called_once_a_batch_and_stays(method: str) -> None:
    model, batches, calls = adapted(), text_batches(3), []
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda *_: calls.append(0))
    query.base_layer.register_forward_hook(lambda *_: calls.append(1))
    before, weights = traces(model), state(model)
    initialize(model, batches, of(method), progress=False)
    assert (calls.count(0), calls.count(1)) == (3, 3)
    assert traces(model) == before
    assert all("lora_" in name for name in changed(weights, model)) and changed(weights, model)
    logits(model, batches[0])
    assert (calls.count(0), calls.count(1)) == (4, 4)


# --- the same output after conversion and loading ------------------------------------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "rank pattern": {"rank_pattern": {"query": 6, "layer.1.attention.self.value": 2}},
    "alpha pattern": {"alpha_pattern": {"query": 5, "layer.1.attention.self.value": 2}},
    "both": {"rank_pattern": {"query": 6}, "alpha_pattern": {"value": 3}},
    "rslora": {"use_rslora": True},
    "rank pattern and rslora": {"rank_pattern": {"query": 6}, "use_rslora": True},  # PEFT refuses to convert these two
    "alpha pattern and rslora": {"alpha_pattern": {"query": 5}, "use_rslora": True},
}


PATTERNED = [
    pytest.param(
        method, pattern, base,
        id=f"{method}-{pattern}-{base}",
        marks=[] if (method, base) == ("self", "offset") or ("pattern and" in pattern and method in ("self", "corda"))
        else [pytest.mark.slow],
    )
    for method in METHODS
    for pattern in PATTERNS
    for base in ("offset", "subtract")
]  # fmt: skip


@pytest.mark.parametrize(("method", "pattern", "base"), PATTERNED)
def test_same_output_after_loading_with_patterns(tmp_path: Path, method: str, pattern: str, base: str) -> None:
    model, batches = adapted(**PATTERNS[pattern]), text_batches()
    scalings = scalings_of(model)
    start = logits(model, batches[0])
    initialize(model, batches, of(method, base=base), progress=False)
    assert scalings_of(model) == pytest.approx(scalings)
    torch.testing.assert_close(logits(model, batches[0]), start, **EXACT)
    train(model, batches)
    trained = logits(model, batches[0])
    assert (trained - start).abs().max() > 1e-2
    for fold in (True, False):
        save_adapter(model, tmp_path / str(fold), fold_alpha=fold)
        read = PeftModel.from_pretrained(base_model(), tmp_path / str(fold)).eval()
        torch.testing.assert_close(logits(read, batches[0]), trained, **EXACT)


def scalings_of(model: Any) -> dict[str, float]:
    return {path: m.scaling["default"] for path, m in model.named_modules() if hasattr(m, "lora_A")}


def test_a_second_adapter_needs_no_warning_about_the_first(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """PEFT warns that PiSSA and OLoRA change the base under the other adapter; ours leave it alone."""
    for method in ("pissa", "olora"):
        model = adapted()
        initialize(model, None, InitConfig(method=method), progress=False)
        save_adapter(model, tmp_path / method)
    model = PeftModel.from_pretrained(base_model(), tmp_path / "pissa", adapter_name="pissa")
    model.load_adapter(tmp_path / "olora", adapter_name="olora")
    assert not [w for w in recwarn if "base" in str(w.message) and "LoRA" in str(w.message)]


# --- Conv1D -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", fast("self", "corda", "lora_ga"))
def test_conv1d_starts_at_the_identity_trains_and_is_read_again(tmp_path: Path, method: str) -> None:
    model, batches = adapted("gpt2", target_modules=["c_fc", "c_attn"]), KINDS["gpt2"].batches()
    start = logits(base_model("gpt2"), batches[0])
    initialize(model, batches, of(method), progress=False)
    torch.testing.assert_close(logits(model, batches[0]), start, rtol=1e-4, atol=1e-4)
    train(model, batches)
    save_adapter(model, tmp_path)
    read = logits(PeftModel.from_pretrained(base_model("gpt2"), tmp_path).eval(), batches[0])
    torch.testing.assert_close(read, logits(model, batches[0]), **EXACT)
    assert (read - start).abs().max() > 1e-2


# --- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", fast("self", "lora_ga"))
def test_factors_are_of_the_dtype_of_the_model(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    model = adapted("llama", dtype=dtype, autocast_adapter_dtype=False)
    batches = KINDS["llama"].batches()
    start = logits(base_model("llama").to(dtype), batches[0])
    initialize(model, batches, of(method), progress=False)
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    scale = float(start.abs().max()) * torch.finfo(dtype).eps
    assert float((logits(model, batches[0]) - start).abs().max()) <= 8 * scale
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data[: parameter.shape[0] // 2] *= 1.5  # the half that trains
    moved = logits(model, batches[0])
    save_adapter(model, tmp_path)
    read = PeftModel.from_pretrained(base_model("llama").to(dtype), tmp_path, autocast_adapter_dtype=False).eval()
    assert float((logits(read, batches[0]) - moved).abs().max()) <= 8 * scale
    if method != "eva":  # whose B is zero, so that A alone moves nothing
        assert float((moved - start).abs().max()) > 8 * scale


# --- scaling, loading and use -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_can_be_turned_and_comes_back(use_rslora: bool) -> None:
    """Rank and alpha have changed with the start; PEFT's rules for `set_scale` and the others go by them."""
    model, batches = adapted(target_modules=["query", "dense"], use_rslora=use_rslora), text_batches()
    initialize(model, batches, InitConfig(method="self", adaptive_ranks=True, min_rank=1), progress=False)
    train(model, batches)
    scalings, wanted = scalings_of(model), logits(model, batches[0])
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for turn, back in (
        (lambda x: x.scale_layer(3.0), lambda x: x.unscale_layer(3.0)),
        (lambda x: x.set_scale("default", 0.25), lambda x: x.set_scale("default", 1.0)),
        (lambda x: x.scale_layer(0.5), lambda x: x.unscale_layer()),
    ):
        for layer in layers:
            turn(layer)
        assert scalings_of(model) != pytest.approx(scalings)
        for layer in layers:
            back(layer)
        assert scalings_of(model) == pytest.approx(scalings)
        torch.testing.assert_close(logits(model, batches[0]), wanted)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """Folders of two trained adapters, and what each gives."""
    root, wanted, batches = tmp_path_factory.mktemp("two"), [], text_batches()
    for index, base in enumerate(("offset", "subtract")):
        model = adapted(target_modules=["query", "dense"])
        initialize(model, batches, InitConfig(method="self", base=base, adaptive_ranks=True), progress=False)
        train(model, text_batches(seed=index))
        save_adapter(model, root / str(index))
        wanted.append(logits(model, batches[0]))
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    return root, wanted


def test_loading_without_memory_for_the_weights(two: tuple[Path, list[Tensor]]) -> None:
    root, wanted = two
    model = PeftModel.from_pretrained(base_model(), root / "0", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model.eval(), text_batches()[0]), wanted[0], **EXACT)
    model.load_adapter(root / "1", adapter_name="second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model.eval(), text_batches()[0]), wanted[1], **EXACT)


def test_one_batch_with_rows_for_several_adapters(two: tuple[Path, list[Tensor]]) -> None:
    root, wanted = two
    model = PeftModel.from_pretrained(base_model(), root / "0", adapter_name="first")
    model.load_adapter(root / "1", adapter_name="second")
    batch = {key: value for key, value in text_batches()[0].items() if key != "labels"}
    names = ["first", "second", "__base__", "first", "second", "first", "__base__", "second"]
    with torch.no_grad():
        mixed = model.eval()(**batch, adapter_names=names).logits
    outputs = {"first": wanted[0], "second": wanted[1], "__base__": logits(base_model(), batch)}
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], outputs[name][row], **EXACT)


def test_a_copy_of_the_model_lives_its_own_life() -> None:
    """`copy.deepcopy`, which trainers make for reference models, keeps the start, and training one moves one."""
    model, batches = adapted(), text_batches()
    initialize(model, batches, progress=False, config=InitConfig(method="self"))
    other = copy.deepcopy(model)
    torch.testing.assert_close(logits(other, batches[0]), logits(model, batches[0]))
    before = logits(model, batches[0])
    train(other, batches)
    torch.testing.assert_close(logits(model, batches[0]), before)
    assert (logits(other, batches[0]) - before).abs().max() > 1e-2

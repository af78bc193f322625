"""A plan is one file that gives the same adapter anywhere, or one error that says why not; and the report of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import RunFresh
from tests.tiny import Wrapper, adapted, base_model, changed, logits, lora_config, state, text_batches
from torch import nn

from cntlora import InitConfig, InitPlan, apply_plan, compute_plan, initialize
from cntlora.atomic import write_atomically
from cntlora.model.sites import find_sites
from cntlora.plan import FORMAT
from cntlora.site_plan import sketch_distance, weight_sketch

FIRST = "bert.encoder.layer.0.attention.self.query"
CONFIGS = [
    InitConfig(method="self"),
    InitConfig.from_dict({"base": "keep", "method": "cross", "p": 0.3, "batch_weights": (1.0, 0.5, 2.0)}),
    InitConfig.from_dict(
        {"method": "self", "base": "paired", "fold_alpha": True, "gram": "mean", "root": "symmetric", "rtol": 1e-6}
    ),
    InitConfig(method="self", base="subtract", adaptive_ranks=True, rank_budget=3),
    InitConfig.from_dict({"method": "shift", "shift_constant": "gaussian", "seed": 3, "num_batches": 2}),
]


@pytest.fixture
def plan() -> InitPlan:
    return compute_plan(adapted(), text_batches(), config=InitConfig(method="self"))


@pytest.fixture
def saved(plan: InitPlan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def same(left: InitPlan, right: InitPlan) -> bool:
    """Tell whether both are bit-identical, tensors and values."""
    if left.sites.keys() != right.sites.keys() or list(left.sites) != list(right.sites):
        return False
    for a, b in zip(left.sites.values(), right.sites.values(), strict=True):
        for field in dataclasses.fields(a):
            one, two = getattr(a, field.name), getattr(b, field.name)
            if isinstance(one, torch.Tensor):
                if one.dtype != two.dtype or not torch.equal(one, two):
                    return False
            elif one != two or type(one) is not type(two):
                return False
    rest = [f.name for f in dataclasses.fields(left) if f.name != "sites"]
    return all(getattr(left, name) == getattr(right, name) for name in rest)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.base}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundtrip_is_bit_equal(config: InitConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    plan = compute_plan(adapted(dtype=dtype, autocast_adapter_dtype=False), text_batches(), config)
    plan.save(tmp_path / "new" / "plan")
    loaded = InitPlan.load(tmp_path / "new" / "plan")
    assert same(plan, loaded) and loaded.config == config
    assert next(iter(loaded.sites.values())).A.dtype == dtype
    site = plan.sites[FIRST]
    for edited in (
        dataclasses.replace(site, A=site.A * 1.01),
        dataclasses.replace(site, tokens=site.tokens + 1),
        dataclasses.replace(site, seconds=site.seconds * 2),
    ):  # the control
        assert not same(dataclasses.replace(plan, sites={**plan.sites, FIRST: edited}), loaded)


def test_skipped_sites_survive(tmp_path: Path) -> None:
    model = adapted(target_modules=["query", "word_embeddings"])
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        plan = compute_plan(model, text_batches(), on_missing="warn", config=InitConfig(method="self"))
    plan.save(tmp_path / "plan")
    loaded = InitPlan.load(tmp_path / "plan")
    assert list(loaded.skipped) == ["bert.embeddings.word_embeddings"] and same(plan, loaded)
    apply_plan(model, loaded)


def test_the_file_is_plain_safetensors_without_paths(saved: Path, tmp_path: Path) -> None:
    assert f"{FIRST}::A" in load_file(saved)
    assert str(tmp_path).encode() not in saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_apply_is_initialize() -> None:
    """compute_plan, a file, apply_plan: the same bits as `initialize`."""
    for config in CONFIGS:
        direct, planned = adapted(), adapted()
        initialize(direct, text_batches(), config)
        before = state(planned)
        plan = InitPlan.from_bytes(compute_plan(planned, text_batches(), config).to_bytes())
        assert not changed(before, planned)
        apply_plan(planned, plan)
        assert not changed(state(direct), planned)
        assert changed(before, planned)  # the control


APPLY = """
import torch
from safetensors.torch import save_file
from cntlora import InitPlan, apply_plan
from tests.tiny import adapted
torch.set_num_threads(1)
model = adapted()
apply_plan(model, InitPlan.load(sys.argv[1]))
save_file({n: t.contiguous() for n, t in model.state_dict().items()}, sys.argv[2])
"""


@pytest.mark.parametrize("base", ["offset", pytest.param("subtract", marks=pytest.mark.slow)])
def test_apply_elsewhere_is_initialize_here(base: str, tmp_path: Path, run_fresh: RunFresh) -> None:
    config = InitConfig(method="self", base=base, adaptive_ranks=True, rank_budget=6)
    compute_plan(adapted(), text_batches(), config).save(tmp_path / "plan")
    run_fresh(APPLY, tmp_path / "plan", tmp_path / "state")
    here = adapted()
    untouched = state(here)
    initialize(here, text_batches(), config)
    there = load_file(tmp_path / "state")
    assert not changed(there, here)
    assert there.keys() != untouched.keys() or any(not torch.equal(untouched[n], t) for n, t in there.items())


# --- files that are not what they should be -----------------------------------------------------------------


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    head = json.loads(metadata["cntlora_plan"])
    edit(head)
    save_file(load_file(path), path, metadata={"cntlora_plan": json.dumps(head)})


def edit_tensor(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    tensors = load_file(path)
    tensors[f"{FIRST}::B"][0, 0] += 1e-3
    save_file(tensors, path, metadata=head["__metadata__"])


def drop_tensor(path: Path) -> None:
    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load_file(path)
    del tensors[f"{FIRST}::A"]
    save_file(tensors, path, metadata=head["__metadata__"])


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-100]), ["cut short"]),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), ["cut short"]),
    "empty": (lambda p: p.write_bytes(b""), ["cut short"]),
    "text": (lambda p: p.write_text("hello, I am no plan at all"), ["not a whole safetensors file"]),
    "a tensor edited": (edit_tensor, [FIRST, "its B", "changed"]),
    "a tensor gone": (drop_tensor, [FIRST, "its A", "changed"]),
    "an adapter": (lambda p: save_file({"lora_A": torch.ones(2)}, p), ["no cntlora plan"]),
    "newer": (
        lambda p: edit_header(p, lambda head: head.update(format=FORMAT + 1)),
        [f"plan format {FORMAT + 1}", "update cntlora"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_error(saved: Path, name: str) -> None:
    InitPlan.load(saved)  # the control: before it breaks
    breakage, parts = BROKEN[name]
    breakage(saved)
    with pytest.raises(ValueError) as error:
        InitPlan.load(saved)
    assert all(part in str(error.value) for part in [*parts, str(saved)]), str(error.value)


def test_no_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        InitPlan.load(tmp_path / "none")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("cntlora.plan.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- models that are not the plan's -------------------------------------------------------------------------


def with_other_weight() -> nn.Module:
    model = adapted()
    with torch.no_grad():
        weight = find_sites(model)[0][0].base.weight
        weight.copy_(weight[torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))])
    return model


def scaled_weight() -> nn.Module:
    model = adapted()
    with torch.no_grad():
        find_sites(model)[0][0].base.weight.mul_(1.5)
    return model


def shifted_weight() -> nn.Module:
    model = adapted()
    with torch.no_grad():
        find_sites(model)[0][-1].base.weight.add_(1.0)  # one layer only, by a constant
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "other names": (lambda: adapted("gpt2"), [FIRST, "no such adapted layer"]),
    "fewer sites": (lambda: adapted(target_modules=["query"]), ["self.value", "no such adapted layer"]),
    "more sites": (lambda: adapted(target_modules=["query", "value", "key"]), ["self.key", "nothing for it"]),
    "other rank": (lambda: adapted(r=5), [FIRST, "rank 4", "rank 5", "same LoraConfig"]),
    "other scaling": (lambda: adapted(lora_alpha=9), [FIRST, "scaling 2", "2.25", "same LoraConfig"]),
    "rsLoRA": (lambda: adapted(use_rslora=True), [FIRST, "scaling 2", "scaling 4"]),
    "other seed": (lambda: adapted(seed=5), [FIRST, "weight is not the one"]),
    "rows in another order": (with_other_weight, [FIRST, "weight is not the one"]),
    "subtracted before": (scaled_weight, [FIRST, "weight is not the one"]),
    "one layer shifted": (shifted_weight, ["layer.1.attention.self.value", "weight is not the one"]),
    "no adapter": (base_model, ["no LoRA layer"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_one_error_and_nothing_is_written(plan: InitPlan, name: str) -> None:
    make, parts = OTHERS[name]
    model = make()
    before, configs = state(model), repr(getattr(model, "peft_config", None))
    with pytest.raises(ValueError) as error:
        apply_plan(model, plan)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)
    assert not changed(before, model) and repr(getattr(model, "peft_config", None)) == configs


def test_another_shape_is_named(plan: InitPlan) -> None:
    site = plan.sites[FIRST]
    wide = dataclasses.replace(site, A=torch.cat([site.A, site.A], dim=1))
    model = adapted()
    before = state(model)
    with pytest.raises(ValueError, match=f"site {FIRST}: the plan is for .out, in. = .24, 48., the layer is .24, 24."):
        apply_plan(model, dataclasses.replace(plan, sites={**plan.sites, FIRST: wide}))
    assert not changed(before, model)


@pytest.mark.parametrize("last", [0, 1])
def test_an_error_at_the_last_site_still_writes_nothing(plan: InitPlan, last: int) -> None:
    model = adapted()
    sites = find_sites(model)[0]
    with torch.no_grad():
        if last == 0:
            sites[-1].base.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        else:
            sites[-1].B.fill_(0.1)
    before = state(model)
    with pytest.raises(ValueError, match=sites[-1].name):
        apply_plan(model, plan)
    assert not changed(before, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_rounded_copy_of_the_base_is_the_same_model(plan: InitPlan, dtype: torch.dtype, autocast: bool) -> None:
    model = adapted(dtype=dtype, autocast_adapter_dtype=autocast)
    start = logits(model, text_batches()[0])
    apply_plan(model, plan)
    for site in find_sites(model)[0]:
        wanted = plan.sites[site.name].A
        assert torch.equal(site.A.detach(), wanted.to(site.A.dtype)) and site.A.any()
    torch.testing.assert_close(logits(model, text_batches()[0]), start, rtol=0.05, atol=0.05)


def test_the_sketch_tells_rounding_from_another_weight() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        W = torch.randn(40, 30, generator=g, dtype=torch.float64)
        norm, sketch = float(W.norm()), weight_sketch(W)
        assert sketch_distance(weight_sketch(W.bfloat16().double()), sketch) < 0.01 * norm
    drawn = [torch.randn(40, 30, generator=g, dtype=torch.float64) for _ in range(50)]
    others = [sketch_distance(weight_sketch(other), sketch) for other in drawn]
    assert all(other > 0.02 * norm for other in others)


def test_a_plan_fits_the_model_however_it_is_wrapped(plan: InitPlan) -> None:
    plain, wrapped = adapted(), adapted()
    apply_plan(plain, plan)
    apply_plan(Wrapper(Wrapper(wrapped)), plan)
    assert not changed(state(plain), wrapped)
    added = base_model()
    added.add_adapter(lora_config())
    apply_plan(added, plan)
    assert torch.equal(find_sites(added)[0][0].A, find_sites(plain)[0][0].A)


# --- the report ---------------------------------------------------------------------------------------------


def test_report_is_a_table_and_a_dict() -> None:
    model = adapted(target_modules=["query", "word_embeddings"])
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        report = initialize(
            model,
            text_batches(),
            InitConfig.from_dict({"method": "self", "batch_weights": (1, 2, 3)}),
            on_missing="warn",
        )
    values = json.loads(json.dumps(report.to_dict()))
    assert values["config"]["method"] == "self" and values["config"]["batch_weights"] == [1.0, 2.0, 3.0]
    assert set(values["sites"]) == {FIRST, FIRST.replace("layer.0", "layer.1")}
    site = values["sites"][FIRST]
    assert (site["rank"], site["file_rank"], site["batches"], site["masked"]) == (4, 8, 3, True)
    assert 0 < site["captured"] <= 1 and site["effective_rank"] <= 24 and site["tokens"] > 0
    assert site["tokens"] == sum(int(b["attention_mask"].sum()) for b in text_batches())
    assert list(values["skipped"]) == ["bert.embeddings.word_embeddings"]
    table = str(report)
    for part in (
        FIRST,
        "rank",
        "tokens",
        "self",
        "offset",
        "3 batches",
        "bert.embeddings.word_embeddings",
        "Embedding",
    ):
        assert part in table
    assert "\x1b" not in table and InitConfig.from_dict(values["config"]) == report.config


def test_report_marks_sites_with_too_little_data() -> None:
    few = text_batches(1, rows=1, tokens=3)
    assert "*" in str(initialize(adapted(r=8), few, config=InitConfig(method="self")))
    assert "*" not in str(initialize(adapted(r=8), text_batches(), config=InitConfig(method="self")))

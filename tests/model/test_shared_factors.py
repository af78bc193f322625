"""Layers that share one set of factors: initialised once, one after training, and the same after a reload."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.conftest import RunFresh
from tests.tiny import state
from tests.versions import TIED_FACTORS
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cntlora import InitConfig, apply_plan, compare_adapters, compute_plan, initialize, save_adapter
from cntlora.analysis.comparison import snapshot
from cntlora.linalg.factors import halves_cancel
from cntlora.model.sharded import address
from cntlora.model.sites import Site, find_sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
]
VOCABULARY = 50
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"vocab_size": VOCABULARY, **SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": True}


def gemma() -> Any:
    return GemmaForCausalLM(GemmaConfig(head_dim=8, **LLAMA))


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def t5() -> Any:
    shape = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape))


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "gemma": (gemma, "embed_tokens", "q_proj"),
    "llama": (llama, "embed_tokens", "q_proj"),
    "gpt2": (gpt2, "wte", "c_attn"),
    "t5": (t5, "shared", "q"),
}
"""Maker, input embedding, another layer; the head of all is `lm_head`."""


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = MODELS[kind][0]()
    with torch.no_grad():  # also the row of padding, which DoRA would divide by
        model.get_input_embeddings().weight.normal_(std=0.1)
    return model.to(dtype).eval()


def tied(kind: str, dtype: torch.dtype = torch.float32, tie: bool = True, **options: Any) -> Any:
    targets = [*MODELS[kind][1:], "lm_head"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "ensure_weight_tying": tie, **options})
    return get_peft_model(base_of(kind, dtype), config).eval()


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (count, 4, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": i, "labels": i} for i in ids]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batches()[0]).logits
    return out


def trained(model: Any, lr: float = 1e-2) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches() * 2:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def pair(model: nn.Module) -> tuple[Site, Site]:
    """Embedding and head."""
    table: Any = model.get_input_embeddings()
    sites = find_sites(model)[0]
    return next(s for s in sites if s.layer is table), next(s for s in sites if s.name == "lm_head")


def is_one(model: nn.Module) -> bool:
    """Return whether both have the same values in the same memory, one transposed."""
    embedding, head = pair(model)
    same = torch.equal(head.A, embedding.B.mT) and torch.equal(head.B, embedding.A.mT)
    return same and (address(head.A), address(head.B)) == (address(embedding.B), address(embedding.A))


METHODS = [("pissa", {}), ("olora", {}), ("lora", {}), ("self", {}), ("eva", {}), ("self", {"adaptive_ranks": True})]
LIVES = [
    *((kind, "offset", *m) for kind in MODELS for m in METHODS),
    *((kind, base, *METHODS[i]) for kind in ("gemma", "t5") for base in ("paired", "keep") for i in (0, 3)),
]


# --- tied by PEFT -------------------------------------------------------------------------------------------


@TIED_FACTORS
@pytest.mark.parametrize(
    ("kind", "base", "method", "options"), LIVES, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_a_tied_head_lives_through_training_and_reloading(
    kind: str, base: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tied(kind)
    assert is_one(model)
    start = logits(model)
    reads = method not in ("pissa", "olora", "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5 has two embeddings more, with factors of their own: nothing to read there
        missing = "warn" if kind == "t5" and reads else "raise"
        report = initialize(
            model, batches(), InitConfig.from_dict({"method": method, "base": base, **options}), on_missing=missing
        )
    embedding, head = pair(model)
    assert is_one(model) and embedding.rank == head.rank == embedding.A.shape[0]
    assert set(report.shared) == {embedding.name if reads else head.name}
    if base != "keep":
        torch.testing.assert_close(logits(model), start, rtol=1e-4, atol=1e-4)
    trained(model)
    assert is_one(model)
    moved = logits(model)
    assert (moved - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    for folder in ("peft", "ours"):
        reloaded = PeftModel.from_pretrained(base_of(kind), tmp_path / folder).eval()
        torch.testing.assert_close(logits(reloaded), moved, rtol=1e-4, atol=1e-4)
        assert is_one(reloaded)


@TIED_FACTORS
def test_factors_that_come_apart_are_another_model_after_a_reload(tmp_path: Path) -> None:
    """The control of the test above: the same, with factors of its own for the head."""
    model = tied("gemma")
    initialize(model, batches(), InitConfig(method="pissa"))
    head = pair(model)[1]
    for half in (head.layer.lora_A, head.layer.lora_B):
        half["default"].weight = nn.Parameter(half["default"].weight.detach().clone())
    trained(model)
    model.save_pretrained(tmp_path / "a")
    reloaded = PeftModel.from_pretrained(base_of("gemma"), tmp_path / "a").eval()
    assert (logits(reloaded) - logits(model)).abs().max() > 0.05


@TIED_FACTORS
def test_save_adapter_says_so_where_the_two_have_come_apart(tmp_path: Path) -> None:
    """A move to another dtype parts what PEFT tied. Its own file would read one of the two back for both."""
    model = tied("gemma")
    initialize(model, batches(), InitConfig(method="pissa"))
    trained(model.double().float())
    assert not is_one(model)
    for fold in (True, False):
        save_adapter(model, tmp_path / "a", fold_alpha=fold)
        reloaded = PeftModel.from_pretrained(base_of("gemma"), tmp_path / "a").eval()
        torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "b")
    reloaded = PeftModel.from_pretrained(base_of("gemma"), tmp_path / "b").eval()
    assert (logits(reloaded) - logits(model)).abs().max() > 0.05  # the control


RELOAD = """
from peft import PeftModel
from tests.model.test_shared_factors import base_of, is_one, logits
model = PeftModel.from_pretrained(base_of(sys.argv[1]), sys.argv[2]).eval()
print(float(logits(model).double().square().sum()), is_one(model))
"""


@TIED_FACTORS
@pytest.mark.slow
def test_a_fresh_process_reads_the_same(run_fresh: RunFresh, tmp_path: Path) -> None:
    model = tied("llama")
    initialize(model, batches(), InitConfig(method="self", adaptive_ranks=True))
    trained(model)
    save_adapter(model, tmp_path / "a")
    norm, one = run_fresh(RELOAD, "llama", tmp_path / "a").split()
    wanted = float(logits(model).double().square().sum())
    assert one == "True" and float(norm) == pytest.approx(wanted, rel=1e-3)
    plain = float(logits(base_of("llama")).double().square().sum())
    assert plain != pytest.approx(wanted, rel=1e-2)  # the control


@TIED_FACTORS
@pytest.mark.parametrize("base", ["offset", "keep"])
@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_dora_and_rslora(kind: str, base: str, tmp_path: Path) -> None:
    for options in ({"use_dora": True}, {"use_rslora": True}):
        model = tied(kind, **options)
        start = logits(model)
        initialize(model, batches(), InitConfig(method="pissa", base=base))
        if base == "offset":
            torch.testing.assert_close(logits(model), start, rtol=1e-4, atol=1e-4)
        trained(model)
        assert is_one(model)
        save_adapter(model, tmp_path / "a")
        reloaded = PeftModel.from_pretrained(base_of(kind), tmp_path / "a").eval()
        torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-3, atol=1e-3)


@TIED_FACTORS
def test_a_pair_that_wins_no_rank_loses_both_adapters() -> None:
    model = tied("gemma")
    config = InitConfig(method="pissa", adaptive_ranks=True, rank_budget=1)
    report = initialize(model, config=config)
    ranks = {name: site["rank"] for name, site in report.sites.items()}
    assert ranks["model.embed_tokens"] == ranks["lm_head"]
    assert sum(rank for name, rank in ranks.items() if name not in report.shared) == 1  # counted once
    left = {name for name, rank in ranks.items() if rank}
    assert {site.name for site in find_sites(model)[0]} == left
    assert "total rank 1" in str(report)


@TIED_FACTORS
def test_a_cast_that_parted_the_two_is_undone() -> None:
    """PEFT casts the adapters of a bfloat16 base to float32, one parameter at a time."""
    model = tied("gemma", torch.bfloat16)
    assert not is_one(model)
    for base in ("offset", "paired"):
        model = tied("gemma", torch.bfloat16)
        initialize(model, batches(), InitConfig(method="pissa", base=base))
        assert is_one(model)
        trained(model)
        assert is_one(model)
    early = tied("gemma", torch.bfloat16)  # which replaces parameters, also at the rank they have
    optimizer = torch.optim.SGD([p for p in early.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="site lm_head: an optimizer"):
        initialize(early, batches(), InitConfig(method="pissa", base="paired"))
    assert optimizer is not None


@TIED_FACTORS
def test_the_report_says_where_the_factors_were_made() -> None:
    report = initialize(tied("gemma"), batches(), config=InitConfig(method="self"))
    assert report.shared == {"model.embed_tokens": "lm_head"}
    assert "model.embed_tokens: shares the factors of lm_head, made there" in str(report)
    assert report.to_dict()["shared"] == dict(report.shared)
    assert "shares" not in str(initialize(tied("gemma", tie=False), config=InitConfig(method="pissa")))  # the control


@TIED_FACTORS
def test_the_factors_are_those_of_the_head_alone() -> None:
    """The same as a head without a tie gets, of the same inputs."""
    one, other = tied("gemma"), tied("gemma", tie=False, target_modules=["q_proj", "lm_head"])
    for model in (one, other):
        initialize(model, batches(), InitConfig(method="self", base="keep"))
    heads = [next(s for s in find_sites(m)[0] if s.name == "lm_head") for m in (one, other)]
    torch.testing.assert_close(heads[0].B @ heads[0].A, heads[1].B @ heads[1].A, rtol=1e-4, atol=1e-6)
    pissa = tied("gemma")
    initialize(pissa, config=InitConfig(method="pissa", base="keep"))
    head = pair(pissa)[1]
    assert not torch.allclose(head.B @ head.A, heads[1].B @ heads[1].A, rtol=1e-2, atol=1e-4)  # the control


@TIED_FACTORS
def test_a_plan_of_a_pair_goes_through_a_file(tmp_path: Path) -> None:
    plan = compute_plan(tied("gemma"), batches(), config=InitConfig(method="self"))
    plan.save(tmp_path / "plan")
    one, two = tied("gemma"), tied("gemma")
    apply_plan(one, type(plan).load(tmp_path / "plan"))
    initialize(two, batches(), config=InitConfig(method="self"))
    assert is_one(one)
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())


@TIED_FACTORS
def test_a_plan_with_two_sets_does_not_fit_one() -> None:
    plan = compute_plan(tied("gemma", tie=False), config=InitConfig(method="olora"))
    model = tied("gemma")
    before = state(model)
    with pytest.raises(ValueError, match="share one set of factors in this model, and the plan has others for each"):
        apply_plan(model, plan)
    assert all(torch.equal(t, before[n]) for n, t in state(model).items())
    apply_plan(tied("gemma", tie=False), plan)  # the control


@TIED_FACTORS
@pytest.mark.parametrize("method", ["lora_ga", "descent"])
def test_methods_of_gradients_refuse_what_is_shared(method: str) -> None:
    with pytest.raises(ValueError, match=r"lm_head share one set of factors, whose gradient is that of all of them"):
        initialize(tied("gemma"), batches(), InitConfig(method=method))
    with pytest.warns(UserWarning, match="share one set of factors"):
        model = tied("gemma")
        report = initialize(model, batches(), InitConfig(method=method), on_missing="warn")
    assert set(report.skipped) == {"model.embed_tokens", "lm_head"} and is_one(model)


@TIED_FACTORS
def test_the_weight_of_both_is_not_subtracted_from() -> None:
    with pytest.raises(ValueError, match="its weight is shared with another module .*use base='offset'"):
        initialize(tied("gemma"), config=InitConfig(method="pissa", base="subtract"))


@TIED_FACTORS
def test_the_two_need_one_rank_and_one_scaling() -> None:
    for options in ({"alpha_pattern": {"lm_head": 16}}, {"rank_pattern": {"lm_head": 2}}):
        with pytest.raises(ValueError, match="lm_head share their factors, and rank 4 with scaling 2"):
            initialize(tied("gemma", **options), config=InitConfig(method="pissa"))


@TIED_FACTORS
def test_comparing_knows_the_half_that_trains() -> None:
    """With base "offset" the head has [A'; −A'] and [B', B']: halves that cancel, too."""
    model = tied("gemma")
    initialize(model, batches(), config=InitConfig(method="self"))
    embedding, head = pair(model)
    assert halves_cancel(embedding.B.detach(), embedding.A.detach()) and halves_cancel(head.B.detach(), head.A.detach())
    assert not halves_cancel(-head.B.detach() * torch.tensor([1.0] * 4 + [2.0] * 4), head.A.detach())
    before = snapshot(model)
    trained(model)
    found = compare_adapters(before, model).sites
    assert found["lm_head"].cosine == pytest.approx(found["model.embed_tokens"].cosine, rel=1e-9)
    assert found["lm_head"].cosine_product is not None  # that of the half: the whole starts at zero


# --- two layers of any kind ---------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of one shape, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


def sharing(slots: tuple[str, ...] = ("lora_A", "lora_B"), whole: bool = False, **options: Any) -> Any:
    """The adapter of `second` is made of the parameters, or the modules, of that of `first`."""
    targets = ["first", "second", "last"]
    model = get_peft_model(two(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options}))
    first, second = (model.base_model.model.get_submodule(name) for name in ("first", "second"))
    for slot in slots:
        if whole:
            getattr(second, slot)["default"] = getattr(first, slot)["default"]
        else:
            getattr(second, slot)["default"].weight = getattr(first, slot)["default"].weight
    return model


def rows() -> list[Tensor]:
    return list(torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("whole", [False, True], ids=["parameters", "modules"])
@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("method", ["pissa", "olora", "lora", "self", "corda"])
def test_two_layers_keep_one_set(method: str, base: str, whole: bool, tmp_path: Path) -> None:
    model, x = sharing(whole=whole), rows()[0]
    with torch.no_grad():
        start = model(x)
    report = initialize(model, rows(), InitConfig(method=method, base=base))
    sites = {site.name: site for site in find_sites(model)[0]}
    assert sites["first"].A is sites["second"].A and sites["first"].B is sites["second"].B
    assert report.shared == {"second": "first"} and sites["second"].rank == sites["second"].A.shape[0]
    with torch.no_grad():
        if base != "keep" or method == "lora":
            torch.testing.assert_close(model(x), start, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for row in rows():
        model(row).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, tmp_path / "a")
    reloaded = PeftModel.from_pretrained(two(), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(x), model(x), rtol=1e-4, atol=1e-4)
        assert (model(x) - start).abs().max() > 1e-3


def test_two_layers_with_factors_of_their_own_stay_two() -> None:
    """The control."""
    model = sharing(slots=())
    report = initialize(model, rows(), InitConfig(method="pissa"))
    sites = {site.name: site for site in find_sites(model)[0]}
    assert not report.shared and not torch.equal(sites["first"].A, sites["second"].A)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_shared_rank_is_dealt_once(adaptive: bool) -> None:
    model = sharing()
    report = initialize(model, rows(), InitConfig(method="self", adaptive_ranks=adaptive, base="keep"))
    ranks = {name: site["rank"] for name, site in report.sites.items()}
    assert ranks["first"] == ranks["second"] and ranks["first"] + ranks["last"] == 8
    assert (ranks["first"] == ranks["last"]) != adaptive


@pytest.mark.parametrize("slot", ["lora_A", "lora_B"])
def test_one_factor_shared_is_refused_by_name(slot: str) -> None:
    with pytest.raises(ValueError, match="first and second share one of their two factors.*give each layer its own"):
        initialize(sharing((slot,)), rows(), config=InitConfig(method="self"))
    with pytest.warns(UserWarning, match="left as plain LoRA"):
        report = initialize(sharing((slot,)), rows(), on_missing="warn", config=InitConfig(method="self"))
    assert set(report.skipped) == {"first", "second"} and set(report.sites) == {"last"}


def test_gradients_of_two_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="first and second share one set of factors, whose gradient"):
        initialize(sharing(), rows(), InitConfig(method="lora_ga"), loss=lambda m, x: m(x).square().mean())


def test_a_set_shared_with_what_cannot_be_initialised_is_refused() -> None:
    """A layer of all zeros leads: nobody follows it."""
    model = sharing()
    with torch.no_grad():
        model.base_model.model.first.get_base_layer().weight.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = initialize(model, rows(), on_missing="warn", config=InitConfig(method="self"))
    assert "all zeros" in report.skipped["second"] and "shares its factors with first" in report.skipped["second"]
    assert len(caught) == 1 and set(report.sites) == {"last"}


def test_a_layer_that_no_data_reaches_takes_its_followers_along() -> None:
    def skipping(model: Any, x: Tensor) -> Any:
        inner = model.base_model.model
        return inner.last(inner.second(x))

    with pytest.warns(UserWarning, match="site first cannot be initialised"):
        report = initialize(sharing(), rows(), forward=skipping, on_missing="warn", config=InitConfig(method="self"))
    assert "was not called" in report.skipped["second"] and set(report.sites) == {"last"}


@pytest.mark.parametrize("base", ["offset", "paired"])
def test_nothing_is_searched_for_holders(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both places of a parameter are counted."""
    from cntlora.model import holders

    monkeypatch.setattr(holders, "_holders", lambda: pytest.fail("looked at all objects"))
    initialize(sharing(), config=InitConfig(method="pissa", base=base))

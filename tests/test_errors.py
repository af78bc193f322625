"""Bad input is one clear error: what was expected, what came, where, and what to change; and nothing is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import KINDS, Batch, adapted, base_model, changed, logits, lora_config, state, text_batches, train
from tests.versions import before
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from cntlora import InitConfig, apply_plan, compute_plan, initialize
from cntlora.model.sites import find_sites

SELF = InitConfig(method="self")

QUERY = "bert.encoder.layer.0.attention.self.query"


def assert_one_error(
    model: nn.Module, call: Callable[[], object], *parts: str, kind: type[Exception] = ValueError
) -> None:
    """The call raises `kind`, in one line that has all `parts`, and the model is as before."""
    before, config = state(model), repr(getattr(model, "peft_config", None))
    layers = [id(module) for module in model.modules()]
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert type(error.value) is kind
    assert all(part in message for part in parts), message
    assert "\n" not in message and 20 < len(message) < 500, message
    assert not changed(before, model) and repr(getattr(model, "peft_config", None)) == config
    assert layers == [id(module) for module in model.modules()]


def refuses(model: nn.Module, batches: Any, *parts: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    call = {"config": SELF, **options}
    assert_one_error(model, lambda: initialize(model, batches, **call), *parts, kind=kind)


def test_the_same_call_without_the_mistake_works() -> None:
    """The control of this whole file."""
    model = adapted()
    before = state(model)
    initialize(model, text_batches(), config=SELF)
    assert changed(before, model)


# --- the data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], (), iter([]), DataLoader([])], ids=["list", "tuple", "iterator", "loader"])  # type: ignore[arg-type]
def test_empty_loader(empty: Any) -> None:
    refuses(adapted(), empty, "expected at least one batch, got none", "empty, or already used up")


@pytest.mark.parametrize(
    ("batches", "name"),
    [(text_batches()[0], "dict"), (text_batches()[0]["input_ids"], "Tensor"), ("data.csv", "str"), (3, "int")],
)
def test_no_iterable_of_batches(batches: Any, name: str) -> None:
    advice = "[batch]" if name != "int" else "a DataLoader, a list, a generator"
    refuses(adapted(), batches, "expected an iterable of batches", f"got {'one ' * (name != 'int')}{name}", advice,
            kind=TypeError)  # fmt: skip


def test_tuples_that_the_model_cannot_take() -> None:
    batch = text_batches()[0]
    loader = DataLoader(TensorDataset(*([batch["input_ids"]] * 40)), 4)
    refuses(adapted(), loader, "forward=", kind=TypeError)
    forwarded = initialize(adapted(), loader, forward=lambda m, b: m(input_ids=b[0]), config=SELF)
    assert forwarded.batches == 2


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("parts", [("input_ids", "labels"), ("input_ids", "attention_mask", "labels")])
def test_tuples_that_are_taken_for_other_arguments(kind: str, parts: tuple[str, ...]) -> None:
    """By position, labels become a mask or token types, which fails deep inside the model."""
    if (kind, len(parts)) == ("bert", 2) and before("transformers", "5"):
        pytest.skip("BERT in transformers 4 has a message of its own for labels in the place of the mask")
    batches = [tuple(batch[part] for part in parts) for batch in text_batches()]
    refuses(adapted(kind), batches, "batch that is tuple", "forward=", kind=TypeError)


def test_mapping_that_the_model_cannot_take() -> None:
    batches = [{**batch, "text": batch["input_ids"]} for batch in text_batches()]
    narrow = adapted()
    narrow.forward = lambda input_ids, attention_mask, labels: None
    refuses(narrow, batches, "forward=", "text", kind=TypeError)


class Layers(nn.Module):
    """A model whose own bug is a TypeError: `kind` says which."""

    def __init__(self, kind: str, count: int = 60) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(6, 6 + i) for i in range(count))  # each is printed

    def forward(self, x: Tensor, **rest: Any) -> Any:
        y = self.layers[0](x)
        if self.kind == "prints itself":
            raise TypeError(f"cannot use {self!r} here: the cause")
        if self.kind == "calls a layer wrongly":
            return self.layers[1](y, y)
        if self.kind == "passes on what it does not know":
            return self.inner(y, **rest)
        return y + None if self.kind == "adds None" else y

    def inner(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        return y


def layered(kind: str) -> Any:
    return get_peft_model(Layers(kind), LoraConfig(r=2, target_modules=["layers.0"]))


@pytest.mark.parametrize("batch", [{"x": torch.randn(4, 6)}, torch.randn(4, 6)], ids=["mapping", "tensor"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("prints itself", "the cause"),
        ("calls a layer wrongly", "takes 2 positional arguments"),
        ("adds None", "unsupported"),
    ],
)
def test_a_type_error_inside_the_model_is_its_own(kind: str, said: str, batch: Any) -> None:
    """The batch fits the model, so that no other call of it is the cure."""
    with pytest.raises(TypeError, match=said) as error:
        initialize(layered(kind), [batch], config=SELF)
    assert "forward=" not in str(error.value)
    assert "Layers" in str(error.value) or kind != "prints itself"
    initialize(layered("fine"), [batch], config=SELF)  # the control


def test_a_batch_that_does_not_fit_is_told_from_that() -> None:
    """Also where the model hands on what it is given, and the complaint comes from further inside."""
    x = torch.randn(4, 6)
    model = layered("fine")
    refuses(model, [{"y": x}], "missing 1 required positional argument: 'x'", "mapping with keys ['y']", "forward=",
            kind=TypeError)  # fmt: skip
    refuses(model, [{"text": x, "x": x, 3: x}], "must be strings", "model(batch['x'])", kind=TypeError)
    passing = layered("passes on what it does not know")
    refuses(passing, [{"x": x, "text": x}], "unexpected keyword argument 'text'", "model(batch['x'])", kind=TypeError)
    initialize(passing, [{"x": x, "mask": x}], config=SELF)  # the control


def test_a_long_cause_is_cut_in_the_middle() -> None:
    """By position a batch may be taken for other arguments, so that the model's own words are quoted: not all."""
    x = torch.randn(4, 6)
    model = layered("prints itself")
    model.base_model.model.forward = lambda *args: Layers.forward(model.base_model.model, args[0])
    refuses(model, [(x, x)], "could not be called: cannot use Layers(", "here: the cause.", "batch that is tuple",
            "model(batch[0])", kind=TypeError)  # fmt: skip
    many = {f"a column with a long name, number {i}": x for i in range(100)}
    refuses(layered("fine"), [many], "missing 1 required", "forward=", kind=TypeError)
    assert len(repr(model)) > 3000 and len(str(sorted(many))) > 3000  # the control


@pytest.mark.parametrize(
    "value", [adapted(), torch.randn(500, 500), ["x" * 5000], "y" * 5000], ids=lambda v: type(v).__name__
)
def test_what_was_given_is_quoted_in_short(value: Any) -> None:
    """A model or a tensor in the place of an option is not printed."""
    from cntlora.data.memory import parse_limits

    calls: list[Callable[[], object]] = [
        lambda: InitConfig(method=value),
        lambda: InitConfig.from_dict({"method": "self", "p": value}),
        lambda: InitConfig(method="self", num_batches=value),
        lambda: InitConfig.from_dict({"center": value, "method": "eva"}),
        lambda: InitConfig.from_dict({"method": "self", "batch_weights": value}),
        lambda: initialize(adapted(), text_batches(), on_missing=value, config=SELF),
        lambda: parse_limits({"device": value}),
        lambda: compute_plan(adapted(), text_batches(), token_mask="y" * 5000, config=SELF),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert 20 < len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_every_token_masked() -> None:
    batches = text_batches()
    batches[1]["attention_mask"].zero_()
    refuses(adapted(), batches, "batch 1", "hides every token", "token_mask=")
    refuses(adapted(), text_batches(), "batch 0", "hides every token",
            token_mask=lambda b: torch.zeros_like(b["attention_mask"]))  # fmt: skip


def poisoned(value: float, at: str) -> Any:
    """A model that lets a value through that is not finite, at the input of one layer, from the second batch on."""
    model = adapted()
    calls: list[int] = []

    def poison(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(0)
        if len(calls) < 2:
            return args
        x = args[0].clone()
        x[0, 0, 0] = value
        return (x, *args[1:])

    model.get_submodule(f"base_model.model.{at}").register_forward_pre_hook(poison)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [QUERY, QUERY.replace("layer.0", "layer.1").replace("query", "value")])
def test_activations_that_are_not_finite(value: float, at: str) -> None:
    refuses(poisoned(value, at), text_batches(), f"site {at}, batch 1", "NaN or Inf")


def test_not_finite_where_it_does_not_count_is_fine() -> None:
    """NaN in the padding is not seen."""
    model, batches = adapted(), text_batches(2)

    def poison(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = batches[0]["attention_mask"] if len(calls) == 0 else batches[1]["attention_mask"]
        calls.append(0)
        return (args[0].masked_fill(mask[..., None] == 0, float("nan")), *args[1:])

    calls: list[int] = []
    model.get_submodule(f"base_model.model.{QUERY}").register_forward_pre_hook(poison)
    report = initialize(
        model,
        batches,
        forward=lambda m, b: m.bert(**{k: v for k, v in b.items() if k != "labels"}),
        config=SELF,
    )
    assert report.batches == 2 and all(site.A.isfinite().all() for site in find_sites(model)[0])


def test_fewer_tokens_than_rank_works() -> None:
    few = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([0])}]
    for base in ("offset", "paired", "subtract", "keep"):
        report = initialize(adapted(r=8), few, InitConfig(method="self", base=base))
        assert [site["effective_rank"] for site in report.sites.values()] == [3] * 4
        assert all(site["tokens"] == 3 and site["rank"] == 8 for site in report.sites.values())
    assert initialize(adapted(r=8), text_batches(), config=SELF).sites[QUERY]["effective_rank"] > 8


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        return self.idle(self.used(x)) if both else self.used(x)


def branches() -> Any:
    torch.manual_seed(0)
    return get_peft_model(Branches(), LoraConfig(r=2, target_modules=["used", "idle"]))


@pytest.mark.parametrize("options", [{}, {"adaptive_ranks": True}])
def test_a_site_that_never_fires(options: dict[str, Any]) -> None:
    rows, config = [torch.randn(9, 6)], InitConfig.from_dict({"method": "self", **options})
    refuses(branches(), rows, "site idle", "not called in any of 1 batch", "on_missing='warn'", config=config)
    model = branches()
    with pytest.warns(UserWarning, match="site idle cannot be initialised.*left as plain LoRA") as caught:
        report = initialize(model, rows, config, on_missing="warn")
    assert len(caught) == 1 and __file__ == caught[0].filename
    assert list(report.skipped) == ["idle"] and list(report.sites) == ["used"] and "idle" in str(report)
    plain = {site.name: site for site in find_sites(model)[0]}["idle"]
    assert plain.rank == 2 and plain.A.any() and not plain.B.any()  # as PEFT made it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize(branches(), rows, config, forward=lambda m, x: m(x, both=True))


# --- the adapter --------------------------------------------------------------------------------------------


def test_no_adapter() -> None:
    refuses(base_model(), text_batches(), "BertForSequenceClassification", "no LoRA layer", "get_peft_model")


def test_wrong_adapter_name() -> None:
    model = adapted(adapter_name="style")
    model.add_adapter("tone", lora_config())
    refuses(model, text_batches(), "'default' is not known", "style, tone")
    refuses(model, text_batches(), "did you mean 'style'", adapter_name="styl")
    plan = compute_plan(adapted(), text_batches(), config=SELF)
    assert_one_error(model, lambda: apply_plan(model, plan, adapter_name="x"), "adapter_name", "style, tone")


def test_wrong_option() -> None:
    refuses(adapted(), text_batches(), "on_missing", "raise, warn", "'ignore'", on_missing="ignore")
    refuses(adapted(), text_batches(), "token_mask", "'labels'", "'label'", token_mask="label")


def test_other_initialisations() -> None:
    for name in ("pissa", "eva", "olora", "pissa_niter_2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = adapted(init_lora_weights=name)
        refuses(model, text_batches(), f"init_lora_weights={name!r}", "init_lora_weights=True")
    initialize(adapted(init_lora_weights="gaussian"), text_batches(), config=SELF)


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
def test_initialised_already(base: str) -> None:
    model = adapted()
    initialize(model, text_batches(), InitConfig(method="self", base=base))
    refuses(model, text_batches(), f"site {QUERY}", "not fresh", "make a new adapter")


def test_trained_already() -> None:
    model = adapted()
    plan = compute_plan(model, text_batches(), config=SELF)
    train(model, text_batches(), steps=1)
    refuses(model, text_batches(), f"site {QUERY}", "not fresh")
    assert_one_error(model, lambda: apply_plan(model, plan), f"site {QUERY}", "not fresh")


def test_random_start() -> None:
    refuses(adapted(init_lora_weights=False), text_batches(), f"site {QUERY}", "not fresh")


def test_merged() -> None:
    model = adapted()
    model.merge_adapter()
    refuses(model, text_batches(), f"site {QUERY}", "merged", "unmerge_adapter()")
    model.unmerge_adapter()
    initialize(model, text_batches(), config=SELF)


def test_weights_without_values() -> None:
    with torch.device("meta"):
        base = KINDS["bert"].make()
    model = get_peft_model(base, lora_config())
    with pytest.raises(ValueError, match=f"site {QUERY} cannot be initialised.*meta device.*load the pretrained"):
        initialize(model, text_batches(), config=SELF)
    lazy = get_peft_model(base_model(), lora_config(), low_cpu_mem_usage=True)
    with pytest.raises(
        ValueError, match=f"site {QUERY} .*LoRA factors are on the meta device.*low_cpu_mem_usage=False"
    ):
        initialize(lazy, text_batches(), config=SELF)


class Nothing(nn.Module):
    """All of its adapted layers are beyond reach: one of zeros, one that is never called."""

    def __init__(self, zeros: bool) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)
        if zeros:
            nn.init.zeros_(self.idle.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.used(x).square().mean()}


@pytest.mark.parametrize("zeros", [True, False], ids=["before the data", "after it"])
@pytest.mark.parametrize("method", ["self", "lora_ga"])
def test_a_call_that_would_initialise_nothing_is_an_error(method: str, zeros: bool) -> None:
    """It must not look like one that worked: "0 sites"."""
    torch.manual_seed(0)
    model = get_peft_model(Nothing(zeros), LoraConfig(r=2, target_modules=["idle"]))
    config, rows = InitConfig(method=method), [torch.randn(9, 6)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refuses(model, rows, "none of the 1 adapted layers", "idle", config=config, on_missing="warn")
    assert method == "lora_ga" or any("left as plain LoRA" in str(w.message) for w in caught)
    both = get_peft_model(Nothing(zeros), LoraConfig(r=2, target_modules=["idle", "used"]))
    with pytest.warns(UserWarning, match="site idle"):
        assert list(initialize(both, rows, config, on_missing="warn").sites) == ["used"]  # the control


# --- ranks --------------------------------------------------------------------------------------------------


def test_budget_of_nothing() -> None:
    with pytest.raises(ValueError, match="rank_budget: expected at least 1, got 0"):
        InitConfig(method="self", adaptive_ranks=True, rank_budget=0)


def test_budget_that_does_not_fit() -> None:
    most = 4 * 24
    refuses(adapted(), text_batches(), "rank_budget: expected between 1", f"and {most}", f"got {most + 1}",
            config=InitConfig(method="self", adaptive_ranks=True, rank_budget=most + 1))  # fmt: skip
    refuses(adapted(), text_batches(), "between 1", "and 12", "got 13", "max_rank",
            config=InitConfig(method="self", adaptive_ranks=True, rank_budget=13, max_rank=3))  # fmt: skip
    refuses(adapted(), text_batches(), "between 20", "got 16", "min_rank",
            config=InitConfig(method="self", adaptive_ranks=True, min_rank=5))  # fmt: skip
    report = initialize(
        adapted(), text_batches(), InitConfig(method="self", adaptive_ranks=True, rank_budget=most, base="keep")
    )
    assert {site["rank"] for site in report.sites.values()} == {24}


def test_rank_above_the_layer() -> None:
    refuses(adapted(r=25), text_batches(), f"site {QUERY}", "rank 25", "24")


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "float16 adapter"])
def test_estimates_that_the_dtype_cannot_hold(base: str, autocast: bool) -> None:
    """A near-singular estimate overflows float16: an error, not an adapter or a weight of Inf."""
    model = adapted(dtype=torch.float16, autocast_adapter_dtype=autocast)
    config = InitConfig.from_dict({"method": "self", "base": base, "strength": 1e14})
    if base == "subtract" or not autocast:
        what = "base" if autocast else "adapter"
        refuses(model, text_batches(), f"site {QUERY}", f"too large for a{'n' * (not autocast)} {what}", "float16",
                config=config)  # fmt: skip
    else:
        initialize(model, text_batches(), config)
    float32 = adapted()
    initialize(float32, text_batches(), config)  # the control: a dtype with a wider range holds them
    assert all(tensor.isfinite().all() for tensor in float32.state_dict().values())


# --- who else holds the parameters --------------------------------------------------------------------------


def test_an_optimizer_that_holds_the_old_parameters() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refuses(model, text_batches(), f"site {QUERY}", "AdamW", "initialise first, then make the optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(site.A) in held for site in find_sites(model)[0])
    del optimizer, held
    initialize(model, text_batches(), config=SELF)


def test_an_optimizer_with_its_moments_is_in_the_way_also_at_the_same_rank() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**text_batches()[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    refuses(model, text_batches(), f"site {QUERY}", "AdamW", config=InitConfig(method="self", base="paired"))


@pytest.mark.parametrize("base", ["paired", "subtract", "keep"])
def test_an_optimizer_made_too_early_trains_where_the_parameters_stay(base: str) -> None:
    """Parameters are written in place where their shape allows, so that a fresh optimizer still holds them."""
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    initialize(model, text_batches(), InitConfig(method="self", base=base))
    before = state(model)
    model(**text_batches()[0]).loss.backward()
    optimizer.step()
    assert len(changed(before, model)) == 8


def test_optimizers_of_others_are_not_in_the_way() -> None:
    model, other = adapted(), nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW(other.parameters()), torch.optim.SGD([model.base_model.model.classifier.weight])]
    initialize(model, text_batches(), config=SELF)
    assert len(optimizers) == 2


def test_wrapped_in_ddp_before_parameters_are_replaced(process_group: None) -> None:
    """DDP would not average the gradients of the new parameters, and the processes would drift apart in silence."""
    model = adapted()
    wrapped = DistributedDataParallel(model)
    for given in (wrapped, model):
        assert_one_error(
            model, lambda given=given: initialize(given, text_batches(), config=SELF),
            f"site {QUERY}", "DistributedDataParallel",
            "initialise first, then wrap",
        )  # fmt: skip
    del wrapped, given
    initialize(model, text_batches(), config=SELF)
    assert changed(state(adapted()), model)


# --- base "subtract" ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(ids)))


def tied() -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied targets, too
        return get_peft_model(Tied(), LoraConfig(r=2, target_modules=["inner", "head"]))


def test_tied_weights_cannot_be_subtracted_from() -> None:
    ids = [torch.arange(12)]
    refuses(tied(), ids, "site head", "embedding", "base='offset'", config=InitConfig(method="self", base="subtract"))
    for base in ("offset", "paired", "keep"):
        model = tied()
        before = model.base_model.model.embedding.weight.clone()
        initialize(model, ids, InitConfig(method="self", base=base))
        assert torch.equal(model.base_model.model.embedding.weight, before)


def test_another_adapter_stands_on_the_weight_that_is_subtracted_from() -> None:
    """peft#2184: it would silently become another function."""
    model = adapted(adapter_name="first")
    model.add_adapter("second", lora_config())
    start = logits(model, text_batches()[0])
    refuses(model, text_batches(), f"site {QUERY}", "'first'", "base='offset'",
            config=InitConfig(method="self", base="subtract"), adapter_name="second")  # fmt: skip
    initialize(model, text_batches(), adapter_name="second", config=SELF)
    assert torch.equal(logits(model, text_batches()[0]), start)


def test_errors_of_the_model_itself_are_its_own() -> None:
    def broken(model: nn.Module, batch: Batch) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        initialize(adapted(), text_batches(), forward=broken, config=SELF)

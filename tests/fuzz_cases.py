"""Random uses of the library as plain values: a model, an adapter, data and options; `fuzz_judge` judges them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.fuzz_models import Node, Whole, build, sizes, trees
from torch import Tensor, nn

from cntlora import InitConfig, InitPlan, InitReport, apply_plan, compute_plan, initialize
from cntlora.methods.method import METHODS, all_options, option_names

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Batches:
    """`count` batches of rows × tokens; `shape` 1 has no axis of tokens. `spoiled` tells where a NaN or Inf is."""

    count: int
    rows: int
    tokens: int
    kind: str
    mask: str
    labels: str
    spoiled: str
    loud: float


@dataclass(frozen=True)
class Case:
    """One use: plain values, so that a failing one can be pasted into a test."""

    tree: Node
    width: int
    dtype: str
    targets: int
    lora: dict[str, Any]
    batches: Batches
    config: dict[str, Any]
    call: dict[str, Any]
    training: bool
    by_plan: bool
    reload: bool
    seed: int


def _batches() -> st.SearchStrategy[Batches]:
    return st.builds(
        Batches,
        count=st.sampled_from([*[1, 2, 3] * 8, 0]),
        rows=st.sampled_from([*[1, 2, 4, 7] * 6, 0]),
        tokens=st.sampled_from([*[1, 3, 8, 17] * 6, 0]),
        kind=st.sampled_from(["mapping", "mapping", "mapping", "tensor", "tuple", "flat"]),
        mask=st.sampled_from([*["none", "right", "left", "ones", "ragged", "one row"] * 4, "padding"]),
        labels=st.sampled_from(["tokens", "rows", "none", "ignored"]),
        spoiled=st.sampled_from([*["no"] * 20, "nan", "inf", "padding", "padding"]),
        loud=st.sampled_from([1.0, 1.0, 1.0, 1e-8, 1e4, 0.0]),
    )


def _lora() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"r": st.sampled_from([*[1, 2, 3, 4] * 5, 8, 17]), "lora_alpha": st.sampled_from([*[1, 4, 8, 16, 0.5] * 6, 0])},
        optional={
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "rank_pattern": st.dictionaries(st.sampled_from(["0", "b1", "inner", "1"]), st.integers(1, 9), max_size=2),
            "alpha_pattern": st.dictionaries(st.sampled_from(["0", "b0", "1"]), st.integers(1, 9), max_size=2),
            "init_lora_weights": st.sampled_from([*[True, "gaussian"] * 8, False]),
            "lora_dropout": st.sampled_from([0.0, 0.2]),
            "bias": st.sampled_from(["none", "lora_only", "all"]),
        },
    )


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "base": st.sampled_from(["offset", "paired", "subtract", "keep"]),
    "decomposition": st.sampled_from(["svd", "qr", "qr_pivoted"]),
    "p": st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    "strength": st.sampled_from([None, 0.1, 1.0, 3.0, 1e-12, 1e12]),
    "gram": st.sampled_from(["sum", "mean"]),
    "root": st.sampled_from(["paper", "symmetric", "cholesky"]),
    "rtol": st.sampled_from([None, 0.0, 1e-3, 0.5, 1.0]),
    "shift_constant": st.sampled_from([1.0, 0.1, -2.0, 0.0, "gaussian"]),
    "center": st.booleans(),
    "damping": st.sampled_from([0.01, 0.0, 1.0]),
    "num_batches": st.sampled_from([1, 2, 8]),
    "batch_weights": st.sampled_from([None, None, None, (1.0,), (1.0, 0.5), (0.5, 0.0, 2.0), (0.0,), (-1.0, 1.0)]),
    "initial_weight": st.sampled_from(["pretrained", "zero"]),
    "exact_svd": st.booleans(),
    "fold_alpha": st.booleans(),
    "seed": st.integers(0, 3),
}
RANKS = st.fixed_dictionaries(
    {"adaptive_ranks": st.just(True)},
    optional={
        "rank_budget": st.sampled_from([*[1, 2, 3, 5] * 4, 10**6]),
        "min_rank": st.sampled_from([0, 0, 1, 3]),
        "max_rank": st.sampled_from([3, 6, 40]),
    },
)
WRONG = st.sampled_from([
    {"method": "slef"}, {"base": "ofset"}, {"p": 1.5}, {"rank_budget": 4}, {"rtol": float("nan")}, {"center": "yes"},
    {"num_batches": 0}, {"batch_weights": ()}, {"damping": 0.5, "method": "self"}, {"seed": -1}, {"strength": 0.0},
    {"adaptive_ranks": True, "method": "lora"}, {"shift_constant": "normal", "method": "shift"}, {"methd": "self"},
])  # fmt: skip


@st.composite
def _config(draw: Any) -> dict[str, Any]:
    """Options that have an effect on their method; one time in twenty a wrong one."""
    if draw(st.integers(0, 19)) == 7:
        return dict(draw(WRONG))
    method = draw(st.sampled_from(tuple(METHODS)))
    reads = option_names(METHODS[method])
    usable = [name for name in OPTIONS if name not in all_options() or name in reads]
    chosen = draw(st.lists(st.sampled_from(usable), unique=True, max_size=5))
    config = {"method": method, **{name: draw(OPTIONS[name]) for name in chosen}}
    return {**config, **draw(RANKS)} if draw(st.booleans()) and METHODS[method].ranked else config


_call = st.fixed_dictionaries(
    {"on_missing": st.sampled_from(["warn", "raise"])},
    optional={
        "token_mask": st.sampled_from([None, "none", "labels", "attention", "own", "odd", "labls"]),
        "max_memory": st.sampled_from([None, "1MiB", "64KiB", 100, {"device": "64KiB", "cpu": "1MiB", "disk": "1MiB"}]),
        "loss": st.sampled_from(["own", "constant", "vector", "nan"]),
    },
)

cases = st.builds(
    Case,
    tree=trees,
    width=sizes,
    dtype=st.sampled_from([*DTYPES, "float32", "float32", "float32"]),
    targets=st.integers(1, 2**12 - 1),
    lora=_lora(),
    batches=_batches(),
    config=_config(),
    call=_call,
    training=st.booleans(),
    by_plan=st.booleans(),
    reload=st.sampled_from([True, False, False]),
    seed=st.integers(0, 5),
)


# --- from a case to the call --------------------------------------------------------------------------------


def base_of(case: Case) -> nn.Module:
    """The model without an adapter: the same weights for the same case."""
    torch.manual_seed(case.seed)
    body, _ = build(case.tree, case.width)
    return Whole(body, 1.0).to(DTYPES[case.dtype])


def adapted(case: Case) -> Any:
    """The PeftModel, or None where there is nothing to adapt or PEFT refuses the adapter."""
    model = base_of(case)
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    names = [name for i, name in enumerate(found) if case.targets >> (i % 12) & 1] or found[:1]
    if not names:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(target_modules=names, **case.lora), autocast_adapter_dtype=False)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError):
        return None


def batches_of(case: Case) -> list[Any]:
    """The data, of the dtype of the model."""
    b, g = case.batches, torch.Generator().manual_seed(case.seed)
    made = []
    for index in range(b.count):
        shape = (b.rows, case.width) if b.kind == "flat" else (b.rows, b.tokens, case.width)
        x = b.loud * torch.randn(shape, generator=g)
        mask = _mask(b, g)
        if x.numel() and index == b.count - 1 and b.spoiled in ("nan", "inf"):
            x.view(-1)[0] = float(b.spoiled)
        if b.spoiled == "padding" and mask is not None and b.kind == "mapping":
            x[mask == 0] = float("nan")
        made.append(_packed(b, x.to(DTYPES[case.dtype]), mask))
    return made


def _mask(b: Batches, g: torch.Generator) -> Tensor | None:
    lengths = torch.randint(0 if b.mask == "ragged" else 1, max(b.tokens, 1) + 1, (b.rows, 1), generator=g)
    right = (torch.arange(b.tokens) < lengths).long()
    one = torch.zeros_like(right)
    one[:1] = 1
    kinds = {"right": right, "ragged": right, "left": right.flip(1), "ones": torch.ones_like(right),
             "padding": torch.zeros_like(right), "one row": one}  # fmt: skip
    return kinds.get(b.mask)


def _packed(b: Batches, x: Tensor, mask: Tensor | None) -> Any:
    if b.kind == "tuple":
        return (x,) if mask is None else (x, mask)
    if b.kind in ("tensor", "flat"):
        return x
    labels = {"tokens": torch.zeros(b.rows, b.tokens).long(), "rows": torch.zeros(b.rows).long(),
              "ignored": torch.full((b.rows, b.tokens), -100)}  # fmt: skip
    batch = {"x": x, "attention_mask": mask, "labels": labels.get(b.labels)}
    return {key: value for key, value in batch.items() if value is not None}


def _own_loss(kind: str) -> Any:
    def loss(model: nn.Module, batch: Any) -> Any:
        output = (
            model(batch["x"]) if isinstance(batch, dict) else model(batch if isinstance(batch, Tensor) else batch[0])
        )
        wanted = {"own": output.float().square().mean(), "constant": torch.ones(()), "vector": output.flatten()}
        return wanted.get(kind, output.float().mean() * float("nan"))

    return loss


def arguments(case: Case) -> dict[str, Any]:
    """The keyword arguments of the call."""
    call = {**case.call, "progress": False}
    own = {"own": lambda batch: None, "odd": lambda batch: torch.ones(3)}
    call["token_mask"] = own.get(call.get("token_mask"), call.get("token_mask"))  # type: ignore[arg-type]
    if "loss" in call:
        call["loss"] = _own_loss(call["loss"])
    return call


def start(case: Case, model: Any) -> InitReport:
    """The call itself, in one step or by way of a plan that was written and read."""
    config = InitConfig.from_dict(case.config)
    if not case.by_plan:
        return initialize(model, batches_of(case), config, **arguments(case))
    plan = compute_plan(model, batches_of(case), config, **arguments(case))
    return apply_plan(model, InitPlan.from_bytes(plan.to_bytes()))

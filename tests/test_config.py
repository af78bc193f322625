"""`InitConfig`: every wrong name or value gives one clear error that lists the right ones."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest

import cntlora
from cntlora import Cross, Descent, Eva, InitConfig, Lora, Olora, Self, Shift
from cntlora.config import BASES
from cntlora.messages import unknown_name
from cntlora.methods.method import EARLIER_DEFAULTS, METHODS, choices

CHOICES: dict[str, tuple[str, ...]] = {"method": cntlora.methods(), "base": BASES, **choices(Self)}
"""The options that take one of a few names."""

WRONG: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # names of options and of choices: the error lists all that are right
    ({"methd": "self"}, TypeError, ["methd", "did you mean 'method'", "num_batches", "rank_budget"]),
    ({"lr": 1e-3}, TypeError, ["'lr'", "not known", "method", "strength"]),
    ({"method": "sel"}, ValueError, ["method", "'sel'", "did you mean 'self'", "cross", "shift"]),
    ({"method": ""}, ValueError, ["method", "''", "cross, self, shift"]),
    ({"base": "ofset"}, ValueError, ["base", "did you mean 'offset'", "offset, paired, subtract, keep"]),
    ({"decomposition": "SVD"}, ValueError, ["decomposition", "'SVD'", "svd, qr, qr_pivoted"]),
    ({"gram": "average"}, ValueError, ["gram", "'average'", "sum, mean"]),
    ({"root": "polar"}, ValueError, ["root", "'polar'", "paper, symmetric, cholesky"]),
    ({"initial_weight": "ones"}, ValueError, ["initial_weight", "'ones'", "pretrained, zero"]),
    # numbers: the error gives the range
    ({"p": 1.5}, ValueError, ["p:", "[0, 1]", "1.5"]),
    ({"p": -0.1}, ValueError, ["p:", "[0, 1]", "-0.1"]),
    ({"p": float("nan")}, ValueError, ["p:", "finite", "nan"]),
    ({"p": "half"}, TypeError, ["p:", "expected a number", "str", "'half'"]),
    ({"p": True}, TypeError, ["p:", "expected a number", "bool"]),
    ({"strength": 0}, ValueError, ["strength:", "(0, inf]", "got 0"]),
    ({"strength": -1.0}, ValueError, ["strength:", "-1.0"]),
    ({"strength": float("inf")}, ValueError, ["strength:", "finite", "inf"]),
    ({"rtol": -1e-3}, ValueError, ["rtol:", "[0, 1]", "max(d, b)"]),
    ({"rtol": "small"}, TypeError, ["rtol:", "expected a number"]),
    ({"shift_constant": "normal"}, ValueError, ["shift_constant", "'normal'", "gaussian", "number"]),
    ({"shift_constant": float("nan")}, ValueError, ["shift_constant", "finite"]),
    ({"num_batches": 0}, ValueError, ["num_batches", "at least 1", "got 0"]),
    ({"num_batches": 2.0}, TypeError, ["num_batches", "whole number", "float"]),
    ({"num_batches": True}, TypeError, ["num_batches", "whole number", "bool"]),
    ({"seed": -1}, ValueError, ["seed", "at least 0"]),
    ({"seed": None}, TypeError, ["seed", "whole number"]),
    ({"batch_weights": (1.0, float("nan"))}, ValueError, ["batch_weights", "finite", "nan"]),
    ({"batch_weights": 2.0}, TypeError, ["batch_weights", "one number a batch", "2.0"]),
    ({"batch_weights": "12"}, TypeError, ["batch_weights", "one number a batch", "'12'"]),
    ({"batch_weights": [1.0, None]}, TypeError, ["batch_weights", "expected a number", "None"]),
    ({"batch_weights": ()}, ValueError, ["batch_weights", "one number a batch"]),
    # ranks
    ({"adaptive_ranks": "no"}, TypeError, ["adaptive_ranks", "True or False", "'no'"]),
    ({"fold_alpha": 1}, TypeError, ["fold_alpha", "True or False", "1"]),
    ({"adaptive_ranks": True, "min_rank": -1}, ValueError, ["min_rank", "at least 0"]),
    ({"adaptive_ranks": True, "max_rank": 0}, ValueError, ["max_rank", "at least 1"]),
    ({"adaptive_ranks": True, "min_rank": 4, "max_rank": 3}, ValueError, ["max_rank", "at least 4", "got 3"]),
    ({"adaptive_ranks": True, "rank_budget": 0}, ValueError, ["rank_budget", "at least 1"]),
    ({"rank_budget": 8}, ValueError, ["rank_budget", "adaptive_ranks=True"]),
    ({"min_rank": 1}, ValueError, ["min_rank", "adaptive_ranks=True"]),
    ({"max_rank": 1}, ValueError, ["max_rank", "adaptive_ranks=True"]),
]


@pytest.mark.parametrize(("options", "kind", "parts"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_a_wrong_value_is_one_clear_error(options: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    for make in (lambda: InitConfig(**options), lambda: InitConfig.from_dict(options)):
        with pytest.raises(kind) as error:
            make()
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message
        assert error.value.__cause__ is None


RIGHT: list[dict[str, Any]] = [
    {},
    {"method": None},
    *({name: value} for name, values in CHOICES.items() for value in values),
    {"p": 0},
    {"p": 1},
    {"strength": 1e-6},
    {"rtol": 0.0},
    {"rtol": 1},
    {"method": "shift", "shift_constant": -3},
    {"method": "shift", "shift_constant": "gaussian"},
    {"seed": 2**64},
    {"batch_weights": [1, 2.5]},
    {"adaptive_ranks": True, "rank_budget": 5, "min_rank": 1, "max_rank": 9},
    {"adaptive_ranks": True, "min_rank": 3, "max_rank": 3},
]


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_what_is_right_is_accepted_and_survives_json(options: dict[str, Any]) -> None:
    """Control for the errors: the limits themselves are inside."""
    config = InitConfig(**options)
    back = InitConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert all(getattr(back, f.name) == getattr(config, f.name) for f in fields(InitConfig))


def test_every_choice_is_listed_when_one_is_wrong() -> None:
    for name, allowed in CHOICES.items():
        with pytest.raises(ValueError) as error:
            InitConfig(**{name: "?"})
        assert all(value in str(error.value) for value in allowed)
    assert set(CHOICES) == {"method", "base", "decomposition", "gram", "root", "initial_weight"}


def test_the_default_strength_is_the_methods_own() -> None:
    for method in ("cross", "self", "shift"):
        assert InitConfig(method=method).method.strength_at(0.5) == 2.0
        assert METHODS[method](strength=1).strength_at(0.5) == 1.0


def test_a_configuration_does_not_change() -> None:
    config = InitConfig()
    with pytest.raises(FrozenInstanceError):
        config.p = 0.1  # type: ignore[misc]
    assert replace(config, p=0.1).p == 0.1 and config.p == 0.5
    weights = [1.0, 2.0]
    config = InitConfig(method=Self(batch_weights=weights))  # type: ignore[arg-type]
    weights[0] = 9.0
    assert config.method.batch_weights == (1.0, 2.0)
    assert hash(config) == hash(InitConfig(method=Self(batch_weights=(1, 2))))


def test_replace_checks_as_well() -> None:
    with pytest.raises(ValueError, match="did you mean 'offset'"):
        replace(InitConfig(), base="offst")


def test_the_nearest_name_is_offered_only_if_there_is_one() -> None:
    assert (
        unknown_name("x", "abd", ["abc", "xyz"])
        == "x: 'abd' is not known (did you mean 'abc'?); expected one of: abc, xyz"
    )
    assert "did you mean" not in unknown_name("x", "q", ["abc", "xyz"])


def test_what_is_stated_of_the_tolerance_tells_the_letter_from_the_default() -> None:
    for options, effective, stated in (
        ({"method": "self"}, None, "rounding"),  # which follows from the inputs
        ({"method": "self", "rtol": 0.0}, 0.0, None),  # NumPy's
        ({"method": "self", "rtol": 1e-3}, 1e-3, 1e-3),
        ({"method": "cross"}, 1e-3, 1e-3),
        ({"method": "cross", "rtol": 0.0}, 0.0, None),
        ({"method": "pissa"}, None, None),  # without †
    ):
        config = InitConfig.from_dict(options)
        assert getattr(config.method, "rtol", None) == effective and config.stated()["rtol"] == stated, options
        assert InitConfig.from_dict(config.to_dict()) == config


# --- options of the methods -----------------------------------------------------------------------------------


def test_options_live_in_their_method() -> None:
    config = InitConfig(method=Self(root="cholesky"), base="keep")
    assert config.method == Self(root="cholesky") != Self() and InitConfig(method="self").method == Self()
    assert InitConfig.from_dict({"method": "self", "root": "cholesky", "base": "keep"}) == config
    assert replace(config, seed=3).method is config.method
    assert replace(config, method=Cross()).method == Cross()
    assert {f.name for f in fields(config)}.isdisjoint(EARLIER_DEFAULTS)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert not hasattr(config, "rot")


def test_flat_keys_are_the_method_and_its_own_options_alone() -> None:
    values = InitConfig(method=Eva(center=False), num_batches=3).to_dict()
    assert values["method"] == "eva" and values["center"] is False and values["num_batches"] == 3
    assert not {"root", "p", "strength"} & set(values)
    for name, cls in METHODS.items():
        config = InitConfig(method=name)
        assert set(config.to_dict()) == {f.name for f in fields(config)} | set(asdict(cls()))  # type: ignore[call-overload]
        assert InitConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: Self(rot="paper"), TypeError, ["Self option", "'rot'", "did you mean 'root'", "batch_weights"]),
        (lambda: Lora(p=0.5), TypeError, ["Lora option", "'p'"]),
        (lambda: Self(root="polar"), ValueError, ["root", "'polar'", "paper, symmetric, cholesky"]),
        (lambda: Olora(decomposition="svd"), ValueError, ["decomposition", "'svd'", "qr, qr_pivoted"]),
        (lambda: Shift(shift_constant="normal"), ValueError, ["shift_constant", "gaussian"]),
        (lambda: Descent(damping=-1), ValueError, ["damping", "[0, inf]"]),
        (lambda: Eva(center=1), TypeError, ["center", "True or False"]),
        (lambda: Cross(rtol=None), TypeError, ["rtol", "expected a number"]),
        (lambda: InitConfig(method=Self), TypeError, ["method", "the class Self", "Self()"]),
        (lambda: InitConfig(method=3), ValueError, ["method", "3", "cross, self"]),
    ],
)
def test_a_wrong_option_of_a_method_is_one_clear_error(make: Any, kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as error:
        make()
    assert all(part in str(error.value) for part in parts), error.value


def test_the_earlier_form_works_and_one_warning_shows_the_new_one() -> None:
    for options in ({"root": "cholesky"}, {"method": "shift", "shift_constant": 3, "base": "keep"}, {"p": 0.5}):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = InitConfig(**options)
        assert [(w.category, w.filename) for w in said] == [(DeprecationWarning, __file__)]
        _, _, written = str(said[0].message).partition("write ")
        assert eval(written, {**vars(cntlora)}) == config == InitConfig.from_dict(options)
        with warnings.catch_warnings():  # the control: the new form, and flat keys of files, say nothing
            warnings.simplefilter("error")
            assert eval(written, {**vars(cntlora)}) == InitConfig.from_dict(options)


def test_earlier_reads_are_forwarded_with_a_warning() -> None:
    config = InitConfig(method=Self(root="cholesky"))
    with pytest.warns(DeprecationWarning, match=r"config\.method\.root"):
        assert config.root == "cholesky"  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning):
        assert InitConfig(method="lora").damping == EARLIER_DEFAULTS["damping"]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'rot'"):
        config.rot  # type: ignore[attr-defined]  # noqa: B018


EARLIER = {
    "base": None, "num_batches": 8, "adaptive_ranks": False, "rank_budget": None, "min_rank": 0, "max_rank": None,
    "exact_svd": False, "fold_alpha": False, "seed": 0, **EARLIER_DEFAULTS,
}  # fmt: skip


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("lora_da", "gora", "whitened", "whitened_descent")]
)
def test_what_version_0_1_wrote_is_read(method: str) -> None:
    """Its plans and records have the options of all methods, and None for the method's own strength and tolerance."""
    assert InitConfig.from_dict({**EARLIER, "method": method}) == InitConfig(method=method)
    other = "center" if method != "eva" else "root"
    value = {"center": False, "root": "symmetric"}[other]
    with pytest.raises(ValueError, match=f"{other}: .* has no effect with method '{method}'"):  # the control
        InitConfig.from_dict({**EARLIER, "method": method, other: value})


def test_what_is_stated_has_the_form_of_the_records() -> None:
    assert InitConfig(method="descent").stated() == {**EARLIER, "method": "descent", "base": "keep"}
    assert InitConfig(method="olora").stated()["decomposition"] == "svd"
    assert InitConfig(method=Olora(decomposition="qr_pivoted")).stated()["decomposition"] == "qr_pivoted"
    assert InitConfig(method=Self(strength=1.0)).stated()["strength"] == 1.0 and Self().strength == 2.0

"""`InitConfig`: every wrong name or value gives one clear error that lists the right ones."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

import cntlora
from cntlora import InitConfig
from cntlora.config import CHOICES
from cntlora.messages import unknown_name

WRONG: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # names of options and of choices: the error lists all that are right
    ({"methd": "self"}, TypeError, ["methd", "did you mean 'method'", "num_batches", "rank_budget"]),
    ({"lr": 1e-3}, TypeError, ["'lr'", "not known", "method", "strength"]),
    ({"method": "sel"}, ValueError, ["method", "'sel'", "did you mean 'self'", "cross", "shift"]),
    ({"method": None}, ValueError, ["method", "None", "cross, self, shift"]),
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
    assert CHOICES["method"] == cntlora.methods()


def test_the_default_strength_is_the_methods_own() -> None:
    for method in ("cross", "self", "shift"):
        assert InitConfig(method=method).strength_at(0.5) == 2.0
        assert InitConfig(method=method, strength=1).strength_at(0.5) == 1.0


def test_a_configuration_does_not_change() -> None:
    config = InitConfig()
    with pytest.raises(FrozenInstanceError):
        config.p = 0.1  # type: ignore[misc]
    assert replace(config, p=0.1).p == 0.1 and config.p == 0.5
    weights = [1.0, 2.0]
    config = InitConfig(batch_weights=weights)  # type: ignore[arg-type]
    weights[0] = 9.0
    assert config.batch_weights == (1.0, 2.0)
    assert hash(config) == hash(InitConfig(batch_weights=(1, 2)))


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
        config = InitConfig(**options)
        assert config.effective_rtol == effective and config.stated()["rtol"] == stated, options
        assert InitConfig.from_dict(config.to_dict()) == config

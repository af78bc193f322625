"""The arguments of the calls: written once, and the same for Python, for `help` and for type checkers."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.tiny import adapted, text_batches

import cntlora
from cntlora.execution.arguments import Options, Request, TrainerRequest, called_with

CALLS: dict[Callable[..., Any], list[str]] = {
    cntlora.initialize: ["model", "batches", "config"],
    cntlora.compute_plan: ["model", "batches", "config"],
    cntlora.initialize_from_trainer: ["trainer", "config"],
}
OPTIONS = ["forward", "loss", "token_mask", "adapter_name", "on_missing", "progress", "max_memory", "weights"]
each = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


@each
def test_the_signature_is_the_true_one(call: Any) -> None:
    found = inspect.signature(call)
    assert list(found.parameters) == CALLS[call] + OPTIONS
    kinds = [parameter.kind for parameter in found.parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(CALLS[call]) + [
        inspect.Parameter.KEYWORD_ONLY
    ] * len(OPTIONS)
    defaults = {name: parameter.default for name, parameter in found.parameters.items() if name in OPTIONS}
    assert defaults["adapter_name"] == "default" and defaults["on_missing"] == "raise" and defaults["progress"] is True
    returned = cntlora.InitPlan if call is cntlora.compute_plan else cntlora.InitReport
    assert get_type_hints(call)["return"] is returned and get_type_hints(call)["adapter_name"] is str


@each
def test_every_argument_is_described_before_what_is_returned(call: Any) -> None:
    text = inspect.getdoc(call) or ""
    section = text.partition("Args:\n")[2].partition("\nReturns:")[0].partition("\nRaises:")[0]
    described = [
        line.split(":")[0].strip() for line in section.splitlines() if line.startswith("    ") and line[4] != " "
    ]
    assert described == CALLS[call] + OPTIONS
    assert "Raises:" in text.partition("Args:\n")[2]


@each
def test_an_unknown_argument_names_the_nearest(call: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"{call.__name__}: argument: 'token_masks' is not known .did you mean 'token_mask'"
    ):
        call(adapted(), token_masks="none")
    with pytest.raises(TypeError, match=rf"{call.__name__}: missing a required argument: '{CALLS[call][0]}'"):
        call()
    with pytest.raises(TypeError, match="too many positional arguments"):
        call(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["model", "batches", "self"], {}, r"config: expected .*'self'; write InitConfig\(method='self'\)"),
        (["model", "batches", {"method": "self"}], {}, r"config: expected an InitConfig.*write InitConfig.from_dict"),
        (["batches", "model"], {}, r"model: expected a model .nn.Module. as the first argument, got \["),
        (["model", "batches"], {"num_batches": 4}, r"'num_batches' is an option of .*InitConfig\(num_batches=…"),
    ],
)  # fmt: skip
def test_what_belongs_elsewhere_is_named(arguments: list[Any], more: dict[str, Any], message: str) -> None:
    given = {"model": adapted(), "batches": text_batches()}
    with pytest.raises(TypeError, match=message):
        cntlora.initialize(*(given.get(a, a) if isinstance(a, str) else a for a in arguments), **more)


def test_calls_by_name_and_by_place_are_the_same() -> None:
    batches, config = text_batches(), cntlora.InitConfig(method="self", base="keep")
    one = cntlora.compute_plan(adapted(), batches, config, progress=False)
    other = cntlora.compute_plan(config=config, batches=batches, model=adapted(), progress=False)
    assert all((one.sites[name].A == other.sites[name].A).all() for name in one.sites)


def test_a_function_of_one_object_is_called_with_its_fields() -> None:
    @called_with(Request)
    def number(request: Request) -> int:
        """Count.

        Returns:
            What was given.
        """
        return len(request.options())

    assert number(adapted()) == len(OPTIONS) and number.__name__ == "number"
    assert (number.__doc__ or "").startswith("Count.\n\nArgs:\n    model: carries LoRA layers")
    assert set(Options.__dataclass_fields__) == set(OPTIONS)
    assert set(TrainerRequest.__dataclass_fields__) - set(OPTIONS) == {"trainer", "config"}


@pytest.mark.slow
def test_type_checkers_see_the_arguments(tmp_path: Path) -> None:
    """The wrong lines alone are errors; the others are the control."""
    lines = [
        ("cntlora.initialize(model, [1], progress=False)", True),
        ("cntlora.initialize(model, tokenmask='none')", False),
        ("cntlora.initialize(model, on_missing=3)", False),
        ("cntlora.compute_plan(model, None, None, max_memory='6GiB').save('plan')", True),
        ("cntlora.compute_plan(model).to_dict()", False),
        ("cntlora.initialize_from_trainer(object(), adapter_name='a').to_dict()", True),
        ("cntlora.initialize_from_trainer()", False),
    ]
    head = "import cntlora\nfrom torch import nn\nmodel: nn.Module = nn.Linear(1, 1)\n"
    file = tmp_path / "calls.py"
    file.write_text(head + "\n".join(line for line, _ in lines) + "\n")
    ran = subprocess.run([sys.executable, "-m", "mypy", str(file)], capture_output=True, text=True, check=False)
    wrong = {int(line.split(":")[1]) for line in ran.stdout.splitlines() if ": error:" in line}
    first = head.count("\n") + 1
    assert wrong == {first + i for i, (_, right) in enumerate(lines) if not right}, textwrap.indent(ran.stdout, "  ")

"""The runner of PEFT's own tests: what it initialises, what it judges, and that it can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from benchmarks.peft_suite import models, starts
from benchmarks.peft_suite.document import content
from benchmarks.peft_suite.outcomes import Failure, Refusal, judge, read_expected, read_outcomes, rows, total
from peft import LoraConfig, PeftMixedModel, PeftModel
from torch import nn

ROOT = Path(__file__).parents[1]
EXPECTED = ROOT / "benchmarks" / "peft_suite" / "expected.toml"


def line(test: str, outcome: str, message: str = "", *begun: str) -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "message": message, "seconds": 0.5, "starts": list(begun)}


# --- what came of the tests -----------------------------------------------------------------------------------


def test_a_failure_is_ours_unless_plain_peft_fails_too_or_the_list_has_it() -> None:
    lines = [line(name, "failed", "why") for name in ("ours", "plain", "known")]
    plain = [line("ours", "passed"), line("plain", "failed"), line("known", "passed")]
    found = judge("self+keep", lines, plain, [Failure("^known$", "a reason")], [])
    assert found.unexpected == [("ours", "why")]
    assert found.counts == {"unexpected failure": 1, "fails in plain PEFT": 1, "expected failure": 1}
    assert found.reasons == {"a reason": 1}


@pytest.mark.parametrize(
    ("entry", "covers"),
    [
        (Failure("test_x", "r"), True),
        (Failure("test_y", "r"), False),
        (Failure("test_x", "r", message="wrong"), False),
        (Failure("test_x", "r", settings=("*+keep",)), True),
        (Failure("test_x", "r", settings=("*+offset", "pissa+*")), False),
    ],
)
def test_an_entry_covers_its_test_message_and_settings_alone(entry: Failure, covers: bool) -> None:
    assert entry.covers("self+keep", "tests/test_x.py::test_x[1]", "why") is covers


def test_adapters_that_are_left_as_they_were_are_counted_by_reason() -> None:
    lines = [line("a", "passed", "", "ours"), line("b", "skipped", "", "refused: no W", "partly ours: new")]
    found = judge("self+keep", lines, [], [], [Refusal("no W", "it has none")])
    assert found.started == 2
    assert found.refused == {"it has none": 1, "new": 1}
    assert judge("self+keep", [line("b", "passed", "", "refused: no W")], [], [], []).started == 0


def test_the_worse_of_two_reports_of_a_test_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"test": "a", "outcome": "failed"}\n{"test": "a", "outcome": "passed"}\n')
    assert [entry["outcome"] for entry in read_outcomes(path)] == ["failed"]
    assert read_outcomes(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[failure]]\ntest = "x"\n', "'reason'"),
        ('[[failure]]\ntest = "x"\nreason = " "\n', "'reason'"),
        ('[[refusal]]\nreason = "x"\n', "'message'"),
        ('[[failure]]\ntest = "x"\nreason = "y"\nseting = "z"\n', "seting"),
    ],
)
def test_an_entry_without_a_reason_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_expected(path)


def test_the_list_can_be_read_and_hides_no_suite() -> None:
    """An entry that covers any test would make the command unable to fail."""
    failures, refusals = read_expected(EXPECTED)
    assert failures and refusals
    assert not [entry for entry in failures if entry.covers("self+offset", "tests/test_new.py::test_new", "")]
    assert not [entry for entry in refusals if entry.message in ("", ".*")]


def test_tables_have_a_row_for_each_suite_and_the_sum() -> None:
    parts = {name: judge("self+keep", [line(name, "passed", "", "ours")], [], [], []) for name in ("a", "b")}
    head, found = rows({"self+keep": parts})
    assert [row[0] for row in found] == ["a", "b", "all"]
    assert [row[head.index("passed")] for row in found] == ["1", "1", "2"]
    assert total(parts.values()).started == 2
    machine = {"processor": "x", "cores": 2, "memory_gib": 1, "threads": 1, "torch": "1", "peft": "2", "cntlora": "3"}
    settings = {"self+keep": {name: vars(part) for name, part in parts.items()}}
    record = {"date": "today", "machine": machine, "minutes": 1, "every": 1, "settings": settings}
    assert "| self+keep | 2 | 2 | 2 | 0 | 0 | 0 | 0 | 1 |" in content(record)


# --- what the tests get ---------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 12)
        self.narrow = nn.Linear(12, 2)
        self.lookup = nn.Embedding(100, 12)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        narrowed: torch.Tensor = self.narrow(self.wide(self.lookup(X)))
        return narrowed


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> starts.Session:
    """A session in which PEFT's functions are replaced, and are themselves again afterwards."""
    import peft.mapping
    import peft.mapping_func

    for owner in (peft, peft.mapping_func):
        monkeypatch.setattr(owner, "get_peft_model", peft.get_peft_model)
    for owner in (peft, peft.mapping):
        monkeypatch.setattr(owner, "inject_adapter_in_model", peft.inject_adapter_in_model)
    for kind in (PeftModel, PeftMixedModel):
        for name in ("add_adapter", "from_pretrained", "load_adapter"):
            if name in vars(kind):
                monkeypatch.setattr(kind, name, vars(kind)[name])
    found = starts.Session("self", "offset", ("looks up rows",))
    monkeypatch.setattr(starts.gc, "freeze", lambda: None)
    starts.install(found)
    return found


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["wide", "narrow"], "r": 4, "lora_alpha": 8, **options})


X = torch.arange(6).view(2, 3)


def test_ranks_and_scalings_in_the_file_are_those_of_the_test(session: starts.Session) -> None:
    given = config()
    model = peft.get_peft_model(Small(), given)
    wide, narrow = model.base_model.model.wide, model.base_model.model.narrow
    assert session.starts == ["ours"]
    assert (wide.r["default"], wide.scaling["default"], wide.lora_A["default"].weight.shape[0]) == (4, 2.0, 4)
    assert (narrow.r["default"], narrow.scaling["default"]) == (2, 2.0)
    assert wide.lora_B["default"].weight.any()
    assert given.rank_pattern and model.peft_config["default"] is not given


def test_a_start_that_should_change_the_output_does(session: starts.Session) -> None:
    base = Small()
    before = base(X)
    same = peft.get_peft_model(base, config())
    torch.testing.assert_close(same(X), before)
    same.add_adapter("other", config(init_lora_weights=False))
    same.set_adapter("other")
    assert not torch.allclose(same(X), before, atol=1e-3)
    assert not same.peft_config["other"].init_lora_weights
    assert session.starts == ["ours", "ours"]


def test_sites_that_are_refused_keep_the_start_of_the_test(session: starts.Session) -> None:
    model = peft.get_peft_model(Small(), config(target_modules=["lookup"], init_lora_weights=False))
    assert re.match("refused: .*none of the 1 .*site lookup", session.starts[0])
    assert model.base_model.model.lookup.lora_embedding_A["default"].any()
    assert model.base_model.model.lookup.r["default"] == 4


def test_a_refusal_that_is_not_known_fails_the_test(session: starts.Session) -> None:
    session.refusals = ()
    with pytest.raises(AssertionError, match="refuses what it should not.*lookup"):
        peft.get_peft_model(Small(), config(target_modules=["lookup"]))


def test_what_is_loaded_is_left_alone(session: starts.Session, tmp_path: Path) -> None:
    model = peft.get_peft_model(Small(), config())
    model.save_pretrained(tmp_path)
    session.starts.clear()
    again = PeftModel.from_pretrained(Small(), tmp_path)
    assert session.starts == []
    saved, loaded = (m.base_model.model.wide.lora_B["default"].weight for m in (model, again))
    assert torch.equal(saved, loaded)


class Takes(nn.Module):
    """A model that runs on inputs of one shape alone."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(X.float().reshape(*self.shape) if self.shape else X)
        return found


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Takes(nn.Linear(7, 3)), (9, 7)),
        (Takes(nn.Conv2d(1, 3, 2), 9, 1, 5, 2), (9, 10)),  # makes images of the numbers itself
        (Takes(nn.Conv2d(3, 5, 3)), (9, 3, 10, 10)),
        (Takes(nn.Conv1d(3, 5, 4)), (9, 3, 10)),
        (nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(45, 2)), (9, 3, 3, 3)),
    ],
)
def test_a_model_gets_an_input_that_it_can_be_called_with(model: nn.Module, shape: tuple[int, ...]) -> None:
    batches, forward = starts.inputs(model, None)
    assert forward is None and batches[0].shape == shape
    assert model(batches[0]) is not None


class TestOfAClassWithData:
    @pytest.fixture
    def data(self) -> torch.Tensor:
        return torch.rand(6, 20)

    def test_they_come_first_where_the_model_takes_them(self, request: pytest.FixtureRequest) -> None:
        both = Takes(nn.Conv2d(3, 5, 3), 1, 3, 5, 8), Takes(nn.Linear(7, 3))
        before = torch.get_rng_state()
        taken, other = (starts.inputs(model, request.node)[0][0] for model in both)
        assert (taken.shape, other.shape) == ((6, 20), (9, 7))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_test_without_data_gets_a_generic_input(request: pytest.FixtureRequest) -> None:
    assert starts.inputs(Takes(nn.Linear(20, 3)), request.node)[0][0].shape == (9, 20)


def test_looking_for_an_input_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    starts.inputs(model, None)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_encoder_decoder_gets_inputs_of_both() -> None:
    model = models.build("peft-internal-testing/tiny-random-t5")
    batches, _ = starts.inputs(model, None)
    assert model(**batches[0]).logits.isfinite().all()


# --- the command ----------------------------------------------------------------------------------------------

FAKE = """
from torch import nn
from peft import LoraConfig, get_peft_model

def b_of_lora():
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12)), LoraConfig(target_modules=["0"], r=4))
    return model.base_model.model[0].lora_B["default"].weight

def test_lora_has_two_factors():
    assert b_of_lora().shape == (12, 4)

def test_lora_starts_at_zero():
    assert not b_of_lora().any()

def test_lora_fails_anyway():
    assert False

def test_of_another_kind():
    assert False
"""


def run_command(folder: Path, *options: str) -> tuple[int, str]:
    tests = folder / "checkout" / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    (tests / "__init__.py").touch()
    (tests / "test_mixed.py").write_text(FAKE)
    command = [sys.executable, str(ROOT / "benchmarks" / "peft_suite"), str(folder / "checkout")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    from benchmarks.peft_suite.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])


@pytest.mark.slow
def test_the_command_fails_on_what_only_our_start_breaks(tmp_path: Path) -> None:
    settings = ("--settings", "pissa+offset", "--out", str(tmp_path / "out"))
    code, printed = run_command(tmp_path, *settings)
    assert code == 1, printed
    assert "FAILED pissa+offset tests/test_mixed.py::test_lora_starts_at_zero" in printed
    assert "test_lora_fails_anyway" not in printed and "another_kind" not in printed
    assert sorted(path.name for path in (tmp_path / "checkout" / "tests").iterdir()) == ["__init__.py", "test_mixed.py"]

    expected = tmp_path / "expected.toml"
    expected.write_text('[[failure]]\ntest = "starts_at_zero"\nreason = "it does not start there"\n')
    code, printed = run_command(tmp_path, *settings, "--resume", "--expected", str(expected))
    assert code == 0, printed
    assert "| 1 | it does not start there |" in printed


@pytest.mark.slow
def test_a_suite_that_cannot_be_collected_is_an_error(tmp_path: Path) -> None:
    run_command(tmp_path, "--suites", "none")
    (tmp_path / "checkout" / "tests" / "test_helpers.py").write_text("import a_module_that_is_not_there")
    code, printed = run_command(tmp_path, "--suites", "helpers", "--settings", "plain")
    assert code == 1
    assert "ERROR tests/test_helpers.py, plain: ModuleNotFoundError" in printed

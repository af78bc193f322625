"""Ctrl-C: the model as it was, one line, exit code 130, soon."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fuzz_judge import as_it_is
from tests.kill_cases import Moment, run_fork
from tests.tiny import adapted, changed, state, text_batches
from torch import nn
from typer.testing import CliRunner

from cntlora import InitConfig, compute_plan, initialize
from cntlora.cli.app import app
from cntlora.interrupts import ended_within, interrupts_deferred
from cntlora.model import writer


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Hear Ctrl-C also where the tests run in the background of a shell, whose children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def in_forward(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = model.get_submodule("base_model.model.bert.encoder.layer.1.output")
    monkeypatch.setattr(deep, "forward", stop)


def patched(name: str) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, monkeypatch: monkeypatch.setattr(name, stop)


MOMENTS = {
    "in a forward pass": (in_forward, {}),
    "in the eigenvalues of a batch": (patched("torch.linalg.eigh"), {}),
    "in a factorisation": (patched("cntlora.execution.site_spectra.spectrum"), {}),
    "in a QR": (patched("torch.linalg.qr"), {"decomposition": "qr", "rtol": 1e-3}),
    "in a backward pass": (patched("torch.Tensor.backward"), {"method": "lora_ga"}),
    "with ranks by the data": (patched("cntlora.linalg.allocation.allocate"), {"adaptive_ranks": True}),
    "while the plan is checked": (patched("cntlora.model.writer.check_holders"), {}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MOMENTS)
def test_the_model_is_as_it_was(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt, options = MOMENTS[name]
    model = adapted()
    model.train()
    before = as_it_is(model, weights=True)
    torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        interrupt(model, patch)
        with pytest.raises(KeyboardInterrupt):
            initialize(model, text_batches(), InitConfig.from_dict({"method": "self", **options}))
    assert torch.get_num_threads() == threads
    assert as_it_is(model, weights=True) == before
    initialize(
        model, text_batches(), InitConfig.from_dict({"method": "self", **options})
    )  # the control: without the interrupt it is another model
    assert as_it_is(model, weights=True) != before


def test_a_real_signal_in_the_data_pass(tmp_path: Path) -> None:
    model = adapted()
    before = state(model)
    heard = 0

    def slow(model: nn.Module, batch: Any) -> Any:
        nonlocal heard
        heard += 1
        if heard == 2:
            signal.raise_signal(signal.SIGINT)
        return model(**batch)

    with pytest.raises(KeyboardInterrupt):
        compute_plan(model, text_batches(), forward=slow, config=InitConfig(method="self"))
    assert heard == 2 and not changed(before, model)


def test_what_is_deferred_comes_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]
    with interrupts_deferred():  # the control
        done.append(3)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_command_says_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cntlora.lab.recipes.loading.load_tokenizer", stop)
    result = CliRunner().invoke(app, ["init", "any", "--out", str(tmp_path / "a"), "--method", "lora"])
    assert result.exit_code == 130 and result.stderr.splitlines() == ["cntlora: stopped; nothing was half-written"]
    assert not (tmp_path / "a").exists()


def long_factorisation() -> None:
    with ended_within(0.9):
        torch.linalg.svd(torch.randn(4000, 4000))  # half a minute and more


def never_heard() -> None:
    with ended_within(0.9):
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(30)  # as where a library swallows it


def heard() -> None:
    with ended_within(0.9):
        time.sleep(30)


@pytest.mark.parametrize("work", [long_factorisation, pytest.param(never_heard, marks=pytest.mark.slow), heard])
def test_the_program_ends_within_a_second_or_so(work: Callable[[], None], tmp_path: Path) -> None:
    ended = run_fork(work, tmp_path, Moment(seconds=0.3, signal=signal.SIGINT))
    assert ended.code == 130 and ended.after < 2.0, ended
    assert ended.told.splitlines() == ["cntlora: stopped; nothing was half-written"]


@pytest.mark.parametrize("code", [1, 0, 2])
def test_an_error_ends_it_before_the_libraries_are_taken_down(code: int) -> None:
    """That takes torch half a second; an exit handler stands for it."""
    script = (
        "import atexit, sys\nfrom cntlora.interrupts import ended_within\natexit.register(print, 'taken down')\n"
        f"with ended_within(0.9):\n    print('told')\n    raise SystemExit({code})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.split("\n")[:-1] == (["told"] if code == 1 else ["told", "taken down"])  # others: the control


def test_without_the_watch_it_would_not(tmp_path: Path) -> None:
    def swallowing() -> None:
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(1.2)

    ended = run_fork(swallowing, tmp_path, Moment(seconds=0.2, signal=signal.SIGINT))
    assert ended.code == 0 and ended.after >= 1.1 and not ended.told


@pytest.mark.parametrize("base", ["offset", "subtract"])
def test_ctrl_c_while_factors_are_written_waits_for_the_last_one(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = adapted(), adapted()
    initialize(other, text_batches(), InitConfig(method="self", base=base))
    plan, write = compute_plan(model, text_batches(), InitConfig(method="self", base=base)), writer._write

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(writer, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write_plan(model, plan)
    assert not changed(state(other), model) and repr(model.peft_config) == repr(other.peft_config)

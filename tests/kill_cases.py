"""SIGKILL at chosen moments of the commands, each in a process of its own, and what must hold of its files then.

A command is run in a fork of this process, which has the libraries imported. An audit hook in the fork sees every
change that Python makes to files, so that it can be killed right before the n-th: no moment is left to chance. Moments
by the clock hit what other languages write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cntlora import InitPlan
from cntlora.lab.experiments import processes
from cntlora.lab.record import read_record

LONGEST = 300
"""Seconds that a process may take."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


@dataclass(frozen=True)
class Moment:
    """The time of `signal`: before the `change`-th change of a file, or after `seconds`; neither for never."""

    change: int = 0
    seconds: float = 0.0
    signal: int = signal.SIGKILL


NEVER = Moment()


@dataclass(frozen=True)
class Ended:
    """The end of a process.

    Attributes:
        code: exit code, negative for a signal.
        seconds: from its start; after: from the signal, where that came by the clock.
        changes: of files that it made, or the most that any of its processes counted.
        told: what it wrote to stderr.
    """

    code: int
    seconds: float
    after: float
    changes: int
    told: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def run_command(arguments: list[str], folder: Path, moment: Moment = NEVER) -> Ended:
    """Run `cntlora` with these arguments in a fork; `folder` is the one that it writes into."""
    from cntlora.cli.app import main

    def command() -> None:
        context: Any = processes.multiprocessing.get_context("fork")  # as the server of forks, without its start
        processes._context = lambda function: context
        sys.argv = ["cntlora", *arguments]
        main()

    return run_fork(command, folder, moment)


def run_fork(work: Callable[[], object], folder: Path, moment: Moment = NEVER) -> Ended:
    """Run a function in a fork of this process, which gets a signal, with all its processes, at the moment.

    Args:
        folder: changes of files are counted below it.
    """
    counted, told = os.pipe(), os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _work(work, folder, moment, counted[1], told[1])
    os.close(counted[1])
    os.close(told[1])
    code, sent = _wait(child, moment)
    ended = time.monotonic()
    with os.fdopen(counted[0], "rb") as bytes_, os.fdopen(told[0], "rb") as text:
        numbers = [int.from_bytes(number, "little") for number in iter(lambda: bytes_.read(4), b"")]
        written = text.read().decode()
    return Ended(code, ended - began, ended - (sent or ended), max(numbers, default=0), written)


def _work(work: Callable[[], object], folder: Path, moment: Moment, counted: int, told: int) -> None:
    """Work in the fork; never return."""
    code = 70
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream, target in enumerate((nowhere, nowhere, told)):
            os.dup2(target, stream)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = open(1, "w"), open(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _count_changes(folder, moment, counted)
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count_changes(folder: Path, moment: Moment, counted: int) -> None:
    """Count the changes of files under `folder`, and send the signal before the one of the moment.

    A process that is started counts on from where the one that started it was; each number is written to `counted`.
    """
    made = [0]
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (opened or event in CHANGES) or not any(str(a).startswith(inside) for a in arguments[:2]):
            return
        made[0] += 1
        if made[0] == moment.change:
            os.killpg(0, moment.signal)
        os.write(counted, made[0].to_bytes(4, "little"))

    sys.addaudithook(hook)


def _wait(child: int, moment: Moment) -> tuple[int, float | None]:
    """The exit code of a child, and when it was sent a signal by the clock."""
    due = time.monotonic() + moment.seconds if moment.seconds else None
    end, sent = time.monotonic() + LONGEST, None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if due is not None and time.monotonic() > due:
            with suppress(ProcessLookupError):  # in its first moments it has no group of its own
                os.killpg(child, moment.signal)
                due, sent = None, time.monotonic()
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # runs that it started
    return os.waitstatus_to_exitcode(status), sent


# --- the commands -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command to be killed.

    Attributes:
        name: of the command.
        arguments: for the folder that it writes into, and whether for the old files or for the new ones.
        whole: raises where a file of the folder is there but not whole.
    """

    name: str
    arguments: Callable[[Path, bool], list[str]]
    whole: Callable[[Path], None]


def prepared(folder: Path) -> list[Command]:
    """The commands on a tiny model and data, which are made in `folder`."""
    from cntlora.lab.recipes.text.sentiment import TweetsSettings, tiny

    made = tiny(TweetsSettings(), folder)
    adapters = [adapter_of_a_unet(folder / f"unet{rank}", rank) for rank in (2, 3)]
    experiment = folder / "trial.toml"
    experiment.write_text(
        f'[task]\nmodel = "{made.model}"\ndata = "{made.data}"\neval_size = 6\nbatch_size = 4\n'
        "[lora]\nrank = 2\n[train]\nsteps = 3\nwarmup = 1\nsave_every = 1\neval_at = [0]\n"
        '[sweep]\nmethods = ["lora", "self"]\nlearning_rates = [1e-3]\nseeds = [0]\n'
    )

    def init(out: Path, new: bool) -> list[str]:
        fixed = ["--data", str(made.data), "--label", "label", "--targets", "query,value", "--batch-size", "4"]
        out_ = ["--out", str(out / "adapter"), "--plan", str(out / "plan.safetensors"), "--overwrite"]
        return ["init", str(made.model), *fixed, *out_, "--num-batches", "2", "--rank", "3" if new else "2"]

    def sweep(command: str) -> Callable[[Path, bool], list[str]]:
        more = ["--save-adapters"] if command == "run" else ["--methods", "lora"]
        return lambda out, new: [
            command, str(experiment), "--out", str(out), *more, "--set", f"lora.rank={3 if new else 2}", "--replace",
        ]  # fmt: skip

    def export(out: Path, new: bool) -> list[str]:
        return [
            "export",
            str(adapters[new]),
            "--out",
            str(out / "lora.safetensors"),
            "--format",
            "kohya",
            "--overwrite",
        ]

    return [
        Command("init", init, _whole_adapter_and_plan),
        Command("run", sweep("run"), _whole_records),
        Command("compare", sweep("compare"), _whole_records),
        Command("export", export, _whole_tensors),
    ]


def adapter_of_a_unet(folder: Path, rank: int) -> Path:
    folder.mkdir()
    names = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in range(6)]
    state = {}
    for name in names:
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 64)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(64, rank)
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["to_q"], "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _whole_adapter_and_plan(folder: Path) -> None:
    plan, adapter = folder / "plan.safetensors", folder / "adapter"
    if plan.exists():
        InitPlan.load(plan)
    if adapter.exists():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in adapter.iterdir()}
        load_file(adapter / "adapter_model.safetensors")
        json.loads((adapter / "adapter_config.json").read_text())


def _whole_records(folder: Path) -> None:
    for path in folder.glob("*.json"):
        record = read_record(path)
        assert record["status"] == "finished", f"{path.name}: {record['error']}"


def _whole_tensors(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        load_file(path)


# --- what must hold -----------------------------------------------------------------------------------------


def visible(folder: Path, command: Command) -> dict[str, str]:
    """The digests of the files that the command promises whole, by their names in the folder."""
    inner = "adapter/*" if command.name == "init" else "*"
    found = {*folder.glob(inner), *folder.glob("*.safetensors"), *folder.glob("*.json")}
    files = [p for p in found if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def hidden(folder: Path) -> list[str]:
    """Return what is left of unfinished files."""
    return sorted(p.name for p in folder.rglob(".*"))


def survives(command: Command, old: Path, moment: Moment) -> tuple[Ended, list[str]]:
    """Kill a command that replaces old files, check them, let it run again; how it ended, and what it left behind.

    Args:
        old: a folder that the command has made with its old arguments; worked on is a copy.

    Raises:
        AssertionError, ValueError: if a file is gone or not whole, or the second run does not end well or leaves
            something behind.
    """
    folder = old.parent / f"{old.name}-{moment.change}-{moment.seconds:.4f}"
    shutil.copytree(old, folder)
    before = visible(folder, command)
    ended = run_command(command.arguments(folder, True), folder, moment)
    assert ended.killed or ended.code == 0, f"{command.name} ended with {ended.code}: {ended.told}"
    command.whole(folder)
    gone = before.keys() - visible(folder, command).keys()
    assert not gone, f"{command.name}: gone: {sorted(gone)}"
    leftovers = hidden(folder)
    assert all(name.endswith(".cntlora") for name in leftovers), leftovers
    again = run_command(command.arguments(folder, True), folder)
    assert again.code == 0 and not hidden(folder), f"{command.name}: the next run left {hidden(folder)}"
    assert not list(folder.rglob("checkpoint")), "a checkpoint was left"
    command.whole(folder)
    shutil.rmtree(folder)
    return ended, leftovers


def moments(changes: int, seconds: float, count: int, generator: Any) -> Iterator[Moment]:
    """`count` moments: first before every change of a file, in random order, then by the clock."""
    for change in generator.sample(range(1, changes + 1), min(changes, (count + 1) // 2)):
        yield Moment(change=change)
    for _ in range(count - min(changes, (count + 1) // 2)):
        yield Moment(seconds=generator.uniform(0.0, seconds))

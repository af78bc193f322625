"""A disk with no room, and everything that the library writes to it."""

from __future__ import annotations

import hashlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kill_cases import adapter_of_a_unet
from tests.report_cases import few, write
from tests.tiny import adapted, text_batches

from cntlora import InitConfig, compute_plan, initialize, save_adapter
from cntlora.files.export import export_adapter
from cntlora.lab.record import write_record
from cntlora.lab.report import write_report

Writer = Callable[[Path], object]


def writers(folder: Path) -> dict[str, Writer]:
    """Return name → a function that writes into the folder that it is given; `folder` is for what they read."""
    plan, model = compute_plan(adapted(), text_batches(), config=InitConfig(method="self")), adapted()
    initialize(model, text_batches(), config=InitConfig(method="self"))
    record = {"schema": 1, "status": "finished", "losses": [0.123456789] * 5000}
    unet, results = adapter_of_a_unet(folder / "unet", 8), write(few(), folder / "results")
    return {
        "InitPlan.save": lambda out: plan.save(out / "plan.safetensors"),
        "save_adapter": lambda out: save_adapter(model, out / "adapter"),
        "record of a run": lambda out: write_record(out / "run.json", record),
        "page and tables of a report": lambda out: write_report(results, out / "page.html", figures=None),
        "export": lambda out: export_adapter(unet, out / "lora.safetensors", "kohya"),
    }


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size at `folder`.

    Raises:
        PermissionError: where this process may not mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError("no file system may be mounted here") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room of a disk with one file."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


@contextmanager
def no_longer_files_than(size: int) -> Iterator[None]:
    """Context in which a file that grows beyond `size` bytes is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, str]:
    """The digests of all files, also hidden ones."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "filler"
    }


def refused(writer: Writer, folder: Path) -> str:
    """The message of the error that a writer gives on a full disk, after which every file must be as it was.

    Raises:
        AssertionError: if something was written, lost or left, or the error is not one line.
    """
    before = contents(folder)
    try:
        writer(folder)
    except OSError as error:
        message = str(error)
        assert "\n" not in message and "could not be written" in message, message
        assert contents(folder) == before, sorted(contents(folder).keys() ^ before.keys())
        assert not list(folder.glob(".*"))
        return message
    raise AssertionError("it was written")

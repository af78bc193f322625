"""Archives from PyPI, npm and Debian: each by its own client, with the user's own settings of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["wheel", "sdist", "npm", "debian"]

# what the client says → what to do about it; the first that fits counts
Advice = tuple[tuple[str, str], ...]
_NO_SPACE = ("No space left|ENOSPC", "free disk space, or set CNTLORA_CACHE to a folder on a larger disk")
_PIP: Advice = (
    ("No module named pip", "install pip into this environment (python -m ensurepip) and try again"),
    (
        r"NewConnection|Failed to establish|Max retries|name resolution|timed out|from versions: none",
        "check the network connection and pip's index settings (pip config list) and try again",
    ),
    _NO_SPACE,
    (
        r"No matching distribution|satisfies the requirement",
        "this version is not offered to this Python; look for a newer cntlora that names another one",
    ),
)
_NPM: Advice = (
    (
        r"ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|network",
        "check the network connection and npm's settings (npm config list)",
    ),
    _NO_SPACE,
    (r"E404|ETARGET|notarget", "the registry does not offer this version; look for a newer cntlora"),
)
_APT: Advice = (
    (
        r"Unable to locate package|no candidate",
        "run `apt-get update` as root first; it needs a Debian (or Ubuntu) with its ordinary sources",
    ),
    (r"Could not resolve|Failed to fetch|Connection", "check the network connection and try again"),
    _NO_SPACE,
)


@dataclass(frozen=True)
class Client:
    """One row of the table: how the archive of a package is fetched into a folder.

    Attributes:
        program: what has to be installed besides Python; None for pip.
        spec: how the client names package and version.
        command: the command line, of the spec and the folder.
        suffixes: how the archive's name may end.
        said: the command as the user would type it, before the spec.
        advice: see above.
        elsewhere: where the client keeps its settings, for the message about a wrong checksum.
    """

    program: str | None
    spec: Callable[[str, str], str]
    command: Callable[[str, str], list[str]]
    suffixes: tuple[str, ...]
    said: str
    advice: Advice
    elsewhere: str


def _pip(option: str) -> Callable[[str, str], list[str]]:
    base = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", option]
    return lambda spec, folder: [*base, "--dest", folder, spec]


def _pip_client(option: str, *suffixes: str) -> Client:
    said, settings = "python -m pip download --no-deps", "pip's index settings (pip config list)"
    return Client(None, "{}=={}".format, _pip(option), suffixes, said, _PIP, settings)


CLIENTS: dict[str, Client] = {
    # a wheel never runs its own code on the way; an sdist is asked for only where no wheel has the member
    "wheel": _pip_client("--only-binary=:all:", ".whl"),
    "sdist": _pip_client("--no-binary=:all:", ".tar.gz", ".zip"),
    "npm": Client(
        "npm",
        "{}@{}".format,
        lambda spec, folder: ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", folder, spec],
        (".tgz",),
        "npm pack",
        _NPM,
        "npm's registry settings (npm config list)",
    ),
    # without a version: apt offers the one of the system's release and no other
    "debian": Client(
        "apt-get",
        lambda package, _: package,
        lambda spec, folder: ["apt-get", "download", "--quiet", spec],
        (".deb",),
        "apt-get download",
        _APT,
        "apt's sources (apt-cache policy)",
    ),
}


def fetch(package: str, version: str, folder: Path, kind: Kind) -> Path:
    """The archive that the client downloads into `folder`, which is made; for Debian its content as a tar file.

    Raises:
        RuntimeError: if a program is missing or fails: one line with what it said and what to do.
    """
    client = CLIENTS[kind]
    spec = client.spec(package, version)
    folder.mkdir(parents=True, exist_ok=True)
    # without a terminal, pip fails where it would ask for a password
    done = _run(client.command(spec, str(folder)), folder, spec, client.program)
    found = sorted(path for path in folder.glob("*") if path.name.endswith(client.suffixes))
    if done.returncode != 0 or len(found) != 1:
        raise RuntimeError(_failure(spec, done, kind))
    return _unpacked_deb(found[0], spec) if kind == "debian" else found[0]


def _run(command: list[str], folder: Path, spec: str, program: str | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, cwd=folder
        )
    except FileNotFoundError as error:
        raise RuntimeError(
            f"{spec}: needs the program {program}, which is not installed. Only this sample needs it: install "
            f"{program}, or use your own data instead"
        ) from error


def _unpacked_deb(archive: Path, spec: str) -> Path:
    """The data of a Debian package as a tar file, in place of the package; dpkg-deb knows its compressions."""
    target = archive.with_suffix(".tar")
    with target.open("wb") as out:
        try:
            done = subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=out, stderr=subprocess.PIPE, check=False
            )
        except FileNotFoundError as error:
            raise RuntimeError(f"{spec}: needs the program dpkg-deb, which is not installed") from error
    if done.returncode != 0:
        said = bytes(done.stderr or b"").decode(errors="replace").strip().replace("\n", "; ")
        raise RuntimeError(f"{spec}: {archive.name} cannot be unpacked by dpkg-deb ({said}); nothing was kept")
    archive.unlink()
    return target


def _failure(spec: str, done: subprocess.CompletedProcess[str], kind: Kind) -> str:
    client = CLIENTS[kind]
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-1:] or [f"no {kind} came"]
    said = "; ".join(errors)
    everything = "\n".join(lines)
    fitting = [advice for sign, advice in client.advice if re.search(sign, everything)]
    todo = fitting[0] if fitting else "run that command to see why"
    return f"{spec} could not be downloaded with `{client.said} {spec}` ({said}): {todo}"

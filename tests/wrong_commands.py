"""Wrong commands as users type them, each with the words that its one line has to hold, and what it takes to end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tests.tiny import adapted, unet
from tests.trainer_cases import text

from cntlora.lab.recipes.captioning.tiny import tiny_vlm
from cntlora.lab.recipes.diffusion.tiny import stable_diffusion
from cntlora.lab.recipes.text.tiny import tiny_encoder, tiny_language_model, write_rows
from cntlora.lab.recipes.vision.models import tiny_backbone

STUDIES = Path(__file__).parents[1] / "studies"
NUMBERS = "expected whole numbers with commas between"


@dataclass(frozen=True)
class Wrong:
    """A command that cannot be done.

    Attributes:
        command: its first word, or "recipes" for `cntlora run` with one of the `my_*.toml`.
        what: what is wrong with it.
        arguments: after `cntlora`, in the folder that `prepare` has filled.
        says: words of the message.
    """

    command: str
    what: str
    arguments: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code, its lines on both streams, and its seconds of CPU and of the clock."""

    code: int
    lines: tuple[str, ...]
    cpu: float
    wall: float


def run(arguments: tuple[str, ...], folder: Path) -> Ended:
    """Run `cntlora` in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cntlora", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(done.returncode, tuple((done.stdout + done.stderr).splitlines()), cpu, wall)


def is_clear(wrong: Wrong, ended: Ended) -> bool:
    """Return whether a command ended with exit code 1 and the one line that was expected."""
    return (
        ended.code == 1
        and len(ended.lines) == 1
        and ended.lines[0].startswith("cntlora: ")
        and (wrong.says in ended.lines[0])
    )


def prepare(folder: Path) -> None:
    """Fill a folder with tiny models, data right and wrong, and adapters."""
    texts = [text(i, 6) for i in range(60)]
    tiny_encoder("bert", folder / "encoder", texts)
    tiny_language_model(folder / "llm", texts)
    tiny_backbone(folder / "backbone")
    stable_diffusion(folder / "pipeline")
    tiny_vlm("llava", folder / "vlm")
    _experiments(folder)
    _tables(folder, texts)
    _images(folder)
    _adapters(folder)


def _experiments(folder: Path) -> None:
    for name in ("my_texts", "my_language", "my_images", "my_subject", "my_captions"):
        (folder / f"{name}.toml").write_bytes((STUDIES / f"{name}.toml").read_bytes())
    task = '[task]\nname = "text"\nmodel = "encoder"\ndata = "rows.csv"\neval_size = 10\n'
    sweep = '[sweep]\nmethods = ["lora", "self"]\nlearning_rates = [1e-3]\nseeds = [0]\n'
    (folder / "mine.toml").write_text(task + sweep)
    (folder / "broken.toml").write_text("[task\n")


def _tables(folder: Path, texts: list[str]) -> None:
    rows = "".join(f"{line},{i % 3}\n" for i, line in enumerate(texts))
    (folder / "rows.csv").write_text(f"text,label\n{rows}")
    (folder / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    (folder / "one_class.csv").write_text("text,label\n" + "".join(f"{line},1\n" for line in texts))
    (folder / "ragged.csv").write_text("text,label\na, b, c,1\nd,0\n")
    scores = "".join(f"{line},{i / 7:.3f}\n" for i, line in enumerate(texts))
    (folder / "scores.csv").write_text(f"text,label\n{scores}")
    (folder / "reviews.xlsx").write_bytes(b"PK")
    write_rows(folder / "chats.jsonl", [{"prompt": line, "completion": line} for line in texts])
    write_rows(folder / "asked.jsonl", [{"question": line, "answer": line} for line in texts])
    write_rows(folder / "open.jsonl", [{"messages": [{"role": "user", "content": line}]} for line in texts])
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_rows(folder / "captions.jsonl", [{"image": f"absent-{i}.png", "caption": "a thing"} for i in range(30)])


def _images(folder: Path) -> None:
    for kind in ("cats", "dogs"):
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (24, 24), (i * 9, 40, 90)).save(folder / "photos" / kind / f"{i}.png")
    (folder / "flat").mkdir()
    (folder / "broken" / "cats").mkdir(parents=True)
    (folder / "broken" / "dogs").mkdir()
    for i in range(5):
        Image.new("RGB", (24, 24), (i * 9, 40, 90)).save(folder / "flat" / f"{i}.png")
        for kind in ("cats", "dogs"):
            Image.new("RGB", (24, 24), (i * 9, 40, 90)).save(folder / "broken" / kind / f"{i}.png")
    (folder / "broken" / "dogs" / "9.png").write_bytes(b"no image")
    (folder / "nothing").mkdir()
    write_rows(folder / "told.jsonl", [{"image": f"photos/cats/{i % 12}.png", "caption": "a cat"} for i in range(30)])


def _adapters(folder: Path) -> None:
    adapted("llama").save_pretrained(folder / "text-adapter")
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(unet(), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    made.save_pretrained(folder / "adapter")
    (folder / "no-weights").mkdir()
    config = (folder / "adapter" / "adapter_config.json").read_text()
    (folder / "no-weights" / "adapter_config.json").write_text(config)
    (folder / "cut").mkdir()
    (folder / "cut" / "adapter_config.json").write_text(config)
    whole = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "cut" / "adapter_model.safetensors").write_bytes(whole[:200])
    (folder / "ia3").mkdir()
    (folder / "ia3" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (folder / "ia3" / "adapter_model.safetensors").write_bytes(whole)
    save_file({"weight": torch.ones(2, 2)}, folder / "other.safetensors")
    (folder / "there.safetensors").write_bytes(whole)
    (folder / "file").write_text("")


def wrong_commands() -> Iterator[Wrong]:
    """All of them; twelve for each command."""
    yield from _init()
    yield from _compare()
    yield from _run()
    yield from _export()
    yield from _recipes()


def _init() -> Iterator[Wrong]:
    def wrong(what: str, says: str, *more: str, model: str = "encoder", data: str = "rows.csv") -> Wrong:
        given = ("--data", data, "--label", "label", "--targets", "query,value", "--out", "out")
        return Wrong("init", what, ("init", model, *given, *more), says)

    yield wrong("a model folder that is not there", "there is no such folder", model="./encodr")
    yield wrong("an adapter in place of the model", "this is an adapter", model="text-adapter")
    yield wrong("a data file that is not there", "there is no such file", data="row.csv")
    yield wrong("a spreadsheet", "expected a name that ends in", data="reviews.xlsx")
    yield wrong("text that is not UTF-8", "iconv -f WINDOWS-1252", data="latin.csv")
    yield wrong("rows with more fields than the header", "quote texts that contain the separator", data="ragged.csv")
    yield wrong("a column that is not there", "there is no column 'stars'", "--label", "stars")
    yield wrong("numbers as classes", "--task regression", data="scores.csv")
    yield wrong("a single class", "one class", data="one_class.csv")
    yield wrong("a rank above the layers' sizes", "rank: 200 is above", "--rank", "200")
    yield wrong("a method misspelt", "did you mean 'self'?", "--method", "slef")
    yield wrong("a layer that the model does not have", "no module named", "--targets", "q_proj")


def _compare() -> Iterator[Wrong]:
    def wrong(what: str, says: str, *more: str, file: str = "mine.toml") -> Wrong:
        return Wrong("compare", what, ("compare", file, "--out", "records", *more), says)

    yield wrong("a method misspelt", "did you mean 'self'?", "--methods", "lora,slef")
    yield wrong("a modifier misspelt", "self+vaz", "--methods", "self+vaz")
    yield wrong("a modifier that the method does not read", "C10", "--methods", "self+C10")
    yield wrong("a method twice", "lora", "--methods", "lora,lora")
    yield wrong("a method of PEFT that is not there", "peft:evaa", "--methods", "peft:evaa")
    yield wrong("no method", "--methods: expected names", "--methods", ",")
    yield wrong("a rate that is no number", "--learning-rates: expected numbers", "--learning-rates", "1e-3,fast")
    yield wrong("a rate of 0", "learning_rates", "--learning-rates", "0")
    yield wrong("a seed that is no whole number", f"--seeds: {NUMBERS}", "--seeds", "0,1.5")
    yield wrong("a shard above the number of shards", "--shard: expected 1/16 to 16/16", "--shard", "17/16")
    yield wrong("options of Ray without it", "are for --engine ray", "--address", "10.0.0.1:6379")
    yield wrong("a tracker that is not known", "tensorbord", "--report-to", "tensorbord")


def _run() -> Iterator[Wrong]:
    def wrong(what: str, says: str, *more: str, file: str = "mine.toml") -> Wrong:
        return Wrong("run", what, ("run", file, "--out", "records", *more), says)

    yield wrong("a file that is not there", "there is no such experiment file", file="min.toml")
    yield wrong("a file that is no TOML", "not TOML", file="broken.toml")
    yield wrong("a setting misspelt", "did you mean 'steps'?", "--set", "train.stepps=3")
    yield wrong("a section misspelt", "did you mean 'train'?", "--set", "trian.steps=3")
    yield wrong("a value of the wrong kind", "expected a whole number", "--set", "train.steps=many")
    yield wrong("a setting without a value", "expected KEY=VALUE", "--set", "train.steps")
    yield wrong("0 steps", "train", "--set", "train.steps=0")
    yield wrong("a task that is not known", "did you mean", "--set", "task.name=txt")
    yield wrong("a model folder that is not there", "there is no such folder", "--model", "./encodr")
    yield wrong("a rank above the layers' sizes", "rank: 200 is above", "--set", "lora.rank=200")
    yield wrong("a layer that the model does not have", "q_proj", "--set", "lora.targets=['q_proj']")
    yield wrong("a folder of records that is a file", "is a file", "--out", "file")


def _export() -> Iterator[Wrong]:
    def wrong(what: str, says: str, adapter: str, *more: str, out: str = "x.safetensors") -> Wrong:
        return Wrong("export", what, ("export", adapter, "--out", out, *more), says)

    yield wrong("a folder that is not there", "there is no such folder", "adaptr")
    yield wrong("a folder without an adapter", "no adapter is there", "nothing")
    yield wrong("a folder without weights", "adapter_model", "no-weights")
    yield wrong("weights that are cut short", "is it cut short?", "cut")
    yield wrong("an adapter that is no LoRA", "IA3", "ia3")
    yield wrong("an adapter of a language model", "needs no export", "text-adapter")
    yield wrong("a file of other weights", "other.safetensors", "other.safetensors")
    yield wrong("a format that is not known", "did you mean 'kohya'?", "adapter", "--format", "koya")
    yield wrong("a name without .safetensors", ".safetensors", "adapter", out="x.bin")
    yield wrong("a file that is there already", "is there already", "adapter", out="there.safetensors")
    yield wrong("a file in a folder that is a file", "is a file", "adapter", out="file/x.safetensors")
    yield wrong("a part that the pipeline does not have", "unett", "adapter", "--component", "unett")


def _recipes() -> Iterator[Wrong]:
    def wrong(what: str, says: str, kind: str, model: str, data: str, *more: str) -> Wrong:
        given = ("--model", model, "--data", data, "--out", "records")
        return Wrong("recipes", f"`my_{kind}.toml`: {what}", ("run", f"my_{kind}.toml", *given, *more), says)

    yield wrong("a column that is not there", "task.label", "texts", "encoder", "rows.csv", "--set", "task.label=stars")
    pairs = ("--set", "task.name=pairs", "--set", "task.eval_size=9")
    yield wrong("pairs whose columns are not named", "task.first", "texts", "encoder", "rows.csv", *pairs)
    yield wrong(
        "more held-out rows than there are",
        "task.eval_size=100 leaves nothing to train on",
        "texts",
        "encoder",
        "rows.csv",
    )
    yield wrong("columns of other names", "question, answer", "language", "llm", "asked.jsonl")
    yield wrong("chats without an answer", "assistant", "language", "llm", "open.jsonl")
    yield wrong("a broken line", "broken.jsonl: line 2", "language", "llm", "broken.jsonl")
    yield wrong("images without folders of classes", "flat", "images", "backbone", "flat")
    yield wrong("a broken image", "9.png", "images", "backbone", "broken")
    yield wrong("a folder without photos", "nothing", "subject", "pipeline", "nothing")
    yield wrong("a model that is no pipeline", "model_index.json", "subject", "encoder", "flat")
    yield wrong("images that are not there", "absent-0.png", "captions", "vlm", "captions.jsonl")
    yield wrong(
        "a model without a vision tower", "expected a vision-language model", "captions", "encoder", "told.jsonl"
    )

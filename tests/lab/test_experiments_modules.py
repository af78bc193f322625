"""The framework on a plain module: targets by regular expression, a head of its own, biases, samples, checkpoints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from cntlora.lab.experiments.run import RunFolder, run_one
from cntlora.lab.experiments.runs import Run, check_record
from cntlora.lab.experiments.settings import from_dict
from cntlora.lab.experiments.tasks import TASKS
from cntlora.lab.recipes.scoring import classifier_metrics
from cntlora.lab.recipes.task import Defaults, Recipe

WIDTH, PATCHES, CLASSES = 16, 5, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return x + weights @ self.value(x)


class Vision(nn.Module):
    """Two blocks of attention over patches, and a head; no configuration, no input_ids."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        x = pixels
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.dropout(x.mean(1)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@dataclass(frozen=True)
class Settings:
    """name, and after how many batches of training reading fails (0: never)."""

    name: str = "trial"
    data: str | None = None


class Augmented:
    """Batches that are other ones in every pass; `fail_after` of them in all are given."""

    def __init__(self, seed: int, fail_after: int) -> None:
        self.seed, self.fail_after, self.passes, self.given = seed, fail_after, 0, 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.passes)
        self.passes += 1
        for _ in range(3):
            if self.given == self.fail_after:
                raise RuntimeError("killed")
            self.given += 1
            pixels = torch.randn(8, PATCHES, WIDTH, generator=generator)
            yield {"pixels": pixels, "labels": pixels.mean(1)[:, :CLASSES].argmax(1)}


@dataclass(frozen=True)
class Trial(Defaults):
    settings: Settings
    fail_after: ClassVar[int] = -1
    metrics: ClassVar[Mapping[str, str]] = {"loss": "min", "accuracy": "max", "macro_f1": "max"}
    main_metric: ClassVar[str] = "accuracy"
    peft_type: ClassVar[str | None] = None
    targets: ClassVar[tuple[str, ...]] = (r"re:blocks\.\d+\.(query|value)",)
    modules_to_save: ClassVar[tuple[str, ...]] = ("head",)

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Vision()
            torch.manual_seed(seed)
            model.head.reset_parameters()
        return model

    def train_batches(self, seed: int) -> Augmented:
        return Augmented(seed, Trial.fail_after)

    def init_batches(self, seed: int) -> Augmented:
        return Augmented(seed, -1)

    def eval_batches(self) -> Iterable[dict[str, Tensor]]:
        return list(Augmented(99, -1))

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        torch.rand(1)  # a look at the model may draw numbers and changes no training all the same
        return classifier_metrics(model, batches)

    def sample(self, model: nn.Module, step: int, folder: Path) -> list[dict[str, Any]]:
        assert not model.training
        if step == 1:
            return []
        (folder / "a.txt").write_text(f"{torch.rand(1).item()}")
        return [
            {"kind": "image", "name": "a", "file": "a.txt", "text": None},
            {"kind": "text", "name": "b", "file": None, "text": f"step {step}"},
        ]


@pytest.fixture(autouse=True)
def trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe in the table of tasks."""
    module = ModuleType("cntlora.lab.recipes.trial")
    module.RECIPES = {"trial": Recipe(Settings, Trial, lambda s, _: s)}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TASKS, "trial", ("trial", "vision"))
    monkeypatch.setattr(Trial, "fail_after", -1)


def run_of(method: str, **sections: Any) -> Run:
    values = {
        "task": {"name": "trial"},
        "lora": {"rank": 2, "alpha": 4, "bias": "all", **sections.pop("lora", {})},
        "init": {"num_batches": 3},
        "train": {"steps": 7, "warmup": 1, "eval_at": [0, 4], **sections.pop("train", {})},
        "sweep": {"methods": [method]},
    }
    return Run(from_dict({**values, **sections}), method, 1e-2, 0)


ARMS = ["full", "lora", "self", "cross+vas", "self+dora", "eva", "lora_ga", "corda"]
PEERS = ["peft:eva", "peft:corda", "peft:lora_ga", "peft:adalora", "peft:pissa"]


@pytest.mark.parametrize("method", [*ARMS, *PEERS])
def test_every_arm_works_without_masks_and_configuration(tmp_path: Path, method: str) -> None:
    record = run_one(run_of(method), tmp_path)
    assert record["status"] == "finished" and len(record["losses"]) == 7
    assert [e["step"] for e in record["evaluations"]] == [0, 4, 7] and record["main_metric"] == "accuracy"
    if record["sites"]:
        assert set(record["sites"]) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("query", "value")}
    biases = 2 * 3 * WIDTH
    head = CLASSES * (WIDTH + 1)
    if method == "lora":
        assert record["trainable_parameters"] == 4 * 2 * 2 * WIDTH + biases + head
    assert list(tmp_path.iterdir()) == []  # no samples, no checkpoint: nothing stays


def test_an_arm_with_a_fitted_head_begins_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = {"num_batches": 3}
    plain, fitted = (run_one(run_of(m, init=init), tmp_path) for m in ("lora", "lora+head"))
    before, after = (record["evaluations"][0]["loss"] for record in (plain, fitted))
    assert after < before - 0.05 and fitted["config"]["fit_head"] and fitted["config"]["num_batches"] == 3
    assert fitted["trainable_parameters"] == plain["trainable_parameters"]
    monkeypatch.setattr(Trial, "modules_to_save", ())
    with pytest.warns(UserWarning, match=r"\+head: the head is left as it is: no linear layer trains"):
        run_one(run_of("self+head"), tmp_path)


def test_without_bias_and_with_names_other_parameters_train(tmp_path: Path) -> None:
    record = run_one(run_of("lora", lora={"bias": "none", "targets": ["key"]}), tmp_path)
    assert set(record["sites"]) == {"blocks.0.key", "blocks.1.key"}
    assert record["trainable_parameters"] == 2 * 2 * 2 * WIDTH + CLASSES * (WIDTH + 1)


def test_samples_lie_beside_the_record_and_change_no_training(tmp_path: Path) -> None:
    run = run_of("self", train={"sample_at": [0, 1, 6]})
    record = run_one(run, tmp_path)
    assert [(s["step"], s["kind"], s["name"], s["text"]) for s in record["samples"]] == [
        (0, "image", "a", None), (0, "text", "b", "step 0"), (6, "image", "a", None), (6, "text", "b", "step 6"),
    ]  # fmt: skip
    files = [s["file"] for s in record["samples"] if s["file"]]
    assert files == [f"{run.name}/step-0000/a.txt", f"{run.name}/step-0006/a.txt"]
    assert all((tmp_path / name).is_file() for name in files) and not (tmp_path / run.name / "step-0001").exists()
    assert run_one(run_of("self"), tmp_path / "other")["losses"] == record["losses"]


@pytest.mark.parametrize("method", ["lora", "self", "self+subtract", "peft:pissa"])
def test_the_saved_adapter_is_the_trained_model(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[nn.Module] = []
    monkeypatch.setattr(Trial, "evaluate", lambda self, model, batches: trained.append(model) or {"loss": 0.0})
    run = dataclasses.replace(run_of(method), save_adapter=True)
    run_one(run, tmp_path)
    folder = tmp_path / run.name / "adapter"
    batch = next(iter(Augmented(5, -1)))
    base = Trial(Settings()).build_model(0).eval()
    before = base(**batch).logits
    loaded = PeftModel.from_pretrained(base, folder).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        expected = trained[-1].eval()(**batch).logits
        if method != "peft:pissa":  # PEFT's own PiSSA needs PEFT's own residual base
            torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_an_adapter_is_kept_before_the_last_evaluation_which_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(run_of("self"), save_adapter=True)
    run_one(run, tmp_path / "whole")
    file = f"{run.name}/adapter/adapter_model.safetensors"
    scores: list[dict[str, float]] = []

    def fails(self: Trial, model: nn.Module, batches: object) -> dict[str, float]:
        if not scores:
            raise RuntimeError("no memory for the scores")
        return scores.pop()

    monkeypatch.setattr(Trial, "evaluate", fails)
    for name, count in (("at the end", len(run.experiment.train.eval_at)), ("at the start", 0)):
        scores += [{"loss": 0.0}] * count
        with pytest.raises(RuntimeError, match="no memory"):
            run_one(run, tmp_path / name)
    assert (tmp_path / "at the end" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "at the start" / file).exists()  # the control: nothing is trained yet


def test_an_adapter_of_a_killed_process_is_written_again(tmp_path: Path) -> None:
    """A checkpoint is continued, and what the kill left of a file goes."""
    run = run_of("self")
    train = dataclasses.replace(run.experiment.train, save_every=1)
    run = dataclasses.replace(run, save_adapter=True, experiment=dataclasses.replace(run.experiment, train=train))
    folder = tmp_path / run.name
    RunFolder(tmp_path, run).prepare()
    (folder / "adapter").mkdir()
    (folder / ".adapter.abcdefgh.cntlora").mkdir()
    run_one(run, tmp_path)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not list(folder.glob(".*"))


def test_adalora_leaves_the_signature_that_generation_looks_at() -> None:
    from cntlora.lab.experiments.adapting import adapt

    task = Trial(Settings())
    adapted = adapt(run_of("peft:adalora"), task, task.build_model(0), task.init_batches(0), 7)
    before = inspect.signature(adapted.scored.forward)
    assert adapted.adalora is not None
    with adapted.adalora.running():
        assert inspect.signature(adapted.scored.forward) == before and "pixels" in before.parameters


def test_no_adapter_is_kept_unless_asked_for_or_where_there_is_none(tmp_path: Path) -> None:
    run_one(run_of("lora"), tmp_path)
    run_one(dataclasses.replace(run_of("full"), save_adapter=True), tmp_path)
    assert list(tmp_path.iterdir()) == []
    run = dataclasses.replace(run_of("peft:adalora"), save_adapter=True)
    run_one(run, tmp_path)
    assert (tmp_path / run.name / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("method", ["lora", "self", "self+paired", "cross+vas", "self+dora", "peft:pissa", "full"])
def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(method, train={"save_every": 2, "sample_at": [2, 6]})
    whole = run_one(run, tmp_path / "whole")
    monkeypatch.setattr(Trial, "fail_after", 5)
    with pytest.raises(RuntimeError, match="killed"):
        run_one(run, tmp_path / "out")
    checkpoint = tmp_path / "out" / run.name / "checkpoint"
    assert (checkpoint / "checkpoint-4").is_dir()
    monkeypatch.setattr(Trial, "fail_after", -1)
    state = checkpoint / "checkpoint-4" / "trainer_state.json"
    marked = json.loads(state.read_text())
    marked["stateful_callbacks"]["Recorder"]["losses"][0] = 123.0
    state.write_text(json.dumps(marked))
    record = run_one(run, tmp_path / "out")
    assert record["losses"][0] == 123.0  # the control: it did go on from there
    assert record["losses"][1:] == whole["losses"][1:]
    assert [e["accuracy"] for e in record["evaluations"]] == [e["accuracy"] for e in whole["evaluations"]]
    assert record["samples"] == whole["samples"]
    assert not checkpoint.exists() and (tmp_path / "out" / run.name / "step-0002").is_dir()
    if method != "full":
        assert [s["cosine"] for s in record["sites"].values()] == [s["cosine"] for s in whole["sites"].values()]


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "fail_after", 5)
    with pytest.raises(RuntimeError, match="killed"):
        run_one(run_of("lora", train={"save_every": 2}), tmp_path)
    monkeypatch.setattr(Trial, "fail_after", -1)
    other = run_of("lora", train={"save_every": 2}, lora={"rank": 3})
    assert run_one(other, tmp_path)["losses"] == run_one(other, tmp_path / "new")["losses"]


def test_epochs_and_full_fine_tuning_options(tmp_path: Path) -> None:
    train = {"steps": None, "warmup": None, "epochs": 2.0, "warmup_epochs": 0.5, "eval_at": [1], "schedule": "cosine",
             "precision": "bfloat16", "weight_decay": 0.05, "layer_decay": 0.75}  # fmt: skip
    records = {
        (method, decay): run_one(run_of(method, train={**train, "layer_decay": decay}), tmp_path)
        for method in ("full", "lora")
        for decay in (0.0, 0.75)
    }
    for record in records.values():
        assert len(record["losses"]) == 6 and [e["step"] for e in record["evaluations"]] == [3, 6]
    assert records["full", 0.0]["losses"] != records["full", 0.75]["losses"]
    assert records["lora", 0.0]["losses"] == records["lora", 0.75]["losses"]  # of full fine-tuning only


def test_options_that_came_later_leave_old_records_valid() -> None:
    run = run_of("lora")
    config = run.config()
    for key in ("bias",):
        del config["lora"][key]
    with pytest.raises(ValueError, match="lora.bias is missing there and 'all'"):
        check_record(Path("r.json"), {"config": config}, run)
    for key in ("epochs", "sample_at", "schedule", "precision", "layer_decay", "save_every", "warmup_epochs"):
        del config["train"][key]
    check_record(Path("r.json"), {"config": config}, run_of("lora", lora={"bias": "none"}))


@pytest.mark.slow
def test_after_sigkill_the_command_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    from cntlora.lab.recipes.text.sentiment import TweetsSettings, tiny

    made = tiny(TweetsSettings(), tmp_path)
    path = tmp_path / "trial.toml"
    path.write_text(
        f'[task]\nmodel = "{made.model}"\ndata = "{made.data}"\neval_size = 6\nbatch_size = 4\n'
        "[train]\nsteps = 80\nsave_every = 5\neval_at = [0, 40]\n"
        '[sweep]\nmethods = ["self"]\nlearning_rates = [1e-3]\nseeds = [0]\n'
    )
    command = [sys.executable, "-m", "cntlora.cli.app", "run", str(path), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    run = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / "self-lr0.001-seed0" / "checkpoint"
    end = time.monotonic() + 120
    while not (checkpoints / "checkpoint-15").exists() and time.monotonic() < end:
        time.sleep(0.01)
    run.kill()
    run.wait()
    time.sleep(1)  # the run's own process notices and ends
    assert checkpoints.is_dir() and not list((tmp_path / "out").glob("*.json"))
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    records = [json.loads((tmp_path / f / "self-lr0.001-seed0.json").read_text()) for f in ("whole", "out")]
    assert records[0]["losses"] == records[1]["losses"] and len(records[0]["losses"]) == 80
    assert [e["loss"] for e in records[0]["evaluations"]] == [e["loss"] for e in records[1]["evaluations"]]
    assert not checkpoints.exists()

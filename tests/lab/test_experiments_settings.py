"""Experiment files: differences from documented defaults; wrong keys, types and values are named."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from cntlora.lab.experiments.runs import Run, runs_of
from cntlora.lab.experiments.sections import LoraSettings, Override, SweepSettings
from cntlora.lab.experiments.settings import Experiment, from_dict, load_experiment, replaced, smoke
from cntlora.lab.recipes.text.sentiment import TweetsSettings
from cntlora.lab.recipes.train_settings import TrainSettings

SECTIONS = [Experiment, TweetsSettings, LoraSettings, TrainSettings, SweepSettings, Override]


def written(folder: Path, text: str) -> Path:
    path = folder / "trial.toml"
    path.write_text(text)
    return path


def test_a_file_holds_differences_from_the_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, "[lora]\nrank = 4\nalpha = 8\n[train]\neval_at = [0, 100]"))
    assert experiment.name == "trial"
    assert experiment.lora == LoraSettings(rank=4, alpha=8.0)
    assert experiment.train == TrainSettings(eval_at=(0, 100))
    assert experiment.task == TweetsSettings() and experiment.sweep == SweepSettings()
    assert json.loads(json.dumps(experiment.to_dict()))["lora"]["rank"] == 4


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_setting_is_documented_and_has_a_default(section: Any) -> None:
    for field in dataclasses.fields(section):
        assert field.name in section.__doc__.replace(",", " ").replace(":", " ").split()
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tsk]", "'tsk' is not known .did you mean 'task'"),
        ("[task]\nbatchsize = 3", "did you mean 'batch_size'"),
        ("[lora]\nrnak = 3", "did you mean 'rank'"),
        ("[train]\nstep = 3", "did you mean 'steps'"),
        ("[init]\nnum_batch = 3", "did you mean 'num_batches'"),
        ("[sweep]\nmethod = ['self']", "did you mean 'methods'"),
        ("[sweep.overrides.self]\nlearning_rate = [1]", "did you mean 'learning_rates'"),
        ("[sweep.overrides.slef]\nseeds = [1]", "did you mean 'self'"),
        ("[sweep]\nmethods = ['slef']", "did you mean 'self'"),
        ("[task]\nbatch_size = 'many'", "task.batch_size: expected a whole number"),
        ("[task]\nbatch_size = 2.5", "task.batch_size: expected a whole number"),
        ("[task]\nbatch_size = true", "task.batch_size: expected a whole number"),
        ("[task]\nbatch_size = 0", "task.batch_size: expected at least 1"),
        ("[lora]\nalpha = '16'", "lora.alpha: expected a number"),
        ("[lora]\nalpha = 0", "lora.alpha"),
        ("[lora]\nalpha = nan", "lora.alpha"),
        ("[lora]\ntargets = 'query'", "lora.targets: expected a list"),
        ("[lora]\ntargets = [1]", "lora.targets: expected text"),
        ("[train]\nwarmup = 101", "train.warmup: expected at most train.steps=100"),
        ("[train]\neval_at = [101]", "train.eval_at"),
        ("[train]\nsteps = 3\nepochs = 1.0", "train.steps: train.epochs is there too"),
        ("[train]\nwarmup = 3\nwarmup_epochs = 1.0", "train.warmup: train.warmup_epochs is there too"),
        ("[train]\nepochs = 2\neval_at = [3]", "train.eval_at: expected epochs from 0 to train.epochs=2"),
        ("[train]\nepochs = 2\nwarmup_epochs = 3", "train.warmup_epochs: expected at most train.epochs=2"),
        ("[train]\nsample_at = [101]", "train.sample_at"),
        ("[train]\nschedule = 'cosin'", "did you mean 'cosine'"),
        ("[train]\nprecision = 'bfloat'", "did you mean 'bfloat16'"),
        ("[train]\nlayer_decay = 2", "train.layer_decay"),
        ("[lora]\nbias = 'al'", "did you mean 'all'"),
        ("[lora]\ntargets = ['re:a.*', 'b']", "stands alone"),
        ("[task]\nname = 'tweet'", "did you mean 'tweets'"),
        ("[task]\nname = 'tweets'\nimage = 'x'", "key of .task."),
        ("[smoke.tsak]\nrank = 1", "did you mean 'task'"),
        ("[smoke.lora]\nrnak = 1", "did you mean 'rank'"),
        ("task = 3", r"task: expected a section"),
        ("train = 3", r"train: expected a section \[train\]"),
        ("[sweep]\nlearning_rates = []", "expected at least one"),
        ("[sweep]\nlearning_rates = [-1.0]", "sweep.learning_rates"),
        ("[sweep]\nlearning_rates = ['a']", "sweep.learning_rates: expected a number"),
        ("[sweep]\nseeds = [0, 0]", "comes twice"),
        ("[sweep]\nseeds = [-1]", "at least 0"),
        ("[sweep]\nmethods = ['dora', 'lora+dora']", "the same arm"),
        ("[init]\nmethod = 'self'", "init.method"),
        ("[init]\np = 2.0", "p: expected"),
        ("name = '../up'", "the name of a folder"),
        ("[task", "not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_experiment(written(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "trial.toml"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.toml"):
        load_experiment(tmp_path / "none.toml")


GRID = {
    "sweep": {
        "methods": ["lora", "full"],
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "overrides": {"full": {"learning_rates": [1e-5]}},
    }
}


def cells(experiment: Experiment) -> list[tuple[str, float, int]]:
    return [(run.method, run.learning_rate, run.seed) for run in runs_of(experiment)]


def test_runs_are_the_grid_with_overrides() -> None:
    assert cells(from_dict(GRID)) == [
        ("lora", 1e-3, 0), ("lora", 1e-2, 0), ("full", 1e-5, 0),
        ("lora", 1e-3, 1), ("lora", 1e-2, 1), ("full", 1e-5, 1),
    ]  # fmt: skip


def test_the_command_lines_grid_wins_over_overrides() -> None:
    experiment = replaced(from_dict(GRID), learning_rates=[1e-4], seeds=None, methods=["full"])
    assert cells(experiment) == [("full", 1e-4, 0), ("full", 1e-4, 1)]


def test_smoke_is_one_short_run_a_method_on_a_tiny_model(tmp_path: Path) -> None:
    values = {
        **GRID, "train": {"epochs": 50, "eval_at": [25], "sample_at": [5], "warmup_epochs": 3},
        "lora": {"rank": 64, "alpha": 128}, "init": {"num_batches": 9, "rank_budget": 500},
        "smoke": {"task": {"max_length": 7}, "lora": {"dropout": 0.5}},
    }  # fmt: skip
    experiment = smoke(from_dict(values), tmp_path)
    assert cells(experiment) == [("lora", 1e-3, 0), ("full", 1e-5, 0)]
    train = experiment.train
    assert (train.steps, train.epochs, train.warmup, train.eval_at, train.sample_at) == (2, None, 1, (2,), (2,))
    assert experiment.lora == LoraSettings(rank=4, alpha=8.0, dropout=0.5) and experiment.init == {"num_batches": 4}
    assert experiment.task.max_length == 7 and Path(experiment.task.model, "config.json").stat().st_size < 5000
    assert Path(experiment.task.data).parent == tmp_path


@pytest.mark.parametrize(
    ("train", "steps", "warmup", "eval_at"),
    [
        ({}, 100, 10, (1,)),
        ({"steps": 40, "warmup_epochs": 0.5}, 40, 5, (1,)),
        ({"epochs": 3}, 30, 10, (10,)),
        ({"epochs": 3, "warmup_epochs": 0.6, "gradient_accumulation": 2}, 15, 3, (5,)),
        ({"epochs": 0.5}, 5, 5, ()),
    ],
)
def test_epochs_become_updates(train: dict[str, Any], steps: int, warmup: int, eval_at: tuple[int, ...]) -> None:
    settings = from_dict({"train": {**train, "eval_at": [1] if eval_at else []}}).train
    counted = settings.in_updates(range(10))
    assert (counted.steps, counted.warmup, counted.eval_at) == (steps, warmup, eval_at)
    assert (counted.epochs, counted.warmup_epochs) == (None, None) and counted.in_updates([]) == counted


def test_changes_are_put_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nsteps = 40\nwarmup = 5\n[task]\nname = 'tweets'")
    changes = ["lora.rank=4", "train.epochs=3", "task.data=photos/", "lora.targets=['a', 'b']", "init.p = 0.25"]
    changed = load_experiment(path, changes)
    assert changed.lora == LoraSettings(rank=4, targets=("a", "b")) and changed.task.data == "photos/"
    assert changed.train == TrainSettings(epochs=3.0, warmup=5) and changed.init == {"p": 0.25}
    for change, message in [("lora.rnak=4", "did you mean 'rank'"), ("rank", "KEY=VALUE"), ("title.x=1", "no section")]:
        with pytest.raises(ValueError, match=message):
            load_experiment(written(tmp_path, "title = 'a'"), [change])


def test_data_is_told_apart_by_what_lies_on_disk(tmp_path: Path) -> None:
    def digest(data: str | None) -> Any:
        return Run(from_dict({"task": {"data": data}}), "lora", 1e-3, 0).config()["task"]["data_sha256"]

    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"a")
    before = digest(str(folder))
    assert before == digest(str(folder)) is not None
    (folder / "cat" / "2.png").write_bytes(b"b")
    assert digest(str(folder)) != before
    assert digest(None) is digest("sample:tweets") is digest("nyu-mll/glue:cola") is None
    for missing in ("none.csv", "./none", "photos/"):
        with pytest.raises(FileNotFoundError, match=r"task.data: there is no file or folder"):
            digest(missing)


def test_the_configuration_of_a_run_is_all_that_matters_to_it() -> None:
    """A sweep may grow without making its records stale; what a run depends on is in them."""
    experiment = from_dict({**GRID, "init": {"num_batches": 3}})
    run = Run(experiment, "self+vas", 1e-3, 7)
    config = run.config()
    assert json.loads(json.dumps(config)) == config
    assert config["init"]["num_batches"] == 3 and config["init"]["adaptive_ranks"] and config["init"]["seed"] == 7
    assert Run(replaced(experiment, methods=["self"]), "self+vas", 1e-3, 7).config() == config
    assert Run(from_dict(GRID), "self+vas", 1e-3, 7).config() != config  # the control
    assert Run(experiment, "lora", 1e-3, 7).config() == Run(from_dict(GRID), "lora", 1e-3, 7).config()
    assert Run(experiment, "peft:eva", 1e-3, 7).config()["num_batches"] == 3


def test_file_names() -> None:
    assert Run(Experiment(), "peft:eva+dora", 1e-3, 2).name == "peft-eva+dora-lr0.001-seed2"


FILE = "[train]\nsteps = 40\nwarmup = 30\neval_at = [10, 20, 40]\nsample_at = [40]"


def test_a_shorter_training_fits_what_the_file_says_of_it(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    with pytest.warns(UserWarning) as told:
        train = load_experiment(path, ["train.steps=20"]).train
    assert (train.steps, train.eval_at, train.sample_at, train.warmup) == (20, (10, 20), (20,), 2)
    said = " ".join(str(warning.message) for warning in told)
    assert "train.eval_at=[10, 20, 40] became [10, 20] with train.steps=20" in said and "train.warmup=30" in said
    assert "train.sample_at=[40] became [20] with train.steps=20" in said  # or a short trial would show no sample
    train = load_experiment(path, ["train.steps=80"]).train  # the control: nothing to change, nothing said
    assert (train.eval_at, train.warmup) == ((10, 20, 40), 30)
    with pytest.warns(UserWarning, match="warmup=10 became 0"):  # the default's, which no file has to name
        assert load_experiment(written(tmp_path, "title = 'x'"), ["train.steps=5"]).train.warmup == 0


def test_the_warm_up_that_nobody_asked_for_is_no_longer_than_the_training() -> None:
    assert [TrainSettings(steps=steps).warmup for steps in (1, 9, 10, 200)] == [0, 0, 10, 10]
    assert TrainSettings(epochs=1.0).warmup == 10 and TrainSettings(steps=2, warmup=2).warmup == 2
    with pytest.raises(ValueError, match="train.warmup: expected at most train.steps=2, got 10"):  # the control
        TrainSettings(steps=2, warmup=10)


def test_what_is_put_over_a_file_is_checked_and_not_fitted(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    for change in ("train.eval_at=[30]", "train.warmup=30"):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"train\.steps=20, got"):
            warnings.simplefilter("error")  # the error is all that is said
            load_experiment(path, ["train.steps=20", change])


def test_epochs_for_steps_leave_no_moment_in_the_other_unit(tmp_path: Path) -> None:
    path = written(tmp_path, FILE.replace("warmup = 30", "warmup = 5"))
    with pytest.warns(UserWarning, match=r"eval_at=\[10, 20, 40\] became \[\]"):
        train = load_experiment(path, ["train.epochs=50"]).train
    assert (train.eval_at, train.sample_at) == ((), (50,))
    with pytest.warns(UserWarning, match=r"sample_at=\[40\] became \[\]"):  # no whole number of epochs names this end
        assert load_experiment(path, ["train.epochs=1.5"]).train.sample_at == ()

"""`cntlora run`, `compare` and `report`: what they print, exit codes, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from cntlora.cli import experiments as cli_experiments
from cntlora.lab.experiments import sweep as sweep_module
from cntlora.lab.experiments.environment import machine
from cntlora.lab.experiments.runs import Run, failed, frame, path_of
from cntlora.lab.experiments.settings import load_experiment
from cntlora.lab.experiments.sweep import Sweep, plan_sweep
from cntlora.lab.record import write_record

app = typer.Typer()
cli_experiments.register(app)

FILE = """
[lora]
rank = 4
[sweep]
methods = ["lora", "self"]
learning_rates = [1e-3, 1e-2]
seeds = [0, 1]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment file in an empty working directory, and sweeps without processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "run_sweep", in_process)
    path = tmp_path / "trial.toml"
    path.write_text(FILE)
    return path


def in_process(experiment: Any, out: Path, *, jobs: int, listener: Any, say: Any, begin: Any, **options: bool) -> Sweep:
    """Stand in for `run_sweep`, with made-up outcomes: "self" is better, and seed 9 fails."""
    del options["save_adapters"], options["cluster"]
    todo = plan_sweep(experiment, out, **options)
    sweep = Sweep(len(todo.pending), todo.present, jobs)
    for run in todo.pending:
        made = outcome(run)
        if begin and not sweep.records:
            begin(sweep)
        sweep.records.append(made)
        write_record(path_of(out, run), sweep.records[-1])
        listener(sweep, sweep.records[-1])
    return sweep


def outcome(run: Run) -> dict[str, Any]:
    if run.seed == 9:
        return failed(run, machine(), "no luck")
    loss = (0.5 if run.method == "self" else 0.75) + run.learning_rate
    metrics = {"loss": loss, "accuracy": 1 - loss / 2, "macro_f1": 1 - loss / 2}
    measured = {
        "mean_loss": loss, "losses": [loss] * 4, "seconds": [1.0, 2.0, 3.0, 4.0], "init_seconds": 0.5,
        "train_seconds": 4.0, "evaluations": [{"step": 4, "seconds": 4.0, **metrics}],
    }  # fmt: skip
    return {**frame(run, machine()), "status": "finished", **measured}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_run_writes_all_records_and_says_so(file: Path) -> None:
    done = call("run", file)
    assert done.exit_code == 0, done.output
    assert len(list(Path("results/trial").glob("*.json"))) == 8
    assert "8 runs" in done.stdout and "8 finished" in done.stdout and "results/trial" in done.stdout
    assert "[3/8] CNTLoRA-S (self), lr 0.001, seed 0: mean loss 0.5010, macro_f1 0.7" in done.stderr
    again = call("run", file, "--json")
    assert json.loads(again.stdout)["runs"] == 0 and json.loads(again.stdout)["present"] == 8


def test_compare_takes_a_grid_and_prints_each_method_at_its_best(file: Path, tmp_path: Path) -> None:
    done = call("compare", file, "--methods", "self, cross+vas", "--learning-rates", "3e-3,1e-1", "--seeds", "5",
                "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    names = {"self-lr0.003-seed5", "self-lr0.1-seed5", "cross+vas-lr0.003-seed5", "cross+vas-lr0.1-seed5"}
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == names
    row = next(line for line in done.stdout.splitlines() if line.startswith("CNTLoRA-S"))
    assert "0.003" in row and "0.503" in row and "CNTLoRA-X + VAS" in done.stdout


def test_dry_run_lists_and_runs_nothing(file: Path) -> None:
    done = call("run", file, "--dry-run")
    assert done.exit_code == 0 and "to run   self-lr0.01-seed1" in done.stdout and "0 present" in done.stdout
    assert not Path("results").exists()
    call("run", file)
    assert "8 present" in call("compare", file, "--dry-run").stdout
    listed = json.loads(call("compare", file, "--seeds", "1,2", "--dry-run", "--json").stdout)
    assert listed["present"] == 4 and len(listed["pending"]) == 4


def test_smoke_leaves_nothing_behind_unless_asked(file: Path, tmp_path: Path) -> None:
    done = call("compare", file, "--smoke")
    assert done.exit_code == 0 and "2 runs" in done.stdout and not Path("results").exists()
    call("run", file, "--smoke", "--out", tmp_path / "tried")
    assert len(list((tmp_path / "tried").glob("*.json"))) == 2


def test_smoke_makes_a_tiny_model_and_takes_it_away(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def seen(experiment: Any, out: Path, **options: Any) -> Sweep:
        made.append(Path(experiment.task.model))
        assert (made[-1] / "config.json").is_file() and experiment.train.steps == 2 and options["save_adapters"]
        return in_process(experiment, out, **options)

    monkeypatch.setattr(sweep_module, "run_sweep", seen)
    assert call("run", file, "--smoke", "--save-adapters").exit_code == 0
    assert made and not made[0].exists()


def test_smoke_runs_side_by_side_and_others_as_asked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seen(experiment: Any, out: Path, **options: Any) -> Sweep:
        asked.append(options["jobs"])
        return in_process(experiment, out, **options)

    monkeypatch.setattr(sweep_module, "run_sweep", seen)
    monkeypatch.setattr("cntlora.lab.experiments.processes.cores", lambda: 3)
    for more in (["--smoke"], ["--smoke", "--jobs", "2"], [], ["--jobs", "2"]):
        assert call("run", file, *more, *(["--out", "out"] if "--smoke" not in more else [])).exit_code == 0
    assert asked == [3, 2, 1, 2]


def test_settings_data_and_model_are_put_over_the_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "a b.csv").write_text("text,label\na,b\n")
    done = call("run", file, "--set", "lora.rank=2", "--set", "train.epochs=3", "--data", "a b.csv", "--model", "m/1",
                "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "lora-lr0.001-seed0.json").read_text())["config"]
    assert (config["lora"]["rank"], config["train"]["epochs"], config["train"]["steps"]) == (2, 3.0, None)
    assert (config["task"]["data"], config["task"]["model"]) == ("a b.csv", "m/1") and config["task"]["data_sha256"]
    plain = call("run", file, "--out", tmp_path / "out")
    assert plain.exit_code == 1 and "task.model is 'm/1' there" in plain.stderr  # the control: others' records


@pytest.mark.parametrize(
    ("more", "folder"),
    [
        ([], "trial"),
        (["--data", "my photos/"], "trial-my-photos"),
        (["--data", "deep/reviews.v2.csv", "--set", "lora.rank=2"], "trial-reviews.v2"),
        (["--data", "owner/name:part"], "trial-name-part"),
        (["--model", "owner/name"], "trial-changed"),
        (["--set", "lora.rank=2"], "trial-changed"),
        (["--set", "lora.rank=2", "--out", "results/trial"], "trial"),
    ],
)
def test_what_is_put_over_the_file_has_a_folder_of_its_own(file: Path, more: list[str], folder: str) -> None:
    Path("my photos").mkdir()
    Path("deep").mkdir()
    Path("deep/reviews.v2.csv").write_text("text,label\na,b\n")
    done = call("run", file, *more)
    assert done.exit_code == 0, done.output
    assert [path.name for path in Path("results").iterdir()] == [folder]
    assert ("records go to" in done.stderr) == (bool(more) and "--out" not in more)


def test_the_files_own_records_are_no_obstacle_to_your_data(file: Path) -> None:
    call("run", file)
    Path("mine.csv").write_text("text,label\na,b\n")
    assert call("run", file, "--data", "mine.csv").exit_code == 0
    assert call("run", file, "--data", "mine.csv", "--out", "results/trial").exit_code == 1  # the control


def test_a_report_of_your_data_does_not_have_the_name_of_ours(file: Path, tmp_path: Path) -> None:
    """The study is called by the data, its command by the file; without other data both are the file's."""
    Path("mine.csv").write_text("text,label\na,1\nb,2\n")
    for more, name in ((["--data", "mine.csv"], "trial-mine"), ([], "trial")):
        folder = tmp_path / name
        assert call("run", file, *more, "--out", folder).exit_code == 0
        records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        assert {record["experiment"] for record in records} == {name}
        assert all(record["command"].startswith("cntlora compare studies/trial.toml ") for record in records)


def test_smoke_looks_at_the_data_that_is_named(file: Path) -> None:
    Path("mine.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)))
    good = call("run", file, "--smoke", "--data", "mine.csv", "--set", "task.eval_size=4")
    assert good.exit_code == 0 and "smoke: mine.csv can be used" in good.stderr
    for more, message in (
        (["--data", "none.csv"], "none.csv"),
        (["--data", "mine.csv", "--set", "task.label=stars"], "no column 'stars'"),
        (["--data", "mine.csv"], "mine.csv: 20 rows, so task.eval_size=1000 leaves nothing to train on; set it to a"),
    ):
        bad = call("run", file, "--smoke", *more)
        assert bad.exit_code == 1 and message in bad.stderr and len(bad.stderr.strip().splitlines()) == 1, bad.output


def test_a_failed_run_is_told_and_gives_exit_code_1(file: Path) -> None:
    done = call(
        "run",
        file,
        "--json",
    )
    assert done.exit_code == 0
    done = call("compare", file, "--seeds", "0,9")
    assert done.exit_code == 1
    assert "failed, no luck" in done.stderr and "4 failed" in done.stdout


def test_compare_tells_the_runs_that_were_made_on_another_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, base = outcome, {"loss": 1.25}
    monkeypatch.setitem(globals(), "outcome", lambda run: {**plain(run), "start": {"loss_before": base["loss"]}})
    assert "Runs of another model" not in call("compare", file, "--seeds", "0", "--methods", "lora").stdout  # control
    base["loss"] = 1.5
    told = call("compare", file, "--seeds", "0", "--methods", "lora,self", "--learning-rates", "1e-3,1e-2,1e-1").stdout
    lines = told.split("Runs of another model or other data")[1].splitlines()
    assert sum(line.startswith("LoRA ") and "1.2500" in line and "1.5000" in line for line in lines) == 2


def test_report_writes_the_page(file: Path, tmp_path: Path) -> None:
    call("run", file)
    done = call("report", "results/trial", "--out", tmp_path / "page")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page" / "page.html").stat().st_size > 1000 and "page.html" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.toml"], "none.toml: there is no such experiment file"),
        (["compare", "trial.toml", "--methods", "slef"], "did you mean 'self'"),
        (["compare", "trial.toml", "--learning-rates", "fast"], "--learning-rates: expected numbers"),
        (["compare", "trial.toml", "--seeds", "0.5"], "--seeds: expected whole numbers"),
        (["compare", "trial.toml", "--seeds", ","], "--seeds: expected whole numbers"),
        (["compare", "trial.toml", "--learning-rates=-1"], "learning_rates"),
        (["run", "trial.toml", "--set", "lora.rnak=2"], "did you mean 'rank'"),
        (["run", "trial.toml", "--set", "lora.rank"], "expected KEY=VALUE"),
        (["run", "trial.toml", "--set", "lora.rank=two"], "lora.rank: expected a whole number"),
        (["run", "trial.toml", "--data", "none.csv"], "there is no file or folder none.csv"),
        (["report", "none", "--out", "page"], "none"),
    ],
)
def test_errors_are_one_line(file: Path, arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 1 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_changed_settings_are_an_error(file: Path) -> None:
    call("run", file)
    file.write_text(FILE.replace("rank = 4", "rank = 2"))
    done = call("run", file)
    assert done.exit_code == 1 and "lora.rank is 4 there and 2 in the experiment" in done.stderr
    assert call("run", file, "--replace").exit_code == 0
    assert load_experiment(file).lora.rank == 2


def test_ctrl_c_gives_exit_code_130(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "run_sweep", interrupted)
    assert call("run", file).exit_code == 130


def test_run_says_how_many_runs_there_are_takes_a_grid_and_prints_the_table(file: Path) -> None:
    done = call("run", file, "--methods", "self", "--learning-rates", "1e-3", "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("2 runs to do, 0 there already") and "[1/2]" in done.stderr
    assert "Methods at their best learning rate" in done.stdout
    again = call("run", file, "--methods", "self", "--learning-rates", "1e-3", "--seeds", "0,1,2")
    assert again.stderr.startswith("1 run to do, 2 there already")

"""Every experiment file runs: two steps on a tiny random model, offline. In this process, so that it is quick.

The fast run takes one file of each task, with three arms; the slow one every other arm of every file.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from cntlora.lab.experiments.run import run_one
from cntlora.lab.experiments.runs import runs_of
from cntlora.lab.experiments.settings import Experiment, load_experiment, replaced, smoke, tomllib
from cntlora.lab.experiments.tasks import TASKS, task_kind
from cntlora.lab.experiments.user_data import check_data

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "studies").rglob("*.toml"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
DOCS = ROOT / "docs" / "experiments" / "files.md"


def few(experiment: Experiment) -> list[str]:
    """One arm of ours and at most two others, of other kinds."""
    names = experiment.sweep.methods
    ours = [name for name in names if name.partition("+")[0] in ("cross", "self", "shift")]
    others = [name for name in names if name not in ours]
    return list(dict.fromkeys([*ours[:1], *others[:1], *others[-1:]]))[: 3 if len(others) > 1 else 2]


# files of one task differ in their data, models and numbers, which a tiny run does not use
FIRST = {tomllib.loads(path.read_text(encoding="utf-8"))["task"]["name"]: path for path in reversed(FILES)}


def tried(path: Path, folder: Path, methods: list[str]) -> None:
    experiment = replaced(smoke(load_experiment(path), folder / "made"), methods=methods)
    for run in runs_of(experiment):
        record = run_one(run, folder / "out")
        assert record["status"] == "finished" and len(record["losses"]) == 2, run.name
        assert all(math.isfinite(loss) for loss in record["losses"])
        assert set(record["evaluations"][-1]) == {"step", "seconds", *record["metrics"]}
        assert record["main_metric"] in record["metrics"]
        assert bool(record["samples"]) == bool(experiment.train.sample_at), run.name
        assert all((folder / "out" / s["file"]).is_file() for s in record["samples"] if s["file"])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forbid hub and downloads, with an empty cache: what a tiny run needs it makes."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CNTLORA_CACHE", str(tmp_path / "no_cache"))
    (tmp_path / "made").mkdir()


@pytest.mark.parametrize("task", sorted(FIRST))
def test_a_file_of_every_task_runs_in_two_steps(task: str, tmp_path: Path) -> None:
    tried(FIRST[task], tmp_path, few(load_experiment(FIRST[task])))
    assert not (tmp_path / "no_cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_other_arm_of_every_file_runs(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    done = few(experiment) if path in FIRST.values() else []
    tried(path, tmp_path, [method for method in experiment.sweep.methods if method not in done])
    assert not (tmp_path / "no_cache").exists()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_is_whole(path: Path, tmp_path: Path) -> None:
    """Its sections have known keys and right values, [smoke] too, and every arm is one run of the tiny form."""
    experiment = load_experiment(path)
    tiny = smoke(experiment, tmp_path / "made")
    assert len(runs_of(tiny)) == len(experiment.sweep.methods) <= len(runs_of(experiment))


def test_the_docs_list_every_file_and_no_other() -> None:
    """The control of the search: one that is not recursive finds the files of the first folder only."""
    listed = re.findall(r"`(studies/\S+\.toml)`", DOCS.read_text(encoding="utf-8").partition("## The files")[2])
    assert sorted(listed) == NAMES
    assert len(NAMES) > len(list((ROOT / "studies").glob("*.toml"))) > 0


def test_every_file_says_what_it_is() -> None:
    for path in FILES:
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
        assert first.startswith("# ") and path.relative_to(ROOT).as_posix() in first, path


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_main_metric_and_its_name(name: str, tmp_path: Path) -> None:
    recipe = task_kind(name)
    field = next(iter(recipe.settings.__dataclass_fields__.values()))
    assert field.name == "name"
    prompts = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    needed = {"name": name, "model": "model", "data": "data", **prompts}
    given = {key: value for key, value in needed.items() if key in recipe.settings.__dataclass_fields__}
    task = recipe.make(recipe.tiny(recipe.settings(**given), tmp_path))
    assert task.metrics[task.main_metric] in ("min", "max") and set(task.metrics.values()) <= {"min", "max"}


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"glue"}))
def test_your_data_is_checked_with_the_tiny_model_in_place_of_yours(name: str, tmp_path: Path) -> None:
    tasks = [load_experiment(path).task for path in FILES]
    of_no_file = task_kind("text").settings(name="text", model="owner/none", data="none.csv")
    task = next((task for task in tasks if task.name == name), of_no_file)
    tiny = smoke(Experiment(name=name, task=task), tmp_path / "made").task
    changed = {"data": tiny.data, **({"eval_size": tiny.eval_size} if hasattr(task, "eval_size") else {})}
    if hasattr(task, "concept") and not task.identifier:
        changed["concept"] = tiny.concept
    yours = dataclasses.replace(task, **changed)
    check_data(yours, tiny)
    with pytest.raises((ValueError, OSError)):
        check_data(dataclasses.replace(yours, data=str(tmp_path / "none.csv")), tiny)

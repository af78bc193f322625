"""Starts over whole trainings: tuned rates, steps to plain LoRA's loss, ranges, one rate for all; and the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="tables of runs need the extra `lab`")
import pandas as pd
from benchmarks import lasting
from benchmarks.overview import RUNS
from tests import report_cases as cases

STEPS = 100


def run(method: str, rate: float, seed: int, losses: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    """A run whose held-out losses are given after 0, 50 and 100 steps; a step takes a second, the initialisation 10."""
    evaluations = [{"step": step, "loss": loss} for step, loss in zip((0, 50, STEPS), losses, strict=True)]
    own = cases.record(method.partition("+")[0].replace("whitened", "cross"), rate, seed)
    facts = {"method": method, "evaluations": evaluations, "init_seconds": 10.0, "train_seconds": float(STEPS)}
    return own | facts | {"losses": [1.0] * STEPS} | changes


LORA = [
    run("lora", 1e-3, 0, (3.0, 2.0, 1.0)),
    run("lora", 1e-3, 1, (3.0, 2.0, 1.2)),
    run("lora", 3e-3, 0, (3.0, 2.0, 0.9)),  # the lowest of all, but of one seed
]
WHITENED = [
    run("whitened+unseen", 1e-3, 0, (3.0, 1.4, 0.8)),
    run("whitened+unseen", 1e-3, 1, (3.0, 1.6, 1.0)),
]


def found(tmp_path: Path, records: list[dict[str, Any]]) -> lasting.Tasks:
    cases.write(records, tmp_path / "tweets_300")
    return lasting.tasks_of(tmp_path)


def test_a_method_is_tuned_among_the_rates_with_the_most_seeds(tmp_path: Path) -> None:
    tasks = found(tmp_path, LORA)
    runs = tasks["tweets_300"]["lora"]
    assert runs.tuned == 1e-3 and runs.curve == {1e-3: 1.0, 3e-3: 0.9} and runs.shared_seeds == [0]
    assert lasting.ends(tasks).splitlines()[-1] == "| tweets | 1.100 ± 0.141 (0.001; 2 seeds, 2 rates) |"
    more = found(tmp_path, [*LORA, run("lora", 3e-3, 1, (3.0, 2.0, 0.9))])  # control
    assert more["tweets_300"]["lora"].tuned == 3e-3


def test_steps_to_a_loss_are_interpolated_and_bear_the_initialisation(tmp_path: Path) -> None:
    along = [(0, 3.0), (50, 2.0), (100, 1.0)]
    assert lasting.step_reached(along, 1.5) == 75 and lasting.step_reached(along, 0.5) is None
    assert lasting.step_reached(along, 4.0) == 0
    tasks = found(tmp_path, [*LORA[:2], *WHITENED])
    # of the means over both seeds: from 1.5 at step 50 to 0.9 at step 100, plain LoRA's 1.1 lies at 5/6 of it
    assert lasting.reached(tasks).splitlines()[-1] == "| tweets | 0.83 (0.93; 2 seeds) |"
    assert lasting.against(tasks).splitlines()[-1] == "| tweets | −0.200 (2 of 2 seeds lower) |"
    worse = found(tmp_path, [run("whitened+unseen", 1e-3, s, (3.0, 2.9, 2.8)) for s in (0, 1)])  # control
    assert "not (2 seeds)" in lasting.reached(worse)


def test_only_seeds_of_both_are_compared(tmp_path: Path) -> None:
    tasks = found(tmp_path, [*LORA[:2], WHITENED[1]])
    assert "−0.200 (1 of 1 seed lower)" in lasting.against(tasks)
    assert "| whitened, told the rate | – | – | −16.7 % (−16.7 %; 1) |" in lasting.untuned(tasks)


def test_told_the_rate_it_is_whitened_itself_at_the_rate_that_it_is_made_for(tmp_path: Path) -> None:
    told = run("whitened+fitted+unseen", 2e-4, 0, (3.0, 2.0, 0.9))
    tasks = found(tmp_path, [*LORA[:2], *WHITENED, run("lora", 2e-4, 0, (3.0, 3.0, 2.0)), told])
    small, own = (lasting.at_rate(tasks, rate).splitlines() for rate in (2e-4, 1e-3))
    assert small[0] == "| at 0.0002 | plain LoRA, tuned | plain LoRA | whitened, told the rate |"
    assert small[2:] == ["| tweets | 1.100 (2) | 2.000 (1) | 0.900 (1) |"]
    assert own[2:] == ["| tweets | 1.100 (2) | 1.100 (2) | 0.900 (2) |"]  # of the runs of whitened
    assert "told" not in lasting.ends(tasks) and "| whitened, told the rate |" in lasting.widths(tasks).splitlines()[0]


def test_the_default_is_whitened_where_no_head_is_new(tmp_path: Path) -> None:
    cases.write([*LORA[:2], *WHITENED], tmp_path / "language_300")
    fitted = run("whitened+head+unseen", 1e-3, 0, (3.0, 1.0, 0.6))
    tasks = found(tmp_path, [*LORA[:2], *WHITENED, fitted])
    head, _, tweets, dialogue = lasting.ends(tasks).splitlines()
    assert head.endswith("| whitened | the default |")
    assert tweets.endswith("(0.001; 2 seeds, 1 rate) | 0.600 (0.001; 1 seed, 1 rate) |")
    assert dialogue.split(" | ")[2] == dialogue.removesuffix(" |").split(" | ")[3]
    assert "the default − plain LoRA" in lasting.against(tasks).splitlines()[0]


def test_a_method_along_the_rates_has_those_of_plain_lora_beside(tmp_path: Path) -> None:
    tasks = found(tmp_path, [*LORA, run("whitened+fitted+head+unseen", 2e-4, 0, (3.0, 1.0, 0.7))])
    lora, default = (lasting.TABLES[name](tasks).splitlines() for name in ("rates_lora", "rates_default"))
    assert lora == ["| plain LoRA | 0.001 | 0.003 |", "| --- | --- | --- |", "| tweets | 1.100 (2) | 0.900 (1) |"]
    assert default[0] == "| the default, told the rate | 0.0002 | 0.001 | 0.003 |"
    assert default[2] == "| tweets | 0.700 (1) | – | – |"


def test_tables_of_ours_and_of_others_have_plain_lora_in_common(tmp_path: Path) -> None:
    tasks = found(tmp_path, [*LORA[:2], *WHITENED, run("eva+unseen", 1e-3, 0, (3.0, 1.4, 0.8))])
    ours, others = (lasting.TABLES[name](tasks).splitlines()[0] for name in ("ends", "ends_peers"))
    assert ours == "| task | plain LoRA | whitened |" and others == "| task | plain LoRA | EVA |"
    assert set(lasting.OURS) | set(lasting.TOLD_OURS) | set(lasting.PEERS) == set(lasting.METHODS)


def test_ranges_say_that_they_may_go_on(tmp_path: Path) -> None:
    rates = {1e-4: 1.2, 1e-3: 1.0, 1e-2: 1.2}
    tasks = found(tmp_path, [run("lora", rate, 0, (3.0, 2.0, loss)) for rate, loss in rates.items()])
    assert lasting.widths(tasks).splitlines()[-1] == "| tweets | 1.3 (3 rates, 1 seed) |"
    assert "| plain LoRA | 0.001 | 0.001 | 0.0 % | 0.0 % | 0.0 % |" in lasting.one_rate(tasks)
    open_ended = found(tmp_path, [run("lora", 1e-2, 0, (3.0, 2.0, 1.0))])  # control
    assert "≥ " in lasting.widths(open_ended)


def test_a_run_that_diverged_counts_as_infinitely_bad_and_one_that_failed_not_at_all(tmp_path: Path) -> None:
    diverged = run("lora", 3e-3, 0, (3.0, 2.0, 0.9), status="diverged")
    diverged["config"] = diverged["config"] | {"train": {"steps": STEPS}}
    runs = found(tmp_path, [LORA[0], diverged, cases.failed("lora", 1e-2, 0)])["tweets_300"]["lora"]
    assert runs.curve == {1e-3: 1.0, 3e-3: math.inf} and runs.tuned == 1e-3
    assert lasting.widths({"tweets_300": {"lora": runs}}).splitlines()[-1].startswith("| tweets | ≥ 1.0")


def test_other_arms_and_other_studies_are_left_out(tmp_path: Path) -> None:
    cases.write([run("lora+r2", 1e-3, 0, (1.0, 1.0, 1.0))], tmp_path / "tweets_300")
    cases.write(LORA, tmp_path / "tweets")
    assert lasting.tasks_of(tmp_path) == {}


@pytest.mark.published
def test_the_numbers_are_those_of_the_runs() -> None:
    """By pandas alone, which knows nothing of our tables."""
    tasks = lasting.tasks_of(RUNS)
    assert {"tweets_300", "vision_fashion_mnist_300"} <= set(tasks)
    frame = pd.read_parquet(RUNS / "tweets_300.parquet")
    for method, name in (("lora", "lora"), ("whitened", "whitened+unseen")):
        runs = tasks["tweets_300"][method]
        own = frame[(frame["method"] == name) & (frame["learning_rate"] == runs.tuned)]
        ends = dict(zip(own["seed"], own["evaluations.loss"].map(lambda losses: losses[-1]), strict=True))
        assert runs.ends(runs.tuned) == pytest.approx(ends)
    assert all(table(tasks).count("\n") >= 2 for table in lasting.TABLES.values())

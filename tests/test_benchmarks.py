"""The benchmarks on tiny models: every row runs, ratios are of the same round, failures are told, laws are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import (
    accuracy,
    exact,
    forecasts,
    init_cost,
    measure,
    parts,
    predict,
    proposed_rates,
    rounding,
    scaling,
    standin,
    starts,
    table4,
    tables,
    workloads,
)
from benchmarks.machine import RESULTS
from benchmarks.peers import rows_alone
from benchmarks.rows import BACKWARD, FLOOR, ROWS, Bench, Job
from tests import reference
from tests.bounds import eps
from torch import Tensor, nn

import cntlora
from cntlora.lab.experiments.settings import load_experiment, smoke

TINY = workloads.WORKLOADS["tiny"]


class FakeClock:
    """Time passes only where a job says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds: Callable[[], float]) -> Job:
        def run(model: nn.Module) -> None:
            self.now += seconds()

        return Job(nn.Identity, run)


def failing(message: str) -> Job:
    def run(model: nn.Module) -> None:
        raise ValueError(message)

    return Job(nn.Identity, run)


# --- the cost table -------------------------------------------------------------------------------------------


def test_every_row_runs_on_the_tiny_workload() -> None:
    found = measure.measure("tiny", ROWS, repeats=1, budget=60.0, memory=False)
    assert tuple(found) == ROWS
    for name, row in found.items():
        assert "failed" not in row, f"{name}: {row}"
        assert row["seconds"] > 0
        assert row["runs"] == 1
        assert not row["cold"]
    assert found[FLOOR]["ratios"] == [1.0]


def test_ratios_are_of_the_same_round() -> None:
    """The machine gets ten times slower in every round: a method of three forward passes stays one of three."""
    clock, speed = FakeClock(), iter([1.0, 1.0, 10.0, 10.0, 100.0, 100.0, 1000.0, 1000.0])
    jobs = {FLOOR: clock.job(lambda: next(speed)), "method": clock.job(lambda: 3.0 * next(speed))}
    found, failed = measure.rounds(jobs, repeats=3, budget=1e9, clock=clock)
    assert not failed
    row = measure.summary("method", found)
    assert row["ratios"] == pytest.approx([3.0, 3.0, 3.0])
    assert row["seconds"] == 300.0  # of 30, 300, 3000: the first round warmed up
    shifted = [{**a, FLOOR: b[FLOOR]} for a, b in pairwise(found)]
    assert measure.summary("method", shifted)["ratio"] != pytest.approx(3.0)  # control: another round's forward pass


def test_a_row_beyond_its_budget_is_cold_and_not_run_again() -> None:
    clock = FakeClock()
    jobs = {FLOOR: clock.job(lambda: 1.0), "long": clock.job(lambda: 50.0), "short": clock.job(lambda: 2.0)}
    found, _ = measure.rounds(jobs, repeats=2, budget=20.0, clock=clock)
    long, short = measure.summary("long", found), measure.summary("short", found)
    assert (long["runs"], long["cold"], long["ratio"]) == (1, True, 50.0)
    assert (short["runs"], short["cold"]) == (2, False)


def test_a_failing_row_is_reported_with_its_reason_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Bench.job
    monkeypatch.setattr(Bench, "job", lambda self, row: failing("no convergence") if row == "eva" else plain(self, row))
    found = measure.measure("tiny", ["eva", "pissa"], repeats=1, budget=60.0, memory=False)
    assert found["eva"] == {"failed": "ValueError: no convergence"}
    assert found["pissa"]["runs"] == 1
    text = tables.markdown(record_of(found))
    assert "| eva | failed |" in text
    assert "- eva failed: ValueError: no convergence." in text


def test_what_a_workload_leaves_out_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", replace(TINY, skip={"pissa": "takes an hour"}))
    found = measure.measure("tiny", ["pissa"], repeats=0, budget=60.0, memory=False)
    assert found["pissa"] == {"skipped": "takes an hour"}
    assert "- pissa skipped: takes an hour." in tables.markdown(record_of(found))


def record_of(rows: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "processor": "abacus", "cores": 4, "threads": 2, "memory_gib": 1.5, "torch": "2", "peft": "1", "cntlora": "0",
    }  # fmt: skip
    return {"workload": "tiny", "about": "a toy", "machine": machine, "rows": rows}


def test_the_markdown_table() -> None:
    row = {"seconds": 1.234, "ratio": 2.5, "ratios": [2.0, 2.5, 3.0], "runs": 3, "cold": False, "peak_mib": 1234.5}
    lines = tables.markdown(record_of({"self": row})).splitlines()
    assert lines[0] == ("**tiny**: a toy. abacus, 4 cores, 1.5 GiB, 2 threads; PyTorch 2, PEFT 1, cntlora 0.")
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    assert lines[4] == "| self | 1.23 | 2.50 (2.00–3.00) | 3 | 1,234 |"
    other = tables.markdown(record_of({"self": {**row, "cold": True, "runs": 1, "peak_failed": "no memory"}}))
    assert "1 (cold)" in other
    assert "- self: peak memory failed: no memory." in other


def test_the_command_writes_a_record_and_prints_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workloads", "tiny", "--rows", "pissa", "--threads", "1", "--out", str(tmp_path)]
    init_cost.main([*arguments, "--repeats", "1", "--no-memory"])
    record = json.loads((tmp_path / "tiny.json").read_text())
    assert list(record["rows"]) == [FLOOR, "pissa"]
    printed = capsys.readouterr().out.strip()
    (tmp_path / "scaling.json").write_text("{}")  # another benchmark's
    init_cost.main(["--table", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip().endswith(printed)
    with pytest.raises(
        SystemExit, match="'pisa' is not known; expected some of: forward pass, forward and backward pass, cross"
    ):
        init_cost.main(["--workloads", "tiny", "--rows", "pisa"])
    with pytest.raises(ValueError, match="found none"):
        init_cost.main(["--table", "--out", str(tmp_path / "none")])


@pytest.mark.slow
def test_peak_memory_comes_from_a_process_of_its_own() -> None:
    found = measure.peaks_above_model("tiny", ["self", "PEFT eva"])
    assert list(found) == ["self", "PEFT eva"]
    assert all(0.0 <= row["peak_mib"] < 200.0 for row in found.values())
    with pytest.raises(RuntimeError, match="peak memory on tiny"):
        measure.peaks_above_model("tiny", ["nothing"])


def test_the_table_of_peaks_says_where_ours_is_not_above() -> None:
    rows = {name: {"peak_mib": mib} for name, mib in (("eva", 20.4), ("PEFT eva", 20.6), ("pissa", 4.0), ("self", 7.0))}
    printed = tables.peaks_table({"one": {"rows": rows}, "two": {"rows": {**rows, "eva": {"peak_mib": 20.7}}}})
    assert "| `eva` / PEFT eva | **20** / 21 | 20.7 / 20.6 |" in printed
    assert "| `pissa` / PEFT pissa | 4.0 | 4.0 |" in printed and "| self | 7.0 | 7.0 |" in printed
    assert "| `descent` / PEFT lora_ga | – | – |" in printed


def test_seconds_stand_beside_those_of_peft() -> None:
    rows: dict[str, Any] = {
        FLOOR: {"seconds": 1.0, "ratio": 1.0},
        "lora_ga": {"seconds": 3.0, "ratio": 3.0, "ratio_backward": 1.25},
        "PEFT lora_ga": {"seconds": 3.5, "ratio": 3.5},
        "eva": {"seconds": 1.5, "ratio": 1.5},
        "PEFT eva": {"seconds": 1.4, "ratio": 1.4},
        "olora": {"seconds": 0.5, "ratio": 0.5},
    }
    printed = tables.beside_peft([{"workload": "one", "rows": rows}, {"workload": "two", "rows": {FLOOR: rows[FLOOR]}}])
    assert "| forward pass | 1.00 | 1.00 |" in printed and "| `olora` / PEFT olora | 0.50 | – |" in printed
    assert "| `lora_ga` / PEFT lora_ga | **3.00 (1.25)** / 3.50 | – |" in printed
    assert "| `eva` / PEFT eva | 1.50 (1.50) / 1.40 | – |" in printed


def test_the_docs_have_the_table_of_peaks() -> None:
    record = json.loads((RESULTS / "peaks.json").read_text())
    page = (Path(__file__).parents[1] / "docs/performance.md").read_text()
    assert tables.peaks_table(record) in page
    record["minilm"]["rows"]["eva"]["peak_mib"] *= 2  # the control
    assert tables.peaks_table(record) not in page


@pytest.mark.slow
def test_table_4_is_resumed_and_has_the_shares(tmp_path: Path) -> None:
    out = tmp_path / "table4.json"
    table4.main(["--workload", "sd15-tiny", "--rows", "cross", "--out", str(out)])
    first = json.loads(out.read_text())
    assert list(first["rows"]) == [FLOOR, BACKWARD, "cross"] and len(first["steps"]) == 3
    table4.main(["--workload", "sd15-tiny", "--rows", "cross,pissa", "--out", str(out)])
    record = json.loads(out.read_text())
    assert {row: record["rows"][row] for row in first["rows"]} == first["rows"] and "pissa" in record["rows"]
    record |= {"steps": [2.0, 1.0, 3.0], "rows": {"eva": {"seconds": 20.0}, "self": {"failed": "no memory"}}}
    assert table4.share(record, "eva") == 1.0 and table4.share(record, "self") is None
    assert "| eva | 20.0 | 1.00 % | 1.71 % | 0.34 % |" in table4.markdown(record)
    assert "| self | failed | – |" in table4.markdown(record)


@pytest.mark.slow
def test_what_is_foretold_stands_beside_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(forecasts.CASES, "tiny", {"self": (None, "1KiB")})
    forecasts.main(["--workloads", "tiny", "--out", str(tmp_path)])
    free, bound = json.loads((tmp_path / "forecasts.json").read_text())["tiny"]["rows"]
    assert free["passes"] == free["foretold_passes"] == 1
    assert abs(free["foretold_bytes"] - free["bytes"]) <= 0.15 * free["bytes"]
    assert bound["failed"].startswith("ValueError: max_memory: 1KiB is too little")  # the control
    first = capsys.readouterr().out
    assert "| tiny | self | none |" in first
    forecasts.main(["--table", "--out", str(tmp_path)])
    assert capsys.readouterr().out == first


# --- workloads ------------------------------------------------------------------------------------------------


def test_a_workload_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = TINY.build().state_dict(), TINY.build().state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(TINY.batches(), TINY.batches(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    other = workloads.seeded(lambda: standin.Stack(8, 1), seed=1).state_dict()["layers.0.weight"]
    assert not torch.equal(other, workloads.seeded(lambda: standin.Stack(8, 1)).state_dict()["layers.0.weight"])


def test_corda_gets_each_row_without_padding_and_labels() -> None:
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    rows = list(rows_alone({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}))
    assert [row["input_ids"].tolist() for row in rows] == [[[0, 1, 2]], [[4, 5]]]
    images = list(rows_alone({"pixel_values": torch.zeros(2, 3, 4, 4)}))
    assert [row["pixel_values"].shape for row in images] == [(1, 3, 4, 4)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sites"), [("roberta-large", {8}), ("sd15-attention", {24}), ("dinov2-giant", {12, 14})]
)
def test_random_workloads_have_the_sites_and_batches_that_they_say(name: str, sites: set[int]) -> None:
    workload = workloads.WORKLOADS[name]
    model = workloads.with_lora(workload, workload.build())
    assert sum(module.endswith("lora_A.default") for module, _ in model.named_modules()) in sites
    batch = workload.batches()[0]
    assert torch.isfinite(workload.loss(model, batch))


@pytest.mark.slow
@pytest.mark.packages
@pytest.mark.parametrize(("name", "sites"), [("minilm", 24), ("dinov2", 48), ("smollm2", 120)])
def test_real_workloads_have_the_sites_and_batches_that_they_say(name: str, sites: int) -> None:
    workload = workloads.WORKLOADS[name]
    model, batches = workloads.with_lora(workload, workload.build()), workload.batches()
    assert sum(module.endswith("lora_A.default") for module, _ in model.named_modules()) == sites
    assert len(batches) == 8
    with torch.no_grad():
        assert torch.isfinite(workload.loss(model, batches[0]))


# --- accuracy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cross", "self", "shift"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_the_exact_delta_is_that_of_the_reference(method: str, tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(10, 8, generator=g, dtype=torch.float64)
    batches = [torch.randn(8, tokens, generator=g, dtype=torch.float64) for _ in range(3)]
    mine = exact.delta(method, W, batches)
    theirs = reference.delta(W.numpy(), [X.numpy() for X in batches], method)
    np.testing.assert_allclose(mine, theirs, atol=1e-9 * np.abs(theirs).max())
    cut = exact.delta(method, W, batches, 0.6)
    theirs_cut = reference.delta(W.numpy(), [X.numpy() for X in batches], method, rtol=0.6)
    np.testing.assert_allclose(cut, theirs_cut, atol=1e-9 * np.abs(theirs).max())
    assert np.abs(theirs - theirs_cut).max() > 1e-3 * np.abs(theirs).max()
    other = reference.delta(W.numpy(), [X.numpy() for X in batches[:2]], method)
    assert np.abs(mine.numpy() - other).max() > 1e-3 * np.abs(theirs).max()  # control: other data


def test_errors_are_zero_for_the_best_product_and_positive_for_another() -> None:
    D = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    best = (U[:, :3] * s[:3]) @ Vh[:3]
    assert exact.errors(D, best, 3) == pytest.approx((0.0, 0.0), abs=1e-12)
    distance, excess = exact.errors(D, 1.1 * best, 3)
    assert distance == pytest.approx(0.1 * float(best.norm() / D.norm()))
    assert excess > 1e-3


def test_the_margin_tells_how_near_an_eigenvalue_is_to_the_cut() -> None:
    # eigenvalues 1 and 1e-6, the cut at 2·eps; in the second, 1e-18 is under it
    kept, dropped = (torch.diag(torch.tensor([1.0, x], dtype=torch.float64)) for x in (1e-3, 1e-9))
    assert exact.margin([kept, torch.eye(2, dtype=torch.float64)]) == pytest.approx(1e-6 / (2 * exact.EPS))
    assert exact.margin([dropped]) == pytest.approx(1 / (2 * exact.EPS))


def test_the_plan_is_accurate_on_the_tiny_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.main(["--workloads", "tiny", "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "accuracy.json").read_text())
    assert "| tiny | shift | 14 |" in capsys.readouterr().out
    half = record["summary"]["tiny, bfloat16"]
    assert set(half) == set(accuracy.METHODS) and all(row["excess_worst"] < 1e-3 for row in half.values())
    for method, row in record["summary"]["tiny"].items():
        for name, site in record["sites"]["tiny"][method].items():
            assert abs(site["excess"]) < rounding_bound(method, site["margin"]), (method, name)
            assert site["distance"] < rounding_bound(method, site["margin"]) + eps(torch.float32) / site["gap"], (
                method,
                name,
            )
        worst = record["sites"]["tiny"][method][row["worst_site"]]
        assert worst["distance"] == row["distance_worst"] >= row["distance_median"]


def rounding_bound(method: str, margin: float) -> float:
    """Bound the rounding of the factors of a site: that of its float32 factors, and that of G.

    G carries rounding of max(d, b)·eps·λ_max, which moves 1/λ_min by 1/margin: 0.03 at the worst of the tiny model's
    sites, 3e-8 and less at most. The direction of λ_min is then nearly all of ΔW, so that the error is that of ΔW.
    Shift mode inverts I − G, which is well conditioned there.
    """
    return eps(torch.float32) + (0.0 if method == "shift" else 1.0 / margin)


def test_the_bound_on_the_accuracy_tells_other_data_apart() -> None:
    """The control: factors of all batches against the exact ΔW of the last two, at every site."""
    model, batches = accuracy.some_layers(TINY, (0, 1)), TINY.batches()
    for method in accuracy.METHODS:
        config = cntlora.InitConfig.from_dict({"method": method, "base": "keep", "strength": 1.0, "rtol": 0.0})
        plan = cntlora.compute_plan(model, batches, config, progress=False)
        layers = {name: model.get_submodule(f"base_model.model.{name}") for name in plan.sites}
        inputs = accuracy.inputs_of(model, layers, batches)
        for name, site in plan.sites.items():
            found = accuracy.site_errors(layers[name], site, method, inputs[name][1:])
            assert found["excess"] > rounding_bound(method, exact.margin(inputs[name])), (method, name)


def test_caught_inputs_leave_out_padding_and_take_their_hooks_with_them() -> None:
    layer, x = nn.Linear(3, 2), torch.arange(12.0).view(2, 2, 3)
    with exact.caught_inputs({"layer": layer}, torch.tensor([[1, 0], [1, 1]])) as found:
        layer(x)
    assert torch.equal(found["layer"], x.view(4, 3)[[0, 2, 3]].double().mT)
    assert not layer._forward_pre_hooks


# --- scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1.0, 2.7])
def test_the_exponent_of_a_known_law_is_recovered(exponent: float) -> None:
    sizes = [100.0, 200.0, 400.0, 1000.0]
    law = standin.fit(sizes, [3e-6 * size**exponent for size in sizes])
    assert law["exponent"] == pytest.approx(exponent)
    assert law["factor"] == pytest.approx(3e-6)
    assert law["residual"] == pytest.approx(0.0, abs=1e-9)
    bent = standin.fit(sizes, [3e-6 * size**exponent + 1.0 for size in sizes])
    assert bent["exponent"] < exponent - 0.1  # control: not a power law
    assert bent["residual"] > 1e-3 or bent["exponent"] < 0.1


def test_a_sweep_stops_before_a_size_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(size: standin.Size, methods: list[str], repeats: int) -> dict[str, float]:
        return {"forward": 1.0, **{m: {"cross": 1.0, "self": 5.0}[m] * size.d**3 for m in methods}}

    monkeypatch.setattr(standin, "extra_seconds", fake)
    found = standin.sweep(standin.Size(), "d", (1, 2, 3), 1, limit=30.0, methods=("cross", "self"))
    assert [sorted(point["seconds"]) for point in found["points"]] == [
        ["cross", "forward", "self"], ["cross", "forward"], ["cross", "forward"]
    ]  # fmt: skip
    assert "from d = 2 on" in found["left_out"]["self"]
    assert found["laws"]["cross"]["exponent"] == pytest.approx(3.0)
    assert found["laws"]["self"] is None  # one point is no law


def test_the_quick_run_writes_a_record_and_says_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert {sweep["what"] for sweep in record["sweeps"]} == {"d", "tokens", "batches", "layers"}
    printed = capsys.readouterr().out
    assert "**Predicted, not measured**" in printed
    assert "not measured" in printed.split("Check of the parts")[1].split("**Predicted")[0]
    scaling.main(["--table", "--out", str(tmp_path)])
    assert capsys.readouterr().out == printed


def test_the_block_that_was_measured_stands_beside_its_prediction() -> None:
    rates = predict.h100_rates()
    record = {"rows": {"forward pass": {"seconds": 2.0}, "self": {"seconds": 5.0}, "cross": {"failed": "no"}}}
    found = predict.against_block(rates, record)
    assert found["self"]["measured_extra_seconds"] == 3.0
    assert found["cross"]["measured_extra_seconds"] is None
    assert predict.against_block(rates, None)["self"]["measured_extra_seconds"] is None


def test_operations_grow_as_the_formulas_say() -> None:
    def total(method: str, d: int, b: int, batches: int = 1) -> float:
        return sum(parts.initialisation(method, [parts.Group(d, ())], b, batches, 8).values())

    assert total("self", 64, 1000) == 64 * 64 * 1000 + 9 * 64**3  # G and its eigendecomposition
    assert total("self", 64, 16) == 2 * (2 * 16 * 16 * 64) + 9 * 16**3  # the dual
    assert total("self", 64, 1000, batches=3) == 3 * total("self", 64, 1000)
    assert total("eva", 64, 1000, batches=3) < 3 * total("eva", 64, 1000)  # its factorisation comes once
    one = [parts.Group(8, (8,))]
    counts = {m: parts.initialisation(m, one, 10, 2, 1) for m in ("eva", "descent", "lora_ga")}
    assert counts["descent"]["forward", 8] == 3 * 2 * 20 * 64 and counts["lora_ga"]["forward", 8] == 2 * 2 * 20 * 64
    assert counts["descent"]["gram", 8] == counts["eva"]["gram", 8] == 2 * 64 * 10 and len(counts["lora_ga"]) == 2
    rates = {part: [(10, 1e9), (1000, 1e11)] for part in parts.PARTS}
    assert parts.rate_at(rates["gram"], 100) == pytest.approx(1e10)
    assert parts.rate_at(rates["gram"], 5000) == pytest.approx(1e11)
    assert parts.seconds({("gram", 10): 2e9}, rates) == {"gram": pytest.approx(2.0)}


def test_bytes_of_statistics_by_hand() -> None:
    groups = predict.SHAPES[0].groups()  # Llama-7B: inputs of q/k/v, o, gate/up and down in 32 layers
    sums = 32 * (3 * 4096**2 + 11008**2) * 4
    rows = 32 * 2048 * (3 * 4096 + 11008) * 2
    assert parts.statistics_bytes("self", groups, 2048, 4) == sums + rows
    own = 32 * 4096 * 11008 * 4  # down has k < d: shift sums (k, d) besides
    assert parts.statistics_bytes("shift", groups, 2048, 4) == sums + rows + own
    half = 32 * 2 * (3 * 4096 * 4097 + 11008 * 11009)  # a triangle each
    gradients = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 4
    assert parts.statistics_bytes("eva", groups, 2048, 4) == half
    assert parts.statistics_bytes("lora_ga", groups, 2048, 4) == gradients
    assert parts.statistics_bytes("descent", groups, 2048, 4) == half + gradients
    with pytest.raises(ValueError, match="expected cross, self, shift, eva, descent or lora_ga"):
        parts.statistics_bytes("lora", groups, 2048, 4)


def test_every_part_has_a_rate_here_and_an_assumption_there() -> None:
    measured = parts.measured_rates((16,), 1, 1.0)
    assert set(measured) == set(parts.PARTS) == set(predict.H100_ASSUMED)
    assert all(rate > 0 for points in measured.values() for _, rate in points)
    assert all(0 < efficiency <= 1 for _, efficiency, _ in predict.H100_ASSUMED.values())


def test_the_stand_in_has_an_input_of_its_own_at_every_layer() -> None:
    model, batches = standin.stand_in(standin.Size(d=8, tokens=5, batches=2, layers=3, rank=2))
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    workloads.forward_pass(model, batches[:1])
    assert [x.shape for x in seen] == [(5, 8)] * 3
    assert len({x.data_ptr() for x in seen}) == 3
    assert len(batches) == 2


# --- why starts differ ----------------------------------------------------------------------------------------


def test_what_the_inputs_are_like_is_read_from_the_eigenvalues_of_their_G() -> None:
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    one = basis[:, :3] * torch.tensor([2.0, 1.0, 0.01], dtype=torch.float64)  # eigenvalues of G: 4, 1, 1e-4
    found = starts.spectrum_facts([one, basis[:, 3:]])
    assert (found["features"], found["tokens"], found["rank"], found["kept"]) == (5, 3, 3, 2)
    assert found["condition"] == pytest.approx(4e4)
    assert found["effective_rank"] == pytest.approx(5**2 / 17, rel=1e-3)
    assert found["effective_rank_of_sum"] == pytest.approx(7**2 / 19, rel=1e-3)


def test_the_proposed_rates_of_a_tiny_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    tiny = smoke(load_experiment(Path(__file__).parents[1] / "studies" / "tweets_modes.toml"), tmp_path / "made")
    monkeypatch.setattr(proposed_rates, "load_experiment", lambda file: tiny)
    out = tmp_path / "proposed.json"
    proposed_rates.main(["one", "--methods", "lora", "--out", str(out)])
    proposed_rates.main(["one", "--methods", "descent", "--out", str(out)])
    found = json.loads(out.read_text())["tasks"]["one"]  # what was there stays
    assert {name: facts["sites"] for name, facts in found.items()} == dict.fromkeys(("lora", "descent"), 8)
    assert found["lora"]["motion"] != pytest.approx(found["descent"]["motion"], rel=0.1)
    assert all(0 < facts["motion"] <= facts["largest_motion"] for facts in found.values())


def test_the_starts_of_a_tiny_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "made").mkdir()
    tiny = smoke(load_experiment(Path(__file__).parents[1] / "studies" / "tweets_modes.toml"), tmp_path / "made")
    monkeypatch.setattr(starts, "load_experiment", lambda file: tiny)
    starts.main(["any.toml", "--methods", "lora,self,cross+keep", "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "starts.json").read_text())["tasks"]["tweets_modes"]
    lora, own, kept = (record["starts"][name] for name in ("lora", "self", "cross+keep"))
    assert lora["size"] == 0 and own["size"] > 0.01
    for start, moves in ((lora, False), (own, False), (kept, True)):
        assert (start["loss_after"] == pytest.approx(start["loss_before"], abs=1e-5)) != moves
        assert start["curvature"] != 0
    assert "| CNTLoRA-S |" in capsys.readouterr().out and record["inputs"]["rank"] >= 1
    with pytest.raises(SystemExit):
        starts.main(["any.toml", "--methods", "lroa", "--out", str(tmp_path)])
    assert "did you mean" in capsys.readouterr().err


# --- how much of the inputs is rounding -----------------------------------------------------------------------


def test_the_noise_of_rounded_inputs_is_that_of_their_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    exact_inputs = torch.randn(40, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 90, generator=generator, dtype=torch.float64
    )
    rounded = exact_inputs.to(torch.bfloat16).double()
    found = rounding.noise_facts(rounded, exact_inputs, torch.bfloat16, torch.bfloat16)
    assert 0.1 < found["entries"] < 1.0  # one rounding: u/√3 of each entry at most
    assert found["dropped"] == found["near"] == 37 and found["left"] == 0
    fine = rounding.noise_facts(rounded, exact_inputs, torch.float32, torch.float32)  # control
    assert fine["entries"] > 1e3 and fine["dropped"] == 0 and fine["left"] == 37


def test_the_rounding_of_a_tiny_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tiny = smoke(load_experiment(Path(__file__).parents[1] / "studies" / "tweets_modes.toml"), tmp_path)
    monkeypatch.setattr(rounding, "load_experiment", lambda file: tiny)
    rounding.main(["any.toml", "--threads", "1"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| any")]
    assert [line[1] for line in lines] == ["float32", "bfloat16", "autocast"]
    assert 0 < float(lines[0][3]) < 30 and 0 < float(lines[1][3]) < 8

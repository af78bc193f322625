"""The plots of the report: which traces there are, where their points are, and that a file is the same every time."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the plots need the extra `report`")

from tests import report_cases as cases

from cntlora.lab.report.curves import MOST_LABELS, rate_labels
from cntlora.lab.report.figures import save_figures
from cntlora.lab.report.methods import styles
from cntlora.lab.report.plots import Plot, all_plots
from cntlora.lab.report.ranks import adaptive, places_of, rank_maps
from cntlora.lab.report.study import Study, studies


@pytest.fixture(scope="module")
def study() -> Study:
    return studies(cases.many())[0]


@pytest.fixture(scope="module")
def plots(study: Study) -> dict[str, Plot]:
    return {plot.title: plot for plot in all_plots(study)}


def lines(plot: Plot) -> dict[str, Any]:
    """Method → its line, without the bands."""
    return {trace.meta["method"]: trace for trace in plot.figure.data if not trace.meta.get("band")}


def test_every_metric_is_drawn_against_steps_and_against_time(plots: dict[str, Plot]) -> None:
    for name in ("Training loss", "Macro F1", "Held-out loss", "Accuracy"):
        assert f"{name} against steps" in plots and f"{name} against wall-clock time" in plots


def test_names_are_unique_and_every_trace_names_its_method(plots: dict[str, Plot]) -> None:
    assert len({plot.slug for plot in plots.values()}) == len(plots)
    assert all(trace.meta["method"] in cases.METHODS for plot in plots.values() for trace in plot.figure.data)


def test_a_method_looks_the_same_in_every_figure(plots: dict[str, Plot]) -> None:
    looks: dict[str, set[str]] = {}
    for plot in plots.values():
        for method, trace in lines(plot).items():
            if trace.type == "scatter":
                looks.setdefault(method, set()).add(f"{trace.line.color} {trace.line.dash}")
            elif trace.type == "bar":
                assert trace.marker.color == styles(cases.METHODS)[method].colour
    assert looks.keys() == cases.METHODS.keys()
    assert all(len(found) == 1 for found in looks.values())
    assert len({look for found in looks.values() for look in found}) == len(looks)


def test_the_band_lies_around_the_line_by_the_spread(study: Study, plots: dict[str, Plot]) -> None:
    plot = plots["Accuracy against steps"]
    band = next(t for t in plot.figure.data if t.meta == {"method": "self", "band": True})
    line = lines(plot)["self"]
    high, low = band.y[: len(line.y)], band.y[: len(line.y) - 1 : -1]
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    assert middle == pytest.approx(line.y, rel=1e-3)
    spread = study.best["self"].final("accuracy").spread
    assert band.y[len(line.y) - 1] - line.y[-1] == pytest.approx(spread, rel=1e-2)


def test_one_seed_has_no_band() -> None:
    def bands(seeds: tuple[int, ...]) -> int:
        plot = all_plots(studies([cases.record("lora", 0.001, seed) for seed in seeds])[0])[0]
        return sum(bool(trace.meta.get("band")) for trace in plot.figure.data)

    assert (bands((0,)), bands((0, 1))) == (0, 1)


def test_rank_maps_are_of_methods_with_uneven_ranks_only(study: Study, plots: dict[str, Plot]) -> None:
    maps = {plot.method: plot for plot in plots.values() if plot.section == "ranks"}
    assert set(maps) == {"cross+vas", "self+vas", "shift+vas"}
    assert adaptive(study.best["self+vas"]) and not adaptive(study.best["self"])
    trace = maps["self+vas"].figure.data[0]
    ranks = [run["sites"]["encoder.layer.2.key"]["rank"] for run in study.best["self+vas"].finished]
    assert trace.y[2] == "2" and trace.x[1] == "key"
    assert trace.z[2][1] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)


def test_parts_of_a_model_have_maps_of_their_own() -> None:
    names = {
        f"{part}.{layer}.{kind}": {"kind": kind, "rank": rank}
        for part, layer, rank in [
            ("unet.down_blocks", "0.attentions.1.transformer_blocks.0.attn1", 9),
            ("unet.down_blocks", "0.attentions.1.transformer_blocks.0.attn2", 3),
            ("unet.mid_block", "attentions.0.transformer_blocks.0.attn1", 5),
            ("text_encoder.layers", "0.self_attn", 4),
            ("text_encoder.layers", "1.self_attn", 7),
        ]
        for kind in ("query", "key")
    }
    found = studies([cases.record("self+vas", 0.001, 0, sites=names)])[0]
    unet, text = rank_maps(found.best["self+vas"])
    assert (unet.part, text.part) == ("unet", "text_encoder")
    assert unet.layers[:2] == ("down_blocks.0.1.0.attn1", "down_blocks.0.1.0.attn2") and len(unet.layers) == 3
    assert [unet.cells[layer, "key"] for layer in unet.layers] == [9, 3, 5]
    assert text.cells == {(layer, kind): rank for layer, rank in (("0", 4), ("1", 7)) for kind in ("query", "key")}
    plots = [plot for plot in all_plots(found) if plot.section == "ranks"]
    assert len({plot.slug for plot in plots}) == 2 and plots[1].title == "Ranks of CNTLoRA-S + VAS, text encoder"


def test_gate_and_up_share_a_place_and_a_plain_model_is_one_part() -> None:
    names = ["m.0.attn.q", "m.0.mlp.gate", "m.0.mlp.up", "m.1.attn.q", "m.1.mlp.up"]
    places = places_of({name: "query" if name.endswith("q") else "up" for name in names})
    assert [places[name] for name in names] == [("", "0"), ("", "0"), ("", "0"), ("", "1"), ("", "1")]


def test_an_experiment_in_epochs_is_drawn_against_epochs() -> None:
    runs = [cases.record(m, 0.001, 0, config={"train": {"epochs": 5}}) for m in ("lora", "self")]
    plots = {plot.title: plot for plot in all_plots(studies(runs)[0])}
    assert not any("against steps" in title for title in plots)
    assert list(lines(plots["Macro F1 against epochs"])["lora"].x) == [0, 0.625, 1.25, 2.5, 3.75, 5]
    assert lines(plots["Training loss against epochs"])["self"].x[-1] == 5
    mixed = {plot.title for plot in all_plots(studies([runs[0], cases.record("self", 0.001, 0, losses=[1.0])])[0])}
    assert "Macro F1 against epochs" in mixed  # the only run that counts epochs says how many steps one is
    unequal = [runs[0], runs[1] | {"config": {"train": {"epochs": 4}}}]
    assert "Macro F1 against steps" in {plot.title for plot in all_plots(studies(unequal)[0])}


def test_learning_rates_at_which_a_seed_broke_are_left_out(plots: dict[str, Plot]) -> None:
    found = lines(plots["Mean training loss against learning rate"])
    assert list(found["rslora"].x) == [0.0003, 0.001, 0.003]
    assert list(found["lora"].x) == [0.0003, 0.001, 0.003, 0.01]


def test_labels_of_learning_rates_do_not_run_into_each_other() -> None:
    rates = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 6e-3, 0.01, 0.02, 0.03, 0.05, 0.1]  # those of the tweets
    found = rate_labels(rates)
    kept = [math.log10(rate) for rate, label in zip(rates, found, strict=True) if label]
    assert "0.002" not in found and found[0] == "1e-05" and found[-1] == "0.1"
    assert min(np.diff(kept)) >= 4 / MOST_LABELS > min(np.diff(np.log10(rates)))  # the last is the control
    assert rate_labels([0.001, 0.002, 0.003, 0.01]) == ["0.001", "0.002", "0.003", "0.01"]
    assert rate_labels([0.001]) == ["0.001"] and rate_labels([]) == []


def test_a_spectrum_within_a_decade_has_ticks_too(plots: dict[str, Plot]) -> None:
    runs = [cases.record("self", 0.001, 0)]
    for site in runs[0]["sites"].values():
        site["singular_values"] = [0.0038, 0.002, 0.0014]
    flat = {plot.title: plot for plot in all_plots(studies(runs)[0])}["Singular values, query"]
    assert flat.figure.layout.yaxis.type == "log" and flat.figure.layout.yaxis.dtick is None
    assert plots["Singular values, query"].figure.layout.yaxis.dtick == 1  # many decades: a tick each


def test_a_label_cannot_bring_markup(study: Study) -> None:
    runs = [run | {"label": "<b>&"} for run in cases.few()]
    traces = [trace for plot in all_plots(studies(runs)[0]) for trace in plot.figure.data if trace.name]
    assert traces and all(trace.name.startswith("&lt;b&gt;&amp; (") for trace in traces)


def test_a_single_point_is_no_curve() -> None:
    one, other = (cases.record("lora", rate, 0) for rate in (0.001, 0.003))
    last = {**one, "evaluations": one["evaluations"][-1:]}
    titles = [{plot.title for plot in all_plots(studies(runs)[0])} for runs in ([last], [one, other])]
    for title in ("Macro F1 against steps", "Mean training loss against learning rate"):
        assert [title in found for found in titles] == [False, True]


def test_records_without_curves_make_no_plots() -> None:
    assert all_plots(studies([cases.failed("lora", 0.001, 0)])[0]) == []
    assert len(all_plots(studies([cases.record("lora", 0.001, 0)])[0])) > 5


@pytest.mark.published
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_files_are_the_same_for_the_same_records(tmp_path: Path, suffix: str) -> None:
    one, other, changed = (
        {path.name: path.read_bytes() for path in save_figures(studies(runs)[0], tmp_path / name, suffix)}
        for name, runs in (("a", cases.few()), ("b", cases.few()[::-1]), ("c", cases.few()[1:]))
    )
    assert one == other and len(one) == 6
    assert one != changed
    if suffix == "svg":
        assert all(ET.fromstring(data).tag.endswith("svg") for data in one.values())


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svg, png, pdf.*gif"):
        save_figures(studies(cases.few())[0], tmp_path, "gif")

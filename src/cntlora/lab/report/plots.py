"""The interactive figures of a study, by plotly. Every trace names its method in `meta`, so that a page can filter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .curves import Curve, epochs_a_step, loss_curve, metric_curve, rate_labels, rates_curve, stretched, thin
from .methods import Style, styles
from .ranks import RankMap, adaptive, rank_maps
from .study import MEAN_LOSS, Estimate, Group, Study, finite, kinds, sites_of
from .tables import metric_name, slug

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RANKS, CURVES, SPECTRA, RATES, COST = "ranks", "curves", "spectra", "rates", "cost"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_INK, _GRID = "#808790", "rgba(128,135,144,0.22)"  # to be read on white and on near-black
_BAND = 0.13
_DIGITS = 5


@dataclass(frozen=True)
class Plot:
    """A figure with what a page needs: an id, the section it belongs to, a title and, if it is of one method, which."""

    slug: str
    section: str
    title: str
    figure: Figure
    method: str | None = None


def all_plots(study: Study, drawn: Mapping[str, Style] | None = None) -> list[Plot]:
    """Every figure for which the study has data, in the order of reading.

    Args:
        drawn: method → style; default: `styles` of the study's own methods.
    """
    drawn = styles(study.best) if drawn is None else drawn
    plots = [loss_plot(study, drawn, clock) for clock in (False, True)]
    metrics = sorted(study.metrics, key=lambda metric: metric != study.main_metric)
    plots += [metric_plot(study, drawn, metric, clock) for metric in metrics for clock in (False, True)]
    plots += [rates_plot(study, drawn, key) for key in (MEAN_LOSS, study.main_metric) if key]
    plots += [init_plot(study, drawn)]
    plots += [rank_plot(study, g, ranks) for g in study.best.values() if adaptive(g) for ranks in rank_maps(g)]
    plots += [spectrum_plot(study, drawn, kind) for kind in kinds(study.best.values())]
    return [plot for plot in plots if plot.figure.data]


def loss_plot(study: Study, drawn: Mapping[str, Style], clock: bool = False) -> Plot:
    """Smoothed training loss at each method's best learning rate, against what `metric_plot` says."""
    by, axis, factor = abscissa(study, clock)
    traces = _curves(study, drawn, lambda group: stretched(thin(loss_curve(group, clock)), factor))
    return _plot(study, CURVES, f"Training loss against {by}", traces, axis, "training loss, smoothed")


def metric_plot(study: Study, drawn: Mapping[str, Style], metric: str, clock: bool = False) -> Plot:
    """A held-out metric against steps or epochs or, with `clock`, against seconds that include the initialisation's."""
    by, axis, factor = abscissa(study, clock)
    traces = _curves(study, drawn, lambda group: stretched(metric_curve(group, metric, clock), factor), markers=True)
    name = metric_name(metric)
    return _plot(study, CURVES, f"{name[0].upper()}{name[1:]} against {by}", traces, axis, name)


def rates_plot(study: Study, drawn: Mapping[str, Style], key: str) -> Plot:
    """Mean training loss ("mean_loss") or a held-out metric at every learning rate at which no seed broke."""
    name = metric_name(key)
    traces = _curves(study, drawn, lambda group: rates_curve(study, group, key), markers=True)
    plot = _plot(study, RATES, f"{name[0].upper()}{name[1:]} against learning rate", traces, "learning rate", name)
    ticks = [float(f"{rate:g}") for rate in study.learning_rates]
    plot.figure.update_xaxes(type="log", tickvals=ticks, ticktext=rate_labels(ticks), tickangle=0)
    return plot


def init_plot(study: Study, drawn: Mapping[str, Style]) -> Plot:
    """Seconds of the initialisation at each method's best learning rate."""
    from plotly import graph_objects as go

    traces = []
    for method, group in study.best.items():
        seconds, training = group.estimate("init_seconds"), group.estimate("train_seconds").mean
        if seconds.mean is None:
            continue
        share = f"<br>{seconds.mean / training:.1%} of training" if training else ""
        label = _plain(study.labels[method])
        hover = f"{label}: {_with_spread(seconds, '.2f')} s{share}<extra></extra>"
        traces.append(
            go.Bar(
                y=[label],
                x=[_short(seconds.mean)],
                error_x=None if seconds.spread is None else {"array": [_short(seconds.spread)], "color": _INK},
                orientation="h",
                marker_color=drawn[method].colour,
                name=label,
                meta={"method": method},
                hovertemplate=hover,
            )
        )
    plot = _plot(study, COST, "Time of the initialisation", traces, "seconds", "")
    plot.figure.update_layout(height=90 + 20 * max(6, len(traces)), barmode="overlay", bargap=0.25, hovermode="closest")
    plot.figure.update_yaxes(autorange="reversed", type="category", automargin=True, dtick=1, tickfont={"size": 11})
    return plot


def rank_plot(study: Study, group: Group, ranks: RankMap) -> Plot:
    """Ranks over layer × kind of projection of one part of the model, mean over the seeds (figures 10 and 15)."""
    from plotly import graph_objects as go

    columns = [kind for kind in kinds([group]) if any(own == kind for _, own in ranks.cells)]
    every = [value for g in study.best.values() for found in rank_maps(g) for value in found.cells.values()]
    trace = go.Heatmap(
        z=[
            [_short(ranks.cells[layer, kind]) if (layer, kind) in ranks.cells else None for kind in columns]
            for layer in ranks.layers
        ],
        x=columns,
        y=list(map(_plain, ranks.layers)),
        colorscale=[[0, "#f4f7fa"], [1, "#5aa0d8"]],  # light throughout: the numbers stay legible
        zmin=0,
        zmax=max(every, default=0.0),
        xgap=2,
        ygap=2,
        texttemplate="%{z:.3~g}",
        meta={"method": group.method},
        hovertemplate="depth %{y}, %{x}: rank %{z}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0},
    )
    title = f"Ranks of {study.labels[group.method]}{', ' if ranks.part else ''}{ranks.part.replace('_', ' ')}"
    plot = _plot(study, RANKS, title, [trace], "projection", "depth", group.method, ranks.part)
    plot.figure.update_layout(height=max(260, 110 + 24 * len(ranks.layers)), hovermode="closest")
    plot.figure.update_xaxes(type="category", showgrid=False)
    plot.figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return plot


def spectrum_plot(study: Study, drawn: Mapping[str, Style], kind: str) -> Plot:
    """Singular values of the estimate at the sites of one kind, mean over depths and seeds."""

    def curve(group: Group) -> Curve:
        sites = [site for run in group.finished for site in sites_of(run, kind)]
        rows = [[finite(value) for value in values] for site in sites if (values := site.get("singular_values"))]
        values = [Estimate.of(same).mean for same in zip(*rows, strict=False)]
        known = [(float(i), v) for i, v in enumerate(values, start=1) if v is not None and v > 0]
        return Curve(tuple(x for x, _ in known), tuple(y for _, y in known), (None,) * len(known))

    traces = _curves(study, drawn, curve)
    plot = _plot(study, SPECTRA, f"Singular values, {kind}", traces, "index", "singular value")
    values = [y for trace in traces for y in trace.y]
    decades = bool(values) and max(values) >= 100 * min(values)  # over fewer, a tick a decade may be no tick at all
    plot.figure.update_yaxes(type="log", exponentformat="power", dtick=1 if decades else None)
    return plot


def abscissa(study: Study, clock: bool) -> tuple[str, str, float | None]:
    """Return what curves are drawn against, in the title and at the axis, and the factor from steps to it (None: 1)."""
    if clock:
        return "wall-clock time", "seconds, initialisation included", None
    factor = epochs_a_step(study)
    return ("steps", "step", None) if factor is None else ("epochs", "epoch", factor)


def _curves(
    study: Study, drawn: Mapping[str, Style], curve_of: Callable[[Group], Curve], markers: bool = False
) -> list[Any]:
    """A line with a band of ± one standard deviation for every method that has points; none where all have one."""
    traces: list[Any] = []
    curves = {method: curve_of(group) for method, group in study.best.items()}
    if all(len(curve.x) < 2 for curve in curves.values()):  # the table says as much
        return traces
    for method, curve in curves.items():
        if curve.x:
            traces += _line(_plain(study.labels[method]), method, drawn[method], curve, markers)
    return traces


def _line(label: str, method: str, style: Style, curve: Curve, markers: bool) -> list[Any]:
    from plotly import graph_objects as go

    common = {"name": label, "legendgroup": method, "meta": {"method": method}}
    known = [(x, y, s) for x, y, s in zip(curve.x, curve.mean, curve.spread, strict=True) if s is not None]
    band = go.Scatter(
        x=_shorts([x for x, _, _ in known] + [x for x, _, _ in reversed(known)]),
        y=_shorts([y + s for _, y, s in known] + [y - s for _, y, s in reversed(known)]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_translucent(style.colour),
        hoverinfo="skip",
        showlegend=False,
        **(common | {"meta": {"method": method, "band": True}}),
    )
    line = go.Scatter(
        x=_shorts(curve.x),
        y=_shorts(curve.mean),
        mode="lines+markers" if markers else "lines",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"symbol": style.marker, "size": 7},
        customdata=[("" if s is None else f" ± {s:.3g}") for s in curve.spread],
        hovertemplate=f"{label} %{{y:.4g}}%{{customdata}}<extra></extra>",
        **common,
    )
    return [band, line] if known else [line]


def _plot(
    study: Study,
    section: str,
    title: str,
    traces: Sequence[Any],
    x: str,
    y: str,
    method: str | None = None,
    part: str = "",
) -> Plot:
    from plotly import graph_objects as go

    axis = {"gridcolor": _GRID, "linecolor": _GRID, "zeroline": False, "automargin": True, "title": {"standoff": 8}}
    layout = {
        "template": "none",
        "title": {"text": _plain(title), "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
        "font": {"family": _FONT, "size": 12, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 48, "r": 12, "t": 40, "b": 44},
        "height": 380,
        "hovermode": "closest",
        "dragmode": "zoom",
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "xaxis": axis | {"title": {"text": _plain(x), "standoff": 8}},
        "yaxis": axis | {"title": {"text": _plain(y), "standoff": 8}},
    }
    name = f"{slug(study.name)}-{section}-{slug(method or title)}{f'-{slug(part)}' if part else ''}"
    return Plot(name, section, title, go.Figure(data=list(traces), layout=layout), method)


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{_BAND})"


def _plain(text: str) -> str:
    """Text that plotly shows as it is: its labels know a little HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _with_spread(value: Estimate, spec: str) -> str:
    return format(value.mean, spec) + ("" if value.spread is None else f" ± {value.spread:{spec}}")


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _shorts(values: Iterable[float]) -> list[float]:
    return [_short(value) for value in values]

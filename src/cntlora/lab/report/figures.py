"""The main figures of a study as files for documents and papers, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from .curves import Curve, loss_curve, metric_curve, rate_labels, rates_curve, stretched
from .methods import BANDS, Style, styles
from .plots import abscissa
from .ranks import RankMap, adaptive, rank_maps
from .study import MEAN_LOSS, Group, Study
from .tables import metric_name, slug

FORMATS = ("svg", "png", "pdf")
MAPS = 6  # rank maps beside each other in a figure
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 1, 3)),
}
_MARKERS = {
    **{"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "cross": "P", "x": "X"},
    **{"pentagon": "p", "hexagon": "h", "star": "*", "triangle-left": "<", "triangle-right": ">"},
}


def save_figures(
    study: Study, folder: Path, suffix: str = "svg", methods: Mapping[str, Style] | None = None
) -> list[Path]:
    """Write the main figures: training loss, the main metric against steps and seconds, learning rates, init time, and
    the ranks where they are adaptive.

    Bands of ± one standard deviation are drawn for at most 8 methods. The same records give the same bytes.

    Args:
        suffix: "svg", "png" or "pdf".
        methods: which methods to draw, with their styles; default: all of the study.

    Raises:
        ValueError: another suffix.
    """
    if suffix not in FORMATS:
        raise ValueError(f"figures are written as {', '.join(FORMATS)}, got {suffix!r}")
    drawn = styles(study.best) if methods is None else dict(methods)
    made = []
    for name, figure in _figures(study, drawn).items():
        path = Path(folder) / f"{slug(study.name)}-{name}.{suffix}"
        write_atomically(path, _bytes(figure, suffix))
        made.append(path)
    return made


def _figures(study: Study, drawn: Mapping[str, Style]) -> dict[str, Any]:
    by, axis, factor = abscissa(study, clock=False)
    losses = _lines(
        study, drawn, lambda g: stretched(loss_curve(g), factor), axis, "training loss (smoothed)", markers=False
    )
    figures, metric = {"training-loss": losses}, study.main_metric
    if metric:
        name = metric_name(metric)
        figures[f"{slug(name)}-{by}"] = _lines(
            study, drawn, lambda g: stretched(metric_curve(g, metric), factor), axis, name
        )
        clock = "seconds, initialisation included"
        figures[f"{slug(name)}-seconds"] = _lines(
            study, drawn, lambda g: metric_curve(g, metric, clock=True), clock, name
        )
    rates = _lines(study, drawn, lambda g: rates_curve(study, g, MEAN_LOSS), "learning rate", "mean training loss")
    rates.axes[0].set_xscale("log")
    rates.axes[0].set_xticks(study.learning_rates, rate_labels(study.learning_rates))
    rates.axes[0].minorticks_off()
    figures |= {"learning-rates": rates, "init-time": _init(study, drawn)}
    maps = [(study.labels[m], found) for m in drawn if adaptive(study.best[m]) for found in rank_maps(study.best[m])]
    return figures | ({"ranks": _ranks(maps[:MAPS])} if maps else {})


def _lines(
    study: Study, drawn: Mapping[str, Style], curve_of: Callable[[Group], Curve], x: str, y: str, markers: bool = True
) -> Any:
    """One line and band a method, with the legend at the side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, max(3.6, 0.17 * len(drawn) + 0.6)), layout="constrained")
    axes = figure.subplots()
    for method, style in drawn.items():
        curve = curve_of(study.best[method]) if method in study.best else None
        if curve is None or not curve.x:
            continue
        known = [(a, b, s) for a, b, s in zip(curve.x, curve.mean, curve.spread, strict=True) if s is not None]
        if known and len(drawn) <= BANDS:
            at, means, spreads = zip(*known, strict=True)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=style.colour, alpha=0.12, linewidth=0)
        marker = _MARKERS[style.marker] if markers else ""
        look = {"color": style.colour, "linestyle": _DASHES[style.dash], "marker": marker, "markersize": 4}
        axes.plot(curve.x, curve.mean, linewidth=1.4, label=_plain(study.labels[method]), **look)
    _finish(axes, x, y)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7, handlelength=3.2)
    return figure


def _ranks(maps: Sequence[tuple[str, RankMap]]) -> Any:
    """Maps of ranks side by side, one scale for all (figures 10 and 15 of the paper)."""
    from matplotlib.figure import Figure

    top = max(value for _, found in maps for value in found.cells.values())
    rows = max(len(found.layers) for _, found in maps)
    figure = Figure(figsize=(3.4 * len(maps), 1.2 + 0.24 * max(6, rows)), layout="constrained")
    for axes, (label, found) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        kinds = list(dict.fromkeys(kind for _, kind in found.cells))
        grid = [[found.cells.get((layer, kind), math.nan) for kind in kinds] for layer in found.layers]
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.6 * (top or 1), aspect="auto")  # light: numbers stay legible
        for (layer, kind), value in found.cells.items():
            place = (kinds.index(kind), found.layers.index(layer))
            axes.text(*place, f"{value:.3g}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(kinds)), kinds, fontsize=7)
        axes.set_yticks(range(len(found.layers)), list(map(_plain, found.layers)), fontsize=6)
        axes.set_title(_plain(f"{label}{', ' if found.part else ''}{found.part.replace('_', ' ')}"), fontsize=8)
        axes.spines[:].set_visible(False)
    return figure


def _init(study: Study, drawn: Mapping[str, Style]) -> Any:
    from matplotlib.figure import Figure

    seconds = {m: study.best[m].estimate("init_seconds") for m in drawn if m in study.best}
    known = {method: (e.mean, e.spread or 0.0) for method, e in seconds.items() if e.mean is not None}
    figure = Figure(figsize=(7.2, 0.9 + 0.2 * max(4, len(known))), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [_plain(study.labels[method]) for method in known],
        [mean for mean, _ in known.values()],
        xerr=[spread for _, spread in known.values()],
        color=[drawn[method].colour for method in known],
        error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
    )
    axes.invert_yaxis()
    axes.margins(y=0.01)
    _finish(axes, "seconds of the initialisation", "")
    return figure


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a pair of them would start mathematics


def _bytes(figure: Any, suffix: str) -> bytes:
    """The file without what differs between two runs: the date, and random ids of svg elements."""
    import matplotlib

    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[suffix]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cntlora", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=suffix, metadata=undated, dpi=180)
    return buffer.getvalue()

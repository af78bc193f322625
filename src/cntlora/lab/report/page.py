"""One self-contained HTML page of all studies: tables to sort, plots to zoom, one filter of methods for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..record import RunRecord
from .by_setting import tables_by
from .formats import Table
from .gallery import gallery_part
from .methods import BANDS, GROUPS, Style, group_of, order_key, styles
from .plots import COST, CURVES, RANKS, RATES, SPECTRA, Plot, all_plots
from .sentences import glance, lead, provenance, rules, summary
from .study import MEAN_LOSS, Study, studies
from .tables import all_tables, slug

TITLE = "LoRA initialisations compared"
TOP = 6  # how many methods the button "Best 6 and LoRA" leaves besides plain LoRA
_GROUP_WORDS = {"peers": "Peers", "peft": "PEFT's own code", "ours": "Ours", "other": "Other"}
_PRESETS = (("all", "All"), ("none", "None"), ("ours", "Ours"), ("others", "Peers"), ("top", f"Best {TOP} and LoRA"))
_PATHS = {  # plotly's markers in a box of 10 × 10, for the legend
    "circle": "M5 .8a4.2 4.2 0 1 0 .01 0z",
    "square": "M1.4 1.4h7.2v7.2H1.4z",
    "diamond": "M5 .2 9.8 5 5 9.8.2 5z",
    "triangle-up": "M5 .6 9.8 9.2H.2z",
    "triangle-down": "M5 9.4.2.8h9.6z",
    "triangle-left": "M.6 5 9.2.2v9.6z",
    "triangle-right": "M9.4 5 .8.2v9.6z",
    "cross": "M3.4.6h3.2v2.8h2.8v3.2H6.6v2.8H3.4V6.6H.6V3.4h2.8z",
    "x": "M2.6.6 5 3 7.4.6l2 2L7 5l2.4 2.4-2 2L5 7 2.6 9.4l-2-2L3 5 .6 2.6z",
    "pentagon": "M5 .4 9.7 3.8 7.9 9.4H2.1L.3 3.8z",
    "hexagon": "M2.6.8h4.8L9.8 5 7.4 9.2H2.6L.2 5z",
    "star": "M5 .2 6.3 3.6l3.6.2-2.8 2.3.9 3.5-3-2-3 2 .9-3.5L.1 3.8l3.6-.2z",
}
_DASHES = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4", "longdashdot": "11 3 2 3"}
SAMPLES = "samples"
_PARTS = (  # name, title, tables by the start of their slug, section of plots, words
    ("results", "Results", ("best",), None, ""),
    (
        "curves",
        "Learning curves",
        (),
        CURVES,
        f"Each method at its best learning rate. Lines are means over seeds; with at most {BANDS} methods shown, bands "
        "are ± one sample standard deviation. The training loss is a trailing mean over a twentieth of the run. "
        "Wall-clock time includes the initialisation.",
    ),
    (
        SAMPLES,
        "Samples by step",
        (),
        None,
        "What the models make at the same prompts after so many steps; step 0 is the start of the training.",
    ),
    (
        "rates",
        "Learning rates",
        ("rates",),
        RATES,
        "Plots leave out a learning rate at which any seed diverged or failed; the tables have them.",
    ),
    ("cost", "Cost of the initialisation", (), COST, "Seconds at the best learning rate, error bars over seeds."),
    (
        "ranks",
        "Adaptive ranks",
        (),
        RANKS,
        "Mean rank over seeds at every depth and projection; one scale for all maps.",
    ),
    (
        "spectra",
        "Spectra",
        (),
        SPECTRA,
        "Singular values of what the initialisation estimates, mean over depths and seeds.",
    ),
    ("adapters", "Start and drift of the adapters", ("drift", "start"), None, ""),
    ("failures", "Failures", ("failures",), None, ""),
)


def build_page(
    records: Iterable[RunRecord],
    title: str | None = None,
    criterion: str = MEAN_LOSS,
    loss: float | None = None,
    by: str | None = None,
) -> str:
    """The report as one HTML page that asks for nothing else: the same records give the same bytes.

    Args:
        records: as `load_records` gives them.
        criterion: how the best learning rate is chosen, see `studies`.
        loss: the training loss that steps are counted to, see `main_table`.
        by: a setting that the experiments differ by, for tables over it, see `tables_by`.

    Raises:
        ValueError: no records, no metric of the name `criterion`, or see `tables_by`.
    """
    found = studies(records, criterion)
    if not found:
        raise ValueError("a report needs at least one run record, got none")
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    drawn = styles(method for study in found for method in study.best)
    over = tables_by(found, by) if by else []
    tables = {study.name: all_tables(study, loss) for study in found}
    plots = {study.name: all_plots(study, drawn) for study in found}
    every = [*over, *(table for same in tables.values() for table in same)]
    sources = {table.slug: {"latex": table.to_latex(), "markdown": table.to_markdown()} for table in every}
    content = {"plots": {p.slug: _figure(p) for ps in plots.values() for p in ps}, "tables": sources, "bands": BANDS}
    colours = {method: style.colour for method, style in drawn.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return (
        environment.from_string(_asset("page.html")).render(
            title=title or TITLE,
            lead=lead(found),
            css=_asset("page.css"),
            script=_asset("page.js"),
            plotly=get_plotlyjs(),
            content=json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
            presets=_PRESETS,
            groups=_groups(found, drawn),
            by=by,
            over=[_sheet(table, colours) for table in over],
            studies=[_study(study, tables[study.name], plots[study.name], colours) for study in found],
            provenance=provenance(run for study in found for run in study.runs),
        )
        + "\n"
    )


def _figure(plot: Plot) -> dict[str, Any]:
    """A figure's data and layout; the page has the title above it and the legend at its side."""
    spec = json.loads(plot.figure.to_json())
    layout = {key: value for key, value in spec["layout"].items() if key not in ("title", "template")}
    return {"data": spec["data"], "layout": layout | {"showlegend": False, "margin": layout["margin"] | {"t": 30}}}


def _groups(found: Sequence[Study], drawn: Mapping[str, Style]) -> list[dict[str, Any]]:
    labels = {method: label for study in reversed(found) for method, label in study.labels.items()}
    top = {method for study in found for method in _top(study)}
    groups = []
    for group in GROUPS:
        methods = [
            {
                "name": method,
                "label": labels[method],
                "colour": drawn[method].colour,
                "dashes": _DASHES.get(drawn[method].dash, ""),
                "path": _PATHS[drawn[method].marker],
                "top": method in top,
            }
            for method in sorted(drawn, key=order_key)
            if group_of(method) == group
        ]
        if methods:
            groups.append({"name": group, "words": _GROUP_WORDS[group], "methods": methods})
    return groups


def _top(study: Study) -> list[str]:
    """Plain LoRA, and the methods that the study's criterion has first, each at its best learning rate."""
    values = {m: g.value(study.criterion).mean for m, g in study.best.items() if g.whole}
    sign = -1.0 if study.way(study.criterion) == "max" else 1.0
    known = {method: sign * value for method, value in values.items() if value is not None}
    return ["lora", *sorted(known.keys() - {"lora"}, key=lambda method: (known[method], method))[:TOP]]


def _study(study: Study, tables: Sequence[Table], plots: Sequence[Plot], colours: Mapping[str, str]) -> dict[str, Any]:
    name = slug(study.name)
    parts = []
    for part, title, beginnings, section, text in _PARTS:
        starts = tuple(f"{name}-{beginning}" for beginning in beginnings)
        sheets = [_sheet(table, colours) for table in tables if starts and table.slug.startswith(starts)]
        drawn = [_drawn(plot) for plot in plots if plot.section == section]
        gallery = gallery_part(study, colours) if part == SAMPLES else None
        if sheets or drawn or gallery:
            shown = {"tables": sheets, "plots": drawn, "gallery": gallery}
            parts.append({"name": part, "title": title, "text": text, **shown})
    return {"name": study.name, "slug": name, "summary": summary(study), "parts": parts} | {
        "rules": rules(study),
        "glance": glance(study, tables[0]),
    }


def _sheet(table: Table, colours: Mapping[str, str]) -> dict[str, str]:
    return {"slug": table.slug, "title": table.title, "caption": table.caption, "html": table.to_html(colours)}


def _drawn(plot: Plot) -> dict[str, Any]:
    return {"slug": plot.slug, "title": plot.title, "method": plot.method, "height": plot.figure.layout.height}


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")

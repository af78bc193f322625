"""The pages of results: one a study, from its template in studies/pages/ and the tables of runs.

    python benchmarks/study_pages.py     # writes docs/results/

A template asks a question, answers it, and says which numbers show it:

    <!-- table lora, descent | mean_loss, against, loss -->

is a table of these methods, each at its best learning rate. `STUDY: ` before the methods takes another study than the
one that the template is named after, `| at 0.003` behind the columns takes that learning rate, `| by loss` chooses the
best learning rate by a held-out metric. Columns are those of `COLUMNS` and every held-out metric;
`loss@100` is that after 100 steps, of the first seed. `<!-- rates NAME -->` is a table of `benchmarks.rates`, over all
studies, `<!-- lasting NAME -->` one of `benchmarks.lasting`, over those of whole trainings.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import lasting, rates
from benchmarks.machine import RESULTS as RECORDS
from benchmarks.overview import ROOT, RUNS, starts, study_of

from cntlora.atomic import write_atomically
from cntlora.lab.experiments.arms import LABELS
from cntlora.lab.report import load_records, studies, study_tables
from cntlora.lab.report.batches_read import later_against
from cntlora.lab.report.formats import Cell, Column, Row, Table
from cntlora.lab.report.study import Estimate, Group, Study
from cntlora.lab.report.tables import metric_name, number_spec

PAGES, IMAGES, OUT = ROOT / "studies" / "pages", ROOT / "studies" / "images", ROOT / "docs" / "results"
MOST_ROWS, MOST_LINES = 6, 250
TABLE = re.compile(r"^<!-- table (?:(\w+): )?([^|]+?) \| ([^|]+?)(?: \| (at|by) (\S+))? -->$", re.MULTILINE)
RATES = re.compile(r"^<!-- rates (\w+) -->$", re.MULTILINE)
LASTING = re.compile(r"^<!-- lasting (\w+) -->$", re.MULTILINE)

STUDY = cache(study_of)
Value = Callable[[Group, Study], Estimate]
COLUMNS: dict[str, tuple[str, str | None, str, Value]] = {
    "learning_rate": ("learning rate", None, "g", lambda group, _: Estimate.of([group.learning_rate])),
    "seeds": ("seeds", None, "d", lambda group, _: Estimate.of([len(group.finished)])),
    "mean_loss": ("mean training loss", "min", "", lambda group, _: group.estimate("mean_loss")),
    "against": ("difference from plain LoRA", "min", "+.3f", lambda group, s: group.against(s.best["lora"])),
    "against4": ("difference from plain LoRA", "min", "+.4f", lambda group, s: group.against(s.best["lora"])),
    "later": ("difference after the batches read", "min", "+.3f", lambda g, s: later_against(g, s.best["lora"])),
    "init_seconds": ("initialisation, s", None, ".1f", lambda group, _: group.estimate("init_seconds")),
    "parameters": ("trainable parameters", None, ",d", lambda group, _: Estimate.of([_parameters(group)])),
}
"""Name in a template → head, which is better, format ("" for one that fits the numbers), value."""


HEADS = {
    "dinov2": "DINOv2 similarity",
    "efficientnet": "EfficientNet similarity",
    "general_perplexity": "perplexity of dialogue",
    "recall": "called by the right name",
    "wrong_concept": "called by a wrong name",
}
"""What some metrics are called on the pages."""


def filled(template: Path, runs: Path = RUNS, records: Path = RECORDS) -> str:
    """The page of a template.

    Raises:
        ValueError: a table has more than six rows or the page more than 250 lines; names the template.
        KeyError: a table names a method or column that the study does not have.
    """
    used: dict[str, Study] = {}

    def table(match: re.Match[str]) -> str:
        name, methods, columns, word, value = match.groups()
        name = name or template.stem
        study = STUDY(runs, name, value if word == "by" else "mean_loss")
        used.setdefault(name, study)
        rows = [m.strip() for m in methods.split(",")]
        if len(rows) > MOST_ROWS:
            raise ValueError(f"{template}: a table has {len(rows)} rows, expected at most {MOST_ROWS}")
        return _markdown(study, rows, [c.strip() for c in columns.split(",")], float(value) if word == "at" else None)

    text = TABLE.sub(table, template.read_text(encoding="utf-8"))
    text = RATES.sub(lambda match: rates.TABLES[match[1]](runs), text)
    text = LASTING.sub(lambda match: lasting.lasting(match[1], runs), text)
    with_starts = "<!-- starts -->" in text
    if with_starts:
        text = text.replace("<!-- starts -->", starts(records / "starts.json"))
    text = _with_names(text)
    if used and not with_starts:
        text = f"{text.rstrip()}\n\n{_sources(used)}"
    if len(text.splitlines()) > MOST_LINES or "<!--" in text:
        raise ValueError(
            f"{template}: expected at most {MOST_LINES} lines and no directive but table, rates, lasting and starts"
        )
    return text


def _with_names(text: str) -> str:
    """The page, with the methods that our labels in its tables stand for before its first question."""
    labels = {label: name for name, label in LABELS.items() if label.startswith("CNTLoRA-")}
    found = [f"{label} is `{name}`" for label, name in labels.items() if re.search(rf"{label}\b", text)]
    head, question, rest = text.partition("\n## ")
    return f"{head}\nIn the tables {', '.join(found)}.\n{question}{rest}" if found else text


def _markdown(study: Study, methods: list[str], names: list[str], rate: float | None) -> str:
    groups = [_group(study, method, rate) for method in methods]
    columns, values = [Column("Method")], []
    for name in names:
        head, way, spec, value = COLUMNS[name] if name in COLUMNS else _metric(study, name)
        found = [value(group, study) for group in groups]
        way = way if any(estimate.count > 1 for estimate in found) else None  # with one seed a difference may be chance
        columns.append(Column(head, way, spec or number_spec(found)))  # type: ignore[arg-type]
        values.append(found)
    rows = [Row(m, (Cell(study.labels[m]), *(Cell.of(column[i]) for column in values))) for i, m in enumerate(methods)]
    return Table("", "", tuple(columns), tuple(rows)).to_markdown().partition("\n\n")[2].rstrip()


def _parameters(group: Group) -> float | None:
    return group.estimate("trainable_parameters").mean


def _group(study: Study, method: str, rate: float | None) -> Group:
    if rate is None:
        return study.best[method]
    return next(group for group in study.groups if (group.method, group.learning_rate) == (method, rate))


def _metric(study: Study, name: str) -> tuple[str, str | None, str, Value]:
    metric, _, step = name.partition("@")
    if step:
        return f"step {step}", study.metrics[metric], "", lambda group, _: _after(group, metric, int(step))
    return HEADS.get(name) or metric_name(name), study.metrics[name], "", lambda group, _: group.final(name)


def _after(group: Group, metric: str, step: int) -> Estimate:
    """A held-out metric after a number of steps, of the first seed."""
    first = (run for run in group.finished if run["seed"] == 0)
    return Estimate.of(e[metric] for run in first for e in run["evaluations"] if e["step"] == step)


def _sources(used: dict[str, Study]) -> str:
    """The way from the numbers of a page back to the runs."""
    lines = [
        "## Where the numbers come from",
        "",
        "Each method is at its best learning rate, the one with the lowest mean training loss, unless the text says "
        "otherwise. Cells are means ± standard deviation over seeds. Differences are of the mean training loss, "
        "between runs with the same seed, head, data and order; a negative one is better than plain LoRA. Held-out "
        "values are of the last evaluation.",
        "",
    ]
    for name, study in used.items():
        methods = ", ".join(f"{study.labels[m]} `{m}`" for m in study.best)
        commits = ", ".join(sorted({str(run.get("git")) for run in study.runs}))
        lines += [
            f"- **{name}**: {len(study.runs)} runs in `studies/runs/{name}.parquet`, a row a run (`method`, "
            f"`learning_rate`, `seed`), each with its settings, curves and the command that makes it again. Study "
            f"file: `studies/{name}.toml`. All tables: [{name}.txt](files/{name}.txt).",
            f"    - Methods: {methods}.",
            f"    - Commits: {commits}.",
            f"    - To run it again: `cntlora compare studies/{name}.toml --jobs 2`. Interactive page: `cntlora report "
            f"studies/runs/{name}.parquet --out build/results/{name}`.",
        ]
    return "\n".join(lines) + "\n"


def title_and_summary(template: Path) -> tuple[str, str]:
    """The title of a page, and the paragraph behind it, which says what came out."""
    title, summary = template.read_text(encoding="utf-8").split("\n\n")[:2]
    return title.removeprefix("# "), " ".join(summary.split())


def index(templates: list[Path]) -> str:
    """The index: one line a page."""
    lines = []
    for template in templates:
        title, summary = title_and_summary(template)
        lines.append(f"| [{title}]({template.name}) | {summary} |")
    head = (PAGES / "index.md").read_text(encoding="utf-8").rstrip()
    return "\n".join([head, "", "| study | what came out |", "| :--- | :--- |", *lines]) + "\n"


def make(out: Path = OUT, runs: Path = RUNS) -> list[Path]:
    """Write all pages, their images and the files with all tables; return the pages."""
    templates = sorted(path for path in PAGES.glob("*.md") if path.name != "index.md")
    texts = {out / template.name: filled(template, runs) for template in templates}
    texts[out / "index.md"] = index(templates)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(IMAGES, out / "images")
    for path, text in texts.items():
        write_atomically(path, text.encode())
    for table in sorted(runs.glob("*.parquet")):
        tables = [t.to_text() for study in studies(load_records(table)) for t in study_tables(study)]
        write_atomically(out / "files" / f"{table.stem}.txt", "\n\n".join(tables).encode())
    return list(texts)


if __name__ == "__main__":
    make()

"""Reports from records of runs: comparison tables, plots, and one self-contained HTML page.

    from cntlora.report import write_report
    write_report(Path("results/tweets"), Path("report"))   # page.html, tables.md, tables.tex, tables.txt, figures/

The parts are pure functions: `records` reads and groups, `tables` and `plots` make what a `Study` shows, `page` puts
it together.
"""

from __future__ import annotations

from pathlib import Path

from .by_setting import tables_by
from .formats import Table
from .study import MEAN_LOSS, Study, load_records, studies
from .tables import brief_tables

__all__ = ["between", "load_records", "studies", "study_tables", "write_into", "write_report"]
_LATEX_HEAD = "% needs \\usepackage{booktabs,graphicx}; made by cntlora report\n"


def write_report(
    results: Path,
    out: Path,
    title: str | None = None,
    criterion: str = MEAN_LOSS,
    *,
    loss: float | None = None,
    figures: str | None = "svg",
    by: str | None = None,
) -> list[Path]:
    """Read the records under `results` and write the page, the tables and the figures.

    Args:
        results: a folder of records, or a table that `cntlora results pack` wrote.
        out: a folder, which gets page.html, or the page itself (a name that ends in .html). Beside the page:
            tables.txt, tables.md, tables.tex and figures/.
        criterion: what the best learning rate has the best of: "mean_loss" (of training), "main" (each study's main
            metric) or a held-out metric.
        loss: the training loss that steps are counted to; default: what plain LoRA ends with at its best learning rate.
        figures: "svg", "png", "pdf", or None for no figures. A gallery of images always is a PNG.
        by: a setting that the experiments differ by, such as "lora.rank": tables over its values, see `tables_by`.

    Returns:
        The files that were written; each is replaced as a whole or not at all.

    Raises:
        ValueError: see `load_records`, `studies`, `tables_by` and `save_figures`.
    """
    from ...atomic import write_atomically
    from .figures import save_figures
    from .grids import save_grids
    from .methods import styles
    from .page import build_page

    records = load_records(Path(results))
    found = studies(records, criterion)
    page = Path(out) if Path(out).suffix in (".html", ".htm") else Path(out) / "page.html"
    tables = {f"By {by}": tables_by(found, by)} if by else {}
    tables |= {study.name: study_tables(study, loss) for study in found}
    every = [table for same in tables.values() for table in same]
    markdown = (f"## {name}\n\n" + "\n".join(t.to_markdown() for t in same) for name, same in tables.items())
    texts = {
        page: build_page(records, title, criterion, loss, by),
        page.parent / "tables.txt": "\n\n".join(table.to_text() for table in every),
        page.parent / "tables.md": "\n".join(markdown),
        page.parent / "tables.tex": _LATEX_HEAD + "\n".join(table.to_latex() for table in every),
    }
    drawn = styles(method for study in found for method in study.best)  # as on the page, whatever a study lacks
    pictures: list[Path] = []
    if figures is not None:
        for study in found:
            own = {method: drawn[method] for method in study.best}
            pictures += save_figures(study, page.parent / "figures", figures, own)
            pictures += save_grids(study, page.parent / "figures")
    for path, text in texts.items():
        write_atomically(path, text.encode())
    return [*texts, *pictures]


def write_into(
    document: Path, results: Path, criterion: str = MEAN_LOSS, *, loss: float | None = None, by: str | None = None
) -> None:
    """Put the Markdown tables of every study between its two marks in a document, in place of what is there.

    The marks of a study NAME are the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`; with
    `<!-- NAME: begin brief -->` only the methods at their best and the learning rates are put.

    Args:
        by: a setting that the experiments differ by: only the tables over it are put, between the marks of the folder's
            name and the setting, such as `<!-- table7 by lora.rank: begin -->`.

    Raises:
        ValueError: if the document has no such marks (names the study), or see `load_records`, `studies`, `tables_by`.
    """
    from ...atomic import write_atomically

    found = studies(load_records(Path(results)), criterion)
    text = document.read_text(encoding="utf-8")
    if by:
        text = between(document, text, f"{Path(results).resolve().stem} by {by}", _markdown(tables_by(found, by)))
    for study in found if not by else ():
        brief = f"<!-- {study.name}: begin brief -->" in text
        tables = brief_tables(study, loss) if brief else study_tables(study, loss)
        text = between(document, text, study.name, _markdown(tables), "begin brief" if brief else "begin")
    write_atomically(document, text.encode())


def between(document: Path, text: str, name: str, content: str, word: str = "begin") -> str:
    """The text of a document with `content` between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: if it has no such lines; names the document.
    """
    begin, end = f"<!-- {name}: {word} -->", f"<!-- {name}: end -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{document}: expected the lines {begin} and {end} around the tables of {name!r}")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def _markdown(tables: list[Table]) -> str:
    return "\n".join(table.to_markdown() for table in tables)


def study_tables(study: Study, loss: float | None = None) -> list[Table]:
    """Make all tables of a study, with its texts, which the page shows as a gallery."""
    from .gallery import caption_tables
    from .tables import all_tables

    return [*all_tables(study, loss), *caption_tables(study)]

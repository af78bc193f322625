"""The tables of a study: best learning rates, sensitivity, distance from the start, step 0, runs that do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ..record import RunRecord
from .batches_read import later_against
from .curves import reference_loss, seconds_to_reach, steps_to_reach
from .formats import Cell, Column, Direction, Row, Table
from .methods import group_of
from .other_models import runs_of_other_models
from .study import MEAN_LOSS, Estimate, Group, Study, finite, kinds, start_loss

BROKEN, CHOSEN = "†", "‡"
_NAMES = {
    **{MEAN_LOSS: "mean training loss", "loss": "held-out loss", "clip_i": "CLIP-I", "clip_t": "CLIP-T"},
    **{"sentsim": "SentSim", "sent_sim": "SentSim"},
}
_WORDS = {"f1": "F1", "dino": "DINO", "clip": "CLIP"}
_RUN_COLUMNS = (Column("Method"), Column("lr", spec="g"), Column("seed", spec="d"))
ONE_SEED = "One seed: a difference may be chance, so no best is marked."
_BROKEN_NOTE = f" {BROKEN} a seed diverged or failed: mean over the others, not ranked."


def all_tables(study: Study, loss: float | None = None) -> list[Table]:
    """The tables of a study that have something to show, in the order of reading; `loss` as for `main_table`."""
    metrics = [study.main_metric] if study.main_metric else []
    tables = [
        main_table(study, loss),
        sensitivity_table(study, MEAN_LOSS),
        *(sensitivity_table(study, metric) for metric in metrics),
        drift_table(study),
        drift_table(study, "cosine_product"),
        start_table(study),
        failures_table(study),
        other_models_table(study),
    ]
    return [table for table in tables if table.rows]


def brief_tables(study: Study, loss: float | None = None) -> list[Table]:
    """Those of `all_tables` that say which method is best, and at which learning rate, and which runs do not count."""
    tables = [main_table(study, loss), sensitivity_table(study, MEAN_LOSS), failures_table(study)]
    return [table for table in (*tables, other_models_table(study)) if table.rows]


def main_table(study: Study, loss: float | None = None) -> Table:
    """Each method at its best learning rate.

    Args:
        loss: the smoothed training loss that the steps are counted to; default: what plain LoRA, at its own best
            learning rate, ends with. Without such runs there is no column for it.
    """
    loss = reference_loss(study) if loss is None else loss
    spec = number_spec(group.estimate(MEAN_LOSS) for group in study.best.values())
    columns = [Column("Method"), Column("lr", spec="g"), Column("seeds", spec="d")]
    columns += [Column("mean training loss", "min", spec)]
    if "lora" in study.best:
        columns += [Column(head, "min", f"+{spec}") for head in ("against LoRA", "later")]
    columns += [metric_column(study, metric) for metric in study.metrics]
    if loss is not None:
        columns += [Column(f"steps to {loss:{spec}}", "min", "d"), Column(f"s to {loss:{spec}}", "min", ".1f")]
    columns += [Column("init s", spec=".1f"), Column("train s", spec=".1f"), Column("peak MiB", spec=",d")]
    columns += [Column("trainable", spec=",d")]
    rows = [_row(study, group, _main_cells(study, group, loss)) for group in study.best.values()]
    caption = (
        f"Chosen by the {criterion_words(study)}. {_over_seeds(study)} Held-out metrics are of the last evaluation."
    )
    if "lora" in study.best:
        caption += (
            " Against LoRA: difference of the mean training loss of runs with the same seed, head, data and order. "
            "Later: behind the steps whose batches the initialisation had read, which are the first of the training."
        )
    if loss is not None:
        caption += (
            " Steps, and seconds with the initialisation, until the smoothed training loss, averaged over seeds, "
        )
        caption += f"is at or below {loss:{spec}}."
    return _table(study, "best", "Methods at their best learning rate", columns, rows, caption + _broken(study))


def sensitivity_table(study: Study, metric: str) -> Table:
    """One value at every learning rate: the mean training loss ("mean_loss") or a held-out metric."""
    way, spec = _way(study.way(metric)), number_spec(group.value(metric) for group in study.groups)
    columns = [Column("Method"), *(Column(f"{rate:g}", way, spec, arrow=False) for rate in study.learning_rates)]
    by_place = {(group.method, group.learning_rate): group for group in study.groups}
    rows = []
    for method, best in study.best.items():
        found = [by_place.get((method, rate)) for rate in study.learning_rates]
        cells = [Cell() if group is None else _sensitivity_cell(group, metric, group is best) for group in found]
        rows.append(_row(study, best, cells))
    name = metric_name(metric)
    title = f"{name[0].upper()}{name[1:]} at every learning rate"
    caption = f"{'Lower' if way == 'min' else 'Higher'} is better. {_over_seeds(study)} {CHOSEN} the method's best "
    caption += (
        f"learning rate ({criterion_words(study)}). In brackets how many seeds finished where some did not; not ranked."
    )
    return _table(study, f"rates-{metric}", title, columns, rows, caption + _broken(study))


def drift_table(study: Study, cosine: str = "cosine") -> Table:
    """Table 2 of the paper: cosine similarity and spectral norm between initial and final adapters, by kind.

    Args:
        cosine: "cosine" (of the factors), or "cosine_product" (of the product B·A, without the spectral norm).
    """
    product = cosine != "cosine"
    parts: list[tuple[str, str, Direction]] = [(cosine, "cosine similarity", "max")]
    parts += [] if product else [("spectral_norm", "spectral norm", "min")]
    found = kinds(study.best.values())
    columns = [Column("Method"), *(Column(kind, way, above=head) for _, head, way in parts for kind in found)]
    rows = []
    for group in study.best.values():
        values = [group.over_sites(key, kind=kind) for key, _, _ in parts for kind in found]
        if any(v.mean is not None for v in values):
            rows.append(_row(study, group, [Cell.of(v, competes=group.whole) for v in values]))
    of = "products B·A" if product else "adapters"
    title = f"Initial against final {of}"
    caption = (
        f"Mean over sites, then over seeds, at the best learning rate (Das et al. 2025, table 2). {_over_seeds(study)}"
    )
    return _table(study, f"drift-{cosine.replace('_', '-')}", title, columns, rows, caption + _broken(study))


def start_table(study: Study) -> Table:
    """Appendix B of the paper: gradients of A and B at step 0, and how far the start is from the pretrained model."""
    columns = [Column("Method"), Column("‖∂L/∂A‖", spec="#.3g"), Column("‖∂L/∂B‖", spec="#.3g")]
    columns += [Column("‖s·B·A‖/‖W‖", spec="#.3g"), Column("loss before"), Column("loss after")]
    columns += [Column("Δ loss", spec="+.3f")]
    rows = []
    for group in study.best.values():
        values = [group.over_sites("gradient_A"), group.over_sites("gradient_B")]
        values += [group.over_sites("start_norm", over="weight_norm"), *_start_losses(group)]
        if any(v.mean is not None for v in values):
            rows.append(_row(study, group, [Cell.of(v) for v in values]))
    caption = (
        "Frobenius norms at step 0, mean over sites, then over seeds, at the best learning rate (Das et al. 2025, "
    )
    caption += (
        "appendix B); s·B·A is of the directions that train. The loss is of the first training batch, before and "
    )
    caption += f"after the initialisation. {_over_seeds(study)}"
    return _table(study, "start", "Gradients and distance at step 0", columns, rows, caption + _broken(study))


def failures_table(study: Study) -> Table:
    """Every run that diverged or failed, with its reason."""
    columns = [*_RUN_COLUMNS, Column("status", words=True), Column("reason", words=True)]
    broken = [run for run in study.runs if run["status"] != "finished"]
    rows = [_run_row(study, run, Cell(str(run["status"])), Cell(_reason(run))) for run in broken]
    return _table(study, "failures", "Runs that did not finish", columns, rows, "")


def other_models_table(study: Study) -> Table:
    """Every run that is not of the model and data of the others, which is not to be compared with them."""
    columns = [*_RUN_COLUMNS, Column("loss before", spec="#.5g"), Column("of most", spec="#.5g")]
    rows = [
        _run_row(study, run, Cell(mean=start_loss(run, "loss_before")), Cell(mean=usual))
        for run, usual in runs_of_other_models(study.runs)
    ]
    caption = (
        "Before the initialisation the loss of the first training batch is not that of most runs of the seed: the "
        "pretrained model or the data is another. Make these runs again, or put them into a folder of their own."
    )
    return _table(study, "strangers", "Runs of another model or other data", columns, rows, caption)


def metric_name(metric: str) -> str:
    """A metric in words: "mean_loss" becomes "mean training loss", "loss" "held-out loss", "macro_f1" "macro F1"."""
    return _NAMES.get(metric) or " ".join(_WORDS.get(word, word) for word in metric.split("_"))


def metric_column(study: Study, metric: str, head: str | None = None) -> Column:
    """The column of the mean training loss or of a held-out metric at the best learning rates."""
    spec = number_spec(group.value(metric) for group in study.best.values())
    return Column(metric_name(metric) if head is None else head, _way(study.way(metric)), spec)


def number_spec(values: Iterable[Estimate]) -> str:
    """The format of a column of numbers: three decimals, and one more for every zero that the largest begins with."""
    largest = max((abs(value.mean) for value in values if value.mean), default=1.0)
    return f".{3 + min(5, max(0, math.ceil(-math.log10(largest)) - 1))}f"


def criterion_words(study: Study) -> str:
    """Return in words how the best learning rate was chosen."""
    if study.criterion == MEAN_LOSS:
        return "lowest mean training loss over seeds"
    way = "highest" if study.way(study.criterion) == "max" else "lowest"
    return f"{way} {metric_name(study.criterion)} at the last evaluation over seeds"


def _main_cells(study: Study, group: Group, loss: float | None) -> list[Cell]:
    whole = group.whole
    seeds = f"{len(group.finished)}/{len(group.runs)}"
    cells = [Cell(mean=group.learning_rate), Cell(mean=len(group.runs)) if whole else Cell(seeds)]
    cells += [Cell.of(group.estimate(MEAN_LOSS), competes=whole)]
    if "lora" in study.best:
        plain = study.best["lora"]
        cells += [Cell.of(value, competes=whole) for value in (group.against(plain), later_against(group, plain))]
    cells += [Cell.of(group.final(metric), competes=whole) for metric in study.metrics]
    if loss is not None:
        reached = (steps_to_reach(group, loss), seconds_to_reach(group, loss))
        cells += [Cell(mean=value, competes=whole) for value in reached]
    costs = ("init_seconds", "train_seconds", "peak_memory_mib", "trainable_parameters")
    return cells + [_cost(group.estimate(cost), spread=cost.endswith("seconds")) for cost in costs]


def _cost(estimate: Estimate, spread: bool) -> Cell:
    return Cell(mean=estimate.mean, spread=estimate.spread if spread else None)


def _sensitivity_cell(group: Group, metric: str, best: bool) -> Cell:
    note = CHOSEN if best else ""
    if not group.finished:
        states = sorted({str(run["status"]) for run in group.runs})
        return Cell("/".join(states), note=note)
    value = group.value(metric)
    broken = "" if group.whole else f" ({len(group.finished)}/{len(group.runs)})"
    return Cell.of(value, broken + note, group.whole)


def _reason(run: RunRecord) -> str:
    if run.get("error"):
        return " ".join(str(run["error"]).split())
    if run["status"] == "diverged":
        return f"training loss not finite after step {len(run.get('losses') or ())}"
    return "no reason recorded"


def _start_losses(group: Group) -> list[Estimate]:
    before = [start_loss(run, "loss_before") for run in group.finished]
    after = [start_loss(run, "loss_after") for run in group.finished]
    change = [None if a is None or b is None else a - b for a, b in zip(after, before, strict=True)]
    return [Estimate.of(before), Estimate.of(after), Estimate.of(change)]


def _row(study: Study, group: Group, cells: Sequence[Cell]) -> Row:
    label = Cell(study.labels[group.method], note="" if group.whole else BROKEN)
    return Row(group.method, (label, *cells), group_of(group.method))


def _run_row(study: Study, run: RunRecord, *cells: Cell) -> Row:
    place = (Cell(study.labels[run["method"]]), Cell(mean=finite(run["learning_rate"])), Cell(mean=run["seed"]))
    return Row(run["method"], (*place, *cells), group_of(run["method"]))


def _table(study: Study, name: str, title: str, columns: Sequence[Column], rows: Sequence[Row], caption: str) -> Table:
    name = f"{slug(study.name)}-{slug(name)}"
    return Table(name, title, tuple(columns), tuple(rows), caption, ranked=study.repeated)


def _over_seeds(study: Study) -> str:
    return "Mean ± sample standard deviation over seeds." if study.repeated else ONE_SEED


def _broken(study: Study) -> str:
    return "" if all(group.whole for group in study.best.values()) else _BROKEN_NOTE


def _way(way: str) -> Direction:
    return "max" if way == "max" else "min"


def slug(name: str) -> str:
    """A name for ids, labels and files: ASCII letters, digits and hyphens."""
    kept: Callable[[str], str] = lambda c: c if c.isascii() and c.isalnum() else "-"  # noqa: E731
    return "-".join(filter(None, "".join(map(kept, name)).split("-"))).lower() or "study"

"""The commands of experiments: `cntlora run`, `compare`, `report`, `results pack` and `results unpack`.

`register` puts them on the application.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import one_line_errors
from ..messages import counted
from .arguments import check_folder
from .places import Address, Cpus, Engine, Gpus, Places, ShardText

if TYPE_CHECKING:
    from ..lab.experiments.settings import Experiment
    from ..lab.experiments.sweep import Listener, Sweep
    from ..lab.record import RunRecord

File = Annotated[Path, typer.Argument(help="Experiment file: TOML with differences from the defaults.")]
_OUT = """Folder of the records, one JSON file a run.
[default: results/NAME; with --data results/NAME-DATA; with --model or --set alone results/NAME-changed]"""
Out = Annotated[Path | None, typer.Option(help=_OUT)]
_JOBS = """Runs side by side; each gets its share of the cores.
[default: 1; with --smoke one a core, 8 at most; with --engine ray as many as there is room for]"""
Jobs = Annotated[int | None, typer.Option(help=_JOBS, min=1)]
Smoke = Annotated[
    bool,
    typer.Option(
        "--smoke",
        help="Only try the file out, offline: 2 steps, one rate, one seed, a tiny random model, made-up data; yours, "
        "if you name it, is read and checked first.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs and what is there already; run nothing.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run again what failed.")]
Replace = Annotated[bool, typer.Option("--replace", help="Run again what has a record of other settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE over the file, such as lora.rank=4 or train.epochs=3; may be repeated."),
]
Data = Annotated[str | None, typer.Option(help="Your data, for task.data: a file, a folder or a name on the hub.")]
Model = Annotated[str | None, typer.Option(help="The model, for task.model: a folder or a name on the hub.")]
SaveAdapters = Annotated[
    bool, typer.Option("--save-adapters", help="Keep the trained adapter of every run done now beside its record.")
]
Methods = Annotated[
    str | None, typer.Option(help="Comma-separated, such as lora,self,cross+vas.  [default: the file's]")
]
Rates = Annotated[str | None, typer.Option(help="Comma-separated, for every method.  [default: the file's]")]
Seeds = Annotated[str | None, typer.Option(help="Comma-separated.  [default: the file's]")]
_REPORT_TO = """Report curves and the initialisation to tensorboard, wandb or mlflow, with commas between.
 [default: the file's, which has none unless it says so]"""
ReportTo = Annotated[str | None, typer.Option(help=_REPORT_TO)]
AsJson = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]
_COMPARE = "Run an experiment, with other methods, learning rates or seeds if given, and print each method at its best."
"""The same command by another name, which says what it is for."""


@dataclass(frozen=True)
class Options:
    """Options that `run` and `compare` share."""

    out: Path | None
    jobs: int | None
    smoke: bool
    dry_run: bool
    retry_failed: bool
    replace: bool
    as_json: bool
    save_adapters: bool = False
    changes: tuple[str, ...] = ()
    places: Places = field(default_factory=Places)
    report_to: str | None = None


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(run)
    app.command("compare", help=_COMPARE)(run)
    app.command()(report)
    tables = typer.Typer(help="Keep the records of a study as one table: pack a folder, unpack it again.")
    tables.command()(pack)
    tables.command()(unpack)
    app.add_typer(tables, name="results", no_args_is_help=True)


def run(
    experiment: File,
    methods: Methods = None,
    learning_rates: Rates = None,
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    as_json: AsJson = False,
    changes: Set = None,
    data: Data = None,
    model: Model = None,
    save_adapters: SaveAdapters = False,
    shard: ShardText = None,
    report_to: ReportTo = None,
    engine: Engine = "local",
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = None,
) -> None:
    """Run all methods, learning rates and seeds of an experiment file, or others; go on where it stopped."""
    grid = {"methods": (methods, str), "learning_rates": (learning_rates, float), "seeds": (seeds, int)}
    given = _changes(changes, data, model)
    places = Places(engine, address, cpus, gpus, shard)
    options = Options(
        out, jobs, smoke, dry_run, retry_failed, replace, as_json, save_adapters, given, places, report_to
    )
    _command(experiment, grid, options)


def report(
    results: Annotated[
        Path, typer.Argument(help="Folder of records, subfolders included, or a table of them (.parquet).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for page, tables and figures, or the page itself (.html); this or --into."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="What the best learning rate has the best of: mean_loss, main (the main metric) or a held-out metric."
        ),
    ] = "mean_loss",
    loss: Annotated[
        float | None, typer.Option(help="Training loss to count steps to.  [default: where plain LoRA ends]")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Put the tables between the marks of each study in this Markdown file; this, --out or both."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="A setting that differs between experiments, such as lora.rank: tables over its values."),
    ] = None,
) -> None:
    """Write tables, plots and one self-contained page from the records of runs."""
    with one_line_errors("cntlora report", "lab"):
        from ..lab.report import write_into, write_report

        if not results.is_dir() and not (results.is_file() and results.suffix == ".parquet"):
            raise ValueError(f"{results} is no folder; give the folder that the records of the runs are in, or a table")
        if out is None and into is None:
            raise ValueError("nothing to write: give --out for a page, or --into for the tables in a document")
        for path in write_report(results, out, title, criterion, loss=loss, by=by) if out else ():
            typer.echo(path)
        if into is not None:
            write_into(into, results, criterion, loss=loss, by=by)
            typer.echo(into)


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of records; its subfolders are read too.")],
    table: Annotated[Path, typer.Argument(help="The table to write; its name ends in .parquet.")],
) -> None:
    """Write every record of a folder into one compressed table, a row a run, without a loss.

    pandas reads it: settings are columns such as config.lora.rank, curves are columns of lists. Files of samples stay
    where they are.
    """
    with one_line_errors("cntlora results pack", "lab"):
        from ..lab.report import load_records
        from ..lab.run_table import write_table

        records = load_records(folder)
        write_table(table, records)
        typer.echo(f"{table}: {len(records)} runs")


def unpack(
    table: Annotated[Path, typer.Argument(help="A table that `cntlora results pack` wrote.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the records, one JSON file a run; no file is replaced.")],
) -> None:
    """Write the records of a table as JSON files again, so that `cntlora run --out` goes on from there."""
    with one_line_errors("cntlora results unpack", "lab"):
        from ..lab.run_table import unpack as unpacked

        typer.echo(f"{folder}: {unpacked(table, folder)} runs")


def _command(path: Path, grid: Mapping[str, tuple[str | None, type]], options: Options) -> None:
    """Read the file, run the sweep, say what came out; exit code 1 if a run failed."""
    with one_line_errors("a comparison of methods", "lab"):
        options.places.check()
        given = {name: _listed(name, text, kind) for name, (text, kind) in grid.items()}
        if options.out is not None:
            check_folder("--out", options.out)
        from ..lab.experiments.settings import load_experiment, replaced
        from ..lab.experiments.user_data import own_name

        experiment = replaced(load_experiment(path, options.changes), **given)
        if options.report_to is not None:  # no change of the file's settings: it has no effect on the records
            names = _listed("report_to", options.report_to, str) or ()
            experiment = replace(experiment, train=replace(experiment.train, report_to=tuple(names)))
        experiment, folder = own_name(experiment, options.changes)
        with _tried(experiment, options) as experiment, _folder(folder, options) as out:
            if options.dry_run:
                _list(experiment, out, options)
                return
            sweep = _sweep(experiment, out, options)
            _tell(sweep, out, options)
        if sweep.count("failed"):
            raise SystemExit(1)


def _changes(changes: list[str] | None, data: str | None, model: str | None) -> tuple[str, ...]:
    """All that is put over the file, as KEY=VALUE."""
    named = {"task.data": data, "task.model": model}
    return (*(changes or ()), *(f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None))


@contextmanager
def _tried(experiment: Experiment, options: Options) -> Iterator[Experiment]:
    """The experiment, or with --smoke its tiny form, whose model and data lie in a temporary folder.

    Data that is named on the command line is checked before the trial, which does not use it.
    """
    from ..lab.experiments.runs import TRIAL
    from ..lab.experiments.settings import smoke
    from ..lab.experiments.user_data import check_data, sets_data

    if not options.smoke:
        yield experiment
        return
    with tempfile.TemporaryDirectory(prefix=TRIAL) as folder:
        tiny = smoke(experiment, Path(folder))
        if sets_data(options.changes):
            found = check_data(experiment.task, tiny.task)
            typer.echo(f"smoke: {experiment.task.data} can be used; the trial itself is on made-up data", err=True)
            if found:
                typer.echo(f"smoke: {found}", err=True)
        yield tiny


def _listed(name: str, text: str | None, kind: type) -> list[Any] | None:
    """The values of a comma-separated option."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [kind(part) for part in parts]
    except ValueError:
        values = []
    if not values:
        wanted = {int: "whole numbers", float: "numbers", str: "names"}[kind]
        raise ValueError(f"--{name.replace('_', '-')}: expected {wanted} with commas between, got {text!r}")
    return values


@contextmanager
def _folder(default: Path, options: Options) -> Iterator[Path]:
    """Return the folder of the records: --out, else the default; a temporary one for a trial."""
    temporary = tempfile.TemporaryDirectory() if options.smoke and options.out is None else nullcontext()
    with temporary as folder:
        yield Path(folder) if folder else options.out or default


def _list(experiment: Experiment, out: Path, options: Options) -> None:
    from ..lab.experiments.runs import runs_of
    from ..lab.experiments.sweep import plan_sweep

    again = {"retry_failed": options.retry_failed, "replace": options.replace}
    todo = plan_sweep(experiment, out, shard=options.places.part, **again)
    pending = {run.name for run in todo.pending}
    listed = pending | {run.name for run in todo.done}
    names = [run.name for run in runs_of(experiment) if run.name in listed]
    if options.as_json:
        counts = {"present": len(todo.present), "later": todo.later}
        typer.echo(json.dumps({"out": str(out), "pending": sorted(pending), **counts}, indent=2))
        return
    for name in names:
        typer.echo(f"{'to run' if name in pending else 'present':8} {name}")
    typer.echo(f"{counted(len(names), 'run')}: {len(todo.present)} present in {out}, {len(pending)} to run")
    if todo.later:
        best = "best rate" if experiment.sweep.best == 1 else f"{experiment.sweep.best} best rates"
        typer.echo(f"and up to {todo.later} of the other seeds, at each method's {best} of the first")


def _sweep(experiment: Experiment, out: Path, options: Options) -> Sweep:
    """The sweep, with a line for every run that ends and a bar for all of them (on stderr)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ..lab.experiments.processes import cores
    from ..lab.experiments.sweep import run_sweep

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("runs", total=None, left="")

        def listener(sweep: Sweep, record: RunRecord) -> None:
            if options.changes and not (options.out or options.smoke) and len(sweep.records) == 1:
                console.print(f"records go to {out}; --out names another folder", markup=False)
            console.print(_line(sweep, record), markup=False)
            bar.update(line, total=sweep.total, completed=len(sweep.records), left=_left(sweep))

        heard: Listener = listener
        return run_sweep(
            experiment,
            out,
            jobs=options.jobs or (min(cores(), 8) if options.smoke else 1),  # a tiny model gains nothing from threads
            retry_failed=options.retry_failed,
            replace=options.replace,
            save_adapters=options.save_adapters,
            shard=options.places.part,
            cluster=options.places.cluster(options.jobs),
            listener=heard,
            begin=None if options.smoke else lambda sweep: console.print(_to_do(sweep), markup=False),
            say=None if options.smoke else lambda line: console.print(line, markup=False),
        )


def _to_do(sweep: Sweep) -> str:
    """Say how many runs there are before the first one begins."""
    return f"{counted(sweep.total, 'run')} to do, {len(sweep.present)} there already"


def _line(sweep: Sweep, record: Mapping[str, Any]) -> str:
    """One run that has ended, as a line."""
    head = f"[{len(sweep.records)}/{sweep.total}] {record['label']} ({record['method']}), "
    head += f"lr {record['learning_rate']:g}, seed {record['seed']}: "
    if record["status"] != "finished":
        return f"{head}{record['status']}, {record['error']}"
    metric = record["main_metric"]
    final = record["evaluations"][-1][metric] if record["evaluations"] else None
    shown = "" if final is None else f", {metric} {final:.3f}"
    times = f"initialisation {record['init_seconds']:.1f} s, training {record['train_seconds']:.1f} s"
    left = f"; {_left(sweep)}" if len(sweep.records) < sweep.total else ""
    return f"{head}mean loss {record['mean_loss']:.4f}{shown}, {times}{left}"


def _left(sweep: Sweep) -> str:
    """The time to go in words."""
    seconds = round(sweep.remaining or 0)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min to go" if hours else f"{minutes} min {seconds % 60:02d} s to go"


def _tell(sweep: Sweep, out: Path, options: Options) -> None:
    """Print the outcome: for machines, or as a table and one line."""
    if options.as_json:
        typer.echo(json.dumps({**sweep.to_dict(), "out": None if options.smoke else str(out)}, indent=2))
        return
    if not options.places.shard:  # which has a part of each method
        from ..lab.report.study import studies
        from ..lab.report.tables import main_table, other_models_table

        for study in studies([*sweep.present, *sweep.records]):
            for shown in filter(lambda table: table.rows, (main_table(study), other_models_table(study))):
                typer.echo(shown.to_text())
    counts = ", ".join(f"{sweep.count(status)} {status}" for status in ("finished", "diverged", "failed"))
    place = "" if options.smoke and options.out is None else f"; records in {out}"
    shard = options.places.shard
    told = f"shard {shard}: {counted(len(sweep.records), 'run')}" if shard else counted(sweep.total, "run")
    typer.echo(f"{told} in {sweep.elapsed:.0f} s: {counts}; {len(sweep.present)} were there before{place}")
    if sweep.later:
        typer.echo(
            f"about {sweep.later} more of this shard depend on the first seed of other shards; "
            "give the same command again when those have ended"
        )

"""The command line: `cntlora init`, `inspect` and `demo`; `experiments.py` and `export.py` beside it have the others.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..console import one_line_errors
from ..interrupts import ended_within
from ..messages import quiet_libraries
from . import experiments as cli_experiments
from . import export as cli_export
from .arguments import check_at_least, check_file, check_folder, check_method, method_names

app = typer.Typer(
    help="Start a LoRA from the pretrained weights and a few batches of your data, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from ..version import VERSION

        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Start a LoRA from the pretrained weights and a few batches of your data, without training."""


@app.command("init")
def init(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the pretrained model.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; made if missing.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Your fine-tuning data: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (a text a line), or "
            "owner/name[:configuration][#split] of the hub, with a column of texts, prompts and responses, or chats. "
            "Not for pissa, olora and lora, which read the weights alone."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    prompt: Annotated[str, typer.Option(help="Column of the prompts, beside responses that are learned.")] = "prompt",
    response: Annotated[
        str | None, typer.Option(help="Column of the responses.  [default: response, or completion]")
    ] = None,
    messages: Annotated[str, typer.Option(help="Column of the chats.")] = "messages",
    label: Annotated[
        str | None, typer.Option(help="Column of the classes, for classification, or of the numbers, for regression.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="auto, causal-lm, classification, regression or encoder; auto with --label: classes.")
    ] = "auto",
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(method_names())}; or FILE.PY:FUNCTION.  "
            "[default: whitened, or self where there is no loss or no gradient]"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="offset: file of rank 2r that starts at zero; paired: the same within rank r; keep: the function "
            "moves by B·A. (subtract changes the base model and needs the Python call.)  [default: keep for descent, "
            "else offset]"
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank that trains.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.  [default: 2 x rank]")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Comma-separated module names, or all-linear.  [default: PEFT's choice for the model]"),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha over the root of the rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA.")] = False,
    decomposition: Annotated[
        str | None, typer.Option(help="svd, qr or qr_pivoted.  [default: svd; qr for olora]")
    ] = None,
    p: Annotated[
        float | None, typer.Option(help="Share of the singular values that A gets, 0 to 1.  [default: 0.5]")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Size of the start.  [default: the method's own]")] = None,
    adaptive_ranks: Annotated[bool, typer.Option("--adaptive-ranks", help="Share the ranks out by the data.")] = False,
    rank_budget: Annotated[int | None, typer.Option(help="Sum of all ranks.  [default: rank x sites]")] = None,
    min_rank: Annotated[int, typer.Option(help="Least rank of a site, with --adaptive-ranks.")] = 0,
    max_rank: Annotated[int | None, typer.Option(help="Largest rank of a site, with --adaptive-ranks.")] = None,
    gram: Annotated[str | None, typer.Option(help="sum or mean over the tokens of a batch.  [default: sum]")] = None,
    root: Annotated[
        str | None,
        typer.Option(help="Square root in self mode: paper, symmetric or cholesky.  [default: paper]"),
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="Cut-off of the pseudo-inverse; 0: NumPy's. Cross, shift: 1e-3.")
    ] = None,
    shift_constant: Annotated[
        str | None, typer.Option(help="C of shift mode: a number, or gaussian.  [default: 1]")
    ] = None,
    center: Annotated[
        bool | None, typer.Option(help="eva: subtract the mean token, or not.  [default: center]")
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(help="Relative damping of the input covariance.  [default: 0.01; whitened: 1]"),
    ] = None,
    variance: Annotated[
        float | None, typer.Option(help="lora_da: weight of the variance of the gradients.  [default: 0.03]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="lora_da: rows of the training data.  [default: 100000]")] = None,
    batch_weights: Annotated[
        str | None, typer.Option(help="Comma-separated, one weight for each batch that is read.  [default: 1 each]")
    ] = None,
    initial_weight: Annotated[
        str | None,
        typer.Option(help="Start of the average over batches: pretrained or zero.  [default: pretrained]"),
    ] = None,
    num_batches: Annotated[int, typer.Option(help="Batches to read.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Texts a batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens a text; longer ones are cut.")] = 256,
    seed: Annotated[int, typer.Option(help="Order of the texts, and what else is random.")] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="whitened: peak rate of your AdamW; met by alpha.  [default: the method's, 1e-3]"),
    ] = None,
    fit_head: Annotated[
        bool | None,
        typer.Option(help="Fit the new head of a classifier to your texts first.  [default: yes without --method]"),
    ] = None,
    fold_alpha: Annotated[
        bool | None,
        typer.Option(help="Write alpha = rank, right for every reader.  [default: yes without --learning-rate]"),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Also keep the plan, one safetensors file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Foretell seconds and memory from two batches; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write an initialised adapter folder that plain PEFT loads on the untouched model."""
    options = {key: value for key, value in locals().items() if key in _CONFIG_OPTIONS}
    with one_line_errors("cntlora init", "text"):
        check_folder("--out", out, overwrite=overwrite)
        if plan is not None:
            check_file("--plan", plan)
        check_at_least(rank=(rank, 1), alpha=(alpha, 0), num_batches=(num_batches, 1), batch_size=(batch_size, 1))
        check_at_least(max_length=(max_length, 1), seed=(seed, 0), min_rank=(min_rank, 0), rank_budget=(rank_budget, 1))
        check_method(method)
        if base == "subtract":
            raise ValueError("--base subtract changes the base model, which a file cannot do; use offset, or Python")
        options["shift_constant"] = _number_or_name(shift_constant)
        options["batch_weights"] = _numbers(batch_weights)
        options["fold_alpha"] = learning_rate is None if fold_alpha is None else fold_alpha

        from ..lab.recipes.initialising import LoraOptions, Source, initialise

        named = None if targets is None else tuple(t.strip() for t in targets.split(",") if t.strip())
        report, told = initialise(
            model,
            Source(data, text, label, prompt, response, messages, batch_size, max_length),
            task,
            LoraOptions(rank, alpha, named, rslora, dora),
            options,
            (out, plan),
            dry_run,
        )
        if dry_run:
            typer.echo(json.dumps(asdict(report), indent=2) if as_json else str(report))
        elif as_json:
            classes = {"classes": dict(enumerate(told.names))} if told.names else {}
            typer.echo(json.dumps({**report.to_dict(), **classes}, indent=2))
        else:
            typer.echo(str(report))
            if told.line:
                typer.echo(f"\n{told.line}")
            typer.echo(f"\nadapter written to {out}")
            if report.config.effective_base == "offset":
                typer.echo("to train it: PeftModel.from_pretrained(model, folder, is_trainable=True), then")
                typer.echo("cntlora.freeze_offset(model), before the optimizer is made")


_CONFIG_OPTIONS = (
    "method", "base", "decomposition", "p", "strength", "adaptive_ranks", "rank_budget", "min_rank", "max_rank", "gram",
    "root", "rtol", "shift_constant", "center", "damping", "variance", "samples", "batch_weights", "initial_weight",
    "num_batches", "seed", "learning_rate", "fit_head", "fold_alpha",
)  # fmt: skip


def _number_or_name(value: str | None) -> float | str | None:
    """C as the configuration takes it."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        return value


def _numbers(text: str | None) -> list[float] | None:
    """Numbers with commas between."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--batch-weights: expected numbers with commas between, such as 1,0.5, got {text!r}"
        ) from None


@app.command()
def inspect(
    adapter: Annotated[
        Path, typer.Argument(help="Adapter folder of PEFT, `cntlora init` or diffusers, or a file of diffusers.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show ranks, scalings and sizes of an adapter, site by site."""
    with one_line_errors("cntlora inspect"):
        from ..files.class_names import read_names
        from ..files.export_parts import inspect_parts, is_pipeline_file
        from ..files.inspection import inspect_adapter

        own = is_pipeline_file(adapter)
        sites, names = (inspect_parts(adapter), []) if own else (inspect_adapter(adapter), read_names(adapter))
        if as_json:
            named = {"classes": dict(enumerate(names))} if names else {}
            typer.echo(json.dumps({"sites": [site.to_dict() for site in sites], **named}, indent=2))
            return
        from ..files.model_card import spread
        from ..report import text_table

        ranks = [site.rank for site in sites]
        title = f"{adapter} · {len(sites)} sites · ranks {spread(ranks)}, {sum(ranks)} in all"
        heads = ("rank", "alpha", "scaling", "‖s·B·A‖", "σ max", "stable rank", "halves")
        rows = [
            (s.name, str(s.rank), f"{s.alpha:g}", f"{s.scaling:g}", f"{s.norm:.4g}", f"{s.spectral_norm:.4g}",
             f"{s.stable_rank:.1f}", s.halves)
            for s in sites
        ]  # fmt: skip
        typer.echo(text_table(title, heads, rows))
        if names:
            typer.echo(f"\nclasses: {', '.join(f'{i} = {name}' for i, name in enumerate(names))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for curves, adapter and record.")] = Path("demo-output"),
    steps: Annotated[int, typer.Option(help="Training steps of each run.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of head, data order and dropout, the same for both runs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Sentiment of tweets on MiniLM: plain LoRA against cntlora, about two minutes on 2 cores after set-up."""
    with one_line_errors("cntlora demo", "demo"):
        from ..lab.demo import run_demo

        say = (lambda line: None) if as_json else typer.echo
        record = run_demo(out, steps=steps, seed=seed, say=say)
        if as_json:
            typer.echo(json.dumps(record, indent=2))


cli_export.register(app)
cli_experiments.register(app)


def main() -> None:
    """Entry point of the `cntlora` command."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads of torch that spin while they wait slow a busy machine down
    quiet_libraries()
    with ended_within(0.9):
        app()


if __name__ == "__main__":
    main()

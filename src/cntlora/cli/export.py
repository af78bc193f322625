"""The command `cntlora export`. `register` puts it on the application."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import one_line_errors
from ..files.spellings import READABLE
from ..messages import counted
from .arguments import check_file


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(export)


def export(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Adapter folder as PEFT, diffusers, `cntlora init` or `cntlora run` writes it, or a file of diffusers "
            "or kohya."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, NAME.safetensors.")],
    format: Annotated[str, typer.Option(help="diffusers or kohya.")] = "diffusers",
    component: Annotated[
        str | None,
        typer.Option(help="Part of the pipeline: unet, text_encoder, ….  [default: read from the names of the layers]"),
    ] = None,
    uniform_rank: Annotated[
        bool | None,
        typer.Option(
            "--uniform-rank/--own-ranks",
            help="Fill smaller ranks up with zeros, or keep them: a smaller file, which older diffusers misread.  "
            "[default: fill up for diffusers, keep for kohya]",
        ),
    ] = None,
    sdxl: Annotated[
        bool, typer.Option("--sdxl", help="The first text encoder is one of two, as in SDXL (kohya: lora_te1).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write the adapter of a text-to-image model as one file for diffusers or for kohya's tools."""
    with one_line_errors("cntlora export"):
        if not adapter.exists():
            kind = "file" if adapter.suffix == ".safetensors" else "folder"
            raise ValueError(f"{adapter}: there is no such {kind}; expected {READABLE}")
        if out.is_file() and not overwrite:
            raise ValueError(f"--out {out} is there already; choose another file, or replace it with --overwrite")
        check_file("--out", out)
        from ..files.export import export_adapter

        parts = export_adapter(adapter, out, format, component=component, uniform_rank=uniform_rank, sdxl=sdxl or None)
        if as_json:
            typer.echo(json.dumps({"file": str(out), "format": format, "sites": parts}, indent=2))
            return
        told = ", ".join(f"{part} {count}" for part, count in parts.items())
        typer.echo(f"{counted(sum(parts.values()), 'site')} ({told}) written to {out}, format {format}")

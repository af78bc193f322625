"""How every command ends when something is wrong: one line that says what to change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .interrupts import tell_stopped


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can mend into one line and exit code 1; Ctrl-C into exit code 130."""
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, which a user of the command cannot mend
    try:
        yield
    except KeyboardInterrupt:
        tell_stopped()
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        typer.echo(f"cntlora: {error.name} is not installed; pip install 'cntlora[demo]'", err=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if isinstance(error, typer.Exit):
            raise
        typer.echo(f"cntlora: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None

"""The end of every command when something is wrong: one line that says what to change."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .extras import require
from .interrupts import tell_stopped


@contextmanager
def one_line_errors(purpose: str = "", extra: str | None = None) -> Iterator[None]:
    """Turn what the user can mend into one line and exit code 1; Ctrl-C into exit code 130.

    Args:
        purpose: what runs inside, such as "cntlora report".
        extra: the extra of the package that it needs, checked before anything is imported; None for none.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, which a user of the command cannot mend
    shown = warnings.showwarning
    warnings.showwarning = _plain_warning
    try:
        if extra is not None:
            require(extra, purpose)
        yield
    except KeyboardInterrupt:
        tell_stopped()
        raise SystemExit(130) from None
    except (ImportError, ValueError, TypeError, OSError, RuntimeError) as error:
        sys.stderr.write(f"cntlora: {' '.join(str(error).split())}\n")
        sys.stderr.flush()  # it may be a stand-in that nobody flushes at the end
        raise SystemExit(1) from None
    finally:
        warnings.showwarning = shown


def _plain_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line: the place in the sources, that of this command, says nothing to its user."""
    sys.stderr.write(f"cntlora: warning: {' '.join(str(message).split())}\n")

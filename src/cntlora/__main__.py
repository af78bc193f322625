"""The command `cntlora`, and `python -m cntlora`."""

import sys

from .extras import MissingExtraError, require


def main() -> None:
    """Entry point of the command, which says what to install where its own libraries are missing."""
    try:
        require("cli", "the command cntlora")
    except MissingExtraError as error:
        sys.exit(f"cntlora: {error}")
    from .cli.app import main as run

    run()


if __name__ == "__main__":
    main()

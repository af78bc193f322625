"""`python -m cntlora`: the same as the command `cntlora`."""

from .cli.app import main

if __name__ == "__main__":
    main()

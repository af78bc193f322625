"""`python -m cntlora`: the same as the command `cntlora`."""

from .cli import main

if __name__ == "__main__":
    main()

"""The command `deepgrpo`, also as `python -m deepgrpo`: imports the command line and runs it."""

from __future__ import annotations

import sys

from deepgrpo.interrupts import importing


def main() -> int:
    """See `cli.main`."""
    with importing():
        from deepgrpo import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

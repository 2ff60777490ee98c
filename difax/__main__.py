"""`python -m difax` and `difax`: the command line of `difax.cli` as a process of its own."""

import sys
from typing import NoReturn

from difax.core.shell import end_at_signals, open_streams, silence_threads


def run() -> NoReturn:
    """Runs the command that the process was started with, and ends the process with its exit code."""
    open_streams()
    end_at_signals()  # before what takes time to import
    if "--traceback" not in sys.argv:
        silence_threads()
    from difax.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()

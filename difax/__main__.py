"""`python -m difax` and `difax`: the command line of `difax.cli` as a process of its own."""

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command that the process was started with, and ends the process with its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until `end_at_signals`: no import shows a page
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"difax: error: interrupted\n"), os._exit(130)))
    from difax.core.shell import end_at_signals, open_streams, silence_threads

    open_streams()
    finished = end_at_signals()  # before what takes time to import
    if "--traceback" not in sys.argv:
        silence_threads()
    from difax.cli import main

    code = main()
    finished(code)
    if hosts := sys.modules.get("difax.core.hosts"):
        hosts.end(code)
    sys.exit(code)


if __name__ == "__main__":
    run()

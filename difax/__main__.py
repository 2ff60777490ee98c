"""`python -m difax` is the command line of `difax.cli`."""

import sys

from difax.cli import main

if __name__ == "__main__":
    sys.exit(main())

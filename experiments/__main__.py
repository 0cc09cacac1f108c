"""`python -m experiments`: the same as `lens-positions experiments`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())

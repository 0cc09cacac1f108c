"""`python -m lens_positions` is the `lens-positions` command; an interrupt while it is imported leaves no traceback."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m training`; an interrupt while everything is still being imported ends it without a traceback."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .commands import main, parse, parse_graft

__all__ = ["main", "parse", "parse_graft"]

if __name__ == "__main__":
    sys.exit(main())

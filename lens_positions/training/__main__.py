"""`python -m training`; an interrupt while everything is still being imported ends it without a traceback.

In a checkout `training` is a link to this folder, so everything is imported by its full name.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from lens_positions.training.commands import main, parse, parse_graft

__all__ = ["main", "parse", "parse_graft"]

if __name__ == "__main__":
    sys.exit(main())

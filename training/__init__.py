"""Train increments from scratch: `python -m training train --preset quick`."""

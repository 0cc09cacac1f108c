"""Train increments from scratch: `lens-positions train --preset quick`."""

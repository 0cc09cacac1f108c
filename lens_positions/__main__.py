"""`python -m lens_positions` is the `lens-positions` command."""

import sys

from .cli import main

sys.exit(main())

"""The study of this repository: suites of runs, what was measured of them, and the findings. No part of the package."""

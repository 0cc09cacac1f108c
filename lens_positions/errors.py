"""The one exception for whatever a person can get wrong."""


class PositionsError(ValueError):
    """A request that cannot be met: one sentence that says what was given and what was expected.

    The command line prints the sentence and exits with status 2; the library raises it before
    anything on disk or in a model has changed.
    """

"""The one exception for whatever a person can get wrong, and the refusals that commands and functions share."""


class PositionsError(ValueError):
    """A request that cannot be met: one sentence that says what was given and what was expected.

    The command line prints the sentence and exits with status 2; the library raises it before
    anything on disk or in a model has changed.

    >>> try:
    ...     model.increments("")
    ... except lp.PositionsError as error:
    ...     print(error)
    the text is empty; expected at least one character.
    """


def check_text(text: str, name: str = "the text") -> None:
    """Refuse a text that is empty or that UTF-8 cannot hold."""
    if not text:
        raise PositionsError(f"{name} is empty; expected at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise PositionsError(
            f"{name} has the lone surrogate U+{code:04X}; expected text that UTF-8 can hold."
        ) from error


def check_seed(seed: int) -> None:
    """Refuse what numpy and torch do not both take as a seed."""
    if not 0 <= seed < 1 << 63:
        raise PositionsError(f"seed is {seed}; expected a whole number from 0, of at most 63 bits.")

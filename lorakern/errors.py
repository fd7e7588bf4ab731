"""The one exception class of the package."""


class LorakernError(ValueError):
    """Bad input or a missing capability; the message names the argument, what it got and what it takes."""

"""The one family of errors that callers of the library may want to catch."""


class ExpertFlowError(ValueError):
    """Bad input, a damaged checkpoint, a budget too small: the message names value, rule and remedy."""

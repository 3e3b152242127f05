"""What is wrong with files (nothing can be asked) and with single rows (they are asked nothing and score 0)."""

from expertflow_quant.formats import ExpertFlowError


class DataError(ExpertFlowError):
    """Files that are not there or cannot be understood: the message names them, the rule and the remedy."""


class DamagedRowError(ExpertFlowError):
    """One row that cannot be asked; it scores 0 under this error and is never dropped."""

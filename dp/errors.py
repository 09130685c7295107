"""Every error that the privacy package raises, so that a caller can tell a bad number from a spent budget.

All of them are values of `DpError`. A message says what was expected and what came; it never holds a record's value.
"""

from __future__ import annotations


class DpError(Exception):
    """Base of all errors raised by this package; raised itself where training met a loss or gradient not finite."""


class ParameterError(DpError):
    """A number, a shape or a relation that makes no sense, or that nobody has proved a guarantee for."""


class UnsupportedModel(DpError):
    """The model has a part whose gradients cannot be taken record by record, so that clipping would bound nothing."""


class BudgetExceeded(DpError):
    """The next release would cost more than the budget allows. It has not been made.

    Attributes:
        spent: Epsilon of all releases so far.
        next: Epsilon of all releases so far and the refused one together.
        budget: The largest epsilon allowed. All three hold at the same delta and under the same neighbouring relation.
    """

    def __init__(self, spent: float, next: float, budget: float) -> None:
        super().__init__(
            f"the budget is epsilon {budget:.4f}; {spent:.4f} is spent, the next release would bring it to {next:.4f}"
        )
        self.spent = spent
        self.next = next
        self.budget = budget


class LedgerError(DpError):
    """A ledger is missing, damaged, edited, another's, older than it should be, or could not be written.

    Nothing may be released then. The message names the file and, where there is one, the row.
    """


class LedgerLocked(LedgerError):
    """Another process is writing to the ledger. Nothing was changed; asking again later may do."""

"""The one exception tree.

    CoterieError                 exit
    ├── ConfigError                 3   a run's configuration is wrong
    ├── SiteError                   4   site.toml, the local registry of models and data, is wrong
    ├── DataError                   5   examples are missing, damaged or do not fit their description
    │   └── DataUnavailableError    6   a data set must be fetched first, or cannot be fetched now
    ├── ModelError                  7   a model cannot be built, or does not fit its data
    ├── PrivacyError                8   a privacy promise cannot be kept; nothing was released
    │   ├── BudgetExhaustedError    8   the next round would spend more than the budget
    │   └── LedgerError             8   the record of privacy events cannot be trusted or written
    ├── RunError                    9   a run cannot start, continue or be read
    ├── RefusedError               10   a peer asked for something this party does not do
    ├── KitError                   11   a party's kit of keys and pins is missing, damaged or of another role
    └── UnreachableError           12   the coordinator cannot be reached, or refuses this party

Exit 1 is a fault in Coterie itself, 2 a mistake on the command line, 130 an interruption by the user.
A message says what failed and where; its hint says how to mend it. Peers never see either: they get a `FailureCode`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class CoterieError(Exception):
    """An error that a person can act on.

    Attributes:
        code: Stable name of the kind of error, for scripts and logs.
        exit_code: What the command line exits with.
        hint: How to mend it; one sentence, or empty.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CoterieError):
    """A run's configuration is wrong: an unknown key, an impossible value, settings that contradict each other."""

    code = "config-invalid"
    exit_code = 3


class SiteError(CoterieError):
    """The local `site.toml` is wrong, or names something that is not there."""

    code = "site-invalid"
    exit_code = 4


class DataError(CoterieError):
    """Examples are missing, damaged, or do not fit their description."""

    code = "data-invalid"
    exit_code = 5


class DataUnavailableError(DataError):
    """A data set has to be fetched first, or cannot be fetched now."""

    code = "data-unavailable"
    exit_code = 6


class ModelError(CoterieError):
    """A model cannot be built, or does not fit the data."""

    code = "model-invalid"
    exit_code = 7


class PrivacyError(CoterieError):
    """A privacy promise cannot be kept. Raised before anything is released."""

    code = "privacy-refused"
    exit_code = 8


class BudgetExhaustedError(PrivacyError):
    """The next round would spend more than the budget."""

    code = "budget-exhausted"


class LedgerError(PrivacyError):
    """The record of privacy events cannot be trusted, read or written."""

    code = "ledger-invalid"


class RunError(CoterieError):
    """A run cannot start, continue, or be read."""

    code = "run-failed"
    exit_code = 9


class RefusedError(CoterieError):
    """A peer asked for something that this party does not do."""

    code = "refused"
    exit_code = 10


class KitError(CoterieError):
    """A party's kit is missing, damaged, incomplete, or of another role."""

    code = "kit-invalid"
    exit_code = 11


class UnreachableError(CoterieError):
    """The coordinator cannot be reached, or does not let this party in."""

    code = "unreachable"
    exit_code = 12


class FailureCode(IntEnum):
    """Why a client has no update this round: all that a peer learns of a failure.

    The numbers travel in Flower's `Error.code` and never change. Texts are fixed sentences: an exception's own text can
    quote data.
    """

    CLIENT_FAILED = 1001
    DEADLINE_EXCEEDED = 1002
    NON_FINITE_UPDATE = 1003
    BUDGET_EXHAUSTED = 1004
    INVALID_REQUEST = 1005
    INVALID_REPLY = 1006
    CLIENT_LOST = 1007
    POLICY_REFUSED = 1008
    NOT_IN_EPOCH = 1009
    AGGREGATION_REFUSED = 1010
    AGGREGATION_ABORTED = 1011
    STALE_UPDATE = 1012

    @property
    def slug(self) -> str:
        """The code as users see it, such as `deadline-exceeded`."""
        return self.name.lower().replace("_", "-")

    @property
    def sentence(self) -> str:
        """One fixed sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    FailureCode.CLIENT_FAILED: "the client could not complete its work",
    FailureCode.DEADLINE_EXCEEDED: "the client did not answer before its deadline",
    FailureCode.NON_FINITE_UPDATE: "the update holds values that are not finite, or far too large",
    FailureCode.BUDGET_EXHAUSTED: "the client's privacy budget does not allow this round",
    FailureCode.INVALID_REQUEST: "the client does not do what it was asked",
    FailureCode.INVALID_REPLY: "the reply does not fit the model",
    FailureCode.CLIENT_LOST: "the client's process ended before it answered",
    FailureCode.POLICY_REFUSED: "the site does not take part in such a run",
    FailureCode.NOT_IN_EPOCH: "the client takes part again from the next epoch of secure aggregation",
    FailureCode.AGGREGATION_REFUSED: "the client refused a step of secure aggregation",
    FailureCode.AGGREGATION_ABORTED: "the sum that the client was part of was given up",
    FailureCode.STALE_UPDATE: "the update began too many steps ago",
}


class NonFiniteError(ValueError):
    """What a client would send is not finite, or far too large; peers see `FailureCode.NON_FINITE_UPDATE`."""


class PeerError(Exception):
    """Raised inside a client to answer with a typed failure instead of an update."""

    def __init__(self, failure: FailureCode) -> None:
        super().__init__(failure.sentence)
        self.failure = failure

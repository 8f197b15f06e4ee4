"""The error tree: every message gives the fact, the value and the remedy, and never a pixel or an identifier.

MedvaeError                 exit code 1: a defect of ours, when raised as itself
├── InputError              exit code 2: bad usage or bad input
│   ├── ConfigError         an unknown key, a value out of range
│   ├── CohortError         a cohort or source folder that cannot be used as asked
│   └── RunError            a run, report or release folder that cannot be used as asked
├── PrivacyError            exit code 3: refused for privacy
│   ├── BudgetExceeded      the ledger would go over its budget
│   ├── NotReleasable       the gate is closed
│   └── VerificationFailed  a release does not match its own proof
└── MissingPart             exit code 2: an optional part is not installed
"""


class MedvaeError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1


class InputError(MedvaeError):
    """Bad usage or bad input."""

    exit_code = 2


class ConfigError(InputError):
    """An unknown key, or a value out of its range."""


class CohortError(InputError):
    """A source or cohort folder that cannot be used as asked."""


class RunError(InputError):
    """A run, report or release folder that cannot be used as asked."""


class MissingPart(InputError):
    """An optional part is not installed; the message says how to install it."""


class PrivacyError(MedvaeError):
    """Refused for privacy."""

    exit_code = 3


class BudgetExceeded(PrivacyError):
    """The ledger would go over the cohort's budget."""


class NotReleasable(PrivacyError):
    """The gate is closed for this run."""


class VerificationFailed(PrivacyError):
    """A release does not match its own proof."""

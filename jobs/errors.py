"""The errors that end a command.

In: what went wrong. Out: exit status 2 for an invalid request, 1 for work that failed; the message is for the user.
"""

from __future__ import annotations


class RequestError(ValueError):
    """The request was invalid: one sentence says what was given, where, and what is allowed. Exit status 2."""


class WorkFailed(RuntimeError):
    """Some trials or cells failed; the message names them. Exit status 1."""

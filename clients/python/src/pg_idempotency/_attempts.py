"""Trying again: after a conflict of transactions, and on another connection after one was lost."""

from __future__ import annotations

import random
from typing import NoReturn

from ._claims import Claim
from .errors import (
    ClaimLostError,
    CommitUnknownError,
    ConflictError,
    InFlightError,
    MismatchError,
    UnavailableError,
    is_conflict,
    reached,
    sqlstate_of,
)
from .types import Interval

#: How long the server may take to notice that a connection is lost and to roll its transaction back.
_TO_NOTICE = "5 seconds"

#: What tells, like an answer, what became of a COMMIT.
_ANSWERS = (InFlightError, MismatchError, ClaimLostError)


class Attempts:
    """
    Which errors of an attempt are worth another, and when.

    retries: how many times it may be in conflict.
    renewable: whether the next attempt has another connection if this one is lost.
    wait: how long an attempt waits for a claim in flight; None for the server's setting.
    """

    def __init__(self, retries: int, renewable: bool, wait: Interval | None = None) -> None:
        self.wait = wait
        self._retries = retries
        self._renewable = renewable
        self._conflicts = 0
        self._lost = 0
        self._unknown: CommitUnknownError | None = None

    def again_after(self, error: Exception, claim: Claim | None) -> float:
        """
        After how many seconds to try again; raises what to say if that makes no sense.

        claim: that of the attempt; None if it was not begun.
        """
        in_work = claim is not None and not claim._worked
        if self._renewable and not in_work and self._may_ask_again(error):
            if self.wait is None:
                # the claim may still be that of the attempt before
                self.wait = _TO_NOTICE
            return 0
        # a claim that was lost to a transaction which has committed: there is an answer now
        if (is_conflict(error) or isinstance(error, ClaimLostError)) and self._conflicts < self._retries:
            self._conflicts += 1
            return random.random() * min(0.01 * 2.0**self._conflicts, 1.0)
        self._say(error, claim)

    def _may_ask_again(self, error: Exception) -> bool:
        """Whether another connection can tell more: once for a COMMIT, twice where nothing was done."""
        if isinstance(error, CommitUnknownError) and self._unknown is None:
            self._unknown = error
            return True
        if isinstance(error, UnavailableError) and self._lost < 2:
            # some pools hand out a connection that is lost once more before they notice
            self._lost += 1
            return True
        return False

    def _say(self, error: Exception, claim: Claim | None) -> NoReturn:
        if claim is None and self._unknown is not None and not isinstance(error, _ANSWERS):
            raise self._unknown
        if is_conflict(error):
            state = sqlstate_of(error)
            raise ConflictError("the transaction was in conflict with others", sqlstate=state) from error
        raise reached(error) if claim is None else error

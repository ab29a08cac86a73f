"""
Work under a lease, whose effects are outside the database.

No connection is held while it runs. Each call is fenced by the claim's id: whoever was taken over gets a
ClaimLostError and has to stop. The id is made here and sent with begin, so that begin, checkpoint and finish
can be sent again when a connection breaks: whoever brings the same id is the same caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast
from uuid import uuid4

from ._attempts import Attempts
from ._claims import Claim, Settings, answer_of, found_answer, recovery_of
from ._connections import Row, Session
from ._flows import Flow, alone, meaning, must_be_idle, roll_back, says_lost, unavailable, undoes
from ._statements import Statement
from .errors import ClaimLostError, CommitUnknownError, OutOfOrderError, Refusal, UnfinishedError
from .types import Answer, Interval, Recovery, Request, Scope


class LeasedClaim(Claim):
    """
    The right to do work with effects outside the database, for as long as the lease lasts.

    id: the claim's id, its fencing token, which never comes again.
    attempt: how many times the work was begun, this time included.
    recovery: where an earlier attempt got, or the last checkpoint of this one; None at the beginning.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.id = str(uuid4())
        self.attempt = 0
        self.recovery: Recovery | None = None


class Lease:
    """
    What the calls under a lease do.

    provider: has ``carry_out``, which carries out a flow on a connection where no transaction is open,
        ``pause``, which waits for some seconds, and ``renewable``, whether it has another connection when one
        is lost.
    """

    def __init__(
        self, claim: LeasedClaim, request: Request, lease: Interval, provider: Any, settings: Settings
    ) -> None:
        self._claim = claim
        self._request = request
        self._lease = lease
        self.provider = provider
        self._settings = settings
        self._statements = settings.statements
        self._inside: _Inside | None = None

    def begin(self) -> Flow[None]:
        """Take the lease. Whoever brings the same id is the same caller, so it can be sent again."""
        claim = self._claim
        statement = self._statements.begin_lease(claim.scope, self._request, self._lease, claim.id)
        row = yield from self._repeatedly(statement, beginning=True)
        if row["outcome"] != "started":
            claim.answer = found_answer(row)
            claim.replayed = True
            return
        claim._open = True
        claim.attempt = row["attempt"]
        claim.recovery = recovery_of(row)

    def checkpoint(self, point: str, state: Any, lease: Interval | None) -> Flow[None]:
        """Save how far the work got, in the transaction that is open if there is one."""
        self._must_be_held("checkpoint")
        claim = self._claim
        duration = self._lease if lease is None else lease
        statement = self._statements.checkpoint(claim.scope, claim.id, point, state, duration)
        if self._inside is None:
            yield from self._repeatedly(statement)
        else:
            try:
                yield self._inside.session.fetch(statement)
            except BaseException as error:
                raise meaning(error, self._inside.session)
            self._inside.fenced = True
        claim.recovery = None if point == "" else Recovery(point, state)

    def release(self) -> Flow[None]:
        """Give the lease back."""
        self._must_be_outside("release")
        self._claim._open = False
        yield from self._repeatedly(self._statements.release(self._claim.scope, self._claim.id))

    def enter_transaction(self, session: Session) -> Flow[None]:
        """Begin a transaction for rows that belong to the claim."""
        self._must_be_outside("transaction")
        must_be_idle(session)
        try:
            yield session.begin()
        except BaseException as error:
            raise meaning(error, session)
        self._inside = _Inside(session, self._claim._said, self._claim.recovery)

    def abandon_transaction(self, error: BaseException) -> Flow[None]:
        """Roll the transaction back after an error in its block. Raises UnavailableError if its connection was lost."""
        inside = yield from self._undone()
        if says_lost(error, inside.session):
            raise unavailable(error)

    def leave_transaction(self) -> Flow[CommitUnknownError | None]:
        """
        End the transaction, with finish if it was called. Returns an error if its outcome is not known.

        An answer that undoes the rows is kept when the block of the lease ends.
        """
        claim, inside = self._claim, cast(_Inside, self._inside)
        said = claim._said and self._settings.kept(claim._said)
        outcome: Any = None
        if said is not None and undoes(said):
            yield from self._undone()
            claim._said = said
            return None
        try:
            if said is None and not inside.fenced:
                raise UnfinishedError(
                    f'a transaction of "{claim.scope.action}" ended without claim.finish or claim.checkpoint, '
                    "so that nothing would fence it: it was rolled back"
                )
            if said is not None:
                (row,) = yield inside.session.fetch(self._statements.finish(claim.scope, said, claim.id))
                outcome = row["outcome"]
            yield inside.session.commit()
        except BaseException as error:
            yield from self._undone()
            if isinstance(error, CommitUnknownError):
                return error
            raise meaning(error, inside.session)
        self._inside = None
        if said is not None:
            self._finished(said, outcome)
        return None

    def find_out(self, unknown: CommitUnknownError) -> Flow[None]:
        """
        Learn what became of a COMMIT that was not answered. Raises the error if there is no answer.

        It may still be going on, and doing its work again could write the same rows twice. So the lease is
        given back, which waits for that COMMIT or fences it off. What is there then is how it ended: an
        answer, or where the next request goes on.
        """
        claim = self._claim
        yield from self._give_up()
        try:
            row = yield from self._repeatedly(self._statements.replay(claim.scope, self._request))
        except Exception:
            raise unknown
        if row["outcome"] != "replayed":
            raise unknown
        claim.answer = answer_of(row)

    def leave(self, error: BaseException | None) -> Flow[bool]:
        """
        Keep the answer, if that was not done yet, or give the lease back.

        Returns whether the error was a refusal, for which there is an answer.
        """
        claim = self._claim
        refused = isinstance(error, Refusal)
        if not claim._open:
            return refused and claim.answer is not None
        if isinstance(error, Refusal):
            answer = self._settings.kept(error.answer)
        elif error is not None:
            yield from self._give_up()
            return False
        elif claim._said is None:
            yield from self._give_up()
            raise UnfinishedError(
                f'the work of "{claim.scope.action}" ended without claim.finish or claim.release: nothing was kept'
            )
        else:
            answer = self._settings.kept(claim._said)
        try:
            # sent again, it changes nothing
            row = yield from self._repeatedly(self._statements.finish(claim.scope, answer, claim.id))
        except BaseException:
            yield from self._give_up()
            raise
        self._finished(answer, row["outcome"])
        return refused

    def _finished(self, answer: Answer, outcome: Any) -> None:
        self._claim._open = False
        self._claim.answer = replace(answer, outcome=outcome)

    def _undone(self) -> Flow[_Inside]:
        """Roll the transaction back, and with it what was said in it."""
        inside, self._inside = cast(_Inside, self._inside), None
        self._claim._said, self._claim.recovery = inside.said_before, inside.recovery_before
        yield from roll_back(inside.session)
        return inside

    def _give_up(self) -> Flow[None]:
        """Give the lease back, if it is still ours and can be, after something else went wrong."""
        try:
            yield from self.release()
        except Exception:
            pass

    def _must_be_held(self, call: str) -> None:
        if not self._claim._open:
            raise OutOfOrderError(f"{call} was called when the claim was over")

    def _must_be_outside(self, call: str) -> None:
        self._must_be_held(call)
        if self._inside is not None:
            raise OutOfOrderError(f"{call} was called inside of a transaction of the claim")

    def _repeatedly(self, statement: Statement, *, beginning: bool = False) -> Flow[Row]:
        """A statement that may be sent again, after a conflict, or on another connection if the first one is lost."""
        attempts = Attempts(3, self.provider.renewable)
        while True:
            try:
                row = yield self.provider.carry_out(lambda session: alone(session, statement, beginning=beginning))
                return cast(Row, row)
            except ClaimLostError:
                raise
            except Exception as error:
                delay = attempts.again_after(error, None)
            yield self.provider.pause(delay)


@dataclass
class _Inside:
    """A transaction under a lease, and what to go back to when it is rolled back."""

    session: Session
    said_before: Answer | None
    recovery_before: Recovery | None
    #: whether a statement in it has made sure that the claim was not taken over
    fenced: bool = False

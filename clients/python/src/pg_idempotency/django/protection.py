"""
What happens to a request of a protected view.

    atomic, begin   nothing was done yet; a repeat gets its answer here
    the view        called with ``request.idempotency``; its response is rendered inside
    finish, COMMIT  sent when the view has returned, so that nothing can come between them

After COMMIT the response leaves. What a view raises rolls back and is passed on; a response of 400 and more
rolls back as well, and is kept. The rules are those of the core, in ``_flows``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from django.db import connections, transaction
from django.http import HttpResponse

from .._attempts import Attempts
from .._claims import Claim, Settings
from .._flows import drive, enter, leave
from .._statements import Statements
from ..errors import IdempotencyError, OutOfOrderError, Refusal, UnfinishedError, is_conflict, translated
from ..http import SAFE_METHODS, checked_id
from ..types import Answer, Interval, Request, Scope
from . import drf, messages
from .options import Options, options_of, setting
from .session import DjangoSession

logger = logging.getLogger("pg_idempotency.django")


class ViewClaim(Claim):
    """
    The claim of a request, as a view gets it in ``request.idempotency`` and hands it on to services.

    ``finish`` says what the answer is, in a view with ``finished_by="service"``.
    """

    def __init__(self, scope: Scope, view: str, finished_by: str) -> None:
        super().__init__(scope)
        self.view = view
        self._finished_by = finished_by

    def finish_with(self, answer: Answer) -> None:
        """Say what the answer is. Raises OutOfOrderError if the view's response is, and as ``Claim`` does."""
        if self._finished_by == "view":
            raise OutOfOrderError(
                f"finish was called, but the answer is what {self.view} returns: "
                'let it be protected with finished_by="service"'
            )
        super().finish_with(answer)

    @property
    def refused(self) -> bool:
        """Whether the answer is known, and its status is 400 or more."""
        return self._said is not None and self._said.status >= 400

    @property
    def commits(self) -> bool:
        """Whether the answer is known, and is committed with what the work wrote."""
        return self._said is not None and (self._said.status < 400 or self._said.keep_rows)

    def answered_by_view(self, answer: Answer) -> None:
        """The view has returned, and this is the answer."""
        self._said = answer


class Protection:
    """
    How one view is protected.

    name: the name of the view, for messages.
    overrides: what differs from the setting. Raises ImproperlyConfigured.
    """

    def __init__(self, name: str, overrides: Mapping[str, Any]) -> None:
        self.name = name
        self._overrides = overrides
        self._made_of = setting()
        self._options = options_of(overrides)

    @property
    def options(self) -> Options:
        """The setting as it is now, with what differs: tests override settings."""
        if self._made_of is not setting():
            self._made_of = setting()
            self._options = options_of(self._overrides)
        return self._options

    def key_of(self, request: Any) -> str | None:
        """The key of a request; None if it is not protected. Raises KeyMissingError, KeyInvalidError."""
        return None if request.method in SAFE_METHODS else messages.key_of(request, self.options.http)

    def call(
        self,
        view: Callable[[], Any],
        request: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        method: str | None = None,
    ) -> Any:
        """
        Call a view, or answer for it.

        view: calls it, and may be called again after a conflict of transactions.
        request: that of Django or of REST framework, with its user.
        args, kwargs: the parameters of the path.
        method: the name of the method that is called, in a view that is a class.

        Returns the response. Raises what the view raises, and IdempotencyError, which IdempotencyMiddleware
        answers. In a view of REST framework only what is the service's own fault is raised, as errors are
        answered by somebody else there.
        """
        try:
            return self._answered(view, request, args, kwargs, method)
        except IdempotencyError as error:
            if error.status == 500 or drf.view_of(request) is None:
                raise
            return messages.response_of(self.options.http.problem_of(error))

    def _answered(
        self,
        view: Callable[[], Any],
        request: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        method: str | None,
    ) -> Any:
        plain = drf.plain(request)
        plain._idempotency_options = self.options.http
        request.idempotency = None
        key = self.key_of(request)
        if key is None:
            with self._as_without_us():
                return view()
        scope = self._scope(plain, request, key)
        compared = messages.fingerprint_of(request, messages.params_of(args, kwargs), self.options.http)
        name = self.name if method is None else f"{self.name}.{method}"
        return self._run(view, request, name, scope, compared)

    def _as_without_us(self) -> Any:
        """What Django does with ATOMIC_REQUESTS around a view, which does it without this."""
        using = self.options.using
        atomic = connections[using].settings_dict.get("ATOMIC_REQUESTS")
        return transaction.atomic(using=using) if atomic else nullcontext()

    def _scope(self, plain: Any, request: Any, key: str) -> Scope:
        options = self.options
        return Scope(
            tenant=_who("tenant", options.tenant, request),
            actor=_who("actor", options.actor, request),
            action=options.action or f"{plain.method} {_route(plain)}",
            key=key,
        )

    def _run(self, view: Callable[[], Any], request: Any, name: str, scope: Scope, compared: Request) -> Any:
        options = self.options
        nested = connections[options.using].in_atomic_block
        # the transaction of a test case can neither be run again nor asked on another connection
        attempts = Attempts(0 if nested else options.retries, renewable=not nested, wait=options.http.wait)
        while True:
            attempt = _Attempt(options, view, request, ViewClaim(scope, name, options.finished_by), compared)
            try:
                response = attempt.run(attempts.wait)
            except Exception as error:
                delay = attempts.again_after(error, attempt.begun)
            else:
                attempt.session.raise_error_of_hook()
                return response
            time.sleep(delay)
            messages.rewind_files(request)


class _Attempt:
    """
    One call of a view in one transaction.

    begun: the claim, once it is begun.
    """

    def __init__(
        self, options: Options, view: Callable[[], Any], request: Any, claim: ViewClaim, compared: Request
    ) -> None:
        self.session = DjangoSession(options.using)
        self.begun: ViewClaim | None = None
        self._options = options
        self._view = view
        self._request = request
        self._claim = claim
        self._compared = compared
        self._settings = Settings(Statements(options.http.schema))

    def run(self, wait: Interval | None) -> Any:
        """
        Call the view, or answer for it. Returns the response, once it is committed.

        wait: how long a repeat waits for the first request.
        """
        claim = self._claim
        drive(enter(claim, self._compared, self.session, replace(self._settings, wait=wait)))
        if claim.replayed:
            self._leave(None)
            return self._said()
        self.begun = claim
        self._request.idempotency = claim
        try:
            own = self._respond()
            if claim.commits:
                self.session.must_be_whole()
        except BaseException as error:
            if not self._leave(error):
                raise
            return self._said()
        if not claim.finished:
            return self._commit_unfinished(own)
        self._leave(None)
        return self._said() if own is None or self._answer.replayed else own

    def _respond(self) -> Any:
        """
        Call the view, and say what the answer is.

        Returns the view's response, or None if what was given to ``finish`` is the answer. With
        ``finished_by="service"`` and without ``finish`` there is no answer yet, unless the view refuses.
        """
        claim, options = self._claim, self._options
        response = self._called()
        if options.finished_by == "service" and (response is None or response.status_code < 400 or claim.refused):
            return None if claim.finished else response
        if response is None:
            raise ValueError(f"{self._claim.view} returned None instead of a response")
        drf.prepare(self._request, response)
        claim.answered_by_view(messages.answer_of(response, options.http))
        return response

    def _called(self) -> Any:
        try:
            return self._view()
        except (IdempotencyError, Refusal):
            raise
        except Exception as error:
            # a conflict is no answer, whatever a service's own handler of exceptions makes of it
            if is_conflict(error) or self.session.is_lost():
                raise
            return drf.response_to(self._request, error)

    def _leave(self, error: BaseException | None) -> bool:
        """Keep the answer and commit, or roll back. Returns whether the error was a refusal, which is kept."""
        return drive(leave(self._claim, self._compared, self.session, self._settings, error))

    def _commit_unfinished(self, response: Any) -> Any:
        """
        Commit without finish, which the server refuses, so that whoever forgets to hand over is told.

        In a test case there is no COMMIT to be refused. A server that was told to let it pass, by
        ``idempotency.commit_guard = off``, does so.
        """
        message = (
            f"{self._claim.view} did not hand over request.idempotency to a service that finishes it: "
            "nothing was committed"
        )
        try:
            if self.session.nested:
                raise UnfinishedError(message)
            self.session.commit()
        except Exception as error:
            self.session.rollback()
            wrong = translated(error)
            if isinstance(wrong, UnfinishedError) and wrong is not error:
                raise UnfinishedError(message, sqlstate=wrong.sqlstate, detail=wrong.detail, hint=wrong.hint) from error
            raise wrong
        logger.warning("%s did not hand over request.idempotency, and commit_guard is off", self._claim.view)
        return response

    @property
    def _answer(self) -> Answer:
        """The answer, when it is there."""
        assert self._claim.answer is not None
        return self._claim.answer

    def _said(self) -> HttpResponse:
        """The answer as a response: that of an earlier request, of a service or of a refusal."""
        return messages.response_of(self._options.http.response_of(self._answer))


def _who(name: str, function: Any, request: Any) -> str | None:
    """
    Whose a request is. Raises TypeError for None, which is the id of Django's AnonymousUser: strangers must
    not share one scope.
    """
    if function is None:
        return None
    value = function(request)
    if value is None:
        raise TypeError(
            f"{name} is None: who is not logged in must not get here. Where there is none on purpose, "
            f"let the option {name} be None"
        )
    return checked_id(name, value)


def _route(request: Any) -> str:
    """The template of the route of a request; its path where it was not resolved."""
    match = getattr(request, "resolver_match", None)
    return request.path if match is None else f"/{match.route}"

"""The asking side of the lookup service, for a scheduler that must not wait."""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_kvtc.errors import KvtcError, LookupServiceError
from dynamo_kvtc.pipeline import frames
from dynamo_kvtc.tiers.breaker import CircuitBreaker

__all__ = ["LookupClient", "Lookups"]

_log = logging.getLogger(__name__)


class LookupClient:
    """One connection to a `LookupService`; made when it is first needed and again after a failure.

    Callable from any thread; calls wait for each other.

    Parameters
    ----------
    retry_after_s : float
        After a failure to connect, calls fail at once for so long.
    """

    def __init__(self, path: Path, *, retry_after_s: float = 1.0) -> None:
        self._path, self._retry_after_s = path, retry_after_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._not_before = 0.0

    def lookup(
        self, hashes: Sequence[bytes], *, salt: bytes = b"", have_tokens: int = 0, timeout_s: float
    ) -> int:
        """Return how many leading tokens of a sequence the tiers hold; see `TierAdapter.lookup`.

        Raises
        ------
        LookupServiceError
            If no answer comes within `timeout_s` seconds, or an error.
        """
        message = {
            "op": "lookup",
            "salt": base64.b64encode(salt).decode(),
            "have": have_tokens,
            **frames.pack_hashes(hashes),
        }
        tokens = self._call(message, timeout_s).get("tokens")
        if type(tokens) is not int or tokens < 0:
            raise LookupServiceError(f"the lookup service answered {tokens!r} instead of a number of tokens")
        return tokens

    def reset(self, *, timeout_s: float) -> None:
        """Let the tiers forget everything; see `TierAdapter.reset`.

        Raises
        ------
        LookupServiceError
            If that is not confirmed within `timeout_s` seconds.
        """
        self._call({"op": "reset"}, timeout_s)

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._disconnect()

    def _call(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        frame = frames.encode(message)
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            raise LookupServiceError(f"the lookup service was busy for {timeout_s:g} s")
        try:
            connection = self._connect(deadline)
            connection.settimeout(_left(deadline))
            connection.sendall(frame)
            length = frames.frame_length(_receive(connection, frames.LENGTH_BYTES, deadline))
            answer = frames.decode(_receive(connection, length, deadline))
        except (OSError, LookupServiceError) as error:
            # A late answer must not be taken for the next one's.
            self._disconnect()
            raise LookupServiceError(f"no answer from the lookup service at {self._path}: {error}") from error
        finally:
            self._lock.release()
        if "error" in answer:
            raise LookupServiceError(f"the lookup service answered: {answer['error']}")
        return answer

    def _connect(self, deadline: float) -> socket.socket:
        if self._socket is None:
            if time.monotonic() < self._not_before:
                raise LookupServiceError("it could not be reached just now")
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(_left(deadline))
                connection.connect(str(self._path))
            except OSError:
                connection.close()
                self._not_before = time.monotonic() + self._retry_after_s
                raise
            self._socket = connection
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass(slots=True)
class _Pending:
    answer: Future[int]
    asked: float
    num_hashes: int
    #: Whether the breaker knows how it ended.
    is_settled: bool = False


class Lookups:
    """Lookups in the background, one per request, for a scheduler that comes back to ask.

    After three lookups in a row that failed or took too long, none is asked for a while: every request is a
    miss at once, but for one at a time that tries. Callable from one thread.

    Parameters
    ----------
    client : LookupClient
        Closed with this object.
    timeout_s : float
        Deadline of a lookup; a request whose lookup takes longer is a miss.
    patience_s : float
        How long `get` waits for an answer that is about to come.
    lifetime_s : float
        How long an answer counts; a request that waits longer is looked up again.
    limit : int
        Requests whose answers are kept.
    """

    def __init__(
        self,
        client: LookupClient,
        *,
        timeout_s: float = 0.5,
        patience_s: float = 0.002,
        lifetime_s: float = 2.0,
        limit: int = 4096,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._client = client
        self._breaker = breaker or CircuitBreaker()
        self._timeout_s, self._patience_s, self._lifetime_s = timeout_s, patience_s, lifetime_s
        self._limit = limit
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvtc-lookup")
        self.failed = 0

    def get(
        self, request: str, hashes: Sequence[bytes], *, salt: bytes = b"", have_tokens: int = 0
    ) -> int | None:
        """Return how many leading tokens the tiers hold, or None if the answer is not there yet.

        A lookup that fails or takes too long is a miss (0), counted in `failed`.
        """
        now = time.monotonic()
        pending = self._pending.get(request)
        if pending is None or pending.num_hashes != len(hashes) or now - pending.asked > self._lifetime_s:
            self.forget(request)
            if not self._breaker.allow():
                return 0
            pending = self._ask(request, list(hashes), salt, have_tokens, now)
        try:
            found = pending.answer.result(self._patience_s)
            self._settle(pending, self._breaker.succeeded)
            return found
        except (TimeoutError, FutureTimeoutError):
            if time.monotonic() - pending.asked < self._timeout_s:
                return None
            self.failed += 1
            _log.warning("a lookup took longer than %g s; it counts as a miss", self._timeout_s)
        except KvtcError as error:
            self.failed += 1
            _log.warning("a lookup failed and counts as a miss: %s", error)
        self._settle(pending, self._breaker.failed)
        # Asked no more for this request before the answer would have been renewed anyway.
        settled: Future[int] = Future()
        settled.set_result(0)
        pending.answer = settled
        return 0

    def forget(self, request: str) -> None:
        """Drop what is known of a request."""
        pending = self._pending.pop(request, None)
        if pending is not None:
            pending.answer.cancel()
            self._settle(pending, self._breaker.undecided)

    def forget_all(self) -> None:
        """Drop what is known of every request."""
        for request in list(self._pending):
            self.forget(request)

    def reset(self, *, timeout_s: float) -> None:
        """See `LookupClient.reset`; also drops every answer."""
        self.forget_all()
        self._client.reset(timeout_s=timeout_s)

    def close(self) -> None:
        """End the background thread and the connection."""
        self.forget_all()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    @staticmethod
    def _settle(pending: _Pending, report: Callable[[], None]) -> None:
        if not pending.is_settled:
            pending.is_settled = True
            report()

    def _ask(self, request: str, hashes: list[bytes], salt: bytes, have: int, now: float) -> _Pending:
        while len(self._pending) >= self._limit:
            self.forget(next(iter(self._pending)))
        answer = self._thread.submit(
            self._client.lookup, hashes, salt=salt, have_tokens=have, timeout_s=self._timeout_s
        )
        self._pending[request] = pending = _Pending(answer, now, len(hashes))
        return pending


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise LookupServiceError("the deadline has passed")
    return left


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(count - len(parts), 1 << 18))
        if not part:
            raise LookupServiceError("it closed the connection")
        parts += part
    return bytes(parts)

"""A circuit breaker: what keeps failing is left alone, then tried with one request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Decides whether a request may be sent. Lives on one event loop.

    Closed: every request may. After `failures` in a row it opens: none may, for `pause_s`. Then it is half
    open: one request may. If that one succeeds the breaker closes; if it fails the breaker opens again, for
    twice as long as before, `longest_pause_s` at most.

    Whoever got leave by `allow` reports the outcome by `succeeded`, `failed` or, if there was none (the
    request was cancelled), `undecided`.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        pause_s: float = 5.0,
        longest_pause_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._pause_s, self._longest_pause_s = failures, pause_s, longest_pause_s
        self._clock = clock
        self._failures = 0
        self._open_until: float | None = None
        self._next_pause_s = pause_s
        self._probing = False
        self.openings = 0

    @property
    def state(self) -> Literal["closed", "open", "half_open"]:
        """What the breaker lets pass now."""
        if self._open_until is None:
            return "closed"
        return "open" if self._probing or self._clock() < self._open_until else "half_open"

    @property
    def retry_in_s(self) -> float:
        """Seconds until the next request may be tried; 0 if one may now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    def allow(self) -> bool:
        """Return whether a request may be sent now; when half open, this takes the one that may."""
        state = self.state
        if state == "half_open":
            self._probing = True
        return state != "open"

    def succeeded(self) -> None:
        """Note that the store answered as it should."""
        self._failures = 0
        self._open_until = None
        self._next_pause_s = self._pause_s
        self._probing = False

    def on_trial(self) -> None:
        """Close, after a trial that says little: the next failure opens the breaker again, for longer."""
        self._failures = self._limit - 1
        self._open_until = None
        self._probing = False

    def failed(self) -> None:
        """Note that the store did not answer, or not as it should."""
        self._failures += 1
        if self._open_until is None and self._failures < self._limit:
            return
        if self._open_until is not None and not self._probing:
            return  # a request from before it opened
        self._probing = False
        self._open_until = self._clock() + self._next_pause_s
        self._next_pause_s = min(2 * self._next_pause_s, self._longest_pause_s)
        self.openings += 1

    def undecided(self) -> None:
        """Note that a request was given up without an answer: the next one may be the trial."""
        self._probing = False

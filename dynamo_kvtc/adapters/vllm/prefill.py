"""How fast the engine prefills: measured around the forward passes that compute prompt tokens alone."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch

__all__ = ["CudaClock", "HostClock", "PrefillTimer", "clock_for"]

#: Forward passes whose times a GPU has not told yet; older ones are forgotten.
_MOST_PENDING = 16


class Clock(Protocol):
    """Marks moments of the device that computes."""

    def mark(self) -> Any:
        """Return the moment after everything that was asked of the device so far."""

    def seconds(self, first: Any, last: Any) -> float | None:
        """Return the time between two moments, or None if the device has not come so far. Does not wait."""


class HostClock:
    """For CPUs, where a forward pass returns when it is done."""

    def mark(self) -> float:
        """Return now."""
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float | None:
        """Return the difference."""
        return last - first


class CudaClock:
    """For GPUs, where a forward pass returns when its kernels are queued: events between them."""

    def mark(self) -> Any:
        """Return an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float | None:
        """Return the time between two events, or None if the second has not passed yet."""
        return first.elapsed_time(last) / 1000 if last.query() else None


def clock_for(device: torch.device) -> Clock:
    """Return the clock of the device that holds the cache."""
    return CudaClock() if device.type == "cuda" else HostClock()


class PrefillTimer:
    """Times single forward passes.

    Parameters
    ----------
    least_tokens : int
        Shorter passes are not timed: what they take is mostly not for their tokens, and a prefill that is
        longer by so many tokens takes less.
    """

    def __init__(self, clock: Clock, least_tokens: int) -> None:
        self._clock, self._least_tokens = clock, least_tokens
        self._running: tuple[int, Any] | None = None
        self._pending: deque[tuple[int, Any, Any]] = deque(maxlen=_MOST_PENDING)

    def start(self, tokens: int) -> None:
        """Begin a pass over `tokens` prompt tokens and nothing else; 0 for any other pass."""
        self._running = (tokens, self._clock.mark()) if tokens >= self._least_tokens else None

    def stop(self) -> None:
        """End the pass, if it is timed and has not ended yet."""
        if self._running is not None:
            self._pending.append((*self._running, self._clock.mark()))
            self._running = None

    def take(self) -> list[tuple[int, float]]:
        """Return tokens and seconds of the passes that are done by now."""
        done = []
        while self._pending:
            tokens, first, last = self._pending[0]
            seconds = self._clock.seconds(first, last)
            if seconds is None:
                break
            self._pending.popleft()
            done.append((tokens, seconds))
        return done

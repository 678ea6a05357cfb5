"""Counters of a `TransferAgent`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AgentStats"]


@dataclass(frozen=True, slots=True)
class AgentStats:
    """Counters since the agent was created.

    ``busy_s`` is the time during which at least one transfer was in flight; ``parked`` counts abandoned
    transfers that have not drained; ``replaced`` how often NIXL's agent was taken for broken.
    """

    bytes_copied: int
    bytes_read: int
    bytes_written: int
    transfers: int
    failed: int
    timed_out: int
    in_flight: int
    parked: int
    replaced: int
    busy_s: float
    file_mode: str

"""How onboards are cut and bounded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OnboardSettings"]


@dataclass(frozen=True, slots=True)
class OnboardSettings:
    """How an onboard is cut and bounded.

    Attributes
    ----------
    timeout_s : float
        Deadline of the whole onboard; when it passes, the engine recomputes.
    units : int
        Into about how many units a request is cut. More units overlap better, fewer have larger
        matrix products.
    transfers_in_flight : int
        Units whose bytes may be on their way or waiting for decoding; bounds the staging memory used.
    at_once : int
        Onboards that run at the same time; others wait for their turn, by priority, within their deadline.
    open_bytes : int
        How much KV, by its full size, may be open before it is projected. More lets the first layers of a
        group finish earlier; the memory taken is a fraction of it (the stored share of the components).
    """

    timeout_s: float = 30.0
    units: int = 12
    transfers_in_flight: int = 3
    at_once: int = 16
    open_bytes: int = 512 << 20

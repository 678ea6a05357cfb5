"""What a request's priority means for its blocks.

Lower comes sooner, as in vLLM; 0 is usual. A request of higher priority is onboarded before others that wait,
and its blocks stay in a tier for longer: each time eviction comes to one, it is spared, a bounded number of
times since it was last asked for by such a request.
"""

from __future__ import annotations

__all__ = ["MOST_SPARED", "times_spared"]

#: However high a priority, so that blocks nobody asks for any more do go.
MOST_SPARED = 3


def times_spared(priority: int) -> int:
    """Return how often eviction passes over a block of a request with this priority."""
    return min(MOST_SPARED, max(0, -priority))

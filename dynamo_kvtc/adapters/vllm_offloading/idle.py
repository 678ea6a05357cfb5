"""Steps of vLLM's that only wait for our loads."""

from __future__ import annotations

import time
from collections.abc import Collection

__all__ = ["hold_idle_step"]

#: How long such a step is held back.
_IDLE_STEP_S = 0.002


def hold_idle_step(alive: Collection[str], waiting: Collection[str]) -> None:
    """Wait for a moment if there are requests and all of them wait for loads: the step computes nothing.

    vLLM spins from step to step then, and the threads that decode need the interpreter.
    """
    if alive and all(request in waiting for request in alive):
        time.sleep(_IDLE_STEP_S)

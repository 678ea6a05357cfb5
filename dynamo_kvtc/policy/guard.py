"""The quality guard: does what is stored come back as well as the artifact promises?

A sampled share of the tier blocks is decoded after it was encoded and compared with the error that the
artifact states. Where the mean of several samples lies above what is tolerated, the traffic is unlike the
calibration text: the guard goes one plan gentler, and when there is none left, to raw. Where raw is not to be
had, storing stops. It never goes back by itself: what drifted must be looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy.speeds import Ewma

__all__ = ["GuardSettings", "GuardState", "QualityGuard"]

#: From the least to the most severe.
GuardState = Literal["off", "ok", "raised", "raw", "stopped"]


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """How closely the guard looks.

    Attributes
    ----------
    share : float
        Share of the tier blocks that are decoded again; 0 turns the guard off.
    tolerance : float
        Measured over expected error from which on it acts.
    samples : int
        Tier blocks whose mean it needs for that.
    """

    share: float = 1 / 64
    tolerance: float = 2.5
    samples: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.tolerance < 1 or self.samples < 1:
            raise ConfigError(f"share lies within 0 and 1, tolerance and samples are 1 at least: {self}")


class QualityGuard:
    """The guard's state. Used by one thread at a time; read by others.

    Parameters
    ----------
    levels : int
        Steps with plans: the least gentle plan that may be encoded with becomes gentler with each of them.
    has_raw : bool
        Whether raw is the step behind them.

    Raises
    ------
    ConfigError
        If there is no plan to encode with.
    """

    def __init__(self, settings: GuardSettings, levels: int, *, has_raw: bool = False) -> None:
        if levels < 1:
            raise ConfigError("a guard needs a plan to encode with")
        self.settings, self._levels, self._has_raw = settings, levels, has_raw
        self.level = 0
        self._error = Ewma()
        self._due = 0.0
        self.checks = {"good": 0, "drift": 0}
        self.seconds = 0.0

    @property
    def state(self) -> GuardState:
        """What the guard has come to."""
        if not self.settings.share:
            return "off"
        if self.level >= self._levels:
            return "raw" if self._has_raw else "stopped"
        return "raised" if self.level else "ok"

    @property
    def stopped(self) -> bool:
        """Whether even the gentlest plan is not good enough and raw not to be had: nothing more is stored."""
        return self.level >= self._levels and not self._has_raw

    def samples_next(self) -> bool:
        """Tell whether the next tier block is to be checked."""
        self._due += self.settings.share
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def checked(self, error_ratio: float, seconds: float = 0.0) -> bool:
        """Take in a check (measured over expected error, its seconds); returns whether the guard acted."""
        good = math.isfinite(error_ratio) and error_ratio <= self.settings.tolerance
        self.checks["good" if good else "drift"] += 1
        self.seconds += seconds
        # One absurd block must not be the whole mean.
        most = 10 * self.settings.tolerance
        self._error.observe(min(error_ratio, most) if math.isfinite(error_ratio) else most)
        mean = self._error.value
        if self.level >= self._levels or self._error.count < self.settings.samples or mean is None:
            return False
        if mean <= self.settings.tolerance:
            return False
        self.level += 1
        self._error = Ewma()
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the status."""
        return {
            "state": self.state,
            "level": self.level,
            "error_ratio": self._error.value,
            "checks": dict(self.checks),
            "seconds": self.seconds,
        }

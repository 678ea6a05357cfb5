"""What things cost here: speeds measured while serving, smoothed.

A speed that was never measured is None, and whoever decides then does as if the policy were not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Ewma", "Speeds"]


@dataclass(slots=True)
class Ewma:
    """A mean that forgets: each observation moves it by the share `weight` of the difference.

    The first observations count as in a plain mean, so that a start-up is not stuck with its first value.
    """

    weight: float = 0.2
    value: float | None = None
    count: int = 0

    def observe(self, value: float) -> None:
        """Take a value in; anything but a finite number is left out."""
        if not math.isfinite(value):
            return
        self.count += 1
        share = max(self.weight, 1 / self.count)
        self.value = value if self.value is None else self.value + share * (value - self.value)

    def observe_speed(self, amount: float, seconds: float) -> None:
        """Take a speed in; without an amount or a time it is left out.

        What is smoothed is the time per unit, which is what costs are made of: a mean of speeds would hide a
        tier that has become slow behind the times when it was fast.
        """
        if not (amount > 0 and 0 < seconds < math.inf):
            return
        self.count += 1
        share = max(self.weight, 1 / self.count)
        before = seconds / amount if self.value is None else 1 / self.value
        self.value = 1 / (before + share * (seconds / amount - before))


@dataclass
class Speeds:
    """Measured speeds of one worker. Belongs to one event loop.

    Parameters
    ----------
    configured_prefill : float, optional
        Tokens per second of the engine's prefill, used until the host tells a measured one.
    """

    configured_prefill: float | None = None
    _prefill: Ewma = field(default_factory=Ewma)
    _decode: Ewma = field(default_factory=Ewma)
    _overhead: Ewma = field(default_factory=Ewma)
    _read: dict[str, Ewma] = field(default_factory=dict)
    _encode: dict[str, Ewma] = field(default_factory=dict)
    _token_bytes: dict[str, Ewma] = field(default_factory=dict)

    # --- measuring ---------------------------------------------------------------------------------

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Take in that the engine computed the KV of `tokens` tokens within `seconds`."""
        self._prefill.observe_speed(tokens, seconds)

    def encoded(self, encoder: str, tokens: int, nbytes: int, seconds: float) -> None:
        """Take in that an encoder made `nbytes` bytes of `tokens` tokens within `seconds`."""
        self._encode.setdefault(encoder, Ewma()).observe_speed(tokens, seconds)
        if tokens > 0:
            self._token_bytes.setdefault(encoder, Ewma()).observe(nbytes / tokens)

    def read(self, tier: str, nbytes: int, seconds: float) -> None:
        """Take in that `nbytes` bytes came from a tier while reads of it were under way for `seconds`."""
        self._read.setdefault(tier, Ewma()).observe_speed(nbytes, seconds)

    def onboarded(self, tokens: int, *, wall_s: float, transfer_s: float, decode_s: float) -> None:
        """Take in an onboard that was put in place whole; times as `Counters.onboard_ended` has them."""
        self._decode.observe_speed(tokens, decode_s)
        self._overhead.observe(max(0.0, wall_s - max(transfer_s, decode_s)))

    # --- reading -----------------------------------------------------------------------------------

    @property
    def prefill(self) -> float | None:
        """Tokens per second of the engine's prefill: measured, or as configured."""
        return self.configured_prefill if self._prefill.value is None else self._prefill.value

    @property
    def decode(self) -> float | None:
        """Tokens per second that decoding puts in place."""
        return self._decode.value

    @property
    def overhead_s(self) -> float:
        """Seconds of an onboard in which neither its transfers nor its decoding hide the other."""
        return self._overhead.value or 0.0

    def read_speed(self, tier: str) -> float | None:
        """Bytes per second that a tier is read with."""
        found = self._read.get(tier)
        return None if found is None else found.value

    def token_bytes(self, encoder: str) -> float | None:
        """Stored bytes per token of an encoder."""
        found = self._token_bytes.get(encoder)
        return None if found is None else found.value

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the status."""
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "overhead_s": self._overhead.value,
            "read": _values(self._read.items()),
            "encode": _values(self._encode.items()),
            "token_bytes": _values(self._token_bytes.items()),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Speeds:
        """Return the speeds that a status tells."""
        made = cls()
        for name, into in (("prefill", made._prefill), ("decode", made._decode)):
            if values.get(name) is not None:
                into.observe(float(values[name]))
        if values.get("overhead_s") is not None:
            made._overhead.observe(float(values["overhead_s"]))
        for name, kept in (
            ("read", made._read),
            ("encode", made._encode),
            ("token_bytes", made._token_bytes),
        ):
            for label, value in (values.get(name) or {}).items():
                kept.setdefault(label, Ewma()).observe(float(value))
        return made


def _values(items: Iterable[tuple[str, Ewma]]) -> dict[str, float]:
    return {name: mean.value for name, mean in items if mean.value is not None}

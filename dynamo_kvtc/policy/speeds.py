"""What things cost here: speeds measured while serving, smoothed.

A speed that was never measured is None, and whoever decides then does as if the policy were not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RAW", "Ewma", "Speeds"]

#: Name of the encoder that stores raw.
RAW = "raw"

#: How much of a tier's share in what is found one lookup decides.
_SHARE_WEIGHT = 0.02

#: How much of the shares is divided evenly: a tier that nothing was found in lately is not forgotten.
_EVEN = 0.1


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
    _decode_by: dict[str, Ewma] = field(default_factory=dict)
    _found: dict[str, Ewma] = field(default_factory=dict)
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

    def found(self, tiers: Sequence[str]) -> None:
        """Take in a lookup: the tier that each of the tier blocks that it found would be read from."""
        for tier in tiers:
            self._found.setdefault(tier, Ewma(_SHARE_WEIGHT))
        if tiers:
            for tier, share in self._found.items():
                share.observe(tiers.count(tier) / len(tiers))

    def decoded(self, tokens: int, seconds: float, encoder: str | None = None) -> None:
        """Take in that decoding put `tokens` tokens in place within `seconds`.

        Parameters
        ----------
        encoder : str, optional
            What all of their tier blocks were encoded with; None if that differs.
        """
        self._decode.observe_speed(tokens, seconds)
        if encoder is not None:
            self._decode_by.setdefault(encoder, Ewma()).observe_speed(tokens, seconds)

    def onboarded(
        self,
        tokens: int,
        *,
        wall_s: float,
        transfer_s: float,
        decode_s: float,
        encoder: str | None = None,
        is_decoded: bool = True,
    ) -> None:
        """Take in an onboard that was put in place whole; times as `Counters.onboard_ended` has them.

        Parameters
        ----------
        encoder : str, optional
            As for `decoded`.
        is_decoded : bool
            False: it has not been decoded to its end; `decoded` will tell.
        """
        if is_decoded:
            self.decoded(tokens, decode_s, encoder)
        self._overhead.observe(max(0.0, wall_s - max(transfer_s, decode_s)))

    # --- reading -----------------------------------------------------------------------------------

    @property
    def prefill(self) -> float | None:
        """Tokens per second of the engine's prefill: measured, or as configured."""
        return self.configured_prefill if self._prefill.value is None else self._prefill.value

    @property
    def decode(self) -> float | None:
        """Tokens per second that decoding puts in place, whatever was encoded with."""
        return self._decode.value

    def decode_speed(self, encoder: str | None = None) -> float | None:
        """Tokens per second that streams of an encoder are decoded with.

        A plan that was never decoded counts as the slowest that was. Raw streams that were never decoded
        count as free: nothing is computed, and the first of them corrects that.
        """
        own = None if encoder is None else self._decode_by.get(encoder)
        if own is not None and own.value is not None:
            return own.value
        if self._decode.value is None:
            return None
        if encoder == RAW:
            return math.inf
        plans = [mean.value for name, mean in self._decode_by.items() if name != RAW and mean.value]
        return min(plans, default=self._decode.value)

    def shares(self, tiers: Sequence[str]) -> dict[str, float]:
        """Return where what is found lies, as measured in lookups: a share for each tier, 1 in all."""
        found = {tier: self._found[tier].value or 0.0 if tier in self._found else 0.0 for tier in tiers}
        total, even = sum(found.values()), 1 / len(tiers)
        if not total:
            return dict.fromkeys(tiers, even)
        return {tier: (1 - _EVEN) * share / total + _EVEN * even for tier, share in found.items()}

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
            "decode_by": _values(self._decode_by.items()),
            "found": _values(self._found.items()),
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
            ("decode_by", made._decode_by),
            ("found", made._found),
            ("read", made._read),
            ("encode", made._encode),
            ("token_bytes", made._token_bytes),
        ):
            for label, value in (values.get(name) or {}).items():
                kept.setdefault(label, Ewma()).observe(float(value))
        return made


def _values(items: Iterable[tuple[str, Ewma]]) -> dict[str, float]:
    return {name: mean.value for name, mean in items if mean.value is not None}

"""What tier blocks can be encoded with here, and which of it the quality guard lets through now."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.fidelity import relative_error
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.observability import Action
from dynamo_kvtc.policy.guard import GuardSettings, QualityGuard

__all__ = ["Encoder", "Encoders"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Encoder:
    """One way to encode tier blocks.

    Attributes
    ----------
    name : str
        In metrics and decisions.
    codec : KvCodec
        Encodes with one plan, or raw.
    ratio : float
        That its plan states; 1 for raw.
    expected_error : float
        Relative squared error that its streams are held against. Raw ones have none.
    """

    name: str
    codec: KvCodec
    ratio: float = 1.0
    expected_error: float = 0.0

    @property
    def is_raw(self) -> bool:
        """Whether it stores the cache's own bytes."""
        return isinstance(self.codec, RawCodec)

    @property
    def plan_id(self) -> int:
        """The plan that its streams name; 0 for raw."""
        return (self.codec.plan_id or 0) if isinstance(self.codec, TransformCodec) else 0

    @property
    def token_bytes(self) -> float:
        """Stored bytes per token as the plan states, until they are measured."""
        return self.codec.geometry.token_bytes / self.ratio


class Encoders:
    """The encoders of one adapter. All of one artifact: their streams share keys, and one codec reads them.

    Belongs to one event loop, `encode` and `check` to the encoding thread.

    Parameters
    ----------
    plans : Sequence[Encoder]
        From the coarsest plan that the operator allows to the gentlest of the artifact; raw alone where there
        is no artifact.
    configured : int
        Index in `plans` of the one that is encoded with where nothing says otherwise.
    raw : Encoder, optional
        What is stored with when the guard has no gentler plan left.
    no_raw : str
        Why there is none, for people.
    raw_by_cost : bool
        Whether raw may also be chosen because it is faster.
    guard : GuardSettings, optional
        None or a share of 0: nothing is checked.
    """

    def __init__(
        self,
        plans: Sequence[Encoder],
        configured: int = 0,
        *,
        raw: Encoder | None = None,
        no_raw: str = "",
        raw_by_cost: bool = False,
        guard: GuardSettings | None = None,
    ) -> None:
        self.plans: tuple[Encoder, ...] = tuple(plans)
        self.configured = configured
        self.raw, self.no_raw, self.raw_by_cost = raw, no_raw, raw_by_cost
        # The guard's steps: the coarsest plan that may be used, and at last raw.
        self._floors: list[int] = sorted({0, *range(configured, len(self.plans))})
        settings = (
            guard if guard is not None and not self.plans[configured].is_raw else GuardSettings(share=0)
        )
        self.guard = QualityGuard(settings, len(self._floors), has_raw=raw is not None)
        self._names = {(one.is_raw, one.plan_id): one.name for one in (*self.plans, raw) if one is not None}

    @classmethod
    def single(cls, codec: KvCodec, name: str = "default") -> Encoders:
        """Return one encoder without a guard: `codec`, or what it encodes with if it reads raw, too."""
        return cls([Encoder(name, codec.coded if isinstance(codec, MixedCodec) else codec)])

    @property
    def current(self) -> Encoder:
        """What is encoded with now where cost does not decide; the gentlest where nothing may be stored."""
        level, gentlest = self.guard.level, self.plans[-1]
        if level < len(self._floors):
            return self.plans[max(self.configured, self._floors[level])]
        return gentlest if self.raw is None else self.raw

    def allowed(self) -> list[tuple[Encoder, Action]]:
        """Return what may be chosen now and what choosing it is counted as.

        Returns
        -------
        list
            `current` first, then coarser plans down to the guard's floor, then raw; nothing if the guard has
            stopped storing.
        """
        current, level = self.current, self.guard.level
        if self.guard.stopped:
            return []
        if current.is_raw:
            return [(current, "raw")]
        found: list[tuple[Encoder, Action]] = [(current, "compress")]
        index = self.plans.index(current)
        if index > self.configured:
            found = [(current, "gentler")]
        found += [(plan, "coarser") for plan in reversed(self.plans[self._floors[level] : index])]
        if self.raw is not None and self.raw_by_cost:
            found.append((self.raw, "raw"))
        return found

    def resolve(self, chosen: Encoder) -> Encoder:
        """Return what to encode with: what was chosen, unless the guard has become stricter since."""
        if chosen.is_raw or chosen in [one for one, _ in self.allowed()]:
            return chosen
        return self.current

    def guard_status(self) -> dict[str, Any]:
        """Return the guard's state and what it does when no gentler plan is left, for the status."""
        last = "raw" if self.raw is not None else f"stop storing ({self.no_raw or 'there is no raw encoder'})"
        return {**self.guard.to_dict(), "encodes_with": self.current.name, "last_resort": last}

    def raw_bytes(self, num_tokens: int) -> int | None:
        """Return the size of a raw stream, by which it is known before its header; None without raw."""
        raw = self.raw or next((one for one in self.plans if one.is_raw), None)
        return None if raw is None else raw.codec.max_stream_bytes(num_tokens, 0)

    def name_of(self, headers: Sequence[StreamHeader]) -> str | None:
        """Return the name of what all these streams were encoded with; None if that differs."""
        names = {self._names.get((header.profile is Profile.RAW, header.plan_id)) for header in headers}
        return names.pop() if len(names) == 1 else None

    def encode(self, blocks: Sequence[TierBlock], encoder: Encoder) -> list[bytes]:
        """Encode tier blocks; sampled ones are decoded and compared, which never fails the encoding."""
        streams = encoder.codec.encode(blocks)
        if not encoder.is_raw:
            for block, stream in zip(blocks, streams, strict=True):
                if self.guard.samples_next():
                    self.check(encoder, block, stream)
        return streams

    def check(self, encoder: Encoder, block: TierBlock, stream: Buffer, codec: KvCodec | None = None) -> None:
        """Decode a stream that was just encoded, where the block lies, compare, and tell the guard.

        Parameters
        ----------
        codec : KvCodec, optional
            Made the stream in place of the encoder's own.
        """
        assert isinstance(encoder.codec, TransformCodec)
        start = time.perf_counter()
        try:
            decoded = (codec or encoder.codec).decode(stream, device=block.keys.device)
            error = relative_error(encoder.codec.parameters, block, decoded)
        except KvtcError as failure:
            _log.error("a stream that was just encoded cannot be decoded: %s", failure)
            error = float("inf")
        before = self.guard.state
        expected = max(encoder.expected_error, 1e-12)
        if self.guard.checked(error / expected, time.perf_counter() - start):
            fields = {"before": before, "now": self.guard.state, "encodes_with": self.current.name}
            _log.warning(
                "what is stored is further from the engine's KV than the artifact states; calibrate with "
                "text like the traffic",
                extra={"kvtc": fields},
            )

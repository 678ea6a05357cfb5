"""Encoding under the quality guard: which codec encodes now, and the checks of what it made."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.fidelity import relative_error
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.policy.guard import QualityGuard

__all__ = ["GuardedEncoder", "Level"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Level:
    """A plan that can be encoded with: its name in metrics and its codec."""

    name: str
    codec: TransformCodec


class GuardedEncoder:
    """Encodes with the guard's plan. `encode` runs in the encoding thread only.

    Parameters
    ----------
    levels : Sequence[Level]
        From the configured plan to the gentlest. All of one artifact, so that their streams share keys and
        each decodes what the others encoded.
    expected_error : float
        Mean relative squared error that the artifact states for the configured plan.
    """

    def __init__(self, guard: QualityGuard, levels: Sequence[Level], expected_error: float) -> None:
        self.guard, self._levels, self._expected = guard, tuple(levels), max(expected_error, 1e-12)

    @property
    def current(self) -> Level:
        """The plan that is encoded with now."""
        return self._levels[min(self.guard.level, len(self._levels) - 1)]

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks; sampled ones are decoded and compared, which never fails the encoding."""
        codec = self.current.codec
        streams = codec.encode(blocks)
        for block, stream in zip(blocks, streams, strict=True):
            if self.guard.samples_next():
                self.check(codec, block, stream)
        return streams

    def check(self, codec: KvCodec, block: TierBlock, stream: Buffer) -> None:
        """Decode a stream with the codec that made it and compare; on the device that the block lies on."""
        start = time.perf_counter()
        try:
            decoded = codec.decode(stream, device=block.keys.device)
            error = relative_error(self.current.codec.parameters, block, decoded)
        except KvtcError as failure:
            _log.error("a stream that was just encoded cannot be decoded: %s", failure)
            error = float("inf")
        before = self.guard.state
        if self.guard.checked(error / self._expected, time.perf_counter() - start):
            fields = {"before": before, "now": self.guard.state, "encodes_with": self.current.name}
            _log.warning(
                "what is stored is further from the engine's KV than the artifact states; calibrate with "
                "text like the traffic",
                extra={"kvtc": fields},
            )

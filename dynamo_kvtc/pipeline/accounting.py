"""What is counted and logged of an onboard that has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.observability import Counters, Outcome, error_type, miss_reason
from dynamo_kvtc.observability.tracing import Part, trace_onboard
from dynamo_kvtc.pipeline.blocks import TierBlockRef
from dynamo_kvtc.pipeline.timeline import Timeline
from dynamo_kvtc.policy import Speeds

__all__ = ["EndedOnboard"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndedOnboard:
    """An onboard that has ended.

    Attributes
    ----------
    refs : Sequence[TierBlockRef]
        Every tier block that was asked for.
    headers : Sequence[StreamHeader]
        Of the tier blocks whose KV is in place.
    cause : BaseException, optional
        What ended the onboard in front of the other tier blocks.
    encoder : str, optional
        What all tier blocks in place were encoded with; None if that differs or is not known.
    is_decoded : bool
        False: what was read is only held, and whoever decodes it measures how long that takes.
    """

    refs: Sequence[TierBlockRef]
    headers: Sequence[StreamHeader]
    timeline: Timeline
    cause: BaseException | None
    encoder: str | None = None
    is_decoded: bool = True

    @property
    def tokens(self) -> int:
        """Tokens in place."""
        return sum(ref.num_tokens for ref in self.refs[: len(self.headers)])

    @property
    def stored_bytes(self) -> int:
        """Bytes of the objects whose KV is in place."""
        return sum(header.stream_size for header in self.headers)

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        if len(self.headers) == len(self.refs):
            return "complete"
        return "partial" if self.headers else "failed"

    def count(self, counters: Counters, speeds: Speeds, token_bytes: int) -> None:
        """Add it to the counters and the measured speeds, and write its line into the log.

        Parameters
        ----------
        token_bytes : int
            Size of one token's KV in the cache's dtype.
        """
        if not self.refs:
            return
        blocks, tokens = len(self.headers), self.tokens
        counters.onboarded(blocks, tokens, tokens * token_bytes, self.stored_bytes)
        if self.cause is not None:
            counters.missed(miss_reason(self.cause), len(self.refs) - blocks)
            counters.failed(self.cause)
        seconds = time.perf_counter() - self.timeline.origin
        transfer_s = self.timeline.busy_s("transfer")
        decode_s = self.timeline.busy_s("open", "project")
        counters.onboard_ended(
            self.outcome,
            seconds=seconds,
            first_layer_s=min(self.timeline.layer_ready.values(), default=None),
            transfer_s=transfer_s,
            decode_s=decode_s,
        )
        if speeds.prefill:
            counters.recompute_avoided(tokens / speeds.prefill)
        if self.outcome == "complete":
            speeds.onboarded(
                tokens,
                wall_s=seconds,
                transfer_s=transfer_s,
                decode_s=decode_s,
                encoder=self.encoder,
                is_decoded=self.is_decoded,
            )
        trace_onboard(
            self.timeline.origin,
            seconds,
            {
                "kvtc.outcome": self.outcome,
                "kvtc.tokens": tokens,
                "kvtc.stored_bytes": self.stored_bytes,
                "kvtc.overlap": self.timeline.overlap,
            },
            [
                Part(one.stage, one.start, one.stop, {"group": one.group, "tier_blocks": one.num_blocks})
                for one in self.timeline.intervals
            ],
            failed=self.outcome != "complete",
        )
        if _log.isEnabledFor(logging.DEBUG):
            fields = {
                "outcome": self.outcome,
                "tokens": tokens,
                "bytes": self.stored_bytes,
                "seconds": f"{seconds:.4f}",
                "overlap": f"{self.timeline.overlap:.2f}",
                "cause": "none" if self.cause is None else error_type(self.cause),
            }
            _log.debug("onboarded", extra={"kvtc": fields})

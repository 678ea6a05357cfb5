"""The whole exception tree of dynamo_kvtc.

Every error says what was wrong and what to do about it. Inside the pipeline each of them becomes a
miss (the engine recomputes); at start-up and on the command line they reach the user as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "ArtifactFormatError",
    "ArtifactMismatchError",
    "BadMagicError",
    "BitstreamError",
    "CalibrationError",
    "CalibrationStoppedError",
    "ChunkChecksumError",
    "ChunkTableError",
    "CodecError",
    "ConfigError",
    "EncodeRangeError",
    "EntropyDecodeError",
    "EvaluationError",
    "GpuUnavailableError",
    "HeaderChecksumError",
    "KvtcError",
    "LayoutError",
    "LookupServiceError",
    "MissingDependencyError",
    "ObjectCorruptError",
    "ObjectMissingError",
    "OnboardCancelledError",
    "OnboardError",
    "PayloadError",
    "ReservedBitsError",
    "RopeError",
    "SizeLimitError",
    "StoreUnavailableError",
    "StreamMismatchError",
    "TierClosedError",
    "TierError",
    "TierFullError",
    "TierInUseError",
    "TransferError",
    "TransferTimeoutError",
    "TruncatedStreamError",
    "UnknownCoderError",
    "UnsupportedVersionError",
]


class KvtcError(Exception):
    """Base of every error that dynamo_kvtc raises on purpose."""


class ConfigError(KvtcError):
    """The configuration is unreadable, has an unknown key, or contradicts itself."""


class MissingDependencyError(KvtcError):
    """An optional package is needed for what was asked; the message names the install command."""


class GpuUnavailableError(KvtcError):
    """What was asked for needs an NVIDIA GPU and what goes with it; the message says what is missing."""


class LayoutError(KvtcError):
    """A KV cache layout (shape, dtype, head split) that the codec or a cache view cannot serve."""


class CalibrationError(KvtcError):
    """Calibration cannot run on this model or text, or would give a useless artifact."""


class CalibrationStoppedError(CalibrationError):
    """The caller asked calibration to stop; its state is saved and the next run continues."""


class EvaluationError(KvtcError):
    """An evaluation or a benchmark cannot be run as asked."""


# --- artifacts -----------------------------------------------------------------------------------


class ArtifactError(KvtcError):
    """Base of errors about calibrated artifacts."""


class ArtifactFormatError(ArtifactError):
    """The artifact folder is missing a part, fails its schema, or fails its content id."""


class ArtifactMismatchError(ArtifactError):
    """The artifact was calibrated for another model, dtype or head shard than the one that runs."""


# --- codec and bitstream -------------------------------------------------------------------------


class CodecError(KvtcError):
    """Base of errors raised while encoding or decoding."""


class RopeError(CodecError):
    """A rotary embedding that cannot be removed from the keys (unknown scaling, bad dimensions)."""


class EncodeRangeError(CodecError):
    """The KV to encode holds NaN, infinity, or values that the profile's side data cannot carry."""


class BitstreamError(CodecError):
    """Base of everything that can be wrong with a stored stream."""


class BadMagicError(BitstreamError):
    """The bytes are not a KVTC stream."""


class UnsupportedVersionError(BitstreamError):
    """The stream's version, profile or plan is one that this reader does not know."""


class ReservedBitsError(BitstreamError):
    """A reserved field or padding byte is not zero."""


class TruncatedStreamError(BitstreamError):
    """The stream ends before its header, its table or a chunk does."""


class HeaderChecksumError(BitstreamError):
    """The header or the chunk table is damaged."""


class ChunkTableError(BitstreamError):
    """Chunks overlap, leave holes, are misaligned or do not cover what the header promises."""


class ChunkChecksumError(BitstreamError):
    """The stored bytes of a chunk are damaged."""


class SizeLimitError(BitstreamError):
    """A size in the header is beyond the format's bound."""


class UnknownCoderError(BitstreamError):
    """No entropy coder is registered under the id that a chunk names."""


class EntropyDecodeError(BitstreamError):
    """A chunk's bytes are not a valid stream of its entropy coder, or decode to another length."""


class PayloadError(BitstreamError):
    """A section's payload holds what no encoder writes: NaN, infinity, symbols or escapes out of range."""


class StreamMismatchError(BitstreamError):
    """A valid stream that belongs to another artifact, geometry, position or key."""


# --- transfer and tiers --------------------------------------------------------------------------


class TransferError(KvtcError):
    """A transfer failed; nothing of its destination may be used."""


class TransferTimeoutError(TransferError):
    """A transfer did not finish before its deadline; its buffers stay parked until it has drained."""


class StoreUnavailableError(TransferError):
    """A store, or a tier, failed or timed out several times in a row; it is left alone for a while."""


class TierError(KvtcError):
    """Base of errors about tiers."""


class TierClosedError(TierError):
    """The tier was closed before or during the call."""


class TierInUseError(TierError):
    """Another process or tier holds the lock of the folder."""


class TierFullError(TierError):
    """The object does not fit: it is larger than the tier, or everything in it is pinned."""


class ObjectMissingError(TierError):
    """No whole object is stored under this key."""


class ObjectCorruptError(TierError):
    """The stored object fails its length or checksum; it is dropped and counts as a miss."""


# --- pipeline ------------------------------------------------------------------------------------


class LookupServiceError(KvtcError):
    """The process that owns the tiers could not be asked, or did not answer in time or in form."""


class OnboardCancelledError(KvtcError):
    """An onboard was cancelled by its caller; the cause inside the `OnboardError` that waiters see."""


class OnboardError(KvtcError):
    """Onboarding failed; the engine must recompute `tokens_to_recompute`.

    Parameters
    ----------
    message : str
        What failed and where.
    tokens_to_recompute : Sequence[tuple[int, int]]
        Half-open token ranges ``(start, stop)`` of the request whose KV is not in place.
    """

    def __init__(self, message: str, tokens_to_recompute: Sequence[tuple[int, int]]) -> None:
        super().__init__(message)
        self.tokens_to_recompute: tuple[tuple[int, int], ...] = tuple(tokens_to_recompute)

"""What kernels find wrong with a payload, as bits that come back with it, and the errors they become.

A kernel cannot raise. It sets bits in one word per tier block; whoever waits for the batch reads the words
before anything of it counts as decoded.
"""

from __future__ import annotations

from dynamo_kvtc.errors import BitstreamError, ChunkTableError, PayloadError, ReservedBitsError

__all__ = ["COUNT", "ESCAPE", "PADDING", "VALUE", "fault_error"]

#: Padding behind the last token is not zero.
PADDING = 1

#: A number that no encoder writes: NaN, infinity, a symbol beyond its class.
VALUE = 2

#: The stored number of escapes is not what the payload's size gives.
COUNT = 4

#: An escape that does not agree with its class or its clamped symbol.
ESCAPE = 8


def fault_error(bits: int) -> BitstreamError | None:
    """Return the error for a word of bits; None for 0."""
    if bits & COUNT:
        return ChunkTableError("a section's size does not fit its number of escapes; drop the stream")
    if bits & PADDING:
        return ReservedBitsError("padding behind the last token's symbols is not 0; drop the stream")
    if bits & VALUE:
        return PayloadError("a section holds numbers or symbols that no encoder writes; drop the stream")
    if bits & ESCAPE:
        return PayloadError("an escape does not agree with its class or its clamped symbol; drop the stream")
    return None

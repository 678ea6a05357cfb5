"""Frames of the lookup service: a length and a JSON object, both bounded. Never pickle."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Sequence
from typing import Any

from dynamo_kvtc.errors import LookupServiceError

__all__ = [
    "LENGTH_BYTES",
    "MAX_FRAME_BYTES",
    "decode",
    "encode",
    "frame_length",
    "pack_hashes",
    "unpack_hashes",
]

#: A frame starts with its length, 32 bits, big-endian.
LENGTH_BYTES = 4

#: Longest frame after its length: the hashes of 100,000 blocks and more.
MAX_FRAME_BYTES = 8 << 20

_MAX_HASH_BYTES = 1024


def encode(message: dict[str, Any]) -> bytes:
    """Return a whole frame.

    Raises
    ------
    LookupServiceError
        If it would be longer than `MAX_FRAME_BYTES`.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise LookupServiceError(f"a lookup message of {len(body)} bytes exceeds {MAX_FRAME_BYTES} bytes")
    return struct.pack(">I", len(body)) + body


def frame_length(head: bytes) -> int:
    """Return how many bytes follow a frame's first four.

    Raises
    ------
    LookupServiceError
        If they are more than `MAX_FRAME_BYTES`.
    """
    (length,) = struct.unpack(">I", head)
    if length > MAX_FRAME_BYTES:
        raise LookupServiceError(f"a lookup message of {length} bytes exceeds {MAX_FRAME_BYTES} bytes")
    return int(length)


def decode(body: bytes) -> dict[str, Any]:
    """Return the message of a frame.

    Raises
    ------
    LookupServiceError
        If it is not a JSON object.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise LookupServiceError(f"a lookup message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise LookupServiceError("a lookup message is not a JSON object")
    return message


def pack_hashes(hashes: Sequence[bytes]) -> dict[str, Any]:
    """Return hashes of one length as JSON values.

    Raises
    ------
    LookupServiceError
        If their lengths differ.
    """
    size = len(hashes[0]) if hashes else 1
    if any(len(one) != size for one in hashes):
        raise LookupServiceError("block hashes must all have the same length")
    return {"size": size, "hashes": base64.b64encode(b"".join(hashes)).decode()}


def unpack_hashes(message: dict[str, Any]) -> list[bytes]:
    """Undo `pack_hashes`.

    Raises
    ------
    LookupServiceError
        If the values are not what `pack_hashes` gives.
    """
    size, packed = message.get("size"), message.get("hashes")
    if type(size) is not int or not 0 < size <= _MAX_HASH_BYTES or not isinstance(packed, str):
        raise LookupServiceError("a lookup message has no sound block hashes")
    try:
        joined = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise LookupServiceError(f"block hashes are not base64: {error}") from error
    if len(joined) % size:
        raise LookupServiceError(f"{len(joined)} bytes are no whole number of {size}-byte hashes")
    return [joined[start : start + size] for start in range(0, len(joined), size)]

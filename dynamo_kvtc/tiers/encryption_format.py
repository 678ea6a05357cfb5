"""The form of an encrypted object: a header, then frames that are sealed one by one.

::

    offset  bytes
    0       4      magic "KVTE"
    4       1      version, 1
    5       3      zero
    8       8      id of the master key
    16      32     random bytes of this object (its salt)
    48             frames: 16 KiB of the plain object each (the last one what is left), then its 16-byte tag

Each object has a key of its own, derived with its random salt, so a nonce is only the frame's number and can
never be used twice with one key, whatever a restart forgets. A frame's associated data are the header, the
tier key, the plain size of the object and the frame's number: a frame cannot be moved to another place,
another object or another key, and an object cannot be cut short. Frames can be opened one by one, so ranges
can be read.

An object is stored under a key of its own, the tier key with the master key's id folded into its tenant tag
(`stored_key`). So a tier that lacks the master key does not find the object in the first place, and a plain
tier and an encrypted one never see each other's.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.errors import ObjectCorruptError
from dynamo_kvtc.tiers.base import TENANT_BYTES, TierKey, tenant_of
from dynamo_kvtc.tiers.encryption_keys import KEY_ID_BYTES, OBJECT_SALT_BYTES, KeyRing

__all__ = [
    "FRAME_BYTES",
    "HEADER_BYTES",
    "Frames",
    "header_cipher",
    "new_header",
    "open_frames",
    "seal",
    "stored_key",
]

_MAGIC = b"KVTE\x01\x00\x00\x00"

#: Bytes of the header.
HEADER_BYTES = len(_MAGIC) + KEY_ID_BYTES + OBJECT_SALT_BYTES

#: Plain bytes of a frame. Small against a layer group, large against a tag.
FRAME_BYTES = 16_384

_TAG_BYTES = 16
_SEALED_BYTES = FRAME_BYTES + _TAG_BYTES


@dataclass(frozen=True, slots=True)
class Frames:
    """A run of whole frames of an object.

    Attributes
    ----------
    plain_size : int
        Of the whole object.
    first, stop : int
        Numbers of the frames.
    """

    plain_size: int
    first: int
    stop: int

    @classmethod
    def holding(cls, plain_size: int, offset: int, nbytes: int) -> Frames:
        """Return the frames that hold a range of the plain object."""
        return cls(plain_size, offset // FRAME_BYTES, -(-(offset + nbytes) // FRAME_BYTES))

    @property
    def plain_offset(self) -> int:
        """Where the run begins in the plain object."""
        return self.first * FRAME_BYTES

    @property
    def plain_bytes(self) -> int:
        """Plain bytes of the run."""
        return min(self.stop * FRAME_BYTES, self.plain_size) - self.plain_offset

    @property
    def sealed_offset(self) -> int:
        """Where the run begins in the stored object."""
        return HEADER_BYTES + self.first * _SEALED_BYTES

    @property
    def sealed_bytes(self) -> int:
        """Stored bytes of the run."""
        return self.plain_bytes + (self.stop - self.first) * _TAG_BYTES


def sealed_size(plain_size: int) -> int:
    """Return the stored size of an object."""
    return HEADER_BYTES + plain_size + -(-plain_size // FRAME_BYTES) * _TAG_BYTES


def plain_size(sealed: int) -> int | None:
    """Return the plain size of an object by its stored size, None if no object has that size."""
    frames = -(-(sealed - HEADER_BYTES) // _SEALED_BYTES)
    size = sealed - HEADER_BYTES - frames * _TAG_BYTES
    return size if size > 0 and sealed_size(size) == sealed else None


def stored_key(key: TierKey, key_id: bytes) -> TierKey:
    """Return the key that an object sealed with a master key is stored under; its own inverse."""
    tag = int.from_bytes(key[-TENANT_BYTES:], "little") ^ int.from_bytes(key_id, "little")
    return key[:-TENANT_BYTES] + tag.to_bytes(TENANT_BYTES, "little")


def new_header(ring: KeyRing) -> bytes:
    """Return the header of a new object."""
    return _MAGIC + ring.ids[0] + secrets.token_bytes(OBJECT_SALT_BYTES)


def header_cipher(header: bytes, key: TierKey, ring: KeyRing) -> Any:
    """Return the cipher of the object with this header.

    Raises
    ------
    ObjectCorruptError
        If the header is none, or names a key that is not there: the object is a miss. Neither happens to
        objects under a `stored_key` that nobody tampered with.
    """
    if not header.startswith(_MAGIC):
        raise ObjectCorruptError(f"object {key.hex()} is not encrypted, or damaged; it is a miss")
    key_id = header[len(_MAGIC) : len(_MAGIC) + KEY_ID_BYTES]
    cipher = ring.cipher(key_id, tenant_of(key), header[len(_MAGIC) + KEY_ID_BYTES :])
    if cipher is None:
        raise ObjectCorruptError(
            f"object {key.hex()} was encrypted with a key that is not configured; it is a miss"
        )
    return cipher


def seal(cipher: Any, header: bytes, key: TierKey, plain: memoryview, into: memoryview) -> None:
    """Write a whole object, ``sealed_size(len(plain))`` bytes."""
    into[:HEADER_BYTES] = header
    offset = HEADER_BYTES
    bound = _bound(header, key, len(plain))
    for number in range(-(-len(plain) // FRAME_BYTES)):
        frame = plain[number * FRAME_BYTES : (number + 1) * FRAME_BYTES]
        sealed = cipher.encrypt(_nonce(number), frame, bound + _number(number))
        into[offset : offset + len(sealed)] = sealed
        offset += len(sealed)


def open_frames(
    cipher: Any, header: bytes, key: TierKey, frames: Frames, sealed: memoryview, skip: int, into: memoryview
) -> None:
    """Open a run of frames and write their plain bytes from `skip` on, as many as `into` takes.

    Raises
    ------
    ObjectCorruptError
        If a frame does not carry a right tag.
    """
    bound = _bound(header, key, frames.plain_size)
    written = offset = 0
    for number in range(frames.first, frames.stop):
        length = min(FRAME_BYTES, frames.plain_size - number * FRAME_BYTES) + _TAG_BYTES
        try:
            plain = cipher.decrypt(_nonce(number), sealed[offset : offset + length], bound + _number(number))
        except Exception as error:  # cryptography's InvalidTag, which is imported lazily
            raise ObjectCorruptError(
                f"frame {number} of object {key.hex()} does not authenticate; the object is a miss"
            ) from error
        offset += length
        part = memoryview(plain)[skip:][: len(into) - written]
        skip = 0
        into[written : written + len(part)] = part
        written += len(part)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _number(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _bound(header: bytes, key: TierKey, plain: int) -> bytes:
    return header + key + plain.to_bytes(8, "little")

"""What the object tier stores: the name of an object in the bucket, and the bytes in front of its own.

The name is the bucket prefix and the key in hexadecimal, with its first two digits as a folder. The object
is a header of `HEADER_BYTES` and then the tier object's bytes. The header, little-endian: magic
``KVTCOBJ1``, u32 version (1), u32 zero, 32 bytes key, u64 XXH3-64 of the object's bytes, u64 XXH3-64 of the
header before it.

Size and existence come from the bucket; the header is read with whole objects only, and makes damage
visible to whoever copies an object without decoding it.
"""

from __future__ import annotations

import re
import struct

import xxhash

from dynamo_kvtc.errors import ObjectCorruptError
from dynamo_kvtc.tiers.base import KEY_BYTES, TierKey

__all__ = ["HEADER_BYTES", "key_of", "object_name", "pack_object", "unpack_object"]

#: Bytes in front of an object's own.
HEADER_BYTES = 64

_VERSION = 1
_MAGIC = b"KVTCOBJ1"
_FIELDS = struct.Struct(f"<8sII{KEY_BYTES}sQ")
_CHECKSUM = struct.Struct("<Q")
_NAME = re.compile(rf"([0-9a-f]{{2}})/([0-9a-f]{{{2 * KEY_BYTES - 2}}})")


def object_name(key: TierKey) -> str:
    """Return an object's name below the bucket prefix."""
    digits = key.hex()
    return f"{digits[:2]}/{digits[2:]}"


def key_of(name: str) -> TierKey | None:
    """Return the key that a name below the prefix stands for, or None if it is no object of ours."""
    match = _NAME.fullmatch(name)
    return None if match is None else bytes.fromhex(match[1] + match[2])


def pack_object(key: TierKey, data: memoryview) -> bytes:
    """Return what is stored: the header and a copy of the object's bytes."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, 0, key, xxhash.xxh3_64_intdigest(data))
    header = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
    return b"".join((header, data))


def unpack_object(key: TierKey, stored: memoryview, into: memoryview) -> None:
    """Verify a whole stored object and copy its bytes.

    Raises
    ------
    ObjectCorruptError
        If it is not what was stored under this key, of this size.
    """
    fields, data = stored[: _FIELDS.size], stored[HEADER_BYTES:]
    if len(data) != len(into):
        raise ObjectCorruptError(f"object {key.hex()} has {len(data)} bytes instead of {len(into)}")
    (checksum,) = _CHECKSUM.unpack_from(stored, _FIELDS.size)
    magic, version, reserved, found, digest = _FIELDS.unpack(fields)
    if (magic, version, reserved, found) != (_MAGIC, _VERSION, 0, bytes(key)) or (
        checksum != xxhash.xxh3_64_intdigest(fields)
    ):
        raise ObjectCorruptError(f"object {key.hex()} has a damaged header, or is another object")
    if digest != xxhash.xxh3_64_intdigest(data):
        raise ObjectCorruptError(f"object {key.hex()} fails its checksum")
    into[:] = data

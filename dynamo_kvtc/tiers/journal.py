"""The journal of a writer: which objects its segments hold, for others to follow.

A journal is a hint, not the truth: the segments are (`disk_format`). It is written anew whenever its folder
is opened, so nothing of it needs to survive a crash, and whoever follows it checks what it reads.

The file ``journal`` holds a header of 64 bytes (magic ``KVTCJRN1``, u32 version (1), u32 zero, 16 random
bytes, u64 checksum of all before, zeros) and entries of 80 bytes, appended one by one: u32 kind (1 stored, 2
gone), u32 zero, u64 segment, u64 offset, u64 size, u64 checksum of the object, 32 bytes key, u64 checksum of
the entry before it, seeded with the first 8 random bytes. Integers are little-endian, checksums are XXH3-64.
When most entries are out of date the file is replaced by one with another 16 random bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import struct
from collections.abc import Iterable
from pathlib import Path

import xxhash

from dynamo_kvtc.tiers.base import KEY_BYTES, TierKey
from dynamo_kvtc.tiers.index import Location

__all__ = ["JOURNAL_NAME", "JournalReader", "JournalWriter"]

_log = logging.getLogger(__name__)

JOURNAL_NAME = "journal"

_VERSION = 1
_HEADER = struct.Struct("<8sII16s")
_HEADER_BYTES = 64
_MAGIC = b"KVTCJRN1"
_ENTRY = struct.Struct(f"<IIQQQQ{KEY_BYTES}s")
_CHECKSUM = struct.Struct("<Q")
_ENTRY_BYTES = _ENTRY.size + _CHECKSUM.size
_STORED, _GONE = 1, 2

# A journal is written anew once it has this many entries more than twice the objects that it lists.
_SLACK_ENTRIES = 4096

# Bytes that a reader takes at a time.
_PIECE_BYTES = _ENTRY_BYTES * 4096

_NOWHERE = Location(0, 0, 0)


class JournalWriter:
    """Writes the journal of a folder that this process holds the lock of. Every call blocks.

    A full disk does not keep it from its work: what cannot be written is told later, when the file is written
    anew; others find out by looking at what they read.
    """

    def __init__(self, folder: Path, objects: Iterable[tuple[TierKey, Location]]) -> None:
        self._path = folder / JOURNAL_NAME
        self._live = dict(objects)
        self._fd = -1
        self._broken = False
        self._begin()

    def stored(self, key: TierKey, location: Location) -> None:
        """Tell that an object is stored."""
        self._live[key] = location
        self._append(_STORED, key, location)

    def gone(self, key: TierKey) -> None:
        """Tell that an object is to be used no more."""
        self._live.pop(key, None)
        self._append(_GONE, key, _NOWHERE)

    def close(self) -> None:
        """Close the file; it stays, and what it says stays true as long as nobody opens the folder."""
        os.close(self._fd)

    def _append(self, kind: int, key: TierKey, location: Location) -> None:
        entry = _entry(self._seed, kind, key, location)
        try:
            if self._broken or self._entries > 2 * len(self._live) + _SLACK_ENTRIES:
                self._begin()
            elif os.write(self._fd, entry) < len(entry):
                raise OSError(errno.ENOSPC, "an entry was written in part")
            self._entries += 1
            self._broken = False
        except OSError as error:
            self._broken = True
            _log.warning("cannot write %s: %s; others will hear of it later", self._path, error)

    def _begin(self) -> None:
        nonce = secrets.token_bytes(16)
        self._seed = int.from_bytes(nonce[:8], "little")
        header = _HEADER.pack(_MAGIC, _VERSION, 0, nonce)
        header += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))
        entries = [_entry(self._seed, _STORED, key, location) for key, location in self._live.items()]
        self._entries = len(entries)
        # Readers see the old file or the new one, never a part.
        new = self._path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(header.ljust(_HEADER_BYTES, b"\0"))
                file.writelines(entries)
            new.replace(self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd


def _entry(seed: int, kind: int, key: TierKey, location: Location) -> bytes:
    packed = _ENTRY.pack(kind, 0, location.segment, location.offset, location.nbytes, location.checksum, key)
    return packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed, seed=seed))


class JournalReader:
    """Follows the journal of another worker. `poll` blocks; `objects` may be read meanwhile.

    Attributes
    ----------
    objects : dict[TierKey, Location]
        What the writer has told. Filled by whoever polls, one dict operation at a time, each of which is
        atomic.
    generation : int
        Changes when the journal was written anew.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._header = b""
        self._position = 0
        self._seed = 0
        self.objects: dict[TierKey, Location] = {}
        self.generation = 0

    def poll(self) -> None:
        """Take in what has been appended since the last time.

        Raises
        ------
        OSError
            If the journal is gone or cannot be read.
        """
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not self._begin(os.pread(fd, _HEADER_BYTES, 0)):
                return
            while self._take_in(os.pread(fd, _PIECE_BYTES, self._position)):
                pass
        finally:
            os.close(fd)

    def _begin(self, raw: bytes) -> bool:
        """Start over if this is the header of another journal than before; False if it is none."""
        if raw and raw == self._header:
            return True
        if len(raw) < _HEADER_BYTES:
            return False
        magic, version, _, nonce = _HEADER.unpack_from(raw)
        (checksum,) = _CHECKSUM.unpack_from(raw, _HEADER.size)
        digest = xxhash.xxh3_64_intdigest(raw[: _HEADER.size])
        if magic != _MAGIC or version != _VERSION or checksum != digest:
            return False
        self._header, self._position = raw, _HEADER_BYTES
        self._seed = int.from_bytes(nonce[:8], "little")
        # Emptied rather than exchanged: who reads at the moment sees fewer objects, never wrong ones.
        self.objects.clear()
        self.generation += 1
        return True

    def _take_in(self, data: bytes) -> bool:
        """Apply whole entries; returns whether there may be more."""
        entries = len(data) // _ENTRY_BYTES
        for index in range(entries):
            raw = data[index * _ENTRY_BYTES : (index + 1) * _ENTRY_BYTES]
            (digest,) = _CHECKSUM.unpack_from(raw, _ENTRY.size)
            if digest != xxhash.xxh3_64_intdigest(raw[: _ENTRY.size], seed=self._seed):
                if index == entries - 1:
                    return False  # perhaps it is being written: looked at again next time
            else:
                kind, _, segment, offset, nbytes, checksum, key = _ENTRY.unpack_from(raw)
                if kind == _STORED:
                    self.objects[key] = Location(segment, offset, nbytes, checksum)
                else:
                    self.objects.pop(key, None)
            self._position += _ENTRY_BYTES
        return len(data) == _PIECE_BYTES

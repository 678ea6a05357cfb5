"""Entropy coders: the last, lossless step between a chunk's plain bytes and its stored bytes.

Each chunk of a stream names its coder by id, so coders may be mixed and added. Three are part of the
format (`docs/bitstream.md`): store, DEFLATE and rANS. Third parties add theirs through the entry-point group
`ENTRY_POINT_GROUP`; an entry point loads to a callable without arguments that returns an
`EntropyCoder` with an id in `THIRD_PARTY_IDS`. Two coders may share an id only if each decodes
everything that the other encodes.

Coders are thread-safe, keep no state between calls, and release the GIL while they work.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from itertools import accumulate, groupby

import numpy as np
from isal import isal_zlib

from dynamo_kvtc.codec.entropy_base import (
    DEFLATE,
    MAX_CHUNK_BYTES,
    MAX_DEFLATE_CHUNK_BYTES,
    MAX_RANS_CHUNK_BYTES,
    RANS,
    STORE,
    THIRD_PARTY_IDS,
    Buffer,
    EntropyCoder,
)
from dynamo_kvtc.codec.rans import RansCoder
from dynamo_kvtc.errors import EntropyDecodeError, UnknownCoderError

__all__ = [
    "DEFLATE",
    "ENTRY_POINT_GROUP",
    "MAX_CHUNK_BYTES",
    "MAX_DEFLATE_CHUNK_BYTES",
    "MAX_RANS_CHUNK_BYTES",
    "RANS",
    "STORE",
    "THIRD_PARTY_IDS",
    "Buffer",
    "DeflateCoder",
    "EntropyCoder",
    "HuffmanCoder",
    "RansCoder",
    "StoreCoder",
    "batch_of",
    "find_coder",
    "register_coder",
]

_log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "dynamo_kvtc.entropy_coders"

# zlib's way to ask for raw DEFLATE with a window of 2**15, the largest, or 2**9 bytes.
_RAW_WINDOW_MAX = -15
_RAW_WINDOW_MIN = -9

# zlib's largest memory level: a Huffman code for up to 32,768 symbols.
_MEM_LEVEL_MAX = 9

# Share of zero bytes from which on shortening their runs gains more than it costs.
_MANY_ZEROS = 0.8


class StoreCoder(EntropyCoder):
    """Plain bytes as they are."""

    coder_id = STORE
    name = "store"

    def encode(self, plain: Buffer) -> bytes:
        """Return `plain` as bytes."""
        self._check_plain(plain)
        return bytes(plain)

    def decode(self, data: Buffer, plain_size: int) -> bytes:
        """Return `data` as bytes once its length is checked."""
        if len(data) != plain_size:
            raise EntropyDecodeError(
                f"a stored chunk has {len(data)} bytes where the table says {plain_size}"
            )
        return bytes(data)

    def max_encoded_size(self, plain_size: int) -> int:
        """Return `plain_size`."""
        return plain_size


class DeflateCoder(EntropyCoder):
    """Raw DEFLATE (RFC 1951), readable by zlib, ISA-L and nvCOMP alike.

    Encodes with ISA-L at level 1 and the smallest window. On payloads of a real model (135M parameters, plans
    of nominal 8x, 16x and 32x by dynamic programming, blocks of 256 tokens) this gained 1.43x, 1.14x and
    1.15x, where the order-0 entropy of the bytes would allow 1.35x, 1.15x and 1.15x: runs of zeros, which
    groups of one component leave, take less than their entropy. Huffman codes alone gained 1.39x, 1.14x and
    1.15x at 0.25 to 0.4 of the speed; with 64 tokens a block they lose another 6 % at 8x. zlib's level 6
    gained as much as ISA-L at a tenth of its speed; larger windows only cost time.
    """

    coder_id = DEFLATE
    name = "deflate"
    max_plain_size = MAX_DEFLATE_CHUNK_BYTES

    def encode(self, plain: Buffer) -> bytes:
        """Encode one chunk; deterministic on one machine."""
        self._check_plain(plain)
        deflate = isal_zlib.compressobj(level=1, wbits=_RAW_WINDOW_MIN)
        return bytes(deflate.compress(plain) + deflate.flush())

    def decode(self, data: Buffer, plain_size: int) -> bytes:
        """Inflate with ISA-L, never beyond one byte more than `plain_size`."""
        inflate = isal_zlib.decompressobj(wbits=_RAW_WINDOW_MAX)
        try:
            # One byte of room beyond the end, so that too long a stream shows and a limit of 0, which
            # would mean "no limit", cannot occur.
            plain: bytes = inflate.decompress(data, plain_size + 1)
        except isal_zlib.IsalError as error:  # type: ignore[misc]  # its stub declares an instance
            raise EntropyDecodeError(f"a chunk is not valid DEFLATE ({error}); drop the stream") from error
        if not inflate.eof or inflate.unused_data or len(plain) != plain_size:
            raise EntropyDecodeError(
                f"a DEFLATE chunk does not end after the {plain_size} bytes it must have; drop the stream"
            )
        return plain

    def max_encoded_size(self, plain_size: int) -> int:
        """Return the plain size plus the worst case of one block's Huffman tables and 9-bit literals."""
        return plain_size + plain_size // 8 + 64


class HuffmanCoder(DeflateCoder):
    """DEFLATE for symbols of the rd profile: Huffman codes of their own for each run, no search.

    On symbols of a real model (135M parameters, 40x to 170x, blocks of 256 tokens), with runs of even length,
    chunks are 4.7 to 7.3 % larger than the order-0 entropy of the components; ISA-L's level 1 makes them 18
    to 25 % larger, zlib's level 6 22 to 28 %, one Huffman code a chunk 9 to 20 % (`docs/science.md`).
    Repetitions are looked for only where nearly all bytes are zero, and then only runs. `DeflateCoder`
    decodes the chunks.
    """

    name = "deflate (Huffman codes)"

    def encode(self, plain: Buffer) -> bytes:
        """Encode one chunk as one run."""
        return self.encode_runs(plain, (len(plain),))

    def encode_runs(self, plain: Buffer, runs: Sequence[int]) -> bytes:
        """Encode one chunk; a DEFLATE block ends with each run."""
        self._check_plain(plain)
        view, stops = memoryview(plain), list(accumulate(runs))
        pieces = [view[stop - size : stop] for size, stop in zip(runs, stops, strict=True)]
        groups = [(strategy, list(alike)) for strategy, alike in groupby(pieces, key=_strategy)]
        coded: list[bytes] = []
        for index, (strategy, alike) in enumerate(groups):
            deflate = zlib.compressobj(1, zlib.DEFLATED, _RAW_WINDOW_MAX, _MEM_LEVEL_MAX, strategy)
            for piece in alike[:-1]:
                coded += [deflate.compress(piece), deflate.flush(zlib.Z_BLOCK)]
            # Strategies cannot change within a stream of zlib's; ended at a byte, streams can be joined.
            last = zlib.Z_FINISH if index == len(groups) - 1 else zlib.Z_SYNC_FLUSH
            coded += [deflate.compress(alike[-1]), deflate.flush(last)]
        return b"".join(coded)


def _strategy(plain: memoryview) -> int:
    others = np.count_nonzero(np.frombuffer(plain, dtype=np.uint8))
    return zlib.Z_RLE if len(plain) - others > _MANY_ZEROS * len(plain) else zlib.Z_HUFFMAN_ONLY


_lock = threading.Lock()
_own = (StoreCoder(), DeflateCoder(), RansCoder())
_coders: dict[int, EntropyCoder] = {coder.coder_id: coder for coder in _own}
_entry_points_loaded = False


def register_coder(coder: EntropyCoder) -> None:
    """Make a third party's coder known to every decoder in this process.

    Raises
    ------
    ValueError
        If the id lies outside `THIRD_PARTY_IDS`, is taken by another class, or the coder's chunks would
        be larger than the format allows.
    """
    if coder.coder_id not in THIRD_PARTY_IDS:
        raise ValueError(
            f"entropy coder {coder.name!r} has id {coder.coder_id}; use one of "
            f"{THIRD_PARTY_IDS.start} to {THIRD_PARTY_IDS.stop - 1}"
        )
    if not 0 < coder.max_plain_size <= MAX_CHUNK_BYTES:
        raise ValueError(f"entropy coder {coder.name!r} must take chunks of 1 to {MAX_CHUNK_BYTES} bytes")
    with _lock:
        known = _coders.setdefault(coder.coder_id, coder)
    if type(known) is not type(coder):
        raise ValueError(f"entropy coder id {coder.coder_id} of {coder.name!r} is taken by {known.name!r}")


def find_coder(coder_id: int) -> EntropyCoder:
    """Return the coder with this id; an unknown id loads the installed third-party coders once.

    Raises
    ------
    UnknownCoderError
        If neither this package nor any installed one provides the coder.
    """
    coder = _coders.get(coder_id)
    if coder is None:
        _load_entry_points()
        coder = _coders.get(coder_id)
    if coder is None:
        raise UnknownCoderError(
            f"no entropy coder has id {coder_id}; install the package that provides it "
            f"(entry-point group {ENTRY_POINT_GROUP})"
        )
    return coder


def batch_of(coder_id: int) -> int:
    """Return how many chunks this coder decodes in one call; 1 if it is not known (yet)."""
    coder = _coders.get(coder_id)
    return coder.batch if coder else 1


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            register_coder(entry.load()())
        except Exception:
            # A broken plug-in must not take down streams that do not need it.
            _log.exception("entropy coder %r (%s) cannot be loaded", entry.name, entry.value)
    _entry_points_loaded = True

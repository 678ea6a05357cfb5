"""What an entropy coder is, and the ids and limits that the stream format gives coders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from dynamo_kvtc.errors import SizeLimitError

__all__ = [
    "DEFLATE",
    "MAX_CHUNK_BYTES",
    "MAX_DEFLATE_CHUNK_BYTES",
    "MAX_RANS_CHUNK_BYTES",
    "RANS",
    "STORE",
    "THIRD_PARTY_IDS",
    "Buffer",
    "EntropyCoder",
]

#: Coder id of plain bytes.
STORE = 0

#: Coder id of raw DEFLATE (RFC 1951), the interchange coder.
DEFLATE = 1

#: Coder id of order-0 rANS in 32 lanes (`dynamo_kvtc.codec.rans`).
RANS = 2

#: Plain bytes that a chunk of any coder may hold.
MAX_CHUNK_BYTES = 16 * 1024 * 1024

#: Plain bytes that a DEFLATE chunk may hold: what GPU decoders take as one unit of work.
MAX_DEFLATE_CHUNK_BYTES = 64 * 1024

#: Plain bytes that a rANS chunk may hold, for the same reason.
MAX_RANS_CHUNK_BYTES = 64 * 1024

#: Ids that coders outside this package may use; lower ones belong to the specification.
THIRD_PARTY_IDS = range(128, 256)

#: Bytes of any kind, contiguous.
Buffer = bytes | bytearray | memoryview


class EntropyCoder(ABC):
    """Turns a chunk's plain bytes into fewer bytes and back.

    Attributes
    ----------
    coder_id : int
        Id in the chunk table, 0 to 255.
    name : str
        Name for people: in reports and messages.
    max_plain_size : int
        Bytes that one chunk may hold, at most `MAX_CHUNK_BYTES`.
    batch : int
        Chunks that are best encoded or decoded in one call. With 1, callers give each chunk to a thread.
    """

    coder_id: int
    name: str
    max_plain_size: int = MAX_CHUNK_BYTES
    batch: int = 1

    @abstractmethod
    def encode(self, plain: Buffer) -> bytes:
        """Encode one chunk; deterministic.

        Raises
        ------
        SizeLimitError
            If `plain` is longer than `max_plain_size`.
        """

    def encode_runs(self, plain: Buffer, runs: Sequence[int]) -> bytes:
        """Encode one chunk of several runs of alike statistics; by default as if it were one run.

        Parameters
        ----------
        runs : Sequence[int]
            Sizes of the runs in bytes, at least one; their sum is the size of `plain`.
        """
        return self.encode(plain)

    def encode_many(self, chunks: Sequence[tuple[Buffer, Sequence[int]]]) -> list[bytes]:
        """Encode chunks, each with its runs as `encode_runs` takes them; what comes out is the same."""
        return [self.encode_runs(plain, runs) for plain, runs in chunks]

    @abstractmethod
    def decode(self, data: Buffer, plain_size: int) -> bytes:
        """Decode one chunk, allocating little more than `plain_size` bytes whatever `data` holds.

        Raises
        ------
        EntropyDecodeError
            If `data` is not a stream of this coder, or decodes to other than `plain_size` bytes.
        """

    def decode_many(self, chunks: Sequence[tuple[Buffer, int]]) -> list[bytes]:
        """Decode chunks, each to its plain size; what comes out is the same as of `decode`.

        Raises
        ------
        EntropyDecodeError
            If one of them cannot be decoded.
        """
        return [self.decode(data, plain_size) for data, plain_size in chunks]

    @abstractmethod
    def max_encoded_size(self, plain_size: int) -> int:
        """Return an upper bound of the bytes that `encode` returns for `plain_size` bytes."""

    def _check_plain(self, plain: Buffer) -> None:
        if len(plain) > self.max_plain_size:
            raise SizeLimitError(
                f"a {self.name} chunk holds at most {self.max_plain_size} bytes, not {len(plain)}; "
                f"cut the payload into more chunks"
            )

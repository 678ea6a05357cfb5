"""What vLLM's keys say about a chunk."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from vllm.v1.kv_offload.base import OffloadKey, ReqContext

__all__ = ["KeyReader"]

_log = logging.getLogger(__name__)

#: Bytes of an `OffloadKey`: a SHA-256 block hash and the number of the cache group.
_KEY_BYTES = 36


class KeyReader:
    """Finds out where in its sequence a chunk lies; never guesses.

    Parameters
    ----------
    chunk_tokens : int
        Tokens of a chunk.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._warned = False

    def index(self, key: OffloadKey, req_context: ReqContext) -> int | None:
        """Return which chunk of its sequence a key names, or None if that is not certain."""
        if len(key) != _KEY_BYTES or any(key[-4:]):
            if not self._warned:
                self._warned = True
                _log.error(
                    "keys of vLLM's blocks are not SHA-256 hashes of one cache group; nothing is stored or "
                    "served. Use --prefix-caching-hash-algo sha256 or sha256_cbor"
                )
            return None
        end: int | None = req_context.get_offload_key_position(key)
        if end is None or end < self._chunk_tokens or end % self._chunk_tokens:
            return None
        return end // self._chunk_tokens - 1

    def known_tokens(self, keys: Collection[OffloadKey], req_context: ReqContext) -> int:
        """Return how long a request is at least."""
        ends: Iterable[int] = getattr(req_context, "_offload_key_positions", {}).values()
        own = (req_context.get_offload_key_position(key) or 0 for key in keys)
        return max((*ends, *own), default=0)

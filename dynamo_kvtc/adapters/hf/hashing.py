"""Sequence hashes for a host that has none of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["sequence_hashes"]


def sequence_hashes(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hash every whole block of a sequence together with all that precedes it.

    Parameters
    ----------
    token_ids : Sequence[int]
        The sequence from its first token on.
    block_size : int
        Tokens per block; a rest at the end has no hash.

    Returns
    -------
    list[bytes]
        32 bytes (BLAKE2b) per whole block; equal exactly if the two prefixes are.
    """
    ids = np.asarray(token_ids, dtype="<u4")
    parent, hashes = b"", []
    for start in range(0, len(ids) - block_size + 1, block_size):
        parent = hashlib.blake2b(parent + ids[start : start + block_size].tobytes(), digest_size=32).digest()
        hashes.append(parent)
    return hashes

"""Tiles of tokens for ternary symbols, of which five share a byte: no byte lies in two tiles.

Five divides no power of two, so tiles begin where bytes begin instead: a tile takes as many whole bytes of
the tokens that follow as fit, across tier blocks too, whose last bytes hold what is left. Tier blocks
of as many tokens as a tile has lose nothing; otherwise at most four tokens of a tile stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice

__all__ = ["TritTiles", "cut_trits"]


def cut_trits(counts: Sequence[int], block: int) -> list[tuple[int, int, int, int]]:
    """Cut the tokens of tier blocks, which lie one after the other, into tiles.

    Parameters
    ----------
    counts : Sequence[int]
        Tokens of each tier block.
    block : int
        Most tokens of a tile, at least 8; it has at most a quarter as many bytes.

    Returns
    -------
    list[tuple[int, int, int, int]]
        First token, one past the last, first byte, one past the last; bytes count through a row of all
        tier blocks.
    """
    tiles: list[tuple[int, int, int, int]] = []
    first = first_byte = stop = stop_byte = 0
    for count in counts:
        left = count
        while left:
            # What the open tile has room for: tokens, and bytes of five.
            room = min(block - (stop - first), 5 * (block // 4 - (stop_byte - first_byte)))
            taken = left if left <= room else room // 5 * 5
            if not taken:
                tiles.append((first, stop, first_byte, stop_byte))
                first, first_byte = stop, stop_byte
                continue
            stop, stop_byte, left = stop + taken, stop_byte - (-taken // 5), left - taken
    if stop > first:
        tiles.append((first, stop, first_byte, stop_byte))
    return tiles


@dataclass(frozen=True, eq=False)
class TritTiles:
    """The tiles of a batch, and what lies where in them; on the device.

    Attributes
    ----------
    table : torch.Tensor
        int32 ``[tiles, 4]``: see `cut_trits`.
    tokens : torch.Tensor
        int32 ``[tokens, 3]``: tier block, token within it, byte.
    bytes : torch.Tensor
        int32 ``[bytes, 2]``: tier block, byte within it.
    """

    table: torch.Tensor
    tokens: torch.Tensor
    bytes: torch.Tensor

    @classmethod
    def make(cls, gpu: GpuDevice, counts: Sequence[int], block: int) -> TritTiles:
        """Cut a batch's tokens and put the tables on the device."""
        sizes = torch.tensor(counts, dtype=torch.int32)
        owner, token = _places(sizes)
        byte_owner, byte = _places((sizes + 4) // 5)
        byte_first = torch.zeros_like(sizes)
        byte_first[1:] = ((sizes + 4) // 5).cumsum(0)[:-1]
        tokens = torch.stack([owner, token, byte_first[owner.long()] + token // 5], dim=1)
        table = torch.tensor(cut_trits(counts, block), dtype=torch.int32).reshape(-1, 4)
        return cls(gpu.upload(table), gpu.upload(tokens), gpu.upload(torch.stack([byte_owner, byte], dim=1)))


def _places(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each element of runs of these sizes: which run, and where in it; int32."""
    owner = torch.repeat_interleave(torch.arange(sizes.numel(), dtype=torch.int32), sizes.long())
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    return owner, torch.arange(owner.numel(), dtype=torch.int32) - starts[owner.long()]

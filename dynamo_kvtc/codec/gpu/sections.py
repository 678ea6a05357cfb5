"""What kernels must know of a batch of tier blocks: where each one's tokens and payload lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.trit_tiles import TritTiles
from dynamo_kvtc.codec.rd_plan import SymbolClass

__all__ = ["RowTiles", "Sections"]


@dataclass(eq=False)
class Sections:
    """One section (the keys or values of one layer group) of each tier block of a batch.

    The coded tokens of all tier blocks lie one after the other, as columns.

    Attributes
    ----------
    counts : tuple[int, ...]
        Coded tokens of each tier block, at least 1.
    offsets : tuple[int, ...]
        Where each one's payload begins (with rd: its symbols) in a buffer of bytes.
    table : torch.Tensor
        int64 ``[tier blocks, 3]`` on the device: first column, tokens, offset.
    """

    counts: tuple[int, ...]
    offsets: tuple[int, ...]
    table: torch.Tensor
    _gpu: GpuDevice
    _token_tiles: dict[int, torch.Tensor] = field(default_factory=dict)
    _trit_tiles: dict[int, TritTiles] = field(default_factory=dict)

    @classmethod
    def make(cls, gpu: GpuDevice, counts: Sequence[int], offsets: Sequence[int]) -> Sections:
        """Put the table on the device."""
        first, rows = 0, []
        for count, offset in zip(counts, offsets, strict=True):
            rows.append((first, count, offset))
            first += count
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        return cls(tuple(counts), tuple(offsets), gpu.upload(table), gpu)

    def at(self, offsets: Sequence[int]) -> Sections:
        """Return sections of the same tokens with payloads elsewhere; they share tables of tiles."""
        moved = self.make(self._gpu, self.counts, offsets)
        moved._token_tiles, moved._trit_tiles = self._token_tiles, self._trit_tiles
        return moved

    @property
    def columns(self) -> int:
        """Coded tokens of all tier blocks."""
        return sum(self.counts)

    @property
    def most_tokens(self) -> int:
        """Coded tokens of the largest tier block."""
        return max(self.counts, default=0)

    def token_tiles(self, block: int) -> torch.Tensor:
        """Return tiles of at most `block` tokens, none across tier blocks: int32 ``[tiles, 2]``.

        Each is the tier block and the first token within it.
        """
        if block not in self._token_tiles:
            tiles = [(i, first) for i, n in enumerate(self.counts) for first in range(0, n, block)]
            table = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2)
            self._token_tiles[block] = self._gpu.upload(table)
        return self._token_tiles[block]

    def trit_tiles(self, block: int) -> TritTiles:
        """Return tiles of at most `block` tokens for ternary symbols, which may cross tier blocks."""
        if block not in self._trit_tiles:
            self._trit_tiles[block] = TritTiles.make(self._gpu, self.counts, block)
        return self._trit_tiles[block]


@dataclass(frozen=True, eq=False)
class RowTiles:
    """Rows of symbols of the rd profile in tiles of one class each.

    Attributes
    ----------
    counts : tuple[int, int, int, int]
        Rows of each `SymbolClass`.
    block : int
        Rows of a tile.
    table : torch.Tensor
        int32 ``[tiles, 3]`` on the device: class, first row, one past the last.
    ternary : int
        Tiles of the last class, at the end of the table.
    """

    counts: tuple[int, ...]
    block: int
    table: torch.Tensor
    ternary: int

    @classmethod
    def make(cls, gpu: GpuDevice, counts: tuple[int, ...], block: int) -> RowTiles:
        """Cut the classes into tiles and put the table on the device."""
        chosen = gpu.tile(max(counts, default=0), block)
        tiles, start = [], 0
        for kind, count in enumerate(counts):
            stop = start + count
            tiles += [(kind, first, min(first + chosen, stop)) for first in range(start, stop, chosen)]
            start = stop
        table = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 3)
        ternary = -(-counts[SymbolClass.TRIT] // chosen)
        return cls(counts, chosen, gpu.upload(table), ternary)

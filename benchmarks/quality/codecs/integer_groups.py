"""Integers in groups, as KIVI: keys per channel over tokens, values per token over channels.

Keys have few channels of large magnitude, so a scale per channel fits them; values have none. Each group
carries a scale and a zero point of 16 bits, both counted: ``scale = (max - min) / (2^bits - 1)``, ``zero =
min``. Keys are quantised with RoPE applied. The last group of tokens is shorter where the group size does
not divide the tokens.

Liu et al., "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", ICML 2024, arXiv 2402.02750:
groups of 32 and a full-precision window of the 128 most recent tokens.
"""

from __future__ import annotations

import torch

from benchmarks.quality.codecs.base import BaselineCodec, StoredKv

__all__ = ["GROUP_SIZES", "IntegerGroupsCodec"]

#: Group sizes that are evaluated: the published one, and the larger one that is also in use.
GROUP_SIZES = (32, 64)

#: Bytes of a group's scale and zero point.
_SIDE_BYTES = 4


class IntegerGroupsCodec(BaselineCodec):
    """Asymmetric integers in groups.

    Parameters
    ----------
    family : str
        Name in the registry.
    bits : int
        Bits of a number.
    group_size : int
        Tokens of a group of keys, channels of a group of values.
    """

    def __init__(self, family: str, bits: int, group_size: int) -> None:
        self.family = family
        self.setting = f"groups of {group_size}"
        self._bits = bits
        self._group_size = group_size

    def store_tokens(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> StoredKv:
        """Encode tokens behind the sinks; see `BaselineCodec.store_tokens`."""
        channels, key_bytes = self._round_trip(keys.movedim(0, -1))
        tokens, value_bytes = self._round_trip(values)
        return StoredKv(channels.movedim(-1, 0), tokens, key_bytes + value_bytes)

    def _round_trip(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Quantise runs of the last dimension; return what they decode to, and the bytes."""
        pieces = torch.split(x, self._group_size, dim=-1)
        groups = len(pieces) * (x.numel() // x.shape[-1]) if x.numel() else 0
        stored = groups * _SIDE_BYTES + -(-x.numel() * self._bits // 8)
        return torch.cat([self._quantise(piece) for piece in pieces], dim=-1), stored

    def _quantise(self, group: torch.Tensor) -> torch.Tensor:
        low, high = group.float().aminmax(dim=-1, keepdim=True)
        levels = 2**self._bits - 1
        tiny = torch.finfo(torch.float16).smallest_normal
        scale = ((high - low) / levels).clamp(min=tiny).half().float()
        zero = low.half().float()
        symbols = ((group.float() - zero) / scale).round().clamp(0, levels)
        decoded: torch.Tensor = (symbols * scale + zero).to(group.dtype)
        return decoded

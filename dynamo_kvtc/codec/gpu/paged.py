"""One side of an engine's paged cache as kernels see it: addresses, strides, and how channels pair up.

Any layout whose layers are views ``[blocks, block_size, heads, head_size]`` of equal strides fits: vLLM's
``[2, blocks, …]`` and ``[blocks, 2, …]``, tokens or heads first, and KVBM's, with all layers in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import LayoutError

__all__ = ["PagedSide", "channel_pairs", "to_pairs"]


def channel_pairs(rope: RopeParameters, head_size: int) -> torch.Tensor:
    """Return the channels of a head in pairs: int32 ``[2, head_size / 2]``.

    Rotated pairs come first, as `RopeParameters.style` has them; channels that are not rotated are paired
    as they come, for a rotation by zero.

    Raises
    ------
    LayoutError
        If the head size is odd.
    """
    if head_size % 2:
        raise LayoutError(f"heads of {head_size} channels: the GPU codec needs an even number; use the CPU's")
    r = rope.rotary_dim
    rest = torch.arange(r, head_size, dtype=torch.int32).view(-1, 2).t()
    rotated = torch.arange(r, dtype=torch.int32)
    pairs = rotated.view(2, -1) if rope.style == "half" else rotated.view(-1, 2).t()
    return torch.cat([pairs, rest], dim=1).contiguous()


def to_pairs(rows: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return rows ``[..., heads * head_size]`` with each head's channels in pair order."""
    head_size = pairs.numel()
    order = pairs.flatten().long()
    heads = rows.reshape(*rows.shape[:-1], rows.shape[-1] // head_size, head_size)
    return heads.index_select(-1, order).flatten(-2).contiguous()


@dataclass(frozen=True, eq=False)
class PagedSide:
    """Keys or values of some layers in a paged cache.

    Attributes
    ----------
    addresses : torch.Tensor
        int64 ``[layers]`` on the device: address of each layer's view.
    channels : torch.Tensor
        int32 ``[2, head_size / 2]`` on the device: `channel_pairs`.
    strides : tuple[int, int, int, int]
        In elements, of blocks, tokens in a block, heads and channels; the same in every layer.
    vector : bool
        Whether a head's channels are contiguous, in pair order, and begin at multiples of 16 bytes: kernels
        then move 16 bytes at a time.
    block_size, num_heads, head_size : int
        Tokens in a block, KV heads, channels.
    dtype : torch.dtype
        dtype of the cache.
    """

    addresses: torch.Tensor
    channels: torch.Tensor
    strides: tuple[int, int, int, int]
    vector: bool
    block_size: int
    num_heads: int
    head_size: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, views: Sequence[torch.Tensor], channels: torch.Tensor, *, in_order: bool = False
    ) -> PagedSide:
        """Describe views ``[blocks, block_size, heads, head_size]``, one per layer.

        Parameters
        ----------
        in_order : bool
            Whether `channels` are 0, 1, 2, …

        Raises
        ------
        LayoutError
            If the layers' strides differ: one kernel serves them all.
        """
        first = views[0]
        strides = first.stride()
        if any(view.stride() != strides for view in views):
            raise LayoutError("the layers of the paged cache have different strides; use one layout for all")
        places = [view.data_ptr() for view in views]
        steps = [*places, *(stride * first.element_size() for stride in strides[:3])]
        half_bytes = int(first.shape[3]) // 2 * first.element_size()
        return cls(
            torch.tensor(places, dtype=torch.int64).to(first.device),
            channels,
            (strides[0], strides[1], strides[2], strides[3]),
            in_order and strides[3] == 1 and all(step % 16 == 0 for step in [*steps, half_bytes]),
            int(first.shape[1]),
            int(first.shape[2]),
            int(first.shape[3]),
            first.dtype,
        )

    def layers(self, start: int, stop: int) -> PagedSide:
        """Return some of the layers."""
        return replace(self, addresses=self.addresses[start:stop])

    @property
    def triton_dtype(self) -> Any:
        """The cache's dtype by Triton's name."""
        import triton.language as tl  # late: sizes are known without Triton

        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[self.dtype]

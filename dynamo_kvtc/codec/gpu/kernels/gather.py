"""Paged cache to centred rows: one side of one layer group, RoPE off the keys, mean subtracted.

CPU reference: `RopeParameters.rotate` with `RopeParameters.inverse`, then `SideTransform.forward` up to its
product, and the sums of `importance.predict_levels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.addressing import channel_offsets, layer_pointer
from dynamo_kvtc.codec.gpu.kernels.rounding import to_bfloat16
from dynamo_kvtc.codec.gpu.paged import PagedSide

__all__ = ["gather_rows"]

_BLOCK_T = 32


@triton.jit
def _gather_kernel(
    addresses,  # int64 [layers of the group]: where each layer's view begins
    slots,  # int64 [tokens]: block * BLOCK_SIZE + token within the block
    owners,  # int32 [tokens]: tier block of the batch
    channels,  # int32 [2, HALF]: channels of the first and second members of the pairs
    cos,  # float32 [tokens, HALF]
    sin,
    mean,  # float32 [layers, HEADS, 2, HALF]
    weights,  # float32, as mean: importance
    rows,  # bfloat16 [tokens, layers, HEADS, 2, HALF]
    partials,  # float32 [tokens, layers * HEADS]
    status,  # int32 [tier blocks]
    num_tokens,
    num_layers,
    stride_block,
    stride_token,
    stride_head,
    stride_channel,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    VECTOR: tl.constexpr,
    ROTATE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
):
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    first_channel, second_channel = channel_offsets(channels, stride_channel, HALF, BLOCK_HALF, VECTOR)
    heads = num_layers * HEADS
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T) * heads, tl.num_programs(0)):
        head = tile % heads
        token = tile // heads * BLOCK_T + tl.arange(0, BLOCK_T)
        in_tokens = token < num_tokens
        mask = in_tokens[:, None] & in_half[None, :]
        slot = tl.load(slots + token, mask=in_tokens, other=0)
        base = layer_pointer(addresses + head // HEADS, DTYPE, VECTOR)
        offset = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
        source = base + head % HEADS * stride_head + offset[:, None]
        x = tl.load(source + first_channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(source + second_channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if ROTATE:
            angle = token[:, None] * HALF + half[None, :]
            c = tl.load(cos + angle, mask=mask, other=1.0)
            s = tl.load(sin + angle, mask=mask, other=0.0)
            turned = x * c - y * s
            y = y * c + x * s
            x = turned
        column = head * 2 * HALF + half
        x -= tl.load(mean + column, mask=in_half, other=0.0)[None, :]
        y -= tl.load(mean + column + HALF, mask=in_half, other=0.0)[None, :]
        # x - x is 0 for every finite number and for no other.
        sound = (x - x == 0.0) & (y - y == 0.0)
        broken = tl.max((mask & (sound == 0)).to(tl.int32), axis=1)
        owner = tl.load(owners + token, mask=in_tokens, other=0)
        tl.store(status + owner, 1, mask=in_tokens & (broken != 0))
        target = rows + token.to(tl.int64)[:, None] * (heads * 2 * HALF) + column[None, :]
        tl.store(target, to_bfloat16(x), mask=mask)
        tl.store(target + HALF, to_bfloat16(y), mask=mask)
        if IMPORTANCE:
            first = tl.load(weights + column, mask=in_half, other=0.0)
            second = tl.load(weights + column + HALF, mask=in_half, other=0.0)
            part = tl.sum(tl.where(mask, x * first[None, :] + y * second[None, :], 0.0), axis=1)
            tl.store(partials + token.to(tl.int64) * heads + head, part, mask=in_tokens)


def gather_rows(
    gpu: GpuDevice,
    side: PagedSide,
    slots: torch.Tensor,
    owners: torch.Tensor,
    status: torch.Tensor,
    mean: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    importance: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Write centred rows and return each token's importance sum.

    Parameters
    ----------
    side : PagedSide
        The layers of the group in the paged cache.
    slots, owners : torch.Tensor
        int64 and int32 ``[tokens]``: place in the cache, tier block of the batch.
    status : torch.Tensor
        int32 ``[tier blocks]``; set to 1 where a tier block holds NaN or infinity.
    mean, importance : torch.Tensor
        float32 ``[row]``, channels of each head in pair order.
    rotation : tuple of torch.Tensor, optional
        Cosines and sines of the inverse rotation, float32 ``[tokens, head_size / 2]``; None for values.
    rows : torch.Tensor
        bfloat16 ``[tokens, row]``, written.

    Returns
    -------
    torch.Tensor
        float32 ``[tokens]``, ``centred @ importance``; empty without importance.
    """
    tokens = slots.numel()
    half = side.head_size // 2
    heads = side.addresses.numel() * side.num_heads
    partials = rows.new_empty((tokens if importance is not None else 0, heads), dtype=torch.float32)
    cos, sin = (mean, mean) if rotation is None else rotation
    tiles = triton.cdiv(tokens, _BLOCK_T) * heads
    _gather_kernel[gpu.grid(tiles, gpu.STREAMING)](
        side.addresses, slots, owners, side.channels, cos, sin, mean,
        mean if importance is None else importance, rows, partials, status, tokens, side.addresses.numel(),
        *side.strides,
        DTYPE=side.triton_dtype, BLOCK_SIZE=side.block_size, HEADS=side.num_heads, HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half), BLOCK_T=_BLOCK_T, VECTOR=side.vector,
        ROTATE=rotation is not None, IMPORTANCE=importance is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return partials.sum(1)

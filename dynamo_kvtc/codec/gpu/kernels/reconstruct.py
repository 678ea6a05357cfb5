"""Coefficients to the KV of one layer, in place in the paged cache: product, mean, RoPE and scatter in one.

One product makes all channels of a head; its columns hold the first members of all rotated pairs, then the
second ones, so that the tile splits into two of equal layout and the rotation works lane by lane.

CPU reference: `SideTransform.inverse`, `RopeParameters.rotate`, `PagedKvCache.scatter_layer`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.rounding import to_cache
from dynamo_kvtc.codec.gpu.paged import PagedSide

__all__ = ["reconstruct_layer"]

_BLOCK_T, _BLOCK_K = 128, 64


@triton.jit
def _reconstruct_kernel(
    coefficients,  # bfloat16 [tokens, stored]
    weights,  # bfloat16 [stored, HEADS, 2, HALF] of this layer
    mean,  # float32 [HEADS, 2, HALF]
    cos,  # float32 [tokens, HALF]
    sin,
    slots,  # int64 [tokens]; below 0 leaves a token out
    channels,  # int32 [2, HALF]
    cache,  # this layer's view
    num_tokens,
    stored,
    stride_block,
    stride_token,
    stride_head,
    stride_channel,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROTATE: tl.constexpr,
    BF16: tl.constexpr,
    FP16: tl.constexpr,
    WIDEN: tl.constexpr,
):
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    first_channel = tl.load(channels + half, mask=in_half, other=0).to(tl.int64) * stride_channel
    second_channel = tl.load(channels + HALF + half, mask=in_half, other=0).to(tl.int64) * stride_channel
    both = tl.arange(0, 2 * BLOCK_HALF)
    in_both = both % BLOCK_HALF < HALF
    row_size = HEADS * 2 * HALF
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T) * HEADS, tl.num_programs(0)):
        head = tile % HEADS
        token = tile // HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
        in_tokens = token < num_tokens
        column = head * 2 * HALF + half
        left = coefficients + token.to(tl.int64)[:, None] * stored
        right = weights + (head * 2 * HALF + both // BLOCK_HALF * HALF + both % BLOCK_HALF)[None, :]
        total = tl.zeros((BLOCK_T, 2 * BLOCK_HALF), dtype=tl.float32)
        for start in range(0, stored, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_stored = k < stored
            c = tl.load(left + k[None, :], mask=in_tokens[:, None] & in_stored[None, :], other=0.0)
            w = tl.load(right + k[:, None] * row_size, mask=in_stored[:, None] & in_both[None, :], other=0.0)
            if WIDEN:
                c, w = c.to(tl.float32), w.to(tl.float32)
            total = tl.dot(c, w, total)
        parts = tl.permute(tl.reshape(total, (BLOCK_T, 2, BLOCK_HALF)), (0, 2, 1))
        x, y = tl.split(parts)
        x += tl.load(mean + column, mask=in_half, other=0.0)[None, :]
        y += tl.load(mean + column + HALF, mask=in_half, other=0.0)[None, :]
        mask = in_tokens[:, None] & in_half[None, :]
        if ROTATE:
            angle = token[:, None] * HALF + half[None, :]
            c = tl.load(cos + angle, mask=mask, other=1.0)
            s = tl.load(sin + angle, mask=mask, other=0.0)
            turned = x * c - y * s
            y = y * c + x * s
            x = turned
        if FP16:
            # The quantisation error of the largest float16 numbers must not turn them into infinity.
            x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
            y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
        slot = tl.load(slots + token, mask=in_tokens, other=-1)
        wanted = in_half[None, :] & (slot >= 0)[:, None]
        slot = tl.maximum(slot, 0)
        offset = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + head * stride_head
        target = cache + offset[:, None]
        tl.store(target + first_channel[None, :], to_cache(x, BF16, FP16), mask=wanted)
        tl.store(target + second_channel[None, :], to_cache(y, BF16, FP16), mask=wanted)


def reconstruct_layer(
    gpu: GpuDevice,
    coefficients: torch.Tensor,
    weights: torch.Tensor,
    mean: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    side: PagedSide,
    view: torch.Tensor,
) -> None:
    """Write the keys or values of one layer into the paged cache.

    Parameters
    ----------
    coefficients : torch.Tensor
        bfloat16 ``[tokens, stored]``.
    weights : torch.Tensor
        bfloat16 ``[stored, layer_size]`` of this layer, channels of each head in pair order.
    mean : torch.Tensor
        float32 ``[layer_size]``, likewise.
    rotation : tuple of torch.Tensor, optional
        Cosines and sines, float32 ``[tokens, head_size / 2]``; None for values.
    slots : torch.Tensor
        int64 ``[tokens]``: block * block_size + token within the block; below 0 leaves a token out.
    side, view : PagedSide, torch.Tensor
        The cache, and this layer's view ``[blocks, block_size, heads, head_size]``, written.
    """
    tokens, stored = coefficients.shape
    half = side.head_size // 2
    block_t = gpu.tile(tokens, _BLOCK_T)
    tiles = triton.cdiv(tokens, block_t) * side.num_heads
    if not tiles:
        return
    cos, sin = (mean, mean) if rotation is None else rotation
    _reconstruct_kernel[gpu.grid(tiles, gpu.MATRIX)](
        coefficients, weights, mean, cos, sin, slots, side.channels, view, tokens, stored, *side.strides,
        BLOCK_SIZE=side.block_size, HEADS=side.num_heads, HALF=half,
        BLOCK_HALF=max(16, triton.next_power_of_2(half)), BLOCK_T=block_t,
        BLOCK_K=gpu.tile(stored, _BLOCK_K), ROTATE=rotation is not None,
        BF16=side.dtype is torch.bfloat16, FP16=side.dtype is torch.float16, WIDEN=gpu.is_interpreter,
        num_warps=8, num_stages=3,
    )  # fmt: skip

"""Coefficients to the KV of some layers, in place in the paged cache: product, mean, RoPE and scatter in one.

One product makes all channels of a head; its columns hold the first members of all rotated pairs, then the
second ones, so that the tile splits into two of equal layout and the rotation works lane by lane.

CPU reference: `SideTransform.inverse`, `RopeParameters.rotate`, `PagedKvCache.scatter_layer`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.addressing import channel_offsets, layer_pointer
from dynamo_kvtc.codec.gpu.kernels.products import token_block
from dynamo_kvtc.codec.gpu.kernels.rounding import to_cache
from dynamo_kvtc.codec.gpu.paged import PagedSide
from dynamo_kvtc.codec.gpu.weights import STORED_ALIGNMENT

__all__ = ["layer_tiles", "reconstruct_layers"]

_BLOCK_K = STORED_ALIGNMENT


@triton.jit
def _reconstruct_kernel(
    coefficients,  # bfloat16 [tokens, padded]
    weights,  # bfloat16 [layers, padded, HEADS, 2, HALF]
    mean,  # float32 [layers, HEADS, 2, HALF]
    cos,  # float32 [tokens, HALF]
    sin,
    slots,  # int64 [tokens]; below 0 leaves a token out
    channels,  # int32 [2, HALF]
    addresses,  # int64 [layers]: where each layer's view begins
    num_layers,
    num_tokens,
    padded,
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
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    ROTATE: tl.constexpr,
    BF16: tl.constexpr,
    FP16: tl.constexpr,
    WIDEN: tl.constexpr,
):
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    first_channel, second_channel = channel_offsets(channels, stride_channel, HALF, BLOCK_HALF, VECTOR)
    both = tl.arange(0, 2 * BLOCK_HALF)
    in_both = both % BLOCK_HALF < HALF
    row_size = HEADS * 2 * HALF
    layer_tiles = tl.cdiv(num_tokens, BLOCK_T) * HEADS
    for tile in range(tl.program_id(0), num_layers * layer_tiles, tl.num_programs(0)):
        layer, within = tile // layer_tiles, tile % layer_tiles
        head = within % HEADS
        token = within // HEADS * BLOCK_T + tl.arange(0, BLOCK_T)
        in_tokens = token < num_tokens
        column = layer * row_size + head * 2 * HALF + half
        left = coefficients + token.to(tl.int64)[:, None] * padded
        # Fits 32 bits: `DeviceWeights` refuses more elements.
        right = weights + layer * padded * row_size
        right += (head * 2 * HALF + both // BLOCK_HALF * HALF + both % BLOCK_HALF)[None, :]
        total = tl.zeros((BLOCK_T, 2 * BLOCK_HALF), dtype=tl.float32)
        for start in range(0, padded, BLOCK_K):
            # BLOCK_K divides the padded components.
            k = start + tl.arange(0, BLOCK_K)
            c = tl.load(left + k[None, :], mask=in_tokens[:, None], other=0.0)
            if HALF == BLOCK_HALF:
                w = tl.load(right + k[:, None] * row_size)
            else:
                w = tl.load(right + k[:, None] * row_size, mask=in_both[None, :], other=0.0)
            if WIDEN:
                c, w = c.to(tl.float32), w.to(tl.float32)
            total = tl.dot(c, w, total)
        # Half of the tokens at a time, so that all that belongs to them fits the registers.
        early, late = tl.split(tl.permute(tl.reshape(total, (2, BLOCK_T // 2, 2 * BLOCK_HALF)), (1, 2, 0)))
        for part in tl.static_range(2):
            parts = tl.reshape(early if part == 0 else late, (BLOCK_T // 2, 2, BLOCK_HALF))
            x, y = tl.split(tl.permute(parts, (0, 2, 1)))
            x += tl.load(mean + column, mask=in_half, other=0.0)[None, :]
            y += tl.load(mean + column + HALF, mask=in_half, other=0.0)[None, :]
            own = within // HEADS * BLOCK_T + part * (BLOCK_T // 2) + tl.arange(0, BLOCK_T // 2)
            mask = (own < num_tokens)[:, None] & in_half[None, :]
            if ROTATE:
                angle = own[:, None] * HALF + half[None, :]
                c = tl.load(cos + angle, mask=mask, other=1.0)
                s = tl.load(sin + angle, mask=mask, other=0.0)
                turned = x * c - y * s
                y = y * c + x * s
                x = turned
            if FP16:
                # The quantisation error of the largest float16 numbers must not turn them into infinity.
                x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
                y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
            slot = tl.load(slots + own, mask=own < num_tokens, other=-1)
            wanted = in_half[None, :] & (slot >= 0)[:, None]
            slot = tl.maximum(slot, 0)
            offset = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + head * stride_head
            target = layer_pointer(addresses + layer, DTYPE, VECTOR) + offset[:, None]
            tl.store(target + first_channel[None, :], to_cache(x, BF16, FP16), mask=wanted)
            tl.store(target + second_channel[None, :], to_cache(y, BF16, FP16), mask=wanted)


def layer_tiles(gpu: GpuDevice, tokens: int, side: PagedSide) -> int:
    """Return the tiles that one layer of `tokens` tokens has."""
    return -(-tokens // _token_block(gpu, tokens, side)) * side.num_heads


def _token_block(gpu: GpuDevice, tokens: int, side: PagedSide) -> int:
    """Return the tokens of a tile; a tile of 256 tokens and heads of 256 would not fit the registers."""
    return min(token_block(gpu, tokens), 256 if side.head_size <= 128 else 128)


def reconstruct_layers(
    gpu: GpuDevice,
    coefficients: torch.Tensor,
    weights: torch.Tensor,
    mean: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    side: PagedSide,
) -> None:
    """Write the keys or values of some layers into the paged cache.

    Parameters
    ----------
    coefficients : torch.Tensor
        bfloat16 ``[tokens, padded]``.
    weights : torch.Tensor
        bfloat16 ``[layers, padded, layer_size]``, channels of each head in pair order.
    mean : torch.Tensor
        float32 ``[layers, layer_size]``, likewise.
    rotation : tuple of torch.Tensor, optional
        Cosines and sines, float32 ``[tokens, head_size / 2]``; None for values.
    slots : torch.Tensor
        int64 ``[tokens]``: block * block_size + token within the block; below 0 leaves a token out.
    side : PagedSide
        These layers of the cache, written.
    """
    tokens, padded = coefficients.shape
    half = side.head_size // 2
    block_t = _token_block(gpu, tokens, side)
    layers = side.addresses.numel()
    tiles = layers * layer_tiles(gpu, tokens, side)
    if not tiles:
        return
    cos, sin = (mean, mean) if rotation is None else rotation
    block_half, block_k = max(16, triton.next_power_of_2(half)), gpu.tile(padded, _BLOCK_K)
    _reconstruct_kernel[gpu.grid(tiles, gpu.MATRIX)](
        coefficients, weights, mean, cos, sin, slots, side.channels, side.addresses, layers, tokens, padded,
        *side.strides,
        DTYPE=side.triton_dtype, BLOCK_SIZE=side.block_size, HEADS=side.num_heads, HALF=half,
        BLOCK_HALF=block_half, BLOCK_T=block_t, BLOCK_K=block_k, VECTOR=side.vector,
        ROTATE=rotation is not None, BF16=side.dtype is torch.bfloat16, FP16=side.dtype is torch.float16,
        WIDEN=gpu.is_interpreter, num_warps=8, num_stages=gpu.stages(block_t, 2 * block_half, block_k),
    )  # fmt: skip

"""The inner loop of the projection: a tile of ``weights @ rows.T`` on tensor cores.

CPU reference: the product in `SideTransform.forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice

__all__ = ["BLOCK_K", "BLOCK_R", "product_tile", "token_block"]

#: Components and row elements of a tile. With 256 tokens a tile does 85 operations for each byte that it
#: takes out of the L2 cache, with 128 only 64, and the cache would bound the product.
BLOCK_R, BLOCK_K = 128, 64


def token_block(gpu: GpuDevice, most_tokens: int) -> int:
    """Return the tokens of a tile: not many more than there are, and 256 only if four steps can be loaded.

    Those take 192 KiB, which Hopper has; before it, 256 would spill registers in the product's loop as well.
    """
    most = 256 if gpu.shared_bytes >= 192 << 10 else 128
    return gpu.tile(most_tokens, min(most, 256 if most_tokens > 128 else 128 if most_tokens > 64 else 64))


@triton.jit
def product_tile(
    weights,  # bfloat16 [layers, padded, layer_size]
    rows,  # bfloat16 [tokens, layers * layer_size]
    component,  # int32 [BLOCK_R]
    in_rows,
    token,  # int64 [BLOCK_T]
    in_tokens,
    num_layers,
    padded,
    layer_size,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return float32 ``[BLOCK_R, BLOCK_T]``; bfloat16 operands, sums in float32.

    EVEN_K says that BLOCK_K divides `layer_size`, as it does for most models. WIDEN is for Triton's
    interpreter, whose product takes bfloat16 for integers.
    """
    total = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    row_size = num_layers * layer_size
    left = weights + component.to(tl.int64)[:, None] * layer_size
    right = rows + token[None, :] * row_size
    # Counted along, since divisions would cost as much as the rest of a step.
    layer, start = 0, 0
    for _ in range(num_layers * tl.cdiv(layer_size, BLOCK_K)):
        k = start + tl.arange(0, BLOCK_K)
        # Fits 32 bits: `DeviceWeights` refuses more elements.
        w_at, x_at = left + layer * padded * layer_size + k[None, :], right + layer * layer_size + k[:, None]
        if EVEN_K:
            w = tl.load(w_at, mask=in_rows[:, None], other=0.0)
            x = tl.load(x_at, mask=in_tokens[None, :], other=0.0)
        else:
            in_layer = k < layer_size
            w = tl.load(w_at, mask=in_rows[:, None] & in_layer[None, :], other=0.0)
            x = tl.load(x_at, mask=in_layer[:, None] & in_tokens[None, :], other=0.0)
        if WIDEN:
            w, x = w.to(tl.float32), x.to(tl.float32)
        total = tl.dot(w, x, total)
        start += BLOCK_K
        layer += (start >= layer_size).to(tl.int32)
        start = tl.where(start >= layer_size, 0, start)
    return total

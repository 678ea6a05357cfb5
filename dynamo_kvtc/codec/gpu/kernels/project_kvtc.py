"""Rows to coefficients, for the kvtc profile.

Its quantiser needs minimum, maximum and mean over groups of up to 1,024 components of one token before it
can make a single symbol: more than one tile of a product holds. So the coefficients leave this kernel in
float32, and `quantise_kvtc` quantises and packs them. CPU reference: `SideTransform.forward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.products import BLOCK_K, BLOCK_R, product_tile, token_block

__all__ = ["project_coefficients"]


@triton.jit
def _project_kernel(
    weights,
    rows,
    coefficients,  # float32 [stored, tokens]
    num_tokens,
    num_layers,
    stored,
    padded,
    layer_size,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    for tile in range(tl.program_id(0), tl.cdiv(stored, BLOCK_R) * tiles_t, tl.num_programs(0)):
        # Tiles of the same components follow each other, so their weights come from the L2 cache.
        component = tile // tiles_t * BLOCK_R + tl.arange(0, BLOCK_R)
        token = (tile % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_rows, in_tokens = component < stored, token < num_tokens
        total = product_tile(
            weights, rows, component, in_rows, token, in_tokens, num_layers, padded, layer_size,
            BLOCK_R, BLOCK_T, BLOCK_K, EVEN_K, WIDEN,
        )  # fmt: skip
        target = coefficients + component.to(tl.int64)[:, None] * num_tokens + token[None, :]
        tl.store(target, total, mask=in_rows[:, None] & in_tokens[None, :])


def project_coefficients(
    gpu: GpuDevice, weights: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor
) -> None:
    """Write ``weights @ rows.T``.

    Parameters
    ----------
    weights : torch.Tensor
        bfloat16 ``[layers, padded, layer_size]``.
    rows : torch.Tensor
        bfloat16 ``[tokens, layers * layer_size]``.
    coefficients : torch.Tensor
        float32 ``[stored, tokens]``, written.
    """
    layers, padded, layer_size = weights.shape
    stored, tokens = coefficients.shape
    block_t = token_block(gpu, tokens)
    block_r = gpu.tile(stored, BLOCK_R)
    block_k = gpu.tile(layer_size, BLOCK_K)
    tiles = triton.cdiv(stored, block_r) * triton.cdiv(tokens, block_t)
    if tiles:
        _project_kernel[gpu.grid(tiles, gpu.MATRIX)](
            weights, rows, coefficients, tokens, layers, stored, padded, layer_size,
            BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_K=block_k, EVEN_K=layer_size % block_k == 0,
            WIDEN=gpu.is_interpreter,
            num_warps=8, num_stages=gpu.stages(block_r, block_t, block_k),
        )  # fmt: skip

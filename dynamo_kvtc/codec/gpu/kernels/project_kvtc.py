"""Rows to side data and packed symbols, for the kvtc profile: product, quantiser and packing in one kernel.

A group has up to 1,024 components, and its minimum, maximum or mean must be known before its first symbol:
more than the sums that one tile of a product can hold. So a program multiplies a panel, the rows of whole
groups, tile after tile, and leaves its coefficients in float32 in memory of its own, which is small enough to
stay in the L2 cache. The epilogue reads them from there, twice.

CPU reference: `SideTransform.forward`, `PlanQuantiser.quantise`, `packing.pack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.products import BLOCK_K, BLOCK_R, product_tile, token_block
from dynamo_kvtc.codec.gpu.kernels.quantise_kvtc import quantise_units
from dynamo_kvtc.codec.gpu.kvtc_tables import UNIT_ROWS, KvtcTables
from dynamo_kvtc.codec.gpu.sections import Sections

__all__ = ["project_groups", "quantise_groups"]


@triton.jit
def _groups_kernel(
    weights,  # bfloat16 [layers, padded, layer_size], or nothing if the products are given
    rows,  # bfloat16 [tokens, row], or float32 coefficients [stored, tokens]
    panels,  # int32 [panels, 5]: bits, first unit, one past the last, first row, one past the last
    units,  # int32 [units, 4]
    token_tiles,  # int32 [token tiles, 2]
    sections,  # int64 [tier blocks, 3]
    workspace,  # float32 [programs, panel_rows, BLOCK_T]
    payload,  # uint8
    status,  # int32 [tier blocks]
    num_columns,
    num_panels,
    num_token_tiles,
    panel_rows,  # at most, a multiple of BLOCK_R
    num_layers,
    padded,
    layer_size,
    plan_groups,
    count8,
    count4,
    GIVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_T)
    own = workspace + tl.program_id(0).to(tl.int64) * panel_rows * BLOCK_T
    for tile in range(tl.program_id(0), num_panels * num_token_tiles, tl.num_programs(0)):
        # Tiles of the same components follow each other, so their weights come from the L2 cache.
        panel = panels + tile // num_token_tiles * 5
        bits, first_unit, unit_stop = tl.load(panel), tl.load(panel + 1), tl.load(panel + 2)
        first_row, row_stop = tl.load(panel + 3), tl.load(panel + 4)
        cut = token_tiles + tile % num_token_tiles * 2
        block = tl.load(cut)
        section = sections + block * 3
        num_tokens = tl.load(section + 1)
        token = tl.load(cut + 1) + lane
        column = tl.load(section) + token
        if GIVEN:
            found = rows + first_row.to(tl.int64) * num_columns + tl.min(column)
            stride = num_columns
        else:
            for start in range(first_row, row_stop, BLOCK_R):
                component = start + tl.arange(0, BLOCK_R)
                total = product_tile(
                    weights, rows, component, component < row_stop, column, token < num_tokens, num_layers,
                    padded, layer_size, BLOCK_R, BLOCK_T, BLOCK_K, EVEN_K, WIDEN,
                )  # fmt: skip
                tl.store(own + (component - first_row)[:, None] * BLOCK_T + lane[None, :], total)
            # Threads read below what others have written here.
            tl.debug_barrier()
            found = own
            stride = BLOCK_T
        out = payload + tl.load(section + 2)
        if bits == 8:
            quantise_units(
                found, stride, first_row, units, first_unit, unit_stop, token, num_tokens, out,
                status + block, plan_groups, count8, count4, 8, not GIVEN, UNIT_R, BLOCK_T,
            )  # fmt: skip
        elif bits == 4:
            quantise_units(
                found, stride, first_row, units, first_unit, unit_stop, token, num_tokens, out,
                status + block, plan_groups, count8, count4, 4, not GIVEN, UNIT_R, BLOCK_T,
            )  # fmt: skip
        else:
            quantise_units(
                found, stride, first_row, units, first_unit, unit_stop, token, num_tokens, out,
                status + block, plan_groups, count8, count4, 2, not GIVEN, UNIT_R, BLOCK_T,
            )  # fmt: skip
        if not GIVEN:
            # The next panel takes the place of this one.
            tl.debug_barrier()


def project_groups(
    gpu: GpuDevice,
    weights: torch.Tensor,
    rows: torch.Tensor,
    tables: KvtcTables,
    sections: Sections,
    payload: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Project rows, quantise and pack: write the payloads of a batch.

    Parameters
    ----------
    weights : torch.Tensor
        bfloat16 ``[layers, padded, layer_size]``, components as in `PlanQuantiser.components`.
    rows : torch.Tensor
        bfloat16 ``[tokens, layers * layer_size]``.
    tables : KvtcTables
        The plan.
    sections : Sections
        Tier blocks, and where their payloads go.
    payload : torch.Tensor
        uint8, written.
    status : torch.Tensor
        int32 ``[tier blocks]``; set to 1 where a shift or scale is no finite float16.
    """
    _launch(gpu, weights, rows, tables, sections, payload, status, tuple(weights.shape), given=False)


def quantise_groups(
    gpu: GpuDevice,
    coefficients: torch.Tensor,
    tables: KvtcTables,
    sections: Sections,
    payload: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Do what `project_groups` does after its product, from float32 coefficients ``[stored, tokens]``.

    The same epilogue, to compare with the CPU's payloads bit for bit: products of two devices differ in the
    order of their sums.
    """
    shape = (1, coefficients.shape[0], 16)
    _launch(gpu, coefficients, coefficients, tables, sections, payload, status, shape, given=True)


def _launch(
    gpu: GpuDevice,
    weights: torch.Tensor,
    rows: torch.Tensor,
    tables: KvtcTables,
    sections: Sections,
    payload: torch.Tensor,
    status: torch.Tensor,
    shape: tuple[int, ...],
    *,
    given: bool,
) -> None:
    block_t = token_block(gpu, sections.most_tokens)
    block_r = gpu.tile(tables.panel_rows, BLOCK_R)
    block_k = gpu.tile(shape[2], BLOCK_K)
    token_tiles = sections.token_tiles(block_t)
    tiles = tables.panels.shape[0] * token_tiles.shape[0]
    if not tiles:
        return
    grid = gpu.grid(tiles, gpu.MATRIX)
    panel_rows = triton.cdiv(tables.panel_rows, block_r) * block_r
    with gpu.workspace(0 if given else 4 * grid[0] * panel_rows * block_t) as workspace:
        _groups_kernel[grid](
            weights, rows, tables.panels, tables.units, token_tiles, sections.table,
            workspace.view(torch.float32), payload, status, sections.columns, tables.panels.shape[0],
            token_tiles.shape[0], panel_rows, *shape, tables.num_groups, tables.counts[0], tables.counts[1],
            GIVEN=given, BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_K=block_k, UNIT_R=UNIT_ROWS,
            EVEN_K=shape[2] % block_k == 0, WIDEN=gpu.is_interpreter,
            num_warps=8, num_stages=gpu.stages(block_r, block_t, block_k), enable_fp_fusion=False,
        )  # fmt: skip

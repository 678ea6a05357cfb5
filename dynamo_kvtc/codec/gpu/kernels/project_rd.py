"""Rows to packed symbols, for the rd profile: product, quantiser and packing in one kernel.

Quantising needs one coefficient, its row's rounding and its token's scale, so it happens in the epilogue, and
so does packing. Two tokens of NIBBLE never straddle a tile; tiles of TRIT, of which five share a byte, begin
where bytes begin (`TritTiles`, `pack_trits`). One launch has both kinds of tiles: two would leave
multiprocessors idle twice.

CPU reference: `SideTransform.forward`, `RdQuantiser.quantise`, `rd_packing.pack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.escapes import list_escapes
from dynamo_kvtc.codec.gpu.kernels.pack_trits import add_trits, store_trits
from dynamo_kvtc.codec.gpu.kernels.products import BLOCK_K, product_tile, token_block
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections

__all__ = ["project_symbols", "quantise_symbols"]


@triton.jit
def quantise_tile(total, factor, rounding, in_tile):
    """Return symbols as int32, and 1 where one is NaN, infinite or beyond int16."""
    scaled = total * factor
    magnitude = tl.floor(tl.abs(scaled) + rounding)
    # NaN fails every comparison.
    broken = in_tile & ((magnitude <= 32767.0) == 0)
    magnitude = tl.where(broken | (in_tile == 0), 0.0, magnitude)
    symbol = tl.where(scaled < 0, -magnitude, magnitude).to(tl.int32)
    return symbol, broken


@triton.jit
def store_tile(
    symbol,
    kind,
    first_row,  # of the tile, counted through all classes
    in_rows,  # [BLOCK_R]
    token,  # [BLOCK_T], within the tier block
    in_tokens,
    num_tokens,  # int64
    payload,  # where the tier block's symbols begin
    block,
    escape_counts,
    escape_indices,
    escape_values,
    capacity,
    wide,
    byte,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Store a tile of symbols of WIDE, BYTE or NIBBLE, those beyond the class clamped and listed.

    Offsets within a tile fit 32 bits, which halves the registers that they take; only its start needs 64.
    """
    in_tile = in_rows[:, None] & in_tokens[None, :]
    limit = tl.where(kind == 0, 32767, tl.where(kind == 1, 127, 7))
    clamped = tl.minimum(tl.maximum(symbol, -limit), limit)
    beyond = in_tile & (clamped != symbol)
    line = tl.arange(0, BLOCK_R)
    tokens = num_tokens.to(tl.int32)
    offset = line[:, None] * tokens + token[None, :]
    list_escapes(
        beyond, symbol, first_row + line, token, tokens, block, escape_counts, escape_indices, escape_values,
        capacity,
    )  # fmt: skip
    # Each branch has names of its own: Triton wants one type for a name.
    if kind == 0:
        low = ((clamped + 128) & 255) - 128
        high_at = payload + first_row * num_tokens
        low_at = high_at + wide * num_tokens
        tl.store(high_at + offset, (((clamped - low) >> 8) & 255).to(tl.uint8), mask=in_tile)
        tl.store(low_at + offset, (low & 255).to(tl.uint8), mask=in_tile)
    elif kind == 1:
        byte_at = payload + (first_row + wide) * num_tokens
        tl.store(byte_at + offset, (clamped & 255).to(tl.uint8), mask=in_tile)
    else:
        code = tl.where(in_tile, clamped & 15, 0)
        pairs = tl.reshape(code, (BLOCK_R, BLOCK_T // 2, 2))
        packed = tl.sum(pairs << (4 * tl.arange(0, 2))[None, None, :], axis=2)
        row_bytes = (num_tokens + 1) // 2
        # The first token of a tile is even, and so is that of its quarter.
        at = tl.min(token) // 2 + tl.arange(0, BLOCK_T // 2)
        pair_at = payload + (2 * wide + byte) * num_tokens + (first_row - wide - byte) * row_bytes
        pair_offset = line[:, None] * row_bytes.to(tl.int32) + at[None, :]
        tl.store(
            pair_at + pair_offset, packed.to(tl.uint8), mask=in_rows[:, None] & (at < row_bytes)[None, :]
        )


@triton.jit
def _symbols_kernel(
    weights,  # bfloat16 [layers, padded, layer_size], or nothing if the products are given
    rows,  # bfloat16 [tokens, row], or float32 coefficients [stored, tokens]
    factors,  # float32 [tokens]
    roundings,  # float32 [stored]
    row_tiles,  # int32 [row tiles, 3], the ternary ones last
    token_tiles,  # int32 [token tiles, 2]
    trit_tiles,  # int32 [trit tiles, 4]
    trit_tokens,  # int32 [tokens, 3]
    trit_bytes,  # int32 [bytes of a ternary row, 2]
    sections,  # int64 [tier blocks, 3]
    payload,  # uint8
    escape_counts,  # int32 [tier blocks]
    escape_indices,  # int32 [tier blocks, capacity]
    escape_values,
    status,  # int32 [tier blocks]
    num_columns,
    capacity,
    num_row_tiles,  # but ternary ones
    num_ternary_row_tiles,
    num_token_tiles,
    num_trit_tiles,
    num_layers,
    padded,
    layer_size,
    wide,
    byte,
    nibble,
    GIVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    PART: tl.constexpr = BLOCK_T // 4
    whole = num_row_tiles * num_token_tiles
    for tile in range(tl.program_id(0), whole + num_ternary_row_tiles * num_trit_tiles, tl.num_programs(0)):
        if tile < whole:
            row_tile = row_tiles + tile // num_token_tiles * 3
            cut = token_tiles + tile % num_token_tiles * 2
            own_section = sections + tl.load(cut) * 3
            start = tl.load(own_section) + tl.load(cut + 1)
            stop = tl.load(own_section) + tl.load(own_section + 1)
        else:
            row_tile = row_tiles + (num_row_tiles + (tile - whole) // num_trit_tiles) * 3
            cut = trit_tiles + (tile - whole) % num_trit_tiles * 4
            start, stop = tl.load(cut).to(tl.int64), tl.load(cut + 1).to(tl.int64)
        kind, first_row, row_stop = tl.load(row_tile), tl.load(row_tile + 1), tl.load(row_tile + 2)
        row = first_row + tl.arange(0, BLOCK_R)
        column = start + tl.arange(0, BLOCK_T)
        in_rows, in_columns = row < row_stop, column < stop
        if GIVEN:
            total = tl.load(
                rows + row.to(tl.int64)[:, None] * num_columns + column[None, :],
                mask=in_rows[:, None] & in_columns[None, :],
                other=0.0,
            )
        else:
            total = product_tile(
                weights, rows, row, in_rows, column, in_columns, num_layers, padded, layer_size,
                BLOCK_R, BLOCK_T, BLOCK_K, EVEN_K, WIDEN,
            )  # fmt: skip
        # A quarter of the tile at a time, so that its symbols and addresses fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_R, 2, BLOCK_T // 2)), (0, 2, 1)))
        rounding = tl.load(roundings + row, mask=in_rows, other=0.5)
        if kind < 3:
            block = tl.load(cut)
            section = sections + block * 3
            num_tokens = tl.load(section + 1)
            for half in tl.static_range(2):
                part = tl.reshape(left if half == 0 else right, (BLOCK_R, 2, PART))
                first, second = tl.split(tl.permute(part, (0, 2, 1)))
                for quarter in tl.static_range(2):
                    token = tl.load(cut + 1) + (2 * half + quarter) * PART + tl.arange(0, PART)
                    in_tokens = token < num_tokens
                    factor = tl.load(factors + tl.load(section) + token, mask=in_tokens, other=0.0)
                    symbol, broken = quantise_tile(
                        first if quarter == 0 else second, factor[None, :], rounding[:, None],
                        in_rows[:, None] & in_tokens[None, :],
                    )  # fmt: skip
                    tl.store(status + block, 1, mask=tl.sum(broken.to(tl.int32)) > 0)
                    store_tile(
                        symbol, kind, first_row, in_rows, token, in_tokens, num_tokens,
                        payload + tl.load(section + 2), block, escape_counts, escape_indices, escape_values,
                        capacity, wide, byte, BLOCK_R, PART,
                    )  # fmt: skip
        else:
            packed = tl.zeros((BLOCK_R, PART), dtype=tl.float32)
            for half in tl.static_range(2):
                third = tl.reshape(left if half == 0 else right, (BLOCK_R, 2, PART))
                even, odd = tl.split(tl.permute(third, (0, 2, 1)))
                for quarter in tl.static_range(2):
                    own = tl.load(cut) + (2 * half + quarter) * PART + tl.arange(0, PART)
                    in_own = own < tl.load(cut + 1)
                    owner = tl.load(trit_tokens + 3 * own, mask=in_own, other=0)
                    trit, unsound = quantise_tile(
                        even if quarter == 0 else odd,
                        tl.load(factors + own, mask=in_own, other=0.0)[None, :], rounding[:, None],
                        in_rows[:, None] & in_own[None, :],
                    )  # fmt: skip
                    tl.store(status + owner, 1, mask=tl.max(unsound.to(tl.int32), axis=0) > 0)
                    packed = add_trits(
                        packed, trit, in_rows, first_row, owner,
                        tl.load(trit_tokens + 3 * own + 1, mask=in_own, other=0),
                        tl.load(sections + 3 * owner + 1).to(tl.int32),
                        tl.load(trit_tokens + 3 * own + 2, mask=in_own, other=0) - tl.load(cut + 2), in_own,
                        escape_counts, escape_indices, escape_values, capacity, BLOCK_R, PART,
                    )  # fmt: skip
            store_trits(
                packed, in_rows, first_row - wide - byte - nibble, tl.load(cut + 2), tl.load(cut + 3),
                trit_bytes, sections, payload, wide, byte, nibble, BLOCK_R, PART,
            )  # fmt: skip


def project_symbols(
    gpu: GpuDevice,
    weights: torch.Tensor,
    rows: torch.Tensor,
    factors: torch.Tensor,
    roundings: torch.Tensor,
    tiles: RowTiles,
    sections: Sections,
    payload: torch.Tensor,
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    status: torch.Tensor,
) -> None:
    """Project rows, quantise and pack.

    Parameters
    ----------
    weights : torch.Tensor
        bfloat16 ``[layers, padded, layer_size]``.
    rows : torch.Tensor
        bfloat16 ``[tokens, layers * layer_size]``.
    factors : torch.Tensor
        float32 ``[tokens]``: scale of the token's importance over the step.
    roundings : torch.Tensor
        float32 ``[stored]``.
    tiles, sections : RowTiles, Sections
        Rows by class; tier blocks and where their symbols go in `payload`.
    payload : torch.Tensor
        uint8, written: all symbols.
    escapes : tuple of torch.Tensor
        int32 ``[tier blocks]`` counts, which begin at 0, and ``[tier blocks, capacity]`` indices and values.
    status : torch.Tensor
        int32 ``[tier blocks]``; set to 1 where a symbol is NaN, infinite or beyond int16.
    """
    _launch(
        gpu, weights, rows, factors, roundings, tiles, sections, payload, escapes, status,
        tuple(weights.shape), given=False,
    )  # fmt: skip


def quantise_symbols(
    gpu: GpuDevice,
    coefficients: torch.Tensor,
    factors: torch.Tensor,
    roundings: torch.Tensor,
    tiles: RowTiles,
    sections: Sections,
    payload: torch.Tensor,
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    status: torch.Tensor,
) -> None:
    """Do what `project_symbols` does after its product, from float32 coefficients ``[stored, tokens]``.

    The same epilogue, to compare with the CPU's symbols bit for bit: products of two devices differ in the
    order of their sums.
    """
    _launch(
        gpu, coefficients, coefficients, factors, roundings, tiles, sections, payload, escapes, status,
        (1, coefficients.shape[0], 16), given=True,
    )  # fmt: skip


def _launch(
    gpu: GpuDevice,
    weights: torch.Tensor,
    rows: torch.Tensor,
    factors: torch.Tensor,
    roundings: torch.Tensor,
    tiles: RowTiles,
    sections: Sections,
    payload: torch.Tensor,
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    status: torch.Tensor,
    shape: tuple[int, ...],
    *,
    given: bool,
) -> None:
    counts, indices, values = escapes
    block_t = token_block(gpu, sections.most_tokens)
    token_tiles, trits = sections.token_tiles(block_t), sections.trit_tiles(block_t)
    others = tiles.table.shape[0] - tiles.ternary
    total = others * token_tiles.shape[0] + tiles.ternary * trits.table.shape[0]
    if not total:
        return
    wide, byte, nibble, _ = tiles.counts
    block_k = gpu.tile(shape[2], BLOCK_K)
    _symbols_kernel[gpu.grid(total, gpu.MATRIX)](
        weights, rows, factors, roundings, tiles.table, token_tiles, trits.table, trits.tokens, trits.bytes,
        sections.table, payload, counts, indices, values, status, sections.columns, indices.shape[1], others,
        tiles.ternary, token_tiles.shape[0], trits.table.shape[0], *shape, wide, byte, nibble,
        GIVEN=given, BLOCK_R=tiles.block, BLOCK_T=block_t, BLOCK_K=block_k, EVEN_K=shape[2] % block_k == 0,
        WIDEN=gpu.is_interpreter,
        num_warps=8, num_stages=gpu.stages(tiles.block, block_t, block_k), enable_fp_fusion=False,
    )  # fmt: skip

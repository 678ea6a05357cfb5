"""Tiles of ternary symbols: each token in one, no byte in two, few tokens empty."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.trit_tiles import TritTiles, cut_trits


@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=9),
    block=st.sampled_from((16, 32, 64, 128, 256)),
)
def test_every_token_is_in_one_tile_and_every_byte_too(counts: list[int], block: int) -> None:
    tiles = cut_trits(counts, block)
    assert [tile[0] for tile in tiles] == [0, *(tile[1] for tile in tiles[:-1])]
    assert [tile[2] for tile in tiles] == [0, *(tile[3] for tile in tiles[:-1])]
    assert tiles[-1][1::2] == (sum(counts), sum(-(-count // 5) for count in counts))
    starts = list(accumulate(counts, initial=0))
    where_bytes_begin = {
        first + at for first, n in zip(starts, counts, strict=False) for at in range(0, n, 5)
    }
    for first, stop, first_byte, stop_byte in tiles:
        assert first in where_bytes_begin
        assert 0 < stop - first <= block
        assert stop_byte - first_byte <= block // 4
    if min(counts) >= 20:
        assert all(stop - first > block - 5 - block // 20 for first, stop, *_ in tiles[:-1])


@pytest.mark.parametrize(("counts", "tiles"), [([256] * 32, 32), ([252] + [256] * 31, 32), ([512] * 16, 33)])
def test_little_is_left_empty(counts: list[int], tiles: int) -> None:
    assert len(cut_trits(counts, 256)) == tiles


def test_tables_say_where_tokens_and_bytes_lie(gpu: GpuDevice) -> None:
    made = TritTiles.make(gpu, [7, 5, 1], 16)
    tokens, places = made.tokens.tolist(), made.bytes.tolist()
    assert made.table.tolist() == [[0, 13, 0, 4]]
    assert tokens[:7] == [[0, token, token // 5] for token in range(7)]
    assert tokens[7:] == [[1, token, 2] for token in range(5)] + [[2, 0, 3]]
    assert places == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert made.tokens.dtype == made.bytes.dtype == torch.int32

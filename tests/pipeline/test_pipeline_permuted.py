"""Pages whose elements lie in an order of the engine's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.permuted import PermutedKvCache

BLOCKS, TOKENS, HEADS, SIZE, LAYERS = 6, 4, 3, 8, 2
HALF = TOKENS * HEADS * SIZE


def make_cache(seed: int, dtype: torch.dtype = torch.float32) -> tuple[PermutedKvCache, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * HALF, generator=generator)
    places = order.reshape(2, TOKENS, HEADS, SIZE)
    pages = [torch.randn(BLOCKS, 2 * HALF, generator=generator).to(dtype) for _ in range(LAYERS)]
    return PermutedKvCache(pages, places[0], places[1]), pages


def read_slowly(
    pages: torch.Tensor, places: torch.Tensor, block: int, token: int, head: int, channel: int
) -> float:
    return float(pages[block, places[token, head, channel]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_reads_element_by_element(dtype: torch.dtype) -> None:
    cache, pages = make_cache(1, dtype)
    places = cache._places.reshape(2, TOKENS, HEADS, SIZE)
    ids = [4, 0, 2]
    gathered = cache.gather(ids)
    assert gathered[0].shape == (len(ids) * TOKENS, LAYERS, HEADS, SIZE)
    for side in range(2):
        for run, block in enumerate(ids):
            for token in range(TOKENS):
                for layer in range(LAYERS):
                    for head in range(HEADS):
                        for channel in range(SIZE):
                            found = gathered[side][run * TOKENS + token, layer, head, channel]
                            assert float(found) == read_slowly(
                                pages[layer], places[side], block, token, head, channel
                            )


@given(
    seed=st.integers(0, 1000),
    ids=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS, unique=True),
)
def test_scatter_is_the_inverse_of_gather_and_touches_no_other_block(seed: int, ids: list[int]) -> None:
    source, _ = make_cache(seed)
    target, pages = make_cache(seed)
    for layer in pages:
        layer.add_(1.0)
    before = [layer.clone() for layer in pages]
    keys, values = source.gather(ids)
    for layer in range(LAYERS):
        target.scatter_layer(layer, ids, keys[:, layer], values[:, layer])
    again = target.gather(ids)
    assert torch.equal(again[0], keys) and torch.equal(again[1], values)
    others = [block for block in range(BLOCKS) if block not in ids]
    assert all(torch.equal(now[others], then[others]) for now, then in zip(pages, before, strict=True))


def test_scatter_leaves_out_blocks_with_id_minus_one() -> None:
    cache, pages = make_cache(3)
    before = pages[0].clone()
    rows = torch.randn(3 * TOKENS, HEADS, SIZE)
    cache.scatter_layer(0, [5, -1, 1], rows, -rows)
    keys, values = cache.gather([5, 1])
    expected = torch.cat([rows[:TOKENS], rows[2 * TOKENS :]])
    assert torch.equal(keys[:, 0], expected) and torch.equal(values[:, 0], -expected)
    assert torch.equal(pages[0][[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_places_that_are_no_permutation_are_refused() -> None:
    pages = [torch.zeros(2, 2 * HALF)]
    places = torch.arange(2 * HALF).reshape(2, TOKENS, HEADS, SIZE)
    twice = places[1].clone()
    twice[0, 0, 0] = 0
    with pytest.raises(LayoutError, match="once"):
        PermutedKvCache(pages, places[0], twice)
    with pytest.raises(LayoutError, match="once"):
        PermutedKvCache([torch.zeros(2, 2 * HALF + 1)], places[0], places[1])
    with pytest.raises(LayoutError, match="one shape"):
        PermutedKvCache([pages[0], torch.zeros(3, 2 * HALF)], places[0], places[1])
    with pytest.raises(LayoutError, match="same for keys and values"):
        PermutedKvCache(pages, places[0], places[1][:2])

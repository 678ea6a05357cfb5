import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.paged import LAYOUTS, PagedKvCache

SIZES = {"2": 2, "B": 7, "N": 4, "H": 3, "D": 8}


def make_layers(layout: str, num_layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shape = [SIZES[axis] for axis in layout]
    return [torch.randn(shape).to(dtype) for _ in range(num_layers)]


def token(layer: torch.Tensor, layout: str, side: int, block: int, slot: int) -> torch.Tensor:
    """One token's heads by plain indexing, axis by axis."""
    index = {"2": side, "B": block, "N": slot}
    return layer[tuple(index.get(axis, slice(None)) for axis in layout)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_reads_every_layout_token_by_token(layout: str) -> None:
    layers = make_layers(layout)
    cache = PagedKvCache.from_layers(layers, layout)
    keys, values = cache.gather([5, 0, 3])
    assert keys.shape == values.shape == (12, 2, 3, 8)
    for run, block in enumerate([5, 0, 3]):
        for slot in range(4):
            for layer in range(2):
                assert torch.equal(keys[4 * run + slot, layer], token(layers[layer], layout, 0, block, slot))
                assert torch.equal(
                    values[4 * run + slot, layer], token(layers[layer], layout, 1, block, slot)
                )


@pytest.mark.parametrize("layout", LAYOUTS)
@given(blocks=st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True))
def test_scatter_is_the_inverse_of_gather(layout: str, blocks: list[int]) -> None:
    source = PagedKvCache.from_layers(make_layers(layout), layout)
    target_layers = make_layers(layout)
    untouched = [layer.clone() for layer in target_layers]
    target = PagedKvCache.from_layers(target_layers, layout)
    keys, values = source.gather(blocks)
    for layer in range(2):
        target.scatter_layer(layer, blocks, keys[:, layer], values[:, layer])
    again = target.gather(blocks)
    assert torch.equal(again[0], keys) and torch.equal(again[1], values)
    others = [block for block in range(7) if block not in blocks]
    before = PagedKvCache.from_layers(untouched, layout).gather(others)
    after = target.gather(others)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_scatter_leaves_out_blocks_with_id_minus_one() -> None:
    layers = make_layers("2BNHD", num_layers=1)
    before = layers[0].clone()
    cache = PagedKvCache.from_layers(layers, "2BNHD")
    rows = torch.randn(12, 3, 8).to(torch.bfloat16)
    cache.scatter_layer(0, [-1, 2, -1], rows, rows)
    assert torch.equal(layers[0][0, 2], rows[4:8])
    assert torch.equal(layers[0][:, [0, 1, 3, 4, 5, 6]], before[:, [0, 1, 3, 4, 5, 6]])


def test_layouts_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(LayoutError, match="supported"):
        PagedKvCache.from_layers(make_layers("2BNHD"), "NBHD2")
    with pytest.raises(LayoutError, match="axes"):
        PagedKvCache.from_layers([torch.zeros(7, 4, 3, 8)], "2BNHD")
    with pytest.raises(LayoutError, match="one shape and dtype"):
        PagedKvCache.from_layers([torch.zeros(2, 7, 4, 3, 8), torch.zeros(2, 7, 4, 3, 16)], "2BNHD")
    with pytest.raises(LayoutError, match="supported"):
        PagedKvCache.from_layers([torch.zeros(2, 7, 4, 3, 8, dtype=torch.int8)], "2BNHD")
    with pytest.raises(LayoutError, match="one key view"):
        PagedKvCache([], [])


@pytest.mark.parametrize("blocks", [[7], [0, -2]])
def test_block_ids_outside_the_cache_are_refused(blocks: list[int]) -> None:
    with pytest.raises(LayoutError, match=r"0\.\.6"):
        PagedKvCache.from_layers(make_layers("2BNHD"), "2BNHD").check_blocks(blocks)

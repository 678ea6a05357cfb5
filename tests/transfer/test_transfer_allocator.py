"""The range allocator against a naive model of marked bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.transfer.allocator import RangeAllocator

_CAPACITY = 64 * 32


@given(
    st.sampled_from([1, 16, 64]),
    st.lists(st.one_of(st.integers(1, 700), st.integers(-20, -1)), max_size=60),
)
def test_agrees_with_marked_bytes(alignment: int, steps: list[int]) -> None:
    """Positive steps allocate that many bytes, negative ones free one of the ranges held."""
    allocator = RangeAllocator(_CAPACITY, alignment)
    marked = bytearray(_CAPACITY)
    held: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            runs = [len(run) for run in bytes(marked).split(b"\1")]
            start = allocator.allocate(step)
            size = allocator.rounded(step)
            assert size % alignment == 0
            assert size - step < alignment
            if start is None:
                assert max(runs) < size
                continue
            assert start % alignment == 0
            assert not any(marked[start : start + size])
            marked[start : start + size] = b"\1" * size
            held.append((start, step))
        elif held:
            start, nbytes = held.pop(step % len(held))
            allocator.free(start, nbytes)
            marked[start : start + allocator.rounded(nbytes)] = bytes(allocator.rounded(nbytes))
        assert allocator.allocated_bytes == sum(marked)
        assert allocator.largest_free_bytes == max(len(run) for run in bytes(marked).split(b"\1"))
    for start, nbytes in held:
        allocator.free(start, nbytes)
    assert allocator.largest_free_bytes == allocator.free_bytes == _CAPACITY
    assert allocator.fragmentation == 0


def test_takes_the_smallest_range_that_fits() -> None:
    allocator = RangeAllocator(1000, 1)
    starts = [allocator.allocate(size) for size in (100, 1, 50, 1, 200, 1, 647)]
    for start, size in zip(starts[::2], (100, 50, 200), strict=False):
        assert start is not None
        allocator.free(start, size)
    assert allocator.allocate(45) == starts[2]
    assert allocator.allocate(101) == starts[4]
    assert allocator.largest_free_bytes == 100
    assert 0 < allocator.fragmentation < 1


def test_refuses_what_is_not_allocated() -> None:
    allocator = RangeAllocator(1024, 64)
    start = allocator.allocate(100)
    assert start == 0
    allocator.free(start, 100)
    for bad_start, nbytes in ((0, 100), (32, 64), (-64, 64), (1024, 64), (0, 0), (512, 512)):
        with pytest.raises(ValueError):
            allocator.free(bad_start, nbytes)
    with pytest.raises(ValueError):
        allocator.allocate(0)


@pytest.mark.parametrize(("capacity", "alignment"), [(63, 64), (0, 1), (100, 48), (100, 0)])
def test_refuses_senseless_settings(capacity: int, alignment: int) -> None:
    with pytest.raises(ValueError):
        RangeAllocator(capacity, alignment)

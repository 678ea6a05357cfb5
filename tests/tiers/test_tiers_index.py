"""The object index against an ordered dict, and its order of eviction."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.tiers.base import Namespace
from dynamo_kvtc.tiers.index import Location, ObjectIndex


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "touch", "prefix"]), st.integers(0, 9)), max_size=80)
)
def test_agrees_with_an_ordered_dict(steps: list[tuple[str, int]]) -> None:
    index, model = ObjectIndex(), OrderedDict[bytes, Location]()
    for step, (action, number) in enumerate(steps):
        name = key(number)
        if action == "add" and name not in model:
            model[name] = Location(number, step << 33, step + 1, (1 << 64) - 1 - step)
            index.add(name, model[name])
        elif action == "remove" and name in model:
            assert index.remove(name) == model.pop(name)
        elif action == "touch" and name in model:
            index.touch(name)
            model.move_to_end(name)
        elif action == "prefix":
            leading = [key(n) for n in range(number)]
            count = next((i for i, k in enumerate(leading) if k not in model), number)
            assert index.touch_prefix(leading) == count
            for k in reversed(leading[:count]):
                model.move_to_end(k)
        assert list(index.oldest_first()) == list(model)
        assert len(index) == len(model)
        assert index.stored_bytes == sum(location.nbytes for location in model.values())
        for n in range(10):
            assert (key(n) in index) == (key(n) in model)
            assert index.get(key(n)) == model.get(key(n))
            assert index.size_of(key(n)) == (model[key(n)].nbytes if key(n) in model else None)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12))
def test_what_is_preferred_is_spared_as_often_as_was_said(asked: list[tuple[int, int]]) -> None:
    """Against a plain queue whose entries carry how often they may go to its end instead."""
    index, model = ObjectIndex(), OrderedDict[bytes, int]()
    for number in range(6):
        index.add(key(number), Location(0, 0, 1))
        model[key(number)] = 0
    for number, times in asked:
        index.prefer(key(number), times)
        model[key(number)] = times
    while model:
        oldest = next(index.oldest_first())
        assert oldest == next(iter(model))
        assert index.spare(oldest) is (model[oldest] > 0)
        if model[oldest]:
            model[oldest] -= 1
            model.move_to_end(oldest)
        else:
            index.remove(oldest)
            del model[oldest]
    # A slot that is used again does not inherit anything.
    index.add(key(0), Location(0, 0, 1))
    assert not index.spare(key(0))


def test_what_is_removed_while_iterating_is_not_missed() -> None:
    index = ObjectIndex()
    for number in range(5):
        index.add(key(number), Location(0, 0, 1))
    for name in index.oldest_first():
        index.remove(name)
    assert len(index) == 0


def test_a_million_objects_would_take_less_than_300_mb() -> None:
    tracemalloc.start()
    try:
        index = ObjectIndex()
        for number in range(45_000):
            index.add(key(number), Location(number, number << 12, 1 << 17, (1 << 63) + number))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 45_000 < 300


def test_misuse_is_refused() -> None:
    index = ObjectIndex()
    index.add(key(0), Location(0, 0, 1))
    with pytest.raises(KeyError):
        index.add(key(0), Location(0, 0, 1))
    for call in (index.remove, index.touch):
        with pytest.raises(KeyError):
            call(key(1))


def test_keys_differ_wherever_a_namespace_does() -> None:
    namespaces = [
        Namespace(bytes(32), "layout"),
        Namespace(b"\1" * 32, "layout"),
        Namespace(bytes(32), "layou"),
        Namespace(bytes(32), "layout", b"salt"),
        Namespace(bytes(32), "", b"layout"),
    ]
    keys = {namespace.key(hashed) for namespace in namespaces for hashed in (b"", b"t", b"salt")}
    assert len(keys) == 15
    assert {len(name) for name in keys} == {32}

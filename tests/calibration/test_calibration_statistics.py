from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.statistics import KvStatistics, Moments
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.errors import CalibrationError

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=4)
GROUPS = (LayerRange(0, 2), LayerRange(2, 1))


def _documents(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(20 + i, 24, generator=generator) + 3, torch.randn(20 + i, 24, generator=generator))
        for i in range(count)
    ]


def _statistics(documents) -> KvStatistics:
    statistics = KvStatistics(GEOMETRY, GROUPS, rows_per_document=7)
    for keys, values in documents:
        statistics.update(keys, values)
    return statistics


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), offset=st.sampled_from([0.0, 10.0, 500.0]))
def test_moments_are_those_of_all_rows_together(sizes, offset):
    generator = torch.Generator().manual_seed(len(sizes))
    batches = [torch.randn(size, 6, generator=generator) + offset for size in sizes]
    moments = Moments(6)
    for batch in batches:
        moments.update(batch)
    everything = torch.cat(batches).double().numpy()
    assert moments.count == len(everything)
    if len(everything):
        centred = everything - everything.mean(axis=0)
        np.testing.assert_allclose(moments.mean.numpy(), everything.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(moments.scatter.numpy(), centred.T @ centred, rtol=1e-4, atol=2e-3)


def test_merged_moments_equal_those_of_one_stream():
    rows = torch.randn(90, 8, generator=torch.Generator().manual_seed(3)) * 2 + 40
    whole, left, right = Moments(8), Moments(8), Moments(8)
    whole.update(rows)
    left.update(rows[:25])
    right.update(rows[25:])
    left.merge(right)
    left.merge(Moments(8))
    assert left.count == whole.count
    torch.testing.assert_close(left.mean, whole.mean)
    torch.testing.assert_close(left.scatter, whole.scatter, rtol=1e-4, atol=1e-3)


def test_groups_see_their_own_columns_and_the_sample_is_bounded():
    documents = _documents()
    statistics = _statistics(documents)
    keys = torch.cat([keys for keys, _ in documents]).double()
    assert statistics.rows == len(keys)
    torch.testing.assert_close(statistics.moments(0, "keys").mean, keys[:, :16].mean(0))
    torch.testing.assert_close(statistics.moments(1, "keys").mean, keys[:, 16:].mean(0))
    sample = statistics.sample(1, "values")
    assert sample.shape == (5 * 7, 8)
    first = documents[0][1][:, 16:]
    assert all((first == row).all(dim=1).any() for row in sample[:7])


def test_short_documents_give_all_their_rows_to_the_sample():
    keys = torch.randn(3, 24)
    statistics = _statistics([(keys, keys), (keys[:0], keys[:0])])
    torch.testing.assert_close(statistics.sample(0, "keys"), keys[:, :16])


def test_resumed_statistics_are_bit_identical(tmp_path):
    documents = _documents()
    whole = _statistics(documents)
    half = _statistics(documents[:2])
    half.save(tmp_path / "state.safetensors")
    resumed = KvStatistics(GEOMETRY, GROUPS, rows_per_document=7)
    resumed.load(tmp_path / "state.safetensors")
    assert resumed.documents == 2
    for keys, values in documents[2:]:
        resumed.update(keys, values)
    for group in range(2):
        for side in ("keys", "values"):
            assert torch.equal(resumed.moments(group, side).scatter, whole.moments(group, side).scatter)
            assert torch.equal(resumed.moments(group, side).mean, whole.moments(group, side).mean)
            assert torch.equal(resumed.sample(group, side), whole.sample(group, side))


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\x00" * 64])
def test_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    _statistics(_documents(1)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CalibrationError, match="damaged"):
        KvStatistics(GEOMETRY, GROUPS, rows_per_document=7).load(path)


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    sizes = []
    for documents in (200, 2000):
        statistics = KvStatistics(GEOMETRY, GROUPS, rows_per_document=1, sample_every=documents // 20)
        generator = torch.Generator().manual_seed(1)
        for _ in range(documents):
            rows = torch.randn(3, 24, generator=generator)
            statistics.update(rows, rows)
        assert statistics.rows == 3 * documents
        assert statistics.sample(0, "keys").shape[0] == 20
        statistics.save(tmp_path / "state.safetensors")
        sizes.append((tmp_path / "state.safetensors").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 100  # the counts in the header have a digit more

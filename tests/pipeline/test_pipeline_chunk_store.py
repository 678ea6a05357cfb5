"""Chunks from any place of a sequence, stored and loaded by jobs that a host polls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rig import GEOMETRY, PARAMETERS, make_codec
from synthetic import make_block

from dynamo_kvtc.errors import LayoutError, TransferTimeoutError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.chunk_store import Chunk, ChunkJob, ChunkStore, FinishedJob
from dynamo_kvtc.pipeline.row_cache import RowCache, chunk_places, split_places
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.testing import TierWrapper
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.tiers.disk import DiskTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool

PAGE_TOKENS, PAGES = 8, 4
TOKENS = PAGE_TOKENS * PAGES
ROWS = 12
ROW_BYTES = 4096 * -(-TOKENS * GEOMETRY.token_bytes // 4096)
POLICY = OffloadPolicy(tier_block_tokens=TOKENS, sink_tokens=4, recent_window=0, minimum_tokens=0)

#: Layers as they lie in a row: not in the model's order.
LAYER_ORDER = (2, 0, 3, 1)


def make_rows() -> memoryview:
    return memoryview(np.zeros((ROWS, ROW_BYTES), dtype=np.int8))


def make_cache(rows: memoryview) -> RowCache:
    places = split_places(PAGE_TOKENS, GEOMETRY.num_kv_heads, GEOMETRY.head_size)
    return RowCache(rows, GEOMETRY, chunk_places(places, PAGES), LAYER_ORDER)


def fill(cache: RowCache, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    block = make_block(PARAMETERS, slots * TOKENS)
    for layer in range(GEOMETRY.num_layers):
        cache.scatter_layer(layer, list(range(slots)), block.keys[:, layer], block.values[:, layer])
    return block.keys, block.values


@contextmanager
def open_store(
    folder: Path,
    cache: RowCache,
    *,
    profile: str = "raw",
    policy: OffloadPolicy = POLICY,
    wrap: Callable[[Tier], Tier] = lambda tier: tier,
    max_pending: int = 64,
) -> Iterator[ChunkStore]:
    async def open_adapter() -> TierAdapter:
        agent = await TransferAgent.create()
        staging = await StagingPool.create(agent, 4 << 20)
        tiers = TierStack([wrap(await DiskTier.open(agent, folder, 16 << 20))], staging=staging)
        return TierAdapter(make_codec(profile), bytes(32), agent, staging, tiers, policy, TOKENS)

    store = ChunkStore(ThreadedTierAdapter(open_adapter), cache, max_pending=max_pending)
    try:
        yield store
    finally:
        store.close()


def chunks(*places: tuple[int, int]) -> list[Chunk]:
    """Chunks of one sequence as pairs of index and slot."""
    return [Chunk(b"hash %d" % index, index, slot) for index, slot in places]


def run(store: ChunkStore, job: ChunkJob) -> FinishedJob:
    store.submit(job)
    store.drain(60)
    (finished,) = store.take_finished()
    assert finished.job is job
    return finished


def test_row_cache_puts_every_element_where_the_engine_has_it() -> None:
    rows = make_rows()
    keys, values = fill(make_cache(rows), 3)
    elements = torch.from_numpy(np.asarray(rows)).view(torch.bfloat16)
    page = PAGE_TOKENS * 2 * GEOMETRY.layer_size
    for token in (0, 7, 8, 31, 32, 95):
        row, rest = divmod(token, TOKENS)
        block, offset = divmod(rest, PAGE_TOKENS)
        for run_index, layer in enumerate(LAYER_ORDER):
            first = (run_index * PAGES + block) * page
            content = elements[row, first : first + page].view(
                GEOMETRY.num_kv_heads, PAGE_TOKENS, 2, GEOMETRY.head_size
            )
            assert torch.equal(content[:, offset, 0], keys[token, layer])
            assert torch.equal(content[:, offset, 1], values[token, layer])


def test_row_cache_refuses_rows_that_cannot_hold_a_chunk() -> None:
    places = split_places(PAGE_TOKENS, GEOMETRY.num_kv_heads, GEOMETRY.head_size)
    small = memoryview(np.zeros((2, ROW_BYTES // 8), dtype=np.int8))
    with pytest.raises(LayoutError, match="cannot hold"):
        RowCache(small, GEOMETRY, chunk_places(places, PAGES), LAYER_ORDER)
    with pytest.raises(LayoutError, match="not the model's layers"):
        RowCache(make_rows(), GEOMETRY, chunk_places(places, PAGES), (0, 1, 2, 2))
    strided = memoryview(np.zeros((ROWS, 2 * ROW_BYTES), dtype=np.int8)[:, ::2])
    with pytest.raises(LayoutError, match="contiguous"):
        RowCache(strided, GEOMETRY, chunk_places(places, PAGES), LAYER_ORDER)


@pytest.mark.parametrize("profile", ["raw", "kvtc"])
def test_chunks_come_back_into_other_slots(tmp_path: Path, profile: str) -> None:
    cache = make_cache(make_rows())
    keys, values = fill(cache, 3)
    with open_store(tmp_path, cache, profile=profile) as store:
        # Chunks 0, 1 and 4: a gap, so that positions matter.
        stored = run(store, ChunkJob(1, chunks((0, 0), (1, 1), (4, 2)), is_load=False, num_tokens=5 * TOKENS))
        assert stored.succeeded and stored.done == (True, True, True) and stored.stored_bytes > 0
        loaded = run(store, ChunkJob(2, chunks((0, 7), (1, 5), (4, 9)), is_load=True))
        assert loaded.succeeded and loaded.done == (True, True, True)
    got_keys, got_values = cache.gather([7, 5, 9])
    if profile == "raw":
        assert torch.equal(got_keys, keys) and torch.equal(got_values, values)
    else:
        for got, wanted in ((got_keys, keys), (got_values, values)):
            error = (got.float() - wanted.float()).square().mean()
            assert error < 0.2 * wanted.float().square().mean()


def test_a_chunk_at_another_position_is_a_miss(tmp_path: Path) -> None:
    cache = make_cache(make_rows())
    fill(cache, 2)
    with open_store(tmp_path, cache) as store:
        run(store, ChunkJob(1, chunks((0, 0), (1, 1)), is_load=False, num_tokens=2 * TOKENS))
        moved = [Chunk(b"hash 0", 0, 5), Chunk(b"hash 1", 2, 6)]
        finished = run(store, ChunkJob(2, moved, is_load=True))
        assert not finished.succeeded and finished.done == (True, False)
    assert not cache.gather([6])[0].any()


def test_a_missing_chunk_costs_only_what_follows_it(tmp_path: Path) -> None:
    cache = make_cache(make_rows())
    fill(cache, 4)
    with open_store(tmp_path, cache) as store:
        run(store, ChunkJob(1, chunks((0, 0), (2, 2)), is_load=False, num_tokens=3 * TOKENS))
        finished = run(store, ChunkJob(2, chunks((0, 5), (1, 6), (2, 7)), is_load=True))
        assert finished.done == (True, False, False) and not finished.succeeded


def test_policy_leaves_out_the_recent_window(tmp_path: Path) -> None:
    policy = OffloadPolicy(tier_block_tokens=TOKENS, sink_tokens=4, recent_window=TOKENS, minimum_tokens=0)
    cache = make_cache(make_rows())
    fill(cache, 4)
    with open_store(tmp_path, cache, policy=policy) as store:
        finished = run(
            store, ChunkJob(1, chunks(*((n, n) for n in range(4))), is_load=False, num_tokens=4 * TOKENS)
        )
        assert finished.succeeded and finished.done == (True, True, True, False)
        assert store.holds(b"hash 2") and not store.holds(b"hash 3")


def test_a_second_process_finds_what_the_first_stored(tmp_path: Path) -> None:
    cache = make_cache(make_rows())
    keys, _ = fill(cache, 2)
    with open_store(tmp_path, cache) as store:
        run(store, ChunkJob(1, chunks((0, 0), (1, 1)), is_load=False, num_tokens=2 * TOKENS))
    again = make_cache(make_rows())
    with open_store(tmp_path, again) as store:
        assert store.holds(b"hash 0") and not store.holds(b"hash 7")
        assert run(store, ChunkJob(1, chunks((0, 3), (1, 4)), is_load=True)).succeeded
    assert torch.equal(again.gather([3, 4])[0], keys)


class HeldTier(TierWrapper):
    """A tier whose puts wait for a signal, as those of a disk that hangs do."""

    def __init__(self, tier: Tier, signal: threading.Event) -> None:
        super().__init__(tier)
        self.signal = signal

    async def put(self, key: bytes, source: object, *, timeout_s: float) -> bool:
        import asyncio

        while not self.signal.is_set():
            await asyncio.sleep(0.01)
        return await super().put(key, source, timeout_s=timeout_s)  # type: ignore[arg-type]


def test_a_slow_tier_blocks_nobody_and_what_is_too_much_is_refused(tmp_path: Path) -> None:
    cache = make_cache(make_rows())
    fill(cache, 8)
    signal = threading.Event()
    with open_store(tmp_path, cache, wrap=lambda tier: HeldTier(tier, signal), max_pending=5) as store:
        store.submit(ChunkJob(1, chunks((0, 0), (1, 1), (2, 2)), is_load=False, num_tokens=8 * TOKENS))
        store.submit(ChunkJob(2, chunks((3, 3), (4, 4), (5, 5)), is_load=False, num_tokens=8 * TOKENS))
        (refused,) = store.take_finished()
        assert refused.job.job_id == 2 and not refused.succeeded and store.refused_jobs == 1
        with pytest.raises(TransferTimeoutError, match="1 jobs"):
            store.drain(0.05)
        signal.set()
        store.drain(60)
        assert [finished.succeeded for finished in store.take_finished()] == [True]


def test_close_with_jobs_in_work_ends_them_all(tmp_path: Path) -> None:
    cache = make_cache(make_rows())
    fill(cache, 8)
    signal = threading.Event()
    with open_store(tmp_path, cache, wrap=lambda tier: HeldTier(tier, signal)) as store:
        for job in range(4):
            store.submit(ChunkJob(job, chunks((2 * job, 2 * job)), is_load=False, num_tokens=8 * TOKENS))
        store.submit(ChunkJob(9, chunks((0, 9)), is_load=True))
        closing = threading.Thread(target=store.close)
        closing.start()
        time.sleep(0.05)
        signal.set()
        closing.join(60)
        assert not closing.is_alive() and store.pending_jobs == 0
        assert sorted(finished.job.job_id for finished in store.take_finished()) == [0, 1, 2, 3, 9]
        store.submit(ChunkJob(10, chunks((0, 0)), is_load=True))
        assert [finished.succeeded for finished in store.take_finished()] == [False]
    assert not store.holds(b"hash 0")


def test_an_empty_job_ends_at_once(tmp_path: Path) -> None:
    with open_store(tmp_path, make_cache(make_rows())) as store:
        store.submit(ChunkJob(1, [], is_load=False))
        assert [finished.succeeded for finished in store.take_finished()] == [True]

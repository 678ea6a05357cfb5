import asyncio
from pathlib import Path

import pytest
import torch
from rig import BLOCK_SIZE, GEOMETRY, POLICY, make_cache, make_parameters, open_rig

from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.errors import ArtifactMismatchError, ConfigError, LayoutError, TierClosedError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.policy import OffloadPolicy


@pytest.mark.parametrize("profile", ["kvtc", "raw"])
@pytest.mark.parametrize("tiers", [("host",), ("disk",), ("host", "disk")])
async def test_what_is_offloaded_comes_back_as_the_codec_alone_decodes_it(
    tmp_path: Path, profile: str, tiers: tuple[str, ...]
) -> None:
    async with open_rig(tmp_path, profile=profile, tiers=tiers) as rig:
        blocks = rig.sequence(128)
        assert await rig.adapter.lookup(blocks.hashes) == 0
        await rig.store(blocks)
        assert await rig.adapter.lookup(blocks.hashes) == 128
        handle = rig.adapter.onboard(blocks, rig.destination)
        for layer in range(GEOMETRY.num_layers):
            await handle.layer(layer)
        await handle.wait()
        rig.assert_in_place(blocks)
        if profile == "raw":
            keys, _ = rig.source.gather(blocks.block_ids)
            assert torch.equal(rig.destination.gather(blocks.block_ids)[0], keys)


async def test_a_new_process_is_served_from_disk(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.store(rig.sequence(96))
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(96)
        assert await rig.adapter.lookup(blocks.hashes) == 96
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.assert_in_place(blocks)


@pytest.mark.parametrize(("first", "second"), [(2.0, 16.0), (16.0, 2.0)])
async def test_a_changed_ratio_serves_what_was_stored_before(
    tmp_path: Path, first: float, second: float
) -> None:
    parameters = make_parameters(GEOMETRY, groups=2, ratios=(2.0, 16.0))
    policy = OffloadPolicy(tier_block_tokens=256, sink_tokens=4, recent_window=0, minimum_tokens=0)
    old = KvtcCodec(parameters, ratio=first, sink_bits=8, threads=1)
    async with open_rig(tmp_path, codec=old, policy=policy) as rig:
        blocks = rig.sequence(512)
        await rig.store(blocks)
        expected = rig.expected(blocks)
    new = KvtcCodec(parameters, ratio=second, sink_bits=16, threads=1)
    sizes = {codec.header_bytes(256, 4) for codec in (old, new)}
    assert len(sizes) == 2  # else this would show nothing
    async with open_rig(tmp_path, codec=new, policy=policy) as rig:
        assert await rig.adapter.lookup(blocks.hashes) == 512
        await rig.adapter.onboard(blocks, rig.destination).wait()
        keys, values = rig.destination.gather(blocks.block_ids)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


async def test_each_layer_is_whole_when_its_awaitable_fires(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(256)
        await rig.store(blocks)
        expected_keys, expected_values = rig.expected(blocks)
        handle = rig.adapter.onboard(blocks, rig.destination)
        for layer in range(GEOMETRY.num_layers):
            await handle.layer(layer)
            keys, values = rig.destination.gather(blocks.block_ids)
            assert torch.equal(keys[:, layer], expected_keys[:, layer])
            assert torch.equal(values[:, layer], expected_values[:, layer])
        ready = handle.timeline.layer_ready
        assert sorted(ready, key=ready.__getitem__) == list(range(GEOMETRY.num_layers))


async def test_concurrent_requests_share_a_prefix(tmp_path: Path) -> None:
    async with open_rig(tmp_path, num_blocks=128) as rig:
        blocks = rig.sequence(128)
        await rig.store(blocks)
        requests = [
            SequenceBlocks(blocks.hashes[: 4 * n], list(range(16 * i, 16 * i + 4 * n)))
            for i, n in enumerate((4, 2, 4, 3))
        ]
        await asyncio.gather(*(rig.adapter.onboard(r, rig.destination).wait() for r in requests))
        for request in requests:
            keys, values = rig.destination.gather(request.block_ids)
            expected_keys, expected_values = rig.expected(rig.sequence(len(request.hashes) * BLOCK_SIZE))
            assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


async def test_concurrent_offloads_of_one_prefix_write_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(128)
        tickets = [rig.adapter.offload(blocks, rig.source) for _ in range(3)]
        results = [await ticket.wait() for ticket in tickets]
        assert sum(result.stored for result in results) == 4
        assert sum(result.already_stored for result in results) == 8
        assert all(stats.objects == 4 for stats in rig.adapter.status().tiers.values())


async def test_salts_separate_sequences(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        mine = rig.sequence(64, salt=b"mine")
        await rig.store(mine)
        assert await rig.adapter.lookup(mine.hashes, salt=b"mine") == 64
        assert await rig.adapter.lookup(mine.hashes, salt=b"other") == 0
        assert await rig.adapter.lookup(mine.hashes) == 0


async def test_blocks_that_the_engine_has_are_not_written(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        wanted = SequenceBlocks(blocks.hashes, [-1, -1, -1, 3, 4, 5, 6, 7])
        await rig.adapter.onboard(wanted, rig.destination).wait()
        keys, _ = rig.destination.gather(range(8))
        expected, _ = rig.expected(blocks)
        assert keys[: 3 * BLOCK_SIZE].isnan().all()
        assert torch.equal(keys[3 * BLOCK_SIZE :], expected[3 * BLOCK_SIZE :])


async def test_the_policy_leaves_the_recent_window_out(tmp_path: Path) -> None:
    policy = OffloadPolicy(tier_block_tokens=32, sink_tokens=4, recent_window=40, minimum_tokens=64)
    async with open_rig(tmp_path, policy=policy) as rig:
        blocks = rig.sequence(128)
        await rig.store(blocks)
        assert await rig.adapter.lookup(blocks.hashes) == 64
        await rig.store(rig.sequence(56, name="short"))
        assert await rig.adapter.lookup(rig.sequence(56, name="short").hashes) == 0


async def test_nothing_to_onboard_is_done_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        handle = rig.adapter.onboard(rig.sequence(BLOCK_SIZE), rig.destination)
        await handle.wait()
        await handle.layer(GEOMETRY.num_layers - 1)
        assert handle.done()


async def test_counters_tell_what_happened(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(128)
        await rig.store(blocks)
        await rig.adapter.lookup(blocks.hashes)
        await rig.adapter.onboard(blocks, rig.destination).wait()
        counters = rig.adapter.status().counters
        assert (counters.looked_up_blocks, counters.found_blocks) == (4, 4)
        assert (counters.offloaded_blocks, counters.offloaded_tokens) == (4, 128)
        assert counters.offloaded_raw_bytes == 128 * GEOMETRY.token_bytes
        assert counters.onboarded_tokens == 128
        stored = rig.adapter.status().tiers["host"].stored_bytes
        assert counters.offloaded_stored_bytes == counters.onboarded_stored_bytes == stored
        assert all(seconds >= 0 for seconds in counters.stage_seconds.values())


async def test_headers_describe_what_is_stored(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(96)
        await rig.store(blocks)
        headers = await rig.adapter.headers(blocks.hashes)
        assert [header.first_position for header in headers] == [0, 32, 64]
        assert [header.sink_tokens for header in headers] == [4, 0, 0]
        assert [header.binding for header in headers] == rig.adapter.keys(blocks.hashes)
        assert sum(h.stream_size for h in headers) == rig.adapter.status().tiers["host"].stored_bytes


async def test_what_came_from_disk_is_promoted_after_the_onboard(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(128)
        await rig.store(blocks)
        tiers = rig.adapter.tiers
        await tiers.tiers[0].clear()
        await rig.adapter.onboard(blocks, rig.destination).wait()
        await tiers.settle()
        assert tiers.promotions == 4
        assert tiers.stats()["host"].objects == 4
        await tiers.tiers[1].clear()
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.assert_in_place(blocks)


async def test_reset_forgets_everything(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        await rig.adapter.reset()
        assert await rig.adapter.lookup(blocks.hashes) == 0


async def test_misuse_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        other = make_cache(8, filled=False)
        other.block_size = 4
        with pytest.raises(ArtifactMismatchError, match="calibrate for this model"):
            rig.adapter.onboard(rig.sequence(32), other)
        with pytest.raises(LayoutError, match="block ids"):
            rig.adapter.offload(rig.sequence(64, first_id=60), rig.source)
        with pytest.raises(LayoutError, match="block hashes for"):
            SequenceBlocks([b"x"], [1, 2])
        with pytest.raises(ConfigError, match="multiple"):
            POLICY.check_block_size(7)
        adapter = rig.adapter
    await adapter.close()
    for call in (adapter.lookup([b"x"]), adapter.reset()):
        with pytest.raises(TierClosedError, match="closed"):
            await call
    with pytest.raises(TierClosedError, match="closed"):
        adapter.offload(rig.sequence(32), rig.source)


def test_the_threaded_face_serves_a_host_without_asyncio(tmp_path: Path) -> None:
    rigs = []

    async def factory():  # type: ignore[no-untyped-def]
        context = open_rig(tmp_path)
        rigs.append((context, await context.__aenter__()))
        return rigs[0][1].adapter

    adapter = ThreadedTierAdapter(factory, timeout_s=30)
    rig = rigs[0][1]
    blocks = rig.sequence(128)
    offload = adapter.offload(blocks, rig.source)
    offload.gathered(10)
    assert offload.wait(10).stored == 4
    assert adapter.lookup(blocks.hashes) == 128
    onboard = adapter.onboard(blocks, rig.destination)
    onboard.layer(0, 10)
    onboard.wait(10)
    assert onboard.done()
    rig.assert_in_place(blocks)
    onboard.cancel()  # after the end it does nothing
    assert adapter.status().counters.onboarded_tokens == 128
    adapter.reset()
    assert adapter.lookup(blocks.hashes) == 0
    adapter.close()
    adapter.close()
    with pytest.raises(TierClosedError):
        adapter.lookup(blocks.hashes)


def test_a_factory_that_fails_leaves_no_thread_behind() -> None:
    async def factory():  # type: ignore[no-untyped-def]
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        ThreadedTierAdapter(factory, timeout_s=10)

"""The compressed tier below vLLM's real TieringOffloadingManager, on a CPU."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

import torch
from offloading_host import (
    BLOCK,
    BLOCKS_PER_CHUNK,
    CHUNK,
    DTYPE,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    Host,
    offloading_config,
    open_host,
    write_config,
    write_model,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_offload.base import LookupResult, make_offload_key
from vllm.v1.kv_offload.config import OffloadingParallelConfig
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from dynamo_kvtc.adapters.vllm.layouts import cpu_writer
from dynamo_kvtc.adapters.vllm_offloading import idle
from dynamo_kvtc.errors import ConfigError, LayoutError, TransferTimeoutError
from dynamo_kvtc.pipeline.adapter import TierAdapter

COPY = 32  # first block of the half of the cache that chunks are loaded into


def config(tmp_path: Path, *, ours: dict[str, Any] | None = None, **tier: Any) -> Any:
    model = write_model(tmp_path / "model")
    return offloading_config(model, {"config": str(write_config(tmp_path, **(ours or {}))), **tier})


def damage(folder: Path) -> None:
    """Invert bytes in the middle of what each segment of a disk tier holds."""
    for segment in folder.rglob("*"):
        if segment.is_file() and segment.stat().st_size > 1 << 16:
            data = bytearray(segment.read_bytes())
            middle = len(data.rstrip(b"\0")) // 2
            data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
            segment.write_bytes(data)


def assert_copied(host: Host, chunks: int) -> None:
    blocks = chunks * BLOCKS_PER_CHUNK
    for layer in host.layers:
        assert torch.equal(layer[:blocks], layer[COPY : COPY + blocks])


def test_chunks_pass_through_the_tier_unchanged(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        host.fill()
        context, keys = host.request("text/1", 5)
        host.store(context, keys)
        host.settle()
        assert host.tier._adapter.status().tiers["disk0"].objects == 5
        host.forget_primary()
        host.manager.on_request_finished(context)

        again, keys = host.request("text/2", 6)
        assert host.lookup(again, keys) == 5
        host.load(again, keys[:5], COPY)
        assert_copied(host, 5)


def test_the_codec_sees_tokens_and_channels_in_their_own_order(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        keys = torch.randn(BLOCK, HEADS, HEAD_SIZE, dtype=DTYPE)
        values = torch.randn(BLOCK, HEADS, HEAD_SIZE, dtype=DTYPE)
        write = cpu_writer(
            FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=DTYPE)
        )
        for layer in host.layers:
            write(layer[:2], keys, values)  # as vLLM's attention would: into block 1
        context, offload_keys = host.request("text", 1)
        host.store(context, offload_keys)
        host.settle()
        got_keys, got_values = host.tier._cache.gather([0])
        for layer_index in range(LAYERS):
            assert torch.equal(got_keys[BLOCK:, layer_index], keys)
            assert torch.equal(got_values[BLOCK:, layer_index], values)


def test_a_second_process_is_served_from_disk(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        host.store(context, keys)
        host.settle()
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        assert host.lookup(context, keys) == 4
        host.load(context, keys, COPY)
        assert_copied(host, 4)


def test_another_model_name_or_salt_finds_nothing(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text", 2)
        host.store(context, keys)
        host.settle()
    other = write_model(tmp_path / "other")
    for settings in (
        offloading_config(other, {"config": str(write_config(tmp_path))}),
        config(tmp_path, ours={"security": {"salt": "tenant"}}),
    ):
        with open_host(settings) as host:
            context, keys = host.request("text", 2)
            assert host.lookup(context, keys) == 0


def test_a_damaged_object_is_a_miss_and_is_not_tried_for_ever(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        host.store(context, keys)
        host.settle()
    damage(tmp_path / "disk")
    with open_host(settings) as host:
        context, keys = host.request("text", 4)
        ready = host.lookup(context, keys)
        assert ready < 4
        host.settle()
        missed = host.manager.get_stats()
        assert missed is not None
        # Recomputed chunks are stored again and served again.
        host.fill()
        host.store(context, keys)
        host.settle()
        host.forget_primary()
        host.manager.on_request_finished(context)
        context, keys = host.request("text/again", 4)
        assert host.lookup(context, keys) == 4
        host.load(context, keys, COPY)
        assert_copied(host, 4)


def test_what_is_not_certain_is_a_miss(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text", 2)
        host.store(context, keys)
        host.settle()
        unknown, _ = host.request("text/unknown", 2, positions=False)
        assert host.tier.lookup(keys[0], unknown) is LookupResult.MISS
        odd, _ = host.request("text/odd", 0)
        odd.set_offload_key_position(keys[0], CHUNK - 1)
        assert host.tier.lookup(keys[0], odd) is LookupResult.MISS
        for key in (make_offload_key(keys[0][:-4], 1), make_offload_key(bytes(16), 0)):
            context.set_offload_key_position(key, CHUNK)
            assert host.tier.lookup(key, context) is LookupResult.MISS


def test_the_recent_window_is_stored_once_the_sequence_has_grown(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        host.tier._window = CHUNK
        host.tier._adapter._adapter.policy = type(host.tier._adapter._adapter.policy)(CHUNK, 4, CHUNK, 0)
        context, keys = host.request("text/1", 3)
        host.store(context, keys)
        host.settle()
        assert [host.tier.lookup(key, context) is LookupResult.HIT for key in keys] == [True, True, False]
        host.manager.on_request_finished(context)
        context, keys = host.request("text/2", 5)
        host.store(context, keys)
        host.settle()
        assert [host.tier.lookup(key, context) is LookupResult.HIT for key in keys] == [True] * 4 + [False]


def test_events_and_metrics_tell_what_is_stored(tmp_path: Path) -> None:
    with open_host(config(tmp_path, enable_kv_events=True, locality="LOCAL")) as host:
        context, keys = host.request("text", 3)
        host.store(context, keys)
        host.settle()
        (event,) = [event for event in host.manager.take_events() if event.ownership == "KvtcTier"]
        assert set(event.keys) == set(keys) and not event.removed and event.medium.value == "STORAGE"
        host.forget_primary()
        assert host.lookup(context, keys) == 3
        stats = host.tier.get_stats()
        assert stats is not None
        values = stats.reduce()
        assert values["vllm:kvtc_offloaded_blocks"] == 3 and values["vllm:kvtc_onboarded_blocks"] == 3
        definitions = TieringOffloadingSpec.build_metric_definitions(host.spec.extra_config)
        assert set(stats.data["data"]) <= set(definitions)
        host.tier._adapter.reset()
        host.step()
        (event,) = [event for event in host.manager.take_events() if event.ownership == "KvtcTier"]
        assert set(event.keys) == set(keys) and event.removed


def test_backpressure_detector_is_accepted(tmp_path: Path) -> None:
    pressure = {"backpressure_cls": "EMABackpressureDetector", "policy_cls": "DropStorePolicy"}
    with open_host(config(tmp_path, backpressure=pressure)) as host:
        assert host.tier.bp_detector is not None
        context, keys = host.request("text", 2)
        host.store(context, keys)
        host.settle()


class Held:
    """Keeps the adapter's loop from storing anything until released."""

    def __init__(self, adapter: TierAdapter) -> None:
        import asyncio

        self.signal = threading.Event()
        put = adapter.tiers.put

        async def held(*arguments: Any, **keywords: Any) -> bool:
            while not self.signal.is_set():
                await asyncio.sleep(0.01)
            return await put(*arguments, **keywords)

        adapter.tiers.put = held  # type: ignore[method-assign]


def test_a_tier_that_hangs_does_not_hold_up_the_scheduler(tmp_path: Path) -> None:
    queue = {"pipeline": {"offload_queue": 2}}
    with open_host(config(tmp_path, ours=queue)) as host:
        held = Held(host.tier._adapter._adapter)
        for number in range(4):
            context, keys = host.request(f"text {number}", 3)
            host.store(context, keys)
            host.step()
        assert host.tier.has_pending_work() is False and host.manager.has_pending_work()
        with pytest.raises(TransferTimeoutError):
            host.tier._store.drain(0.05)
        held.signal.set()
        host.settle()
        assert host.tier._store.refused_jobs > 0 or host.tier._adapter.counters.snapshot().dropped_blocks


def test_steps_are_held_back_while_every_request_waits_for_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 3)
        host.store(context, keys)
        host.settle()
        host.forget_primary()
        host.manager.on_request_finished(context)
        held: list[float] = []
        monkeypatch.setattr(idle, "time", SimpleNamespace(sleep=held.append))
        host.step()
        assert not held  # no requests
        waiting, keys = host.request("text/2", 3)
        assert host.manager.lookup(keys[0], waiting) is LookupResult.HIT_PENDING
        host.step()
        assert held
        assert host.lookup(waiting, keys) == 3
        held.clear()
        host.step()
        assert not held  # all is in place
        host.forget_primary()
        running, _ = host.request("other text", 1)
        assert host.manager.lookup(keys[0], waiting) is LookupResult.HIT_PENDING
        host.settle()
        assert not held
        host.manager.on_request_finished(running)


def test_shutdown_with_jobs_in_work_lets_go_of_the_memory(tmp_path: Path) -> None:
    settings = config(tmp_path)
    host = Host(settings)
    held = Held(host.tier._adapter._adapter)
    context, keys = host.request("text", 4)
    host.store(context, keys)
    threading.Timer(0.1, held.signal.set).start()
    host.worker.shutdown()
    host.manager.shutdown()  # raises BufferError if anything still refers to the memory
    assert not Path(f"/dev/shm/vllm_offload_{settings.engine_id}.mmap").exists()


@pytest.mark.parametrize(
    ("changes", "tier", "error", "message"),
    [
        ({}, {"config": None}, ConfigError, "needs .config"),
        ({}, {"confg": "x"}, ConfigError, "did you mean config"),
        ({}, {"locality": "NEAR"}, ConfigError, "locality"),
        ({"kv_cache_layout": "BLHNC"}, {}, LayoutError, "BLHNC"),
        ({"canonical_layout": True}, {}, ConfigError, "canonical_layout"),
        ({"worker_kv_bytes_per_block": 4096}, {}, LayoutError, "bytes"),
        (
            {"parallel": OffloadingParallelConfig(0, 2, 2, 1, 1, 1, 0, 1, None, True)},
            {},
            ConfigError,
            "world size of 2",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(
    tmp_path: Path, changes: dict[str, Any], tier: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = {"config": str(write_config(tmp_path)), **tier}
    refused = offloading_config(write_model(tmp_path / "model"), settings, **changes)
    with pytest.raises(error, match=message), open_host(refused):
        pass
    assert not Path(f"/dev/shm/vllm_offload_{refused.engine_id}.mmap").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sliding_window": 64}, "sliding"),
        ({"kv_lora_rank": 16}, "MLA"),
        ({"num_key_value_heads": 4}, "bytes"),
    ],
)
def test_models_that_cannot_be_encoded_are_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    settings = {"config": str(write_config(tmp_path))}
    refused = offloading_config(write_model(tmp_path / "model", **model), settings)
    with pytest.raises(LayoutError, match=message), open_host(refused):
        pass

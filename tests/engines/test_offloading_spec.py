"""`KvtcOffloadingSpec`: its manager and its worker, driven as vLLM's connector drives them, on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

import torch
from offloading_host import (
    BLOCK_BYTES,
    BLOCKS_PER_CHUNK,
    CHUNK,
    Host,
    offloading_config,
    open_host,
    write_config,
    write_model,
)
from vllm.v1.kv_offload.base import CanonicalKVCaches, LookupResult

from dynamo_kvtc.adapters.vllm_offloading import KvtcOffloadingSpec, idle
from dynamo_kvtc.errors import ConfigError, LayoutError
from dynamo_kvtc.policy import OffloadPolicy

COPY = 32  # first block of the half of the cache that chunks are loaded into


def config(tmp_path: Path, *, ours: dict[str, Any] | None = None, **extra: Any) -> Any:
    model = write_model(tmp_path / "model")
    tiers = [
        {"kind": "host", "capacity": "64MiB"},
        {"kind": "disk", "path": str(tmp_path / "disk"), "capacity": "256MiB"},
    ]
    settings = {
        "spec_name": "KvtcOffloadingSpec",
        "spec_module_path": "dynamo_kvtc.adapters.vllm_offloading",
        "config": str(write_config(tmp_path, **{"tiers": tiers, **(ours or {})})),
        "load_buffer": "2MiB",
        **extra,
    }
    return offloading_config(model, {}, extra_config=settings)


def stored(host: Host, keys: list[Any]) -> None:
    """Wait until the tiers hold chunks that the worker has gathered."""
    store = host.manager._store
    deadline = time.monotonic() + 60
    while not all(store.holds(key[:-4]) for key in keys):
        assert time.monotonic() < deadline, "chunks are not stored"
        time.sleep(0.005)
    host.step()


def test_chunks_pass_through_compressed_tiers(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        host.fill()
        context, keys = host.request("text/1", 5)
        host.store(context, keys)
        stored(host, keys)
        host.manager.on_request_finished(context)
        again, keys = host.request("text/2", 6)
        assert host.lookup(again, keys) == 5
        # vLLM has the first three blocks; the second chunk is wanted from its middle.
        host.load(again, keys[1:5], COPY + BLOCKS_PER_CHUNK, skip=1)
        for layer in host.layers:
            assert torch.equal(layer[3:10], layer[COPY + 3 : COPY + 10])
            assert not torch.equal(layer[2], layer[COPY + 2])


def test_a_second_process_is_served_from_disk_and_stores_nothing_twice(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        host.store(context, keys)
        stored(host, keys)
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        assert host.lookup(context, keys) == 4
        host.load(context, keys, COPY)
        for layer in host.layers:
            assert torch.equal(layer[:8], layer[COPY : COPY + 8])
        output = host.manager.prepare_store(keys, context)
        assert output is not None and output.keys_to_store == []


def test_a_damaged_object_is_never_promised(tmp_path: Path) -> None:
    disk = {"tiers": [{"kind": "disk", "path": str(tmp_path / "disk"), "capacity": "256MiB"}]}
    settings = config(tmp_path, ours=disk)
    with open_host(settings) as host:
        host.fill()
        context, keys = host.request("text", 4)
        host.store(context, keys)
        stored(host, keys)
    for segment in (tmp_path / "disk").rglob("*"):
        if segment.is_file() and segment.stat().st_size > 1 << 16:
            data = bytearray(segment.read_bytes())
            middle = len(data.rstrip(b"\0")) // 2
            data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
            segment.write_bytes(data)
    with open_host(settings) as host:
        context, keys = host.request("text", 4)
        ready = host.lookup(context, keys)
        assert ready < 4
        host.load(context, keys[:ready], COPY)
        # What vLLM recomputes is stored again.
        output = host.manager.prepare_store(keys, context)
        assert output is not None and keys[ready] in output.keys_to_store


def test_the_buffer_bounds_what_is_promised(tmp_path: Path) -> None:
    chunk = BLOCKS_PER_CHUNK * BLOCK_BYTES
    with open_host(config(tmp_path, load_buffer=3 * chunk)) as host:
        context, keys = host.request("text/1", 5)
        host.store(context, keys)
        stored(host, keys)
        host.manager.on_request_finished(context)
        first, keys = host.request("text/2", 5)
        assert host.lookup(first, keys) == 3
        second, _ = host.request("text/3", 5)
        assert host.lookup(second, keys) == 3  # the same chunks, shared
        assert host.manager.lookup(keys[4], second) is LookupResult.MISS
        host.manager.on_request_finished(first)
        host.manager.on_request_finished(second)
        third, _ = host.request("text/4", 5)
        assert host.lookup(third, keys[3:]) == 2  # nobody counts on the others any more


def test_an_object_that_no_room_is_enough_for_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 4)
        host.store(context, keys)
        stored(host, keys)
        assert host.lookup(context, keys[:3]) == 3
        host.manager.on_request_finished(context)
        # As a buffer of held streams answers for an object that is larger than the whole of it.
        buffer = host.manager._shared.buffer
        monkeypatch.setattr(buffer, "could_hold", lambda nbytes: False)
        monkeypatch.setattr(buffer, "reserve", lambda nbytes: None)
        again, keys = host.request("text/2", 4)
        assert host.manager.lookup(keys[3], again) is LookupResult.MISS
        assert host.lookup(again, keys[:3]) == 3  # they are in the buffer still


def test_steps_are_held_back_while_every_request_waits_for_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 3)
        host.store(context, keys)
        stored(host, keys)
        host.manager.on_request_finished(context)
        held: list[float] = []
        monkeypatch.setattr(idle, "time", SimpleNamespace(sleep=held.append))

        def held_back() -> bool:
            held.clear()
            host.step()
            return bool(held)

        assert not held_back()  # no requests
        waiting, keys = host.request("text/2", 3)
        assert host.manager.lookup(keys[0], waiting) is LookupResult.HIT_PENDING
        assert held_back()
        assert not held_back()  # it was not asked for in this step: the request runs, or is gone
        assert host.lookup(waiting, keys) == 3
        host.manager.prepare_load(keys, waiting)
        assert held_back()
        running, _ = host.request("other text", 1)
        assert not held_back()
        host.manager.on_request_finished(running)
        host.manager.complete_load(keys, waiting)
        assert not held_back()


def test_reset_forgets_everything(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 3)
        host.store(context, keys)
        stored(host, keys)
        assert host.lookup(context, keys) == 3
        host.manager.reset_cache()
        assert host.lookup(context, keys) == 0


def test_the_recent_window_is_left_out(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        host.manager._shared.policy = OffloadPolicy(CHUNK, 4, CHUNK, 0)
        context, keys = host.request("text/1", 3)
        output = host.manager.prepare_store(keys, context)
        assert output is not None and output.keys_to_store == keys[:2]


def test_what_is_not_certain_is_neither_stored_nor_promised(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 2, positions=False)
        output = host.manager.prepare_store(keys, context)
        assert output is not None and output.keys_to_store == []
        assert host.manager.lookup(keys[0], context) is LookupResult.MISS


def test_events_and_metrics(tmp_path: Path) -> None:
    with open_host(config(tmp_path)) as host:
        context, keys = host.request("text/1", 3)
        host.store(context, keys)
        stored(host, keys)
        events = list(host.manager.take_events())
        assert {key for event in events for key in event.keys} == set(keys)
        deadline = time.monotonic() + 60
        while host.manager._shared.adapter.counters.snapshot().offloaded_blocks < 3:
            assert time.monotonic() < deadline, "chunks are stored and not counted"
            time.sleep(0.005)
        stats = host.manager.get_stats()
        assert stats is not None and stats.reduce()["vllm:kvtc_offloaded_blocks"] == 3
        assert set(stats.data["data"]) <= set(KvtcOffloadingSpec.build_metric_definitions({}))


def test_what_cannot_be_served_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another process"):
        KvtcOffloadingSpec(config(tmp_path)).get_manager()
    with pytest.raises(ConfigError, match="load_buffer"):
        KvtcOffloadingSpec(config(tmp_path, load_buffer="much"))
    with pytest.raises(ConfigError, match="at least one chunk"), open_host(config(tmp_path, load_buffer=1)):
        pass
    with pytest.raises(LayoutError, match="one page per layer"):
        KvtcOffloadingSpec(config(tmp_path)).get_worker(CanonicalKVCaches([], [[]]))
    with pytest.raises(ConfigError, match=r"needs .config"):
        KvtcOffloadingSpec(config(tmp_path, config=None))

"""The connector's worker side, hook by hook as vLLM calls it, with real tiers and tensors in a GPU's layout.

Only the attention backend's name is stood in for. No test measures time: what must not wait is called while
what it must not wait for is held up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm_configs import HEADS, LAYER, SIZE, TOKENS, engine_config, spec

from dynamo_kvtc.adapters.vllm import worker as worker_module
from dynamo_kvtc.adapters.vllm.metadata import KvtcConnectorMetadata, LoadJob, SaveJob
from dynamo_kvtc.adapters.vllm.prefill import CudaClock, HostClock, PrefillTimer
from dynamo_kvtc.adapters.vllm.settings import read_settings
from dynamo_kvtc.adapters.vllm.worker import KvtcWorker
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.events import EventLog
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.testing import TierWrapper

LAYERS, BLOCKS = 3, 16
#: Blocks of a sequence: two tier blocks of 64 tokens.
HASHES = tuple(bytes([index]) * 32 for index in range(4))
WAIT_S = 20


class Held(TierWrapper):
    """A tier whose reads from the `after`th on, or whose writes, wait until they are let go."""

    after: int | None = None
    writes = False
    gets = 0
    go = threading.Event()

    async def get(self, reads: Any, *, timeout_s: float) -> None:
        Held.gets += 1
        if Held.after is not None and Held.gets > Held.after:
            while not Held.go.is_set():
                await asyncio.sleep(0.005)
        await super().get(reads, timeout_s=timeout_s)

    async def put(self, *arguments: Any, **named: Any) -> bool:
        while Held.writes and not Held.go.is_set():
            await asyncio.sleep(0.005)
        return await super().put(*arguments, **named)


class Host:
    """A worker with a cache; calls its hooks in vLLM's order."""

    def __init__(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtc.yaml"
        path.write_text(
            "codec: {profile: raw}\ntiers:\n  - {kind: host, capacity: 16MiB}\n"
            "policy: {tier_block_tokens: 64, recent_window: 0, minimum_tokens: 0}\n"
        )
        config = engine_config(tmp_path, path)
        names = [LAYER.format(index) for index in range(LAYERS)]
        group = KVCacheGroupSpec(names, spec())
        cache = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[group])
        backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
        config.compilation_config.static_forward_context = {
            name: SimpleNamespace(attn_backend=backend) for name in names
        }
        self.names = names
        self.caches = {name: torch.randn(BLOCKS, HEADS, TOKENS, 2 * SIZE) for name in names}
        self.worker = KvtcWorker(read_settings(config, cache), config, cache)
        self.worker.register_kv_caches(self.caches)

    def step(self, *, deferred: bool = False, finished: tuple[str, ...] = (), **metadata: Any) -> Any:
        """Make a step as vLLM does (`deferred`: when it speculates); returns what `get_finished` says."""
        told = KvtcConnectorMetadata(**metadata)
        layerwise = any(job.layerwise for job in told.loads)
        self.worker.begin_step(told)
        if layerwise:
            self.worker.start_load_kv(told)
        if told.computes:
            for name in self.names:
                self.worker.wait_for_layer_load(name)
        if not layerwise:
            self.worker.start_load_kv(told)
        if not deferred:
            self.worker.wait_for_save(told)
        result = self.worker.get_finished(set(finished))
        if deferred:
            self.worker.wait_for_save(told)
        return result

    def until(self, done: Any, **metadata: Any) -> Any:
        for _ in range(WAIT_S * 200):
            found = self.step(**metadata)
            if done(found):
                return found
            threading.Event().wait(0.005)
        raise AssertionError("it never came to be")

    @property
    def speeds(self) -> dict[str, Any]:
        assert self.worker._adapter is not None
        return dict(self.worker._adapter.status().speeds)


def save(req_id: str = "s", first: int = 0) -> SaveJob:
    return SaveJob(req_id, first, HASHES, (1, 2, 3, 4), b"", 4 * TOKENS)


def load(*, layerwise: bool = False) -> LoadJob:
    return LoadJob("l", 0, HASHES, (5, 6, 7, 8), b"", layerwise)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(Held, "after", None)
    monkeypatch.setattr(Held, "writes", False)
    monkeypatch.setattr(Held, "gets", 0)
    monkeypatch.setattr(Held, "go", threading.Event())
    monkeypatch.setattr(worker_module, "open_adapter", lambda *a, **k: open_adapter(*a, **k, wrap_tier=Held))
    made = Host(tmp_path)
    yield made
    Held.go.set()
    made.worker.shutdown()


def stored(host: Host) -> None:
    host.step(saves=[save()], computes=True)
    adapter = host.worker._adapter
    assert adapter is not None
    for _ in range(WAIT_S * 200):
        if adapter.counters.snapshot().offloaded_blocks == 2:
            return
        threading.Event().wait(0.005)
    raise AssertionError("nothing was stored")


def held_copying(host: Host) -> tuple[ThreadedTierAdapter, threading.Event]:
    """Keep the threads that copy blocks out busy until the event is set."""
    adapter, go = host.worker._adapter, threading.Event()
    assert adapter is not None
    for _ in range(adapter._adapter._offload_threads._max_workers):
        adapter._adapter._offload_threads.submit(go.wait, WAIT_S)
    return adapter, go


def assert_loaded(host: Host) -> None:
    for cache in host.caches.values():
        assert torch.equal(cache[5:9], cache[1:5])


def test_a_layer_is_waited_for_and_no_other(host: Host) -> None:
    stored(host)
    Held.after = 3  # the headers, and the first layer of each tier block
    told = KvtcConnectorMetadata(loads=[load(layerwise=True)], computes=True)
    host.worker.begin_step(told)
    host.worker.start_load_kv(told)
    host.worker.wait_for_layer_load(host.names[0])
    first = host.caches[host.names[0]]
    assert torch.equal(first[5:9], first[1:5])
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(host.worker.wait_for_layer_load, host.names[1])
        with pytest.raises((TimeoutError, FutureTimeoutError)):
            second.result(0.3)
        Held.go.set()
        second.result(WAIT_S)
    cache = host.caches[host.names[1]]
    assert torch.equal(cache[5:9], cache[1:5])
    host.worker.wait_for_save(told)
    assert host.worker.get_finished(set()) == (set(), set()) and not host.worker.take_failed_blocks()
    assert_loaded(host)


def test_a_step_does_not_wait_for_what_it_saves(host: Host) -> None:
    """Neither while the tier takes no writes, nor while nothing is even copied out."""
    Held.writes = True
    adapter, copying = held_copying(host)
    host.step(saves=[save()], computes=True)
    assert host.worker.report() is None
    # Its blocks may not be reused while they are not copied out; then they may, though nothing is stored.
    assert host.step(finished=("s",), finishing={"s"}) == (set(), set())
    copying.set()
    host.until(lambda found: found == ({"s"}, set()))
    assert adapter.counters.snapshot().offloaded_blocks == 0
    Held.go.set()


def test_with_speculative_decoding_blocks_are_kept_until_they_are_copied_out(host: Host) -> None:
    """There vLLM asks what is finished before it calls `wait_for_save`."""
    _, copying = held_copying(host)
    host.step(saves=[save()], computes=True, deferred=True)
    for _ in range(3):
        assert host.step(finished=("s",), finishing={"s"}, deferred=True) == (set(), set())
    copying.set()
    host.until(lambda found: found == ({"s"}, set()), deferred=True)


def test_with_speculative_decoding_a_failed_layer_is_told_in_its_own_step(host: Host) -> None:
    told = KvtcConnectorMetadata(loads=[load(layerwise=True)], computes=True)  # nothing is stored
    host.worker.begin_step(told)
    host.worker.start_load_kv(told)
    for name in host.names:
        host.worker.wait_for_layer_load(name)
    host.worker.get_finished(set())
    assert host.worker.take_failed_blocks() == {5, 6, 7, 8}


@pytest.mark.parametrize("deferred", [False, True])
def test_only_steps_that_wait_for_loads_alone_are_held_back(
    host: Host, monkeypatch: pytest.MonkeyPatch, deferred: bool
) -> None:
    """The engine would spin and take the interpreter from the threads that decode."""
    slept: list[float] = []
    monkeypatch.setattr(
        worker_module, "time", SimpleNamespace(sleep=slept.append, monotonic=worker_module.time.monotonic)
    )
    stored(host)
    host.step()  # nothing to wait for
    assert slept == []
    Held.after = 0
    host.step(loads=[load()], deferred=deferred)
    assert slept == [0.002]
    for _ in range(5):
        assert host.step(computes=True, deferred=deferred) == (set(), set())
    assert slept == [0.002]
    host.step(deferred=deferred)
    assert slept == [0.002, 0.002]
    Held.go.set()
    host.until(lambda found: found[1] == {"l"}, computes=True)
    slept.clear()
    host.step(deferred=deferred)
    assert slept == []
    assert_loaded(host)


def test_steps_that_wait_for_events_alone_are_held_back_too(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(
        worker_module, "time", SimpleNamespace(sleep=slept.append, monotonic=worker_module.time.monotonic)
    )
    adapter = host.worker._adapter
    assert adapter is not None

    async def watch(tiers: TierAdapter) -> EventLog:
        return tiers.watch()

    host.worker._events = adapter.run(watch)
    Held.writes = True
    host.step(saves=[save()], computes=True)
    host.step(computes=True)
    assert slept == []
    host.step()
    assert slept == [0.002]
    Held.go.set()
    for _ in range(WAIT_S * 200):
        told = host.worker.report()
        if told is not None and told.pending == 0:
            break
        threading.Event().wait(0.005)
    slept.clear()
    host.step()
    assert slept == []


def test_passes_over_prompt_tokens_alone_tell_the_prefill_speed(host: Host) -> None:
    assert host.speeds["prefill"] is None
    host.step(computes=True)  # decodes, or does both
    host.step(computes=True, prefill_tokens=63)  # less than a tier block
    host.step()
    assert host.speeds["prefill"] is None
    stored(host)
    Held.after = 0
    host.step(loads=[load()])
    host.step(computes=True, prefill_tokens=64)  # decoding for the load takes its cores
    assert host.speeds["prefill"] is None
    Held.go.set()
    host.until(lambda found: found[1] == {"l"}, computes=True)
    host.step(computes=True, prefill_tokens=64)
    assert host.speeds["prefill"] > 0


def test_times_are_those_between_the_marks() -> None:
    moments = iter([10.0, 10.5, 20.0, 20.1])
    clock = HostClock()
    clock.mark = lambda: next(moments)  # type: ignore[method-assign]
    timer = PrefillTimer(clock, 64)
    timer.start(128)
    timer.stop()
    timer.stop()  # again, by a later hook
    timer.start(63)
    timer.stop()
    assert timer.take() == [(128, 0.5)]
    timer.start(64)
    timer.start(0)  # the pass never ended as one of prompt tokens
    timer.stop()
    assert timer.take() == []


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events, the edge of what cannot be here, are stood in for."""

    class Event:
        done = False

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def query(self) -> bool:
            return Event.done

        def elapsed_time(self, other: Event) -> float:
            assert Event.done
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = PrefillTimer(CudaClock(), 64)
    for _ in range(40):
        timer.start(100)
        timer.stop()
        assert timer.take() == []
    Event.done = True
    assert timer.take() == [(100, 0.25)] * 16

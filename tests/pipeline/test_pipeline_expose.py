"""The endpoint of a running adapter: what its work looks like from outside."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rig import open_rig

from dynamo_kvtc.errors import TierClosedError
from dynamo_kvtc.pipeline.expose import expose, status_reader


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


async def test_the_work_of_an_adapter_is_seen_through_its_endpoint(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        port = expose(rig.adapter, "127.0.0.1", 0).port
        blocks = rig.sequence(64)
        await rig.store(blocks)
        assert await rig.adapter.lookup(blocks.hashes) == 64
        await rig.adapter.onboard(blocks, rig.destination).wait()
        text = await asyncio.to_thread(fetch, port, "/metrics")
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["dynamo_kvtc_compression_ratio",] > 1
        assert values["dynamo_kvtc_lookup_hit_tokens_total",] == 64
        assert values["dynamo_kvtc_onboarded_tokens_total",] == 64
        assert values["dynamo_kvtc_onboards_total", "complete"] == 1
        assert values["dynamo_kvtc_onboard_seconds_count",] == 1
        assert values["dynamo_kvtc_onboard_first_layer_seconds_count",] == 1
        assert values["dynamo_kvtc_tier_written_bytes_total", "host"] > 0
        status = json.loads(await asyncio.to_thread(fetch, port, "/status"))
        assert status["tiers"]["disk"]["objects"] == 2
        # No key, hash or salt of a request leaves the process.
        assert not any(key.hex() in text for key in rig.adapter.keys(blocks.hashes))


async def test_a_failed_onboard_is_counted_by_its_error(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        await rig.adapter.tiers.evict(rig.adapter.keys(blocks.hashes)[1:])
        with pytest.raises(Exception, match="recomputed"):
            await rig.adapter.onboard(blocks, rig.destination).wait()
        snapshot = rig.adapter.status().counters
        assert snapshot.onboards == {"complete": 0, "partial": 1, "failed": 0}
        assert snapshot.errors == {"ObjectMissingError": 1}


async def test_a_reader_of_a_closed_adapter_is_told(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        read = await asyncio.to_thread(asyncio.run, _reader_of_a_gone_loop(rig.adapter))
        with pytest.raises(TierClosedError):
            read()


async def _reader_of_a_gone_loop(adapter: object) -> object:
    return status_reader(adapter)

"""Requests in vLLM's own classes: what tells their blocks apart, and what events say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request
from vllm_configs import cache_config, engine_config

from dynamo_kvtc.adapters.vllm.events import EventTranslator
from dynamo_kvtc.adapters.vllm.scheduler import KvtcScheduler, request_salt
from dynamo_kvtc.adapters.vllm.settings import read_settings
from dynamo_kvtc.pipeline.events import TierEvent
from dynamo_kvtc.tiers.base import Namespace

BLOCK, TIER_BLOCK = 32, 64


def request(tokens: int = 200, **options: Any) -> Request:
    init_none_hash(sha256)
    return Request(
        options.pop("request_id", "r"),
        list(range(tokens)),
        SamplingParams(max_tokens=4),
        None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        **options,
    )


def image(identifier: str) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset=70, length=10)
    )


def key_of(one: Request, block: int) -> bytes:
    """Return the tier key under which a block of a request would be stored."""
    return Namespace(b"artifact", "layout", request_salt(one, "model")).key(one.block_hashes[block])


def test_what_is_another_request_has_other_keys() -> None:
    """Adapters, salts and images: from the first block on that differs, and only from there."""
    plain = request()
    adapter = LoRARequest("a", 1, "/adapters/a")
    others = {
        "adapter": request(lora_request=adapter),
        "another adapter": request(lora_request=LoRARequest("b", 2, "/adapters/b")),
        "an adapter of the same name from elsewhere": request(lora_request=LoRARequest("a", 1, "/new/a")),
        "salt": request(cache_salt="tenant"),
        "another salt": request(cache_salt="other"),
        "image": request(mm_features=[image("one")]),
        "another image": request(mm_features=[image("two")]),
    }
    last = [key_of(one, 5) for one in (plain, *others.values())]
    assert len(set(last)) == len(last)
    # The same again is the same.
    assert key_of(request(lora_request=adapter), 5) == key_of(others["adapter"], 5)
    assert key_of(request(mm_features=[image("one")]), 5) == key_of(others["image"], 5)
    # The image lies in the third block; the text before it is shared with requests that have none.
    assert key_of(others["image"], 1) == key_of(plain, 1) and key_of(others["image"], 2) != key_of(plain, 2)
    assert key_of(others["salt"], 0) != key_of(plain, 0) != key_of(others["adapter"], 0)


@pytest.mark.parametrize(("tier", "medium"), [("host0", "CPU"), ("disk1", "STORAGE"), ("object2", "STORAGE")])
def test_events_say_what_a_router_needs(tier: str, medium: str) -> None:
    one = request(lora_request=LoRARequest("a", 7, "/adapters/a"), cache_salt="tenant")
    translator = EventTranslator(BLOCK, TIER_BLOCK)
    translator.describe(one, range(3))
    hashes = list(one.block_hashes)
    translator.add([TierEvent(hashes[2 * index + 1], tier, True) for index in range(3)])
    events = translator.take()
    assert all(isinstance(event, BlockStored) for event in events)
    for index, event in enumerate(events):
        start = index * TIER_BLOCK
        assert event.medium == medium and event.block_size == BLOCK
        assert event.token_ids == list(range(start, start + TIER_BLOCK))
        assert len(event.block_hashes) == 2
        assert (event.lora_id, event.lora_name, event.group_idx) == (7, "a", 0)
    # Each begins where the one before it ends: a router can put them together.
    parents = [event.parent_block_hash for event in events]
    assert parents == [None, events[0].block_hashes[-1], events[1].block_hashes[-1]]
    # The salt stands in the first block's keys, as in vLLM's own events.
    assert "tenant" in str(events[0].extra_keys[0]) and "tenant" not in str(events[1].extra_keys)
    translator.add([TierEvent(hashes[1], tier, False)])
    (gone,) = translator.take()
    assert isinstance(gone, BlockRemoved)
    assert (gone.block_hashes, gone.medium) == (events[0].block_hashes, medium)
    assert translator.take() == []


def test_nothing_is_said_of_what_is_not_known() -> None:
    translator = EventTranslator(BLOCK, TIER_BLOCK, limit=1)
    one = request()
    translator.describe(one, range(2))  # the first is forgotten again
    translator.add([TierEvent(one.block_hashes[1], "host0", True), TierEvent(b"unknown", "host0", False)])
    assert translator.take() == []


def test_a_pass_over_prompt_tokens_alone_is_known_as_one(tmp_path: Path) -> None:
    path = tmp_path / "kvtc.yaml"
    path.write_text("codec: {profile: raw}\ntiers:\n  - {kind: host, capacity: 1MiB}\n")
    side = KvtcScheduler(read_settings(engine_config(tmp_path, path), cache_config()))
    one, other = request(200, request_id="one"), request(100, request_id="other")

    def tokens(**scheduled: int) -> int:
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = scheduled
        metadata = side.build_connector_meta(output)
        assert metadata.computes == bool(scheduled)
        return metadata.prefill_tokens

    assert tokens(one=128) == 0  # a request that it has never heard of
    side.get_num_new_matched_tokens(one, 200)
    side.get_num_new_matched_tokens(other, 100)
    assert (tokens(one=128), tokens(one=128, other=100), tokens()) == (128, 228, 0)
    one.num_computed_tokens = 128
    assert (tokens(one=72), tokens(one=72, other=64)) == (72, 136)
    one.num_computed_tokens = 200  # it decodes from here on
    assert (tokens(one=1), tokens(one=1, other=100)) == (0, 0)
    side.shutdown()

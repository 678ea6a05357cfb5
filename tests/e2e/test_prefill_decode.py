"""Prefill and decode apart: our tier serves the prefill side, and decode takes everything over NIXL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from answers import assert_same, whole_tier_blocks
from connectors import Connector, kvtc, multi, nixl, offloading, wait_until_stored, write_config
from conversations import first_turn, next_turn


@pytest.mark.parametrize(
    "ours",
    [pytest.param(kvtc, marks=pytest.mark.e2e_ci, id="kvtc"), pytest.param(offloading, id="offloading")],
)
def test_a_new_prefill_process_is_served_from_what_an_earlier_one_stored(
    deploy, tmp_path: Path, ours: Callable[[Path], Connector]
) -> None:
    tier = ours(write_config(tmp_path / "kvtc.yaml", tmp_path / "tier"))
    both = multi("kv_producer", nixl("kv_producer"), tier)
    deployment = deploy()
    settings = {"mode": "prefill", "kv_transfer": both, "dtype": "float32"}
    prefill = deployment.start("prefill", **settings)
    decode = deployment.start("decode", mode="decode", kv_transfer=nixl("kv_consumer"), dtype="float32")
    deployment.wait_ready(prefill, decode)
    messages = first_turn(0)
    first = deployment.chat(messages)
    assert prefill.counters().prompt_tokens().computed == first.prompt_tokens
    assert decode.counters().prompt_tokens().external == first.prompt_tokens
    messages = next_turn(messages, first.text)
    expected = deployment.chat(messages)

    wait_until_stored(tmp_path / "tier", whole_tier_blocks(first.prompt_tokens), element_bytes=4)
    prefill.kill()
    prefill = deployment.worker("second-prefill", **settings)
    before = decode.counters().prompt_tokens()
    answer = deployment.chat(messages)
    sources = prefill.counters().prompt_tokens()
    assert sources.external == whole_tier_blocks(first.prompt_tokens)
    assert sources.computed == answer.prompt_tokens - sources.external
    # Decode computes nothing: what its own cache has not, NIXL brings.
    delta = decode.counters().prompt_tokens() - before
    assert delta.computed == 0
    assert delta.local_cache + delta.external == answer.prompt_tokens
    assert_same(answer, expected)

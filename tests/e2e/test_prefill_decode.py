"""Prefill and decode apart: our tier serves the prefill side, and decode takes everything over NIXL."""

from __future__ import annotations

from pathlib import Path

from connectors import nixl
from conversations import first_turn


def test_decode_takes_the_whole_prompt_over_nixl(deploy, tmp_path: Path) -> None:
    deployment = deploy()
    prefill = deployment.start("prefill", mode="prefill", kv_transfer=nixl("kv_producer"))
    decode = deployment.start("decode", mode="decode", kv_transfer=nixl("kv_consumer"))
    deployment.wait_ready(prefill, decode)
    answer = deployment.chat(first_turn(0))
    assert prefill.counters().prompt_tokens().computed == answer.prompt_tokens
    sources = decode.counters().prompt_tokens()
    print(sources, answer)
    assert sources.external >= answer.prompt_tokens - 1

"""The harness itself, with a connector that vLLM brings: what the other tests rely on."""

from __future__ import annotations

from pathlib import Path

from conversations import first_turn


def test_a_killed_worker_is_replaced_and_its_counters_tell_who_served(deploy, tmp_path: Path) -> None:
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
    }
    deployment = deploy()
    messages = first_turn(0)
    worker = deployment.worker("first", kv_transfer=example)
    before = deployment.chat(messages)
    assert worker.counters().prompt_tokens().computed == before.prompt_tokens
    worker.kill()
    worker = deployment.worker("second", kv_transfer=example)
    again = deployment.chat(messages)
    sources = worker.counters().prompt_tokens()
    assert sources.external > 1000
    assert sources.computed + sources.external == again.prompt_tokens
    assert again.cached_tokens == sources.external

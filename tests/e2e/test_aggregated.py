"""One kind of worker that prefills and decodes, with our disk tier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from answers import assert_same, whole_tier_blocks
from connectors import (
    ONE_PROCESS,
    Connector,
    kvtc,
    offloading,
    offloading_spec,
    wait_until_stored,
    write_config,
)
from conversations import first_turn, next_turn


@pytest.mark.parametrize(
    ("ours", "environment"),
    [
        pytest.param(kvtc, {}, marks=pytest.mark.e2e_ci, id="kvtc"),
        pytest.param(offloading, {}, id="offloading-tier"),
        pytest.param(offloading_spec, ONE_PROCESS, id="offloading-spec"),
    ],
)
def test_a_conversation_goes_on_after_its_worker_was_killed(
    deploy, tmp_path: Path, ours: Callable[[Path], Connector], environment: dict[str, str]
) -> None:
    """The next worker serves the document from the disk tier, and says what the first one would have said."""
    transfer = ours(write_config(tmp_path / "kvtc.yaml", tmp_path / "tier"))
    deployment = deploy()
    settings = {"kv_transfer": transfer, "dtype": "float32", "environment": environment}
    worker = deployment.worker("first", **settings)
    messages = first_turn(0)
    first = deployment.chat(messages)
    assert worker.counters().prompt_tokens().computed == first.prompt_tokens
    messages = next_turn(messages, first.text)
    expected = deployment.chat(messages)

    wait_until_stored(tmp_path / "tier", whole_tier_blocks(first.prompt_tokens), element_bytes=4)
    worker.kill()
    worker = deployment.worker("second", **settings)
    answer = deployment.chat(messages)
    sources = worker.counters().prompt_tokens()
    assert sources.external == answer.cached_tokens == whole_tier_blocks(first.prompt_tokens)
    assert sources.local_cache == 0
    assert_same(answer, expected)


def test_every_turn_may_be_served_by_another_worker(deploy, tmp_path: Path) -> None:
    """What one worker loaded and went on from, the next one finds on the disk, whole."""
    transfer = kvtc(write_config(tmp_path / "kvtc.yaml", tmp_path / "tier"))
    deployment = deploy()
    messages, least, most = first_turn(1), 0, 0
    for turn in range(3):
        worker = deployment.worker(f"turn-{turn}", kv_transfer=transfer)
        answer = deployment.chat(messages, max_tokens=60)
        sources = worker.counters().prompt_tokens()
        assert least <= sources.external <= most
        assert sources.external == whole_tier_blocks(sources.external) == answer.cached_tokens
        assert sources.computed == answer.prompt_tokens - sources.external
        # The prompt's tier blocks are stored for certain, one that the answer filled up perhaps.
        least = whole_tier_blocks(answer.prompt_tokens)
        most = whole_tier_blocks(answer.prompt_tokens + len(answer.logprobs))
        wait_until_stored(tmp_path / "tier", least, element_bytes=2)
        worker.kill()
        messages = next_turn(messages, answer.text, "And what happens next?")

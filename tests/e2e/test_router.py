"""Two workers and the KV router: our STORAGE events tell it which worker's disk tier holds a prefix."""

from __future__ import annotations

from pathlib import Path

from answers import whole_tier_blocks
from connectors import kvtc, wait_until_stored, write_config
from conversations import first_turn, next_turn

CONVERSATIONS = 5

#: Blocks of 128 tokens: a prompt of ten fits, and two more push it out.
SMALL_CACHE = ("--num-gpu-blocks-override", "20", "--max-model-len", "2048")


def _second_turns(deploy, tmp_path: Path, *router: str) -> tuple[list[int], int]:
    """Fill one worker's tier, add an empty worker, go on; return who served each turn, and tokens from tiers.

    The first worker's own cache has forgotten all conversations but the last when the second worker comes, so
    it is no better a choice but for its tier.
    """
    deployment = deploy(*router)

    def start(name: str):
        config = write_config(tmp_path / f"{name}.yaml", tmp_path / f"tier-{name}")
        return deployment.worker(name, kv_transfer=kvtc(config), arguments=SMALL_CACHE)

    workers = [start("first")]
    conversations = []
    for index in range(CONVERSATIONS + 2):
        messages = first_turn(index)
        conversations.append(next_turn(messages, deployment.chat(messages).text))
    wait_until_stored(tmp_path / "tier-first", CONVERSATIONS * 1024, element_bytes=2)
    workers.append(start("second"))
    deployment.frontend.wait_for_workers(2, timeout_s=120)
    chosen, served = [], 0
    for messages in conversations[:CONVERSATIONS]:
        before = [worker.counters().prompt_tokens() for worker in workers]
        deployment.chat(messages)
        deltas = [
            worker.counters().prompt_tokens() - old for worker, old in zip(workers, before, strict=True)
        ]
        (index,) = [index for index, delta in enumerate(deltas) if delta.computed]
        assert not deltas[index].local_cache
        chosen.append(index)
        served += deltas[index].external
    return chosen, served


def test_the_second_turn_goes_to_the_worker_whose_tier_holds_the_prefix(deploy, tmp_path: Path) -> None:
    chosen, served = _second_turns(deploy, tmp_path)
    assert chosen == [0] * CONVERSATIONS
    assert served >= CONVERSATIONS * whole_tier_blocks(1024)


def test_without_credit_for_disk_events_it_goes_anywhere(deploy, tmp_path: Path) -> None:
    """The control: everything as above, but the router gives nothing for STORAGE events."""
    chosen, _ = _second_turns(deploy, tmp_path, "--router-disk-cache-hit-weight", "0")
    assert 1 in chosen

"""Our store breaks while requests run: every answer is right, and none hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answers import assert_same, whole_tier_blocks
from connectors import kvtc, wait_until_stored, write_config
from conversations import first_turn

DOCUMENTS = 3

#: Many small files, so that new ones are needed while the fault lasts.
SEGMENT = "16MiB"


def _delete(tier: Path) -> None:
    shutil.rmtree(tier)


def _damage(tier: Path) -> None:
    for path in tier.glob("segment-*"):
        with path.open("r+b") as file:
            size = path.stat().st_size
            for offset in range(4096, size, 65_536):
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 0xFF]))


def _truncate(tier: Path) -> None:
    for path in tier.glob("segment-*"):
        os.truncate(path, path.stat().st_size // 3)


FAULTS: dict[str, Callable[[Path], None]] = {"deleted": _delete, "damaged": _damage, "cut": _truncate}


class Conversations:
    """Documents whose first answers were computed; all later answers must be the same."""

    def __init__(self, deployment, worker) -> None:
        self._deployment, self._worker = deployment, worker
        self.prompts = [first_turn(index) for index in range(DOCUMENTS)]
        self.expected = [deployment.chat(messages) for messages in self.prompts]
        self.stored = sum(whole_tier_blocks(answer.prompt_tokens) for answer in self.expected)

    def ask_all(self) -> int:
        """Ask everything again, at the same time; returns how many tokens the tier served."""
        before = self._worker.counters().prompt_tokens()
        with ThreadPoolExecutor(DOCUMENTS) as pool:
            answers = list(pool.map(self._deployment.chat, self.prompts))
        for answer, expected in zip(answers, self.expected, strict=True):
            assert_same(answer, expected)
        return (self._worker.counters().prompt_tokens() - before).external

    def ask_while(self, fault: Callable[[], None]) -> None:
        """Ask everything again, and let the fault happen while the requests run."""
        with ThreadPoolExecutor(DOCUMENTS) as pool:
            running = [pool.submit(self._deployment.chat, messages) for messages in self.prompts]
            fault()
            for request, expected in zip(running, self.expected, strict=True):
                assert_same(request.result(), expected)


def _worker(deployment, tmp_path: Path, tier: Path, **changes):
    config = write_config(tmp_path / "kvtc.yaml", tier, **changes)
    # Without vLLM's own cache every repeated request asks the tier.
    return deployment.worker("worker", kv_transfer=kvtc(config), dtype="float32", prefix_caching=False)


def _asked_once(deployment, tmp_path: Path, tier: Path) -> Conversations:
    """Start a worker and ask everything once, until the tier has it all."""
    conversations = Conversations(deployment, _worker(deployment, tmp_path, tier, tiers=_disk(tier)))
    wait_until_stored(tier, conversations.stored, element_bytes=4)
    return conversations


def _disk(tier: Path, capacity: str = "2GiB") -> list[dict[str, str]]:
    return [{"kind": "disk", "path": str(tier), "capacity": capacity, "segment_size": SEGMENT}]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_store_breaks_under_a_running_worker(deploy, tmp_path: Path, fault: str) -> None:
    tier = tmp_path / "tier"
    deployment = deploy()
    conversations = _asked_once(deployment, tmp_path, tier)
    assert conversations.ask_all() == conversations.stored
    conversations.ask_while(lambda: FAULTS[fault](tier))
    # What is lost is computed, and may be stored again; in the end the tier serves or misses, as it can.
    conversations.ask_all()
    conversations.ask_all()


@contextlib.contextmanager
def _read_only(tier: Path) -> Iterator[None]:
    """Let nobody create or write files in a folder; root needs more than permissions for that."""
    places = [tier, *tier.iterdir()]
    if os.geteuid() != 0:
        for place in places:
            place.chmod(0o500)
        yield
        for place in places:
            place.chmod(0o700)
        return
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", *places], check=False).returncode:
        pytest.skip("root can make nothing read-only here: chattr is missing or not allowed")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *places], check=True)


def test_the_store_is_made_read_only(deploy, tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    deployment = deploy()
    conversations = _asked_once(deployment, tmp_path, tier)
    with _read_only(tier):
        conversations.ask_while(lambda: None)
        for index in range(DOCUMENTS, DOCUMENTS + 2):
            deployment.chat(first_turn(index))  # cannot be stored
        conversations.ask_all()
    assert conversations.ask_all() > 0


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB: one document in float32 takes 57 MB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_store_is_filled_up(deploy, tmp_path: Path, small_file_system: Path) -> None:
    """The file system is smaller than the capacity that was promised."""
    tier = small_file_system / "tier"
    deployment = deploy()
    conversations = Conversations(deployment, _worker(deployment, tmp_path, tier, tiers=_disk(tier)))
    conversations.ask_while(lambda: None)
    assert conversations.ask_all() < conversations.stored


def test_a_capacity_that_holds_one_document(deploy, tmp_path: Path) -> None:
    """The tier's own limit: documents push each other out while they are asked for."""
    tier = tmp_path / "tier"
    deployment = deploy()
    tiers = _disk(tier, capacity="80MiB")
    conversations = Conversations(deployment, _worker(deployment, tmp_path, tier, tiers=tiers))
    for _ in range(3):
        conversations.ask_while(lambda: None)


def test_a_worker_with_its_tier_is_killed_while_requests_run(deploy, tmp_path: Path) -> None:
    """Dynamo sends the requests on to the other worker; a new one is served from what the dead one stored."""
    deployment = deploy("--migration-limit", "3")
    workers = {}
    for name in ("first", "second"):
        config = write_config(tmp_path / f"{name}.yaml", tmp_path / f"tier-{name}")
        workers[name] = deployment.start(
            name, kv_transfer=kvtc(config), dtype="float32", prefix_caching=False
        )
    deployment.wait_ready(*workers.values())
    deployment.frontend.wait_for_workers(2, timeout_s=120)
    prompts = [first_turn(index) for index in range(DOCUMENTS)]
    with ThreadPoolExecutor(DOCUMENTS) as pool:  # at once, so that both workers get some
        expected = list(pool.map(deployment.chat, prompts))
    assert workers["first"].counters().prompt_tokens().computed
    stored = min(whole_tier_blocks(answer.prompt_tokens) for answer in expected)
    wait_until_stored(tmp_path / "tier-first", stored, element_bytes=4)
    with ThreadPoolExecutor(DOCUMENTS) as pool:
        running = [pool.submit(deployment.chat, messages) for messages in prompts]
        workers["first"].kill()
        for request, answer in zip(running, expected, strict=True):
            assert_same(request.result(), answer)
    workers["second"].stop()
    again = deployment.worker(
        "again",
        kv_transfer=kvtc(tmp_path / "first.yaml"),
        dtype="float32",
        prefix_caching=False,
    )
    for messages, answer in zip(prompts, expected, strict=True):
        assert_same(deployment.chat(messages), answer)
    assert again.counters().prompt_tokens().external >= stored

"""The lookup service, over real sockets."""

import asyncio
import os
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import Rig, open_rig

from dynamo_kvtc.errors import ConfigError, LookupServiceError
from dynamo_kvtc.pipeline import frames
from dynamo_kvtc.pipeline.lookup_client import LookupClient, Lookups
from dynamo_kvtc.pipeline.lookup_service import LookupService, socket_path
from dynamo_kvtc.tiers.breaker import CircuitBreaker


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return socket_path("an engine")


@pytest.fixture
async def rig(tmp_path: Path, path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        service = LookupService(rig.adapter, path)
        await service.start()
        yield rig
        await service.close()
        assert not path.exists()


async def test_a_lookup_from_another_thread_finds_what_the_adapter_finds(rig: Rig, path: Path) -> None:
    blocks = rig.sequence(64, salt=b"mine")
    await rig.store(blocks)
    client = LookupClient(path)
    assert await asyncio.to_thread(client.lookup, blocks.hashes, salt=b"mine", timeout_s=10) == 64
    assert await asyncio.to_thread(client.lookup, blocks.hashes, salt=b"", timeout_s=10) == 0
    asked = {"salt": b"mine", "have_tokens": 64, "timeout_s": 10}
    assert await asyncio.to_thread(client.lookup, blocks.hashes, **asked) == 0  # nothing beyond them
    await asyncio.to_thread(client.reset, timeout_s=10)
    assert await asyncio.to_thread(client.lookup, blocks.hashes, salt=b"mine", timeout_s=10) == 0
    client.close()


def test_folder_and_socket_are_the_users_own(path: Path, tmp_path: Path) -> None:
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(str(socket_path("x" * 500)).removeprefix(str(tmp_path))) < 60
    path.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        socket_path("an engine")


async def test_the_socket_is_closed_to_others(rig: Rig, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as another user")
async def test_another_user_gets_no_answer_whatever_the_file_modes() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        async with open_rig(Path(folder)) as rig:
            blocks = rig.sequence(64)
            await rig.store(blocks)
            path = Path(folder) / "open" / "socket"
            path.parent.mkdir()
            service = LookupService(rig.adapter, path)
            await service.start()
            for opened in (folder, path.parent, path):
                Path(opened).chmod(0o777)
            request = frames.encode({"op": "lookup", **frames.pack_hashes(blocks.hashes)})
            answers = []
            for user in (0, 65_534):
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(10)
                    # The kernel notes who connects.
                    os.seteuid(user)
                    try:
                        connection.connect(str(path))
                    finally:
                        os.seteuid(0)
                    connection.sendall(request)
                    answers.append(await asyncio.to_thread(_receive, connection))
            assert answers[0] and not answers[1]
            await service.close()


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1000)
    except ConnectionError:
        return b""


async def test_a_service_takes_the_place_of_one_that_died(rig: Rig, path: Path) -> None:
    again = LookupService(rig.adapter, path)
    await again.start()
    client = LookupClient(path)
    assert await asyncio.to_thread(client.lookup, [b"x"], timeout_s=10) == 0
    client.close()
    await again.close()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", frames.MAX_FRAME_BYTES + 1),
        struct.pack(">I", 3) + b"{]}",
        struct.pack(">I", 2) + b"[]",
        frames.encode({"op": "format the disk"}),
        frames.encode({"op": "lookup", "size": 0, "hashes": ""}),
        frames.encode({"op": "lookup", "size": 3, "hashes": "AAAA AA"}),
        frames.encode({"op": "lookup", "size": 2, "hashes": "AAAA"}),
        frames.encode({"op": "lookup", "size": 3, "hashes": "AAAA", "salt": "%"}),
        frames.encode({"op": "lookup", "size": 3, "hashes": "AAAA", "have": -1}),
    ],
)
async def test_what_is_not_a_message_ends_its_connection_alone(rig: Rig, path: Path, sent: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    client = LookupClient(path)
    assert await asyncio.to_thread(client.lookup, [b"x"], timeout_s=10) == 0
    client.close()


async def test_connections_are_bounded(rig: Rig, path: Path) -> None:
    opened = [await asyncio.open_unix_connection(path) for _ in range(16)]
    for reader, writer in opened:
        writer.write(frames.encode({"op": "lookup", **frames.pack_hashes([b"x"])}))
        await asyncio.wait_for(reader.readexactly(4), 10)
    reader, writer = await asyncio.open_unix_connection(path)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    for _, one in [*opened, (reader, writer)]:
        one.close()


def silent_server(path: Path) -> socket.socket:
    """A peer that accepts and never answers."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_a_client_does_not_wait_longer_than_its_deadline(path: Path) -> None:
    client = LookupClient(path, retry_after_s=0)
    with pytest.raises(LookupServiceError, match="no answer"):
        client.lookup([b"x"], timeout_s=5)
    with silent_server(path):
        with pytest.raises(LookupServiceError, match="no answer"):
            client.lookup([b"x"], timeout_s=0.05)
        # The late answer cannot be taken for the next one's: the connection is gone.
        assert client._socket is None


def test_a_lookup_that_takes_too_long_is_a_miss(path: Path) -> None:
    with silent_server(path):
        lookups = Lookups(LookupClient(path), timeout_s=0.2, patience_s=0.001)
        answers: list[int | None] = []
        pause = threading.Event()
        while not answers or answers[-1] is None:
            answers.append(lookups.get("request", [b"x"]))
            pause.wait(0.02)
        assert answers[0] is None and answers[-1] == 0
        assert lookups.failed == 1
        assert lookups.get("request", [b"x"]) == 0  # and is not asked again at once
        assert lookups.failed == 1
        lookups.close()


async def test_lookups_are_kept_until_forgotten_and_bounded(rig: Rig, path: Path) -> None:
    blocks = rig.sequence(64)
    lookups = Lookups(LookupClient(path), timeout_s=10, patience_s=10, lifetime_s=3600, limit=2)
    ask = lookups.get
    assert await asyncio.to_thread(ask, "a", blocks.hashes) == 0
    await rig.store(blocks)
    assert await asyncio.to_thread(ask, "a", blocks.hashes) == 0
    lookups.forget("a")
    assert await asyncio.to_thread(ask, "a", blocks.hashes) == 64
    # Another number of hashes is another question.
    assert await asyncio.to_thread(ask, "a", blocks.hashes[:4]) == 32
    for name in "bcd":
        await asyncio.to_thread(ask, name, blocks.hashes)
    assert len(lookups._pending) == 2
    await asyncio.to_thread(lookups.reset, timeout_s=10)
    assert await asyncio.to_thread(ask, "a", blocks.hashes) == 0
    lookups.close()


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_hashes_survive_packing(hashes: list[bytes]) -> None:
    message = frames.decode(frames.encode(frames.pack_hashes(hashes))[frames.LENGTH_BYTES :])
    assert frames.unpack_hashes(message) == hashes


def test_hashes_of_different_lengths_are_refused() -> None:
    with pytest.raises(LookupServiceError, match="same length"):
        frames.pack_hashes([b"x", b"yz"])


def test_a_message_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(LookupServiceError, match="not JSON"):
        frames.decode(b"[" * 100_000)


def test_a_service_that_never_answers_stops_costing_each_request_its_deadline(path: Path) -> None:
    server = silent_server(path)
    now = [100.0]
    breaker = CircuitBreaker(clock=lambda: now[0])
    lookups = Lookups(LookupClient(path), timeout_s=0.05, breaker=breaker)

    def ask(request: str) -> tuple[int, bool]:
        """Return what is found, and whether it took more than one question."""
        answer = lookups.get(request, [b"x"])
        waited = answer is None
        while answer is None:
            answer = lookups.get(request, [b"x"])
        return answer, waited

    assert [ask(f"first {index}") for index in range(3)] == [(0, True)] * 3
    assert [ask(f"then {index}") for index in range(20)] == [(0, False)] * 20
    now[0] += 6
    assert (ask("tries"), ask("does not")) == ((0, True), (0, False))
    # A request that is given up while it tries leaves the trial to the next one.
    now[0] += 11
    assert lookups.get("aborted", [b"x"]) is None
    assert ask("does not") == (0, False)
    lookups.forget("aborted")
    assert ask("tries instead") == (0, True)
    lookups.close()
    server.close()

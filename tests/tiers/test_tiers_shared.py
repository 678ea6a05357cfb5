"""Several workers in one disk folder: each reads what all wrote, locks die with their owner."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_kvtc.cli.inspect import inspect_path
from dynamo_kvtc.errors import ObjectCorruptError, ObjectMissingError, TierError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskSettings, DiskTier, SharedDiskTier, shared
from dynamo_kvtc.tiers.base import ReadRequest
from dynamo_kvtc.tiers.disk_files import lock_folder
from dynamo_kvtc.tiers.disk_format import (
    BLOCK_BYTES,
    RECORD_HEADER_BYTES,
    WRITER_PREFIX,
    StoredObject,
    stored_objects,
)
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.journal import JOURNAL_NAME, JournalReader, JournalWriter
from dynamo_kvtc.tiers.range_locks import KeyClaims, lock_range, unlock_range
from dynamo_kvtc.transfer import StagingPool, TransferAgent

SIZE = 20_000
Join = Callable[..., Awaitable[TierDriver]]


@pytest_asyncio.fixture
async def join(agent: TransferAgent, staging: StagingPool, tmp_path: Path) -> AsyncIterator[Join]:
    opened: list[SharedDiskTier] = []

    async def join_folder(capacity_bytes: int = 4 << 20, **settings: object) -> TierDriver:
        tier = await SharedDiskTier.open(
            agent,
            tmp_path / "shared",
            capacity_bytes,
            settings=DiskSettings(**settings),  # type: ignore[arg-type]
        )
        opened.append(tier)
        return TierDriver(tier, staging)

    yield join_folder
    for tier in opened:
        await tier.close()


def writers(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "shared").glob("writer-*"))


async def settled(driver: TierDriver) -> None:
    """Let what is younger than the age a lookup accepts become old."""
    await driver.tier._peers.refresh(5)  # type: ignore[attr-defined]


async def test_each_worker_reads_what_the_other_wrote(join: Join, tmp_path: Path) -> None:
    one, two = await join(), await join()
    await one.put(0, SIZE)
    await two.put(1, SIZE)
    for driver in (one, two):
        await settled(driver)
        assert await driver.prefix(0, 1, 2) == 2
        for number in (0, 1):
            assert driver.tier.size_of(object_key(number)) == SIZE
            assert await driver.get(number, 0, SIZE) == object_bytes(number, SIZE)
            assert await driver.get(number, 100, 50) == object_bytes(number, SIZE)[100:150]
        assert driver.tier.stats().objects == 1
    assert len(writers(tmp_path)) == 2
    async with one.staging.lease(2 * SIZE, 5) as span:
        reads = [ReadRequest(object_key(n), 0, span.slice(n * SIZE, SIZE)) for n in (0, 1)]
        await one.tier.get(reads, timeout_s=5)
        assert bytes(span.view) == object_bytes(0, SIZE) + object_bytes(1, SIZE)


async def test_a_key_is_written_by_one_worker_only(join: Join, tmp_path: Path) -> None:
    drivers = [await join() for _ in range(3)]
    for number in range(8):
        results = await asyncio.gather(*(driver.put(number, SIZE) for driver in drivers))
        assert sum(results) == 1
    for driver in drivers:
        assert not await driver.put(0, SIZE)
    found = [one.record.key for one in stored_objects(tmp_path / "shared") if isinstance(one, StoredObject)]
    assert sorted(found) == sorted(object_key(number) for number in range(8))


async def test_eviction_passes_over_what_another_worker_has_pinned(join: Join) -> None:
    writer, reader = await join(capacity_bytes=10 * SIZE), await join()
    for number in range(3):
        await writer.put(number, SIZE)
    await settled(reader)
    assert await reader.prefix(0, 1, 2) == 3
    assert reader.tier.pin([object_key(0), object_key(7)]) == [object_key(0)]
    assert await writer.tier.evict([object_key(0), object_key(1)]) == 1
    for number in range(10, 30):
        await writer.put(number, SIZE)
    assert writer.tier.size_of(object_key(0)) == SIZE
    assert writer.tier.size_of(object_key(2)) is None
    assert await reader.get(0, 0, SIZE) == object_bytes(0, SIZE)
    reader.tier.unpin([object_key(0)])
    assert await writer.tier.evict([object_key(0)]) == 1


async def test_what_its_writer_evicted_is_a_miss(join: Join) -> None:
    writer, reader = await join(), await join()
    await writer.put(0, SIZE)
    await writer.put(1, SIZE)
    await settled(reader)
    assert await reader.prefix(0, 1) == 2
    await writer.tier.evict([object_key(0)])
    # Before the reader hears of it, and after.
    with pytest.raises(ObjectMissingError):
        await reader.get(0, 0, SIZE)
    assert reader.tier.pin([object_key(0)]) == []
    await settled(reader)
    assert await reader.prefix(0) == 0
    assert await reader.get(1, 0, SIZE) == object_bytes(1, SIZE)
    # It may be stored again, by anybody.
    assert await reader.put(0, SIZE)
    await settled(writer)
    assert await writer.get(0, 0, SIZE) == object_bytes(0, SIZE)


async def test_what_went_with_its_segment_cannot_be_pinned(join: Join, tmp_path: Path) -> None:
    writer, reader = await join(segment_bytes=64 << 10), await join()
    for number in range(6):
        await writer.put(number, SIZE)
    await settled(reader)
    assert await reader.prefix(0, 1, 2) == 3
    (own,) = (folder for folder in writers(tmp_path) if list(folder.glob("segment-*")))
    before = set(own.glob("segment-*"))
    for number in range(3):
        # One after the other: holes are punched before the last object takes the segment along.
        assert await writer.tier.evict([object_key(number)]) == 1
        await writer.tier._own._log.run(lambda: None, 5)  # type: ignore[attr-defined]
    assert set(own.glob("segment-*")) < before
    # The reader has not heard of it yet, and its descriptor keeps the file that was deleted.
    assert reader.tier.size_of(object_key(0)) == SIZE
    assert reader.tier.pin([object_key(number) for number in range(3)]) == []
    with pytest.raises(ObjectMissingError):
        await reader.get(0, 0, SIZE)


async def test_damage_of_others_is_found_and_another_copy_can_be_stored(join: Join, tmp_path: Path) -> None:
    writer, reader = await join(), await join()
    await writer.put(0, SIZE)
    (segment,) = (tmp_path / "shared").glob("writer-*/segment-*")
    with segment.open("r+b") as file:
        file.seek(BLOCK_BYTES + RECORD_HEADER_BYTES + 500)
        file.write(b"rot" * 100)
    await settled(reader)
    with pytest.raises(ObjectCorruptError):
        await reader.get(0, 0, SIZE)
    assert await reader.prefix(0) == 0
    assert await reader.put(0, SIZE)
    assert await reader.get(0, 0, SIZE) == object_bytes(0, SIZE)


async def test_a_worker_takes_over_what_a_dead_one_left(join: Join, tmp_path: Path) -> None:
    one, two = await join(), await join()
    for number in range(5):
        await one.put(number, SIZE)
    await two.put(5, SIZE)
    await one.tier.close()
    # Nobody owns them now, and they are still there.
    assert await two.get(3, 0, SIZE) == object_bytes(3, SIZE)
    three = await join()
    assert len(writers(tmp_path)) == 2
    assert three.tier.stats().objects == 5
    assert await three.tier.evict([object_key(0)]) == 1
    for number in (1, 5):
        assert await three.get(number, 0, SIZE) == object_bytes(number, SIZE)
    # Others are told of an eviction when its room is given back, in the log's thread.
    await three.tier._own._log.run(lambda: None, 5)  # type: ignore[attr-defined]
    await settled(two)
    assert await two.prefix(0) == 0
    assert await two.get(4, 0, SIZE) == object_bytes(4, SIZE)


async def test_readers_and_writers_at_full_speed_see_whole_objects_or_none(join: Join) -> None:
    drivers = [await join(capacity_bytes=12 * SIZE, segment_bytes=64 << 10) for _ in range(3)]
    served = 0

    async def use(driver: TierDriver, seed: int) -> None:
        nonlocal served
        for step in range(60):
            number = (seed * 7 + step * 5) % 40
            await driver.put(number, SIZE)
            other = (number + 11) % 40
            if not await driver.prefix(other):
                continue
            pinned = driver.tier.pin([object_key(other)]) if step % 2 else []
            try:
                assert await driver.get(other, 0, SIZE) == object_bytes(other, SIZE)
                served += 1
            except ObjectMissingError:
                assert not pinned
            finally:
                driver.tier.unpin(pinned)

    await asyncio.gather(*(use(driver, seed) for seed, driver in enumerate(drivers * 2)))
    assert served > 50
    for driver in drivers:
        stats = driver.tier.stats()
        assert stats.evictions > 0 and stats.corrupt_dropped == 0 and stats.pinned_objects == 0


_WORKER = """
import asyncio, sys
from dynamo_kvtc.errors import TierError, TransferError
from dynamo_kvtc.tiers import DiskSettings, SharedDiskTier
from dynamo_kvtc.testing.conformance import TierDriver
from dynamo_kvtc.transfer import StagingPool, TransferAgent

async def main(first):
    agent = await TransferAgent.create()
    staging = await StagingPool.create(agent, 1 << 20)
    settings = DiskSettings(segment_bytes=1 << 20)
    tier = await SharedDiskTier.open(agent, sys.argv[1], 1 << 30, settings=settings)
    driver = TierDriver(tier, staging)
    for number in range(first, first + 100_000):
        await driver.put(number, 20_000)
        print(number, flush=True)
asyncio.run(main(int(sys.argv[2])))
"""


async def test_workers_in_processes_of_their_own_and_one_is_killed(join: Join, tmp_path: Path) -> None:
    reader = await join()
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _WORKER,
            str(tmp_path / "shared"),
            str(first),
            stdout=asyncio.subprocess.PIPE,
        )
        for first in (0, 1_000_000)
    ]
    stored: list[int] = []
    for process in processes:
        assert process.stdout is not None
        stored += [int(await asyncio.wait_for(process.stdout.readline(), 60)) for _ in range(15)]
    await settled(reader)
    assert await reader.prefix(*stored) == len(stored)
    for process in processes:
        assert process.stdout is not None
        process.send_signal(signal.SIGKILL)
        stored += [int(line) for line in (await process.stdout.read()).split(b"\n")[:-1]]
        await process.wait()
    # Their claims and locks went with them, their objects did not.
    await settled(reader)
    for number in stored:
        assert await reader.get(number, 0, SIZE) == object_bytes(number, SIZE)
    assert len(writers(tmp_path)) == 3
    heirs = [await join(capacity_bytes=1 << 30) for _ in range(2)]
    assert len(writers(tmp_path)) == 3
    held = sum(heir.tier.stats().objects for heir in heirs)
    assert len(stored) <= held <= len(stored) + 2
    assert [await heir.put(999_999_999 - i, SIZE) for i, heir in enumerate(heirs)] == [True, True]


async def test_a_new_folder_that_another_worker_takes_first_is_left_to_it(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers start at once: one sees the other's folder before the other has locked it."""
    made = iter(["00", "11", *(f"{number:02x}" for number in range(0x20, 0x60))])
    monkeypatch.setattr(shared.secrets, "token_hex", lambda _: next(made))
    folder = tmp_path / "shared" / f"{WRITER_PREFIX}00"
    plain = shared._join_folder

    def join_while_another_starts(path: Path) -> tuple[KeyClaims, list[str]]:
        joined = plain(path)
        taken.append(lock_folder(folder))
        return joined

    taken: list[int] = []
    monkeypatch.setattr(shared, "_join_folder", join_while_another_starts)
    driver = await join()
    assert sorted(path.name for path in writers(tmp_path)) == [f"{WRITER_PREFIX}00", f"{WRITER_PREFIX}11"]
    await driver.put(0, SIZE)
    assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    os.close(taken[0])


async def test_a_folder_is_shared_or_not(agent: TransferAgent, join: Join, tmp_path: Path) -> None:
    tier = await DiskTier.open(agent, tmp_path / "shared", 1 << 20)
    staging = await StagingPool.create(agent, 1 << 20)
    await TierDriver(tier, staging).put(0, 100)
    await tier.close()
    with pytest.raises(TierError, match="not shared"):
        await join()


def test_locks_of_ranges_keep_others_out_until_they_are_given_up(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as one, (tmp_path / "file").open("r+b") as two:
        assert lock_range(one.fileno(), 100, 50, exclusive=False)
        assert lock_range(two.fileno(), 120, 1, exclusive=False)
        assert not lock_range(two.fileno(), 90, 20, exclusive=True)
        unlock_range(one.fileno(), 100, 50)
        assert lock_range(two.fileno(), 90, 20, exclusive=True)
        two.close()
        assert lock_range(one.fileno(), 0, 200, exclusive=True)
    one_claims, two_claims = KeyClaims(tmp_path / "claims"), KeyClaims(tmp_path / "claims")
    assert one_claims.claim(object_key(0)) and not two_claims.claim(object_key(0))
    assert two_claims.claim(object_key(1))
    one_claims.close()
    assert two_claims.claim(object_key(0))
    two_claims.close()


def test_a_journal_tells_what_is_stored_whatever_happens_to_its_end(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, [(object_key(0), Location(0, 128, 10, 5))])
    reader = JournalReader(tmp_path)
    reader.poll()
    assert reader.objects == {object_key(0): Location(0, 128, 10, 5)} and reader.generation == 1
    writer.stored(object_key(1), Location(2, 4224, 2**40, 2**63))
    writer.gone(object_key(0))
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    for cut in (1, 79, 80, 81):
        path.write_bytes(whole[: len(whole) - cut])
        reader.poll()
    path.write_bytes(whole)
    reader.poll()
    assert reader.objects == {object_key(1): Location(2, 4224, 2**40, 2**63)}
    # A damaged entry is passed over once others stand behind it.
    path.write_bytes(whole[:-80] + bytes(80) + whole[-80:])
    fresh = JournalReader(tmp_path)
    fresh.poll()
    assert fresh.objects == reader.objects
    writer.close()
    for junk in (b"", b"x" * 1000, whole[:63]):
        path.write_bytes(junk)
        fresh = JournalReader(tmp_path)
        fresh.poll()
        assert fresh.objects == {}


def test_a_journal_is_written_anew_before_it_grows_without_bound(tmp_path: Path) -> None:
    writer, reader = JournalWriter(tmp_path, []), JournalReader(tmp_path)
    for number in range(6000):
        writer.stored(object_key(number), Location(0, 128, 10))
        if number >= 10:
            writer.gone(object_key(number - 10))
        if number % 500 == 0:
            reader.poll()
    reader.poll()
    assert reader.objects.keys() == {object_key(number) for number in range(5990, 6000)}
    assert reader.generation > 1
    assert (tmp_path / JOURNAL_NAME).stat().st_size < 80 * 10_000
    writer.close()


def test_a_full_disk_delays_a_journal_and_does_not_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = JournalWriter(tmp_path, []), JournalReader(tmp_path)
    writer.stored(object_key(0), Location(0, 128, 10))
    with monkeypatch.context() as patched:
        # Half of an entry still fits.
        write = os.write
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:40]))
        writer.stored(object_key(1), Location(0, 4224, 10))
    reader.poll()
    assert reader.objects.keys() == {object_key(0)}
    writer.gone(object_key(0))
    reader.poll()
    assert reader.objects.keys() == {object_key(1)}
    writer.close()


async def test_inspecting_a_shared_folder_sees_every_workers_objects(join: Join, tmp_path: Path) -> None:
    one, two = await join(), await join()
    await one.put(0, SIZE)
    await two.put(1, SIZE)
    report = inspect_path(tmp_path / "shared")
    assert (report.kind, report.facts["segments"], report.facts["objects"]) == ("disk tier", 2, 2)

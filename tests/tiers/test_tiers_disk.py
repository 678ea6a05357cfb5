"""The disk tier: what is on disk, what a crash or damage leaves, what a full disk does."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    TierError,
    TierFullError,
    TierInUseError,
    TransferError,
)
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskSettings, DiskTier, disk
from dynamo_kvtc.tiers.disk_format import BLOCK_BYTES, RECORD_HEADER_BYTES, StoredObject, stored_objects
from dynamo_kvtc.transfer import TransferAgent

OpenDisk = Callable[..., Awaitable[TierDriver]]

SIZE = 50_000


def segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "tier").glob("segment-*.kvtc"))


def disk_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in segments(tmp_path))


def damage(path: Path, offset: int, replacement: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(replacement)


# --- space ---------------------------------------------------------------------------------------------


async def test_evicted_bytes_are_the_file_systems_again(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk(segment_bytes=1 << 20)
    for number in range(60):
        await driver.put(number, SIZE)
    full = disk_bytes(tmp_path)
    # File systems keep a block or two of their own for the list of extents.
    assert 60 * SIZE <= full <= driver.tier.stats().allocated_bytes + 8 * BLOCK_BYTES
    await driver.tier.evict([object_key(number) for number in range(1, 60, 2)])
    await driver.tier.close()
    assert disk_bytes(tmp_path) <= full - 29 * SIZE
    driver = await open_disk(segment_bytes=1 << 20)
    assert await driver.get(58, 0, SIZE) == object_bytes(58, SIZE)
    await driver.tier.clear()
    await driver.tier.close()
    assert disk_bytes(tmp_path) <= 4 * BLOCK_BYTES
    assert len(segments(tmp_path)) <= 1


async def test_capacity_bounds_the_disk_space(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk(capacity_bytes=1 << 20, segment_bytes=256 << 10)
    for number in range(100):
        await driver.put(number, random.Random(number).randrange(1, SIZE))
    assert driver.tier.stats().evictions > 0
    await driver.tier.close()
    assert disk_bytes(tmp_path) <= (1 << 20) + 4 * BLOCK_BYTES


async def test_a_smaller_capacity_at_reopen_evicts_the_oldest(open_disk: OpenDisk) -> None:
    driver = await open_disk()
    for number in range(20):
        await driver.put(number, SIZE)
    await driver.tier.close()
    driver = await open_disk(capacity_bytes=10 * SIZE)
    assert await driver.prefix(0) == 0
    assert await driver.prefix(18, 19) == 2
    stats = driver.tier.stats()
    assert stats.allocated_bytes <= stats.capacity_bytes


async def test_objects_in_use_do_not_keep_ever_more_segments_alive(
    open_disk: OpenDisk, tmp_path: Path
) -> None:
    driver = await open_disk(capacity_bytes=1 << 20, segment_bytes=256 << 10)
    for number in range(120):
        await driver.put(number, SIZE)
        # Every fifth object, one in each segment, is used over and over, so that it is never the oldest.
        for used in range(0, number, 5):
            await driver.prefix(used)
    assert len(segments(tmp_path)) <= 9
    assert await driver.prefix(119) == 1


async def test_an_object_larger_than_a_segment_is_stored(open_disk: OpenDisk) -> None:
    driver = await open_disk(segment_bytes=64 << 10)
    assert await driver.put(0, 1_000_000)
    assert await driver.put(1, 100)
    await driver.tier.close()
    driver = await open_disk(segment_bytes=64 << 10)
    assert await driver.get(0, 0, 1_000_000) == object_bytes(0, 1_000_000)


# --- a full or unusable disk ------------------------------------------------------------------------------


async def test_a_full_disk_refuses_and_goes_on_serving(open_disk: OpenDisk) -> None:
    """The process's limit on file sizes stands in for a full disk: allocation fails for real."""
    driver = await open_disk()
    await driver.put(0, SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))
    try:
        for _ in range(3):
            with pytest.raises(TierFullError, match="no room"):
                await driver.put(1, SIZE)
        assert driver.tier.size_of(object_key(1)) is None
        assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert driver.tier.stats().rejected_full == 3
    assert await driver.put(1, SIZE)
    assert await driver.get(1, 0, SIZE) == object_bytes(1, SIZE)


_FILL = """
import asyncio, sys
from pathlib import Path
from dynamo_kvtc.errors import TierFullError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes
from dynamo_kvtc.tiers import DiskTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

async def main():
    async with await TransferAgent.create() as agent:
        staging = await StagingPool.create(agent, 1 << 20)
        driver = TierDriver(await DiskTier.open(agent, sys.argv[1], 1 << 30), staging)
        number = 0
        try:
            while number < 1000:
                await driver.put(number, 100_000)
                number += 1
        except TierFullError as error:
            print("full", error)
        for stored in range(number):
            assert await driver.get(stored, 0, 100_000) == object_bytes(stored, 100_000)
        assert 10 < number < 42
        await driver.tier.clear()
        for again in range(10):
            assert await driver.put(again, 100_000)
        await driver.tier.close()
        print("served on")
asyncio.run(main())
"""


def test_enospc_on_a_real_full_file_system(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=4m none {tmp_path} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes user namespaces")
    done = subprocess.run(
        [*command, sys.executable, "-c", _FILL, str(tmp_path / "tier")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "No space left on device" in done.stdout, done.stderr
    assert "served on" in done.stdout, done.stderr


@pytest.mark.parametrize("place", ["file/below", "/proc/kvtc"])
async def test_an_unusable_folder_is_refused(agent: TransferAgent, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TierError, match="check path and rights"):
        await DiskTier.open(agent, tmp_path / place, 1 << 20)


async def test_a_file_system_without_holes_is_refused(
    agent: TransferAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a file system that cannot punch holes; the ones at hand all can."""

    def no_holes(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("dynamo_kvtc.tiers.disk_files.punch_hole", no_holes)
    with pytest.raises(TierError, match="hole punching"):
        await DiskTier.open(agent, tmp_path, 1 << 20)


async def test_files_are_private_and_the_folder_is_locked(
    agent: TransferAgent, open_disk: OpenDisk, tmp_path: Path
) -> None:
    driver = await open_disk()
    await driver.put(0, 100)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tier").iterdir()} == {0o600}
    assert (tmp_path / "tier").stat().st_mode & 0o777 == 0o700
    with pytest.raises(TierError, match="in use"):
        await DiskTier.open(agent, tmp_path / "tier", 1 << 20)
    await driver.tier.close()
    driver = await open_disk()
    assert await driver.prefix(0) == 1


# --- crashes ---------------------------------------------------------------------------------------------


_WRITE_UNTIL_KILLED = """
import asyncio, sys
from dynamo_kvtc.testing.conformance import TierDriver
from dynamo_kvtc.tiers import DiskSettings, DiskTier, disk
from dynamo_kvtc.transfer import StagingPool, TransferAgent

async def main(first):
    agent = await TransferAgent.create()
    staging = await StagingPool.create(agent, 1 << 20)
    tier = await DiskTier.open(agent, sys.argv[1], 1 << 30, settings=DiskSettings(segment_bytes=1 << 20))
    driver = TierDriver(tier, staging)
    async def write(lane):
        for number in range(first + lane, first + 100_000, 4):
            await driver.put(number, 50_000)
            print(number, flush=True)
    await asyncio.gather(*(write(lane) for lane in range(4)))
asyncio.run(main(int(sys.argv[2])))
"""


async def test_what_was_stored_survives_a_killed_process(open_disk: OpenDisk, tmp_path: Path) -> None:
    stored: list[int] = []
    for first in (0, 1_000_000):
        command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, str(tmp_path / "tier"), str(first)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        stored += [int(await asyncio.wait_for(process.stdout.readline(), 60)) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        stored += [int(line) for line in (await process.stdout.read()).split(b"\n")[:-1]]
        await process.wait()
    driver = await open_disk(capacity_bytes=1 << 30)
    for number in stored:
        assert await driver.get(number, 0, SIZE) == object_bytes(number, SIZE)
    stats = driver.tier.stats()
    # Puts whose header was written but not yet reported may be there too, one in each lane.
    assert len(stored) <= stats.objects <= len(stored) + 8
    assert stats.corrupt_dropped == 0


async def test_a_put_without_its_header_leaves_nothing(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk()
    for number in range(3):
        await driver.put(number, SIZE)
    await driver.tier.close()
    # Wiping a header leaves what a crash before writing it leaves.
    (segment,) = segments(tmp_path)
    records = [found.record for found in stored_objects(tmp_path / "tier") if isinstance(found, StoredObject)]
    damage(segment, records[1].start, bytes(RECORD_HEADER_BYTES))
    before = disk_bytes(tmp_path)
    driver = await open_disk()
    assert [await driver.prefix(number) for number in range(3)] == [1, 0, 1]
    assert driver.tier.stats().corrupt_dropped == 0
    assert disk_bytes(tmp_path) <= before - SIZE
    assert await driver.put(1, SIZE)


async def test_a_torn_tail_is_cut_off(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk()
    for number in range(3):
        await driver.put(number, SIZE)
    await driver.tier.close()
    (segment,) = segments(tmp_path)
    os.truncate(segment, segment.stat().st_size - SIZE // 2)
    driver = await open_disk()
    assert await driver.prefix(0, 1, 2) == 2
    assert await driver.put(2, SIZE)
    assert await driver.get(2, 0, SIZE) == object_bytes(2, SIZE)


async def test_of_an_object_stored_twice_the_later_one_stays(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk()
    await driver.put(0, SIZE)
    await driver.put(1, SIZE)
    await driver.tier.close()
    (segment,) = segments(tmp_path)
    old = segment.read_bytes()
    driver = await open_disk()
    await driver.tier.clear()
    await driver.put(0, SIZE)
    await driver.tier.close()
    # The holes of the eviction had not reached the disk, the new record had.
    new = segment.read_bytes()
    segment.write_bytes(old + new[len(old) :])
    driver = await open_disk()
    assert driver.tier.stats().objects == 2
    assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    found = [stored for stored in stored_objects(tmp_path / "tier") if isinstance(stored, StoredObject)]
    assert sorted(stored.record.key for stored in found) == sorted([object_key(0), object_key(1)])


async def test_an_empty_segment_is_removed_and_foreign_files_are_left(
    open_disk: OpenDisk, tmp_path: Path
) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier" / "segment-0000000000000007.kvtc").write_bytes(b"")
    (tmp_path / "tier" / "segment-0000000000000008.kvtc").write_bytes(bytes(9000))
    (tmp_path / "tier" / "notes.txt").write_text("mine")
    driver = await open_disk()
    assert segments(tmp_path) == []
    assert driver.tier.stats().corrupt_dropped == 0
    assert (tmp_path / "tier" / "notes.txt").read_text() == "mine"
    assert await driver.put(0, 100)


async def test_fsync_happens_before_and_after_the_header(
    open_disk: OpenDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure leaves cannot be tested here; that the syncs are made, in order, can."""
    driver = await open_disk(durability="fsync")
    await driver.put(0, 100)
    calls: list[str] = []
    sync, write = os.fdatasync, os.pwrite
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (calls.append("header"), write(fd, data, at))[1])
    await driver.put(1, 100)
    assert calls == ["sync", "header", "sync"]


# --- damage ----------------------------------------------------------------------------------------------


async def test_a_damaged_header_is_skipped_and_counted(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk()
    for number in range(3):
        await driver.put(number, SIZE)
    await driver.tier.close()
    (segment,) = segments(tmp_path)
    second = BLOCK_BYTES + -(-(SIZE + RECORD_HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES
    damage(segment, second + 30, b"\xff")
    assert [found for found in stored_objects(tmp_path / "tier") if not isinstance(found, StoredObject)] == [
        segment
    ]
    driver = await open_disk()
    assert [await driver.prefix(number) for number in range(3)] == [1, 0, 1]
    assert driver.tier.stats().corrupt_dropped == 1


async def test_damaged_bytes_are_noticed_and_dropped(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk()
    for number in range(3):
        await driver.put(number, SIZE)
    (segment,) = segments(tmp_path)
    damage(segment, BLOCK_BYTES + RECORD_HEADER_BYTES + 1000, bytes([object_bytes(0, SIZE)[1000] ^ 1]))
    intact = [found.intact for found in stored_objects(tmp_path / "tier") if isinstance(found, StoredObject)]
    assert intact == [False, True, True]
    with pytest.raises(ObjectCorruptError, match="checksum"):
        await driver.get(0, 0, SIZE)
    assert [await driver.prefix(number) for number in range(3)] == [0, 1, 1]
    damage(segment, segment.stat().st_size - 20_000, b"\0\1\2\3\4\5")
    await driver.tier.close()
    driver = await open_disk(verify_at_open="objects")
    assert [await driver.prefix(number) for number in range(3)] == [0, 1, 0]
    assert driver.tier.stats().corrupt_dropped == 1


async def test_a_segment_cut_short_while_open_costs_only_its_tail(
    open_disk: OpenDisk, tmp_path: Path
) -> None:
    driver = await open_disk()
    for number in range(3):
        await driver.put(number, SIZE)
    (segment,) = segments(tmp_path)
    os.truncate(segment, segment.stat().st_size - SIZE)
    with pytest.raises(ObjectCorruptError, match="beyond the end"):
        await driver.get(2, 10, SIZE - 10)
    assert [await driver.prefix(number) for number in range(3)] == [1, 1, 0]


async def test_a_segment_of_another_version_is_refused_untouched(open_disk: OpenDisk, tmp_path: Path) -> None:
    from dynamo_kvtc.tiers import disk_format

    header = disk_format.SegmentHeader(3, bytes(16))
    packed = disk_format._SEGMENT.pack(b"KVTCSEG1", 2, 0, header.nonce, header.serial)
    checksum = disk_format._CHECKSUM.pack(disk_format.xxhash.xxh3_64_intdigest(packed))
    (tmp_path / "tier").mkdir()
    path = tmp_path / "tier" / disk_format.segment_name(3)
    path.write_bytes((packed + checksum).ljust(BLOCK_BYTES, b"\0"))
    with pytest.raises(TierError, match="version 2"):
        await open_disk()
    assert path.stat().st_size == BLOCK_BYTES


async def test_an_object_that_looks_like_a_record_is_not_taken_for_one(
    open_disk: OpenDisk, tmp_path: Path
) -> None:
    """A tenant may choose the bytes of an object; a record of another segment inside it stays bytes."""
    driver = await open_disk()
    await driver.put(0, 100)
    await driver.tier.close()
    (segment,) = segments(tmp_path)
    record = segment.read_bytes()[BLOCK_BYTES : BLOCK_BYTES + 300]
    segment.unlink()
    driver = await open_disk()
    aligned = BLOCK_BYTES - RECORD_HEADER_BYTES
    async with driver.staging.lease(3 * BLOCK_BYTES, 1) as span:
        span.view[:] = bytes(span.nbytes)
        span.view[aligned : aligned + len(record)] = record
        await driver.tier.put(object_key(1), span, timeout_s=10)
    await driver.tier.close()
    (segment,) = segments(tmp_path)
    damage(segment, BLOCK_BYTES, b"gone")
    driver = await open_disk()
    assert driver.tier.stats().objects == 0
    assert driver.tier.stats().corrupt_dropped == 1


async def test_no_damage_ever_gives_wrong_bytes(open_disk: OpenDisk, tmp_path: Path) -> None:
    driver = await open_disk(segment_bytes=64 << 10)
    sizes = [1, 5000, 9000, 4096, 30_000, 70_000]
    for number, size in enumerate(sizes):
        await driver.put(number, size)
    await driver.tier.close()
    sound = {path: path.read_bytes() for path in segments(tmp_path)}
    for seed in range(30):
        chance = random.Random(seed)
        for path, content in sound.items():
            changed = bytearray(content)
            for _ in range(chance.randrange(4)):
                # Headers lie at the start of a block, so that is where damage is worth trying.
                at = chance.randrange(len(changed) // BLOCK_BYTES) * BLOCK_BYTES + chance.choice(
                    [chance.randrange(RECORD_HEADER_BYTES), chance.randrange(BLOCK_BYTES)]
                )
                changed[at] ^= 1 << chance.randrange(8)
            path.write_bytes(changed[: len(changed) - chance.choice([0, 0, chance.randrange(len(changed))])])
        driver = await open_disk(segment_bytes=64 << 10)
        for number, size in enumerate(sizes):
            try:
                got = await driver.get(number, 0, size)
            except (ObjectMissingError, ObjectCorruptError):
                continue
            assert got == object_bytes(number, size)
        await driver.tier.close()


async def test_a_failing_disk_is_a_transfer_error(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a disk whose writes fail (EIO), which cannot be had here."""
    driver = await open_disk()
    await driver.put(0, 100)
    write = os.pwrite

    def failing(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(TransferError, match="Input/output error"):
        await driver.put(1, 100)
    monkeypatch.setattr(os, "pwrite", write)
    assert await driver.prefix(0) == 1
    assert await driver.put(1, 100)


@pytest.mark.parametrize("bad", [{"segment_bytes": 4096}, {"durability": "yes"}, {"verify_at_open": "never"}])
def test_senseless_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        DiskSettings(**bad)  # type: ignore[arg-type]


async def test_clearing_many_objects_and_closing_at_once_gives_all_space_back(
    open_disk: OpenDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = await open_disk(capacity_bytes=64 << 20, segment_bytes=1 << 20)
    for number in range(500):
        await driver.put(number, 3000)
    await driver.tier.clear()
    await driver.tier.close()
    await driver.staging._agent.close()
    assert disk_bytes(tmp_path) <= 4 * BLOCK_BYTES
    assert caplog.records == []


# --- opening that is cancelled -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["lock_folder", "recover_folder"])
async def test_opening_that_is_cancelled_gives_the_folder_up_once_nothing_works_in_it(
    agent: TransferAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    begun, go_on, work = threading.Event(), threading.Event(), getattr(disk, step)

    def slowly(*args: object, **options: object) -> object:
        result = work(*args, **options)
        begun.set()
        assert go_on.wait(60)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(disk, step, slowly)
        opening = asyncio.create_task(DiskTier.open(agent, tmp_path / "tier", 1 << 20))
        await asyncio.to_thread(begun.wait, 60)
    opening.cancel()
    await asyncio.sleep(0.05)
    # The thread cannot be stopped: nobody else may use the folder before it has ended.
    with pytest.raises(TierInUseError):
        await DiskTier.open(agent, tmp_path / "tier", 1 << 20)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    tier = await DiskTier.open(agent, tmp_path / "tier", 1 << 20)
    await tier.close()

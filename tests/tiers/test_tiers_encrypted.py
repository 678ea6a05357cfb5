"""Encryption at rest: the conformance kit over every kind of tier, and what only encryption can get wrong."""

from __future__ import annotations

import asyncio
import base64
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="needs cryptography: pip install 'dynamo-kvtc[encryption]'")

from dynamo_kvtc.errors import ConfigError, ObjectCorruptError, ObjectMissingError
from dynamo_kvtc.testing import TierWrapper
from dynamo_kvtc.testing.conformance import TierConformance, TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.fault_suite import TierFaultSuite
from dynamo_kvtc.testing.stateful import check_tier_against_model
from dynamo_kvtc.tiers import DiskTier, HostTier, Namespace, ReadRequest, SharedDiskTier, Tier
from dynamo_kvtc.tiers import encryption_format as form
from dynamo_kvtc.tiers.base import KEY_BYTES, tenant_of
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey, read_key
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.transfer import StagingPool, TransferAgent

OLD, NEW = MasterKey("2026-10", bytes(range(32))), MasterKey("2026-11", bytes(range(1, 33)))


async def encrypt(
    inner: Tier, agent: TransferAgent, *keys: MasterKey, staging: int = 4 << 20
) -> EncryptedTier:
    return EncryptedTier(inner, KeyRing(*(keys or (NEW,))), await StagingPool.create(agent, staging))


async def open_disk(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
    return await encrypt(await DiskTier.open(agent, folder, capacity_bytes), agent)


class _Sealed(TierConformance):
    def stored_size(self, nbytes: int) -> int:
        return form.sealed_size(nbytes)


class TestEncryptedHostTier(_Sealed):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await encrypt(await HostTier.open(agent, capacity_bytes), agent)


class TestEncryptedDiskTier(_Sealed):
    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_disk(agent, folder, capacity_bytes)


class TestEncryptedSharedTier(_Sealed):
    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await encrypt(await SharedDiskTier.open(agent, folder / "shared", capacity_bytes), agent)


class TestEncryptedHostTierUnderFaults(TierFaultSuite):
    # Unlike the plain host tier, an encrypted one notices bytes that changed.
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await encrypt(await HostTier.open(agent, capacity_bytes), agent)


class TestEncryptedDiskTierUnderFaults(TierFaultSuite):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_disk(agent, folder, capacity_bytes)


def test_an_encrypted_tier_agrees_with_the_model() -> None:
    check_tier_against_model(open_disk, persistent=True, stored_size=form.sealed_size)


# --- the form of an object --------------------------------------------------------------------------


@given(size=st.integers(1, 5 * form.FRAME_BYTES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_any_object_comes_back(size: int, data: st.DataObject) -> None:
    ring, key, plain = KeyRing(NEW), object_key(1), object_bytes(size, size)
    header = form.new_header(ring)
    stored = bytearray(form.sealed_size(size))
    form.seal(form.header_cipher(header, key, ring), header, key, memoryview(plain), memoryview(stored))
    assert form.plain_size(len(stored)) == size
    offset = data.draw(st.integers(0, size - 1))
    nbytes = data.draw(st.integers(1, size - offset))
    frames = form.Frames.holding(size, offset, nbytes)
    sealed = memoryview(stored)[frames.sealed_offset : frames.sealed_offset + frames.sealed_bytes]
    into = bytearray(nbytes)
    cipher = form.header_cipher(bytes(stored[: form.HEADER_BYTES]), key, ring)
    form.open_frames(cipher, header, key, frames, sealed, offset - frames.plain_offset, memoryview(into))
    assert into == plain[offset : offset + nbytes]
    # Any change of a frame, of the key it is read under, or of the header is noticed.
    place = data.draw(st.integers(0, len(sealed) - 1))
    damaged = bytearray(sealed)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    other = form.new_header(ring)
    for one, under, wrong in (
        (memoryview(damaged), key, header),
        (sealed, object_key(2), header),
        (sealed, key, other),
    ):
        with pytest.raises(ObjectCorruptError):
            form.open_frames(
                form.header_cipher(wrong, under, ring), wrong, under, frames, one, 0, memoryview(into)
            )


@given(st.integers(0, 200_000))
def test_sizes_that_no_object_has_are_recognised(sealed: int) -> None:
    size = form.plain_size(sealed)
    assert size is None or (size > 0 and form.sealed_size(size) == sealed)


def test_frames_cannot_change_places_and_objects_cannot_be_cut() -> None:
    ring, key, size = KeyRing(NEW), object_key(1), 3 * form.FRAME_BYTES
    plain, header = object_bytes(1, size), form.new_header(ring)
    stored = bytearray(form.sealed_size(size))
    cipher = form.header_cipher(header, key, ring)
    form.seal(cipher, header, key, memoryview(plain), memoryview(stored))
    one = form.FRAME_BYTES + 16
    second = memoryview(stored)[form.HEADER_BYTES + one : form.HEADER_BYTES + 2 * one]
    into = memoryview(bytearray(form.FRAME_BYTES))
    with pytest.raises(ObjectCorruptError):  # the second frame in the place of the first
        form.open_frames(cipher, header, key, form.Frames(size, 0, 1), second, 0, into)
    with pytest.raises(ObjectCorruptError):  # as if the object ended after two frames
        form.open_frames(cipher, header, key, form.Frames(2 * form.FRAME_BYTES, 1, 2), second, 0, into)
    form.open_frames(cipher, header, key, form.Frames(size, 1, 2), second, 0, into)


def test_no_two_objects_share_a_key_stream() -> None:
    ring, plain = KeyRing(NEW), memoryview(bytes(100))
    seen = set()
    for _ in range(50):
        header = form.new_header(ring)
        stored = bytearray(form.sealed_size(100))
        form.seal(
            form.header_cipher(header, object_key(1), ring), header, object_key(1), plain, memoryview(stored)
        )
        seen.add(bytes(stored[form.HEADER_BYTES :]))
    assert len(seen) == 50


# --- keys -------------------------------------------------------------------------------------------


def test_keys_are_read_in_three_forms_and_refused_otherwise(tmp_path: Path) -> None:
    secret = os.urandom(32)
    path = tmp_path / "key"
    for content in (secret, secret.hex().encode() + b"\n", base64.b64encode(secret) + b"\n"):
        path.write_bytes(content)
        assert read_key("k", path).secret == secret
    assert secret.hex() not in repr(read_key("k", path))
    for content in (b"", b"short", secret + b"1", b"z" * 64, base64.b64encode(secret[:16])):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="openssl rand"):
            read_key("k", path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_key("k", tmp_path / "missing")
    with pytest.raises(ConfigError, match="a different id for each"):
        KeyRing(NEW, MasterKey(NEW.name, OLD.secret))
    with pytest.raises(ConfigError, match="are the same"):
        KeyRing(NEW, MasterKey(OLD.name, NEW.secret))


def test_key_files_that_others_may_write_are_refused_and_readable_ones_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    path.write_bytes(NEW.secret)
    for mode in (0o400, 0o600, 0o440):
        path.chmod(mode)
        assert read_key("k", path) == MasterKey("k", NEW.secret)
    assert not caplog.records
    for mode in (0o444, 0o644):  # what a Secret's volume gives if nobody says otherwise
        caplog.clear()
        path.chmod(mode)
        assert read_key("k", path).secret == NEW.secret
        (record,) = caplog.records
        assert (
            "anybody on this machine may read it" in record.message and "defaultMode: 0400" in record.message
        )
        assert record.levelname == "WARNING" and NEW.secret.hex() not in record.message
    for mode in (0o602, 0o620, 0o660, 0o666):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=r"may write it .*chmod 0600"):
            read_key("k", path)


@given(key=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_names_tell_keys_apart_and_lead_back(key: bytes) -> None:
    ids = KeyRing(NEW, OLD).ids
    names = [form.stored_key(key, key_id) for key_id in ids]
    assert len({key, *names}) == 3 and all(len(name) == KEY_BYTES for name in names)
    assert [form.stored_key(name, key_id) for name, key_id in zip(names, ids, strict=True)] == [key, key]
    # The id is the secret's, whatever it is called.
    assert KeyRing(MasterKey("another name", NEW.secret)).ids == ids[:1]
    assert KeyRing(MasterKey(NEW.name, bytes(32))).ids[0] not in ids


async def test_rotation_reads_both_keys_and_writes_the_first(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    sealing = await StagingPool.create(agent, 1 << 20)

    def with_keys(*keys: MasterKey) -> TierDriver:
        return TierDriver(EncryptedTier(host, KeyRing(*keys), sealing), staging)

    await with_keys(OLD).put(1, 5000)
    both = with_keys(NEW, OLD)
    assert not await both.put(1, 5000)  # it is there, and can be read
    await both.put(2, 5000)
    assert await both.get(1, 0, 5000) == object_bytes(1, 5000)
    only_new = with_keys(NEW)
    assert await only_new.get(2, 0, 5000) == object_bytes(2, 5000)
    # What the old key sealed is a miss from the start, and does not stand in the way of what can be read.
    assert await only_new.prefix(1) == 0 and only_new.tier.size_of(object_key(1)) is None
    with pytest.raises(ObjectMissingError):
        await only_new.get(1, 0, 5000)
    assert only_new.tier.pin([object_key(1)]) == [] and await only_new.tier.evict([object_key(1)]) == 0
    assert await only_new.put(1, 5000)
    assert await only_new.get(1, 0, 5000) == object_bytes(1, 5000)
    assert only_new.tier.stats().corrupt_dropped == 0
    # The copy of the old key is still there for who has that key only, and goes with the other one.
    assert await with_keys(OLD).get(1, 0, 5000) == object_bytes(1, 5000)
    assert await both.tier.evict([object_key(1)]) == 1
    assert [await driver.prefix(1) for driver in (both, only_new, with_keys(OLD))] == [0, 0, 0]


@given(sealed_with=st.lists(st.sampled_from(["old", "new", "both", "foreign", "none"]), max_size=9))
@settings(max_examples=30, deadline=None)
def test_a_prefix_of_two_live_keys_is_found_whole(sealed_with: list[str]) -> None:
    """Reference: an object counts if either live key sealed it."""

    async def look() -> None:
        async with await TransferAgent.create() as agent:
            staging, sealing = [await StagingPool.create(agent, 1 << 20) for _ in range(2)]
            host = await HostTier.open(agent, 1 << 20)
            rings = {"old": KeyRing(OLD), "new": KeyRing(NEW), "foreign": KeyRing(MasterKey("x", bytes(32)))}
            for number, those in enumerate(sealed_with):
                for name in {"both": ("old", "new"), "none": ()}.get(those, (those,)):
                    driver = TierDriver(EncryptedTier(host, rings[name], sealing), staging)
                    assert await driver.put(number, 3000)
            tier = EncryptedTier(host, KeyRing(NEW, OLD), sealing)
            keys = [object_key(number) for number in range(len(sealed_with))]
            there = [those not in ("none", "foreign") for those in sealed_with]
            expected = [*there, False].index(False)
            assert await tier.contains_prefix(keys) == expected
            assert (tier.stats().lookups, tier.stats().hits) == (len(keys), expected)
            assert [tier.size_of(key) is not None for key in keys] == there
            driver = TierDriver(tier, staging)
            for number in range(expected):
                assert await driver.get(number, 7, 2000) == object_bytes(number, 3000)[7:2007]
            await tier.close()
            await staging.close()

    asyncio.run(look())


async def test_a_long_prefix_is_found_in_pieces_and_evicted_from_its_far_end(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    tier = await encrypt(host, agent)
    keys = [object_key(number) for number in range(1500)]
    names = [form.stored_key(key, tier._ring.ids[0]) for key in keys]
    for name in names:
        host._index.add(name, Location(0, 0, form.sealed_size(10)))
    assert await tier.contains_prefix([*keys, object_key(5000)]) == 1500
    assert list(host._index.oldest_first()) == names[::-1]
    for name in names:
        host._index.remove(name)


async def test_pins_and_events_follow_an_object_from_key_to_key(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    sealing = await StagingPool.create(agent, 1 << 20)
    old = TierDriver(EncryptedTier(host, KeyRing(OLD), sealing), staging)
    await old.put(1, 5000)
    both = EncryptedTier(host, KeyRing(NEW, OLD), sealing)
    told: list[tuple[int, bool]] = []
    numbers = {object_key(number): number for number in range(3)}
    # Names lead to more than one key; those that are nobody's are passed over, as the pipeline does.
    both.watch(lambda key, stored: told.append((numbers[key], stored)) if key in numbers else None)
    assert both.pin([object_key(1), object_key(2)]) == [object_key(1)]
    assert await both.evict([object_key(1)]) == 0
    both.unpin([object_key(1)])
    both.unpin([object_key(1)])
    assert await both.evict([object_key(1)]) == 1
    driver = TierDriver(both, staging)
    await driver.put(2, 5000)
    await driver.tier.clear()
    assert told == [(1, False), (2, True), (2, False)]


async def test_a_prefix_of_two_keys_is_evicted_from_its_far_end(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    sealing = await StagingPool.create(agent, 1 << 20)
    for number, key in enumerate((NEW, OLD, NEW, OLD)):
        await TierDriver(EncryptedTier(host, KeyRing(key), sealing), staging).put(number, 1000)
    both = EncryptedTier(host, KeyRing(NEW, OLD), sealing)
    assert await both.contains_prefix([object_key(number) for number in range(4)]) == 4
    (new, old) = both._ring.ids
    expected = [form.stored_key(object_key(n), old if n % 2 else new) for n in (3, 2, 1, 0)]
    assert list(host._index.oldest_first()) == expected


async def test_each_tenant_has_a_key_of_its_own(agent: TransferAgent, staging: StagingPool) -> None:
    one = Namespace(bytes(32), "layout", b"one").key(b"same prefix")
    two = Namespace(bytes(32), "layout", b"two").key(b"same prefix")
    assert one != two
    assert tenant_of(one) != tenant_of(two)
    assert tenant_of(one) == tenant_of(Namespace(bytes(32), "other", b"one").key(b"another"))
    ring, salt = KeyRing(NEW), bytes(32)
    nonce, plain = bytes(12), bytes(64)
    sealed = {
        ring.cipher(ring.ids[0], tenant_of(key), salt).encrypt(nonce, plain, b"")  # type: ignore[union-attr]
        for key in (one, two)
    }
    assert len(sealed) == 2


# --- the tier ---------------------------------------------------------------------------------------


class _Damaging(TierWrapper):
    """Flips a bit of what is read."""

    on = False

    async def get(self, reads: list[ReadRequest], *, timeout_s: float) -> None:  # type: ignore[override]
        await self.inner.get(reads, timeout_s=timeout_s)
        if self.on:
            reads[-1].into.view[-1] ^= 1


async def test_damage_is_a_miss_and_the_object_can_be_stored_again(
    agent: TransferAgent, staging: StagingPool
) -> None:
    damaging = _Damaging(await HostTier.open(agent, 1 << 20))
    tier = await encrypt(damaging, agent)
    driver = TierDriver(tier, staging)
    await driver.put(1, 40_000)
    tier.pin([object_key(1)])
    damaging.on = True
    with pytest.raises(ObjectCorruptError, match="does not authenticate"):
        await driver.get(1, 100, 20_000)
    damaging.on = False
    assert await tier.contains_prefix([object_key(1)]) == 0
    with pytest.raises(ObjectMissingError):
        await driver.get(1, 0, 10)
    assert tier.stats().corrupt_dropped == 1
    assert not await driver.put(1, 40_000)  # pinned, so it cannot be replaced yet
    tier.unpin([object_key(1)])
    assert await driver.put(1, 40_000)
    assert await driver.get(1, 100, 20_000) == object_bytes(1, 40_000)[100:20_100]
    await tier.close()


async def test_plain_and_sealed_objects_are_never_taken_for_each_other(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    tier = await encrypt(host, agent)
    sealed, plain = TierDriver(tier, staging), TierDriver(host, staging)
    await plain.put(1, form.sealed_size(1000))  # a size that a sealed object could have
    await sealed.put(2, 1000)
    assert await sealed.prefix(1) == await plain.prefix(2) == 0
    # Not even where somebody moved a plain object under the name of a sealed one.
    name = form.stored_key(object_key(3), tier._ring.ids[0])
    async with staging.lease(form.sealed_size(1000), 5) as span:
        span.view[:] = object_bytes(3, span.nbytes)
        await host.put(name, span, timeout_s=5)
    with pytest.raises(ObjectCorruptError, match="not encrypted"):
        await sealed.get(3, 0, 1000)
    assert await sealed.prefix(3) == 0


async def test_an_object_that_another_worker_replaced_is_read_anew(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    mine, theirs = [TierDriver(await encrypt(_Silent(host), agent), staging) for _ in range(2)]
    await mine.put(1, 5000)
    assert await mine.get(1, 0, 5000) == object_bytes(1, 5000)
    await host.clear()
    await theirs.put(1, 5000)
    assert await mine.get(1, 0, 5000) == object_bytes(1, 5000)


class _Silent(TierWrapper):
    """Tells nothing of what comes and goes, as a tier of several workers cannot."""

    watch = Tier.watch


async def test_more_than_the_staging_memory_holds_is_read_in_batches(
    agent: TransferAgent, staging: StagingPool
) -> None:
    tier = await encrypt(await HostTier.open(agent, 4 << 20), agent, staging=64 * 1024)
    driver = TierDriver(tier, staging)
    for number in range(6):
        await driver.put(number, 30_000)
    async with staging.lease(6 * 30_000, 5) as span:
        spans = [span.slice(i * 30_000, 30_000) for i in range(6)]
        await tier.get([ReadRequest(object_key(i), 0, into) for i, into in enumerate(spans)], timeout_s=5)
        for number, into in enumerate(spans):
            assert bytes(into.view) == object_bytes(number, 30_000)
    await tier.close()

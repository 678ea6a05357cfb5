"""Encryption at rest: the conformance kit over every kind of tier, and what only encryption can get wrong."""

from __future__ import annotations

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
from dynamo_kvtc.testing.stateful import check_tier_against_model
from dynamo_kvtc.tiers import DiskTier, HostTier, Namespace, ReadRequest, SharedDiskTier, Tier
from dynamo_kvtc.tiers import encryption_format as form
from dynamo_kvtc.tiers.base import tenant_of
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey, read_key
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
    path.write_bytes(secret)
    path.chmod(0o602)
    with pytest.raises(ConfigError, match="anybody may write"):
        read_key("k", path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_key("k", tmp_path / "missing")
    with pytest.raises(ConfigError, match="a different id for each"):
        KeyRing(NEW, MasterKey(NEW.name, OLD.secret))


async def test_rotation_reads_both_keys_and_writes_the_first(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)

    def with_keys(*keys: MasterKey) -> TierDriver:
        return TierDriver(EncryptedTier(host, KeyRing(*keys), sealing), staging)

    sealing = await StagingPool.create(agent, 1 << 20)
    await with_keys(OLD).put(1, 5000)
    both = with_keys(NEW, OLD)
    await both.put(2, 5000)
    assert await both.get(1, 0, 5000) == object_bytes(1, 5000)
    only_new = with_keys(NEW)
    assert await only_new.get(2, 0, 5000) == object_bytes(2, 5000)
    with pytest.raises(ObjectCorruptError, match="not configured"):
        await only_new.get(1, 0, 5000)
    # A miss from then on, and room for what can be read.
    assert only_new.tier.size_of(object_key(1)) is None
    assert await only_new.put(1, 5000)
    assert await only_new.get(1, 0, 5000) == object_bytes(1, 5000)


async def test_each_tenant_has_a_key_of_its_own(agent: TransferAgent, staging: StagingPool) -> None:
    one = Namespace(bytes(32), "layout", b"one").key(b"same prefix")
    two = Namespace(bytes(32), "layout", b"two").key(b"same prefix")
    assert one != two
    assert tenant_of(one) != tenant_of(two)
    assert tenant_of(one) == tenant_of(Namespace(bytes(32), "other", b"one").key(b"another"))
    ring, salt = KeyRing(NEW), bytes(32)
    nonce, plain = bytes(12), bytes(64)
    sealed = {
        ring.cipher(NEW.id, tenant_of(key), salt).encrypt(nonce, plain, b"")  # type: ignore[union-attr]
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
    sealed, plain = TierDriver(await encrypt(host, agent), staging), TierDriver(host, staging)
    await plain.put(1, form.sealed_size(1000))  # a size that a sealed object could have
    with pytest.raises(ObjectCorruptError, match="not encrypted"):
        await sealed.get(1, 0, 1000)
    await sealed.put(2, 1000)
    assert await plain.get(2, form.HEADER_BYTES, 1000) != object_bytes(2, 1000)


async def test_an_object_that_another_worker_replaced_is_read_anew(
    agent: TransferAgent, staging: StagingPool
) -> None:
    host = await HostTier.open(agent, 1 << 20)
    mine, theirs = [TierDriver(await encrypt(_Silent(host), agent), staging) for _ in range(2)]
    await mine.put(1, 5000)
    assert await mine.get(1, 0, 5000) == object_bytes(1, 5000)
    await host.evict([object_key(1)])
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

"""A whole pipeline with an encrypted disk tier, as the configuration opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs cryptography: pip install 'dynamo-kvtc[encryption]'")

import torch
from rig import BLOCK_SIZE, GEOMETRY, make_cache

from dynamo_kvtc.config import load_config
from dynamo_kvtc.errors import ConfigError, OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks

TEXT = """
codec: {{profile: raw}}
tiers:
  - kind: disk
    path: tier
    capacity: 8MiB
    encryption:
      keys: [{keys}]
policy: {{tier_block_tokens: 32, recent_window: 0, minimum_tokens: 0}}
transfer: {{staging: 4MiB}}
"""

HASHES = [bytes([number]) * 32 for number in range(8)]


async def _open(folder: Path, *keys: str) -> TierAdapter:
    path = folder / "kvtc.yaml"
    path.write_text(TEXT.format(keys=", ".join(f"{{id: {key}, file: {key}.key}}" for key in keys)))
    return await open_adapter(load_config(path), GEOMETRY, BLOCK_SIZE)


async def _store(adapter: TierAdapter, salt: bytes = b"") -> None:
    ticket = adapter.offload(SequenceBlocks(HASHES, range(8), salt), make_cache(8, filled=True))
    assert (await ticket.wait()).stored == 2


async def _served(adapter: TierAdapter, salt: bytes = b"") -> bool:
    destination = make_cache(8, filled=False)
    if await adapter.lookup(HASHES, salt=salt) != 64:
        return False
    await adapter.onboard(SequenceBlocks(HASHES, range(8), salt), destination).wait()
    expected, found = make_cache(8, filled=True).gather(range(8)), destination.gather(range(8))
    return all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


async def test_kv_at_rest_is_sealed_and_comes_back_with_its_key_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.key").write_bytes(name.encode().ljust(32, b"."))
    async with await _open(tmp_path, "one") as adapter:
        await _store(adapter)
        assert await _served(adapter)
    # A page of raw KV as it lies in the cache is nowhere in the files.
    page = (
        make_cache(8, filled=True).keys[0][0].contiguous().view(torch.uint8).flatten()[:64].numpy().tobytes()
    )
    for file in (tmp_path / "tier").iterdir():
        assert page not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
    async with await _open(tmp_path, "two", "one") as adapter:  # rotated
        assert await _served(adapter)
    async with await _open(tmp_path, "two") as adapter:  # the old key is gone: misses from the start
        assert await adapter.lookup(HASHES) == 0
        with pytest.raises(OnboardError, match="no tier has a sound object"):
            await adapter.onboard(SequenceBlocks(HASHES, range(8)), make_cache(8, filled=False)).wait()
        await _store(adapter)
        assert await _served(adapter)
    # With both keys a worker finds what either sealed, and stores nothing twice.
    async with await _open(tmp_path, "one", "two") as adapter:
        ticket = adapter.offload(SequenceBlocks(HASHES, range(8)), make_cache(8, filled=True))
        assert (await ticket.wait()).already_stored == 2
        assert await _served(adapter)


async def test_another_key_under_the_same_name_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "one.key").write_bytes(bytes(range(32)))
    async with await _open(tmp_path, "one") as adapter:
        await _store(adapter)
    (tmp_path / "one.key").write_bytes(bytes(range(1, 33)))
    async with await _open(tmp_path, "one") as adapter:
        assert await adapter.lookup(HASHES) == 0
        await _store(adapter)
        assert await _served(adapter)


async def test_tenants_with_the_same_prefix_never_meet(tmp_path: Path) -> None:
    (tmp_path / "one.key").write_bytes(bytes(range(32)))
    async with await _open(tmp_path, "one") as adapter:
        await _store(adapter, b"tenant a")
        assert await _served(adapter, b"tenant a")
        for salt in (b"", b"tenant b", b"tenant a ", b"tenant"):
            assert await adapter.lookup(HASHES, salt=salt) == 0


async def test_a_missing_key_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the encryption key nokey"):
        await _open(tmp_path, "nokey")

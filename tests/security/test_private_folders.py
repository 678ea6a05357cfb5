"""Stored KV is private: files 0600, folders 0700, and folders that are not are refused or warned of."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import BLOCK_SIZE, GEOMETRY, open_rig

from dynamo_kvtc.config import load_config
from dynamo_kvtc.errors import TierError
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.tiers.access import check_private


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The process's own umask must not be what keeps files private."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}


async def test_what_a_disk_tier_writes_is_private_whatever_the_umask(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("disk",)) as rig:
        await rig.store(rig.sequence(96))
        found = modes(tmp_path / "disk")
    assert found.pop("disk") == 0o700
    assert found and set(found.values()) <= {0o600, 0o700}, found


def test_an_open_folder_is_refused_warned_of_or_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="dynamo_kvtc")
    folder = tmp_path / "tier"
    check_private(folder, "refuse")  # not there yet
    folder.mkdir(0o700)
    check_private(folder, "refuse")
    for mode in (0o750, 0o701, 0o777):
        folder.chmod(mode)
        with pytest.raises(TierError, match="others than its owner"):
            check_private(folder, "refuse")
        check_private(folder, "allow")
    assert not caplog.records
    check_private(folder, "warn")
    assert "security.open_folders" in caplog.records[0].getMessage()
    folder.chmod(0o700)
    (folder / "segment").touch(0o640)
    with pytest.raises(TierError, match="segment"):
        check_private(folder, "refuse")


async def test_the_setting_decides_at_start(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(0o755)
    path = tmp_path / "config.yaml"
    text = "codec: {profile: raw}\ntiers: [{kind: disk, path: kv, capacity: 1MiB, segment_size: 1MiB}]\n"
    path.write_text(text + "security: {open_folders: refuse}\n")
    with pytest.raises(TierError, match="chmod -R go-rwx"):
        await open_adapter(load_config(path, {}), GEOMETRY, BLOCK_SIZE)
    path.write_text(text)
    async with await open_adapter(load_config(path, {}), GEOMETRY, BLOCK_SIZE):
        pass

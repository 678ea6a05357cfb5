"""GPUDirect Storage is refused, before anything is tried, where it cannot work.

Transfers through it need a machine with NVIDIA's driver nvidia-fs and are not tested.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.transfer import gds
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.settings import AgentSettings


@pytest.mark.skipif(gds.gds_problem() is None, reason="the driver nvidia-fs is here")
async def test_without_the_driver_it_is_refused_at_once() -> None:
    with pytest.raises(TransferError, match=r"transfer\.gds is true, but .*set it to false"):
        await TransferAgent.create(AgentSettings(gds=True))


def test_a_driver_without_its_library_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(gds, "_DRIVER", driver)
    assert "nvidia-fs is not loaded" in str(gds.gds_problem())
    driver.write_text("2.29")

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gds.ctypes, "CDLL", missing)
    assert "cuFile cannot be loaded (libcufile.so.0" in str(gds.gds_problem())
    monkeypatch.setattr(gds.ctypes, "CDLL", lambda name: None)
    assert gds.gds_problem() is None


def test_the_pool_of_batches_is_as_large_as_what_may_be_in_flight() -> None:
    options = gds.gds_options(16_384, 256)
    # At worst, every transfer ends with a batch that is not full.
    assert int(options["batch_pool_size"]) >= 16_384 // int(options["batch_limit"]) + 256


def test_a_file_is_opened_again_past_the_page_cache(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, b"x" * 4096)
        try:
            direct = gds.open_direct(fd)
        except OSError as error:
            pytest.skip(f"this file system has no O_DIRECT: {error}")
        try:
            assert os.fstat(direct).st_ino == os.fstat(fd).st_ino
            assert os.get_inheritable(direct) is False
        finally:
            os.close(direct)
    finally:
        os.close(fd)

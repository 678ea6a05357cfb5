"""Files read into memory of a device.

Here a tensor on the CPU stands for it, which NIXL's POSIX backend fills. NIXL's memory of GPUs and cuFile
need a GPU and the driver nvidia-fs, and are not tested.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.device_memory import DeviceRegion, tensor_of
from dynamo_kvtc.transfer.staging import StagingPool


async def test_a_file_is_read_into_leases_of_a_tensor(agent: TransferAgent, tmp_path: Path) -> None:
    content = bytes(range(256)) * 64
    (tmp_path / "file").write_bytes(content)
    file = await agent.open_file(tmp_path / "file", nbytes=len(content))
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    region = DeviceRegion(memory)
    await agent.register_memory(region)
    pool = StagingPool(agent, region, alignment=4096, max_waiters=0)
    first, second = pool.try_lease(5000), pool.try_lease(3000)
    assert first is not None and second is not None
    await agent.read_file([(file.span(16, 5000), first), (file.span(7000, 3000), second)], 5)
    assert tensor_of(first).numpy().tobytes() == content[16:5016]
    assert tensor_of(second).numpy().tobytes() == content[7000:10_000]
    assert memory[second.offset : second.offset + 3000].numpy().tobytes() == content[7000:10_000]
    assert not memory[5000 : second.offset].any()
    pool.release(first)
    pool.release(second)
    assert pool.leased_bytes == 0
    await pool.close()
    with pytest.raises(ValueError, match="not \\(or no longer\\) registered"):
        await agent.read_file([(file.span(0, 16), region.span(0, 16))], 5)


async def test_its_bytes_are_not_the_host_s_to_look_at(agent: TransferAgent) -> None:
    region = DeviceRegion(torch.zeros(64, dtype=torch.uint8))
    assert (region.nbytes, region.on_device, region.kind) == (64, True, "DRAM")
    with pytest.raises(TypeError, match="not the host's"):
        region.span().view  # noqa: B018
    host = await agent.allocate(64)
    assert not host.on_device
    with pytest.raises(TypeError, match="not of a device"):
        tensor_of(host.span())


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4), torch.zeros(8, dtype=torch.uint8)[::2]]
)
def test_a_region_is_one_run_of_bytes(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one contiguous run"):
        DeviceRegion(tensor)


async def test_a_closed_agent_takes_no_memory() -> None:
    agent = await TransferAgent.create()
    await agent.close()
    with pytest.raises(TransferError, match="closed"):
        await agent.register_memory(DeviceRegion(torch.zeros(8, dtype=torch.uint8)))

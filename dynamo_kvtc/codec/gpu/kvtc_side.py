"""The kvtc profile on the device; the CPU's is `dynamo_kvtc.codec.kvtc_side`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.project_kvtc import project_groups
from dynamo_kvtc.codec.gpu.kernels.unpack_kvtc import unpack_groups
from dynamo_kvtc.codec.gpu.kvtc_tables import KvtcTables
from dynamo_kvtc.codec.gpu.sections import Sections
from dynamo_kvtc.codec.gpu.side import GpuSide, SectionSpan
from dynamo_kvtc.codec.gpu.weights import DeviceWeights
from dynamo_kvtc.codec.packing import SectionLayout
from dynamo_kvtc.codec.parameters import SideParameters
from dynamo_kvtc.codec.quantiser import PlanQuantiser

__all__ = ["KvtcGpuSide"]


class KvtcGpuSide(GpuSide):
    """Payloads of fixed size; one kernel each way."""

    def __init__(
        self, gpu: GpuDevice, side: SideParameters, plan_id: int, layer_size: int, pairs: torch.Tensor
    ) -> None:
        quantiser = PlanQuantiser(side.plans[plan_id])
        super().__init__(gpu, DeviceWeights.make(gpu, side, quantiser.components, layer_size, pairs))
        self.layout = SectionLayout.of(quantiser)
        self._tables = KvtcTables.make(gpu, side.plans[plan_id])

    def slab_bytes(self, tokens: int) -> int:
        """Return the payload's size."""
        return self.layout.payload_size(tokens)

    def symbols_offset(self, tokens: int) -> int:
        """Return 0: all of a payload is of fixed size."""
        return 0

    def encode(
        self,
        rows: torch.Tensor,
        sums: torch.Tensor,
        sections: Sections,
        payload: torch.Tensor,
        status: torch.Tensor,
    ) -> torch.Tensor:
        """Project, quantise and pack a batch; see `GpuSide.encode`."""
        project_groups(self._gpu, self.weights.forward, rows, self._tables, sections, payload, status)
        return torch.zeros_like(status)

    def spans(self, sections: Sections, escapes: Sequence[int]) -> list[SectionSpan | None]:
        """Return where each section lies; see `GpuSide.spans`."""
        return [
            SectionSpan(offset, tuple((size,) for size in self.layout.chunk_sizes(tokens)))
            for tokens, offset in zip(sections.counts, sections.offsets, strict=True)
        ]

    def decode(
        self,
        payload: torch.Tensor,
        counts: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        faults: torch.Tensor,
    ) -> torch.Tensor:
        """Unpack and dequantise a batch; see `GpuSide.decode`."""
        sections = Sections.make(self._gpu, counts, offsets)
        coefficients = self._empty_coefficients(sections.columns)
        unpack_groups(self._gpu, payload, self._tables, sections, coefficients, faults)
        return coefficients

"""The rd profile on the device; the CPU's is `dynamo_kvtc.codec.rd_side`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.products import BLOCK_R
from dynamo_kvtc.codec.gpu.kernels.project_rd import project_symbols
from dynamo_kvtc.codec.gpu.kernels.rd_side_data import write_side_data
from dynamo_kvtc.codec.gpu.kernels.unpack_rd import UNPACK_ROWS, unpack_symbols
from dynamo_kvtc.codec.gpu.paged import to_pairs
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections
from dynamo_kvtc.codec.gpu.side import GpuSide, SectionSpan
from dynamo_kvtc.codec.gpu.weights import DeviceWeights
from dynamo_kvtc.codec.importance import LEVELS, MIN_LEVEL, scales
from dynamo_kvtc.codec.parameters import RdSideParameters
from dynamo_kvtc.codec.rd_packing import ESCAPE_BYTES, RdLayout

__all__ = ["RdGpuSide"]


class RdGpuSide(GpuSide):
    """Symbols leave the projection's kernel packed; see `kernels.project_rd`."""

    def __init__(
        self, gpu: GpuDevice, side: RdSideParameters, plan_id: int, layer_size: int, pairs: torch.Tensor
    ) -> None:
        plan = side.plans[plan_id]
        super().__init__(gpu, DeviceWeights.make(gpu, side, plan.components, layer_size, pairs))
        self.layout = RdLayout(plan.counts)
        self.importance = gpu.upload(to_pairs(side.importance, pairs))
        self._bias = side.importance_bias
        self._step = float(torch.tensor(plan.step, dtype=torch.float32))
        self._tiles = RowTiles.make(gpu, plan.counts, BLOCK_R)
        self._unpack_tiles = RowTiles.make(gpu, plan.counts, UNPACK_ROWS)
        self._rounding = gpu.upload(plan.rounding.contiguous())
        self._offsets = gpu.upload(plan.offsets.contiguous())
        self._scales = gpu.upload(scales(torch.arange(MIN_LEVEL, MIN_LEVEL + LEVELS)))

    def slab_bytes(self, tokens: int) -> int:
        """Return the size of a payload with the most escapes."""
        return self.layout.payload_bounds(tokens)[1]

    def symbols_offset(self, tokens: int) -> int:
        """Return the size of the largest side data: symbols begin behind it."""
        return self.layout.side_size(tokens, self.layout.max_escapes(tokens))

    def encode(
        self,
        rows: torch.Tensor,
        sums: torch.Tensor,
        sections: Sections,
        payload: torch.Tensor,
        status: torch.Tensor,
    ) -> torch.Tensor:
        """Project, quantise and pack a batch; see `GpuSide.encode`."""
        levels = (sums + self._bias).round_().clamp_(MIN_LEVEL, MIN_LEVEL + LEVELS - 1)
        # NaN, which the gather has reported already, must not become an index.
        nibbles = (levels.nan_to_num_() - MIN_LEVEL).to(torch.int32)
        factors = self._scales[nibbles.long()] / self._step
        blocks = len(sections.counts)
        capacity = max(self.layout.max_escapes(tokens) for tokens in sections.counts)
        counts = torch.zeros_like(status)
        lists = torch.zeros((2, blocks, capacity), dtype=torch.int32, device=rows.device)
        escapes = (counts, lists[0], lists[1])
        project_symbols(
            self._gpu, self.weights.forward, rows, factors, self._rounding, self._tiles, sections, payload,
            escapes, status,
        )  # fmt: skip
        write_side_data(self._gpu, nibbles, escapes, sections, payload)
        return counts

    def spans(self, sections: Sections, escapes: Sequence[int]) -> list[SectionSpan | None]:
        """Return where each section lies; see `GpuSide.spans`."""
        spans: list[SectionSpan | None] = []
        for tokens, offset, count in zip(sections.counts, sections.offsets, escapes, strict=True):
            if count > self.layout.max_escapes(tokens):
                spans.append(None)
                continue
            side = self.layout.side_size(tokens, count)
            size = side + sum(self.layout.class_sizes(tokens))
            chunks = tuple(map(tuple, self.layout.chunks(tokens, size)))
            spans.append(SectionSpan(offset - side, chunks))
        return spans

    def decode(
        self,
        payload: torch.Tensor,
        counts: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        faults: torch.Tensor,
    ) -> torch.Tensor:
        """Unpack and dequantise a batch; see `GpuSide.decode`."""
        escapes, starts = [], []
        for tokens, offset, size in zip(counts, offsets, sizes, strict=True):
            # Within the bounds that `read_header` has checked; a remainder makes the stated count differ.
            extra = size - self.layout.payload_bounds(tokens)[0]
            escapes.append(extra // ESCAPE_BYTES if extra % ESCAPE_BYTES == 0 else -1)
            starts.append(offset + size - sum(self.layout.class_sizes(tokens)))
        sections = Sections.make(self._gpu, counts, starts)
        coefficients = self._empty_coefficients(sections.columns)
        unpack_symbols(
            self._gpu,
            payload,
            self._gpu.upload(torch.tensor(offsets, dtype=torch.int64)),
            self._gpu.upload(torch.tensor(escapes, dtype=torch.int32)),
            self._unpack_tiles,
            sections,
            self._scales,
            self._offsets,
            self._step,
            coefficients,
            faults,
            any_escapes=max(escapes) > 0,
        )
        return coefficients

"""One side of one layer group under one plan on the device: what a profile provides to `GpuCodec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.sections import Sections
from dynamo_kvtc.codec.gpu.weights import DeviceWeights

__all__ = ["GpuSide", "SectionSpan"]


@dataclass(frozen=True, slots=True)
class SectionSpan:
    """Where one encoded section lies in the payload buffer: its first byte, and sizes of its chunks' runs."""

    start: int
    chunks: tuple[tuple[int, ...], ...]


class GpuSide(ABC):
    """Centred rows to payloads and back; batches of tier blocks, all work on the device's stream.

    Attributes
    ----------
    weights : DeviceWeights
        Transform, trimmed to the plan.
    importance : torch.Tensor or None
        float32 ``[row]`` on the device, if rows carry importance.
    """

    weights: DeviceWeights
    importance: torch.Tensor | None = None

    def __init__(self, gpu: GpuDevice, weights: DeviceWeights) -> None:
        self._gpu = gpu
        self.weights = weights

    @property
    def stored(self) -> int:
        """Components that the plan stores."""
        return self.weights.stored

    def _empty_coefficients(self, tokens: int) -> torch.Tensor:
        """Return bfloat16 ``[tokens, padded]`` with zeros behind the stored components."""
        shape = (tokens, self.weights.padded)
        coefficients = torch.empty(shape, dtype=torch.bfloat16, device=self._gpu.device)
        coefficients[:, self.stored :] = 0
        return coefficients

    @abstractmethod
    def slab_bytes(self, tokens: int) -> int:
        """Return the bytes that a section of some coded tokens takes in the payload buffer at most."""

    @abstractmethod
    def symbols_offset(self, tokens: int) -> int:
        """Return where, within its slab, the part of a section of fixed size begins."""

    @abstractmethod
    def encode(
        self,
        rows: torch.Tensor,
        sums: torch.Tensor,
        sections: Sections,
        payload: torch.Tensor,
        status: torch.Tensor,
    ) -> torch.Tensor:
        """Project, quantise and pack a batch.

        Parameters
        ----------
        rows : torch.Tensor
            bfloat16 ``[tokens, row]``, centred.
        sums : torch.Tensor
            float32 ``[tokens]``: importance sums of `gather_rows`.
        sections, payload : Sections, torch.Tensor
            Where payloads go.
        status : torch.Tensor
            int32 ``[tier blocks]``; set to 1 for what cannot be encoded.

        Returns
        -------
        torch.Tensor
            int32 ``[tier blocks]``: the number of escapes, 0 where the profile has none.
        """

    @abstractmethod
    def spans(self, sections: Sections, escapes: Sequence[int]) -> list[SectionSpan | None]:
        """Return where each section lies, once the number of its escapes is known; None if too many."""

    @abstractmethod
    def decode(
        self,
        payload: torch.Tensor,
        counts: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        faults: torch.Tensor,
    ) -> torch.Tensor:
        """Unpack and dequantise a batch.

        Parameters
        ----------
        payload : torch.Tensor
            uint8 buffer that holds all payloads.
        counts, offsets, sizes : Sequence[int]
            Coded tokens, first byte and bytes of each tier block's payload.
        faults : torch.Tensor
            int32 ``[tier blocks]``; bits of `dynamo_kvtc.codec.gpu.faults` are set.

        Returns
        -------
        torch.Tensor
            bfloat16 ``[tokens, padded]``, zeros behind the stored components.
        """

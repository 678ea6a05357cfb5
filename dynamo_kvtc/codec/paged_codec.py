"""The contract of a codec that works in the engine's paged cache itself, where it lies on a device.

`KvCodec` takes and returns tensors; a `PagedCodec` also gathers from and scatters into paged views, so that
uncompressed KV never leaves the device. Its calls launch work and return; what must be waited for says so,
and belongs in a worker thread, never on an event loop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dynamo_kvtc.codec.base import BINDING_BYTES, Buffer, KvCodec
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.errors import KvtcError

__all__ = ["REACHED", "Completion", "EncodedStream", "PagedBlock", "PagedCodec", "Payload", "PendingEncode"]

#: A layer group's bytes of a stream: on the host, or uint8 ``[bytes]`` on a codec's device.
Payload = Buffer | torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedBlock:
    """One tier block in a paged cache.

    Attributes
    ----------
    block_ids : Sequence[int]
        The engine's blocks, in the order of the tokens.
    num_tokens : int
        Tokens of the tier block; the last engine block may be filled in part.
    first_position, sink_tokens, binding : int, int, bytes
        As in `TierBlock`.
    """

    block_ids: Sequence[int]
    num_tokens: int
    first_position: int
    sink_tokens: int = 0
    binding: bytes = bytes(BINDING_BYTES)


class Completion(Protocol):
    """A point in a device's work."""

    def reached(self) -> bool:
        """Tell whether everything before it is done; never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling thread until everything before it is done.

        Raises
        ------
        GpuUnavailableError
            If the device does not answer; see `dynamo_kvtc.codec.gpu.device`.
        """
        ...

    def order(self, stream: torch.cuda.Stream | None) -> None:
        """Make later work of `stream` wait for it, without blocking the caller."""
        ...


class _Reached:
    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def order(self, stream: torch.cuda.Stream | None) -> None:
        return


#: The completion of what is done when a call returns.
REACHED: Completion = _Reached()


class EncodedStream(Protocol):
    """A stream whose chunks may still lie on the device."""

    @property
    def nbytes(self) -> int:
        """Size of the stream."""
        ...

    def copy_into(self, target: memoryview) -> None:
        """Write the stream to `nbytes` bytes of host memory, pinned for speed; blocks the thread."""
        ...


class PendingEncode(Protocol):
    """A batch that is being encoded."""

    @property
    def gathered(self) -> Completion:
        """When the engine may reuse its blocks."""
        ...

    def streams(self) -> Sequence[EncodedStream | Exception]:
        """Return one stream, or what is wrong with the block, for each tier block; blocks the thread."""
        ...


class PagedCodec(KvCodec):
    """A codec with a way of its own between the engine's blocks and streams.

    Attributes
    ----------
    device : torch.device
        Where it works.
    profile : Profile
        Of the streams that it makes and reads.
    most_encode_tokens, most_open_tokens : int
        Tokens that one `begin_encode` and one `open_groups` may hold: what fits into its memory.
    """

    device: torch.device
    profile: Profile
    most_encode_tokens: int
    most_open_tokens: int

    @abstractmethod
    def with_plan_of(self, codec: KvCodec) -> PagedCodec:
        """Return a codec of the same artifact, device and memory that encodes with the plan of `codec`."""

    @abstractmethod
    def begin_encode(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        blocks: Sequence[PagedBlock],
        *,
        after: torch.cuda.Event | None = None,
    ) -> PendingEncode:
        """Launch the encoding of tier blocks.

        Parameters
        ----------
        keys, values : Sequence[torch.Tensor]
            One view ``[blocks, block_size, heads, head_size]`` per layer, on `device`.
        after : torch.cuda.Event, optional
            The engine's writes of these blocks; by default, what its default stream holds by now.

        Raises
        ------
        LayoutError
            If views or blocks do not fit the codec.
        """

    @abstractmethod
    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> list[Any | KvtcError]:
        """Do what `open_group` does for several streams in one batch; blocks the thread.

        Parameters
        ----------
        payloads : Sequence[Payload]
            On the host, or on `device`: those are runs of one tensor, begin at multiples of 16 bytes, and are
            there; nothing reads them any more when the call ends.

        Returns
        -------
        list
            For each stream an opened group, which knows its ``num_tokens``, or what is wrong with it.
        """

    @abstractmethod
    def landing_problem(self) -> str | None:
        """Say why payloads should not lie on `device`, None if they may; blocks the thread."""

    @abstractmethod
    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        block_ids: Sequence[int],
        *,
        after: torch.cuda.Event | None = None,
    ) -> list[Completion]:
        """Launch the decoding of layers into the engine's blocks.

        Parameters
        ----------
        parts : Sequence
            What `open_groups` or `join` returned for the group that the layers lie in.
        keys, values, block_ids : Sequence
            The cache's views, and the block of each run of tokens; -1 leaves a run out.
        after : torch.cuda.Event, optional
            The engine's reads of these blocks; by default, what its default stream holds by now.

        Returns
        -------
        list[Completion]
            For each of `layers`, when it is in place for every token.
        """

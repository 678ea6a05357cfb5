"""The boundary between an engine's paged cache (G1) and streams, where tier blocks are encoded and decoded.

Offload and onboard know this contract only. A cache in host memory is served by the CPU's codec, in the
threads that call; one on a device by a `PagedCodec`, whose calls launch work there and return, so that
uncompressed KV never leaves the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.paged_codec import (
    REACHED,
    Completion,
    EncodedStream,
    PagedBlock,
    PagedCodec,
    Payload,
    PendingEncode,
)
from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.pipeline.device_staging import DeviceStaging
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.pipeline.paged import PagedKvCache

__all__ = ["Boundaries", "Boundary", "DeviceBoundary", "Fence", "HostBoundary"]

#: A point in the engine's work.
Fence = torch.cuda.Event


class Boundary(ABC):
    """How the KV of one kind of cache becomes streams and comes back. Thread-safe, but for `begin_encode`.

    Attributes
    ----------
    launches : bool
        Whether calls launch work for a device and return: then one call with everything is best. If not,
        they compute in the calling thread, and many small calls keep many threads busy.
    holds : bool
        Whether what is opened is only held here: it is decoded later, and measured then.
    most_encode_tokens, most_open_tokens : int or None
        Tokens that may be encoded, and of which a layer group may be opened, in one go; None: any number.
    device_staging : DeviceStaging or None
        Where payloads may lie besides host memory.
    """

    launches: bool
    holds: bool = False
    most_encode_tokens: int | None = None
    most_open_tokens: int | None = None
    device_staging: DeviceStaging | None = None

    @abstractmethod
    def begin_encode(
        self,
        cache: PagedKvCache,
        blocks: Sequence[PagedBlock],
        encoder: Encoder,
        after: Fence | None = None,
    ) -> PendingEncode:
        """Begin to encode tier blocks; called by one thread at a time.

        Parameters
        ----------
        encoder : Encoder
            What to encode with.
        after : Fence, optional
            What the engine asked of its device before it handed over the blocks: `PagedKvCache.fenced` then.
        """

    @abstractmethod
    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> Sequence[Any | KvtcError]:
        """Open one layer group of several streams; see `PagedCodec.open_groups`."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Join opened groups; see `KvCodec.join`."""

    @abstractmethod
    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        after: Fence | None = None,
    ) -> list[Completion]:
        """Decode layers into the engine's blocks behind `after`; see `PagedCodec.scatter`."""


@dataclass(frozen=True, slots=True)
class _HostStream:
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def copy_into(self, target: memoryview) -> None:
        target[:] = self.data


@dataclass(frozen=True, slots=True)
class _HostEncode:
    """Tier blocks that have been copied out."""

    encoders: Encoders
    encoder: Encoder
    blocks: Sequence[TierBlock]

    @property
    def gathered(self) -> Completion:
        return REACHED

    def streams(self) -> Sequence[EncodedStream | Exception]:
        try:
            return [_HostStream(data) for data in self.encoders.encode(self.blocks, self.encoder)]
        except Exception:
            # One bad block (NaN, say) must not take the others of its batch with it.
            return [self._alone(block) for block in self.blocks]

    def _alone(self, block: TierBlock) -> EncodedStream | Exception:
        try:
            return _HostStream(self.encoders.encode([block], self.encoder)[0])
        except Exception as error:
            return error


class HostBoundary(Boundary):
    """The CPU's codec: blocks are copied out, then encoded; layers are decoded, then copied in."""

    launches = False

    def __init__(self, codec: KvCodec, encoders: Encoders) -> None:
        self._codec, self._encoders = codec, encoders

    def begin_encode(
        self,
        cache: PagedKvCache,
        blocks: Sequence[PagedBlock],
        encoder: Encoder,
        after: Fence | None = None,
    ) -> PendingEncode:
        """Copy tier blocks out of the cache, which knows its fence; see `Boundary.begin_encode`."""
        keys, values = cache.gather([one for block in blocks for one in block.block_ids])
        return _HostEncode(self._encoders, encoder, cut_blocks(keys, values, blocks))

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> Sequence[Any | KvtcError]:
        """Open one layer group of several streams, one after the other."""
        return [self._open(*one) for one in zip(headers, [group] * len(headers), payloads, strict=True)]

    def _open(self, header: StreamHeader, group: int, payload: Payload) -> Any | KvtcError:
        assert not isinstance(payload, torch.Tensor)  # it has no device staging
        try:
            return self._codec.open_group(header, group, payload)
        except KvtcError as error:
            return error

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Join opened groups; see `KvCodec.join`."""
        return self._codec.join(parts)

    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        after: Fence | None = None,
    ) -> list[Completion]:
        """Decode layers and copy them in; they are in place when it returns."""
        for layer in range(layers.first, layers.stop):
            keys, values = self._codec.decode_layer(parts, layer)
            cache.scatter_layer(layer, block_ids, keys, values)
        return [REACHED] * layers.count


@dataclass(frozen=True, slots=True)
class _GuardedPending:
    """A batch on a device, with copies of the blocks that the guard wants to see decoded again."""

    pending: PendingEncode
    encoders: Encoders
    encoder: Encoder
    codec: PagedCodec
    samples: dict[int, TierBlock]

    @property
    def gathered(self) -> Completion:
        return self.pending.gathered

    def streams(self) -> Sequence[EncodedStream | Exception]:
        streams = self.pending.streams()
        for index, block in self.samples.items():
            stream = streams[index]
            if not isinstance(stream, Exception):
                data = bytearray(stream.nbytes)
                stream.copy_into(memoryview(data))
                self.encoders.check(self.encoder, block, data, self.codec)
        return streams


@dataclass(frozen=True, slots=True)
class _HostPart:
    """An opened group of a stream that the device does not read."""

    opened: Any
    num_tokens: int


class DeviceBoundary(Boundary):
    """A codec that works in the engine's blocks, ordered behind the engine's work by its fences.

    Parameters
    ----------
    codec : PagedCodec
        Encodes with any plan, and decodes every plan's streams.
    encoders : Encoders
        Check samples, which never leave the device.
    host : HostBoundary
        Encodes and decodes streams of other profiles (raw ones), which are copied out and in.
    device_staging : DeviceStaging, optional
        Memory of the codec's device, for payloads.
    """

    launches = True

    def __init__(
        self,
        codec: PagedCodec,
        encoders: Encoders,
        host: HostBoundary,
        device_staging: DeviceStaging | None = None,
    ) -> None:
        self._codec, self._encoders, self._host = codec, encoders, host
        self.device_staging = device_staging
        self.most_encode_tokens = codec.most_encode_tokens
        self.most_open_tokens = codec.most_open_tokens

    def begin_encode(
        self,
        cache: PagedKvCache,
        blocks: Sequence[PagedBlock],
        encoder: Encoder,
        after: Fence | None = None,
    ) -> PendingEncode:
        """Launch the encoding of tier blocks; see `Boundary.begin_encode`."""
        if encoder.is_raw:
            return self._host.begin_encode(cache, blocks, encoder, after)
        keys, values = cache.views
        codec = self._codec.with_plan_of(encoder.codec)
        chosen = [index for index in range(len(blocks)) if self._encoders.guard.samples_next()]
        copies = {
            index: cut_blocks(*cache.gather(blocks[index].block_ids), [blocks[index]])[0] for index in chosen
        }
        pending = codec.begin_encode(keys, values, blocks, after=after)
        return _GuardedPending(pending, self._encoders, encoder, codec, copies)

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> Sequence[Any | KvtcError]:
        """Open one layer group of several streams: those that the device reads in one batch."""
        own = [index for index, header in enumerate(headers) if header.profile is self._codec.profile]
        others = [index for index in range(len(headers)) if index not in set(own)]
        results: dict[int, Any] = {}
        for boundary, indices in ((self._codec, own), (self._host, others)):
            if indices:
                opened = boundary.open_groups(
                    [headers[index] for index in indices], group, [payloads[index] for index in indices]
                )
                results.update(zip(indices, opened, strict=True))
        for index in others:
            if not isinstance(results[index], KvtcError):
                results[index] = _HostPart(results[index], headers[index].num_tokens)
        return [results[index] for index in range(len(headers))]

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Join what the device opened; see `KvCodec.join`."""
        joined: list[Any] = []
        for is_host, each in groupby(parts, key=lambda part: isinstance(part, _HostPart)):
            run = list(each)
            joined += run if is_host else self._codec.join(run)
        return joined

    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        after: Fence | None = None,
    ) -> list[Completion]:
        """Launch the decoding of layers into the engine's blocks."""
        keys, values = cache.views
        completions = [REACHED] * layers.count
        start = 0
        for is_host, each in groupby(parts, key=lambda part: isinstance(part, _HostPart)):
            run = list(each)
            stop = start + sum(part.num_tokens for part in run) // cache.block_size
            ids = block_ids[start:stop]
            if is_host:
                self._host.scatter([part.opened for part in run], layers, cache, ids)
            else:
                # Later launches are reached after earlier ones: the last completions stand for all.
                completions = self._codec.scatter(run, layers, keys, values, ids, after=after)
            start = stop
        return completions


class Boundaries:
    """The boundaries of one adapter.

    Parameters
    ----------
    codec : KvCodec
        The CPU's, for every cache that the device's codec does not serve.
    encoders : Encoders
        What may be encoded with.
    device_codec : PagedCodec, optional
        For caches on its device.
    device_staging : DeviceStaging, optional
        Memory of that device, for payloads.
    """

    def __init__(
        self,
        codec: KvCodec,
        encoders: Encoders,
        device_codec: PagedCodec | None = None,
        device_staging: DeviceStaging | None = None,
    ) -> None:
        #: The CPU's, which serves any cache.
        self.host = HostBoundary(codec, encoders)
        self._device, self._place = None, None
        if device_codec is not None:
            self._device = DeviceBoundary(device_codec, encoders, self.host, device_staging)
            self._place = device_codec.device

    def of(self, cache: PagedKvCache) -> Boundary:
        """Return the boundary of a cache."""
        if self._device is not None and cache.device == self._place and cache.has_views:
            return self._device
        return self.host


def cut_blocks(keys: torch.Tensor, values: torch.Tensor, blocks: Sequence[PagedBlock]) -> list[TierBlock]:
    """Cut what `PagedKvCache.gather` returned into tier blocks."""
    cut, start = [], 0
    for block in blocks:
        stop = start + block.num_tokens
        cut.append(
            TierBlock(
                keys[start:stop], values[start:stop], block.first_position, block.sink_tokens, block.binding
            )
        )
        start = stop
    return cut

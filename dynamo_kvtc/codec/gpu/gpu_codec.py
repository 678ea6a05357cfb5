"""The transform-coding profiles on a GPU: the contract of `KvCodec`, the streams of the CPU's codecs.

Encoding: gather (RoPE off, centred), project, quantise and pack on the device, entropy-code the chunks of a
whole batch at once, and bring compressed bytes alone to the host. Decoding is the way back; the last kernel
writes into the engine's blocks. Sizes, headers and checksums are the host's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import torch

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.entropy import RANS, DeflateCoder
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.gpu.coders import default_coder, device_decoders
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.encoding import EncodedSection, PendingBatch, gather_sinks
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder
from dynamo_kvtc.codec.gpu.group_opener import GroupOpener
from dynamo_kvtc.codec.gpu.kernels.gather import gather_rows
from dynamo_kvtc.codec.gpu.landed import checksum_problem
from dynamo_kvtc.codec.gpu.opened import DeviceGroup, join_groups
from dynamo_kvtc.codec.gpu.resident import Resident
from dynamo_kvtc.codec.gpu.rotation import rotation_tables
from dynamo_kvtc.codec.gpu.scattering import ScatterWork, run_positions, token_slots
from dynamo_kvtc.codec.gpu.sections import Sections
from dynamo_kvtc.codec.gpu.staging import (
    Batch,
    StagingBudget,
    decode_bytes_per_token,
    encode_bytes,
    encode_bytes_per_token,
)
from dynamo_kvtc.codec.gpu.weights import DeviceWeights
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.paged_codec import Completion, PagedBlock, PagedCodec, Payload
from dynamo_kvtc.codec.sinks import SinkCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import ArtifactMismatchError, KvtcError

__all__ = ["GpuCodec"]

_SIDES = (SectionKind.KEYS, SectionKind.VALUES)


class GpuCodec(PagedCodec):
    """Codec of the kvtc and rd profiles on one device. Thread-safe.

    Parameters
    ----------
    host : TransformCodec
        The CPU's codec of the same artifact and plan; it knows headers and sizes.
    gpu : GpuDevice
        Where kernels run.
    coder : BatchCoder, optional
        Encodes chunks, and decodes its own; by default the host's coder on the device (`coders.py`).
    staging_bytes : int
        Device memory for what is in flight; see `dynamo_kvtc.codec.gpu.staging`.
    block_tokens : int
        Tokens of the tier blocks that the staging memory is planned for.

    Raises
    ------
    LayoutError
        If heads have an odd number of channels.
    """

    def __init__(
        self,
        host: TransformCodec,
        gpu: GpuDevice,
        *,
        coder: BatchCoder | None = None,
        staging_bytes: int = 1 << 30,
        block_tokens: int = 256,
    ) -> None:
        self.host, self._gpu, self.device, self.profile = host, gpu, gpu.device, host.profile
        self.parameters, self.geometry, self.layer_groups = host.parameters, host.geometry, host.layer_groups
        self._coder = coder or default_coder(gpu, host.coder, host.mapper)
        # Sinks are few and coded on the CPU, where rANS is slow.
        self._sink_coder = DeflateCoder() if host.coder.coder_id == RANS else host.coder
        self.budget = StagingBudget(staging_bytes)
        # Half of the budget: encoding and decoding, or two requests, go on side by side.
        each = [max(taken) for taken in zip(*self._token_bytes(block_tokens), strict=True)]
        self.most_open_tokens, self.most_encode_tokens = (staging_bytes // 2 // taken for taken in each)
        #: Bytes of staging memory that a token takes while it is encoded or decoded, whichever is more.
        self.token_bytes = max(each)
        self._resident = Resident(gpu, self.parameters)
        self._opener = GroupOpener(host, gpu, device_decoders(gpu, self._coder), self.budget, self._resident)

    def with_plan_of(self, codec: KvCodec) -> GpuCodec:
        """Return a codec that encodes with another plan; see `PagedCodec.with_plan_of`.

        Raises
        ------
        ArtifactMismatchError
            If `codec` is of another artifact or profile.
        """
        if codec is self.host:
            return self
        if not isinstance(codec, TransformCodec) or codec.parameters is not self.parameters:
            raise ArtifactMismatchError("a plan of another artifact; open its codec on the device as well")
        other = copy(self)
        other.host = codec
        return other

    def _token_bytes(self, block_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield what a token takes while it is opened and encoded, for each plan."""
        for plan_id in self.parameters.ratios:
            yield (
                decode_bytes_per_token(self.parameters, plan_id, block_tokens=block_tokens),
                encode_bytes_per_token(
                    self.parameters,
                    plan_id,
                    block_tokens=block_tokens,
                    coder_bytes=self._coder.encode_bytes,
                ),
            )

    # --- sizes and headers: the host's -----------------------------------------------------------

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table."""
        return self.host.header_bytes(num_tokens, sink_tokens)

    def max_header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of the header of a stream of any plan and any sink bits."""
        return self.host.max_header_bytes(num_tokens, sink_tokens)

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream's size: that of chunks which do not shrink."""
        return self.host.max_stream_bytes(num_tokens, sink_tokens)

    def read_header(self, data: Buffer, *, binding: bytes | None = None) -> StreamHeader:
        """Parse and verify a header; see `KvCodec.read_header`."""
        return self.host.read_header(data, binding=binding)

    def warm_up(self) -> None:
        """Put the bases of the plan that is encoded with on the device; see `KvCodec.warm_up`."""
        for group in range(len(self.layer_groups)):
            for kind in _SIDES:
                self._resident.side(group, kind, self.host.encoding_plan)

    # --- encode ----------------------------------------------------------------------------------

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks from tensors on any device; see `KvCodec.encode`."""
        for block in blocks:
            block.check(self.geometry)
        if not blocks:
            return []
        keys = torch.cat([block.keys.to(self.device) for block in blocks]).unsqueeze(1)
        values = torch.cat([block.values.to(self.device) for block in blocks]).unsqueeze(1)
        paged, start = [], 0
        for block in blocks:
            stop = start + block.num_tokens
            paged.append(
                PagedBlock(
                    range(start, stop),
                    block.num_tokens,
                    block.first_position,
                    block.sink_tokens,
                    block.binding,
                )
            )
            start = stop
        pending = self.begin_encode(keys.unbind(2), values.unbind(2), paged)
        streams = []
        for stream in pending.streams():
            if isinstance(stream, Exception):
                raise stream
            target = bytearray(stream.nbytes)
            stream.copy_into(memoryview(target))
            streams.append(bytes(target))
        return streams

    def begin_encode(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        blocks: Sequence[PagedBlock],
        *,
        after: torch.cuda.Event | None = None,
    ) -> PendingBatch:
        """Launch the encoding of tier blocks; see `PagedCodec.begin_encode`."""
        plan_id = self.host.encoding_plan
        gpu, geometry, rope = self._gpu, self.geometry, self.parameters.rope
        caches = self._resident.cache(keys), self._resident.cache(values)
        coded = [block.num_tokens - block.sink_tokens for block in blocks]
        block_size = caches[0].block_size
        slots = [token_slots(block.block_ids, block_size)[: block.num_tokens] for block in blocks]
        batch = Batch()
        needed = encode_bytes(self.parameters, plan_id, coded, self._coder.encode_bytes)
        with self.budget.taken_by(batch, needed), gpu.active():
            gpu.after_engine(after)
            place = gpu.upload(
                torch.cat([own[block.sink_tokens :] for own, block in zip(slots, blocks, strict=True)])
            )
            owners = gpu.upload(
                torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32), torch.tensor(coded))
            )
            first = [block.first_position + block.sink_tokens for block in blocks]
            positions = gpu.upload(run_positions(first, coded))
            with gpu.stage("gather"):
                unrotate = rotation_tables(gpu, rope, positions, geometry.head_size, inverse=True)
            status = torch.zeros(len(blocks), dtype=torch.int32, device=self.device)
            sides, total = [], 0
            sections: list[Sections] = []
            for group in range(len(self.layer_groups)):
                for kind in _SIDES:
                    side, offsets = self._resident.side(group, kind, plan_id), []
                    for tokens in coded:
                        offsets.append(total + side.symbols_offset(tokens))
                        total += side.slab_bytes(tokens)
                    sides.append(side)
                    section = sections[0].at(offsets) if sections else Sections.make(gpu, coded, offsets)
                    sections.append(section)
            payload = torch.empty(total, dtype=torch.uint8, device=self.device)
            # One buffer for the rows of every side, one after the other.
            widest = max(layers.count for layers in self.layer_groups) * geometry.layer_size
            buffer = torch.empty(sum(coded) * widest, dtype=torch.bfloat16, device=self.device)
            encoded = []
            for index, (side, section) in enumerate(zip(sides, sections, strict=True)):
                layers, kind = self.layer_groups[index // 2], _SIDES[index % 2]
                row = layers.count * geometry.layer_size
                rows = buffer[: sum(coded) * row].view(sum(coded), row)
                with gpu.stage("gather"):
                    sums = gather_rows(
                        gpu, caches[index % 2].layers(layers.first, layers.stop), place, owners, status,
                        side.weights.mean, unrotate if kind is SectionKind.KEYS else None, side.importance,
                        rows,
                    )  # fmt: skip
                if index == len(sides) - 1:
                    sinks = [
                        gather_sinks(gpu, keys, values, own[: block.sink_tokens])
                        for own, block in zip(slots, blocks, strict=True)
                    ]
                    gathered = gpu.record()
                with gpu.stage("project, quantise, pack"):
                    escapes = side.encode(rows, sums, section, payload, status)
                encoded.append(EncodedSection(layers, kind, side, section, escapes))
        return PendingBatch(
            gpu,
            self.budget,
            self._coder,
            SinkCodec(geometry, self.host.sink_bits),
            self._sink_coder,
            gathered,
            [self.host.header(block) for block in blocks],
            status,
            payload,
            encoded,
            sinks,
            batch,
        )

    # --- decode ----------------------------------------------------------------------------------

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> DeviceGroup:
        """Verify, inflate and dequantise one layer group of one stream; blocks the thread."""
        (opened,) = self.open_groups([header], group, [payload])
        if isinstance(opened, KvtcError):
            raise opened
        return opened

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> list[DeviceGroup | KvtcError]:
        """Open one layer group of several streams in one batch; see `PagedCodec.open_groups`."""
        return self._opener.open_groups(headers, group, payloads)

    def landing_problem(self) -> str | None:
        """Say whether the host decodes chunks, or the device misjudges checksums."""
        if not self._coder.inflates:
            return "chunks are decoded on the host (nvCOMP is missing)"
        return checksum_problem(self._gpu)

    def join(self, parts: Sequence[DeviceGroup]) -> list[DeviceGroup]:
        """Join neighbours of one batch; see `KvCodec.join`."""
        return join_groups(parts)

    def decode_layer(self, parts: Sequence[DeviceGroup], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn opened groups into one layer's KV on the device; see `KvCodec.decode_layer`."""
        geometry = self.geometry
        tokens = sum(part.num_tokens for part in parts)
        shape = (tokens, 1, geometry.num_kv_heads, geometry.head_size)
        keys = torch.empty(shape, dtype=geometry.torch_dtype, device=self.device)
        values = torch.empty_like(keys)
        # Every layer of a view list is the same tensor: only `layer` is written.
        views = [keys] * geometry.num_layers, [values] * geometry.num_layers
        self.scatter(parts, LayerRange(layer, 1), *views, range(tokens))[0].wait()
        return keys.squeeze(1), values.squeeze(1)

    def scatter(
        self,
        parts: Sequence[DeviceGroup],
        layers: LayerRange,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        block_ids: Sequence[int],
        *,
        after: torch.cuda.Event | None = None,
    ) -> list[Completion]:
        """Launch the decoding of layers into the engine's blocks; see `PagedCodec.scatter`."""
        gpu = self._gpu
        caches = self._resident.cache(keys), self._resident.cache(values)
        with gpu.active(), gpu.stage("inverse product, scatter"):
            gpu.after_engine(after)
            all_slots = token_slots(block_ids, caches[0].block_size)
            works = []
            start = 0
            for part in parts:
                stop = start + part.num_tokens
                works.append(self._scatter_work(part, all_slots[start:stop]))
                start = stop
            events: list[Completion] = []
            run = gpu.layers_at_once(sum(work.tiles(caches[0]) for work in works), layers.count)
            for first in range(layers.first, layers.stop, run):
                together = LayerRange(first, min(run, layers.stop - first))
                for work in works:
                    work.launch(together, keys, values, *caches)
                events += [gpu.record()] * together.count
        return events

    def _scatter_work(self, part: DeviceGroup, slots: torch.Tensor) -> ScatterWork:
        def weights(kind: SectionKind) -> DeviceWeights:
            return self._resident.side(part.group, kind, part.plan_id).weights

        layers = self.layer_groups[part.group]
        return ScatterWork(self._gpu, self.parameters.rope, layers, weights, part, slots)

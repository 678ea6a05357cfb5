"""Opening a layer group of several streams, from stored bytes to coefficients, in one batch on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder
from dynamo_kvtc.codec.gpu.faults import fault_error
from dynamo_kvtc.codec.gpu.kernels.xxh3 import make_keys
from dynamo_kvtc.codec.gpu.landed import verify_landed
from dynamo_kvtc.codec.gpu.opened import DeviceGroup, Segment
from dynamo_kvtc.codec.gpu.opening import StoredGroup, inflate, plan_inflate, sink_payload, verify
from dynamo_kvtc.codec.gpu.resident import Resident
from dynamo_kvtc.codec.gpu.staging import Batch, StagingBudget, decode_bytes
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.paged_codec import Payload
from dynamo_kvtc.codec.sinks import SinkCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import BitstreamError, KvtcError

__all__ = ["GroupOpener"]

_SIDES = (SectionKind.KEYS, SectionKind.VALUES)


class GroupOpener:
    """Verifies, inflates and dequantises layer groups. Thread-safe.

    Parameters
    ----------
    host : TransformCodec
        The CPU's codec of the same artifact; of any of its plans.
    gpu, decoders, resident
        Where kernels run, what inflates chunks on the device, by coder, and where the plans' tables lie.
    budget : StagingBudget
        Device memory for what is in flight.
    """

    def __init__(
        self,
        host: TransformCodec,
        gpu: GpuDevice,
        decoders: Mapping[int, BatchCoder],
        budget: StagingBudget,
        resident: Resident,
    ) -> None:
        self._host, self._gpu, self._decoders = host, gpu, decoders
        self._budget, self._resident = budget, resident
        self._keys = make_keys(gpu)

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> list[DeviceGroup | KvtcError]:
        """Open one layer group of several streams; see `PagedCodec.open_groups`."""
        results: list[DeviceGroup | KvtcError | None] = [None] * len(headers)
        sound: dict[tuple[int, bool], list[tuple[int, StoredGroup]]] = {}
        for index, stored in self._verified(headers, group, payloads):
            if isinstance(stored, KvtcError):
                results[index] = stored
            else:
                batch = stored.header.plan_id, stored.is_landed
                sound.setdefault(batch, []).append((index, stored))
        for (plan_id, _), members in sound.items():
            opened = self._open_all([stored for _, stored in members], group, plan_id)
            for (index, _), result in zip(members, opened, strict=True):
                results[index] = result
        return [result for result in results if result is not None]

    def _verified(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> Iterator[tuple[int, StoredGroup | KvtcError]]:
        """Verify checksums where the bytes are, and yield what is sound or what is wrong, by index."""
        landed: dict[int, torch.Tensor] = {}
        for index, payload in enumerate(payloads):
            if isinstance(payload, torch.Tensor):
                landed[index] = payload
                continue
            try:
                with self._gpu.stage("verify"):
                    stored = verify(headers[index], group, payload)
            except KvtcError as error:
                yield index, error
            else:
                yield index, stored
        if landed:
            chosen = [headers[index] for index in landed]
            with self._gpu.stage("verify"):
                found = verify_landed(
                    self._gpu, self._decoders, self._keys, chosen, group, list(landed.values())
                )
            yield from zip(landed, found, strict=True)

    @contextmanager
    def _read_to_the_end(self) -> Iterator[None]:
        """Wait for the device if the block fails: what it reads may be written again after that."""
        try:
            yield
        except BaseException:
            if not self._gpu.lost:
                self._gpu.record().wait()
            raise

    def _open_all(
        self, groups: Sequence[StoredGroup], group: int, plan_id: int
    ) -> list[DeviceGroup | KvtcError]:
        """Open streams of one plan; where one spoils the batch, each alone."""
        try:
            return self._open_batch(groups, group, plan_id)
        except BitstreamError as error:
            if len(groups) == 1:
                # Its frames hold tensors of the batch, and an error may be kept for long.
                return [error.with_traceback(None)]
        return [self._open_all([one], group, plan_id)[0] for one in groups]

    def _open_batch(
        self, groups: Sequence[StoredGroup], group: int, plan_id: int
    ) -> list[DeviceGroup | KvtcError]:
        gpu, geometry, layers = self._gpu, self._host.geometry, self._host.layer_groups[group]
        plan = plan_inflate(groups, self._decoders)
        coded = [stored.header.num_tokens - stored.header.sink_tokens for stored in groups]
        batch = Batch()
        needed = decode_bytes(self._host.parameters, plan_id, group, coded, plan.total_bytes)
        sinks = [
            SinkCodec(geometry, stored.header.sink_bits).decode(
                np.frombuffer(sink_payload(stored), dtype=np.uint8), layers.count, stored.header.sink_tokens
            )
            for stored in groups
        ]
        with self._budget.taken_by(batch, needed), gpu.active(), self._read_to_the_end():
            payload, check = inflate(gpu, self._decoders, groups, plan, self._host.mapper)
            faults = torch.zeros(len(groups), dtype=torch.int32, device=gpu.device)
            coefficients = []
            for kind in _SIDES:
                offsets, sizes = zip(*plan.sections[kind], strict=True)
                side = self._resident.side(group, kind, plan_id)
                with gpu.stage("unpack, dequantise"):
                    coefficients.append(side.decode(payload, coded, offsets, sizes, faults))
            # Waits for the batch, in the thread that opens it.
            found = gpu.download(faults).tolist()
            check()
            results: list[DeviceGroup | KvtcError] = []
            first = 0
            for stored, tokens, bits, (sink_keys, sink_values) in zip(
                groups, coded, found, sinks, strict=True
            ):
                rows = slice(first, first + tokens)
                segment = Segment(
                    stored.header.first_position, tokens, gpu.upload(sink_keys), gpu.upload(sink_values)
                )
                results.append(
                    fault_error(bits)
                    or DeviceGroup(
                        group, plan_id, coefficients[0][rows], coefficients[1][rows], (segment,), batch, first
                    )
                )
                first += tokens
        return results

"""What a GPU codec keeps on the device between calls: transforms, tables, descriptions of caches."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kvtc_side import KvtcGpuSide
from dynamo_kvtc.codec.gpu.paged import PagedSide, channel_pairs
from dynamo_kvtc.codec.gpu.rd_side import RdGpuSide
from dynamo_kvtc.codec.gpu.side import GpuSide
from dynamo_kvtc.codec.header import Profile, SectionKind
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.errors import LayoutError

__all__ = ["Resident"]

#: Descriptions of caches that are kept: an engine has one cache, of keys and values.
_MOST_CACHES = 8


class Resident:
    """Sides of an artifact and descriptions of caches. Thread-safe.

    Raises
    ------
    LayoutError
        If heads have an odd number of channels.
    """

    def __init__(self, gpu: GpuDevice, parameters: AnyParameters) -> None:
        self._gpu, self._parameters, self._geometry = gpu, parameters, parameters.geometry
        self._pairs = channel_pairs(parameters.rope, self._geometry.head_size)
        self._channels = gpu.upload(self._pairs)
        self._in_order = torch.equal(self._pairs.flatten(), torch.arange(self._geometry.head_size))
        self._sides: dict[tuple[int, SectionKind, int], GpuSide] = {}
        self._caches: dict[tuple[object, ...], PagedSide] = {}
        self._lock = threading.Lock()

    def cache(self, views: Sequence[torch.Tensor]) -> PagedSide:
        """Describe the keys or values of a paged cache, and check that they are the codec's.

        Raises
        ------
        LayoutError
            If they are not.
        """
        geometry = self._geometry
        first = views[0]
        key = (*(view.data_ptr() for view in views), *first.shape, *first.stride(), first.dtype)
        known = self._caches.get(key)
        if known is not None:
            return known
        shape = (geometry.num_kv_heads, geometry.head_size)
        if len(views) != geometry.num_layers or tuple(first.shape[2:]) != shape:
            raise LayoutError(
                f"{len(views)} layers of {tuple(first.shape)}; the codec serves {geometry.num_layers} "
                f"layers of [blocks, block_size, {shape[0]}, {shape[1]}]"
            )
        if first.dtype != geometry.torch_dtype or first.device.type != self._gpu.device.type:
            raise LayoutError(
                f"a cache of {first.dtype} on {first.device}; the codec serves {geometry.torch_dtype} on "
                f"{self._gpu.device}"
            )
        with self._gpu.active():
            side = PagedSide.of(views, self._channels, in_order=self._in_order)
        if len(self._caches) < _MOST_CACHES:
            self._caches[key] = side
        return side

    def side(self, group: int, kind: SectionKind, plan_id: int) -> GpuSide:
        """Return one side of a layer group under a plan, made when it is first asked for."""
        key = (group, kind, plan_id)
        with self._lock:
            if key not in self._sides:
                self._sides[key] = self._make(*key)
            return self._sides[key]

    def _make(self, group: int, kind: SectionKind, plan_id: int) -> GpuSide:
        parameters = self._parameters.groups[group]
        side = parameters.keys if kind is SectionKind.KEYS else parameters.values
        make = RdGpuSide if self._parameters.profile is Profile.RD else KvtcGpuSide
        with self._gpu.active():
            return make(self._gpu, side, plan_id, self._geometry.layer_size, self._pairs)

"""Which entropy coders work on the device: one that encodes, and all that decode.

Streams name the coder of each chunk, so what is decoded does not depend on what is encoded with. rANS is our
own and always there; DEFLATE needs nvCOMP, without which the host codes and decodes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dynamo_kvtc.codec.bitstream import Mapper
from dynamo_kvtc.codec.entropy import DEFLATE, RANS, EntropyCoder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder, HostBatchCoder
from dynamo_kvtc.codec.gpu.rans_batch import RansBatchCoder
from dynamo_kvtc.errors import MissingDependencyError

__all__ = ["default_coder", "device_decoders"]

_log = logging.getLogger(__name__)


def default_coder(gpu: GpuDevice, coder: EntropyCoder, mapper: Mapper = map) -> BatchCoder:
    """Return what encodes chunks on the device as `coder` does on the CPU.

    rANS by our kernels; DEFLATE by nvCOMP, and by `coder` itself where that is missing, and in the
    interpreter. All other coders are the CPU's.
    """
    if coder.coder_id == RANS:
        return RansBatchCoder(gpu)
    if gpu.is_interpreter or coder.coder_id != DEFLATE:
        return HostBatchCoder(gpu, coder, mapper)
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    try:
        return NvcompDeflate(gpu)
    except MissingDependencyError as error:
        _log.warning(
            "chunks are entropy-coded on the CPU, which is slower: %s; codec.entropy: rans does without",
            error,
        )
        return HostBatchCoder(gpu, coder, mapper)


def device_decoders(gpu: GpuDevice, encoder: BatchCoder) -> Mapping[int, BatchCoder]:
    """Return what decodes chunks on the device, by coder id; the host decodes all others.

    Parameters
    ----------
    encoder : BatchCoder
        What encodes: it decodes its own, if it can.
    """
    decoders = {encoder.coder_id: encoder} if encoder.inflates else {}
    if RANS not in decoders:
        decoders[RANS] = RansBatchCoder(gpu)
    # What encodes DEFLATE on the host does so for want of nvCOMP.
    if not gpu.is_interpreter and encoder.coder_id != DEFLATE:
        from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

        try:
            decoders[DEFLATE] = NvcompDeflate(gpu)
        except MissingDependencyError as error:
            _log.info("DEFLATE chunks of other encoders are decoded on the CPU: %s", error)
    return decoders

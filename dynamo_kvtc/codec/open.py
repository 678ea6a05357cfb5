"""The codec of an artifact, whichever profile it is of."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from dynamo_kvtc.codec.entropy import EntropyCoder
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.parameters import AnyParameters, KvtcParameters, RdParameters
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import ArtifactMismatchError, ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from dynamo_kvtc.codec.gpu.device import GpuDevice
    from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec

__all__ = ["open_codec", "open_gpu_codec"]


def open_codec(
    parameters: AnyParameters,
    *,
    ratio: float | None = None,
    max_kl: float | None = None,
    sink_bits: int = 8,
    compute_dtype: str = "auto",
    threads: int = 2,
    coder: EntropyCoder | None = None,
) -> TransformCodec:
    """Return the codec of the profile that the parameters belong to; arguments as `RdCodec` takes them.

    Raises
    ------
    ArtifactMismatchError
        If the artifact has no plan for `ratio` or `max_kl`. Artifacts of the kvtc profile state no
        divergences, so none of their plans is known to stay within a `max_kl`.
    RopeError, ValueError
        As `RdCodec` does.
    """
    if parameters.profile is Profile.RD:
        return RdCodec(
            cast(RdParameters, parameters),
            ratio=ratio,
            max_kl=max_kl,
            sink_bits=sink_bits,
            compute_dtype=compute_dtype,
            threads=threads,
            coder=coder,
        )
    if max_kl is not None:
        raise ArtifactMismatchError(
            "plans of the kvtc profile are chosen by ratio: their divergence was not measured; "
            "set a ratio, or calibrate an artifact of profile rd"
        )
    return KvtcCodec(
        cast(KvtcParameters, parameters),
        ratio=ratio,
        sink_bits=sink_bits,
        compute_dtype=compute_dtype,
        threads=threads,
        coder=coder,
    )


def open_gpu_codec(
    host: TransformCodec,
    device: torch.device | GpuDevice,
    *,
    block_tokens: int,
    staging_bytes: int,
    sm_share: float,
    priority: str,
    landing_bytes: int = 0,
) -> GpuCodec:
    """Return the codec that serves caches on a GPU in place of `host`, ready to work.

    Parameters
    ----------
    device : torch.device or GpuDevice
        A CUDA device, or one that is open already.
    block_tokens, staging_bytes : int
        Tokens of a tier block, and the memory for what is in flight; see `dynamo_kvtc.codec.gpu.staging`.
    sm_share, priority : float, str
        As `GpuDevice.open` takes them.
    landing_bytes : int
        What of `staging_bytes` is left for stored bytes, which are read into it.

    Raises
    ------
    GpuUnavailableError, MissingDependencyError
        If there is no usable GPU, no Triton or no memory left, or the GPU does not decode as the CPU does.
    LayoutError
        If heads have an odd number of channels, or weights are too large.
    ConfigError
        If one tier block does not fit into half of what is left of `staging_bytes`.
    """
    try:
        import triton
    except ImportError as error:
        raise MissingDependencyError(
            "the GPU codec needs Triton: pip install 'dynamo-kvtc[gpu]' (CUDA builds of torch bring it along)"
        ) from error
    del triton
    from dynamo_kvtc.codec.gpu.device import GpuDevice
    from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
    from dynamo_kvtc.codec.gpu.self_test import self_test

    if isinstance(device, torch.device):
        device = GpuDevice.open(device, sm_share=sm_share, priority=priority)
    left = staging_bytes - landing_bytes
    codec = GpuCodec(host, device, staging_bytes=left, block_tokens=block_tokens)
    if min(codec.most_encode_tokens, codec.most_open_tokens) < block_tokens:
        needed = -(-2 * block_tokens * codec.token_bytes * staging_bytes // left)
        raise ConfigError(
            f"codec.gpu.memory of {staging_bytes} bytes does not hold two tier blocks of {block_tokens} "
            f"tokens: set it to {needed} or more, or lower policy.tier_block_tokens"
        )
    device.reserve(left)
    codec.warm_up()
    self_test(codec)
    return codec

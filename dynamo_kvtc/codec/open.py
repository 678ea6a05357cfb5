"""The codec of an artifact, whichever profile it is of."""

from __future__ import annotations

from typing import cast

from dynamo_kvtc.codec.entropy import EntropyCoder
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.parameters import AnyParameters, KvtcParameters, RdParameters
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import ArtifactMismatchError

__all__ = ["open_codec"]


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

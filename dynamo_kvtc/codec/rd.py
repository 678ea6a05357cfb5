"""The rd profile: coefficients weighted by what the model notices, one step size for all of them.

`dynamo_kvtc.codec.rd_reference` does the same slowly and obviously.
"""

from __future__ import annotations

from dynamo_kvtc.codec.bitstream import Profile, SectionKind
from dynamo_kvtc.codec.entropy import EntropyCoder, HuffmanCoder
from dynamo_kvtc.codec.parameters import RdParameters
from dynamo_kvtc.codec.rd_side import RdSideCodec
from dynamo_kvtc.codec.side import SideCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec

__all__ = ["RdCodec"]


class RdCodec(TransformCodec):
    """Codec of the rd profile.

    Parameters
    ----------
    parameters : RdParameters
        Transforms and plans, from an artifact.
    ratio : float, optional
        Ratio of the plan to encode with.
    max_kl : float, optional
        Instead of `ratio`: largest next-token KL (nats) that the plan to encode with may have had in
        calibration. With neither, the codec is for decoding only.
    sink_bits, compute_dtype, threads
        As `TransformCodec` takes them.
    coder : EntropyCoder, optional
        Entropy coder to encode with; `HuffmanCoder` by default.

    Raises
    ------
    ArtifactMismatchError
        If the artifact has no plan for `ratio` or `max_kl`, or is of another profile.
    RopeError
        As `TransformCodec` does.
    ValueError
        If both `ratio` and `max_kl` are given, or as `TransformCodec` does.
    """

    profile = Profile.RD
    parameters: RdParameters

    def __init__(
        self,
        parameters: RdParameters,
        *,
        ratio: float | None = None,
        max_kl: float | None = None,
        sink_bits: int = 8,
        compute_dtype: str = "auto",
        threads: int = 2,
        coder: EntropyCoder | None = None,
    ) -> None:
        if ratio is not None and max_kl is not None:
            raise ValueError("choose a plan by ratio or by max_kl, not by both")
        plan_id = None
        if ratio is not None:
            plan_id = parameters.plan_id(ratio)
        elif max_kl is not None:
            plan_id = parameters.plan_id_within(max_kl)
        super().__init__(
            parameters,
            plan_id=plan_id,
            sink_bits=sink_bits,
            compute_dtype=compute_dtype,
            threads=threads,
            coder=coder or HuffmanCoder(),
        )

    def _make_side(self, group: int, kind: SectionKind, plan_id: int) -> SideCodec:
        parameters = self.parameters.groups[group]
        side = parameters.keys if kind is SectionKind.KEYS else parameters.values
        return RdSideCodec(side, plan_id, self.geometry.layer_size, self._dtype)

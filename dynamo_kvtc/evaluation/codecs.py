"""Which codecs an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import ArtifactMismatchError, EvaluationError

__all__ = ["PROFILES", "CodecUnderTest", "codecs_under_test"]

#: Profiles that can be evaluated.
PROFILES: tuple[str, ...] = ("rd", "kvtc", "raw")


@dataclass(frozen=True, slots=True)
class CodecUnderTest:
    """A codec and what its row in the report is called.

    Attributes
    ----------
    profile : str
        Name of the profile.
    nominal_ratio : float
        What the codec was made for: by real streams of calibration text with rd, before entropy coding
        with kvtc.
    codec : KvCodec
        The codec itself.
    """

    profile: str
    nominal_ratio: float
    codec: KvCodec


def codecs_under_test(
    artifact: Artifact, profile: str | None = None, ratios: Sequence[float] | None = None
) -> list[CodecUnderTest]:
    """Build the codecs of one profile.

    Parameters
    ----------
    artifact : Artifact
        Calibrated parameters; of the raw profile only its id and geometry are used.
    profile : str, optional
        One of `PROFILES`; by default the artifact's own.
    ratios : Sequence[float], optional
        Ratios of the artifact's plans; by default all that it has. The raw profile has none.

    Raises
    ------
    EvaluationError
        If the profile is unknown, or ratios are given where it has none.
    ArtifactMismatchError
        If the artifact is of another profile, or has no plan for a ratio.
    """
    parameters, own = artifact.parameters, artifact.manifest.profile
    profile = profile or own
    if profile not in PROFILES:
        raise EvaluationError(f"there is no profile {profile!r}; known: {', '.join(PROFILES)}")
    if profile == "raw":
        if ratios:
            raise EvaluationError("the raw profile has one ratio only; leave out the ratios")
        nominal = parameters.geometry.token_bytes_16bit / parameters.geometry.token_bytes
        return [CodecUnderTest("raw", nominal, RawCodec(parameters.geometry, parameters.artifact_id))]
    if profile != own:
        raise ArtifactMismatchError(
            f"the artifact {artifact.folder} is of profile {own}, not {profile}: leave out the profile, or "
            f"calibrate with `dynamo-kvtc calibrate --profile {profile}`"
        )
    chosen = list(ratios) if ratios else sorted(parameters.ratios.values())
    return [CodecUnderTest(profile, ratio, open_codec(parameters, ratio=ratio)) for ratio in chosen]
